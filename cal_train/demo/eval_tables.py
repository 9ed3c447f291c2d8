"""The held-out scenes as tables that lmms-eval's tasks read: one Parquet file per question type, pictures inside.

The scenes and questions are those of `cal_train.demo.splits`, so a model of the demo is asked what the demo asks.
"""

import json
from pathlib import Path

import datasets

from cal_train.demo.assets import Assets
from cal_train.demo.scenes import QUESTION_TYPES
from cal_train.demo.splits import TEST_SPLITS, write_splits
from cal_train.types import IMAGE_MARK


def write_eval_tables(folder: Path, assets: Assets, num_scenes: int, image_size: int, seed: int = 0) -> None:
    """Render the held-out scenes and write ``SPLIT_TYPE.parquet`` of every split and question type.

    Args:
        folder: Where to write; the splits themselves go to ``splits`` in it.
        assets: Drawings.
        num_scenes: Scenes of each split.
        image_size: Side of the pictures in pixels.
        seed: Of everything; with the demo's, these are the demo's scenes.
    """
    splits = write_splits(folder / "splits", assets, 0, num_scenes, image_size, seed)
    for name in TEST_SPLITS:
        if name in splits:  # the held-out style is absent where its drawings are
            tables_of_split(splits[name], folder)


def tables_of_split(data: Path, folder: Path) -> None:
    """Write one table per question type of a split (a file of `write_splits`, its truth beside it)."""
    truth = json.loads(data.with_suffix(".truth.json").read_text(encoding="utf-8"))
    rows: dict[str, list[dict]] = {type_: [] for type_ in QUESTION_TYPES}
    for row in json.loads(data.read_text(encoding="utf-8")):
        (turn,) = truth[row["id"]]
        question, answer = (message["value"] for message in row["conversations"])
        ((start, end),) = turn["spans"]
        picture = {"bytes": (data.parent / row["image"]).read_bytes(), "path": None}
        document = {"id": row["id"], "scene": turn["scene"], "image": picture}
        document |= {"question": question.removeprefix(f"{IMAGE_MARK}\n"), "answer": answer, "words": answer[start:end]}
        rows[turn["type"]].append(document)
    folder.mkdir(parents=True, exist_ok=True)
    for type_, documents in rows.items():
        table = datasets.Dataset.from_list(documents).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{data.stem}_{type_}.parquet")
