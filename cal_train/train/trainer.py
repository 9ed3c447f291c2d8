"""`VlmTrainer`: a Hugging Face Trainer whose loss is the CAL step of `cal_train.train.step`."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainerControl, TrainerState

from cal_train.cal.strategies import TokenWeighting
from cal_train.conf import VlmTrainingArguments
from cal_train.data.stream_loader import StreamBatch, StreamLoader
from cal_train.models.families import base_model
from cal_train.models.head import find_head
from cal_train.models.lora import load_adapter_strictly, save_newline
from cal_train.models.parts import parameter_groups
from cal_train.models.quantize import write_quantization
from cal_train.train.batches import eval_batches, train_batches
from cal_train.train.checkpoint import load_weights_strictly
from cal_train.train.flop_count import flop_count
from cal_train.train.metrics import LogWindow, Stopwatch, learning_rates
from cal_train.train.step import StepOptions, attach_step
from cal_train.train.step_guard import StepGuard
from cal_train.train.stream import epoch_loader, write_position
from cal_train.train.trainer_saves import SafeTrainer
from cal_train.types import IGNORE_INDEX, DropCount, Problem


class HasEpoch(Protocol):
    """What is told the number of each epoch: the sampler, and the training set if it draws rows anew."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order or the rows of an epoch."""
        ...


