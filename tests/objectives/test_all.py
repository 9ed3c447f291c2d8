"""What holds for every objective, with tiny towers; run as a program, this file is one rank of the distributed test."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cal_train.objectives.clip import clip_loss
from cal_train.objectives.families import CONTAINS, OBJECTIVES, build_objective, option_names
from cal_train.objectives.gather import ONE_RANK, current_ranks
from cal_train.objectives.siglip import siglip_loss
from cal_train.testing import tiny_pairs, tiny_two_tower
from cal_train.train.tower_model import TowerModel, encode_pairs, whole_step

COCA = {"num_queries": 5, "decoder_layers": 1, "num_heads": 4}
APPENDED = {"text_pooling": "cls_appended"}

# name of the case -> objective, its options, options of the towers
CASES = {
    "clip": ("clip", {}, {}),
    "clip_tiled": ("clip", {"backend": "tiled", "tile_size": 4}, {}),
    "siglip": ("siglip", {}, {}),
    "siglip_towers": ("siglip", {}, {"vision": "siglip", "text": "siglip", "text_pooling": "mean"}),
    "filip": ("filip", {}, {}),
    "llip": ("llip", {"num_heads": 4}, {"num_mixture_tokens": 3}),
    "sparc": ("sparc", {}, {}),
    "sparc_token": ("sparc", {"local_reduction": "token", "threshold_factor": 6.0}, {"text": "bert"}),
    "sparc_siglip_towers": ("sparc", {}, {"vision": "siglip", "text": "siglip", "text_pooling": "last"}),
    "filip_unread_poolers": ("filip", {}, {"vision": "siglip", **APPENDED}),
    "coca": ("coca", COCA, APPENDED),
    "coca_siglip_tower": ("coca", COCA, {"vision": "siglip", **APPENDED}),
    "coca_seq_sum": ("coca", {**COCA, "caption_reduction": "seq_sum"}, APPENDED),
    "sycoca": ("sycoca", {**COCA, "image_decoder_layers": 1}, APPENDED),
    "sycoca_tokens": ("sycoca", {**COCA, "image_decoder_layers": 1, "mask_at": "tokens"}, APPENDED),
}
ALL = pytest.mark.parametrize("case", CASES)


def build(case: str) -> TowerModel:
    name, options, tower_options = CASES[case]
    towers = tiny_two_tower(**tower_options)
    torch.manual_seed(0)
    model = TowerModel(towers, build_objective(name, towers.shape, {"embed_dim": 16, **options})).double()
    for parameter in model.parameters():  # away from zeros and ones, so that everything matters
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()  # BERT has dropout


def pairs(model: TowerModel, batch_size: int = 6, seed: int = 0) -> dict[str, Tensor]:
    return tiny_pairs(model.towers.shape, batch_size, seed=seed, dtype=torch.float64)


def loss_and_gradients(model: TowerModel, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    step = model(whole_step, batch, current_ranks())
    step["loss"].backward()
    return {"loss": step["loss"].detach(), **step["parts"]}, {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_every_objective_has_a_case():
    assert {name for name, _, _ in CASES.values()} == set(OBJECTIVES)


@ALL
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(case):
    values, gradients = loss_and_gradients(build(case), pairs(build(case)))
    assert all(value.isfinite() for value in values.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    idle = [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-12]
    # a bias of the keys moves all logits of a query alike: softmax takes it out
    assert [name for name in idle if not name.endswith(("k_proj.bias", "key.bias"))] == []


@ALL
def test_the_order_of_pairs_does_not_matter(case):
    model = build(case)
    batch, order = pairs(model), torch.tensor([3, 0, 5, 1, 4, 2])
    values, gradients = loss_and_gradients(model, batch)
    other_values, other_gradients = loss_and_gradients(model, {k: v[order] for k, v in batch.items()})
    assert_same(other_values, values, 1e-6)  # the parts of the log are float32
    assert_same(other_gradients, gradients)


@ALL
def test_padding_has_no_influence_on_loss_or_gradients(case):
    model = build(case)
    batch = pairs(model)
    batch["attention_mask"][:, 9:] = 0
    expected = loss_and_gradients(model, batch)
    refilled = batch["input_ids"].where(batch["attention_mask"].bool(), torch.full_like(batch["input_ids"], 17))
    shorter = {k: v[:, :9] if v.ndim == 2 else v for k, v in batch.items()}
    for other in ({**batch, "input_ids": refilled}, shorter):
        values, gradients = loss_and_gradients(model, other)
        assert_same(values, expected[0], 1e-6)
        assert_same(gradients, expected[1])


@ALL
@pytest.mark.parametrize("length", [1, 12])
def test_one_pair_is_a_batch(case, length):
    model = build(case)
    batch = pairs(model, batch_size=1)
    batch["attention_mask"][:, length:] = 0
    values, gradients = loss_and_gradients(model, batch)
    assert all(value.isfinite() for value in values.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@ALL
def test_scores_of_a_tile_are_a_block_of_all_scores(case):
    model = build(case)
    batch = pairs(model)
    with torch.no_grad():
        outputs = model.towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        images, texts = model.objective.image_features(outputs), model.objective.text_features(outputs)
        whole = model.objective.score(images, texts)
        tile = model.objective.score({k: v[2:4] for k, v in images.items()}, {k: v[1:4] for k, v in texts.items()})
    assert whole.shape == (6, 6)
    torch.testing.assert_close(tile, whole[2:4, 1:4])


@ALL
def test_the_scale_is_kept_between_1_and_100(case):
    model = build(case)
    [log_scale] = [p for name, p in model.objective.named_parameters() if name.endswith("log_scale")]
    for value, expected in ((9.0, 100.0), (-3.0, 1.0)):
        log_scale.data.fill_(value)
        model.objective.clamp_()
        assert log_scale.exp().item() == pytest.approx(expected)


@ALL
def test_under_autocast_losses_and_gradients_stay_close(case):
    model = build(case).float()
    batch = pairs(model)
    batch["pixel_values"] = batch["pixel_values"].float()
    plain, _ = loss_and_gradients(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = model(whole_step, batch, ONE_RANK)
    step["loss"].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert step["loss"].dtype == torch.float32
    torch.testing.assert_close(step["loss"].detach(), plain["loss"], rtol=0.05, atol=0)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


@ALL
def test_autocast_does_not_reach_into_the_comparison_of_pairs(case):
    model = build(case).float()
    batch = pairs(model)
    batch["pixel_values"] = batch["pixel_values"].float()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images, texts, _, _ = encode_pairs(model, batch)
            inside = model.objective.contrast(images, texts, ONE_RANK)["contrastive"].sum
        outside = model.objective.contrast(images, texts, ONE_RANK)["contrastive"].sum
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def features(model: TowerModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch = pairs(model)
    outputs = model.towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    return model.objective.image_features(outputs), model.objective.text_features(outputs)


@pytest.mark.parametrize(
    ("case", "options", "factor"),
    [("sparc", {"fine_weight": 0.0}, 0.5), ("coca", {"caption_weight": 0.0}, 1.0)],
)
def test_without_its_own_term_a_method_is_clip(monkeypatch, case, options, factor):
    name, own, tower_options = CASES[case]
    monkeypatch.setitem(CASES, case, (name, {**own, **options}, tower_options))
    model = build(case)
    images, texts = features(model)
    values, gradients = loss_and_gradients(model, pairs(model))
    [scale] = [p.exp() for n, p in model.objective.named_parameters() if n.endswith("log_scale")]
    expected = factor * clip_loss(images["image_embeds"], texts["text_embeds"], scale)
    assert set(values) == {"loss", "contrastive"}
    torch.testing.assert_close(values["loss"], expected.detach(), rtol=1e-12, atol=0)
    by_hand = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    assert_same(gradients, dict(zip(gradients, by_hand, strict=True)))


def test_llip_with_one_mixture_token_is_siglip(monkeypatch):
    monkeypatch.setitem(CASES, "llip", ("llip", {"num_heads": 4}, {"num_mixture_tokens": 1}))
    model = build("llip")
    images, texts = features(model)
    values, gradients = loss_and_gradients(model, pairs(model))
    objective = model.objective
    image_embeds = images["values"].flatten(1) @ objective.out_proj
    expected = siglip_loss(image_embeds, texts["text_embeds"], objective.log_scale.exp(), objective.logit_bias)
    torch.testing.assert_close(values["loss"], expected.detach(), rtol=1e-10, atol=0)
    mixing = [n for n in gradients if n.startswith("objective") and ("key" in n or "query" in n)]
    assert mixing and all(gradients[n].abs().max() < 1e-12 for n in mixing)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigclip", {}, "did you mean 'siglip'"),
        ("sparc", {"fine_wight": 2}, "did you mean 'fine_weight'"),
        ("clip", {"bias_init": -10}, "one of siglip, llip"),
        ("coca", {"ratio_low": 0.5}, "one of sycoca"),
        ("llip", {}, "num_mixture_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_objective(name, tiny_two_tower().shape, options)


def test_an_objective_takes_the_options_of_the_one_it_contains():
    for outer, inner in CONTAINS.items():
        assert set(option_names(inner)) <= set(option_names(outer))
    shape = tiny_two_tower().shape
    assert build_objective("sycoca", shape, {"tile_size": 8, "backend": "tiled", "decoder_layers": 1})


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_loss_and_gradients_of_one_process(world_size, tmp_path):
    """Six pairs with captions of different lengths, so that ranks bring unequal numbers of tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=environment | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)[-5000:]
    for case in CASES:
        stored = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        assert stored["world_size"] == world_size
        assert len(set(stored["num_tokens"])) > 1
        model = build(case)
        values, gradients = loss_and_gradients(model, pairs(model))
        assert_same(stored["values"], values, 1e-6)
        assert_same(stored["gradients"], gradients, 1e-8)


def run_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = current_ranks()
    for case in CASES:
        model = build(case)
        whole = pairs(model)
        part = {name: value.chunk(ranks.world_size)[ranks.rank] for name, value in whole.items()}
        # refuses to go on if a parameter is left out of a step
        parallel = DistributedDataParallel(model)
        step = parallel(whole_step, part, ranks)
        step["loss"].backward()
        loss = ranks.all_reduce_sum(step["loss"].detach()) / ranks.world_size
        num_tokens = whole["attention_mask"].sum(1).view(ranks.world_size, -1).sum(1).tolist()
        if ranks.rank == 0:
            gradients = {
                name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
            }
            values = {"loss": loss, **step["parts"]}
            torch.save(
                {"values": values, "gradients": gradients, "world_size": ranks.world_size, "num_tokens": num_tokens},
                folder / f"{case}.pt",
            )
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
