"""What runs leave behind, spoiled, through merge, train and convert: refused by name, and no pickle is run."""

import shutil

import pytest
from hostile_runs import ADAPTERS, CHECKPOINTS, ORIGINALS, SCORES
from transformers import AutoModelForImageTextToText, AutoProcessor

FAST = {
    "merge": ("config: imports a module", "weights: link outside"),
    "resume": (),  # two runs to start from
    "scores": ("nested", "row of another"),
    "convert": ("index: nul", "weights: pickle"),
}


def fast_some(cases, what):
    """Return the names of cases, all but a few of them marked slow."""
    return [pytest.param(name, marks=() if name in FAST[what] else pytest.mark.slow) for name in cases]


def spoiled(world, kind, cases, name, source):
    """Return a copy of a folder with a case's damage."""
    folder = world.folder(f"{kind}-{list(cases).index(name)}") / source.name
    shutil.copytree(source, folder)
    cases[name](folder, world.outside)
    return folder


def must_run(attack, *arguments):
    outcome = attack(*arguments, max_mib=800, max_seconds=60)
    assert outcome.code == 0, outcome.stderr[-3000:]


@pytest.fixture(scope="module")
def adapter(attack, world):
    """An adapter that merges."""
    folder = world.folder("adapter")
    options = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}
    must_run(attack, "train", world.recipe(folder, **options))
    must_run(attack, "merge", "--adapter", folder / "run", "--base", world.model, "--output", folder / "merged")
    return folder / "run"


def run_options():
    return {"streaming": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def checkpoint(attack, world):
    """A checkpoint that can be resumed."""
    folder = world.folder("checkpoint")
    recipe = world.recipe(folder, **run_options(), per_device_train_batch_size=1)
    must_run(attack, "train", recipe)
    shutil.rmtree(folder / "run" / "checkpoint-2")
    must_run(attack, "train", recipe, "--resume_from_checkpoint", folder / "run" / "checkpoint-1")
    return folder / "run" / "checkpoint-1"


@pytest.fixture(scope="module")
def scores(attack, world):
    """A folder with a score file that a run can take."""
    folder = world.folder("scores") / "scores"
    folder.mkdir()
    images = world.data.parent / "images"
    must_run(
        attack, "score", "--model", world.model, "--data", world.data, "--image_root", images,
        "--output", folder / "scores.jsonl",
    )  # fmt: skip
    must_run(attack, "train", world.recipe(folder.parent, cal=True, cal_scores=str(folder / "scores.jsonl")))
    return folder


@pytest.fixture(scope="module")
def original(attack, world):
    """An original folder that converts, and its tower."""
    folder = world.folder("original")
    model = AutoModelForImageTextToText.from_pretrained(world.model)
    model.model.vision_tower.save_pretrained(folder / "tower")
    AutoProcessor.from_pretrained(world.model, backend="pil").image_processor.save_pretrained(folder / "tower")
    there = ("--from", world.model, "--to", "original", "--vision_tower", "openai/none", "--output", folder / "flat")
    must_run(attack, "convert", *there)
    (folder / "flat" / "conversion.json").unlink()
    back = ("--from", folder / "flat", "--vision_tower", folder / "tower", "--output", folder / "back")
    must_run(attack, "convert", *back)
    return folder / "flat"


@pytest.mark.parametrize("name", fast_some(ADAPTERS, "merge"))
def test_merge_refuses_the_adapter(attack, world, adapter, name):
    folder = spoiled(world, "adapter", ADAPTERS, name, adapter)
    base = () if "base" in name else ("--base", world.model)
    output = folder.parent / "merged"
    attack.refused("merge", "--adapter", folder, *base, "--output", output, names=[folder])
    assert not output.exists()


@pytest.mark.parametrize("name", fast_some(CHECKPOINTS, "resume"))
def test_train_refuses_to_resume(attack, world, checkpoint, name):
    folder = spoiled(world, "checkpoint", CHECKPOINTS, name, checkpoint)
    if not name.startswith("marker"):
        remark(folder)
    recipe = world.recipe(folder.parent, **run_options(), per_device_train_batch_size=1)
    attack.refused("train", recipe, "--resume_from_checkpoint", folder, names=[folder], max_mib=800)
    assert not (folder / "canary").exists()


def remark(checkpoint):
    """Write the marker of a checkpoint anew, as whoever made the damage would."""
    from cal_train.train.safe_save import mark_complete

    (checkpoint / "complete.json").unlink()
    mark_complete(checkpoint)


@pytest.mark.parametrize("name", fast_some(SCORES, "scores"))
def test_train_refuses_the_score_file(attack, world, scores, name):
    folder = spoiled(world, "scores", SCORES, name, scores)
    recipe = world.recipe(folder.parent, cal=True, cal_scores=str(folder / "scores.jsonl"))
    attack.refused("train", recipe, names=[folder], max_mib=800)


@pytest.mark.parametrize("name", fast_some(ORIGINALS, "convert"))
def test_convert_refuses_the_original_folder(attack, world, original, name):
    folder = spoiled(world, "original", ORIGINALS, name, original)
    output = folder.parent / "output"
    arguments = ("--from", folder, "--vision_tower", original.parent / "tower", "--output", output)
    attack.refused("convert", *arguments, names=[folder])
    assert not (folder / "canary").exists() and not output.exists()
