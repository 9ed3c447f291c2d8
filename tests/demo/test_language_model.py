from itertools import islice

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cal_train.data.conversation import load_template, render
from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.language_model import (
    _encode,
    conversation,
    description,
    documents,
    train_language_model,
    train_tokenizer,
)
from cal_train.demo.scenes import PLACES, ask, sample_scene
from cal_train.types import IGNORE_INDEX


@pytest.fixture(scope="module")
def texts():
    return list(islice(documents(0), 600))


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer([text for text, _, _ in texts])


def test_every_text_decodes_to_itself(texts, tokenizer):
    for text, _, _ in texts[:50]:
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_every_concept_is_one_token_and_occurs_in_the_text(texts, tokenizer):
    joined = " ".join(text for text, _, _ in texts)
    for concept in CONCEPTS:
        assert len(tokenizer(f" {concept.word}").input_ids) == 1
        assert f" {concept.word}" in joined


def test_too_little_text_is_refused_with_the_words(texts):
    with pytest.raises(ValueError, match="words of more than one token"):
        train_tokenizer([texts[0][0]])


def test_no_image_mark_is_left_and_the_range_is_the_description(texts):
    for text, start, end in texts[:100]:
        assert "<image>" not in text
        assert sorted(part.split(" a ")[0] for part in text[start:end].rstrip(".").split(", ")) == sorted(PLACES)


def test_everything_but_the_description_is_predicted(texts, tokenizer):
    for text, start, end in texts[:50]:
        row = _encode(tokenizer, text, start, end)
        kept = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE_INDEX]
        assert tokenizer.decode(kept, clean_up_tokenization_spaces=False) == text[:start] + text[end:]


def test_a_description_states_what_is_in_each_cell():
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, "s")
    stated = dict(part.split(" a ") for part in description(scene, rng).rstrip(".").split(", "))
    assert stated == {place: c.word for place, c in zip(PLACES, scene.cells, strict=True)}


def test_texts_are_fixed_by_the_seed():
    first, again, other = (list(islice(documents(seed), 5)) for seed in (1, 1, 2))
    assert first == again != other


def test_only_the_first_question_carries_the_context():
    rng = np.random.default_rng(0)
    turns = ask(sample_scene(rng, "s"), rng)
    text = render(conversation(turns, "<image>"), load_template("chatml"), {}).text
    assert text.count("<image>") == 1 and text.index("<image>") < text.index(turns[0].question)


def test_the_trained_folder_loads_and_has_about_five_million_parameters(tmp_path):
    folder = train_language_model(tmp_path / "lm", num_documents=80, learning_rate=1e-3, batch_size=40)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert 4.5e6 < sum(p.numel() for p in model.parameters()) < 5.5e6
    assert model.config.vocab_size == len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert tokenizer.convert_tokens_to_ids("<image>") != tokenizer.unk_token_id
