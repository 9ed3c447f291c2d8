"""Features of a frozen vision tower, kept on disk across epochs and runs.

A frozen tower gives the same features for an image every time, so they are computed once. The folder holds one
sub-folder per tower and image processing (a fingerprint of weights and settings), in it safetensors shards with an
index each; a shard counts only once its index is in place.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.distributed.fsdp import is_fsdp_enabled

from cal_train.data.dataset import VlmDataset
from cal_train.data.images import ImageLimits, open_image
from cal_train.data.workers import loader_context
from cal_train.models.families import family_of

logger = logging.getLogger(__name__)

SHARD_IMAGES = 1024


class FeatureCache:
    """Callable ``cache(image) -> features (P, width of the tower)``; None for an image that was never cached.

    Raises:
        ValueError: If the family's features cannot be cached, the tower is trainable, or a rank does not have it whole.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, processor: ProcessorMixin):
        family = family_of(model)
        if not family.CACHES_FEATURES:
            raise ValueError(
                f"vision_feature_cache does not work with model_type {model.config.model_type!r}, whose images differ "
                "in what the tower sees of them: unset it"
            )
        if any(p.requires_grad for p in family.tower_parameters(model)):
            raise ValueError("vision_feature_cache needs a frozen vision tower: unset tune_vision_tower or the cache")
        if any(hasattr(p, "ds_id") for p in family.tower_parameters(model)):
            raise ValueError(
                "vision_feature_cache does not work with ZeRO-3, which splits the tower: take zero2 or unset it"
            )
        if is_fsdp_enabled():  # with FSDP_CPU_RAM_EFFICIENT_LOADING only: other ranks have a tower without its weights
            raise ValueError(
                "vision_feature_cache does not work with fsdp_cpu_ram_efficient_loading, by which one rank alone "
                "has weights at first: set that to false in the launcher's file or unset the cache"
            )
        self.model, self.processor = model, processor
        self.folder = Path(folder) / fingerprint(model, processor)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index: dict[str, tuple[str, int]] = {}
        self._open_shards: dict[str, safe_open] = {}
        self._read_index()

    def __call__(self, image: Path | bytes) -> Tensor | None:
        """Return the features of one image."""
        place = self._index.get(image_key(image))
        if place is None:
            return None
        shard, row = place
        if shard not in self._open_shards:
            self._open_shards[shard] = safe_open(self.folder / shard, framework="pt")
        return self._open_shards[shard].get_slice("features")[row]

    def __getstate__(self) -> dict:
        """Leave model and open files behind when a worker process gets a copy."""
        return self.__dict__ | {"model": None, "_open_shards": {}}

    @torch.no_grad()
    def fill(
        self,
        dataset: VlmDataset,
        device: torch.device,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        show_progress: bool = True,
    ) -> None:
        """Compute what is missing for the images of a data set; ranks share the work.

        Images that cannot be opened are left out here and reported where the row is read.
        """
        images = {image_key(image): image for image in dataset.iter_images()}
        # shared out before looking at what is missing, which other ranks are changing at this moment
        share = list(images.items())[rank::world_size]
        missing = [image for key, image in share if key not in self._index]
        if missing:
            logger.info("computing vision features of %d images into %s", len(missing), self.folder)
            self._compute(missing, dataset.limits, device, num_workers, show_progress)
        if world_size > 1:
            torch.distributed.barrier()
        self._read_index()

    def _compute(
        self,
        images: list[Path | bytes],
        limits: ImageLimits,
        device: torch.device,
        num_workers: int,
        show_progress: bool,
    ) -> None:
        tower_was_training = self.model.training
        cast(nn.Module, self.model.eval()).to(device)  # transformers' own `to` is annotated without its arguments
        loader = DataLoader(
            _Pixels(images, self.processor, limits), batch_size=16, num_workers=num_workers,
            collate_fn=_stack_readable, multiprocessing_context=loader_context(num_workers),
        )  # fmt: skip
        keys: list[str] = []
        parts: list[Tensor] = []
        progress = tqdm(total=len(images), desc="vision features", unit="image", disable=not show_progress)
        for num_seen, batch_keys, pixel_values in loader:
            if batch_keys:
                inputs = {"pixel_values": pixel_values.to(device)}
                parts.append(family_of(self.model).vision_features(self.model, inputs).cpu())
                keys += batch_keys
            if len(keys) >= SHARD_IMAGES:
                self._write_shard(keys, torch.cat(parts))
                keys, parts = [], []
            progress.update(num_seen)
        if keys:
            self._write_shard(keys, torch.cat(parts))
        progress.close()
        self.model.train(tower_was_training)

    def _write_shard(self, keys: list[str], features: Tensor) -> None:
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        save_file({"features": features.contiguous()}, self.folder / f"{name}.safetensors")
        index = self.folder / f"{name}.json"
        index.with_suffix(".tmp").write_text(json.dumps(keys))
        index.with_suffix(".tmp").replace(index)

    def _read_index(self) -> None:
        for path in sorted(self.folder.glob("*.json")):
            shard = path.with_suffix(".safetensors").name
            self._index.update({key: (shard, row) for row, key in enumerate(json.loads(path.read_text()))})


def fingerprint(model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """Return a short hash of everything that the features depend on: tower weights, layer, image processing, dtype."""
    digest = hashlib.sha256()
    config = model.config
    settings = (
        config.vision_config.to_dict(), config.vision_feature_layer, config.vision_feature_select_strategy,
        processor.image_processor.to_dict(), str(model.dtype),
    )  # fmt: skip
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for parameter in family_of(model).tower_parameters(model):
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def image_key(image: Path | bytes) -> str:
    """Return the identity of an image: path, size and modification time of a file, or the hash of its bytes."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    stat = image.stat()
    return f"{image}:{stat.st_size}:{stat.st_mtime_ns}"


class _Pixels(Dataset):
    def __init__(self, images: list[Path | bytes], processor: ProcessorMixin, limits: ImageLimits):
        self.images, self.processor, self.limits = images, processor, limits

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Tensor] | None:
        image = self.images[index]
        try:
            opened = open_image(image, self.limits)
        except ValueError:
            return None
        return image_key(image), self.processor.image_processor(images=opened, return_tensors="pt")["pixel_values"][0]


def _stack_readable(items: list[tuple[str, Tensor] | None]) -> tuple[int, list[str], Tensor | None]:
    readable = [item for item in items if item is not None]
    pixels = torch.stack([pixels for _, pixels in readable]) if readable else None
    return len(items), [key for key, _ in readable], pixels
