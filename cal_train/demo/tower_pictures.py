"""Pictures of what two methods do with patches: SPARC's map of every word, SyCoCa's two masks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cal_train.data.images import open_image
from cal_train.data.pair_set import PairSet
from cal_train.evals.towers import TowerEvaluator, evaluation_mode
from cal_train.objectives.sycoca import masks_of_scores
from cal_train.towers.outputs import TowerOutputs

PANEL_INCHES = 1.3
HIDDEN_GREY = 0.5


def draw_word_maps(evaluator: TowerEvaluator, pairs: PairSet, output: Path) -> Path:
    """Write a PNG with a row per picture: the picture, and for each word of its first caption the patches it takes.

    Args:
        evaluator: Of a SPARC run.
        pairs: Pictures with their captions.
        output: File to write.
    """
    outputs, captions = _encode(evaluator, pairs)
    maps_BLP = evaluator.objective.word_maps(outputs)  # pyright: ignore[reportCallIssue]
    words = [_words(evaluator, outputs, row) for row in range(len(captions))]
    axes, figure = _panels(len(captions), 1 + max(map(len, words)))
    for row, pair in enumerate(pairs.images):
        image = np.asarray(open_image(pair.image))
        axes[row][0].imshow(image)
        axes[row][0].set_title(captions[row], fontsize=7, loc="left")
        for axis, (place, word) in zip(axes[row][1:], words[row], strict=False):
            axis.imshow(image)
            axis.imshow(_upsampled(maps_BLP[row, place], image.shape[0]), alpha=0.65, cmap="magma", vmin=0)
            axis.set_xlabel(word, fontsize=8)
    return _save(figure, output)


def draw_masks(evaluator: TowerEvaluator, pairs: PairSet, output: Path) -> Path:
    """Write a PNG with a row per picture: the picture, what the caption decoder sees, and what the image decoder sees.

    Args:
        evaluator: Of a SyCoCa run.
        pairs: Pictures with their captions.
        output: File to write.
    """
    outputs, captions = _encode(evaluator, pairs)
    objective: Any = evaluator.objective
    low_BP, high_BP = masks_of_scores(objective.patch_scores(outputs), objective.ratio_low, objective.ratio_high)
    axes, figure = _panels(len(captions), 3)
    titles = ("", "captioned from", "repainted from")
    for row, pair in enumerate(pairs.images):
        image = np.asarray(open_image(pair.image)) / 255
        for axis, mask_P, title in zip(axes[row], (None, low_BP[row], high_BP[row]), titles, strict=True):
            axis.imshow(image if mask_P is None else _hidden(image, mask_P))
            axis.set_xlabel(title, fontsize=8)
        axes[row][0].set_title(captions[row], fontsize=7, loc="left")
    return _save(figure, output)


def _encode(evaluator: TowerEvaluator, pairs: PairSet) -> tuple[TowerOutputs, list[str]]:
    captions = [pair.captions[0] for pair in pairs.images]
    tokens, _ = evaluator.encoder.encode(captions)
    pixels = torch.stack([evaluator.transform(open_image(pair.image)) for pair in pairs.images])
    with evaluation_mode(evaluator.towers, evaluator.objective):
        mask = tokens["attention_mask"].bool()
        return evaluator.towers(pixel_values=pixels, input_ids=tokens["input_ids"], text_mask=mask), captions


def _words(evaluator: TowerEvaluator, outputs: TowerOutputs, row: int) -> list[tuple[int, str]]:
    """Return place and text of the tokens that are not special."""
    assert outputs.input_ids is not None
    tokenizer = evaluator.encoder.tokenizer
    ids = outputs.input_ids[row].tolist()
    return [
        (i, str(tokenizer.convert_ids_to_tokens(id_)))
        for i, id_ in enumerate(ids)
        if id_ not in tokenizer.all_special_ids
    ]


def _upsampled(values_P: Tensor, image_size: int) -> np.ndarray:
    """Return one value per pixel (S, S): that of the patch it lies in."""
    side = round(len(values_P) ** 0.5)
    grid = values_P.float().reshape(1, 1, side, side)
    return torch.nn.functional.interpolate(grid, size=(image_size, image_size), mode="nearest")[0, 0].numpy()


def _hidden(image: np.ndarray, mask_P: Tensor) -> np.ndarray:
    """Return the picture with masked patches in grey."""
    return np.where(_upsampled(mask_P, image.shape[0])[..., None] > 0, HIDDEN_GREY, image)


def _panels(num_rows: int, num_columns: int) -> tuple[np.ndarray, Figure]:
    """Return bare axes (rows, columns), and their figure."""
    figure = Figure(figsize=(PANEL_INCHES * num_columns, 1.3 * PANEL_INCHES * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    return axes, figure


def _save(figure: Figure, output: Path) -> Path:
    FigureCanvasAgg(figure).print_png(output)
    return output
