"""Packed rows against the same samples in padded rows, which `test_step` holds against stock transformers."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AttentionInterface, LlamaConfig, MistralConfig, Qwen2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cal_train.cal.ablation import remove_images
from cal_train.cal.strategies import STRATEGIES, TokenWeighting, resolve_weighting
from cal_train.data.collate import Collator
from cal_train.data.images import image_inputs
from cal_train.data.packing import pack_text
from cal_train.models.head import find_head
from cal_train.models.mgm_family import TINY
from cal_train.testing import tiny_llava, tiny_tokenizer, tiny_vlm
from cal_train.train.attention import check_packing, varlen_arguments
from cal_train.train.step import StepOptions, attach_step, run_step

PAD, BOS, IMG = 0, 1, 4
MIXED = ("t3 i t4 l6", "t4 l5", "i t2 l3 t3 l4 t1", "t2 i t1 i t3 l2 t9 l7", "t2 l3", "t30 i t9 l12")
WEIGHTINGS = {
    "off": None,
    "remove": TokenWeighting(),
    "mask": resolve_weighting("cal", ablation="mask"),
    "remove, micro_batch": resolve_weighting("cal", normalizer="micro_batch"),
    "reference": STRATEGIES["cal_reference"],
    "reference, sample": resolve_weighting("cal_reference", normalizer="sample"),
    "reference, remove": resolve_weighting("cal_reference", ablation="remove"),
    "random": STRATEGIES["random"],
}
REPORT = ("delta", "weight", "logit_with", "logit_without")


def build(dtype=torch.float64, attention="sdpa", **options):
    model = tiny_llava(tiny_tokenizer(), attn_implementation=attention, **options)
    with torch.no_grad():  # deltas reach both clamp limits
        model.lm_head.weight *= 8
        model.model.multi_modal_projector.linear_2.weight *= 4
    model = model.to(dtype)
    attach_step(model)
    return model


def example(spec, name, generator, dtype=torch.float64):
    """``spec``: pieces of 't5' (5 prompt tokens), 'l3' (3 label tokens), 'i' (an image of 4 tokens), after a BOS."""
    ids, labels = [BOS], [-100]
    for piece in spec.split():
        count = 4 if piece == "i" else int(piece[1:])
        new = [IMG] * 4 if piece == "i" else torch.randint(20, 390, (count,), generator=generator).tolist()
        ids += new
        labels += new if piece[0] == "l" else [-100] * count
    made = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "num_cut": 0, "sample_id": name}
    if "i" in spec:
        made["pixel_values"] = torch.randn(spec.count("i"), 3, 28, 28, generator=generator, dtype=dtype)
    return made


def examples_of(*specs, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [example(spec, f"row-{i}", generator, dtype) for i, spec in enumerate(specs)]


def inputs_of(batch):
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def step_and_gradients(model, batch, weighting):
    torch.manual_seed(7)  # of the random control
    model.zero_grad()
    out = model(step=StepOptions(find_head(model), weighting), **inputs_of(batch))
    loss = out["loss_sum"]
    if weighting is not None and weighting.normalizer == "micro_batch":
        loss = loss / out["weight_sum"]
    loss.backward()
    return out, loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(model, padded, packed, weighting, tolerance):
    expected, loss, gradients = step_and_gradients(model, padded, weighting)
    out, packed_loss, packed_gradients = step_and_gradients(model, packed, weighting)
    assert packed_loss == pytest.approx(loss, rel=tolerance)
    assert out["weight_sum"].item() == pytest.approx(expected["weight_sum"].item(), rel=tolerance)
    assert out.keys() == expected.keys()
    for name in set(REPORT) & out.keys():
        assert (out[name] - expected[name]).abs().max() <= tolerance * 100, name  # logits of up to 100, in float32
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = (packed_gradients[name] - gradient).abs().max()
        assert difference <= tolerance * max(gradient.abs().max(), 1), name
    return expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_packed_rows_have_the_loss_deltas_weights_and_gradients_of_padded_rows(name, attention):
    model, examples = build(attention=attention), examples_of(*MIXED)
    padded, packed = Collator(PAD)(examples), Collator(PAD, 64)(examples)
    assert len(padded["input_ids"]) == 6 and len(packed["input_ids"]) == 3
    out = assert_equal_steps(model, padded, packed, WEIGHTINGS[name], tolerance=1e-9)
    if "delta" in out:
        assert out["delta"].min() < 1 < 5 < out["delta"].max()


@pytest.mark.parametrize("name", ["off", "remove", "mask", "reference"])
@pytest.mark.parametrize("pack_tokens", [16, 40, 1000])
def test_in_float32_whatever_the_size_of_a_pack(name, pack_tokens):
    model, examples = build(torch.float32), examples_of(*MIXED, dtype=torch.float32)
    packed = Collator(PAD, pack_tokens)(examples)
    assert len(packed["input_ids"]) == {16: 5, 40: 4, 1000: 1}[pack_tokens]
    assert_equal_steps(model, Collator(PAD)(examples), packed, WEIGHTINGS[name], tolerance=1e-5)


def test_the_loss_of_a_pack_is_that_of_stock_transformers_sample_by_sample():
    model, examples = build(), examples_of(*MIXED)
    stock = copy.deepcopy(tiny_llava(tiny_tokenizer())).double()
    stock.load_state_dict(model.state_dict())
    expected = 0.0
    for one in examples:
        pixels = one.get("pixel_values")
        logits = stock(input_ids=one["input_ids"][None], pixel_values=pixels).logits[0, :-1]
        expected += F.cross_entropy(logits, one["labels"][1:], reduction="sum").item()
    packed = Collator(PAD, 1000)(examples)
    assert packed["input_ids"].shape[0] == 1
    out = run_step(model, inputs_of(packed), StepOptions(find_head(model)))
    assert out["loss_sum"].item() == pytest.approx(expected, rel=1e-6)


def test_samples_that_fill_a_pack_each_make_exactly_the_padded_batch():
    examples = examples_of(*MIXED)
    padded = Collator(PAD)(examples[:4])
    packed = Collator(PAD, 19)(examples[:4])
    assert packed.keys() == padded.keys()
    for name, value in inputs_of(padded).items():
        assert torch.equal(packed[name], value), name


def test_a_sample_in_a_pack_knows_nothing_of_its_neighbours():
    model, examples = build(), examples_of(*MIXED)
    others = [examples[0], *(example(spec, "other", torch.Generator().manual_seed(5)) for spec in MIXED[1:])]
    deltas = []
    for rows in (examples, others):
        batch = Collator(PAD, 1000)(rows)
        deltas.append(run_step(model, inputs_of(batch), StepOptions(find_head(model), TokenWeighting()))["delta"])
    assert torch.equal(deltas[0][:6], deltas[1][:6])
    assert not torch.allclose(deltas[0][6:], deltas[1][6:], atol=1e-2)


@pytest.mark.parametrize("name", ["remove", "mask", "reference"])
def test_text_only_samples_in_a_pack_have_delta_exactly_zero(name):
    model = build()
    batch = Collator(PAD, 1000)(examples_of("t4 l5", "t3 i t4 l6", "t2 l3"))
    assert len(batch["input_ids"]) == 1
    out = run_step(model, inputs_of(batch), StepOptions(find_head(model), WEIGHTINGS[name]))
    assert out["delta"][[0, 1, 2, 3, 4, 11, 12, 13]].abs().max() == 0
    assert out["delta"][5:11].abs().min() > 0


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_packed_batch_without_images_runs_and_weighs_everything_equally(is_sharded):
    model = build()
    batch = Collator(PAD, 1000)(examples_of("t4 l5", "t2 l3"))
    out = run_step(model, inputs_of(batch), StepOptions(find_head(model), TokenWeighting(), is_sharded=is_sharded))
    plain = run_step(model, inputs_of(batch), StepOptions(find_head(model)))
    assert out["delta"].abs().max() == 0
    assert out["loss_sum"].item() == pytest.approx(plain["loss_sum"].item(), rel=1e-9)


def test_the_pass_without_images_packs_only_text_of_samples_with_images():
    examples = examples_of("t4 l5", "t3 i t4 l6", "i l2", "t2 i l3")
    batch = pack_text(examples, [[0, 1], [2, 3]], PAD)
    mask = batch["attention_mask"] * (batch["segment_ids"] != 1)
    image = batch["input_ids"] == IMG
    embeds = torch.arange(image.numel()).reshape(*image.shape, 1).float()
    text = remove_images(embeds, mask, image, batch["position_ids"], batch["segment_ids"])
    assert text.segment_ids.tolist() == [[2] * 14, [3] * 3 + [4] * 6 + [0] * 5]
    assert text.position_ids[1].tolist() == [0, 5, 6, 0, 1, 2, 7, 8, 9, 0, 0, 0, 0, 0]
    assert text.last_kept[0].tolist()[:10] == [-1] * 10
    assert text.last_kept[1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 6, 7, 8] + [-1] * 11


def test_a_sample_that_begins_with_its_image_is_not_predicted_from_its_neighbour():
    model = build()
    examples = examples_of("i t3 l5", "i l5")
    examples[1] = {name: v[1:] if name in ("input_ids", "labels") else v for name, v in examples[1].items()}
    batch = Collator(PAD, 1000)(examples)
    assert_equal_steps(model, Collator(PAD)(examples), batch, WEIGHTINGS["remove"], 1e-9)
    out = run_step(model, inputs_of(batch), StepOptions(find_head(model), TokenWeighting()))
    assert out["delta"][5] == 0 and out["delta"][6:].abs().min() > 0


def test_dropout_and_activation_checkpointing_work_on_packs():
    examples = examples_of(*MIXED)
    batch = Collator(PAD, 64)(examples)
    straight = step_and_gradients(build().train(), batch, TokenWeighting())
    model = build().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = step_and_gradients(model, batch, TokenWeighting())
    assert again[1] == straight[1]
    assert all(torch.equal(again[2][name], gradient) for name, gradient in straight[2].items())
    dropping = build(attention_dropout=0.5).train()
    first, second = (step_and_gradients(dropping, batch, TokenWeighting())[0]["delta"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first, straight[0]["delta"], atol=1e-4)


@pytest.mark.parametrize(("family", "options"), [("llava_next", {}), ("mgm", TINY | {"aux_drop_path": 0.0})])
def test_images_of_every_family_reach_their_own_placeholders(family, options):
    model, processor = tiny_vlm(family, family_options=options)
    attach_step(model.eval())
    generator, pixels = torch.Generator().manual_seed(0), np.random.default_rng(0)
    examples = []
    for i, sizes in enumerate([[(30, 30)], [(25, 100), (84, 60)], [], [(28, 28)]]):  # height, width
        images = [Image.fromarray(pixels.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        vision, counts = image_inputs(processor, images) if images else ({}, [])
        words = torch.randint(20, 390, (4 + i,), generator=generator).tolist()
        ids = [BOS, *[IMG] * sum(counts), *words]
        labels = [-100] * (len(ids) - 3) + ids[-3:]
        text = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "num_cut": 0, "sample_id": str(i)}
        examples.append(text | vision)
    lengths = [len(one["input_ids"]) for one in examples]
    pack_tokens = max(lengths[1], lengths[0] + lengths[2] + lengths[3])
    padded, packed = Collator(PAD)(examples), Collator(PAD, pack_tokens)(examples)
    assert not torch.equal(packed["pixel_values"], padded["pixel_values"])  # packs read in another order
    assert_equal_steps(model, padded, packed, WEIGHTINGS["remove"], tolerance=1e-5)


def varlen_attention(module, query, key, value, attention_mask, scaling, *, cu_seq_lens_q, **kwargs):
    """What FlashAttention computes between borders, sample by sample; without borders it refuses."""
    assert attention_mask is None and len(query) == 1
    assert torch.equal(cu_seq_lens_q, kwargs["cu_seq_lens_k"]) and cu_seq_lens_q.dtype == torch.int32
    assert cu_seq_lens_q[-1] == query.shape[2]
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(cu_seq_lens_q.diff().max())
    pieces = []
    for start, end in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        q, k, v = (states[:, :, start:end] for states in (query, key, value))
        pieces.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] > k.shape[1])
        )
    return torch.cat(pieces, 2).transpose(1, 2), None


@pytest.mark.parametrize("name", ["off", "remove", "reference, remove"])
def test_flash_attention_gets_the_borders_of_samples_and_no_padding(name, monkeypatch):
    """The kernel needs a GPU; here a slow one takes its place, which knows the borders it is given and nothing else."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", varlen_attention)
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is varlen_attention
    model, flash = build(), build()
    examples = examples_of(*MIXED)
    expected, loss, gradients = step_and_gradients(model, Collator(PAD)(examples), WEIGHTINGS[name])
    flash.model.language_model.config._attn_implementation = "flash_attention_2"
    lengths = []
    flash.model.language_model.norm.register_forward_hook(lambda _, args, __: lengths.append(tuple(args[0].shape[:2])))
    packed = Collator(PAD, 64)(examples)
    out, packed_loss, packed_gradients = step_and_gradients(flash, packed, WEIGHTINGS[name])
    num_tokens = sum(len(one["input_ids"]) for one in examples)
    num_text = sum(len(examples[i]["input_ids"]) - 4 * len(examples[i]["pixel_values"]) for i in (0, 2, 3, 5))
    assert lengths == ([(1, num_tokens)] if name == "off" else [(1, num_text), (1, num_tokens)])
    assert packed_loss == pytest.approx(loss, rel=1e-9)
    for key in set(REPORT) & out.keys():
        assert (out[key] - expected[key]).abs().max() < 1e-7, key
    for key, gradient in gradients.items():
        assert (packed_gradients[key] - gradient).abs().max() <= 1e-9 * max(gradient.abs().max(), 1), key


