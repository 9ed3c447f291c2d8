"""What holds for every family. The oracle is the family's plain transformers class, called with whole batches."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from cal_train.cal.strategies import resolve_weighting
from cal_train.data.images import image_inputs
from cal_train.models.head import find_head
from cal_train.models.lora import add_lora, merge, save_newline
from cal_train.models.mgm_family import TINY, TINY_HD
from cal_train.models.parts import freeze
from cal_train.testing import tiny_vlm
from cal_train.train.step import StepOptions, attach_step, run_step

PAD, BOS, IMG = 0, 1, 4
NO_DROP_PATH = {"aux_drop_path": 0.0}
FAMILIES = {
    "llava": ("llava", {}),
    "llava_next": ("llava_next", {}),
    "mgm": ("mgm", TINY | NO_DROP_PATH),
    "mgm_hd": ("mgm", TINY_HD | NO_DROP_PATH),
}
SIZES = [(60, 90), (25, 100), (110, 40), (56, 56), (30, 30), (84, 200)]  # height, width of the images, in turn

# pieces: 't5' 5 prompt tokens, 'l3' 3 label tokens, 'i' an image
MIXED = ("t3 i t4 l6", "i t2 l3 t3 l4 t1", "t4 l5", "t2 i t1 i t3 l2 t9 l7")
KINDS = {"image": ("t2 i t2 l3", "i t3 l2"), "text": ("t4 l5", "t2 l3"), "mixed": MIXED, "multi": ("i t2 i i t1 l4",)}


def build(family, image_size=28):
    """A tiny VLM whose deltas reach both clamp limits, in eval mode, and its processor."""
    model_type, options = FAMILIES[family]
    model, processor = tiny_vlm(model_type, image_size=image_size, family_options=options)
    with torch.no_grad():
        model.lm_head.weight *= 8
        model.model.multi_modal_projector.linear_2.weight *= 4
    return model.eval(), processor


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def built(family):
    model, processor = build(family)
    oracle = copy.deepcopy(model).double()
    attach_step(model)
    return model, oracle, processor


def make_batch(processor, *specs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = np.random.default_rng(seed)
    rows, images = [], []
    for spec in specs:
        ids, labels = [BOS], [-100]
        for piece in spec.split():
            if piece == "i":
                shape = (*SIZES[len(images) % len(SIZES)], 3)
                images.append(Image.fromarray(pixels.integers(0, 256, shape, dtype=np.uint8)))
                new = [IMG] * image_inputs(processor, images[-1:])[1][0]
            else:
                new = torch.randint(20, 390, (int(piece[1:]),), generator=generator).tolist()
            ids += new
            labels += new if piece[0] == "l" else [-100] * len(new)
        rows.append((ids, labels))
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [PAD] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
        **(image_inputs(processor, images)[0] if images else {}),
    }


def plain(batch, dtype=torch.float64):
    """The batch for a plain forward of the oracle."""
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in batch.items()
        if name != "labels"
    }


def options(model, weighting=None):
    return StepOptions(find_head(model), weighting)


def at_labels(logits, labels):
    """Logits (B, S, V) of the label tokens at the positions that predict them, (N,)."""
    mask = labels[:, 1:] != -100
    return logits[:, :-1].gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0][mask]


@pytest.mark.parametrize("ablation", ["remove", "mask"])
def test_logits_and_deltas_equal_the_float64_oracle(built, ablation):
    model, oracle, processor = built
    check_deltas(model, oracle, make_batch(processor, *MIXED), ablation)


@pytest.mark.slow
def test_deltas_are_right_with_thousands_of_image_tokens():
    model, processor = build("llava_next", image_size=336)
    oracle = copy.deepcopy(model).double()
    attach_step(model)
    batch = make_batch(processor, "t3 i t1 i i t4 l6", "t2 l3")
    assert (batch["input_ids"] == IMG).sum() > 2000
    for ablation in ("remove", "mask"):
        check_deltas(model, oracle, batch, ablation)


def check_deltas(model, oracle, batch, ablation):
    out = run_step(model, batch, options(model, resolve_weighting("cal", ablation=ablation)))
    with torch.no_grad():
        inputs = plain(batch)
        with_image = at_labels(oracle(**inputs).logits, batch["labels"])
        inputs["attention_mask"] = inputs["attention_mask"] * (batch["input_ids"] != IMG)
        without_image = at_labels(oracle(**inputs).logits, batch["labels"])
    assert (out["logit_with"] - with_image).abs().max() < 1e-4
    assert (out["logit_without"] - without_image).abs().max() < 1e-4
    delta = with_image - without_image
    assert (out["delta"] - delta).abs().max() < 1e-4
    assert delta.min() < 1 and delta.max() > 1  # the image matters


def gradients(model, batch, weighting=None):
    model.zero_grad(set_to_none=True)
    out = run_step(model, batch, options(model, weighting))
    out["loss_sum"].backward()
    return out["loss_sum"].detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_without_cal_the_loss_is_that_of_the_plain_class(built, kind):
    model, oracle, processor = built
    batch = make_batch(processor, *KINDS[kind])
    loss_sum = run_step(model, batch, options(model))["loss_sum"]
    with torch.no_grad():
        logits = oracle(**plain(batch)).logits[:, :-1]
        expected = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum")
    assert abs(loss_sum - expected) < 1e-4 * expected


def test_eight_rows_at_once_give_the_loss_and_gradients_of_eight_single_rows(family):
    model, processor = build(family)
    attach_step(model)
    freeze(model, "finetune")
    specs = (*MIXED, "t2 i t1 l3", "t5 l2", "i i t2 l4", "t1 i t2 l5")
    weighting = resolve_weighting("cal")
    loss, whole = gradients(model, make_batch(processor, *specs), weighting)
    losses, parts = [], []
    for k in range(len(specs)):
        one = row_of(make_batch(processor, *specs), k, processor, specs)
        single, grads = gradients(model, one, weighting)
        losses.append(single)
        parts.append(grads)
    assert abs(loss - sum(losses)) < 1e-3
    for name, gradient in whole.items():
        total = sum(part[name] for part in parts)
        scale = gradient.abs().max().clamp_min(1e-3)
        assert (gradient - total).abs().max() < 1e-3 * scale, name


def row_of(batch, k, processor, specs):
    """Row ``k`` of a batch with its own images."""
    before = sum(spec.split().count("i") for spec in specs[:k])
    count = specs[k].split().count("i")
    kept = {name: batch[name][k : k + 1] for name in ("input_ids", "attention_mask", "labels")}
    if not count:
        return kept
    if "image_sizes" not in batch:
        images = {n: v[before : before + count] for n, v in batch.items() if n not in kept}
        return kept | images
    tiles = [tiles_of(size, processor) for size in batch["image_sizes"].tolist()]
    start, end = sum(tiles[:before]), sum(tiles[: before + count])
    sizes = batch["image_sizes"][before : before + count]
    return kept | {"pixel_values": batch["pixel_values"][start:end], "image_sizes": sizes}


def tiles_of(size, processor):
    """Tiles of one image, counted in what the processor makes of it."""
    image = Image.new("RGB", size[::-1])
    return processor.image_processor(images=[image], return_tensors="pt")["pixel_values"].shape[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", [False, True])
def test_every_trained_parameter_gets_a_gradient_in_every_kind_of_batch(family, kind, tower):
    model, processor = build(family)
    attach_step(model)
    model.train()
    freeze(model, "finetune", {"vision_tower": tower})
    _, grads = gradients(model, make_batch(processor, *KINDS[kind]), resolve_weighting("cal"))
    assert [name for name, gradient in grads.items() if gradient is None] == []
    assert any("vision_tower" in name for name in grads) == tower
    if family == "llava_next":
        assert (grads["model.image_newline"].abs().max() > 0) == (kind != "text")


def test_pretraining_trains_the_projector_alone(family):
    model, _ = build(family)
    freeze(model, "pretrain")
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"multi_modal_projector"} | ({"patch_info_mining"} if "mgm" in family else set())


def test_generation_with_cache_equals_step_by_step(family):
    model, processor = build(family)
    batch = plain(make_batch(processor, "t3 i t2 i t4"), torch.float32)
    model.generation_config.eos_token_id = None
    generated = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=True)
    ids = batch["input_ids"]
    for _ in range(6):
        inputs = batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            ids = torch.cat([ids, model(**inputs).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


FRESH = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    if "mgm" in folder.rpartition("/")[2]:
        import cal_train
    else:
        assert "cal_train" not in sys.modules
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert AutoProcessor.from_pretrained(folder, backend="pil").chat_template
    with torch.no_grad():
        torch.save(model(**torch.load(folder + "/batch.pt", weights_only=True)).logits, folder + "/logits.pt")
"""


