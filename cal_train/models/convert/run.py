"""Convert a checkpoint folder: find out what it is, and call what converts it."""

from pathlib import Path
from typing import Literal

from cal_train.folders import check_files
from cal_train.models.convert.from_hf import to_canonical, to_original
from cal_train.models.convert.from_original import Parts, from_original
from cal_train.models.convert.reading import read_json
from cal_train.models.convert.report import Report
from cal_train.models.convert.settings import is_original
from cal_train.models.convert.writing import check_output

Layout = Literal["hf", "original"]


def convert(
    source: Path,
    output: Path,
    to: Layout = "hf",
    base: Path | None = None,
    vision_tower: str | None = None,
    aux_tower: str | None = None,
    template: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    pad_vocabulary_to: int = 1,
) -> Report:
    """Write a checkpoint of LLaVA-1.5, LLaVA-NeXT, CAL or MGM in another layout.

    An original folder may hold a whole model, only ``mm_projector.bin`` (after stage 1), or a LoRA adapter with
    ``non_lora_trainables.bin``. A Hugging Face folder becomes an original one, or, with ``to="hf"``, the same model
    under the names that llava-hf checkpoints have. Every weight of the source is used or reported as left out, every
    weight of the result is accounted for, or nothing is written.

    Peak memory is about one shard of 5 GB, the embedding and the head, and what changes its dtype or has LoRA folded
    in.

    Args:
        source: The folder to convert.
        output: Folder to write; it must not exist or be empty.
        to: ``hf`` or ``original``.
        base: Folder of the language model, for folders that hold the projector or an adapter only.
        vision_tower: Folder of the vision tower, where the checkpoint lacks it; with ``to="original"`` the folder or
            hub name that goes into config.json.
        aux_tower: The same for MGM's second tower: a folder of open_clip or transformers.
        template: Chat template to save. Default: the one of the original repository for that language model.
        dtype: Of the result's weights. ``auto``: that of the embedding.
        pad_vocabulary_to: The vocabulary's rows become a multiple of this.

    Returns:
        What was done with every weight; the folder holds it as ``conversion.json``.

    Raises:
        ValueError: If the folder is not a checkpoint of these, lacks something, holds something unknown, or a file in
            it is unsafe to read.
    """
    source, output = Path(source), Path(output)
    check_output(output)
    for folder in filter(None, (source, base)):
        check_files(Path(folder))
    if is_original(read_json(source / "config.json")):
        if to == "original":
            raise ValueError(f"{source} is in the layout of the original repositories already")
        parts = Parts(base, *(Path(tower) if tower else None for tower in (vision_tower, aux_tower)))
        return from_original(source, output, parts, template, dtype, pad_vocabulary_to)
    if base is not None or template is not None or pad_vocabulary_to != 1:
        raise ValueError(
            f"{source} is in Hugging Face layout: --base, --template and --pad_vocabulary_to are for original folders"
        )
    if to == "original":
        return to_original(source, output, vision_tower, aux_tower, dtype)
    return to_canonical(source, output, dtype)
