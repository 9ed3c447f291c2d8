"""POPE's questions about the demo's held-out scenes, as tables that lmms-eval's tasks read: one per kind of negative.

Source: Li et al. 2023, arXiv:2305.10355. Half of the questions of a table ask for a thing that is there, half for one
that is not. What is not there is drawn from, by kind:

- ``random``: all trained things;
- ``popular``: those most frequent in these very scenes. The demo draws its things uniformly, so none is popular with a
  model, and scores should be those of ``random``: a control here;
- ``adversarial``: the group (animals, tools, ...) of a thing that is there. POPE takes things that often appear
  together, which scenes drawn uniformly do not have; likeness is what is left to mislead a model.
"""

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from cal_train.demo.assets import Assets
from cal_train.demo.concepts import CONCEPTS, TRAIN_CONCEPTS, Concept
from cal_train.demo.drawing import draw, load_sprites
from cal_train.demo.scenes import Scene, presence_turn
from cal_train.demo.splits import new_scenes

POPE_TABLES = Path(".cache/demo/pope")
"""Where the task files look for the tables, from the root of the repository."""

NUM_POPULAR = 8


def write_pope_tables(folder: Path, assets: Assets, num_scenes: int, image_size: int, seed: int = 0) -> None:
    """Render the scenes of the split ``heldout_scenes`` and write ``KIND.parquet``; two questions for each scene.

    The positive questions are the same in all three.

    Args:
        folder: Where to write.
        assets: Drawings.
        num_scenes: Number of scenes.
        image_size: Side of the pictures in pixels.
        seed: Of everything; with the demo's, these are the demo's scenes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sprites = load_sprites(assets.train_style, CONCEPTS)
    scenes = new_scenes(num_scenes, seed)
    pictures = {scene.id: _png(draw(scene, sprites, image_size)) for scene in scenes}
    for kind, rows in pope_rows(scenes, seed).items():
        documents = [{**row, "image": {"bytes": pictures[row["scene"]], "path": None}} for row in rows]
        table = datasets.Dataset.from_list(documents).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{kind}.parquet")


def pope_rows(scenes: Sequence[Scene], seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Return the questions by kind of negative: for each scene one about a thing in it, then one about another."""
    pools = _pools(scenes)
    rows: dict[str, list[dict[str, str]]] = {kind: [] for kind in pools}
    for n, scene in enumerate(scenes):
        rng = np.random.default_rng([seed, 6, n])
        there = _one_of(list(scene.things.values()), rng)
        for kind, pool in pools.items():
            absent = _one_of([concept for concept in pool(scene) if concept not in scene.cells], rng)
            rows[kind] += [_row(scene, there, True), _row(scene, absent, False)]
    return rows


def _pools(scenes: Sequence[Scene]) -> Mapping[str, Callable[[Scene], Sequence[Concept]]]:
    counts = Counter(concept for scene in scenes for concept in scene.things.values())
    popular = [concept for concept, _ in counts.most_common(NUM_POPULAR)]
    return {
        "random": lambda scene: TRAIN_CONCEPTS,
        "popular": lambda scene: popular,
        "adversarial": lambda scene: [
            concept for concept in TRAIN_CONCEPTS if concept.group in {thing.group for thing in scene.things.values()}
        ],
    }


def _one_of(concepts: Sequence[Concept], rng: np.random.Generator) -> Concept:
    return concepts[int(rng.integers(len(concepts)))]


def _row(scene: Scene, asked: Concept, is_there: bool) -> dict[str, str]:
    turn = presence_turn(asked, is_there)
    ((start, end),) = turn.spans
    return {
        "id": f"{scene.id}/{asked.word}",
        "scene": scene.id,
        "question": turn.question,
        "answer": turn.answer,
        "words": turn.answer[start:end],
    }


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
