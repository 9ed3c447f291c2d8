"""Every hostile data file and every hostile recipe: refused by name, or its rows accounted for."""

import re

import pytest
from hostile_files import FILES
from hostile_recipes import RECIPES


def write(world, name, kinds):
    file, make, rows = kinds[name]
    path = world.folder(f"file-{list(kinds).index(name)}") / file
    path.write_bytes(make())
    return path, rows


@pytest.mark.parametrize("name", FILES)
def test_check_data_refuses_the_file_or_names_the_rows(attack, world, name):
    path, rows = write(world, name, FILES)
    if rows is None:
        attack.refused("check_data", path, names=[path])
        return
    outcome = attack("check_data", path)
    found = {int(number) for number in re.findall(r"^│ +\S+ +│ +(\d+) +│", outcome.stdout, flags=re.MULTILINE)}
    assert f"{len(rows)} would fail" in outcome.stdout and outcome.code == bool(rows)
    assert found == set(sorted(rows)[:200])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", ["score", "train"])
def test_score_and_train_refuse_the_file_or_its_first_bad_row(attack, world, name, verb):
    path, rows = write(world, name, FILES)
    arguments = ["score", "--model", world.model, "--data", path, "--output", path.parent / "scores.jsonl"]
    if verb == "train":
        arguments = ["train", world.recipe(path.parent, data_path=str(path), image_folder=None, max_steps=-1)]
    if rows is None or rows:
        attack.refused(*arguments, names=[path], max_mib=600)
    else:
        assert attack(*arguments, max_mib=600).code == 0


def recipe_cases():
    """Return (name, verb); those through train are slow, and the one that PyYAML takes seconds for."""
    cases = [(name, verb) for name in RECIPES for verb in ("check_data", "train")]
    slow = [(name, verb) for name, verb in cases if verb == "train" or name == "nested a hundred thousand deep"]
    return [pytest.param(*case, marks=pytest.mark.slow if case in slow else ()) for case in cases]


@pytest.mark.parametrize(("name", "verb"), recipe_cases())
def test_a_recipe_is_refused(attack, world, name, verb):
    folder = world.folder(f"recipe-{list(RECIPES).index(name)}")
    text = RECIPES[name]
    for key, value in (("model", world.model), ("data", world.data), ("output", folder / "run")):
        text = text.replace(f"{{{key}}}".encode(), str(value).encode())
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    option = re.search(rb"(\w+): [^:\n]*\n?$", text)
    named = [path, *([option[1].decode()] if option else []), "weight", "data", "output_dir", "/dev/zero", "template"]
    attack.refused(verb, path, names=named)
    assert not (folder / "canary").exists()
