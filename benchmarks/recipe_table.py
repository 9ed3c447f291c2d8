"""Memory of a device and work of a step of the recipes for published models, as a Markdown table. Nothing is measured.

Shapes of the models are those below, so that no folder of a model is needed. Memory is given for a micro-batch of
typical rows and for one cut at ``model_max_length``, the largest that a run can meet; a tiled image has all its tiles.

    python benchmarks/recipe_table.py [--small] [--gpus N ...] [--out FILE]
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, ConvNextConfig, GemmaConfig, LlamaConfig, PreTrainedConfig

from cal_train.cli.estimate import setting_of
from cal_train.cli.options import read_yaml
from cal_train.cli.recipe import OPTIONS, load_recipe
from cal_train.conf import Recipe
from cal_train.data.lengths import RowLengths
from cal_train.models.layout import build_config
from cal_train.train.estimate import Estimate, estimate

ROOT = Path(__file__).parents[1]
GIB = 2**30
TYPICAL_TEXT = 150  # tokens, two thirds of them labels
HEADER = ["recipe", "engine", "GPUs", "rows", "tokens", "GiB", "longest row", "GiB", "TFLOP", "with CAL"]
CAPTION = (
    "Estimated, not measured: GiB of one device, without driver context, communication buffers and gaps of the "
    f"allocator; rows of one micro-batch; tokens of a typical row ({TYPICAL_TEXT} of text) and of the longest that "
    "`model_max_length` lets through; TFLOP of a micro-batch of typical rows; operations with CAL over those without."
)

VICUNA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
VICUNA_13B: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
GEMMA_2B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 256,
}  # fmt: skip
"""Llama 2 (arXiv:2307.09288) as Vicuna 1.5 has it, and Gemma (arXiv:2403.08295, table 1)."""
CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
"""CLIP's ViT-L/14 (arXiv:2103.00020, table 20)."""
CONVNEXT_L: dict[str, Any] = {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]}
"""ConvNeXt-L (arXiv:2201.03545, section 3), Mini-Gemini's tower for high resolution."""


@dataclass(frozen=True)
class Model:
    """A family with its language model, and what the largest image is: tokens and tiles."""

    family: str
    text: PreTrainedConfig
    image_tokens: int = 576
    num_tiles: int = 1

    def config(self) -> PreTrainedConfig:
        """Return the configuration of the whole model."""
        vision = CLIPVisionConfig(image_size=336, patch_size=14, **CLIP_L_336)
        is_mgm = self.family == "mgm"
        options: dict[str, Any] = {"image_grid": 2, "image_global": True} if is_mgm and self.num_tiles > 1 else {}
        aux = ConvNextConfig(**CONVNEXT_L) if is_mgm else None
        return build_config(self.family, self.text, vision, self.text.vocab_size - 1, -2, aux, **options)


def models() -> dict[str, Model]:
    """Return the model of each folder of recipes."""
    small, large = (LlamaConfig(vocab_size=32064, **shape) for shape in (VICUNA_7B, VICUNA_13B))
    gemma = GemmaConfig(vocab_size=256064, **GEMMA_2B)
    return {
        "llava15_7b": Model("llava", small),
        "llava15_13b": Model("llava", large),
        "llava_next_7b": Model("llava_next", small, 2928, 5),
        "llava_next_13b": Model("llava_next", large, 2928, 5),
        "mgm_2b": Model("mgm", gemma),
        "mgm_7b": Model("mgm", small),
        "mgm_13b": Model("mgm", large),
        "mgm_7b_hd": Model("mgm", small, 2880, 5),
        "mgm_13b_hd": Model("mgm", large, 2880, 5),
    }


def launcher_engine(path: Path) -> str:
    """Return the engine of the launch line in a recipe's header.

    Raises:
        ValueError: If it has none.
    """
    found = re.search(r"zero_configs/(\w+)\.yaml", path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path}: its header has no launch line with a file of zero_configs")
    return found[1]


def table_row(path: Path, model: Model, num_gpus: int) -> list[str]:
    """Return the cells of a recipe on a number of GPUs."""
    recipe, engine = load_recipe(path, ["--cal"], will_train=False), launcher_engine(path)
    uses_bf16 = str(read_yaml(OPTIONS, str(path)).get("bf16", False)).lower() == "true"

    def of_text(num_text: int) -> tuple[int, Estimate]:
        labels = num_text * 2 // 3
        lengths = RowLengths([model.image_tokens], [num_text], [labels], [model.num_tiles], 0)
        setting = setting_of(recipe, engine, num_gpus, uses_bf16, lengths)
        return setting.length, estimate(model.config(), recipe.model, setting)

    longest = max(recipe.data.model_max_length - model.image_tokens, TYPICAL_TEXT)
    (typical_length, typical), (max_length, worst) = of_text(TYPICAL_TEXT), of_text(longest)
    flops = dict(typical.flops)
    if model.family == "mgm":
        flops["vision_tower"] /= model.num_tiles  # its tower is counted with all tiles of an image
    total = sum(flops.values())
    return [
        f"{path.parent.name}/{path.stem}", engine, str(num_gpus), str(_rows(recipe)), str(typical_length),
        f"{typical.memory.total / GIB:.1f}", str(max_length), f"{worst.memory.total / GIB:.1f}",
        f"{total / 1e12:.0f}", f"{total / (total - flops['cal']):.2f}",
    ]  # fmt: skip


def _rows(recipe: Recipe) -> int:
    return recipe.training.per_device_train_batch_size


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return caption and table."""
    lines = [HEADER, ["---"] * 2 + ["---:"] * (len(HEADER) - 2), *rows]
    return "\n".join([CAPTION, "", *("| " + " | ".join(row) + " |" for row in lines), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two recipes, seconds: shows that the script works")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32], help="numbers of GPUs (default 8 32)")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    folders = ("llava15_7b", "llava_next_7b") if options.small else tuple(models())
    pattern = "finetune.yaml" if options.small else "*.yaml"
    paths = [path for folder in folders for path in sorted((ROOT / "recipes" / folder).glob(pattern))]
    text = markdown([table_row(path, models()[path.parent.name], n) for path in paths for n in options.gpus])
    print(text)
    if options.out is not None:
        options.out.write_text(f"# recipe_table\n\n`python benchmarks/recipe_table.py`\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
