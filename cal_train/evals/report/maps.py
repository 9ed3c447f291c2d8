"""Maps for the page: which samples get them, with which model, and what the page draws them from."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from cal_train.data.images import open_image
from cal_train.data.processor import load_processor
from cal_train.data.score_notes import model_digest, read_about
from cal_train.evals.report.page import PageContent, ScoredModel, num_shown
from cal_train.evals.report.scores import read_input_ids
from cal_train.evals.report.summary import surprises
from cal_train.evals.sight.attention import check_layers
from cal_train.evals.sight.sample import sample_sight
from cal_train.evals.sight.values import SampleSight
from cal_train.folders import from_folder


@dataclass(frozen=True)
class MapRequest:
    """How many samples get maps, whose layers are averaged (default: all), and model folders in the scores' order.

    Without folders, those are taken that ``FILE.about.json`` beside each score file names.
    """

    num_samples: int
    layers: Sequence[int] | None = None
    models: Sequence[str | Path] = ()


def add_maps(content: PageContent, request: MapRequest) -> PageContent:
    """Return the content with maps for some of its samples: half of them the most surprising, half the first.

    The models are loaded one after the other, in float32, as for scoring.

    Raises:
        ValueError: If there are no scores or no images, a model is not at hand or not the one that was scored, or its
            maps cannot be made.
    """
    if not content.models:
        raise ValueError("--maps needs a score file: give one, or a run folder with scores.jsonl")
    if request.models and len(request.models) != len(content.models):
        raise ValueError(f"{len(request.models)} models, {len(content.models)} score files: give --model once for each")
    notes = list(content.notes)
    given = [Path(folder) for folder in request.models] or [None] * len(content.models)
    folders = [_model_folder(model, folder, notes) for model, folder in zip(content.models, given, strict=True)]
    chosen = _choose(content, request.num_samples)
    if not chosen:
        raise ValueError("no sample has an image that can be opened: give --data and --image_root of the scored data")
    if len(chosen) < request.num_samples:
        notes.append(f"Only {len(chosen)} samples have images that can be opened; all of them have maps.")
    sights = [
        _sights(model, folder, chosen, request.layers) for model, folder in zip(content.models, folders, strict=True)
    ]
    maps = {i: [by_sample[i] for by_sample in sights] for i in chosen}
    layers = None if request.layers is None else (min(request.layers), max(request.layers))
    return dataclasses.replace(content, maps=maps, map_layers=layers, notes=notes)


def _model_folder(model: ScoredModel, given: Path | None, notes: list[str]) -> Path:
    """Return the folder of the model that was scored."""
    assert model.scores is not None
    about = read_about(model.scores)
    paths = about.get("paths")
    remembered = paths.get("model") if isinstance(paths, dict) else None
    folder = given or (Path(remembered) if isinstance(remembered, str) else None)
    cure = "name it with --model, once for each score file and in their order"
    if folder is None:
        raise ValueError(f"{model.scores}.about.json is missing or names no model, and maps need the model: {cure}")
    if not folder.is_dir():
        raise ValueError(f"the model {folder} of {model.scores} is not there: {cure}")
    if "model_sha256" not in about:
        notes.append(f"The maps of {model.name} are by {folder.name}, which its score file cannot confirm.")
    elif about["model_sha256"] != model_digest(folder):
        raise ValueError(
            f"{folder} is not the model that was scored in {model.scores} (its files differ): {cure}, or score again"
        )
    return folder


def _choose(content: PageContent, limit: int) -> dict[int, list[Image.Image]]:
    """Return the images of each chosen sample."""
    shown = num_shown(content.models)
    by_surprise = np.argsort(-surprises(content.models[0].rows), kind="stable").tolist()
    chosen: dict[int, list[Image.Image]] = {}
    for order, size in ((by_surprise, limit - limit // 2), (range(shown), limit), (by_surprise, limit)):
        for i in order:
            if len(chosen) >= size:
                break
            if i < shown and i not in chosen and (images := _images(content, i)):
                chosen[i] = images
    return dict(sorted(chosen.items()))


def _images(content: PageContent, i: int) -> list[Image.Image]:
    """Return a sample's images; none where one cannot be opened, or where there is nothing to predict."""
    sample = content.samples[i] if content.samples else None
    if sample is None or not len(content.models[0].rows[i].positions):
        return []
    try:
        return [open_image(image) for image in sample.images]
    except ValueError:  # the page's notes count unreadable images
        return []


def _sights(
    model: ScoredModel, folder: Path, images: dict[int, list[Image.Image]], layers: Sequence[int] | None
) -> dict[int, SampleSight]:
    """Return the maps of each sample by one model."""
    assert model.scores is not None
    processor = load_processor(folder)
    vlm = from_folder(AutoModelForImageTextToText, folder, dtype=torch.float32).eval()
    check_layers(vlm, layers)
    cast(nn.Module, vlm).to("cuda" if torch.cuda.is_available() else "cpu")
    ids = read_input_ids(model.scores, images)
    return {
        i: sample_sight(vlm, processor, of_sample, ids[i], model.rows[i].positions, layers)
        for i, of_sample in tqdm(images.items(), desc=f"maps of {model.name}", unit="sample")
    }
