"""The data half of a training run: rows and their order, map-style or streamed, feature cache, packing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from cal_train.cal.strategies import TokenWeighting
from cal_train.conf import Recipe, VlmTrainingArguments
from cal_train.data.collate import Collator
from cal_train.data.dataset import VlmDataset, build_dataset
from cal_train.data.examples import build_encoder
from cal_train.data.sample_stream import ExampleMaker, open_sources, sample_stream
from cal_train.data.sampling import ModalityLengthSampler, ShuffledSampler
from cal_train.data.stream_loader import StreamLoader
from cal_train.data.stream_plan import Share
from cal_train.train.attention import check_packing
from cal_train.train.features import FeatureCache
from cal_train.train.run_folder import data_seed, output_folder
from cal_train.train.stored_scores import score_files
from cal_train.train.stream import read_position


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a run: a data set in the order of a sampler, or a stream. ``num_rows`` are those of an epoch."""

    num_rows: int
    dataset: VlmDataset | None = None
    sampler: ShuffledSampler | None = None
    loader: StreamLoader | None = None

    def left_out(self, world_size: int) -> int:
        """Return the rows of an epoch that are not trained, because they do not fill a batch of every rank."""
        return self.loader.stream.plan.left_out(world_size) if self.loader is not None else 0


def training_rows(recipe: Recipe, processor: ProcessorMixin, collate: Collator) -> TrainingRows:
    """Open the training data of a recipe.

    Raises:
        ValueError: If it cannot be read, or the recipe asks for what a stream cannot do.
    """
    if recipe.data.streaming:
        return streamed_rows(recipe, processor, collate)
    dataset = build_dataset(recipe.data, processor, data_seed(recipe.training))
    return TrainingRows(len(dataset), dataset, build_sampler(recipe, dataset))


def streamed_rows(recipe: Recipe, processor: ProcessorMixin, collate: Collator) -> TrainingRows:
    """Open the sources of a streaming recipe as this rank's batches.

    Raises:
        ValueError: As `open_sources` and `sample_stream`, or if weights are to follow from score files.
    """
    args, data = recipe.training, recipe.data
    if score_files(recipe):
        raise ValueError(
            "scores are found by the row of a data file, which streaming: true has not: leave out one of them"
        )
    stream = sample_stream(
        open_sources(data),
        ExampleMaker(build_encoder(data, processor), collate),
        args.per_device_train_batch_size,
        Share(args.process_index, args.world_size),
        data.shuffle_pool,
        data_seed(args),
    )
    loader = StreamLoader(
        stream,
        args.dataloader_num_workers,
        max_bad_samples=None,  # the trainer counts, as it does for map-style data
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return TrainingRows(int(stream.plan.source_rows.sum()), loader=loader)


def go_on(rows: TrainingRows, checkpoint: str | None, args: VlmTrainingArguments) -> None:
    """Go to the place in the stream where a checkpoint was written; map-style data are skipped to it by the Trainer.

    With ``ignore_data_skip``, a resumed run begins its epoch anew.

    Raises:
        ValueError: If data, batch size, ranks or workers are not those of the run that wrote it, or its steps lead to
            another place.
    """
    if checkpoint is None or rows.loader is None or args.ignore_data_skip:
        return
    try:
        read_position(rows.loader, checkpoint)
        _check_place(rows.loader, checkpoint, args.gradient_accumulation_steps)
    except ValueError as error:
        raise ValueError(f"{error}; or set ignore_data_skip: true, which begins the epoch anew") from error


def _check_place(loader: StreamLoader, checkpoint: str, accumulation: int) -> None:
    """The Trainer computes from the steps how many batches it passes over; they have to be those that were read."""
    num_steps = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    epoch, step = divmod(num_steps, -(-len(loader) // accumulation))
    plan, position = loader.stream.plan, loader.stream.position
    if (plan.epoch, position) != (epoch, step * accumulation):
        raise ValueError(
            f"{checkpoint} stands at batch {position} of epoch {plan.epoch}, but its {num_steps} steps of "
            f"{accumulation} batches lead to batch {step * accumulation} of epoch {epoch}: it is of a run that began "
            "an epoch anew, or had other gradient_accumulation_steps. Resume from a checkpoint before that"
        )


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
