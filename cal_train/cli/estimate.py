"""``cal-train estimate RECIPE``: parameters, memory of a device, tokens per step and CAL's overhead, before any run."""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig

from cal_train.cli.options import parse_overrides, read_yaml
from cal_train.cli.recipe import OPTIONS, load_recipe, recipe_processor
from cal_train.conf import Recipe
from cal_train.data.dataset import build_dataset
from cal_train.data.examples import build_encoder
from cal_train.data.lengths import RowLengths, sample_lengths, spread_rows
from cal_train.data.sample_stream import open_sources, spread_over_files
from cal_train.data.stream_files import source_files
from cal_train.folders import from_folder
from cal_train.models.families import FAMILIES
from cal_train.models.flops import Work, peak_flops
from cal_train.train.estimate import ENGINES, Estimate, Setting, estimate
from cal_train.train.run import weighting_of
from cal_train.train.stored_scores import score_files
from cal_train.train.yaml_files import read_mapping

TAKES_OPTIONS = True

_ASSUMED_TEXT, _ASSUMED_LABELS = 150, 100
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", help="YAML file; any option of it can follow as --key value")
    parser.add_argument("--gpus", type=int, help="devices (default: of the launcher file, else 8)")
    parser.add_argument("--gpu_memory_gib", type=float, help="memory of a device: says whether the estimate fits")
    parser.add_argument("--gpu", help="name of the device, as H100 or A100: gives the shortest possible step")
    parser.add_argument("--engine", choices=ENGINES, help="how the model is split over devices (default ddp)")
    parser.add_argument("--config_file", metavar="FILE", help="launcher file, as for accelerate launch: gives --engine")
    parser.add_argument("--rows", type=int, default=200, help="rows of the data that are measured (default 200)")


def run(args: argparse.Namespace) -> int:
    """Print the tables; return 1 if --gpu_memory_gib is given and the estimate does not fit, else 0."""
    engine, num_devices = launch(args)
    if num_devices < 1 or args.rows < 1:
        raise ValueError("--gpus and --rows must be at least 1")
    recipe = load_recipe(args.recipe, args.options, will_train=False)
    options = read_yaml(OPTIONS, args.recipe) | parse_overrides(OPTIONS, args.options)
    uses_bf16 = str(options.get("bf16", "false")).lower() == "true"  # left out of `recipe`, it needs a GPU
    config = load_config(recipe.model.model_name_or_path)
    lengths, is_measured = row_lengths(recipe, config, args.rows)
    setting = setting_of(recipe, engine, num_devices, uses_bf16, lengths)
    result = estimate(config, recipe.model, setting)
    show(result, setting, lengths, is_measured, recipe, args)
    limit = args.gpu_memory_gib
    return int(limit is not None and result.memory.total > limit * _GIB)


def launch(args: argparse.Namespace) -> tuple[str, int]:
    """Return the engine and the number of devices, from the launcher file where the arguments leave them open.

    Raises:
        ValueError: If there is no such file, it names an engine that is not estimated, or --engine says another one.
    """
    if args.config_file is None:
        return args.engine or "ddp", 8 if args.gpus is None else args.gpus
    if args.engine is not None:
        raise ValueError("give --config_file or --engine, not both")
    settings = _launcher_file(Path(args.config_file))
    num_devices = int(settings.get("num_processes", 8)) if args.gpus is None else args.gpus
    kind = settings.get("distributed_type")
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return "ddp", num_devices
    if kind != "DEEPSPEED":
        raise ValueError(f"{args.config_file}: distributed_type {kind} is not estimated, use --engine")
    file = settings.get("deepspeed_config", {}).get("deepspeed_config_file", "")
    zero = _launcher_file(Path(file)).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    offloads = "offload_param" in zero and "offload_optimizer" in zero
    return {0: "ddp", 1: "zero1", 2: "zero2"}.get(stage, "zero3_offload" if offloads else "zero3"), num_devices


def _launcher_file(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"no launcher settings at {file}: start from the folder that the launch line starts from")
    return read_mapping(file)


def load_config(folder: str) -> PreTrainedConfig:
    """Return the configuration of a model folder, whose weights need not be there.

    Raises:
        ValueError: If there is none, or the family is not supported.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json: give a folder of a model of this size with --model_name_or_path; its "
            "weights are not needed"
        )
    config = from_folder(AutoConfig, folder)
    if config.model_type not in FAMILIES:
        raise ValueError(f"{folder} holds a {config.model_type!r} model; supported are {', '.join(FAMILIES)}")
    return config


def row_lengths(recipe: Recipe, config: PreTrainedConfig, num_rows: int) -> tuple[RowLengths, bool]:
    """Return lengths of rows, and whether they were measured on the recipe's data or assumed."""
    data = recipe.data
    files = [data.data_path] if data.data_path else [source.get("path", "") for source in data.data or []]
    has_data = bool(files) and all(_is_there(file, data.streaming) for file in files)
    if has_data and (Path(recipe.model.model_name_or_path) / "processor_config.json").is_file():
        encoder = build_encoder(data, recipe_processor(recipe))
        if data.streaming:
            return sample_lengths(spread_over_files(open_sources(data), num_rows), encoder), True
        dataset = build_dataset(data, recipe_processor(recipe))
        return sample_lengths(spread_rows(dataset, num_rows), encoder), True
    tokens = largest_image(config, recipe.model.image_grid)
    return RowLengths([tokens], [_ASSUMED_TEXT], [_ASSUMED_LABELS], [1], 0), False


