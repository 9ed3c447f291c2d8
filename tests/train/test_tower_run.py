import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cal_train.cli.tower_recipe import load_tower_recipe
from cal_train.conf_towers import TowerArguments
from cal_train.data.stream_loader import StreamLoader
from cal_train.testing import write_tiny_pairs
from cal_train.train.safe_save import mark_complete
from cal_train.train.tower_run import set_batch_size, train_towers

VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "model_type": "clip_text_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(scope="session")
def tower_recipe(tmp_path_factory):
    """The path of a recipe for tiny towers on sixteen pairs: four steps per epoch."""
    root = tmp_path_factory.mktemp("tower")
    values = {
        "objective": "clip",
        "objective_options": {"embed_dim": 16},
        "vision_tower": VISION,
        "text_tower": TEXT,
        "tokenizer": str(root / "tokenizer"),
        "data_path": str(write_tiny_pairs(root)),
        "output_dir": str(root / "unnamed"),
        "global_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def run(tower_recipe, tmp_path):
    """``run(*options) -> folder``: train the tiny recipe with options."""
    counter = iter(range(100))

    def train(*options):
        torch.manual_seed(next(counter))  # nothing may depend on what ran before
        output = tmp_path / f"run-{next(counter)}"
        return train_towers(load_tower_recipe(tower_recipe, [*options, "--output_dir", str(output)]))

    return train


def log_of(folder):
    return [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in line]


def weights_of(folder):
    files = [folder / "objective.safetensors", *(folder / part / "model.safetensors" for part in ("vision", "text"))]
    return {f"{file.relative_to(folder)}:{name}": value for file in files for name, value in load_file(file).items()}


def max_difference(first, second):
    a, b = weights_of(first), weights_of(second)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.slow
def test_the_towers_learn_sixteen_pairs_by_heart(run):
    folder = run("--max_steps", "160", "--global_batch_size", "16", "--learning_rate", "3e-3", "--warmup_steps", "10")
    last = log_of(folder)[-1]
    assert log_of(folder)[0]["loss"] > 2
    assert last["loss"] < 0.3
    assert last["in_batch_r1/image_to_text"] > 0.95 and last["in_batch_r1/text_to_image"] > 0.95
    assert last["logits/positive"] > last["logits/negative"] + 3


@pytest.mark.parametrize("objective", [pytest.param("clip", marks=pytest.mark.slow), "siglip"])
def test_resuming_continues_bit_for_bit_across_epochs(run, objective, tmp_path):
    options = (
        "--objective", objective, "--max_steps", "9", "--save_steps", "2", "--save_strategy", "steps",
        "--save_total_limit", "10", "--patch_dropout", "0.5",
    )  # fmt: skip
    straight = run(*options)
    for checkpoint in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):  # four steps per epoch: inside and at its end
        resumed = run(*options, "--resume_from_checkpoint", str(straight / checkpoint))
        assert max_difference(straight, resumed) == 0, checkpoint
        assert [line["loss"] for line in log_of(straight)] == [line["loss"] for line in log_of(resumed)]
    assert max_difference(straight, run(*options, "--seed", "1")) > 1e-3


def test_a_resumed_run_does_not_read_what_was_trained_already(run, monkeypatch):
    from cal_train.data.pair_batches import BatchMaker

    options = ("--max_steps", "4", "--save_steps", "3", "--save_strategy", "steps")
    straight = run(*options)
    made, make = [], BatchMaker.make
    monkeypatch.setattr(BatchMaker, "make", lambda *arguments: made.append(1) or make(*arguments))
    run(*options, "--resume_from_checkpoint", str(straight / "checkpoint-3"))
    assert len(made) == 1


def test_a_checkpoint_of_another_objective_or_with_a_missing_weight_is_refused(run):
    straight = run("--max_steps", "1", "--save_steps", "1", "--save_strategy", "steps")
    checkpoint = straight / "checkpoint-1"
    resume = ("--resume_from_checkpoint", str(checkpoint), "--max_steps", "1")
    for changed in (("--objective", "siglip"), ("--learning_rate", "0.5"), ("--patch_dropout", "0.5")):
        with pytest.raises(ValueError, match=f"{changed[0][2:]} was .* and is .*resume_changes"):
            run(*resume, *changed)
    with pytest.raises(ValueError, match="objective 'clip', the recipe says 'siglip'"):
        run(*resume, "--objective", "siglip", "--resume_changes", '["objective", "objective_options"]')
    weights = load_file(checkpoint / "objective.safetensors")
    del weights["log_scale"]
    save_file(weights, checkpoint / "objective.safetensors")
    mark_complete(checkpoint)
    with pytest.raises(ValueError, match="log_scale"):
        run(*resume)


