"""The lower layers of a DINOv2 tower as a tower of their own: cheaper to train, and richer than the last layer.

The demo's tower was tuned to find salient regions, and what its upper layers know of things has faded: drawings of one
concept in two styles find each other best from the features of the middle layers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model

from cal_train.towers.export import square_image_processor
from cal_train.towers.loading import at_image_size, load_tower

BATCH_SIZE = 32


@torch.no_grad()
def cut_tower(source: Path, folder: Path, num_layers: int, image_size: int, images: Sequence[Path]) -> None:
    """Write the first layers of a DINOv2 tower, with positions for ``image_size`` and a last norm fitted to images.

    The norm behind the last layer was trained for another layer. It is set so that each channel has mean 0 and
    deviation 1 over the class tokens and patches of the images, both kinds weighing the same.

    Args:
        source: Folder of the whole tower with its image processor.
        folder: To write.
        num_layers: How many layers are kept.
        image_size: Side in pixels.
        images: Pictures like those that the tower will see.
    """
    own = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    processor = square_image_processor(image_size, tuple(own.image_mean), tuple(own.image_std))
    tower = _lower_layers(at_image_size(load_tower(source), image_size), num_layers)
    norm: Any = tower.layernorm
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    tokens_IND = torch.cat([tower(pixels).last_hidden_state for pixels in _batches(images, processor)])
    kinds = [tokens_IND[:, 0], tokens_IND[:, 1:].flatten(0, 1)]
    mean_D = torch.stack([kind.mean(0) for kind in kinds]).mean(0)
    deviation_D = torch.stack([(kind - mean_D).square().mean(0) for kind in kinds]).mean(0).sqrt().clamp(min=1e-6)
    norm.weight.copy_(1 / deviation_D)
    norm.bias.copy_(-mean_D / deviation_D)
    tower.save_pretrained(folder)
    processor.save_pretrained(folder)


def _lower_layers(tower: Any, num_layers: int) -> Dinov2Model:
    named_by_layer = {"out_features", "out_indices", "stage_names", "num_hidden_layers"}
    fields = {name: value for name, value in tower.config.to_dict().items() if name not in named_by_layer}
    config: Any = Dinov2Config.from_dict({**fields, "num_hidden_layers": num_layers})
    cut = Dinov2Model(config).eval()
    kept = cut.state_dict().keys()
    cut.load_state_dict({name: value for name, value in tower.state_dict().items() if name in kept})
    return cut


def _batches(images: Sequence[Path], processor: Any) -> Iterator[Tensor]:
    for start in range(0, len(images), BATCH_SIZE):
        opened = [Image.open(path).convert("RGB") for path in images[start : start + BATCH_SIZE]]
        yield processor(images=opened, return_tensors="pt")["pixel_values"]
