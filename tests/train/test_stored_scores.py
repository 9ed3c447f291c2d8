"""Training from a score file against live CAL, and against a loop with a frozen scorer in plain transformers."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from cal_train.cal.strategies import STRATEGIES, resolve_weighting
from cal_train.cli.main import main
from cal_train.data.collate import Collator
from cal_train.data.dataset import VlmDataset
from cal_train.data.processor import load_processor
from cal_train.data.sampling import ShuffledSampler
from cal_train.data.score_notes import tokenizer_digest
from cal_train.data.sources import Source
from cal_train.evals.score import records_of, score_batches, score_file
from cal_train.models.head import find_head
from cal_train.testing import tiny_tokenizer
from cal_train.train.step import StepOptions, attach_step
from cal_train.train.stored_scores import open_deltas

LOW, HIGH, WINDOW, IMG = 0.1, 1.0, 3, 4


def write_scores(root, output, ablation="remove", **options):
    """Scores with other clamp limits than the runs here have: those must not matter."""
    data = options.pop("data", root / "data" / "data.json")
    weighting = resolve_weighting("cal", 1, 5, 5, ablation)
    score_file(root / "vlm", data, root / "data" / "images", output, weighting, **options)
    return output


@pytest.fixture(scope="module")
def scores(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    return {kind: str(write_scores(tiny_run.root, folder / f"{kind}.jsonl", kind)) for kind in ("remove", "mask")}


def log_of(folder):
    return [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in line]


def data_of(tiny_run, **source):
    root = tiny_run.root
    processor = load_processor(root / "vlm")
    data = Source(source.pop("path", root / "data" / "data.json"), root / "data" / "images", **source)
    return VlmDataset([data], processor, "chat", 2048)


def edited(scores, target, edit=None, note=None):
    """A copy of a score file with its list of records, or its note, changed in place."""
    records = [json.loads(line) for line in Path(scores).read_text().splitlines()]
    about = json.loads(Path(f"{scores}.about.json").read_text())
    if edit:
        edit(records)
    if note:
        note(about)
    target.write_text("".join(json.dumps(record) + "\n" for record in records))
    target.with_name(target.name + ".about.json").write_text(json.dumps(about))
    return target


@pytest.mark.parametrize("strategy", ["cal", "random"])
def test_the_first_step_is_that_of_live_cal_and_no_second_pass_runs(
    tiny_run, scores, max_difference, strategy, monkeypatch
):
    options = ("--cal", "--cal_strategy", strategy, "--max_steps", "1", "--gradient_accumulation_steps", "2")
    live = tiny_run(*options)
    with monkeypatch.context() as patch:
        patch.setattr("cal_train.train.step.logits_without_image", None)
        stored = tiny_run(*options, "--cal_scores", scores["remove"])
    assert max_difference(live, tiny_run.root / "vlm") > 1e-4
    assert max_difference(live, stored) < 1e-6
    [expected], [line] = log_of(live), log_of(stored)
    for name in ("loss", "grad_norm", "cal/weight_mean", "cal/delta_mean", "cal/share_low", "cal/share_high"):
        assert line[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name  # the mean delta is nearly 0
    assert line["cal/overhead"] == 0 < expected["cal/overhead"]


@pytest.mark.parametrize("pack_tokens", [None, 200])
@pytest.mark.parametrize("name", ["cal", "mask", "micro_batch"])
def test_in_float64_loss_and_gradients_are_those_of_live_cal(tiny_run, tmp_path, name, pack_tokens):
    weighting = {
        "cal": resolve_weighting("cal", LOW, HIGH),
        "mask": resolve_weighting("cal", LOW, HIGH, ablation="mask"),
        "micro_batch": resolve_weighting("cal", LOW, HIGH, normalizer="micro_batch"),
    }[name]
    model = AutoModelForImageTextToText.from_pretrained(tiny_run.root / "vlm", dtype=torch.float64).eval()
    dataset = data_of(tiny_run)
    items = [dataset[i] for i in range(8)]
    for item in items:
        item |= {"pixel_values": item["pixel_values"].double()} if "pixel_values" in item else {}
    padded = Collator(0)(items)
    [(_, deltas)] = list(score_batches(model, [padded], weighting))
    path = write_scores(tiny_run.root, tmp_path / "scores.jsonl", weighting.ablation)
    fresh = list(records_of(padded, deltas, dataset.processor.tokenizer, range(8)))
    edited(path, path, lambda records: records.__setitem__(slice(8), fresh))
    reading = data_of(tiny_run)
    reading.load_deltas = open_deltas([path], reading, weighting)
    stored = [dict(item, delta_bits=reading[i]["delta_bits"]) for i, item in enumerate(items)]
    collator = Collator(0, pack_tokens)
    batches = {False: padded, True: collator(stored)}
    assert ("segment_ids" in batches[True]) == (pack_tokens is not None)
    found = {}
    for has_stored, batch in batches.items():
        model.zero_grad()
        inputs = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        out = model(step=StepOptions(find_head(model), weighting, has_stored_deltas=has_stored), **inputs)
        out["loss_sum"].backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        found[has_stored] = out, gradients
    (live, expected), (out, gradients) = found[False], found[True]
    assert torch.equal(out["delta"], live["delta"]) and torch.equal(out["weight"], live["weight"])
    assert (live["weight"] - live["weight"].mean()).abs().max() > 0.1
    assert out["loss_sum"].item() == pytest.approx(live["loss_sum"].item(), rel=1e-10)
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).abs().max() < 1e-10 * max(1, gradient.abs().max()), key


def weights_by_hand(deltas):
    """The paper's weights of one sample, in plain Python: clamp, mean with the neighbours, mean 1."""
    clamped = [min(max(value, LOW), HIGH) for value in deltas]
    smooth = [float(np.mean(clamped[max(i - 1, 0) : i + 2])) for i in range(len(clamped))]
    return [value * len(smooth) / sum(smooth) for value in smooth]


