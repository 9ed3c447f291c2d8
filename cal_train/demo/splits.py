"""The demo's data on disk: LLaVA JSON files, pictures, and for each question what only the picture tells.

| file | rows | pictures |
|---|---|---|
| ``pretrain.json`` | captions (stage 1) | trained concepts, OpenMoji |
| ``finetune.json`` | one question each, up to four of a picture (stage 2) | the same pictures |
| ``heldout_scenes.json`` | one question each | new scenes of trained concepts |
| ``heldout_concepts.json`` | one question each, about a concept in no training picture | it among trained ones |
| ``heldout_style.json`` | the questions of ``heldout_scenes`` | the same scenes drawn in Noto |

What a held-out concept can fairly be asked: its *kind* (does a drawing never seen land in the right group?), its
*count* and its *place* (found by elimination or by likeness), and its *presence*. Its *name* would need the link from
drawing to word, which nothing in training shows; it is asked all the same, and near 0 is the expected result.

Beside each file lies ``NAME.truth.json`` with, for every row id, a list with one entry per turn: type, scene, and the
character ranges of the answer that only the picture tells.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cal_train.demo.assets import Assets
from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.drawing import draw, load_sprites
from cal_train.demo.scenes import (
    Scene,
    Turn,
    ask,
    ask_about_subject,
    ask_for_training,
    caption,
    caption_spans,
    sample_held_out_scene,
    sample_scene,
)
from cal_train.types import IMAGE_MARK

CAPTION_REQUEST = "Describe the picture."
QUESTIONS_PER_SCENE = 4
"""Of a training picture at most, each a row of its own: a model this small learns far less of a row with several."""
TEST_SPLITS = ("heldout_scenes", "heldout_concepts", "heldout_style")


@dataclass(frozen=True)
class Row:
    """One row of a data file: a scene, and the turns about it."""

    id: str
    scene: Scene
    turns: tuple[Turn, ...]


def write_splits(
    folder: Path, assets: Assets, num_train: int, num_test: int, image_size: int, seed: int = 0
) -> dict[str, Path]:
    """Write all splits and return their JSON files by name; ``heldout_style`` is absent if its drawings are.

    Image paths in the files are relative to ``folder``. Equal arguments give equal files.

    Args:
        folder: Where to write.
        assets: Drawings.
        num_train: Training pictures, shared by both stages, so that their features are computed once.
        num_test: Scenes of each held-out split.
        image_size: Side of the pictures in pixels.
        seed: Of everything.
    """
    train = [sample_scene(_rng(seed, 0, i), f"train-{i:05d}") for i in range(num_train)]
    scenes = new_scenes(num_test, seed)
    concepts = [sample_held_out_scene(_rng(seed, 2, i), f"concept-{i:05d}") for i in range(num_test)]
    talks = [
        Row(f"{scene.id}/{n}", scene, (turn,))
        for i, scene in enumerate(train)
        for n, turn in enumerate(ask_for_training(scene, _rng(seed, 3, i), QUESTIONS_PER_SCENE))
    ]
    questions = _one_by_one((s, ask(s, _rng(seed, 4, i))) for i, s in enumerate(scenes))
    about_held_out = _one_by_one((s, ask_about_subject(s, _rng(seed, 5, i))) for i, s in enumerate(concepts))
    plan: list[tuple[str, list[Row], str, Path | None]] = [
        ("pretrain", [_captioned(scene) for scene in train], "train", assets.train_style),
        ("finetune", talks, "train", None),  # pictures are there already
        ("heldout_scenes", questions, "heldout_scenes", assets.train_style),
        ("heldout_concepts", about_held_out, "heldout_concepts", assets.train_style),
    ]
    if assets.held_out_style:
        plan.append(("heldout_style", questions, "heldout_style", assets.held_out_style))
    files = {}
    for name, rows, images, style in plan:
        if style:
            _draw_all(rows, folder / "images" / images, load_sprites(style, CONCEPTS), image_size, name)
        files[name] = _write(folder / f"{name}.json", rows, images)
    return files


def new_scenes(num_scenes: int, seed: int = 0) -> list[Scene]:
    """Return the scenes of ``heldout_scenes``: new ones of trained concepts."""
    return [sample_scene(_rng(seed, 1, i), f"scene-{i:05d}") for i in range(num_scenes)]


def _rng(seed: int, stream: int, index: int) -> np.random.Generator:
    """Return a generator of its own for every scene, so that a split does not change when another one grows."""
    return np.random.default_rng([seed, stream, index])


def _captioned(scene: Scene) -> Row:
    turn = Turn("caption", CAPTION_REQUEST, caption(scene), caption_spans(scene))
    return Row(scene.id, scene, (turn,))


def _one_by_one(asked: Iterable[tuple[Scene, Sequence[Turn]]]) -> list[Row]:
    """Return one row per question: at test time no earlier answer may give a hint."""
    return [Row(f"{scene.id}/{turn.type}", scene, (turn,)) for scene, turns in asked for turn in turns]


def _draw_all(
    rows: Sequence[Row], folder: Path, sprites: Mapping[str, Image.Image], image_size: int, name: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scene in tqdm(list({row.scene.id: row.scene for row in rows}.values()), desc=f"drawing {name}", unit="picture"):
        draw(scene, sprites, image_size).save(folder / f"{scene.id}.png")


def _write(path: Path, rows: Sequence[Row], images: str) -> Path:
    path.with_suffix(".truth.json").write_text(json.dumps({row.id: _truth(row) for row in rows}), encoding="utf-8")
    path.write_text(json.dumps([_llava_row(row, images) for row in rows]), encoding="utf-8")
    return path


def _truth(row: Row) -> list[dict]:
    return [{"type": turn.type, "scene": row.scene.id, "spans": turn.spans} for turn in row.turns]


def _llava_row(row: Row, images: str) -> dict:
    conversations = []
    for i, turn in enumerate(row.turns):
        question = turn.question if i else f"{IMAGE_MARK}\n{turn.question}"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    return {"id": row.id, "image": f"images/{images}/{row.scene.id}.png", "conversations": conversations}
