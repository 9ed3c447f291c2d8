"""A run that goes on from a checkpoint of another run is refused, before a weight is read."""

import json
import shutil

import pytest
import yaml

from cal_train.train.resume_check import check_same_run

RUN = ("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--lr_scheduler_type", "linear")


@pytest.fixture(scope="module")
def first(tiny_run):
    return tiny_run(*RUN, "--cal", "true", "--gradient_accumulation_steps", "2") / "checkpoint-1"


@pytest.fixture
def resume(tiny_run, first, tmp_path, monkeypatch):
    """Start the run again from its first step with other options; reading a weight is an error."""

    def go(*options):
        monkeypatch.setattr("cal_train.train.run.load_model", lambda *_: pytest.fail("weights were read"))
        where = ("--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(first))
        return tiny_run(*RUN, "--cal", "true", "--gradient_accumulation_steps", "2", *where, *options)

    return go


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [
        ("max_steps", "3", "2"),
        ("num_train_epochs", "2", "3.0"),
        ("per_device_train_batch_size", "2", "4"),
        ("gradient_accumulation_steps", "1", "2"),
        ("learning_rate", "0.5", "0.01"),
        ("lr_scheduler_type", "cosine", "'linear'"),
        ("seed", "7", "42"),
        ("stage", "pretrain", "'finetune'"),
        ("tune_vision_tower", "true", "None"),
        ("cal", "false", "True"),
        ("cal_high", "3", "1.0"),
        ("lora_enable", "true", "False"),
        ("template", "plain", "'chat'"),
        ("packing", "true", "False"),
        ("mm_projector_lr", "0.1", "None"),
    ],
)
def test_another_run_is_refused_with_what_was_and_is(resume, option, value, was):
    with pytest.raises(ValueError, match=rf"{option} was {was} and is .*resume_changes: \[{option}\]"):
        resume(f"--{option}", value)


def test_all_differences_are_named_at_once(resume):
    with pytest.raises(ValueError, match=r"seed was .*max_steps was .*resume_changes: \[seed, max_steps\]"):
        resume("--seed", "3", "--max_steps", "9")


def test_what_changes_no_step_may_change(tiny_run, first, tmp_path, max_difference, caplog):
    options = ("--cal", "true", "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "again"))
    free = ("--logging_steps", "2", "--save_steps", "2", "--dataloader_num_workers", "1", "--max_bad_samples", "3")
    again = tiny_run(*RUN, *options, *free, "--resume_from_checkpoint", str(first))
    assert max_difference(again, first.parent) == 0
    assert "resuming with a change" not in caplog.text


def test_the_same_rows_per_step_dealt_out_otherwise_only_warn(tiny_run, first, tmp_path, max_difference, caplog):
    split = ("--cal", "true", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    where = ("--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(first))
    again = tiny_run(*RUN, *split, *where)
    assert "per_device_train_batch_size was 4 and is 2" in caplog.text
    assert max_difference(again, first.parent) < 1e-6


def test_a_change_on_purpose_is_named_and_warned_of(tiny_run, first, tmp_path, caplog):
    where = ("--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(first))
    longer = ("--cal", "true", "--gradient_accumulation_steps", "2", "--max_steps", "3")
    folder = tiny_run(*RUN, *longer, *where, "--resume_changes", "max_steps")
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    assert "max_steps was 2 and is 3" in caplog.text


def record(folder, values, **facts):
    folder.mkdir(exist_ok=True)
    facts = {"world_size": 1, "engine": "DDP", "data_files": {"a.json": 7}} | facts
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "environment.json").write_text(json.dumps(facts))
    return {**values, **facts}


VALUES = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5, "lr_scheduler_type": "constant",
    "loss_normalizer": None, "data_path": "a.json",
}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"data_files": {"a.json": 7}}, {"data_files": {"a.json": 8}}, "data_files"),
        ({"engine": "DeepSpeed ZeRO-2"}, {"engine": "DDP"}, "engine"),
        ({"world_size": 2}, {"world_size": 1}, "world_size"),
        ({"world_size": 2}, {"world_size": 1, "gradient_accumulation_steps": 4}, None),
        (
            {"world_size": 2, "engine": "DeepSpeed ZeRO-3"},
            {"world_size": 1, "gradient_accumulation_steps": 4, "engine": "DeepSpeed ZeRO-3"},
            "world_size",
        ),
        (
            {"world_size": 2, "loss_normalizer": "micro_batch"},
            {"world_size": 1, "loss_normalizer": "micro_batch", "gradient_accumulation_steps": 4},
            "world_size",
        ),
        ({"max_steps": 5}, {"max_steps": 9}, None),
        ({"lr_scheduler_type": "cosine"}, {"lr_scheduler_type": "cosine", "max_steps": 9}, "max_steps"),
    ],
)
def test_ranks_engine_and_data_are_compared_too(tmp_path, before, now, named):
    facts = {name: value for name, value in before.items() if name in ("world_size", "engine", "data_files")}
    record(tmp_path, VALUES | {k: v for k, v in before.items() if k not in facts}, **facts)
    current = {**VALUES, "world_size": 1, "engine": "DDP", "data_files": {"a.json": 7}} | now
    if named is None:
        check_same_run(str(tmp_path), current, None)
    else:
        with pytest.raises(ValueError, match=f"{named} was "):
            check_same_run(str(tmp_path), current, None)
        check_same_run(
            str(tmp_path),
            current,
            [named, "world_size", "gradient_accumulation_steps", "max_steps"],
        )


def test_another_batch_is_refused_where_the_record_is_too_old_to_name_the_engine(tmp_path):
    current = record(tmp_path, VALUES, world_size=2)
    facts = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps({"world_size": facts["world_size"]}))
    check_same_run(str(tmp_path), current, None)
    with pytest.raises(ValueError, match="world_size was 2 and is 1"):
        check_same_run(str(tmp_path), current | {"world_size": 1, "gradient_accumulation_steps": 4}, None)


def test_of_thousands_of_data_files_those_that_differ_are_named(tmp_path):
    files = {f"shards/{i:05}.tar": 10_000 for i in range(5_000)}
    current = record(tmp_path, VALUES, data_files=files)
    changed = current | {"data_files": files | {"shards/04711.tar": 9_999}}
    with pytest.raises(
        ValueError, match=r"data_files was {'shards/04711.tar': 10000} and is {'shards/04711.tar': 9999}"
    ):
        check_same_run(str(tmp_path), changed, None)
    with pytest.raises(ValueError, match="data_files was ") as refused:
        check_same_run(str(tmp_path), current | {"data_files": {"other.tar": 1}}, None)
    assert len(str(refused.value)) < 800


def test_a_misspelt_change_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resume_changes: max_step is not compared"):
        check_same_run(str(tmp_path), VALUES, ["max_step"])


def test_a_checkpoint_without_a_record_is_resumed_with_a_warning(tiny_run, first, tmp_path, caplog):
    bare = tmp_path / "checkpoint-1"
    shutil.copytree(first, bare)
    marker = json.loads((bare / "complete.json").read_text())
    for name in ("recipe.yaml", "environment.json"):
        (bare / name).unlink()
        del marker["files"][name]
    (bare / "complete.json").write_text(json.dumps(marker))
    options = ("--cal", "true", "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "again"))
    tiny_run(*RUN, *options, "--resume_from_checkpoint", str(bare))
    assert "holds no recipe.yaml" in caplog.text
