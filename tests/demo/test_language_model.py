import json
import re
from itertools import islice
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from cal_train.data.conversation import load_template, render
from cal_train.data.dataset import VlmDataset
from cal_train.data.sources import Source
from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.language_model import (
    GUESS_SHARE,
    conversation,
    documents,
    encode,
    in_words,
    train_language_model,
    train_tokenizer,
)
from cal_train.demo.scenes import Scene, ask, picture_in_words, sample_scene
from cal_train.testing import tiny_processor

TURN = re.compile(r"<\|im_start\|>(user|assistant)\n(.*?)<\|im_end\|>\n", re.DOTALL)


@pytest.fixture(scope="module")
def texts():
    return list(islice(documents(0), 600))


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer([in_words(text) for text in texts])


def is_conversation(text):
    return text.rendered.text.startswith("<|im_start|>user\n")


def test_some_texts_have_no_picture_in_them(texts, tokenizer):
    without = [text for text in texts if not text.picture]
    assert abs(len(without) / len(texts) - GUESS_SHARE) < 4 * (GUESS_SHARE / len(texts)) ** 0.5
    for text in without[:20]:
        decoded = tokenizer.decode(encode(text, tokenizer).input_ids, clean_up_tokenization_spaces=False)
        assert decoded == text.rendered.text.replace("<image>", "")


def row_of(text):
    """The row of a data file from which the text could have been made, read off the text alone."""
    rendered = text.rendered.text
    if not is_conversation(text):
        caption = rendered.removeprefix("<|im_start|><image>").removesuffix("\n")
        turns = [("user", "<image>\nDescribe the picture."), ("assistant", caption)]
    else:
        turns = TURN.findall(rendered)
    speaker = {"user": "human", "assistant": "gpt"}
    return {"image": "i.png", "conversations": [{"from": speaker[role], "value": value} for role, value in turns]}


def test_every_text_decodes_to_itself_with_the_picture_in_words(texts, tokenizer):
    for text in texts[:50]:
        ids = encode(text, tokenizer).input_ids
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert decoded == in_words(text)
        assert len(TURN.findall(decoded)) == (2 if is_conversation(text) else 0)


def test_every_concept_is_one_token_and_occurs_in_the_text(texts, tokenizer):
    joined = " ".join(in_words(text) for text in texts)
    for concept in CONCEPTS:
        assert len(tokenizer(f" {concept.word}").input_ids) == 1
        assert f" {concept.word}" in joined


def test_too_little_text_is_refused_with_the_words(texts):
    with pytest.raises(ValueError, match="words of more than one token"):
        train_tokenizer([in_words(texts[0])])


def test_a_quarter_of_the_texts_are_captions(texts):
    share = sum(not is_conversation(text) for text in texts) / len(texts)
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / len(texts)) ** 0.5


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_texts_are_what_the_stages_train_on_with_words_for_patches(texts, tokenizer, tmp_path, template):
    chosen = [text for text in texts if text.picture and is_conversation(text) == (template == "chatml")][:20]
    Image.new("RGB", (56, 56)).save(tmp_path / "i.png")
    (tmp_path / "rows.json").write_text(json.dumps([row_of(text) for text in chosen]))
    dataset = VlmDataset([Source(tmp_path / "rows.json", None)], tiny_processor(tokenizer, 56), template, 2048)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    samples: list[Any] = [dataset[i] for i in range(len(dataset))]
    for text, sample in zip(chosen, samples, strict=True):
        ours = encode(text, tokenizer)
        is_image = sample["input_ids"] == image_token
        assert is_image.sum() == 16  # 56 px, 14 px patches
        assert (ours.labels == sample["labels"]).all()
        assert (ours.input_ids[~is_image] == sample["input_ids"][~is_image]).all()
        assert tokenizer.decode(ours.input_ids[is_image]).split() == list(text.picture)


def test_a_picture_in_words_names_every_patch_of_every_cell():
    fox, drum = CONCEPTS[0], CONCEPTS[16]
    scene = Scene("s", (None, fox, drum, None), fox, 0)
    rows = ["nothing nothing fox fox"] * 2 + ["drum drum nothing nothing"] * 2
    assert fox.word == "fox" and drum.word == "drum"
    assert " ".join(picture_in_words(scene)) == " ".join(rows)


def test_texts_are_fixed_by_the_seed():
    first, again, other = (list(islice(documents(seed), 5)) for seed in (1, 1, 2))
    assert first == again != other


def test_only_the_first_question_carries_the_image_mark():
    rng = np.random.default_rng(0)
    turns = ask(sample_scene(rng, "s"), rng)
    text = render(conversation(turns), load_template("chatml"), {}).text
    assert text.count("<image>") == 1 and f"<image>\n{turns[0].question}" in text


def test_the_trained_folder_loads_and_has_about_five_million_parameters(tmp_path):
    folder = train_language_model(tmp_path / "lm", num_documents=400, learning_rate=1e-3, batch_size=200, seed=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert 4.5e6 < sum(p.numel() for p in model.parameters()) < 5.5e6
    assert model.config.vocab_size == len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert tokenizer.convert_tokens_to_ids("<image>") != tokenizer.unk_token_id
