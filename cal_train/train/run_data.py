"""The data half of a training run: feature cache, order of rows, packing, rows per step."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from cal_train.cal.strategies import TokenWeighting
from cal_train.conf import Recipe, VlmTrainingArguments
from cal_train.data.dataset import VlmDataset
from cal_train.data.sampling import ModalityLengthSampler, ShuffledSampler
from cal_train.train.attention import check_packing
from cal_train.train.features import FeatureCache
from cal_train.train.run_folder import data_seed, output_folder


def cache_features(
    recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin, datasets: Sequence[VlmDataset]
) -> FeatureCache | None:
    """Fill the feature cache for every image of the run, if the recipe asks for it, and let the data sets read it."""
    if recipe.data.vision_feature_cache is None:
        return None
    args = recipe.training
    cache = FeatureCache(Path(recipe.data.vision_feature_cache), model, processor)
    for dataset in datasets:
        cache.fill(
            dataset,
            args.device,
            args.dataloader_num_workers,
            args.process_index,
            args.world_size,
            show_progress=not args.disable_tqdm,
        )
        dataset.encoder.load_features = cache
    return cache


def build_sampler(recipe: Recipe, dataset: VlmDataset) -> ShuffledSampler:
    """Return the order of rows, a function of (seed, epoch)."""
    args = recipe.training
    if not recipe.data.group_by_modality_length:
        return ShuffledSampler(dataset, data_seed(args))
    with args.main_process_first(local=False, desc="image sizes"):  # the others find the file
        dataset.measure(output_folder(args) / "image_sizes.npz", show_progress=not args.disable_tqdm)
    return ModalityLengthSampler(dataset, rows_per_step(args), data_seed(args))


def pack_tokens(recipe: Recipe, model: PreTrainedModel, weighting: TokenWeighting | None) -> int | None:
    """Return the most tokens of a packed row, or None if rows are padded.

    Raises:
        ValueError: If an option of packing stands alone, or as `check_packing`.
    """
    data = recipe.data
    if not data.packing:
        if data.pack_tokens is not None:
            raise ValueError("pack_tokens is for packed rows: add packing: true, or leave it out")
        return None
    check_packing(model.config.get_text_config(), weighting, data.model_max_length)
    return data.model_max_length if data.pack_tokens is None else data.pack_tokens


def rows_per_step(args: VlmTrainingArguments) -> int:
    """Return the rows of one optimizer step over all ranks."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
