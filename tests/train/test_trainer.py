import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cal_train.train.checkpoint import load_weights_strictly


def log_of(folder):
    return [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in line]


@pytest.mark.parametrize("options", [("--cal",), ("--cal", "false")], ids=["cal", "plain"])
def test_eight_accumulated_micro_batches_of_one_equal_one_of_eight(tiny_run, max_difference, options):
    whole = tiny_run(*options, "--per_device_train_batch_size", "8")
    cut = tiny_run(*options, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    assert max_difference(whole, tiny_run.root / "vlm") > 1e-3
    assert max_difference(whole, cut) < 2e-6
    for a, b in zip(log_of(whole), log_of(cut), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_micro_batch_normaliser_averages_the_means_of_micro_batches(tiny_run):
    options = ("--cal", "--cal_strategy", "cal_reference", "--max_steps", "1")
    singles = [
        log_of(tiny_run(*options, "--learning_rate", "0", "--per_device_train_batch_size", "4", "--max_steps", "2"))
    ][0]
    cut = log_of(tiny_run(*options, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"))
    assert cut[0]["loss"] == pytest.approx((singles[0]["loss"] + singles[1]["loss"]) / 2, rel=1e-5)


def test_cal_false_wins_over_the_recipe_and_cal_changes_the_result(tiny_run, max_difference):
    off = tiny_run("--cal", "false", "--cal_strategy", "cal")
    plain = tiny_run()
    on = tiny_run("--cal")
    assert max_difference(off, plain) == 0
    assert max_difference(on, plain) > 1e-5


def test_uniform_weights_equal_plain_training(tiny_run, max_difference):
    assert max_difference(tiny_run("--cal", "--cal_strategy", "uniform"), tiny_run()) == 0


def test_random_control_is_neither_cal_nor_plain_and_repeats_with_its_seed(tiny_run, max_difference):
    random = tiny_run("--cal", "--cal_strategy", "random")
    assert max_difference(random, tiny_run("--cal", "--cal_strategy", "random")) == 0
    assert max_difference(random, tiny_run("--cal")) > 1e-6
    assert max_difference(random, tiny_run()) > 1e-6


@pytest.mark.parametrize("strategy", ["cal", "random"])
@pytest.mark.parametrize("grouped", ["true", "false"])
def test_resuming_continues_bit_for_bit_across_an_epoch(tiny_run, max_difference, tmp_path, strategy, grouped):
    options = (
        "--cal", "--cal_strategy", strategy, "--group_by_modality_length", grouped, "--optim", "adamw_torch",
        "--lr_scheduler_type", "cosine", "--max_steps", "14", "--save_steps", "4", "--save_strategy", "steps",
        "--learning_rate", "1e-3", "--save_total_limit", "10",
    )  # fmt: skip
    straight = tiny_run(*options, "--output_dir", str(tmp_path / "straight"))
    for checkpoint in ("checkpoint-4", "checkpoint-8"):  # 6 steps per epoch: one in each of the first two
        resumed = tiny_run(
            *options, "--output_dir", str(tmp_path / checkpoint), "--resume_from_checkpoint", str(straight / checkpoint)
        )
        assert max_difference(straight, resumed) == 0, checkpoint
        assert [line["loss"] for line in log_of(straight)] == [line["loss"] for line in log_of(resumed)]


def test_a_checkpoint_with_a_missing_or_foreign_weight_is_refused(tiny_run, tmp_path, weights_of):
    from safetensors.torch import save_file

    folder = tiny_run.root / "vlm"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    weights = weights_of(folder)
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"multi_modal_projector\.linear_1\.bias"):
        load_weights_strictly(model, tmp_path)


def test_activation_checkpointing_changes_nothing(tiny_run, max_difference):
    assert max_difference(tiny_run("--cal"), tiny_run("--cal", "--activation_checkpointing", "true")) < 1e-7


def test_pretraining_moves_only_the_projector(tiny_run, weights_of):
    before = weights_of(tiny_run.root / "vlm")
    after = weights_of(tiny_run("--stage", "pretrain", "--template", "plain", "--cal", "--max_bad_samples", "24"))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"multi_modal_projector"}


def test_log_line_has_what_the_interface_promises(tiny_run):
    line = log_of(tiny_run("--cal"))[-1]
    expected = "loss grad_norm learning_rate tokens_per_second data_wait_share cal/weight_mean cal/share_low "
    expected += "cal/share_high cal/delta_mean cal/effective_tokens cal/overhead"
    assert set(expected.split()) <= set(line)
    assert 0.1 < line["cal/weight_mean"] < 1
    assert 0 < line["cal/share_low"] < 1
    assert 0 < line["cal/overhead"] < 1
    plain = log_of(tiny_run())[-1]
    assert not [name for name in plain if name.startswith("cal/")]


def test_the_rates_of_the_parts_are_those_of_the_same_step(tiny_run):
    options = ("--logging_steps", "1", "--learning_rate", "1e-3", "--mm_projector_lr", "2e-3", "--max_steps", "4")
    lines = log_of(tiny_run(*options, "--lr_scheduler_type", "linear", "--warmup_steps", "0"))
    assert [line["learning_rate/language_model"] for line in lines] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert [line["learning_rate/projector"] for line in lines] == pytest.approx([2e-3, 1.5e-3, 1e-3, 0.5e-3])


def test_the_run_folder_reloads_in_plain_transformers_with_equal_logits(tiny_run):
    folder = tiny_run("--cal")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    messages = [{"role": "user", "content": "what is in the image?"}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True).endswith("ASSISTANT:")
    again = AutoModelForImageTextToText.from_pretrained(folder)
    load_weights_strictly(again, folder)
    ids = torch.arange(20, 40)[None]
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert (folder / "recipe.yaml").is_file()
    assert json.loads((folder / "environment.json").read_text())["seed"] == 42


def test_evaluation_loss_is_the_plain_token_mean_whatever_the_batch_size(tiny_run):
    data = str(tiny_run.root / "data" / "data.json")
    values = []
    for size, cal in (("1", "true"), ("7", "false")):
        folder = tiny_run(
            "--cal", cal, "--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "1",
            "--per_device_eval_batch_size", size, "--learning_rate", "0",
        )  # fmt: skip
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        values.append(next(line["eval_loss"] for line in history if "eval_loss" in line))
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    model = AutoModelForImageTextToText.from_pretrained(tiny_run.root / "vlm")
    assert values[0] == pytest.approx(plain_token_mean(model, tiny_run), rel=1e-5)


def plain_token_mean(model, tiny_run):
    """Stock Hugging Face loss, row by row."""
    from cal_train.data.dataset import Source, VlmDataset

    processor = AutoProcessor.from_pretrained(tiny_run.root / "vlm", backend="pil")
    root = tiny_run.root / "data"
    dataset = VlmDataset([Source(root / "data.json", root / "images")], processor, "chat", 2048)
    total, count = 0.0, 0
    for i in range(len(dataset)):
        row = dataset[i]
        inputs = {name: row[name][None] for name in ("input_ids", "labels")}
        inputs |= {"pixel_values": row["pixel_values"]} if "pixel_values" in row else {}
        num = int((row["labels"][1:] != -100).sum())
        with torch.no_grad():
            total, count = total + model(**inputs).loss.item() * num, count + num
    return total / count


def test_a_bad_row_stops_the_run_by_name_or_is_counted(tiny_run, caplog):
    root = tiny_run.root / "data"
    rows = json.loads((root / "data.json").read_text())
    rows[5]["image"] = "missing.png"
    (root / "bad.json").write_text(json.dumps(rows))
    options = ("--data_path", str(root / "bad.json"), "--max_steps", "6")
    with pytest.raises(ValueError, match=r"bad\.json, row 5 .*missing\.png.*\n1 bad rows, max_bad_samples is 0"):
        tiny_run(*options)
    with caplog.at_level("WARNING"):
        folder = tiny_run(*options, "--max_bad_samples", "1")
    assert log_of(folder)[-1]["dropped_rows"] == 1
    assert "row 5" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(tiny_run):
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+ on rank 0, samples row-\d+, row-"):
        tiny_run("--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "8")


def test_cached_features_train_to_the_same_weights_and_are_reused(tiny_run, max_difference, tmp_path, caplog):
    cache = ("--vision_feature_cache", str(tmp_path))
    with caplog.at_level("INFO", logger="cal_train"):
        first = tiny_run("--cal", *cache)
        assert "computing vision features of 18 images" in caplog.text
        caplog.clear()
        second = tiny_run("--cal", *cache)
        assert "computing" not in caplog.text
    assert max_difference(first, second) == 0
    assert max_difference(first, tiny_run("--cal")) < 1e-6
    with pytest.raises(ValueError, match="frozen vision tower"):
        tiny_run(*cache, "--tune_vision_tower", "true")


def test_a_trained_vision_tower_gets_gradients_up_to_the_selected_layer(tiny_run, weights_of):
    before = weights_of(tiny_run.root / "vlm")
    after = weights_of(tiny_run("--cal", "--tune_vision_tower", "true", "--vision_tower_lr", "1e-1"))
    tower = [name for name in before if name.startswith("vision_tower")]
    moved = {name for name in tower if not torch.equal(before[name], after[name])}
    assert any("layers.0." in name for name in moved)
    assert any("layers.1." in name for name in moved)
    assert not any("layers.2." in name or "post_layernorm" in name for name in moved)


def test_rows_that_lose_text_to_the_length_limit_are_counted(tiny_run):
    from cal_train.data.dataset import Source, VlmDataset

    root = tiny_run.root / "data"
    processor = AutoProcessor.from_pretrained(tiny_run.root / "vlm", backend="pil")
    source = [Source(root / "data.json", root / "images")]
    lengths = [len(row["input_ids"]) for row in VlmDataset(source, processor, "chat", 2048)]
    limit = max(lengths) - 1
    expected = lengths.count(limit + 1)
    assert 0 < expected < 24  # some rows are longer than the limit and some are not
    folder = tiny_run("--model_max_length", str(limit), "--max_steps", "6")  # 6 x 4 rows: each once
    assert log_of(folder)[-1]["truncated_rows"] == expected


def test_a_feature_cache_refuses_a_tower_that_zero3_has_partitioned(tiny_run, tmp_path):
    from cal_train.train.features import FeatureCache

    folder = tiny_run.root / "vlm"
    model = AutoModelForImageTextToText.from_pretrained(folder).requires_grad_(False)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    FeatureCache(tmp_path, model, processor)
    next(model.model.vision_tower.parameters()).ds_id = 0  # how DeepSpeed marks a partitioned parameter
    with pytest.raises(ValueError, match="ZeRO-3"):
        FeatureCache(tmp_path, model, processor)


def test_a_bad_row_counts_once_however_often_it_is_read(tiny_run):
    root = tiny_run.root / "data"
    rows = json.loads((root / "data.json").read_text())
    rows[5]["image"] = "missing.png"
    (root / "once.json").write_text(json.dumps(rows))
    data = str(root / "once.json")
    folder = tiny_run(
        "--data_path", data, "--max_steps", "13", "--max_bad_samples", "1", "--logging_steps", "13",
    )  # fmt: skip
    assert log_of(folder)[-1]["dropped_rows"] == 1  # 6 steps per epoch: read three times


def test_the_best_model_is_what_a_run_ends_with_if_asked_for(tiny_run, max_difference, tmp_path):
    data = str(tiny_run.root / "data" / "data.json")
    folder = tiny_run(
        "--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps",
        "--save_steps", "2", "--load_best_model_at_end", "true", "--max_steps", "4", "--learning_rate", "30",
        "--output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2  # such a step leads uphill, so the last one is worse
    assert max_difference(folder, folder / "checkpoint-2") == 0
    assert max_difference(folder, folder / "checkpoint-4") > 0


def test_the_resolved_recipe_of_a_run_gives_the_same_run(tiny_run, max_difference, tmp_path):
    from cal_train.cli.recipe import load_recipe
    from cal_train.train.run import train

    first = tiny_run("--cal", "--activation_checkpointing_kwargs", '{"use_reentrant": false}')
    second = train(load_recipe(first / "recipe.yaml", ("--output_dir", str(tmp_path / "again"))))
    assert max_difference(first, second) == 0
    assert max_difference(second, tiny_run.root / "vlm") > 1e-3


def test_idle_sampling_options_of_the_start_model_do_not_end_the_run_at_its_first_save(tiny_run, tmp_path, caplog):
    start = tmp_path / "vlm"
    shutil.copytree(tiny_run.root / "vlm", start)
    settings = json.loads((start / "generation_config.json").read_text())
    (start / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.9, "top_p": 0.6}))
    folder = tiny_run("--model_name_or_path", str(start), "--max_steps", "1")
    assert "temperature, top_p dropped" in caplog.text
    saved = json.loads((folder / "generation_config.json").read_text())
    assert "temperature" not in saved and "top_p" not in saved


def test_ranks_share_the_features_whatever_the_other_has_already_written(tiny_run, tmp_path):
    from cal_train.data.dataset import Source, VlmDataset
    from cal_train.train.features import FeatureCache

    folder, root = tiny_run.root / "vlm", tiny_run.root / "data"
    model = AutoModelForImageTextToText.from_pretrained(folder).requires_grad_(False)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    dataset = VlmDataset([Source(root / "data.json", root / "images")], processor, "chat", 2048)
    for rank in (0, 1):  # the second starts late and finds the first one's shard on the disk
        cache = FeatureCache(tmp_path, model, processor)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "barrier", lambda: None)
            cache.fill(dataset, torch.device("cpu"), rank=rank, world_size=2, show_progress=False)
    assert all(cache(image) is not None for image in dataset.iter_images())


def test_flash_attention_is_for_the_language_model_and_other_kinds_for_every_part(tiny_run):
    from cal_train.train.run import attention_per_part

    flash = attention_per_part("flash_attention_2")
    assert flash == {"text_config": "flash_attention_2", "vision_config": "sdpa"}
    folder = tiny_run.root / "vlm"
    per_part = {part: name.replace("flash_attention_2", "eager") for part, name in flash.items()}  # what a CPU has
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=per_part)
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention_per_part("eager"))
    assert model.model.vision_tower.config._attn_implementation == "eager"


def test_the_command_that_a_run_names_at_its_end_works(tiny_run, tmp_path, caplog, monkeypatch):
    from cal_train.cli.main import main

    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="cal_train"):
        tiny_run("--image_position", "front", "--max_steps", "1")
    command = caplog.text.split("Next: cal-train ")[1].splitlines()[0].split()
    assert command[-4:-2] == ["--image_position", "front"]
    assert main(command) == 0
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 24