def loss_of(model, scorer, batch):
    """Weighted loss by plain forwards, whose weights come from the scorer's logits with and without image keys."""
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    shown, hidden = batch["attention_mask"], batch["attention_mask"] * (batch["input_ids"] != IMG)
    with torch.no_grad():
        delta = scorer(**inputs, attention_mask=shown).logits - scorer(**inputs, attention_mask=hidden).logits
    logits = model(**inputs, attention_mask=shown).logits
    total, count = 0.0, 0
    for row, labels in enumerate(batch["labels"]):
        at = (labels[1:] != -100).nonzero()[:, 0]
        ids = labels[1:][at]
        weights = torch.tensor(weights_by_hand(delta[row, at].gather(1, ids[:, None])[:, 0].tolist()))
        total = total + (weights * F.cross_entropy(logits[row, at], ids, reduction="none")).sum()
        count += len(ids)
    return total / count


def test_several_steps_are_those_of_a_loop_with_a_frozen_scorer(tiny_run, scores, tmp_path):
    options = ("--cal", "--cal_ablation", "mask", "--max_steps", "5", "--learning_rate", "3e-2")
    stored = tiny_run(*options, "--cal_scores", scores["mask"])
    live = tiny_run(*options)
    dataset = data_of(tiny_run)
    sampler = ShuffledSampler(dataset, 42)
    sampler.set_epoch(0)
    order = list(sampler)
    model = AutoModelForImageTextToText.from_pretrained(tiny_run.root / "vlm")
    scorer = copy.deepcopy(model)
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in range(5):
        batch = Collator(0)([dataset[i] for i in order[4 * step : 4 * step + 4]])
        model.zero_grad()
        loss_of(model, scorer, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        with torch.no_grad():
            for parameter in trained:
                parameter -= 3e-2 * parameter.grad
    names = dict(model.named_parameters())
    trained_there = {
        folder: dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())
        for folder in (stored, live)
    }

    def distance(folder):
        return max((trained_there[folder][name] - value).abs().max().item() for name, value in names.items())

    assert distance(stored) < 1e-5
    assert distance(live) > 1e-4  # whose scorer is not frozen


