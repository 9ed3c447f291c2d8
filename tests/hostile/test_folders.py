"""Every hostile model folder through score, train and convert: refused by name, nothing run, nothing outside read."""

import pytest
from hostile_files import FILES
from hostile_folders import FOLDERS
from hostile_images import IMAGES
from hostile_recipes import RECIPES
from hostile_rows import ROWS

WITHOUT_PROCESSOR = ("tokenizer: ", "processor: ", "template: ")  # files that convert copies without reading them


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("verb", ["score", *(pytest.param(v, marks=pytest.mark.slow) for v in ("train", "convert"))])
def test_a_model_folder_is_refused(attack, world, name, verb):
    model = world.model_copy(f"folder-{list(FOLDERS).index(name)}")
    FOLDERS[name](model, world.outside)
    output = model.parent / "output"
    arguments = {
        "score": ["score", "--model", model, "--data", world.data, "--image_root", world.data.parent / "images"],
        "convert": ["convert", "--from", model],
        "train": ["train"],
    }[verb]
    if verb == "train":
        arguments += [world.recipe(model.parent, model_name_or_path=str(model), output_dir=str(output))]
    else:
        arguments += ["--output", output]
    if verb == "convert" and name.startswith(WITHOUT_PROCESSOR) and "link" not in name and "pipe" not in name:
        pytest.skip("convert of a Hugging Face folder copies this file and reads nothing of it")
    attack.refused(*arguments, names=[model])
    assert not list(model.rglob("canary")) and not (output / "model.safetensors").exists()


def test_the_corpus_has_more_than_two_hundred_different_cases():
    kinds = {"rows": ROWS, "images": IMAGES, "files": FILES, "recipes": RECIPES, "folders": FOLDERS}
    num_cases = sum(len(cases) for cases in kinds.values())
    contents = {repr(case[0]) for case in ROWS.values()} | {case[1]() for case in IMAGES.values()}
    contents |= {case[1]() for case in FILES.values()} | set(RECIPES.values()) | set(FOLDERS.values())
    print(f"{num_cases} cases, {len(contents)} different: " + ", ".join(f"{k} {len(v)}" for k, v in kinds.items()))
    assert len(contents) >= 200
