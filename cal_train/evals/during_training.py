"""What a tower run measures every few steps: retrieval and zero-shot classification on held-out pairs."""

from collections.abc import Mapping
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from cal_train.conf_towers import TowerEvalArguments
from cal_train.data.images import ImageLimits
from cal_train.data.pair_batches import CaptionEncoder
from cal_train.data.pair_images import EvaluationTransform
from cal_train.data.pair_set import PairSet, read_pair_set
from cal_train.data.pairs import PairOptions, PairSource
from cal_train.evals.towers import TowerEvaluator, class_names
from cal_train.evals.zero_shot import TEMPLATES
from cal_train.train.tower_model import TowerModel
from cal_train.train.tower_parts import Processors
from cal_train.train.tower_run import MakeEvaluation, TowerRecipe
from cal_train.train.tower_trainer import Evaluate


def evaluation_of(recipe: TowerRecipe) -> MakeEvaluation | None:
    """Return what a recipe asks to be measured, or None.

    Raises:
        ValueError: If evaluation data and ``eval_strategy`` do not go together.
    """
    options, strategy = recipe.evaluation, IntervalStrategy(recipe.training.eval_strategy).value
    has_data = bool(options.eval_data_path or options.zero_shot_data_path)
    if has_data and strategy == "no":
        raise ValueError("evaluation data is given, but eval_strategy is no: set eval_strategy: steps and eval_steps")
    if not has_data and strategy != "no":
        raise ValueError(f"eval_strategy is {strategy}: give eval_data_path or zero_shot_data_path too")
    if not has_data:
        return None

    def make(processors: Processors, context_length: int) -> Evaluate:
        return evaluate_on(options, recipe.data, processors, context_length, recipe.training.per_device_eval_batch_size)

    return make


def evaluate_on(
    options: TowerEvalArguments, data: PairOptions, processors: Processors, context_length: int, batch_size: int
) -> Evaluate:
    """Read the evaluation data once, and return the function that measures a model on it.

    Args:
        options: Which data.
        data: Limits of bad rows and of image sizes, as in training.
        processors: Of the towers.
        context_length: Tokens per caption.
        batch_size: Images, or texts, of a forward pass.
    """
    pairs = _read(options.eval_data_path, options.eval_image_folder, data)
    labelled = _read(options.zero_shot_data_path, options.zero_shot_image_folder, data)
    encoder = CaptionEncoder(processors.tokenizer, context_length)
    transform = EvaluationTransform(processors.image_processor)

    def evaluate(model: TowerModel) -> Mapping[str, float]:
        evaluator = TowerEvaluator(model.towers, model.objective, encoder, transform, batch_size)
        measured: dict[str, Any] = {}
        if pairs is not None:
            measured |= {f"retrieval/{name}": value for name, value in evaluator.retrieval(pairs).items()}
        if labelled is not None:
            report = evaluator.zero_shot(labelled, class_names(labelled), options.zero_shot_templates or TEMPLATES)
            measured |= {f"zero_shot/{name}": value for name, value in report.items()}
        return measured

    return evaluate


def _read(path: str | None, image_folder: str | None, data: PairOptions) -> PairSet | None:
    if path is None:
        return None
    limits = ImageLimits(data.max_image_pixels, data.min_image_side)
    return read_pair_set([PairSource(path, image_folder)], data.max_bad_samples, limits)