def test_grad_cache_trains_to_the_weights_of_the_ordinary_step(run):
    options = ("--optim", "sgd", "--learning_rate", "0.05", "--global_batch_size", "8", "--max_steps", "3")
    whole = run(*options)
    cached = run(*options, "--grad_cache_chunk", "3")
    assert max_difference(whole, run(*options, "--seed", "1")) > 1e-3
    assert max_difference(whole, cached) < 1e-5
    for first, second in zip(log_of(whole), log_of(cached), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("chunk", [(), ("--grad_cache_chunk", "2")], ids=["plain", "grad_cache"])
def test_accumulated_batches_count_as_their_mean(run, chunk):
    frozen = ("--learning_rate", "0", "--max_grad_norm", "0", *chunk)
    singles = log_of(run(*frozen, "--max_steps", "4"))
    pairs = log_of(run(*frozen, "--max_steps", "2", "--gradient_accumulation_steps", "2"))
    for i, line in enumerate(pairs):
        assert line["loss"] == pytest.approx((singles[2 * i]["loss"] + singles[2 * i + 1]["loss"]) / 2, rel=1e-5)


def test_activation_checkpointing_changes_nothing(run):
    options = ("--optim", "sgd", "--patch_dropout", "0.5")
    assert max_difference(run(*options), run(*options, "--activation_checkpointing", "true")) < 1e-6


def test_a_locked_tower_stays_and_the_rest_moves(run):
    first = run("--max_steps", "1")
    start = ("--vision_tower", str(first / "vision"), "--text_tower", str(first / "text"))
    locked = run(*start, "--lock", "image", "--vision_tower_lr", "null")
    before, after = weights_of(first), weights_of(locked)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("vision/") for name in moved)
    assert any(name.startswith("text/") for name in moved) and any(name.startswith("objective") for name in moved)
    with pytest.raises(ValueError, match=r"vision_tower_lr=0\.1 is given, but the vision tower is locked"):
        run(*start, "--lock", "image", "--vision_tower_lr", "0.1")


def test_the_objective_clamps_behind_every_optimizer_step(run, monkeypatch):
    calls = []

    def clamp_(objective):
        calls.append(objective.log_scale.item())
        with torch.no_grad():
            objective.log_scale.fill_(1.0)

    monkeypatch.setattr("cal_train.objectives.clip.Clip.clamp_", clamp_)
    folder = run("--max_steps", "2", "--gradient_accumulation_steps", "2")
    assert len(calls) == 2
    assert abs(calls[0] - np.log(1 / 0.07)) > 1e-5, "called before the step"
    assert load_file(folder / "objective.safetensors")["log_scale"].item() == 1.0
    assert [line["logit_scale"] for line in log_of(folder)] == pytest.approx([np.e, np.e])


def test_log_line_has_what_the_interface_promises(run):
    line = log_of(run("--objective", "siglip"))[-1]
    expected = "loss grad_norm learning_rate data_wait_share pairs_per_second loss/contrastive logit_scale logit_bias "
    expected += "logits/positive logits/negative in_batch_r1/image_to_text in_batch_r1/text_to_image "
    expected += "geometry/alignment geometry/uniformity_images geometry/modality_gap dropped_rows"
    assert set(expected.split()) <= set(line)
    assert line["loss"] == pytest.approx(line["loss/contrastive"], rel=1e-5)
    assert 0 < line["data_wait_share"] < 1
    assert "sparc/kept_fraction" in log_of(run("--objective", "sparc", "--max_steps", "1"))[-1]


def test_evaluation_inside_training_measures_and_changes_nothing(run, tower_recipe, tmp_path):
    from cal_train.cli.main import main

    data = yaml.safe_load(tower_recipe.read_text())["data_path"]
    plain = run("--patch_dropout", "0.5")
    options = ["--patch_dropout", "0.5", "--eval_strategy", "steps", "--eval_steps", "2", "--eval_data_path", data]
    options += ["--zero_shot_data_path", data, "--output_dir", str(tmp_path / "evaluated")]
    assert main(["tower", str(tower_recipe), *options]) == 0
    history = json.loads((tmp_path / "evaluated" / "trainer_state.json").read_text())["log_history"]
    measured = [line for line in history if any(name.startswith("eval_") for name in line)]
    assert [line["step"] for line in measured] == [2, 4]
    assert {
        name for name in measured[0] if name.startswith("eval_retrieval")
    } and "eval_zero_shot/accuracy@1" in measured[0]
    assert all(0 <= value <= 1 for name, value in measured[-1].items() if name.startswith("eval_"))
    assert max_difference(plain, tmp_path / "evaluated") == 0