def test_packed_lora_and_several_sources_train_from_scores(tiny_run, scores, max_difference, tmp_path):
    plain = tiny_run("--cal", "--cal_scores", scores["remove"])
    packed = tiny_run("--cal", "--cal_scores", scores["remove"], "--packing", "true")
    assert max_difference(plain, packed) < 2e-6
    root = tiny_run.root / "data"
    rows = json.loads((root / "data.json").read_text())
    entries = []
    for k, part in enumerate((rows[:12], rows[12:])):
        (tmp_path / f"{k}.json").write_text(json.dumps(part))
        score = write_scores(tiny_run.root, tmp_path / f"{k}.jsonl", data=tmp_path / f"{k}.json")
        entries.append({"path": f"{tmp_path}/{k}.json", "image_root": str(root / "images"), "scores": str(score)})
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(tiny_run.recipe.read_text().replace("data_path", "#").replace("image_folder", "#"))
    data = ("--data", json.dumps(entries), "--output_dir", f"{tmp_path}/mixed")
    assert main(["train", str(recipe), "--cal", *data]) == 0
    assert max_difference(plain, tmp_path / "mixed") < 2e-6
    lora = ("--cal", "--lora_enable", "true", "--lora_r", "4", "--max_steps", "1", "--group_by_modality_length", "true")
    live, stored = tiny_run(*lora), tiny_run(*lora, "--cal_scores", scores["remove"])  # 0.05 dropout, not in the scores
    assert log_of(stored)[0]["loss"] == pytest.approx(log_of(live)[0]["loss"], rel=1e-6)


def test_resuming_with_scores_goes_on_bit_for_bit(tiny_run, scores, max_difference, tmp_path):
    options = ("--cal", "--cal_scores", scores["remove"], "--max_steps", "8", "--save_strategy", "steps")
    options += ("--save_steps", "3", "--save_total_limit", "10")
    straight = tiny_run(*options, "--output_dir", str(tmp_path / "straight"))
    checkpoint = str(straight / "checkpoint-3")
    resumed = tiny_run(*options, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", checkpoint)
    assert max_difference(straight, resumed) == 0


def set_in(about, **values):
    about |= values


@pytest.mark.parametrize(
    ("options", "note", "named"),
    [
        ((), {"data_sha256": "0" * 64}, r"content of .*data\.json \(scored: 000000000000\.\.\., here: "),
        ((), {"tokenizer_sha256": "0" * 64}, r"differs: tokenizer \(scored: 0000"),
        (("--model_max_length", "1024"), {}, r"model_max_length \(scored: 2048, here: 1024\)"),
        (("--image_position", "front"), {}, r"image_position \(scored: 'keep', here: 'front'\)"),
        ((), {"image_token_id": 7}, r"image_token_id \(scored: 7, here: 4\)"),
        (("--template", "llama3"), {}, r"differs: template \(scored: "),
        (("--image_aspect_ratio", "pad"), {}, r"differs: image processing \(image_aspect_ratio\) \(scored: "),
        (("--cal_ablation", "mask"), {}, r"cal_ablation \(scored: 'remove', here: 'mask'\)"),
        (("--cal_strategy", "cal_reference", "--cal_ablation", "remove"), {}, "cal_scope flat smooths over tokens"),
        (("--cal_strategy", "uniform"), {}, "uniform weighs all tokens alike"),
    ],
)
def test_scores_of_something_else_are_refused_by_name(tiny_run, scores, tmp_path, options, note, named):
    path = edited(scores["remove"], tmp_path / "scores.jsonl", note=lambda about: set_in(about, **note))
    with pytest.raises(ValueError, match=named):
        tiny_run("--cal", "--cal_scores", str(path), *options)


def test_scores_with_the_recipes_template_and_image_processing_are_taken(tiny_run, tmp_path):
    options = {"template": "vicuna_v1", "image_aspect_ratio": "pad"}
    path = write_scores(tiny_run.root, tmp_path / "scores.jsonl", **options)
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    scored = tiny_run("--cal", "--cal_scores", str(path), "--max_steps", "1", *flags)
    live = tiny_run("--cal", "--max_steps", "1", *flags)
    for a, b in zip(log_of(scored), log_of(live), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["cal/delta_mean"] == pytest.approx(b["cal/delta_mean"], abs=1e-6)


def test_scores_of_another_model_are_taken_and_it_is_named(tiny_run, scores, tmp_path, caplog):
    def note(about):
        set_in(about, model_sha256="0" * 64, paths={"model": "models/the-teacher"})

    path = edited(scores["remove"], tmp_path / "scores.jsonl", note=note)
    caplog.set_level("INFO", logger="cal_train")
    tiny_run("--cal", "--cal_scores", str(path), "--max_steps", "1")
    assert "scored by models/the-teacher: no pass without images runs" in caplog.text


def test_with_cal_off_scores_are_not_read(tiny_run, max_difference):
    off = tiny_run("--cal", "false", "--cal_scores", "there-is-none.jsonl")
    assert max_difference(off, tiny_run()) == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop(5), r"no record of 1 of the 24 rows of .*data\.json; the first is row 5 \(id 'row-5'\)"),
        (lambda r: r.append(r[3]), r"line 25: row 3 \(id 'row-3'\) is there twice"),
        (lambda r: r.append({**r[0], "row": 99}), r"line 25: sample 'row-0' is not in .*data\.json"),
        (lambda r: r.append([]), r"line 25: not a score record"),
    ],
)
def test_rows_that_are_missing_or_too_many_are_refused_up_front(tiny_run, scores, tmp_path, edit, message):
    dataset = data_of(tiny_run)
    with pytest.raises(ValueError, match=message):
        open_deltas([edited(scores["remove"], tmp_path / "scores.jsonl", edit)], dataset, STRATEGIES["cal"])


