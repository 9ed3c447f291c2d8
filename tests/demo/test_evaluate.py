import json
import re
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from cal_train.demo.assets import Assets
from cal_train.demo.concepts import CONCEPTS, HELD_OUT_CONCEPTS
from cal_train.demo.evaluate import Deltas, detection, read_answers, read_deltas, visual_tokens, write_scored_rows
from cal_train.demo.language_model import documents, in_words, train_tokenizer
from cal_train.demo.scenes import QUESTION_TYPES
from cal_train.demo.splits import TEST_SPLITS, write_splits
from cal_train.evals.lmms.results import write_results


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([in_words(text) for text in islice(documents(0), 600)])


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


TASKS = {"heldout_scenes": "demo", "heldout_concepts": "demo_concepts", "heldout_style": "demo_style"}


def write_answers(folder, files, answer):
    """Results as ``cal-train eval`` leaves them; ``answer(split, row, type)`` is what the model said."""
    samples = {}
    for split, name in TASKS.items():
        truth = json.loads(files[split].with_suffix(".truth.json").read_text())
        for row in json.loads(files[split].read_text()):
            type_, target = truth[row["id"]][0]["type"], row["conversations"][1]["value"]
            rows = samples.setdefault(f"{name}_{type_}", [])
            rows.append({"doc_id": len(rows), "target": target, "answer": answer(split, row, type_)})
    summary = {"suite": "s", "model": "m", "tasks": {}, "settings": {}, "versions": {}}
    write_results(folder, summary, samples)
    (folder / "results.json").write_text(json.dumps({"tasks": {task: {} for task in samples}}))


def test_an_answer_is_right_if_it_is_the_reference_word_for_word(splits, tmp_path):
    _, files = splits

    def seen(split, row, type_):
        scene, said = row["id"].split("/")[0], row["conversations"][1]["value"]
        if type_ == "count":
            return f" {said}\n"
        return said if scene.endswith("1") and split != "heldout_style" else said + " Really."

    write_answers(tmp_path / "seen", files, seen)
    write_answers(tmp_path / "blind", files, lambda split, row, type_: seen("", row, "") if type_ == "kind" else "no")
    found = read_answers("heldout_concepts", files["heldout_concepts"], tmp_path / "seen", tmp_path / "blind")
    assert len(found.types) == 4 * len(QUESTION_TYPES) and set(found.scenes) == {f"concept-0000{n}" for n in range(4)}
    for type_, scene, is_right, is_blind in zip(*vars(found).values(), strict=True):
        assert is_right == (type_ == "count" or scene.endswith("1"))
        assert is_blind == (type_ == "kind" and scene.endswith("1"))
    style = read_answers("heldout_style", files["heldout_style"], tmp_path / "seen", tmp_path / "blind")
    assert style.is_right.sum() == 4  # the counts
    assert style.is_right_blind.sum() == 1  # told blind of the same scenes in the style of training


def test_answers_to_other_questions_are_refused(splits, tmp_path):
    _, files = splits
    write_answers(tmp_path / "seen", files, lambda split, row, type_: "no")
    write_answers(tmp_path / "blind", files | {"heldout_scenes": files["heldout_concepts"]}, lambda *_: "no")
    with pytest.raises(ValueError, match=r"blind, task demo_name: .* other questions"):
        read_answers("heldout_style", files["heldout_style"], tmp_path / "seen", tmp_path / "blind")


def test_deltas_come_back_by_split_and_question_with_what_the_picture_tells(splits, tmp_path, tokenizer):
    _, files = splits
    tokenizer.save_pretrained(tmp_path)
    write_scored_rows(tmp_path / "rows.json", files, num_scenes=2)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * 3 * len(QUESTION_TYPES) and len({row["id"] for row in rows}) == len(rows)
    assert all((files["heldout_scenes"].parent / row["image"]).is_file() for row in rows)
    expected = {split: [] for split in TEST_SPLITS}
    with (tmp_path / "scores.jsonl").open("w") as file:
        for n, row in enumerate(rows):
            split, _, id = row["id"].partition("/")
            turn = json.loads(files[split].with_suffix(".truth.json").read_text())[id][0]
            answer = row["conversations"][1]["value"]
            encoded = tokenizer(answer, return_offsets_mapping=True)
            ids = [7, *encoded["input_ids"], tokenizer.eos_token_id]
            deltas = [n + i / 100 for i in range(len(ids) - 1)]
            record = {"id": row["id"], "input_ids": ids, "label_positions": list(range(1, len(ids))), "delta": deltas}
            file.write(json.dumps(record) + "\n")
            ((start, end),) = turn["spans"]
            marks = [a < end and start < b for a, b in encoded["offset_mapping"]] + [False]
            expected[split] += [(d, m, turn["type"]) for d, m in zip(deltas, marks, strict=True)]
    found = read_deltas(tmp_path / "scores.jsonl", tmp_path / "rows.json", files, tmp_path)
    for split, wanted in expected.items():
        assert list(zip(*(column.tolist() for column in vars(found[split]).values()), strict=True)) == wanted
        assert found[split].is_visual.any() and not found[split].is_visual.all()


def test_delta_is_judged_as_a_detector_over_all_and_for_each_type_of_question():
    types, is_visual = np.array(["name", "name", "count", "count"]), np.array([True, False, True, False])
    one = Deltas(np.array([3.0, 1.0, 0.0, 2.0]), is_visual, types)
    assert detection([one]) == {"all": 0.5, "name": 1.0, "count": 0.0}
    other = Deltas(np.array([3.0, 1.0, 5.0, 2.0]), is_visual, types)
    assert detection([one, other]) == {"all": 0.75, "name": 1.0, "count": 0.5}


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
