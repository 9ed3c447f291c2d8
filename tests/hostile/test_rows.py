"""Every hostile row through check_data, score and train: kept or dropped as it should, counted, and named."""

import json
import re
from types import SimpleNamespace

import pytest
from hostile_rows import ROWS, line_of, write_row_world

NAMES = list(ROWS)


@pytest.fixture(scope="module")
def rows(world):
    """All rows in one JSONL file, their image root, and which of them are to be dropped."""
    folder = world.folder("rows")
    write_row_world(folder / "images", world.outside)
    data = folder / "data.jsonl"
    data.write_text("".join(line_of(ROWS[name][0], world.outside) + "\n" for name in NAMES), encoding="ascii")
    dropped = {i for i, name in enumerate(NAMES) if not ROWS[name][1]}
    options = {"data_path": str(data), "image_folder": str(folder / "images"), "max_steps": -1}
    recipe = world.recipe(folder, **options, max_bad_samples=len(dropped))
    return SimpleNamespace(folder=folder, data=data, images=folder / "images", dropped=dropped, recipe=recipe)


@pytest.fixture(scope="module")
def checked(attack, rows):
    """Row numbers that check_data says would fail."""
    outcome = attack("check_data", rows.recipe, max_seconds=60)
    assert outcome.code == 1 and not re.search(r"\x1b\[2J", outcome.stdout)
    first_lines = re.findall(r"^│ +\S+ +│ +(\d+) +│", outcome.stdout, flags=re.MULTILINE)
    assert f"{len(NAMES)} rows, {len(first_lines)} would fail" in outcome.stdout
    return {int(number) for number in first_lines}


@pytest.fixture(scope="module")
def scored(attack, world, rows):
    """Ids of the rows that score kept, in order, and numbers of the rows that it says it left out."""
    output = rows.folder / "scores.jsonl"
    outcome = attack(
        "score", "--model", world.model, "--data", rows.data, "--image_root", rows.images, "--output", output,
        "--max_bad_samples", len(rows.dropped), max_seconds=60,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr[-2000:]
    left_out = re.findall(r"^left out: \S*data\.jsonl, row (\d+) ", outcome.stderr, flags=re.MULTILINE)
    return [json.loads(line)["id"] for line in output.read_text().splitlines()], {int(n) for n in left_out}


@pytest.mark.parametrize("name", NAMES)
def test_check_data_keeps_and_drops(checked, rows, name):
    i = NAMES.index(name)
    assert (i in checked) == (i in rows.dropped)


@pytest.mark.parametrize("name", NAMES)
def test_score_keeps_and_names_what_it_leaves_out(scored, rows, name):
    i = NAMES.index(name)
    assert (i in scored[1]) == (i in rows.dropped)


def test_score_writes_every_kept_row_once_and_in_order(scored, rows):
    ids, left_out = scored
    assert len(ids) + len(left_out) == len(NAMES)

    def own_id(i):
        raw = json.loads(line_of(ROWS[NAMES[i]][0], rows.folder))
        own = raw.get("id")
        return f"data-{i}" if own is None else str(own).encode(errors="backslashreplace").decode()

    assert ids == [own_id(i) for i in range(len(NAMES)) if i not in rows.dropped]


def test_train_counts_every_dropped_row(attack, rows):
    outcome = attack("train", rows.recipe, max_mib=600, max_seconds=120)
    assert outcome.code == 0, outcome.stderr[-2000:]
    assert f"{len(rows.dropped)} bad rows were dropped on rank 0" in outcome.stderr
    assert (rows.folder / "run" / "model.safetensors").is_file()


def test_without_leave_the_first_bad_row_stops_score_and_is_named(attack, world, rows):
    attack.refused(
        "score", "--model", world.model, "--data", rows.data, "--image_root", rows.images, "--output",
        rows.folder / "none.jsonl", names=["data.jsonl, row "], max_seconds=60,
    )  # fmt: skip
    assert not (rows.folder / "none.jsonl").exists()


@pytest.mark.slow
def test_without_leave_a_bad_row_stops_train_and_is_named(attack, world, rows):
    folder = world.folder("rows-strict")
    options = {"data_path": str(rows.data), "image_folder": str(rows.images), "max_steps": -1}
    attack.refused("train", world.recipe(folder, **options), names=["data.jsonl, row "], max_seconds=60)
    assert not (folder / "run" / "model.safetensors").exists()