def test_a_file_without_a_note_or_no_file_is_refused(tiny_run, scores, tmp_path):
    path = edited(scores["remove"], tmp_path / "scores.jsonl")
    (tmp_path / "scores.jsonl.about.json").unlink()
    for file, message in ((path, "nothing says what"), (tmp_path / "none.jsonl", "does not exist")):
        with pytest.raises(ValueError, match=message):
            open_deltas([file], data_of(tiny_run), STRATEGIES["cal"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["input_ids"].__setitem__(2, 9), "scored as other tokens"),
        (lambda r: r["label_positions"].__setitem__(0, 1), "no finite delta for each"),
        (lambda r: r["delta"].pop(), "no finite delta for each"),
        (lambda r: r["delta"].__setitem__(0, float("nan")), "no finite delta for each"),
        (lambda r: r.pop("delta"), "its record is damaged"),
        (lambda r: r.__setitem__("id", "row-x"), "has changed since"),
    ],
)
def test_a_record_that_does_not_fit_its_row_is_a_bad_row(tiny_run, scores, tmp_path, change, message):
    path = edited(scores["remove"], tmp_path / "scores.jsonl", lambda records: change(records[6]))
    dataset = data_of(tiny_run)
    dataset.load_deltas = open_deltas([path], dataset, STRATEGIES["cal"])
    problem = dataset[6]
    assert problem.row == 6 and problem.id == "row-6" and problem.file.endswith("data.json")
    assert message in problem.problem and str(path) in problem.problem
    assert dataset[5]["delta_bits"].view(torch.float32).abs().max() > 0


def test_the_run_stops_at_such_a_row_and_names_it(tiny_run, scores, tmp_path):
    path = edited(scores["remove"], tmp_path / "scores.jsonl", lambda records: [r["delta"].pop() for r in records])
    with pytest.raises(ValueError, match=r"data\.json, row \d+ \(id 'row-\d+'\): .*scores\.jsonl: its record"):
        tiny_run("--cal", "--cal_scores", str(path))


