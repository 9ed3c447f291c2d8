"""Every hostile model folder through score, train and convert: refused by name, nothing run, nothing outside read."""

import pytest
from hostile_corpus import verbs_of
from hostile_folders import FOLDERS

SLOW = ("config: unknown model",)  # transformers imports all of its models to say so


def cases():
    """Return (name, verb) of all; one verb of each case is fast, in turns."""
    for i, name in enumerate(FOLDERS):
        verbs = verbs_of("folders", name)
        for verb in verbs:
            is_fast = verb == verbs[i % len(verbs)] and name not in SLOW
            yield pytest.param(name, verb, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "verb"), list(cases()))
def test_a_model_folder_is_refused(attack, world, name, verb):
    model = world.model_copy(f"folder-{list(FOLDERS).index(name)}-{verb}")
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
    attack.refused(*arguments, names=[model])
    assert not list(model.rglob("canary")) and not (output / "model.safetensors").exists()