def test_borders_are_counted_from_samples_and_not_from_rows():
    arguments = varlen_arguments(torch.tensor([3, 3, 3, 1, 2, 2]))  # sample 1 begins the second row
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert (arguments["max_length_q"], arguments["max_length_k"]) == (3, 3)


def config_with(config, attention="sdpa"):
    config._attn_implementation = attention
    return config


@pytest.mark.parametrize(
    ("config", "weighting", "message"),
    [
        (config_with(MistralConfig(sliding_window=100)), None, "reaches back 100 tokens"),
        (
            config_with(Qwen2Config(use_sliding_window=True, sliding_window=100, max_window_layers=0)),
            None,
            "100 tokens",
        ),
        (config_with(LlamaConfig(), "flex_attention"), None, "flex_attention"),
        (config_with(LlamaConfig(), "flash_attention_2"), WEIGHTINGS["mask"], "cannot hide keys"),
        (config_with(LlamaConfig()), resolve_weighting("cal_reference", window=5), "cal_window 5"),
        (
            SimpleNamespace(model_type="x", layer_types=["linear_attention"], _attn_implementation="sdpa"),
            None,
            "linear",
        ),
    ],
)
def test_what_packed_rows_cannot_reproduce_is_refused_with_the_reason(config, weighting, message):
    with pytest.raises(ValueError, match=message):
        check_packing(config, weighting, 2048)


