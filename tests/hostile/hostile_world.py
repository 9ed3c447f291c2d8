"""What hostile cases start from: a tiny model, its data, and a folder outside of all roots that nothing may read."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cal_train.testing import write_tiny_data, write_tiny_vlm

SECRET = "canary-4711-outside"


@dataclass(frozen=True)
class World:
    """Folders: ``inside`` holds everything a verb may read and write, ``outside`` what it must not."""

    inside: Path
    outside: Path
    model: Path
    data: Path
    secret: str = SECRET

    def folder(self, name: str) -> Path:
        """Return a new folder in ``inside``."""
        path = self.inside / "cases" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def model_copy(self, name: str) -> Path:
        """Return a copy of the model folder that a case may spoil."""
        path = self.folder(name) / "model"
        shutil.copytree(self.model, path)
        return path

    def recipe(self, folder: Path, **options: object) -> Path:
        """Write a recipe that trains one step on one row per batch; return its path."""
        values = {
            "model_name_or_path": str(self.model),
            "data_path": str(self.data),
            "image_folder": str(self.data.parent / "images"),
            "output_dir": str(folder / "run"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_num_workers": 0,
            "disable_tqdm": True,
            "use_cpu": True,
        } | options
        path = folder / "recipe.yaml"
        lines = [f"{name}: {json.dumps(value)}\n" for name, value in values.items() if value is not None]
        path.write_text("".join(lines))
        return path


def build_world(root: Path) -> World:
    """Write the model, the data and the secrets."""
    inside, outside = root / "inside", root / "outside"
    outside.mkdir()
    model, data = write_tiny_vlm(inside / "model"), write_tiny_data(inside / "data", num_rows=4)
    Image.new("RGB", (32, 32), "red").save(outside / "secret.png")
    (outside / "secret.txt").write_text(SECRET)
    for name in ("secret.json", "config.json", "tokenizer.json", "adapter_config.json"):
        (outside / name).write_text(json.dumps({"id": SECRET, "conversations": [], "model_type": SECRET}))
    shutil.copy(model / "model.safetensors", outside / "model.safetensors")
    (outside / "secret.jinja").write_text(SECRET)
    return World(inside, outside, model, data)
