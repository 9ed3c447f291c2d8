"""The processor of a run: tokenizer, image processor and the chat template that trains."""

from pathlib import Path
from typing import Literal

from transformers import AutoProcessor, ProcessorMixin

from cal_train.data.conversation import resolve_template
from cal_train.data.images import apply_aspect_ratio
from cal_train.folders import from_folder


def load_processor(
    folder: str | Path, template: str = "chat", image_aspect_ratio: Literal["pad", "square", "anyres"] | None = None
) -> ProcessorMixin:
    """Return a model folder's processor with the chat template and aspect ratio of a run, to be saved with its result.

    Images go through the PIL backend: it resizes as the original code does, and equally on every machine.

    Args:
        folder: A model folder in Hugging Face layout.
        template: A template's name, see `resolve_template`.
        image_aspect_ratio: How images become square; None keeps what the folder says.

    Raises:
        ValueError: If the folder is not a model folder, if the template does not fit the tokenizer, or if the image
            processor cannot pad.
    """
    _require_vlm(Path(folder))
    processor = from_folder(AutoProcessor, folder, backend="pil")
    if not isinstance(processor, ProcessorMixin):  # what transformers returns for a folder without a processor
        raise ValueError(
            f"{folder} holds no processor of a vision-language model, only a {type(processor).__name__}: put a model "
            "together with `cal-train compose`, or bring an original checkpoint with `cal-train convert`"
        )
    try:
        processor.chat_template = resolve_template(template, processor)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    processor.tokenizer.padding_side = "left"  # for generation; training batches are padded by the collator
    apply_aspect_ratio(processor, image_aspect_ratio)
    return processor


def _require_vlm(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is a LoRA adapter: fold it into its model first, cal-train merge --adapter {folder} --output "
            f"{folder}-merged"
        )
    # transformers would take the name for one on the hub
    raise ValueError(f"model folder {folder} does not exist or has no config.json: check the path")