def largest_image(config: Any, image_grid: int | None = None) -> int:
    """Return the most tokens that an image can have: all tiles of the largest grid, and the whole image besides.

    Args:
        config: Of the VLM.
        image_grid: Tiles per side of MGM, in place of the configuration's.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    if getattr(config, "image_grid_pinpoints", None):  # LLaVA-NeXT: a newline behind each row of the joined tiles
        size = config.vision_config.image_size
        return side**2 + max((h // size) * side * ((w // size) * side + 1) for h, w in config.image_grid_pinpoints)
    grid = image_grid or getattr(config, "image_grid", 1)
    return side**2 * (grid**2 + (grid > 1))


def _is_there(path: str, is_streamed: bool) -> bool:
    if not is_streamed:
        return Path(path).is_file()
    try:
        return bool(source_files(path))
    except ValueError:
        return False


def setting_of(recipe: Recipe, engine: str, num_devices: int, uses_bf16: bool, lengths: RowLengths) -> Setting:
    """Return the setting of a micro-batch of the longest rows that were seen."""
    training, weighting = recipe.training, weighting_of(recipe.cal)
    num_rows = training.per_device_train_batch_size
    chosen = recipe.model.dtype
    if chosen == "auto":
        chosen = "bfloat16" if engine.startswith("zero") and uses_bf16 else "float32"
    longest = max(range(len(lengths.image)), key=lengths.total)
    row_total, row_text = lengths.total(longest), lengths.text[longest]
    with_image = num_rows if lengths.images[longest] else 0
    work = Work(
        [row_total] * num_rows,
        [row_text] * with_image,
        num_rows * lengths.images[longest],
        num_rows * lengths.labels[longest],
    )
    return Setting(
        engine=engine,  # pyright: ignore[reportArgumentType] (argparse has checked it)
        num_devices=num_devices,
        dtype=getattr(torch, chosen),
        autocast=uses_bf16 and chosen == "float32",
        checkpointing=bool(training.activation_checkpointing),
        optimizer=str(getattr(training.optim, "value", training.optim)),
        num_rows=num_rows,
        length=row_total,
        work=work,
        ablation=None if weighting is None or score_files(recipe) else weighting.ablation,
    )


def show(
    result: Estimate,
    setting: Setting,
    lengths: RowLengths,
    is_measured: bool,
    recipe: Recipe,
    args: argparse.Namespace,
) -> None:
    """Print what was estimated, and which numbers were measured."""
    console = Console()
    for count in result.counts:
        console.print(str(count), highlight=False)
    if recipe.model.quantization:
        console.print(f"{result.quantized_weights:,} of them in {recipe.model.quantization}", highlight=False)
    console.print(memory_table(result, setting))
    for line in memory_notes(result, setting, args.gpu_memory_gib) + step_lines(
        result, setting, lengths, is_measured, recipe, args
    ):
        console.print(line, highlight=False, soft_wrap=True)


def memory_table(result: Estimate, setting: Setting) -> Table:
    """Return the memory of one device, one row per part."""
    table = Table(title=f"Memory of one device in GiB, {setting.engine} on {setting.num_devices} (formulas)")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for part, size in {**result.memory.parts, "sum": result.memory.total}.items():
        table.add_row(part, f"{size / _GIB:.2f}")
    return table


def memory_notes(result: Estimate, setting: Setting, limit: float | None) -> list[str]:
    """Return what the table compares with."""
    other, memory = "without" if setting.checkpointing else "with", result.memory
    lines = [
        f"activations {other} activation_checkpointing: {memory.other_checkpointing / _GIB:.2f} GiB",
        f"logits as the stock Trainer makes them: {memory.stock_head / _GIB:.2f} GiB, instead of the head's above",
        "not included: driver context, communication buffers, temporary results, gaps of the allocator. Processes "
        "measured on a CPU (benchmarks/estimate_check.py) used 0.77 to 1.04 times the sum, besides such gaps",
    ]
    if limit is not None:
        fits = "fits" if memory.total <= limit * _GIB else "does not fit"
        lines.append(f"{memory.total / _GIB:.2f} GiB {fits} in {limit:g} GiB")
    return lines


def step_lines(
    result: Estimate,
    setting: Setting,
    lengths: RowLengths,
    is_measured: bool,
    recipe: Recipe,
    args: argparse.Namespace,
) -> list[str]:
    """Return tokens and operations of a step."""
    accumulation = recipe.training.gradient_accumulation_steps
    rows = setting.num_rows * accumulation * setting.num_devices
    mean_image, mean_text = (sum(values) / len(values) for values in (lengths.image, lengths.text))
    origin = f"measured on {len(lengths.image)} rows" if is_measured else "assumed, the data or processor is not there"
    flops = sum(result.flops.values())
    vision = result.flops["vision_tower"] / flops
    lines = [
        f"a row: {mean_image:.0f} image + {mean_text:.0f} text tokens on average, longest {setting.length} ({origin})",
        f"a step: {rows} rows, {rows * (mean_image + mean_text):,.0f} tokens on average",
        f"a micro-batch of the longest rows: {flops / 1e12:.3g} TFLOP, {vision:.1%} of them in the tower (counted)",
    ]
    if lengths.num_bad:
        lines.append(f"{lengths.num_bad} of the rows looked at cannot be used: see `cal-train check_data`")
    if setting.ablation is not None:
        lines.append(
            f"CAL ({setting.ablation}): a step takes {result.cal_overhead:.3f} times the operations without it"
        )
    peak = peak_flops(args.gpu) if args.gpu else None
    if args.gpu and peak is None:
        lines.append(f"--gpu {args.gpu}: its peak is not known here, so no time is given")
    elif peak is not None:
        seconds = flops * accumulation / peak
        lines.append(
            f"a step of longest rows takes at least {seconds:.3g} s at the {peak / 1e12:.0f} TFLOP/s of {args.gpu}"
        )
    return lines
