"""Evaluation of two towers and their objective on pairs: retrieval, zero-shot classification, linear probe."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer

from cal_train.data.pair_batches import CaptionEncoder
from cal_train.data.pair_images import EvaluationTransform
from cal_train.data.pair_set import PairSet, image_batches
from cal_train.evals.linear_probe import linear_probe
from cal_train.evals.retrieval import retrieval_recall
from cal_train.evals.score_tiles import Features, Score, join
from cal_train.evals.zero_shot import TEMPLATES, class_scores, classification_report, prompts
from cal_train.folders import from_folder
from cal_train.towers.two_tower import TwoTower
from cal_train.train.tower_checkpoint import load_tower_model


@dataclass(frozen=True)
class TowerEvaluator:
    """Towers with what prepares their inputs. Works on the device on which the towers are; restores their mode.

    Attributes:
        towers: A `cal_train.objectives.base.Towers`.
        objective: A `cal_train.objectives.base.Objective`.
        encoder: Captions to token ids.
        transform: Images to pixels.
        batch_size: Images, or texts, of a forward pass.
        tile_size: Images and texts that are scored at a time.
    """

    towers: nn.Module
    objective: nn.Module
    encoder: CaptionEncoder
    transform: EvaluationTransform
    batch_size: int = 64
    tile_size: tuple[int, int] = (256, 1024)

    def retrieval(self, pairs: PairSet, ks: Sequence[int] = (1, 5, 10), score: Score | None = None) -> dict[str, float]:
        """Return recall at k, see `cal_train.evals.retrieval`; ``score`` is the objective's own unless given."""
        images, texts = self.image_features(pairs), self.text_features(pairs.captions)
        return retrieval_recall(images, texts, pairs.image_of_text, score or self._score, ks, self.tile_size)

    def zero_shot(
        self, pairs: PairSet, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> dict[str, float]:
        """Return the report of `cal_train.evals.zero_shot`; the first caption of an image is the name of its class."""
        labels = class_labels(pairs, class_names)
        texts = self.text_features(prompts(class_names, templates))
        scores = class_scores(
            self.image_features(pairs), texts, len(templates), self._score, tile_images=self.tile_size[0]
        )
        return classification_report(scores, labels)

    def linear_probe(self, train: PairSet, test: PairSet, class_names: Sequence[str]) -> dict[str, float]:
        """Return the report of `cal_train.evals.linear_probe` on the mean of the patch tokens."""
        features = [self.pooled_patches(pairs).cpu() for pairs in (train, test)]
        labels = [class_labels(pairs, class_names) for pairs in (train, test)]
        return linear_probe(features[0], labels[0], features[1], labels[1])

    def image_features(self, pairs: PairSet) -> Features:
        """Return the objective's features of all images."""
        return self._encode_images(pairs, lambda outputs: self._objective.image_features(outputs))

    def pooled_patches(self, pairs: PairSet) -> Tensor:
        """Return the mean patch token of each image (I, D): what the tower gives without any objective."""
        return self._encode_images(pairs, lambda outputs: {"mean": outputs.patch_tokens.mean(1)})["mean"]

    def text_features(self, captions: Sequence[str]) -> Features:
        """Return the objective's features of all texts."""
        parts = []
        with evaluation_mode(self.towers, self.objective):
            for start in range(0, len(captions), self.batch_size):
                tokens, _ = self.encoder.encode(captions[start : start + self.batch_size])
                mask = tokens["attention_mask"].to(self._device).bool()
                outputs = self.towers(input_ids=tokens["input_ids"].to(self._device), text_mask=mask)
                parts.append(self._objective.text_features(outputs))
        return join(parts)

    def _encode_images(self, pairs: PairSet, features_of: Callable[[Any], Features]) -> dict[str, Tensor]:
        with evaluation_mode(self.towers, self.objective):
            batches = image_batches(pairs.images, self.transform, self.batch_size)
            return join([features_of(self.towers(pixel_values=pixels.to(self._device))) for pixels in batches])

    def _score(self, images: Features, texts: Features) -> Tensor:
        return self._objective.score(images, texts)

    @property
    def _objective(self) -> Any:  # an nn.Module with the methods of the protocol
        return self.objective

    @property
    def _device(self) -> torch.device:
        return next(self.towers.parameters()).device


def load_evaluator(folder: str | Path, batch_size: int = 64, device: torch.device | str = "cpu") -> TowerEvaluator:
    """Return the evaluator of a run folder or of one of its checkpoints, with the processors that were saved with it.

    Raises:
        ValueError: If the folder is not one of a tower run.
    """
    model = load_tower_model(folder)
    model.to(device)
    tokenizer = from_folder(AutoTokenizer, Path(folder) / "text")
    processor = from_folder(AutoImageProcessor, Path(folder) / "vision", backend="pil")
    encoder = CaptionEncoder(tokenizer, cast(TwoTower, model.towers).shape.context_length)
    return TowerEvaluator(model.towers, model.objective, encoder, EvaluationTransform(processor), batch_size)


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Switch modules to evaluation, without gradients, and give each back the mode that it had."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def class_names(pairs: PairSet) -> list[str]:
    """Return the classes of labelled images, in alphabetical order; the first caption of an image names its class."""
    return sorted({pair.captions[0] for pair in pairs.images})


def class_labels(pairs: PairSet, class_names: Sequence[str]) -> Tensor:
    """Return the number of each image's class (I,) int64.

    Raises:
        ValueError: If class names repeat, or the first caption of an image is not one of them.
    """
    numbers = {name: i for i, name in enumerate(class_names)}
    if len(numbers) != len(class_names):
        raise ValueError("class names occur twice: make them unique")
    for pair in pairs.images:
        if pair.captions[0] not in numbers:
            raise ValueError(f"{pair.file}, row {pair.row}: {pair.captions[0]!r} is not one of the class names")
    return torch.tensor([numbers[pair.captions[0]] for pair in pairs.images])
