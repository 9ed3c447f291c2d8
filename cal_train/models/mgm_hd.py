"""MGM-HD from a stage 1 of MGM: the same weights, told to look at tiles of a larger image.

Source: Li et al. 2024, arXiv:2403.18814: the HD models have no stage 1 of their own.
"""

import shutil
from pathlib import Path

from transformers import AutoProcessor

from cal_train.models.mgm.configuration import MGMConfig
from cal_train.models.mgm_family import build_processor

_GRID = 2


def write_hd_start(source: str | Path, output: str | Path) -> Path:
    """Write a model folder of MGM-HD that holds the weights of an MGM folder, and return it.

    The image is twice as large for both towers; the first one sees it as 2 x 2 tiles and once as a whole. No weight
    depends on that, so their files are copied unread.

    Args:
        source: Output folder of MGM's stage 1.
        output: Folder to write; it must not exist.

    Raises:
        ValueError: If ``source`` is not an MGM model that sees one tile and holds its weights, or ``output`` exists.
    """
    source, output = Path(source), Path(output)
    weights = sorted(source.glob("*.safetensors"))
    if not weights or not (source / "config.json").is_file():
        raise ValueError(f"{source} holds no model: give the output folder of MGM's stage 1")
    if output.exists():
        raise ValueError(f"{output} exists: remove it, or name another folder")
    fields, _ = MGMConfig.get_config_dict(source)
    if fields.get("model_type") != MGMConfig.model_type:
        raise ValueError(f"{source} is of type {fields.get('model_type')!r}: MGM-HD starts from mgm")
    config = MGMConfig.from_dict(fields)
    if config.image_grid != 1:
        raise ValueError(f"{source} has image_grid {config.image_grid} already: train it as it is")
    larger = {"image_grid": _GRID, "image_global": True, "high_res_size": _GRID * config.high_res_size}
    config = MGMConfig.from_dict(fields | larger)
    processor = AutoProcessor.from_pretrained(source, backend="pil")
    output.mkdir(parents=True)
    config.save_pretrained(output)
    build_processor(config, processor.image_processor, processor.tokenizer, processor.chat_template).save_pretrained(
        output
    )
    for file in [*weights, *source.glob("*.safetensors.index.json"), *source.glob("generation_config.json")]:
        shutil.copyfile(file, output / file.name)
    return output
