import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from cal_train.data.dataset import VlmDataset
from cal_train.data.sources import Source
from cal_train.models.lora import merge
from cal_train.train.trainer import VlmTrainer

LORA = (
    "--lora_enable", "--lora_r", "4", "--lora_alpha", "8", "--optim", "adamw_torch", "--learning_rate", "1e-2",
)  # fmt: skip


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def log_of(folder):
    return [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in line]


def first_row(root):
    """The first row that is trained on, as a batch of one."""
    processor = AutoProcessor.from_pretrained(root / "vlm", backend="pil")
    data = Source(root / "data" / "data.json", root / "data" / "images")
    row = VlmDataset([data], processor, "chat", 2048)[0]
    return {"input_ids": row["input_ids"][None], "pixel_values": row["pixel_values"]}


@torch.no_grad()
def logits_of(model, batch):
    return model.eval()(**batch).logits


@pytest.mark.parametrize(("dropout", "projector"), [("0", "true"), ("0.1", "true"), ("0.1", "false")])
def test_resuming_a_lora_run_continues_bit_for_bit(tiny_run, tmp_path, dropout, projector):
    options = (
        *LORA, "--cal", "--lora_dropout", dropout, "--tune_projector", projector, "--lr_scheduler_type", "cosine",
        "--max_steps", "5", "--save_steps", "3", "--save_strategy", "steps", "--per_device_train_batch_size", "12",
    )  # fmt: skip
    straight = tiny_run(*options, "--output_dir", str(tmp_path / "straight"))
    checkpoint = straight / "checkpoint-3"  # in the middle of the second epoch
    resumed = tiny_run(*options, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", str(checkpoint))
    start, end, again = (adapter_of(folder) for folder in (checkpoint, straight, resumed))
    assert again.keys() == end.keys()
    assert all(torch.equal(again[name], end[name]) for name in end)
    assert [line["loss"] for line in log_of(straight)] == [line["loss"] for line in log_of(resumed)]
    for part, is_trained in (("lora_", True), ("multi_modal_projector", projector == "true")):
        assert any(not torch.equal(start[name], end[name]) for name in end if part in name) == is_trained


def test_the_adapter_folder_holds_the_trained_projector(tiny_run, weights_of):
    adapter = adapter_of(tiny_run(*LORA, "--cal"))
    before = {name: weight for name, weight in weights_of(tiny_run.root / "vlm").items() if "projector" in name}
    assert len(before) == 4
    for name, weight in before.items():
        saved = adapter[f"base_model.model.model.{name}"]
        assert saved.shape == weight.shape
        assert not torch.equal(saved, weight)


def test_a_merged_run_computes_what_the_trained_model_computed_and_stops_like_it(tiny_run, tmp_path, trained_models):
    adapter = tiny_run(*LORA, "--cal", "--lora_dropout", "0.1", "--template", "chatml")
    batch = first_row(tiny_run.root)
    expected = logits_of(trained_models[-1], batch)
    base = AutoModelForImageTextToText.from_pretrained(tiny_run.root / "vlm")
    untrained = logits_of(base, batch)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, adapter), batch), expected)

    folder = merge(adapter, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(folder)
    scale = expected.abs().max()
    assert (expected - untrained).abs().max() > 1e-2 * scale
    assert (logits_of(merged, batch) - expected).abs().max() <= 1e-5 * scale
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert merged.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])


def test_deltas_of_a_lora_run_are_those_without_dropout(tiny_run, monkeypatch):
    """Against plain forward calls in eval mode, inside the run, where the adapters are no longer zero."""
    errors, noise = [], []

    class Compared(VlmTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            batch = {name: value for name, value in inputs.items() if name not in ("labels", "sample_ids")}
            plain = plain_deltas(model.eval(), batch, inputs["labels"])
            dropped = plain_deltas(model.train(), batch, inputs["labels"])
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            errors.append((outputs["delta"] - plain).abs().max().item())
            noise.append((dropped - plain).abs().max().item())
            return (loss, outputs) if return_outputs else loss

    monkeypatch.setattr("cal_train.train.run.VlmTrainer", Compared)
    tiny_run(*LORA, "--cal", "--cal_ablation", "mask", "--lora_dropout", "0.5", "--max_steps", "3")
    assert len(errors) == 3
    assert max(errors) < 1e-4
    assert min(noise[1:]) > 1e-2


@torch.no_grad()
def plain_deltas(model, batch, labels):
    """Logits of the labels with the image, minus those with its keys masked, in reading order."""
    is_image = batch["input_ids"] == model.config.image_token_id
    masks = (batch["attention_mask"], batch["attention_mask"] * ~is_image)
    with_image, without = (model(**(batch | {"attention_mask": mask})).logits[:, :-1] for mask in masks)
    is_label = labels[:, 1:] != -100
    ids = labels[:, 1:][is_label][:, None]
    return with_image[is_label].gather(1, ids)[:, 0] - without[is_label].gather(1, ids)[:, 0]
