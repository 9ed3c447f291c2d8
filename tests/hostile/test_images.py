"""Every hostile image, as a file and as bytes in a Parquet row, through check_data, score and train."""

import json
import re
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hostile_images import IMAGES, bmp
from hostile_rows import turns

NAMES = list(IMAGES)
DROPPED = {i for i, name in enumerate(NAMES) if not IMAGES[name][2]}
LIMITS = {"max_mib": 800, "max_seconds": 120}


@pytest.fixture(scope="module")
def images(world):
    """A JSON file whose rows have one hostile image each, and a Parquet file with the same images inside."""
    folder = world.folder("images")
    rows, contents = [], []
    for i, name in enumerate(NAMES):
        file, make, _ = IMAGES[name]
        (folder / "root" / str(i)).mkdir(parents=True)
        contents.append(make())
        (folder / "root" / str(i) / file).write_bytes(contents[-1])
        rows.append({"id": f"image-{i}", "image": f"{i}/{file}", "conversations": turns()})
    (folder / "data.json").write_text(json.dumps(rows))
    inline = [row | {"image": {"bytes": content, "path": None}} for row, content in zip(rows, contents, strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(inline), folder / "data.parquet")
    return SimpleNamespace(folder=folder, root=folder / "root")


def rows_that_fail(stdout):
    return {int(number) for number in re.findall(r"^│ +\S+ +│ +(\d+) +│", stdout, flags=re.MULTILINE)}


@pytest.fixture(scope="module")
def checked(attack, images):
    """Rows that check_data refuses, by kind of data file."""
    found = {}
    for kind in ("json", "parquet"):
        outcome = attack("check_data", images.folder / f"data.{kind}", "--image_root", images.root, **LIMITS)
        found[kind] = rows_that_fail(outcome.stdout)
        assert outcome.code == 1 and f"{len(NAMES)} rows, {len(found[kind])} would fail" in outcome.stdout
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_check_data_keeps_and_drops(checked, kind, name):
    assert (NAMES.index(name) in checked[kind]) == (NAMES.index(name) in DROPPED)


def test_score_keeps_the_same_images_and_names_the_others(attack, world, images):
    output = images.folder / "scores.jsonl"
    outcome = attack(
        "score", "--model", world.model, "--data", images.folder / "data.json", "--image_root", images.root,
        "--output", output, "--max_bad_samples", len(DROPPED), **LIMITS,
    )  # fmt: skip
    kept = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    left_out = re.findall(r"^left out: \S*data\.json, row (\d+) ", outcome.stderr, flags=re.MULTILINE)
    assert {int(number) for number in left_out} == DROPPED and len(left_out) == len(DROPPED)
    assert kept == [f"image-{i}" for i in range(len(NAMES)) if i not in DROPPED]


def test_train_counts_every_dropped_image(attack, world, images):
    folder = world.folder("images-train")
    options = {"data_path": str(images.folder / "data.json"), "image_folder": str(images.root), "max_steps": -1}
    outcome = attack("train", world.recipe(folder, **options, max_bad_samples=len(DROPPED)), **LIMITS)
    assert outcome.code == 0 and f"{len(DROPPED)} bad rows were dropped on rank 0" in outcome.stderr


@pytest.mark.slow
def test_an_image_of_81_million_pixels_is_scored_in_bounded_memory(attack, world):
    folder = world.folder("images-large")
    (folder / "large.bmp").write_bytes(bmp(9000, 9000, 8, 1, b"\0\x02\xff\xff" * 4000))
    row = {"id": "large", "image": "large.bmp", "conversations": turns()}
    (folder / "data.json").write_text(json.dumps([row]))
    outcome = attack(
        "score", "--model", world.model, "--data", folder / "data.json", "--image_root", folder,
        "--output", folder / "scores.jsonl", max_mib=1600,
    )  # fmt: skip
    assert outcome.code == 0 and len((folder / "scores.jsonl").read_text().splitlines()) == 1