def test_time_spent_on_evaluation_is_not_training_time(tower_recipe, tmp_path, monkeypatch):
    clock = iter(range(10**9))
    monkeypatch.setattr("cal_train.train.tower_trainer.time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def make_evaluation(processors, context_length):
        return lambda model: {"ticks": sum(1 for _ in zip(range(100_000), clock, strict=False))}

    options = ["--eval_strategy", "steps", "--eval_steps", "1", "--output_dir", str(tmp_path / "out")]
    folder = train_towers(load_tower_recipe(tower_recipe, options), make_evaluation)
    assert all(line["pairs_per_second"] > 0.5 for line in log_of(folder))  # four pairs in a few ticks


def test_the_folder_says_what_it_was_made_with_and_exports(run, tmp_path, caplog):
    from transformers import AutoImageProcessor, CLIPVisionModel

    from cal_train.cli.main import main
    from cal_train.towers.two_tower import load_two_tower
    from cal_train.train.tower_checkpoint import load_tower_model

    folder = run("--objective", "siglip", "--objective_options", "{bias_init: auto, embed_dim: 16}")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["objective"] == "siglip" and recipe["global_batch_size"] == 4
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["seed"] == 42 and facts["objective_options"]["global_batch_size"] == 4
    model = load_tower_model(folder)
    assert model.objective.logit_bias.item() == pytest.approx(-np.log(3), abs=0.02)
    assert main(["export_tower", "--checkpoint", str(folder), "--output", str(tmp_path / "vision")]) == 0
    assert "dropped: siglip (image_projection, log_scale, logit_bias, text_projection)" in caplog.text
    exported = CLIPVisionModel.from_pretrained(tmp_path / "vision").eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = exported.post_layernorm(exported(pixels).last_hidden_state)
        own = load_two_tower(folder)(pixel_values=pixels).patch_tokens
    assert (tokens[:, 1:] - own).abs().max() < 1e-5
    assert AutoImageProcessor.from_pretrained(tmp_path / "vision", backend="pil").crop_size["height"] == 16


def test_a_finished_run_is_measured_by_the_verb_as_during_training(run, tower_recipe, tmp_path):
    from cal_train.cli.main import main
    from cal_train.evals.during_training import evaluation_of

    data = str(tower_recipe.parent / "pairs.jsonl")
    options = ("--eval_data_path", data, "--zero_shot_data_path", data, "--eval_strategy", "steps", "--eval_steps", "4")
    recipe = load_tower_recipe(tower_recipe, [*options, "--output_dir", str(tmp_path / "run")])
    folder = train_towers(recipe, evaluation_of(recipe))
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    during = next(line for line in logged if "eval_retrieval/image_to_text/recall@5" in line)

    out = tmp_path / "results" / "found.json"
    arguments = ["eval_tower", "--checkpoint", str(folder), "--output", str(out), "--batch_size", "5"]
    arguments += ["--data", data, "--zero_shot", data, "--probe_train", data, "--probe_test", data]
    assert main(arguments) == 0
    found = json.loads(out.read_text())
    for kind in ("retrieval", "zero_shot"):
        assert found[kind] and all(during[f"eval_{kind}/{name}"] == value for name, value in found[kind].items())
    assert found["linear_probe"]["accuracy"] > 0.2, "tested where it was fitted: sixteen classes; guessing is 0.06"

    assert main(["eval_tower", "--checkpoint", str(folder)]) == 2
    assert main(["eval_tower", "--checkpoint", str(folder), "--probe_train", data]) == 2
    assert main(["eval_tower", "--checkpoint", str(folder), "--zero_shot", data, "--templates", "a cat"]) == 2
    assert main(["eval_tower", "--checkpoint", str(tmp_path), "--data", data]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--objective", "sigclip"), "objective 'sigclip' is unknown, did you mean 'siglip'"),
        (("--objective_options", "{tile_sise: 1}"), "no option 'tile_sise', did you mean 'tile_size'"),
        (("--objective_options", "{bias_init: -10}"), "clip has no option 'bias_init' .it is one of siglip"),
        (("--grad_cash_chunk", "2"), "unknown option .* did you mean .*grad_cache_chunk"),
        (("--grad_cache_chunk", "0"), "grad_cache_chunk=0 must be at least 1"),
        (("--objective", "llip"), "mixture"),
        (("--objective", "sycoca", "--patch_dropout", "0.5"), "patch_dropout"),
        (("--vision_tower", "nowhere"), "vision_tower nowhere does not exist"),
        (("--text_tower", "null"), "does not set text_tower"),
        (("--tokenizer", "null"), "sets no tokenizer"),
        (("--pretrained_weight_decay", "0"), "both towers start from random weights"),
        (("--ignore_data_skip", "true"), "ignore_data_skip is not needed"),
        (("--lock", "image"), "untrained image tower"),
        (("--global_batch_size", "32"), "do not fill a batch"),
        (("--dataloader_drop_last", "false"), "dataloader_drop_last=False is not possible: a contrastive batch must"),
        (("--dataloader_prefetch_factor", "4"), "dataloader_prefetch_factor=4 is not possible: the stream keeps"),
        (("--auto_find_batch_size", "true"), "auto_find_batch_size=True is not possible: the stream deals out"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_with_the_reason(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(*options)


def test_a_batch_that_the_ranks_do_not_divide_is_refused_with_the_nearest_that_they_do():
    towers = TowerArguments(objective="clip", global_batch_size=10)
    args = SimpleNamespace(world_size=4, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="global_batch_size=10 cannot be dealt evenly to 4 ranks: use 8"):
        set_batch_size(args, towers)
    set_batch_size(args, TowerArguments(objective="clip", global_batch_size=12))
    assert args.per_device_train_batch_size == 3


def test_a_batch_of_one_pair_trains(run):
    folder = run("--global_batch_size", "1", "--max_steps", "2")
    assert [line["loss"] for line in log_of(folder)] == pytest.approx([0, 0], abs=1e-6)
    folder = run("--global_batch_size", "1", "--max_steps", "2", "--objective", "siglip")
    assert all(line["loss"] > 0 for line in log_of(folder))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(run):
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+ on rank 0, samples pairs-\d+, pairs-"):
        run("--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "8")


def launch(recipe, output, *options):
    """Train on two gloo ranks of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command += ["-m", "cal_train", "tower", str(recipe), "--output_dir", str(output), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


class BothRanks(StreamLoader):
    """One process that reads what two ranks read: a batch of rank 0, and behind it that of rank 1."""

    def __init__(self, stream, *arguments, **options):
        super().__init__(stream, *arguments, **options)
        stream.plan = replace(stream.plan, rows_per_batch=stream.plan.rows_per_batch // 2)
        self.lanes = [stream._lane(replace(stream.share, rank=rank, world_size=2), 0) for rank in (0, 1)]

    def __iter__(self):
        for first, second in zip(*self.lanes, strict=True):
            inputs = {name: torch.cat([first.inputs[name], second.inputs[name]]) for name in first.inputs}
            yield replace(first, inputs=inputs, sample_ids=first.sample_ids + second.sample_ids)


CASES = {
    "clip": (),
    "siglip": (),
    # SPARC does not read the attention pooling of a SigLIP tower: DDP must not wait for its gradients
    "sparc": (
        "--objective_options",
        "{embed_dim: 16, local_reduction: token}",
        "--vision_tower",
        json.dumps(VISION | {"model_type": "siglip_vision_model"}),
    ),
    "coca": ("--objective_options", "{embed_dim: 16, num_queries: 4, decoder_layers: 1, num_heads: 4}"),
    "sycoca": (
        "--objective_options",
        "{embed_dim: 16, num_queries: 4, decoder_layers: 1, num_heads: 4, image_decoder_layers: 1}",
    ),
    "llip": ("--num_mixture_tokens", "4", "--objective_options", "{embed_dim: 16, num_heads: 2}"),
    "filip": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [(), ("--grad_cache_chunk", "1")], ids=["plain", "grad_cache"])
@pytest.mark.parametrize("objective", CASES)
def test_two_ranks_equal_one_process(run, tower_recipe, tmp_path, monkeypatch, objective, chunk):
    options = ("--objective", objective, *CASES[objective], "--optim", "sgd", "--learning_rate", "0.05")
    options += ("--max_steps", "3")
    done = launch(tower_recipe, tmp_path / "two", *options, *chunk)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["world_size"] == 2
    monkeypatch.setattr("cal_train.train.tower_run.StreamLoader", BothRanks)
    one = run(*options)
    losses = [[line["loss"] for line in log_of(folder)] for folder in (tmp_path / "two", one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert max_difference(one, run(*options, "--learning_rate", "0")) > 1e-3
    assert max_difference(one, tmp_path / "two") < 1e-5


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_batch_stop_with_the_reason(tower_recipe, tmp_path):
    done = launch(tower_recipe, tmp_path / "two", "--global_batch_size", "5")
    assert done.returncode != 0
    assert "global_batch_size=5 cannot be dealt evenly to 2 ranks: use 4" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--eval_data_path", "x.jsonl"), "eval_strategy is no: set eval_strategy: steps"),
        (("--eval_strategy", "steps", "--eval_steps", "2"), "eval_strategy is steps: give eval_data_path"),
    ],
)
def test_evaluation_data_and_strategy_go_together(tower_recipe, options, message):
    from cal_train.evals.during_training import evaluation_of

    with pytest.raises(ValueError, match=message):
        evaluation_of(load_tower_recipe(tower_recipe, options))
