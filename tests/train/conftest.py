import pytest
import torch
from safetensors.torch import load_file, save_file

from cal_train.testing import write_tiny_data, write_tiny_vlm


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A recipe on a tiny VLM with clamp limits that its deltas reach: ``tiny_run(*options) -> folder of the run``."""
    root = tmp_path_factory.mktemp("tiny")
    write_tiny_vlm(root / "vlm")
    weights = load_file(root / "vlm" / "model.safetensors")
    weights["language_model.lm_head.weight"] *= 8
    weights["multi_modal_projector.linear_2.weight"] *= 4
    save_file(weights, root / "vlm" / "model.safetensors", metadata={"format": "pt"})
    write_tiny_data(root / "data", num_rows=24)
    recipe = root / "recipe.yaml"
    recipe.write_text(
        f"""
model_name_or_path: {root / "vlm"}
data_path: {root / "data" / "data.json"}
image_folder: {root / "data" / "images"}
output_dir: {root / "unnamed"}
template: chat
max_steps: 2
per_device_train_batch_size: 4
learning_rate: 1e-2
lr_scheduler_type: constant
optim: sgd
logging_steps: 1
save_strategy: "no"
report_to: none
dataloader_num_workers: 0
disable_tqdm: true
use_cpu: true
cal_low: 0.1
cal_high: 1
"""
    )
    counter = iter(range(10**6))

    def run(*options):
        from cal_train.cli.recipe import load_recipe
        from cal_train.train.run import train

        torch.manual_seed(next(counter))  # nothing may depend on what ran before
        if "--output_dir" not in options:
            options = (*options, "--output_dir", str(root / f"run-{next(counter)}"))
        return train(load_recipe(recipe, options))

    run.root, run.recipe = root, recipe
    return run


@pytest.fixture
def trained_models(monkeypatch):
    """The models of the runs of this test, as they are in memory when they are saved."""
    from cal_train.train.trainer import VlmTrainer

    models = []

    class Recorded(VlmTrainer):
        def save_model(self, *args, **kwargs):
            models.append(self.model)
            super().save_model(*args, **kwargs)

    monkeypatch.setattr("cal_train.train.run.VlmTrainer", Recorded)
    return models


@pytest.fixture(scope="session")
def weights_of():
    return lambda folder: load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def max_difference(weights_of):
    """Largest difference between the weights of two runs; both must have moved from their start."""

    def compare(first, second):
        a, b = weights_of(first), weights_of(second)
        assert a.keys() == b.keys()
        return max((a[name] - b[name]).abs().max().item() for name in a)

    return compare