def test_a_fresh_process_computes_the_same_logits_from_the_saved_folder(tmp_path):
    expected = {}
    for name in FAMILIES:
        model, processor = build(name)
        folder = tmp_path / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        batch = plain(make_batch(processor, *MIXED), torch.float32)
        torch.save(batch, folder / "batch.pt")
        with torch.no_grad():
            expected[folder] = model(**batch).logits
    subprocess.run([sys.executable, "-c", FRESH, *map(str, expected)], check=True, cwd=tmp_path)
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt", weights_only=True), logits), folder.name


def test_a_merged_adapter_computes_what_was_trained(family, tmp_path):
    model, processor = build(family)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    batch = plain(make_batch(processor, *MIXED), torch.float32)
    before = model(**batch).logits
    adapted = add_lora(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), r=2, alpha=4, dropout=0.0)
    freeze(adapted, "finetune")
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any(name.endswith("image_newline") for name in trained) == (family == "llava_next")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in trained:
            parameter = adapted.get_parameter(name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected = adapted.eval()(**batch).logits
    adapted.save_pretrained(tmp_path / "adapter")
    save_newline(adapted, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    with torch.no_grad():
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()(**batch).logits
    assert (merged - expected).abs().max() < 1e-3
    assert (merged - before).abs().max() > 0.1
    if family == "llava_next":
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        weights = load_file(file)
        newline = weights.pop("base_model.model.model.image_newline")
        assert torch.equal(newline, dict(adapted.named_parameters())["base_model.model.model.image_newline"])
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="holds no image_newline"):
            merge(tmp_path / "adapter", tmp_path / "lost", tmp_path / "base")
        assert not (tmp_path / "lost").exists()
