"""`TowerTrainer`: a Hugging Face Trainer whose loss is an objective over pairs of images and texts."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState

from cal_train.conf_towers import TowerTrainingArguments
from cal_train.data.stream_loader import StreamLoader
from cal_train.objectives.gather import current_ranks
from cal_train.train.grad_cache import grad_cache_step
from cal_train.train.metrics import learning_rates
from cal_train.train.step_guard import StepGuard
from cal_train.train.stream import epoch_loader, read_position, write_position
from cal_train.train.tower_checkpoint import check_objective, load_tower_weights, save_tower_model
from cal_train.train.tower_engine import (
    check_tower_engine,
    chunk_by_chunk,
    clamp_objective,
    fill_settings,
    gather_with_root,
)
from cal_train.train.tower_groups import tower_groups
from cal_train.train.tower_metrics import WindowMeans, batch_metrics, scale_metrics
from cal_train.train.tower_model import TowerModel, exactly, whole_step
from cal_train.train.trainer_saves import SafeTrainer

Evaluate = Callable[[TowerModel], Mapping[str, float]]
"""Measures a model in evaluation mode; the same numbers on every rank."""


class TowerTrainer(SafeTrainer):
    """Pretrain two towers by an objective.

    Args:
        model: Towers and objective.
        args: Training arguments.
        objective_name: Name of the objective, saved with every checkpoint.
        objective_options: What the objective was built with, saved with every checkpoint.
        loader: The batches of this rank; stops the run at too many bad rows.
        save_processors: Writes image processor and tokenizer into a folder.
        evaluate_model: Run every ``eval_steps``; its numbers are logged with ``eval_`` in front.
        group_options: Keyword arguments of `tower_groups`.
        grad_cache_chunk: Pairs whose activations are held at a time; None for all.
    """

    loss_is_scaled_for_ga: bool | None = (
        False  # an objective's loss is a mean: the Trainer averages it over micro-steps
    )
    model: TowerModel
    model_wrapped: nn.Module

    def __init__(
        self,
        model: TowerModel,
        args: TowerTrainingArguments,
        objective_name: str,
        objective_options: Mapping[str, Any],
        loader: StreamLoader,
        save_processors: Callable[[Path], None],
        evaluate_model: Evaluate | None = None,
        group_options: Mapping[str, Any] | None = None,
        grad_cache_chunk: int | None = None,
    ):
        # the Trainer asks for a data set where evaluation is on; ours is inside the function
        super().__init__(model=model, args=args, eval_dataset=cast(Dataset | None, evaluate_model))
        self.check_engine()
        check_tower_engine(self.accelerator, grad_cache_chunk, args.load_best_model_at_end)
        fill_settings(model, self.accelerator)
        self.objective_name, self.objective_options = objective_name, dict(objective_options)
        self.learning_rates: dict[str, float] = {}
        self.loader = loader
        self.save_processors = save_processors
        self.evaluate_model = evaluate_model
        self.group_options = dict(group_options or {})
        self.grad_cache_chunk = grad_cache_chunk
        self.ranks = current_ranks()
        self._last_outputs: dict[str, Any] = {}
        self._reset_window()
        self.guard = StepGuard(cast(Trainer, self), args.max_nonfinite_steps)
        self.add_callback(_ClampAndSetEpoch(self))
        self.add_callback(self.guard)

    def check_engine(self) -> None:
        """Raise ``ValueError`` where the run would be wrong: DataParallel, data read anew."""
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, which would use DataParallel. Start with "
                "`accelerate launch -m cal_train tower RECIPE.yaml`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.args.ignore_data_skip:
            raise ValueError("ignore_data_skip is not needed: a resumed run goes on in the data without reading them")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Return the loss that this rank backpropagates; averaged over ranks it is that of the whole batch."""
        sample_ids = inputs.pop("sample_ids", None)
        outputs = model(whole_step, inputs, self.ranks)
        self._measure(inputs, outputs, sample_ids)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Backpropagate one batch, at once or chunk by chunk."""
        if self.grad_cache_chunk is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = cast(dict[str, Any], self._prepare_inputs(inputs))
        sample_ids = inputs.pop("sample_ids", None)
        scale = 1 / self.current_gradient_accumulation_steps
        outputs = grad_cache_step(
            self.model,
            inputs,
            self.grad_cache_chunk,
            self.ranks,
            run=model,
            scale=scale,
            **chunk_by_chunk(self.accelerator, model),
        )
        self._measure(inputs, outputs, sample_ids)
        return outputs["loss"] * scale

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of this rank: the loader deals rows to ranks itself."""
        return epoch_loader(self.loader, lambda batch: {**batch.inputs, "sample_ids": batch.sample_ids})

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """Fetch the micro-batches of an optimizer step; count pairs."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_pairs += sum(len(batch["pixel_values"]) for batch in batches)
        return batches, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with one parameter group per part and decay."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, model))
            groups = tower_groups(model, self.args.learning_rate, self.args.weight_decay, **self.group_options)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """Return the rate of the step; called before the scheduler moves on, so the parts' rates are noted here."""
        self.learning_rates = learning_rates(cast(torch.optim.Optimizer, self.optimizer))
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, scale, logits, geometry and data waiting to the Trainer's line."""
        if "loss" in logs:
            self.guard.correct_mean(logs)
            logs.update(self._window_report())
            logs.update(self.learning_rates)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return what ``evaluate_model`` measures. Training goes on as if it had not run: random numbers included."""
        assert self.evaluate_model is not None
        started = time.perf_counter()
        self.model.eval()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            measured = self.model(exactly, self.evaluate_model)  # in the root's forward, where parameters are whole
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in measured.items()}
        self.log(dict(metrics))
        self._window_started += time.perf_counter() - started  # pairs_per_second is that of training
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or cast(str, self.args.output_dir))
            save_tower_model(self.model, self.objective_name, self.objective_options, folder, state_dict)
            self.save_processors(folder)
            write_position(self.loader, folder)

    # The Trainer would look for files of its own and, finding none, load nothing or only warn.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tower_weights(self.model, self.objective_name, resume_from_checkpoint)
        read_position(self.loader, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # which has loaded the weights itself
            check_objective(Path(checkpoint), self.objective_name)
            read_position(self.loader, checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        load_tower_weights(self.model, self.objective_name, cast(str, self.state.best_model_checkpoint))

    def _measure(self, inputs: dict[str, Any], outputs: dict[str, Any], sample_ids: list[str] | None) -> None:
        self._last_outputs = {name: outputs[name] for name in ("images", "texts")}
        if not self.guard.note_loss(outputs["loss"], sample_ids):
            return
        self._parts.add({f"loss/{name}": value for name, value in outputs["parts"].items()})
        self._metrics.add({f"{self.objective_name}/{name}": value for name, value in outputs["metrics"].items()})

    def _reset_window(self) -> None:
        self._parts, self._metrics = WindowMeans(), WindowMeans()
        self._num_pairs = 0
        self.loader.read_and_reset_wait_s()
        self._window_started = time.perf_counter()

    def _window_report(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._window_started
        report = self._parts.means() | self.model(scale_metrics)
        own = self._metrics.means() | batch_metrics(self.model, **self._last_outputs)
        report |= self._mean_over_ranks(own)
        seen = self.loader.report
        counts = [self._num_pairs, seen.bad.count, seen.num_cut]
        sums = cast(Tensor, self.accelerator.reduce(torch.tensor(counts, device=self.args.device), "sum"))
        num_pairs, num_bad, num_cut = sums.tolist()
        report |= {
            "pairs_per_second": num_pairs / seconds,
            "data_wait_share": self.loader.read_and_reset_wait_s() / seconds,
            "dropped_rows": num_bad,
            "truncated_captions": num_cut,
        }
        self._reset_window()
        return report

    def _mean_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """Return the mean over the ranks that have a number; a rank without any pair of a kind says nan."""
        names = sorted(values)
        own = torch.tensor([values[name] for name in names], device=self.args.device)
        sums = torch.stack([own.nan_to_num(0.0), (~own.isnan()).float()])
        totals, counts = cast(Tensor, self.accelerator.reduce(sums, "sum")).tolist()
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}


class _ClampAndSetEpoch(TrainerCallback):
    def __init__(self, trainer: TowerTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._reset_window()
        gather_with_root(self.trainer.model)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.loader.set_epoch(int(cast(float, state.epoch) + 1e-6))

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        clamp_objective(self.trainer.model, self.trainer.is_deepspeed_enabled)
