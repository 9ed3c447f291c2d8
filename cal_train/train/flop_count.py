"""The useful operations of micro-batches, for the throughput and the MFU of the log.

MFU (model FLOP utilisation, Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is what forward and backward of the
training pass need by the model's shapes, over what the device could do in the time that has passed. Padding, CAL's
pass without the image, and what checkpointing computes again take time and do not count.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cal_train.conf import VlmTrainingArguments
from cal_train.models.families import base_model
from cal_train.models.flops import FlopRates, Work, count_vision_flops, flop_rates, peak_flops
from cal_train.train.engines import whole_weights
from cal_train.train.targets import layout_of
from cal_train.types import IGNORE_INDEX


class FlopCount:
    """Counts the operations of micro-batches on this rank.

    Attributes:
        peak: Operations per second that this device can do; None if it is not known.
        useful: Operations of the training passes since the last `reset`.
        ablated: Operations of CAL's passes without the image since then.
    """

    def __init__(self, rates: FlopRates, image_token_id: int, peak: float | None):
        self.rates, self.image_token_id, self.peak = rates, image_token_id, peak
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.useful = self.ablated = 0.0

    def add(self, inputs: Mapping[str, Tensor]) -> None:
        """Count a micro-batch."""
        flops = self.rates.count(work_of(inputs, self.image_token_id))
        self.ablated += flops.pop("cal")
        self.useful += sum(flops.values())


def flop_count(model: nn.Module, ablation: Literal["remove", "mask"] | None, args: VlmTrainingArguments) -> FlopCount:
    """Return a counter for a model that is frozen as it is trained.

    Args:
        model: The VLM or its peft wrapper; its weights are not read.
        ablation: How CAL takes the image away; None where no such pass is run.
        args: Device, and its peak where that is given.
    """
    vlm = base_model(model)
    with whole_weights():
        vision = _vision_flops(vlm.config)
    peak = None if args.device_peak_tflops is None else args.device_peak_tflops * 1e12
    if peak is None and args.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(args.device))
    return FlopCount(flop_rates(model, vision, ablation), cast(Any, vlm.config).image_token_id, peak)


def work_of(inputs: Mapping[str, Tensor], image_token_id: int) -> Work:
    """Return the lengths and counts of a batch of `cal_train.data.collate`, without its padding."""
    layout = layout_of(inputs)
    is_token_BS, is_image_BS = inputs["attention_mask"].bool(), inputs["input_ids"] == image_token_id
    if layout.segment_ids is None:
        lengths_P, images_P = is_token_BS.sum(1), is_image_BS.sum(1)
    else:
        num_samples = layout.grid()[0] + 1
        segment_ids_BS = layout.segment_ids
        lengths_P = torch.bincount(segment_ids_BS.flatten(), minlength=num_samples)[1:]
        images_P = torch.bincount(segment_ids_BS[is_image_BS], minlength=num_samples)[1:]
    samples = sorted(zip(lengths_P.tolist(), images_P.tolist(), strict=True), key=lambda sample: sample[1] == 0)
    pixels = inputs.get("pixel_values")
    return Work(
        [length for length, _ in samples],
        [length - images for length, images in samples if images],
        0 if pixels is None else len(pixels),
        int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum()),
    )


_counted: dict[str, float] = {}


def _vision_flops(config: PreTrainedConfig) -> float:
    key = config.to_json_string(use_diff=False)
    if key not in _counted:
        _counted[key] = count_vision_flops(config)
    return _counted[key]