@pytest.mark.parametrize(
    ("config", "weighting"),
    [
        (config_with(MistralConfig(sliding_window=4096)), WEIGHTINGS["mask"]),
        (config_with(Qwen2Config(sliding_window=100)), WEIGHTINGS["reference"]),  # use_sliding_window is false
        (config_with(LlamaConfig(), "flash_attention_2"), WEIGHTINGS["remove"]),
        (config_with(LlamaConfig(), "eager"), None),
    ],
)
def test_what_packed_rows_can_reproduce_is_accepted(config, weighting):
    check_packing(config, weighting, 2048)


def test_flat_smoothing_of_a_label_behind_the_first_token_is_refused():
    batch = Collator(PAD, 1000)(examples_of("l3", "t3 i l6"))
    model = build()
    with pytest.raises(ValueError, match="a label follows the first token"):
        run_step(model, inputs_of(batch), StepOptions(find_head(model), WEIGHTINGS["reference"]))


# --- whole runs ---


def log_of(folder):
    return [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in line]


@pytest.mark.parametrize(
    "options",
    [
        ("--cal",),
        ("--cal", "false", "--group_by_modality_length", "true"),
        ("--cal", "--gradient_accumulation_steps", "3", "--group_by_modality_length", "true", "--pack_tokens", "300"),
        ("--cal", "--cal_strategy", "cal_reference", "--cal_low", "0.1", "--gradient_accumulation_steps", "2"),
    ],
    ids=["cal", "plain, grouped", "accumulated, grouped", "reference"],
)
def test_a_packed_run_takes_the_steps_of_the_padded_run(tiny_run, max_difference, options):
    without_size = [option for option in options if option not in ("--pack_tokens", "300")]
    padded, packed = tiny_run(*without_size), tiny_run(*options, "--packing")
    assert max_difference(padded, tiny_run.root / "vlm") > 1e-4
    assert max_difference(padded, packed) < 2e-6
    for a, b in zip(log_of(padded), log_of(packed), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert sum(line["padding_share"] for line in log_of(packed)) < sum(line["padding_share"] for line in log_of(padded))


def test_padding_share_is_the_share_of_positions_without_a_token(tiny_run, monkeypatch):
    seen = []
    plain_call = Collator.__call__
    monkeypatch.setattr(Collator, "__call__", lambda self, items: seen.append(plain_call(self, items)) or seen[-1])
    for options in ((), ("--packing", "--pack_tokens", "100")):
        seen.clear()
        lines = log_of(tiny_run(*options))
        for line, batch in zip(lines, seen, strict=False):
            ids = batch["input_ids"]
            assert line["padding_share"] == pytest.approx((ids == PAD).sum().item() / ids.numel())


def test_a_packed_run_resumes_bit_for_bit(tiny_run, max_difference, tmp_path):
    options = ("--cal", "--packing", "--max_steps", "8", "--save_steps", "4", "--save_strategy", "steps")
    straight = tiny_run(*options, "--output_dir", str(tmp_path / "straight"))
    resumed = tiny_run(
        *options, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(straight / "checkpoint-4")
    )
    assert max_difference(straight, resumed) == 0


def test_evaluation_loss_is_the_same_packed(tiny_run):
    data = str(tiny_run.root / "data" / "data.json")
    values = []
    for options in ((), ("--packing",)):
        folder = tiny_run(
            *options, "--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "1",
            "--per_device_eval_batch_size", "7", "--learning_rate", "0",
        )  # fmt: skip
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        values += [line["eval_loss"] for line in history if "eval_loss" in line]
    assert len(values) == 2
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_size_of_packs_without_packing_is_refused(tiny_run):
    with pytest.raises(ValueError, match="pack_tokens"):
        tiny_run("--pack_tokens", "100")
