"""Every hostile shard through check_data of a streaming recipe: refused by name, or its rows accounted for."""

import json
import re

import pytest
from hostile_shards import SHARDS, rows, shard

FAST = (
    "good, gzip",
    "xz named tar",
    "symbolic link",
    "json nested",
    "damaged header in the middle",
)


def recipe_of(world, folder, path):
    options = {"data_path": str(path), "image_folder": None, "streaming": True, "per_device_train_batch_size": 1}
    return world.recipe(folder, **options)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SHARDS]
)
def test_check_data_refuses_the_shard_or_names_the_rows(attack, world, name):
    file, make, bad = SHARDS[name]
    folder = world.folder(f"shard-{list(SHARDS).index(name)}")
    (folder / file).write_bytes(make())
    recipe = recipe_of(world, folder, folder / file)
    if bad is None:
        attack.refused("check_data", recipe, names=[folder / file])
        return
    outcome = attack("check_data", recipe)
    found = {int(number) for number in re.findall(r"^│ +\S+ +│ +(\d+) +│", outcome.stdout, flags=re.MULTILINE)}
    assert found == bad and outcome.code == bool(bad)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [7, [], {"s.tar": -1}, {"s.tar": True}, {"s.tar": "three"}, {"s.tar": 0}])
def test_a_list_of_sizes_that_is_none_is_refused(attack, world, sizes):
    folder = world.folder("shard-sizes")
    (folder / "s.tar").write_bytes(shard(*rows(3)))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    attack.refused("check_data", recipe_of(world, folder, folder / "s.tar"), names=[folder])


@pytest.mark.slow
def test_rows_that_a_list_of_sizes_makes_up_are_bad_rows(attack, world):
    folder = world.folder("shard-sizes")
    (folder / "s.tar").write_bytes(shard(*rows(3)))
    (folder / "sizes.json").write_text(json.dumps({"s.tar": 5}))
    outcome = attack("check_data", recipe_of(world, folder, folder / "s.tar"))
    assert outcome.code == 1 and "5 rows, 2 would fail" in outcome.stdout