class VlmTrainer(SafeTrainer):
    """Train a VLM by next-token prediction, every label token weighted as ``weighting`` says.

    Args:
        model: The VLM, or a peft wrapper around it.
        args: Training arguments.
        processor: Saved beside every checkpoint, chat template included.
        weighting: None for plain training.
        train_dataset: Map-style, with ``set_epoch``; None with a ``train_loader``.
        data_collator: Makes the batch dict (`cal_train.data.collate`).
        train_sampler: Order of the rows; has ``set_epoch``.
        eval_dataset: Rows of the evaluation loss.
        mm_projector_lr: Learning rate of the projector, if it is to differ.
        vision_tower_lr: Learning rate of the vision tower, if it is to differ.
        max_bad_samples: Rows that may be dropped on a rank before the run stops; a row counts once, however often it
            is read.
        has_cached_features: Batches bring ``vision_features``.
        has_stored_deltas: Batches bring the deltas of their labels.
        train_loader: The batches of this rank, where they are streamed.
    """

    loss_is_scaled_for_ga: bool | None = True
    model: nn.Module  # never None here, unlike in the Trainer, which may get a function that makes the model
    model_wrapped: nn.Module

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: VlmTrainingArguments,
        processor: ProcessorMixin,
        weighting: TokenWeighting | None,
        train_dataset: Dataset | None,
        data_collator: Callable[[Sequence[Any]], dict[str, Any]],
        train_sampler: Sampler[int] | None = None,
        eval_dataset: Dataset | None = None,
        mm_projector_lr: float | None = None,
        vision_tower_lr: float | None = None,
        max_bad_samples: int = 0,
        has_cached_features: bool = False,
        has_stored_deltas: bool = False,
        train_loader: StreamLoader | None = None,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would use DataParallel. Start with `accelerate "
                "launch -m cal_train train RECIPE.yaml`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )
        vlm = base_model(model)
        head = find_head(vlm)
        attach_step(vlm)
        super().__init__(
            model=model,
            args=args,
            processing_class=processor,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
        )
        self.model_accepts_loss_kwargs = True
        # `sample`: our loss is already divided by the label count of the whole optimizer step. `micro_batch`: it is a
        # mean per micro-batch and the Trainer divides by the number of accumulation steps.
        self.loss_is_scaled_for_ga = weighting is None or weighting.normalizer == "sample"
        self.weighting = weighting
        self.train_sampler, self.train_loader = train_sampler, train_loader
        self.group_options = {"mm_projector_lr": mm_projector_lr, "vision_tower_lr": vision_tower_lr}
        self.max_bad_samples = max_bad_samples
        self.dropped = DropCount()
        self.num_truncated = 0
        self.share_with_labels = 1.0  # of the micro-batches of a step: dropped rows and an epoch's end leave empty ones
        self.learning_rates: dict[str, float] = {}
        ablated_clock = Stopwatch(args.device)
        self.window = LogWindow(args.device, weighting, ablated_clock)
        self.step_options = StepOptions(
            head, weighting, self._is_sharded(), has_cached_features, ablated_clock, has_stored_deltas
        )
        if train_loader is not None:
            self._count_bad_files(train_loader)
        self.guard = StepGuard(cast(Trainer, self), args.max_nonfinite_steps)
        self.add_callback(_SetEpoch(self))
        self.add_callback(self.guard)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch, scaled so that the optimizer step sees the mean over all its label tokens.

        With ``sample`` weights w' (mean 1 per sample), n label tokens in the optimizer step over all ranks and W ranks:
        ``loss = W * sum(w' CE) / n``; the engine averages gradients over ranks, which takes W away again. With
        ``micro_batch``: ``sum(w CE) / sum(w)``, averaged over the micro-batches with labels of all accumulation steps
        and ranks (reference code).
        """
        sample_ids = inputs.pop("sample_ids", None)
        outputs = model(step=self.step_options, **inputs)  # forward without and with the image, weights, loss sum
        if self.weighting is not None and self.weighting.normalizer == "micro_batch":
            loss = outputs["loss_sum"] / outputs["weight_sum"].clamp_min(torch.finfo(torch.float32).tiny)
            loss = loss / max(self.share_with_labels, torch.finfo(torch.float32).tiny)
        else:
            if num_items_in_batch is None:
                num_items_in_batch = count_labels(inputs["labels"])
            loss = outputs["loss_sum"] * self.args.world_size / max(int(num_items_in_batch), 1)
        if self.guard.note_loss(loss, sample_ids):
            self.window.add(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Fetch the micro-batches of an optimizer step; count dropped rows, waiting time and label tokens."""
        started = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.window.data_wait_seconds += time.perf_counter() - started
        for batch in batches:
            self._count_dropped(batch.pop("dropped", []))
            self.num_truncated += batch.pop("num_truncated", 0)
        if not batches:
            return batches, None
        num_labels = torch.stack([count_labels(batch["labels"]) for batch in batches]).to(device)
        own = torch.stack([num_labels.sum(), (num_labels > 0).sum(), torch.tensor(len(batches), device=device)])
        sums = self._sum_over_ranks(own)
        self.share_with_labels = float(sums[1] / sums[2])
        return batches, sums[0]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with one parameter group per part and decay."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, model))
            groups = parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                decay_names=self.get_decay_parameter_names(model),
                **self.group_options,
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """Return the rate of the step; called before the scheduler moves on, so the parts' rates are noted here."""
        self.learning_rates = learning_rates(cast(torch.optim.Optimizer, self.optimizer))
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput, data waiting, weight statistics and the learning rate of each part to the Trainer's line."""
        if "loss" in logs:
            self.guard.correct_mean(logs)
            own = {"dropped_rows": self.dropped.count, "truncated_rows": self.num_truncated}
            logs.update(self.window.report(self.state.global_step, own, self._sum_over_ranks))
            logs.update(self.learning_rates)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the plain cross-entropy per label token over the evaluation rows, each counted exactly once.

        It is the same number with CAL on or off, so that runs compare. Ranks that run out of rows go on with empty
        batches: sharded parameters need every rank.
        """
        started = time.perf_counter()
        dataset = cast(Dataset, eval_dataset if eval_dataset is not None else self.eval_dataset)
        model = self.model_wrapped
        model.eval()
        options = StepOptions(
            self.step_options.head, None, self.step_options.is_sharded, self.step_options.has_cached_features
        )
        precision = torch.float32 if self.args.device.type == "mps" else torch.float64  # MPS has no wider one
        sums = torch.zeros(2, device=self.args.device, dtype=precision)
        for batch in eval_batches(dataset, cast(Any, self.data_collator), self.args):
            self._count_dropped(batch.pop("dropped", []))
            for name in ("sample_ids", "num_truncated"):
                batch.pop(name, None)
            inputs = self._prepare_inputs(batch)
            loss_sum = model(step=options, **inputs)["loss_sum"]
            sums += torch.stack([loss_sum, count_labels(inputs["labels"]).to(loss_sum)])
        loss_sum, num_labels = self._sum_over_ranks(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / max(num_labels, 1.0)}
        self.log(dict(metrics))
        self.window.leave_out(time.perf_counter() - started)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of this rank."""
        if self.train_loader is not None:
            return epoch_loader(self.train_loader, _inputs_of)
        sampler = cast(Sampler[int], self.train_sampler)
        return train_batches(cast(Dataset, self.train_dataset), sampler, cast(Any, self.data_collator), self.args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer loads by the names inside the module and tolerates missing keys; files carry the names of the
        # published layout, so that it would load nothing and say nothing.
        if model is None and isinstance(self.model, PeftModel) and not self.is_fsdp_enabled:
            load_adapter_strictly(self.model, resume_from_checkpoint)
        elif model is not None or not isinstance(self.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights_strictly(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        else:  # as in `_load_from_checkpoint`
            load_weights_strictly(self.model, cast(str, self.state.best_model_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.train_loader is not None and self.aside is not None:  # part of a checkpoint
            write_position(self.train_loader, cast(str, output_dir))
        # An adapter folder would lack what the template's answers end with; `merge` takes it from there.
        if self.args.should_save and isinstance(self.model, PeftModel):
            folder = output_dir or cast(str, self.args.output_dir)
            base_model(self.model).generation_config.save_pretrained(folder)
            save_newline(self.model, folder, state_dict)
            write_quantization(base_model(self.model), folder)

    def _count_bad_files(self, loader: StreamLoader) -> None:
        """Count what opening the files has found: too much of it stops every rank, in the log it is on one alone."""
        self._count_dropped([problem for blocks in loader.stream.blocks for problem in blocks.problems])
        if self.args.process_index > 0:
            self.dropped = DropCount()

    def _is_sharded(self) -> bool:
        deepspeed = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled if deepspeed is None else deepspeed.zero_stage == 3

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(tensor, "sum"))

    def _count_dropped(self, problems: list[Problem]) -> None:
        for problem in problems:
            is_new = self.dropped.add(problem)  # not of another epoch, or of another evaluation
            if is_new and self.dropped.count > self.max_bad_samples:
                raise ValueError(
                    f"{problem}\n{self.dropped.count} bad rows, max_bad_samples is {self.max_bad_samples}. Run "
                    "`cal-train check_data` on the recipe to see all of them; a larger max_bad_samples drops and "
                    "counts them"
                )


def _inputs_of(batch: StreamBatch) -> dict[str, Any]:
    return {
        **batch.inputs,
        "sample_ids": batch.sample_ids,
        "dropped": batch.dropped,
        "num_truncated": batch.num_cut,
    }


def count_labels(labels_BS: Tensor) -> Tensor:
    """Return how many label tokens are predicted; a label at position 0 never is."""
    return (labels_BS[:, 1:] != IGNORE_INDEX).sum()


class _SetEpoch(TrainerCallback):
    """Tells sampler and dataset the epoch, also on resume (accelerate does not reach a sampler of a skipped loader)."""

    def __init__(self, trainer: VlmTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer, weighting = self.trainer, self.trainer.weighting
        has_pass = not trainer.step_options.has_stored_deltas
        trainer.window.flops = flop_count(trainer.model, weighting.ablation if weighting and has_pass else None, args)
        trainer.window.start(state.global_step)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        epoch = int(state.epoch + 1e-6)
        for target in (self.trainer.train_sampler, self.trainer.train_dataset, self.trainer.train_loader):
            if target is not None:
                cast(HasEpoch, target).set_epoch(epoch)
