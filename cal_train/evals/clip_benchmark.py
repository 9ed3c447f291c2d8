"""Our towers as a model of CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark, read at 1.6.2).

Its loaders return ``(model, transform, tokenizer)`` with ``model.encode_image`` and ``model.encode_text``, and it
compares both by their cosine. That fits objectives with one vector per image and per text (CLIP, SigLIP, CoCa, SyCoCa,
SPARC). Llip mixes the image anew for every text and FILIP compares tokens: both need tiles of scores, which
CLIP_benchmark does not know. They are refused; evaluate them with `cal_train.evals.towers`.

To use it::

    from clip_benchmark import cli, models
    register(models)
    cli.main()  # with --model_type cal_train --model FOLDER_OF_A_TOWER_RUN
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cal_train.data.pair_batches import CaptionEncoder
from cal_train.data.pair_images import EvaluationTransform
from cal_train.evals.towers import load_evaluator

MODEL_TYPE = "cal_train"


class BenchmarkModel(nn.Module):
    """Towers and objective behind CLIP_benchmark's two methods."""

    def __init__(self, towers: nn.Module, objective: nn.Module):
        super().__init__()
        self.towers, self.objective = towers, objective

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Return the embedding of each image (B, E), not normalised."""
        objective: Any = self.objective
        return _single(objective.image_features(self.towers(pixel_values=pixel_values)), "image_embeds", objective)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return the embedding of each text (B, E), not normalised; ``tokens`` are those of `BenchmarkTokenizer`."""
        input_ids, mask = tokens.unbind(1)
        objective: Any = self.objective
        outputs = self.towers(input_ids=input_ids, text_mask=mask.bool())
        return _single(objective.text_features(outputs), "text_embeds", objective)


class BenchmarkTokenizer:
    """Texts to one tensor (B, 2, L): ids and mask together, as a padding id alone may also be an end token."""

    def __init__(self, encoder: CaptionEncoder):
        self.encoder = encoder

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Return ids and mask of one text, or of several."""
        tokens, _ = self.encoder.encode([texts] if isinstance(texts, str) else list(texts))
        return torch.stack([tokens["input_ids"], tokens["attention_mask"]], dim=1)


def load(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: Any = "cpu"
) -> tuple[BenchmarkModel, EvaluationTransform, BenchmarkTokenizer]:
    """Load the folder of a tower run, ``model_name``; the other two names belong to CLIP_benchmark's call.

    Raises:
        ValueError: If the folder is not one of a tower run.
    """
    evaluator = load_evaluator(model_name, device=device)
    model = BenchmarkModel(evaluator.towers, evaluator.objective).eval()
    return model, evaluator.transform, BenchmarkTokenizer(evaluator.encoder)


def register(models: ModuleType) -> None:
    """Make ``--model_type cal_train`` known in this process; ``models`` is the module ``clip_benchmark.models``."""
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def _single(features: dict[str, Tensor], name: str, objective: nn.Module) -> Tensor:
    if set(features) != {name}:
        raise ValueError(
            f"{type(objective).__name__} has no single vector per sample (it has {', '.join(sorted(features))}), and "
            "CLIP_benchmark compares single vectors: evaluate it with cal_train.evals.towers"
        )
    return features[name]
