import pytest

from cal_train.cli.main import VERBS, main
from cal_train.cli.recipe import describe_options, load_recipe
from cal_train.cli.tower_recipe import load_tower_recipe
from cal_train.testing import write_tiny_data, write_tiny_vlm
from cal_train.train.run import weighting_of

SMALLEST = """
model_name_or_path: models/x
data_path: data.json
image_folder: images
output_dir: runs/x
"""


@pytest.fixture
def recipe_file(tmp_path):
    def write(extra="", base=SMALLEST):
        path = tmp_path / "recipe.yaml"
        path.write_text(base + extra)
        return path

    return write


def load(path, *options):
    return load_recipe(path, ["--use_cpu", "true", *options])


def test_the_smallest_recipe_has_a_default_for_everything_else(recipe_file):
    recipe = load(recipe_file())
    assert (recipe.model.stage, recipe.data.template, recipe.cal.cal) == ("finetune", "chat", False)
    assert weighting_of(recipe.cal) is None


def test_the_command_line_overrides_the_file_in_each_spelling(recipe_file):
    path = recipe_file("learning_rate: 1e-3\nmax_steps: 5\n")
    assert load(path).training.learning_rate == 1e-3  # text in YAML 1.1
    assert load(path, "--learning_rate", "2e-5").training.learning_rate == 2e-5
    assert load(path, "--max_steps=7").training.max_steps == 7
    assert load(path, "--max-steps", "8").training.max_steps == 8


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        ("", ["--cal"], True),
        ("", ["--cal", "true"], True),
        ("cal: true\n", [], True),
        ("cal: true\n", ["--cal", "false"], False),
        ("", ["--cal", "--max_steps", "3"], True),
        ("cal_strategy: cal_reference\n", [], False),
    ],
)
def test_one_flag_switches_cal(recipe_file, file, options, expected):
    assert load(recipe_file(file), *options).cal.cal is expected


def test_cal_alone_has_the_papers_settings(recipe_file):
    weighting = weighting_of(load(recipe_file(), "--cal").cal)
    assert (weighting.low, weighting.high, weighting.window) == (1, 5, 3)
    assert (weighting.ablation, weighting.scope, weighting.normalizer) == ("remove", "labels", "sample")


@pytest.mark.parametrize(
    ("line", "nearest"),
    [("learning_rat: 1", "learning_rate"), ("cal_hihg: 4", "cal_high"), ("mm_projektor_lr: 1", "mm_projector_lr")],
)
def test_an_unknown_key_suggests_the_nearest_name(recipe_file, line, nearest):
    with pytest.raises(ValueError, match=f"unknown option .* did you mean .*{nearest}"):
        load(recipe_file(line + "\n"))
    key, value = line.split(": ")
    with pytest.raises(ValueError, match=nearest):
        load(recipe_file(), f"--{key}", value)


def test_names_of_llava_and_of_older_transformers_are_understood(recipe_file):
    recipe = load(
        recipe_file("version: plain\nmm_vision_tower_lr: 2e-6\nwarmup_ratio: 0.03\ngradient_checkpointing: true\n")
    )
    assert recipe.data.template == "plain"
    assert recipe.model.vision_tower_lr == 2e-6
    assert recipe.training.warmup_steps == 0.03
    assert recipe.training.activation_checkpointing is True


def test_several_sources_keep_their_roots_and_weights(recipe_file):
    base = (
        "model_name_or_path: m\noutput_dir: o\ndata:\n- {path: a.json, image_root: a, weight: 0.5}\n- {path: b.json}\n"
    )
    assert load(recipe_file(base=base)).data.data == [
        {"path": "a.json", "image_root": "a", "weight": 0.5},
        {"path": "b.json"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list\n", "must be a mapping"),
        ("a: [b\n", "not valid YAML"),
        ("data_path: x\noutput_dir: y\n", "does not set model_name_or_path"),
        (SMALLEST + "max_steps: many\n", "max_steps"),
        (SMALLEST + "stage: warmup\n", "stage"),
        (SMALLEST + "cal_ablation: blur\n", "cal_ablation"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused_with_the_reason(recipe_file, text, message):
    with pytest.raises(ValueError, match=message):
        load(recipe_file(base=text))


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    printed = capsys.readouterr().err
    assert "no recipe at" in printed
    assert "Traceback" not in printed


def test_every_verb_shows_its_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert VERBS[verb].split()[0] in capsys.readouterr().out


def test_help_of_train_lists_every_option_of_ours_with_its_default():
    text = describe_options()
    for name, default in (("cal_high", "5.0"), ("mm_projector_lr", "None"), ("model_max_length", "2048")):
        assert f"--{name} ({default})" in text


@pytest.mark.parametrize("verb", ["train", "preview", "check_data", "score"])
def test_a_model_folder_that_does_not_exist_is_named_by_every_verb(recipe_file, tmp_path, capsys, verb):
    missing = str(tmp_path / "none")
    if verb == "score":
        arguments = ["--model", missing, "--data", "data.json", "--output", str(tmp_path / "scores.jsonl")]
    else:
        arguments = [str(recipe_file(base=SMALLEST.replace("models/x", missing) + "use_cpu: true\n"))]
    assert main([verb, *arguments]) == 2
    assert f"model folder {missing} does not exist" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "line",
    [
        "remove_unused_columns: true",
        "label_smoothing_factor: 0.1",
        "average_tokens_across_devices: false",
        "train_sampling_strategy: group_by_length",
        "dataloader_persistent_workers: true",
        "auto_find_batch_size: true",
    ],
)
def test_an_option_that_would_be_ignored_is_refused_with_the_reason(recipe_file, line):
    with pytest.raises(ValueError, match=f"{line.split(':')[0]}.* is not possible: .*"):
        load(recipe_file(line + "\n"))


def test_a_broken_list_on_the_command_line_is_named(recipe_file):
    with pytest.raises(ValueError, match=r"--data \[\{ is not a list"):
        load(recipe_file(), "--data", "[{")


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    recipe = tmp_path / "recipe.yaml"
    write_tiny_vlm(tmp_path / "vlm")
    data = write_tiny_data(tmp_path / "data", num_rows=2)
    recipe.write_text(
        f"model_name_or_path: {tmp_path / 'vlm'}\ndata_path: {data}\nimage_folder: {data.parent / 'images'}\n"
        f"output_dir: {tmp_path / 'file' / 'run'}\nuse_cpu: true\nmax_steps: 1\n"
    )
    assert main(["train", str(recipe)]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_recipe_of_the_other_kind_is_sent_to_the_other_verb(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: clip\noutput_dir: out\n")
    with pytest.raises(ValueError, match="run it with `cal-train tower`"):
        load_recipe(path)
    path.write_text("model_name_or_path: vlm\noutput_dir: out\n")
    with pytest.raises(ValueError, match="run it with `cal-train train`"):
        load_tower_recipe(path)
    path.write_text("objective: clip\noutput_dir: out\n")
    with pytest.raises(ValueError, match="no part in training a tower"):
        load_tower_recipe(path, ["--cal"])
