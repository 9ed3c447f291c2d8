"""The whole corpus: ``KINDS`` maps a kind of input to its named cases and the verbs that each of them goes through."""

from hostile_files import FILES
from hostile_folders import FOLDERS
from hostile_images import IMAGES
from hostile_recipes import RECIPES
from hostile_rows import ROWS
from hostile_runs import ADAPTERS, CHECKPOINTS, ORIGINALS, SCORES
from hostile_shards import SHARDS

_NOT_READ_BY_CONVERT = ("tokenizer: ", "processor: ", "template: ")
"""Files of a folder in Hugging Face layout that convert copies as they are, unless they are links or pipes."""

KINDS = {
    "rows": (ROWS, ("check_data", "score", "train")),
    "images": (IMAGES, ("check_data", "score", "train")),
    "files": (FILES, ("check_data", "score", "train")),
    "recipes": (RECIPES, ("check_data", "train")),
    "folders": (FOLDERS, ("score", "convert", "train")),
    "shards": (SHARDS, ("check_data",)),
    "adapters": (ADAPTERS, ("merge",)),
    "checkpoints": (CHECKPOINTS, ("train",)),
    "score files": (SCORES, ("train",)),
    "original folders": (ORIGINALS, ("convert",)),
}


def verbs_of(kind, name):
    """Return the verbs that a case goes through."""
    verbs = KINDS[kind][1]
    is_copied = kind == "folders" and name.startswith(_NOT_READ_BY_CONVERT) and not name.endswith(("outside", "pipe"))
    return tuple(verb for verb in verbs if verb != "convert" or not is_copied)
