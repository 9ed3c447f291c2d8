"""Is `cal-train estimate` right? Its memory against the measured peak of a process that trains the model on the CPU.

Each case builds a model in a fresh process and runs two optimizer steps with CAL and AdamW in float32; the peak of the
process above its size after a warm-up of toy size is compared with the sum that is estimated. Freed memory is given
back to the system at once, so that the peak is what is in use and not what glibc keeps for later.

    python benchmarks/estimate_check.py [--small] [--out FOLDER]
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from bench.memory import give_back_at_once, in_fresh_process, peak_growth
from bench.record import RESULTS, Result, circumstances, print_result, write_results
from bench.steps import Case, Shape, Size, make_batch

from cal_train.cal.strategies import STRATEGIES
from cal_train.conf import ModelArguments, VlmTrainingArguments
from cal_train.models.flops import Work
from cal_train.models.parts import freeze
from cal_train.testing import tiny_llava, tiny_processor, tiny_tokenizer
from cal_train.train.estimate import Estimate, Setting, estimate
from cal_train.train.run import wrap_lora
from cal_train.train.trainer import VlmTrainer

MIB = 2**20
TOY = Size(28, vocab_size=500, hidden_size=64, intermediate_size=64, num_layers=1)


@dataclass(frozen=True)
class Run:
    """One way to train."""

    name: str
    stage: str = "finetune"
    lora: bool = False
    checkpointing: bool = False
    num_rows: int = 2

    def options(self) -> ModelArguments:
        """Return the model's part of the recipe."""
        return ModelArguments(model_name_or_path="", stage=self.stage, lora_enable=self.lora, lora_r=16)

    def case(self, size: Size) -> Case:
        """Return model and batch."""
        return Case(size, Shape(1, num_text=150, num_labels=100, num_rows=self.num_rows), self.checkpointing)


RUNS = [
    Run("full"),
    Run("full, 6 rows", num_rows=6),
    Run("full, checkpointing, 6 rows", checkpointing=True, num_rows=6),
    Run("LoRA", lora=True, num_rows=4),
    Run("projector only", stage="pretrain", num_rows=4),
]


def sizes(is_small: bool) -> Size:
    """Return a model of 58 million weights, or a toy."""
    return Size(image_size=112, vocab_size=4000, hidden_size=256, num_layers=4) if is_small else Size()


def train_two_steps(run: Run, size: Size) -> None:
    """Build the model and train it as the Trainer would, optimizer included."""
    case = run.case(size)
    model = tiny_llava(tiny_tokenizer(), image_size=size.image_size, **size.text_config())
    wrapped = wrap_lora(model, run.options())
    freeze(wrapped, run.stage)
    if run.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    args = VlmTrainingArguments(
        output_dir=tempfile.gettempdir(), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    trainer = VlmTrainer(wrapped, args, tiny_processor(), STRATEGIES["cal"], train_dataset=None, data_collator=list)
    trainer.current_gradient_accumulation_steps = 1
    optimizer, batch = trainer.create_optimizer(), make_batch(case)
    for _ in range(2):
        batches, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, args.device)
        trainer.training_step(wrapped, batches[0], num_items)
        optimizer.step()
        optimizer.zero_grad()


def measured_peak(run: Run, size: Size) -> int:
    """Return the peak of the process in bytes, above its size before."""
    torch.set_num_threads(1)
    give_back_at_once()
    train_two_steps(replace(run, num_rows=1), TOY)  # libraries that are imported when first used are no part of a run
    gc.collect()
    return peak_growth(lambda: train_two_steps(run, size))


def estimated(run: Run, size: Size) -> Estimate:
    """Return what `cal-train estimate` says about the run."""
    case = run.case(size)
    with torch.device("meta"):
        config = tiny_llava(tiny_tokenizer(), image_size=size.image_size, **size.text_config()).config
    rows, shape = run.num_rows, case.shape
    work = Work([case.num_tokens] * rows, [shape.num_text] * rows, rows, rows * shape.num_labels)
    setting = Setting(
        "ddp", 1, torch.float32, False, run.checkpointing, "adamw_torch", rows, case.num_tokens, work, "remove"
    )
    return estimate(config, run.options(), setting)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write it to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy size, seconds: shows that the script works")
    parser.add_argument("--out", type=Path, help="folder for results (default: benchmarks/results; not if --small)")
    options = parser.parse_args(arguments)
    load, size, rows, data = os.getloadavg(), sizes(options.small), [], []
    for run in RUNS:
        peak, expected = in_fresh_process(measured_peak, run, size), estimated(run, size).memory
        data.append({**asdict(run), "measured": peak, "estimated": expected.total, "parts": expected.parts})
        ratio = expected.total / peak
        rows.append([run.name, f"{expected.total / MIB:.0f}", f"{peak / MIB:.0f}", f"{ratio:.2f}"])
    result = Result(
        "Memory in use by a training process, CAL on", ["run", "estimated MiB", "measured MiB", "ratio"], rows
    )
    print_result(result)
    out = options.out or (None if options.small else RESULTS)
    if out is not None:
        write_results(out, "estimate_check", circumstances(load), [result], data)


if __name__ == "__main__":
    main()
