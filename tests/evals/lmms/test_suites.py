import json
from pathlib import Path

import pytest

from cal_train.cli.main import main
from cal_train.evals.lmms import scene_tasks
from cal_train.evals.lmms.suites import Suite, check_tasks, load_suite

ROOT = Path(__file__).parents[3]
SUITES = sorted((ROOT / "eval/suites").glob("*.yaml"))


def write(folder, text):
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [a]\nlimits: 3", r"unknown key 'limits': did you mean limit"),
        ("tasks: []", "tasks must be a list of names"),
        ("tasks: pope", "tasks must be a list of names, got 'pope'"),
        ("tasks: [a, a]", "named twice"),
        ("tasks: [a]\nlimit: 0", "limit must be a positive number"),
        ("tasks: [a]\nlimit: true", "limit must be a positive number"),
        ("tasks: [a]\ninclude_path: nowhere", "nowhere does not exist"),
        ("- a", "must be a mapping"),
        ("tasks: [a", "not valid YAML"),
    ],
)
def test_a_bad_suite_file_is_refused_by_name(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load_suite(path)
    assert str(tmp_path) in str(error.value)


def test_places_in_a_suite_are_relative_to_its_file(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "suites").mkdir()
    suite = load_suite(write(tmp_path / "suites", "tasks: [a]\ninclude_path: ../tasks\nlimit: 5"))
    assert suite == Suite("suite", ("a",), include_path=tmp_path / "tasks", limit=5)


def test_a_missing_suite_names_those_that_are_there(tmp_path):
    write(tmp_path, "tasks: [a]")
    with pytest.raises(ValueError, match=r"no suite at .*there are .*suite\.yaml"):
        load_suite(tmp_path / "demos.yaml")


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no task 'textvqa_vall': did you mean textvqa_val"):
        check_tasks(Suite("s", ("pope", "textvqa_vall")), ["pope", "textvqa_val", "mme"])


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_of_the_repository_load(path):
    assert len(SUITES) >= 4
    suite = load_suite(path)
    if suite.expected:
        expected = json.loads(suite.expected.read_text())
        assert set(expected["metrics"]) <= set(suite.tasks)
        assert "2405.17871" in expected["source"] and len(expected["models"]) >= 4
        for values in expected["models"].values():
            assert set(values) == set(expected["metrics"])


@pytest.mark.slow  # lmms-eval reads the files of all its tasks
@pytest.mark.filterwarnings("ignore")  # of lmms-eval's dependencies, at import
def test_lmms_eval_has_every_task_of_the_suites_with_the_pinned_prompt_and_the_expected_metric():
    pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed: task names are NOT checked")
    from lmms_eval.tasks import TaskManager

    known = TaskManager("WARNING", include_path=str(ROOT / "eval/tasks"))
    checked = 0
    for suite in map(load_suite, SUITES):
        check_tasks(suite, known.all_tasks)
        metrics = json.loads(suite.expected.read_text())["metrics"] if suite.expected else {}
        for task in suite.tasks:
            config = known._get_config(task)
            prompts = config.get("lmms_eval_specific_kwargs")
            assert prompts is None or suite.prompt_variant in prompts, task
            names = {entry["metric"].strip() for entry in config["metric_list"]}
            assert metrics.get(task, next(iter(names))) in names, task
            checked += 1
    assert checked >= 20


def test_the_ocr_variant_of_textvqa_differs_from_lmms_eval_s_task_in_nothing_else():
    pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed: the OCR variant is NOT checked")
    from lmms_eval.utils import load_yaml_config

    ours = load_yaml_config(str(ROOT / "eval/tasks/textvqa_val_ocr.yaml"), mode="full")
    import lmms_eval.tasks.textvqa as package

    theirs = load_yaml_config(str(Path(package.__path__[0]) / "textvqa_val.yaml"), mode="full")
    assert ours.pop("task") == "textvqa_val_ocr" and theirs.pop("task") == "textvqa_val"
    prompts = ours.pop("lmms_eval_specific_kwargs"), theirs.pop("lmms_eval_specific_kwargs")
    assert prompts[0]["default"] == prompts[1]["default"] | {"ocr": True} and prompts[1]["default"]["ocr"] is False
    assert repr(names(ours)) == repr(names(theirs))


def names(value):
    """The same value with functions by their names, since a task file loads its own copy of them."""
    if isinstance(value, dict):
        return {key: names(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [names(entry) for entry in value]
    return value.__name__ if callable(value) else value


def test_pope_scores_are_those_worked_by_hand():
    docs = [{"words": "Yes"}, {"words": "Yes"}, {"words": "No"}, {"words": "No"}]
    said = ["Yes, there is one.", "no", "Yes", "maybe"]
    found = [scene_tasks.process_presence(doc, [answer]) for doc, answer in zip(docs, said, strict=True)]
    assert [row["accuracy"] for row in found] == [1.0, 0.0, 0.0, 0.0]  # "maybe" is not a right no
    pairs = [row["f1"] for row in found]
    assert (scene_tasks.precision(pairs), scene_tasks.recall(pairs)) == (0.5, 0.5)
    assert (scene_tasks.f1(pairs), scene_tasks.yes_ratio(pairs)) == (0.5, 0.5)
    assert scene_tasks.f1([(False, True)]) == 0.0


def test_words_are_looked_for_as_words():
    doc = {"answer": "There is a cow in that place.", "words": "cow"}
    scores = [scene_tasks.process_results(doc, [a]) for a in (" There is a cow in that place. ", "a Cow", "a cowboy")]
    assert [tuple(s.values()) for s in scores] == [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "needs --suite, --output"),
        (["--model", "m", "--suite", "s", "--output", "o", "--limit", "0"], "--limit 0"),
        (["--model", "m", "--suite", "nowhere.yaml", "--output", "o"], "no suite at nowhere.yaml"),
    ],
)
def test_a_wrong_command_is_one_message(arguments, message, capsys):
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err
