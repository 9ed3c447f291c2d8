import json
import re
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from cal_train.data.conversation import load_template
from cal_train.demo.assets import Assets
from cal_train.demo.concepts import CONCEPTS, HELD_OUT_CONCEPTS
from cal_train.demo.evaluate import answer_split, visual_tokens
from cal_train.demo.language_model import documents, in_words, train_tokenizer
from cal_train.demo.splits import TEST_SPLITS, write_splits
from cal_train.testing import tiny_llava, tiny_processor


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([in_words(text) for text in islice(documents(0), 600)])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny_llava(tokenizer).save_pretrained(folder)
    processor = tiny_processor(tokenizer)
    processor.chat_template = load_template("chatml")
    processor.save_pretrained(folder)
    return folder


def write_style(folder, colour):
    folder.mkdir()
    for i, concept in enumerate(CONCEPTS):
        circle = f'<circle cx="4" cy="4" r="{1 + i % 3}" fill="{colour}"/>'
        text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{circle}</svg>'
        (folder / f"{concept.code_point}.svg").write_text(text)
    return folder


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    assets = Assets(folder, write_style(folder / "a", "red"), write_style(folder / "b", "blue"))
    return folder, write_splits(folder / "data", assets, num_train=6, num_test=4, image_size=28)


@torch.no_grad()
def generated(folder, image, question, max_new_tokens):
    """What the plain transformers `generate` writes: ids up to and without the end mark, and whether it ended."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{question}"}], add_generation_prompt=True
    )
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    end = processor.tokenizer.eos_token_id
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=0)
    return processor, ids[0, inputs["input_ids"].shape[1] :].tolist()


def write_row(folder, question, answer, scene="s"):
    data = folder / "one.json"
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    data.write_text(json.dumps([{"id": "r", "image": "one.png", "conversations": turns}]))
    truth = {"r": [{"type": "name", "scene": scene, "spans": [[0, 1]]}]}
    (folder / "one.truth.json").write_text(json.dumps(truth))
    return data


def test_an_answer_counts_exactly_if_generate_writes_it(tmp_path, model_folder, tokenizer):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    image.save(tmp_path / "one.png")
    question, end = "What is in the top left?", tokenizer.eos_token_id
    model: Any = AutoModelForImageTextToText.from_pretrained(model_folder)
    # a head that is sure of a fixed chain of words, so that generation ends with the end mark
    chain = tokenizer(" fox drum pear").input_ids
    newline = tokenizer("assistant\n").input_ids[-1]
    with torch.no_grad():
        embedding = torch.eye(len(tokenizer), model.config.text_config.hidden_size) * 0
        directions = torch.linalg.qr(torch.randn(model.config.text_config.hidden_size, 8))[0].T * 10
        for i, token in enumerate([newline, *chain]):
            embedding[token] = directions[i]
        head = torch.zeros_like(embedding)
        for i, token in enumerate([*chain, end]):
            head[token] = directions[i]
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.get_input_embeddings().weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
    changed = tmp_path / "chain"
    model.save_pretrained(changed)
    AutoProcessor.from_pretrained(model_folder).save_pretrained(changed)
    _, ids = generated(changed, image, question, 8)
    assert ids == [*chain, end]  # the oracle
    assert answer_split(changed, write_row(tmp_path, question, " fox drum pear")).is_right.tolist() == [True]
    for wrong in (" fox drum", " fox drum pear pear", " drum drum pear", " fox drum fox"):
        assert answer_split(changed, write_row(tmp_path, question, wrong)).is_right.tolist() == [False]


def test_without_the_image_is_what_a_forward_over_masked_image_keys_gives(splits, model_folder):
    _, files = splits
    answers = answer_split(model_folder, files["heldout_scenes"], batch_size=5)
    rows = json.loads(files["heldout_scenes"].read_text())
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    processor = AutoProcessor.from_pretrained(model_folder, backend="pil")
    expected = []
    for row in rows[:4]:
        question, answer = (turn["value"] for turn in row["conversations"])
        chat = [{"role": "user", "content": question}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        image = Image.open(files["heldout_scenes"].parent / row["image"])
        whole = processor(text=f"{prompt}{answer}<|im_end|>", images=image, return_tensors="pt")
        start = processor(text=prompt, images=image, return_tensors="pt")["input_ids"].shape[1]
        ids = whole["input_ids"]
        blind = torch.where(ids == model.config.image_token_id, 0, 1)
        with torch.no_grad():
            seen = model(**whole).logits[0, start - 1 : -1]
            unseen = model(**{**whole, "attention_mask": blind}).logits[0, start - 1 : -1]
        expected += (seen - unseen).gather(1, ids[0, start:, None])[:, 0].tolist()
    assert len(expected) > 20
    assert np.abs(answers.delta[: len(expected)] - expected).max() < 1e-4
    assert np.abs(expected).max() > 1e-2


def test_batches_change_nothing(splits, model_folder):
    _, files = splits
    one, many = (answer_split(model_folder, files["heldout_concepts"], batch_size=size) for size in (1, 16))
    assert np.abs(one.delta - many.delta).max() < 1e-4
    assert (one.is_visual == many.is_visual).all() and (one.types == many.types).all()


def test_visual_tokens_are_those_that_overlap_a_span(tokenizer):
    answer = "There is a fox in that place."
    start = answer.index("fox")
    ids = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    flags = visual_tokens(tokenizer, answer, [(start, start + 3)], ids)
    assert [tokenizer.decode([i]) for i, flag in zip(ids, flags, strict=True) if flag] == [" fox"]
    with pytest.raises(ValueError, match="are not the tokens"):
        visual_tokens(tokenizer, answer, [], ids[1:])


def test_splits_have_their_files_and_images_and_ask_one_question_at_a_time(splits):
    _, files = splits
    assert set(files) == {"pretrain", "finetune", *TEST_SPLITS}
    for path in files.values():
        rows, truth = json.loads(path.read_text()), json.loads(path.with_suffix(".truth.json").read_text())
        assert [row["id"] for row in rows] == list(truth)
        for row in rows:
            assert (path.parent / row["image"]).is_file()
            turns = row["conversations"]
            assert len(turns) == 2 * len(truth[row["id"]]) == 2
            for turn, fact in zip(turns[1::2], truth[row["id"]], strict=True):
                assert all(0 <= a < b <= len(turn["value"]) for a, b in fact["spans"])


def test_a_training_picture_is_asked_about_a_few_times_and_never_twice_the_same(splits):
    _, files = splits
    asked = {}
    for row in json.loads(files["finetune"].read_text()):
        asked.setdefault(row["image"], []).append(row["conversations"][0]["value"])
    assert len(asked) == 6 and all(1 <= len(questions) <= 4 for questions in asked.values())
    assert all(len(set(questions)) == len(questions) for questions in asked.values())
    assert max(map(len, asked.values())) > 1


def test_no_training_file_names_a_held_out_concept_and_every_held_out_row_shows_one(splits):
    _, files = splits
    held_out = {concept.word for concept in HELD_OUT_CONCEPTS}
    for name in ("pretrain", "finetune", "heldout_scenes"):
        assert not held_out & set(re.findall(r"[a-z]+", files[name].read_text())), name
    by_scene = {}
    for row in json.loads(files["heldout_concepts"].read_text()):
        text = " ".join(turn["value"] for turn in row["conversations"])
        by_scene.setdefault(row["image"], set()).update(held_out & set(re.findall(r"[a-z]+", text)))
    assert len(by_scene) == 4 and all(by_scene.values())


def test_the_held_out_style_asks_the_same_questions_of_other_drawings(splits):
    _, files = splits
    scenes, style = (json.loads(files[name].read_text()) for name in ("heldout_scenes", "heldout_style"))
    assert [r["conversations"] for r in scenes] == [r["conversations"] for r in style]
    first, second = (Image.open(files["heldout_scenes"].parent / r[0]["image"]) for r in (scenes, style))
    assert first.tobytes() != second.tobytes()


def test_without_its_drawings_the_held_out_style_is_absent(tmp_path):
    assets = Assets(tmp_path, write_style(tmp_path / "a", "red"), None)
    assert "heldout_style" not in write_splits(tmp_path / "data", assets, num_train=1, num_test=1, image_size=28)


def test_scenes_of_the_splits_are_disjoint_and_files_are_fixed_by_the_seed(splits, tmp_path):
    _, files = splits
    assets = Assets(tmp_path, write_style(tmp_path / "a", "red"), write_style(tmp_path / "b", "blue"))
    again = write_splits(tmp_path / "data", assets, num_train=6, num_test=4, image_size=28)
    images = {}
    for name, path in files.items():
        assert path.read_bytes() == again[name].read_bytes()
        images[name] = {row["image"] for row in json.loads(path.read_text())}
    assert images["pretrain"] == images["finetune"]
    assert not images["finetune"] & (images["heldout_scenes"] | images["heldout_concepts"])
