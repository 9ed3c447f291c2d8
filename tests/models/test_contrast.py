"""Contrastive decoding against loops that run whole sequences, one row at a time, without cache and padding."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LogitsProcessor

from cal_train.data.processor import load_processor
from cal_train.models.contrast import ImageContrast
from cal_train.testing import write_tiny_vlm

FAMILIES = ("llava", "llava_next", "mgm")
NEW_TOKENS = 5
PROMPTS = (
    ("USER: <image>\nwhat is in the image? ASSISTANT:", 1),
    ("USER: a dog, is it? ASSISTANT:", 0),
    ("USER: <image>\n<image>\nis there a red square on a blue background, yes or no? ASSISTANT:", 2),
    ("a <image> cat", 1),
    ("USER: <image>\nwhat colour has the circle? ASSISTANT:", 1),
    ("USER: <image>\nwhat is it? ASSISTANT:", 1),
    ("USER: <image>\ndog or cat? ASSISTANT:", 1),
    ("USER: <image>\nyes or no? ASSISTANT:", 1),
)


def picture(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 90, 2)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [[picture(10 * n + i) for i in range(count)] for n, (_, count) in enumerate(PROMPTS)]


def loaded(folder, family):
    write_tiny_vlm(folder, family=family)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), load_processor(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def model_and_processor(request, tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("models") / "llava", "llava")


def inputs_of(processor, rows):
    images = [image for n in rows for image in IMAGES[n]]
    texts = [PROMPTS[n][0] for n in rows]
    batch = processor(
        images=images or None,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=True,
        return_tensors="pt",
    )
    return dict(batch)


def combine(seen, unseen, alpha, beta):
    """Equations 3 and 4 of the paper, in probabilities."""
    p_seen, p_unseen = seen.double().softmax(-1), unseen.double().softmax(-1)
    p = p_seen ** (1 + alpha) / p_unseen**alpha
    p[p_seen < beta * p_seen.max()] = 0
    return p / p.sum()


def logits_by_hand(model, inputs, ids, way):
    """Next-token logits with the image and without, of one row without padding."""
    ids = ids[None]
    ones = torch.ones_like(ids)
    positions = torch.arange(ids.shape[1])[None]
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    is_image = ids == model.config.image_token_id
    with torch.no_grad():
        seen = model(input_ids=ids, attention_mask=ones, **pixels, use_cache=False).logits[0, -1]
        if way == "mask":
            hidden = (~is_image).long()
            unseen = model(input_ids=ids, attention_mask=hidden, position_ids=positions, **pixels, use_cache=False)
            return seen, unseen.logits[0, -1]
        kept = (~is_image)[0]
        states = model.model.language_model(
            input_ids=ids[:, kept], attention_mask=ones[:, kept], position_ids=positions[:, kept], use_cache=False
        )
        return seen, model.lm_head(states.last_hidden_state[0, -1])


def greedy_by_hand(model, processor, n, alpha, beta, way):
    inputs = inputs_of(processor, [n])
    ids, start = inputs["input_ids"][0], inputs["input_ids"].shape[1]
    for _ in range(NEW_TOKENS):
        seen, unseen = logits_by_hand(model, inputs, ids, way)
        best = combine(seen, unseen, alpha, beta).argmax() if PROMPTS[n][1] else seen.argmax()
        ids = torch.cat([ids, best[None]])
        if best == processor.tokenizer.eos_token_id:
            break
    return ids[start:].tolist()


def generate(model, processor, rows, alpha, beta, **options):
    inputs = inputs_of(processor, rows)
    tokenizer = processor.tokenizer
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": tokenizer.eos_token_id} | options
    contrast = [ImageContrast(model, inputs, alpha, beta)]
    found = model.generate(**inputs, logits_processor=contrast, pad_token_id=tokenizer.pad_token_id, **options)
    return inputs, found


def answers(model, processor, rows, alpha, beta, **options):
    inputs, ids = generate(model, processor, rows, alpha, beta, **options)
    end = processor.tokenizer.eos_token_id
    told = []
    for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
        told.append(row[: row.index(end) + 1] if end in row else row)
    return told


def test_greedy_answers_are_those_of_whole_passes_whatever_the_batch_size(model_and_processor):
    model, processor = model_and_processor
    rows = range(len(PROMPTS))
    expected = [greedy_by_hand(model, processor, n, 2.0, 0.05, ("remove", "mask")[n % 2]) for n in rows]
    assert answers(model, processor, rows, 2.0, 0.05) == expected
    assert [answers(model, processor, [n], 2.0, 0.05)[0] for n in rows] == expected
    plain = answers(model, processor, rows, 0.0, 0.0)
    assert sum(a != b for a, b in zip(expected, plain, strict=True)) >= 3, "the contrast changes too little to tell"


def test_strength_0_is_plain_generation_bit_for_bit(llava):
    model, processor = llava
    options = {"return_dict_in_generate": True, "output_scores": True}
    inputs, found = generate(model, processor, range(4), 0.0, 0.1, **options)
    plain = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(found.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, plain.scores, strict=True))


def test_rows_without_image_keep_their_scores(llava):
    model, processor = llava
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 1}
    inputs, found = generate(model, processor, range(4), 1.0, 0.1, **options)
    plain = model.generate(**inputs, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(found.scores[0][1], plain.scores[0][1])
    assert all(not torch.equal(found.scores[0][n], plain.scores[0][n]) for n in (0, 2, 3))


def test_sampling_draws_from_the_combined_distribution_of_the_same_text(llava):
    model, processor = llava
    rows, copies = [0, 1, 3], 3
    torch.manual_seed(0)
    inputs, found = generate(
        model, processor, rows, 1.0, 0.1,
        do_sample=True, top_k=0, num_return_sequences=copies, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    start, checked = inputs["input_ids"].shape[1], 0
    for n, sequence in enumerate(found.sequences):
        alone = inputs_of(processor, [rows[n // copies]])
        for step, scores in enumerate(found.scores):
            so_far = sequence[start : start + step]
            if processor.tokenizer.eos_token_id in so_far:
                break
            seen, unseen = logits_by_hand(model, alone, torch.cat([alone["input_ids"][0], so_far]), "remove")
            expected = combine(seen, unseen, 1.0, 0.1) if PROMPTS[rows[n // copies]][1] else seen.double().softmax(-1)
            torch.testing.assert_close(scores[n].double().softmax(-1), expected, atol=1e-5, rtol=1e-3)
            assert expected[sequence[start + step]] > 0
            checked += 1
    assert checked >= 15 and len({tuple(s.tolist()) for s in found.sequences[:copies]}) > 1


class ByHand(LogitsProcessor):
    """The contrast without a cache: whole passes for every row and step, which know nothing of beams."""

    def __init__(self, model, processor, rows, copies, width, alpha, beta):
        self.model, self.copies, self.width, self.alpha, self.beta = model, copies, width, alpha, beta
        self.rows, self.alone = rows, [inputs_of(processor, [n]) for n in rows]

    def __call__(self, input_ids, scores):
        out = scores.clone()
        for n, ids in enumerate(input_ids):
            alone = self.alone[n // self.copies]
            if not PROMPTS[self.rows[n // self.copies]][1]:
                continue
            seen, unseen = logits_by_hand(
                self.model, alone, torch.cat([alone["input_ids"][0], ids[self.width :]]), "remove"
            )
            out[n] = combine(seen, unseen, self.alpha, self.beta).log().float()
        return out


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_beams_are_those_of_a_contrast_without_a_cache(llava, beta):
    model, processor = llava
    rows, beams = [0, 1, 2, 4], 3
    found = answers(model, processor, rows, 1.5, beta, num_beams=beams)
    inputs = inputs_of(processor, rows)
    width, end = inputs["input_ids"].shape[1], processor.tokenizer.eos_token_id
    by_hand = ByHand(model, processor, rows, beams, width, 1.5, beta)
    ids = model.generate(
        **inputs, logits_processor=[by_hand], num_beams=beams, do_sample=False, max_new_tokens=NEW_TOKENS,
        pad_token_id=processor.tokenizer.pad_token_id, eos_token_id=end,
    )  # fmt: skip
    expected = [row[: row.index(end) + 1] if end in row else row for row in ids[:, width:].tolist()]
    assert found == expected
    assert found != answers(model, processor, rows, 0.0, beta, num_beams=beams)


def test_only_plausible_tokens_are_left(llava):
    model, processor = llava
    scores = generate(
        model, processor, [0], 1.0, 1.0, max_new_tokens=1, return_dict_in_generate=True, output_scores=True
    )[1].scores[0]
    seen, _ = logits_by_hand(model, inputs_of(processor, [0]), inputs_of(processor, [0])["input_ids"][0], "remove")
    assert scores.isfinite().sum() == 1 and scores.argmax() == seen.argmax()


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        (-1.0, 0.1, "vcd_alpha -1"),
        (float("nan"), 0.1, "vcd_alpha nan"),
        (1.0, 1.5, "vcd_beta 1.5"),
        (1.0, -0.1, "beta"),
    ],
)
def test_settings_out_of_range_are_refused(alpha, beta, message):
    with pytest.raises(ValueError, match=message):
        ImageContrast(None, {}, alpha, beta)


def test_a_contrast_is_for_one_call(llava):
    model, processor = llava
    inputs = inputs_of(processor, [0])
    contrast = [ImageContrast(model, inputs)]
    options = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
    model.generate(**inputs, logits_processor=contrast, **options)
    with pytest.raises(ValueError, match="new object for each call"):
        model.generate(**inputs, logits_processor=contrast, **options)
    with pytest.raises(ValueError, match="made for other prompts"):
        model.generate(**inputs_of(processor, [4]), logits_processor=[ImageContrast(model, inputs)], **options)
