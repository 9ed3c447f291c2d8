import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from cal_train.data.dataset import VlmDataset
from cal_train.data.sources import Source
from cal_train.models.lora import merge
from cal_train.testing import write_tiny_vlm
from cal_train.train.trainer import VlmTrainer

LORA = (
    "--lora_enable", "--lora_r", "4", "--lora_alpha", "8", "--optim", "adamw_torch", "--learning_rate", "1e-2",
)  # fmt: skip


QLORA = ("--lora_enable", "--quantization")
BNB_CLASSES = {"nf4": Linear4bit, "int8": Linear8bitLt}


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


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A model wide enough for every layout of 4-bit weights."""
    return write_tiny_vlm(tmp_path_factory.mktemp("wide"), hidden_size=64)


@pytest.mark.parametrize(
    ("dropout", "projector", "more"),
    [
        ("0", "true", ()),
        ("0.1", "true", ()),
        ("0.1", "false", ()),
        ("0.1", "true", ("--use_dora",)),
        ("0.1", "true", ("--quantization", "nf4")),
        ("0.1", "true", ("--quantization", "int8")),
    ],
)
def test_resuming_a_lora_run_continues_bit_for_bit(tiny_run, tmp_path, dropout, projector, more):
    options = (
        *LORA, *more, "--cal", "--lora_dropout", dropout, "--tune_projector", projector,
        "--lr_scheduler_type", "cosine",
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


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_run_with_cal_learns_and_only_the_decoder_is_quantised(tiny_run, trained_models, wide, kind):
    """Over the whole set in each step, so that the losses compare."""
    options = (
        "--model_name_or_path", str(wide), *QLORA, kind, "--lora_r", "4", "--lora_alpha", "8", "--optim", "adamw_torch",
        "--learning_rate", "3e-3", "--cal", "--max_steps", "12", "--per_device_train_batch_size", "24",
    )  # fmt: skip
    folder = tiny_run(*options)
    losses = [line["loss"] for line in log_of(folder)]
    assert losses[-1] < 0.9 * losses[0]
    vlm = trained_models[-1].get_base_model()
    for name, module in vlm.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_layer = "language_model.layers" in name and "lora_" not in name
            assert isinstance(module, BNB_CLASSES[kind]) == is_layer, name
    moved = adapter_of(folder)
    assert all(weight.abs().max() > 0 for name, weight in moved.items() if "lora_B" in name)  # they start at zero


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("int8", 0.05)])
def test_a_quantised_run_merged_into_its_own_base_computes_what_was_trained(
    tiny_run, tmp_path, trained_models, wide, kind, tolerance
):
    options = ("--model_name_or_path", str(wide), *QLORA, kind, "--lora_r", "4", "--optim", "adamw_torch", "--cal")
    adapter = tiny_run(*options)
    batch = first_row(tiny_run.root)
    expected = logits_of(trained_models[-1], batch)
    merged = AutoModelForImageTextToText.from_pretrained(merge(adapter, tmp_path / "merged", quantized_base=True))
    scale = expected.abs().max()
    assert (logits_of(merged, batch) - expected).abs().max() <= tolerance * scale
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    full = AutoModelForImageTextToText.from_pretrained(merge(adapter, tmp_path / "full"))
    assert (logits_of(full, batch) - expected).abs().max() > 1e-3 * scale


def test_a_checkpoint_that_lacks_a_weight_of_the_adapter_is_not_resumed(tiny_run, tmp_path):
    steps = ("--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(tmp_path / "run"))
    file = tiny_run(*LORA, *steps) / "checkpoint-1" / "adapter_model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "lora_A" in name)
    save_file({name: weight for name, weight in weights.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        tiny_run(*LORA, *steps, "--resume_from_checkpoint", str(file.parent))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantization", "nf4"), "without lora_enable"),
        (("--use_dora",), "add lora_enable"),
        (("--lora_enable", "--quantization", "fp3"), "quantization"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tiny_run, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(*options)


@pytest.mark.parametrize("more", [(), ("--use_dora",), ("--quantization", "nf4")])
def test_deltas_of_a_lora_run_are_those_without_dropout(tiny_run, monkeypatch, more):
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
    tiny_run(*LORA, *more, "--cal", "--cal_ablation", "mask", "--lora_dropout", "0.5", "--max_steps", "3")
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