def test_rows_that_score_left_out_are_bad_in_training_too(tiny_run, tmp_path):
    rows = json.loads((tiny_run.root / "data" / "data.json").read_text())
    rows[2]["image"] = "not-there.png"
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    path = write_scores(tiny_run.root, tmp_path / "s.jsonl", data=tmp_path / "bad.json", max_bad_samples=1)
    numbers = [json.loads(line)["row"] for line in path.read_text().splitlines()]
    assert numbers == [i for i in range(24) if i != 2]
    dataset = data_of(tiny_run, path=tmp_path / "bad.json")
    dataset.load_deltas = open_deltas([path], dataset, STRATEGIES["cal"])
    assert "not-there.png" in dataset[2].problem
    (tiny_run.root / "data" / "images" / "not-there.png").write_bytes(
        (tiny_run.root / "data" / "images" / "0.png").read_bytes()
    )
    try:
        assert "left out as bad when it was scored" in dataset[2].problem
    finally:
        (tiny_run.root / "data" / "images" / "not-there.png").unlink()


def test_equal_ids_are_told_apart_by_row_and_unique_ids_need_none(tiny_run, scores, tmp_path):
    def strip(records):
        for record in records:
            record.pop("row")

    by_id = data_of(tiny_run)
    by_id.load_deltas = open_deltas([edited(scores["remove"], tmp_path / "old.jsonl", strip)], by_id, STRATEGIES["cal"])
    by_row = data_of(tiny_run)
    by_row.load_deltas = open_deltas([scores["remove"]], by_row, STRATEGIES["cal"])
    assert all(torch.equal(by_id[i]["delta_bits"], by_row[i]["delta_bits"]) for i in range(24))

    rows = json.loads((tiny_run.root / "data" / "data.json").read_text())
    (tmp_path / "twins.json").write_text(json.dumps([row | {"id": "same"} for row in rows]))
    twins = data_of(tiny_run, path=tmp_path / "twins.json")
    path = write_scores(tiny_run.root, tmp_path / "twins.jsonl", data=tmp_path / "twins.json")
    twins.load_deltas = open_deltas([path], twins, STRATEGIES["cal"])
    for i in range(24):
        difference = twins[i]["delta_bits"].view(torch.float32) - by_row[i]["delta_bits"].view(torch.float32)
        assert difference.abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"has the id 'same' twice \(rows 0 and 1\)"):
        open_deltas([edited(path, tmp_path / "old-twins.jsonl", strip)], twins, STRATEGIES["cal"])


def test_a_tokenizers_digest_survives_saving_and_sees_a_change(tmp_path):
    for kind in ("bytelevel", "metaspace"):
        tokenizer = tiny_tokenizer(kind)
        before = tokenizer_digest(tokenizer)
        tokenizer(["a dog", "a"], padding=True, truncation=True, max_length=2)
        tokenizer.save_pretrained(tmp_path / kind)
        loaded = type(tokenizer).from_pretrained(tmp_path / kind)
        assert tokenizer_digest(loaded) == before == tokenizer_digest(tokenizer)
        loaded.add_tokens(["unheard-of"])
        assert tokenizer_digest(loaded) != before
    assert tokenizer_digest(tiny_tokenizer("bytelevel")) != tokenizer_digest(tiny_tokenizer("metaspace"))


def test_a_batch_whose_rows_were_all_dropped_needs_no_deltas(tiny_run):
    model = AutoModelForImageTextToText.from_pretrained(tiny_run.root / "vlm")
    attach_step(model)
    options = StepOptions(find_head(model), STRATEGIES["cal"], has_stored_deltas=True)
    batch = {key: value for key, value in Collator(0)([]).items() if isinstance(value, torch.Tensor)}
    assert model(step=options, **batch)["loss_sum"].item() == 0
    whole = Collator(0)([data_of(tiny_run)[0]])
    with pytest.raises(ValueError, match="no stored deltas"):
        model(step=options, **{key: value for key, value in whole.items() if isinstance(value, torch.Tensor)})
