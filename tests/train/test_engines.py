import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

from cal_train.cal.strategies import resolve_weighting
from cal_train.cli.main import main
from cal_train.data.collate import Collator
from cal_train.models.families import family_of
from cal_train.models.head import find_head
from cal_train.models.mgm_family import TINY, TINY_HD
from cal_train.models.parts import freeze
from cal_train.testing import tiny_vlm
from cal_train.train.engines import Asked, asked_by, check_engine, check_ranks, keep_layer_names
from cal_train.train.features import FeatureCache
from cal_train.train.step import StepOptions, attach_step, run_step
from cal_train.types import Problem

ROOT = Path(__file__).parents[2]
FAMILIES = {"llava": ("llava", {}), "llava_next": ("llava_next", {}), "mgm": ("mgm", TINY), "mgm_hd": ("mgm", TINY_HD)}
ROWS = {"text": [0, 0], "image": [1], "images": [3], "mixed": [1, 0, 2]}  # images in each row
PAD = 0


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    family, options = FAMILIES[request.param]
    model, _ = tiny_vlm(family, family_options=options)
    attach_step(model)
    freeze(model, "finetune", {"vision_tower": True})
    return model.train()


def make_batch(model, kind):
    """Blank images and random text; ``dropped`` is what the collator makes of a batch whose rows were all bad."""
    if kind == "dropped":
        batch = Collator(PAD)([Problem("data.json", 1, "row-1", "is bad", "mend it")])
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    images = family_of(model).blank_images(model)
    with torch.no_grad():
        count = len(family_of(model).image_embeds(model, family_of(model).vision_features(model, images), images))
    rows = []
    for num_images in ROWS[kind]:
        text = torch.randint(20, 390, (8,))
        rows.append(torch.cat([text[:2], torch.full((num_images * count,), model.config.image_token_id), text[2:]]))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = ids.masked_fill((ids == PAD) | (ids == model.config.image_token_id), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if total := sum(ROWS[kind]):
        batch |= {name: torch.cat([value] * total) for name, value in images.items()}
    return batch


def modules_run(model, kind, weighting, is_sharded):
    """Return the modules with weights of their own that a step runs forward, in order, and those it runs backward."""
    batch, forward, backward, hooks = make_batch(model, kind), [], [], []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: forward.append(name)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(lambda gradient, name=name: backward.append(name)))
    out = run_step(model, batch, StepOptions(find_head(model), weighting, is_sharded))
    out["loss_sum"].backward()
    for hook in hooks:
        hook.remove()
    return forward, backward


@pytest.mark.parametrize("strategy", ["cal", None], ids=["cal", "plain"])
def test_sharded_ranks_run_the_same_modules_in_the_same_order_whatever_their_rows(model, strategy):
    weighting = resolve_weighting(strategy) if strategy else None
    forward, backward = modules_run(model, "image", weighting, is_sharded=True)
    assert any("vision_tower" in name for name in forward) and any("vision_tower" in name for name in backward)
    for kind in ("text", "images", "mixed", "dropped"):
        others = modules_run(model, kind, weighting, is_sharded=True)
        assert others[0] == forward, kind
        assert sorted(others[1]) == sorted(backward), kind


def test_a_blank_image_is_run_only_where_other_ranks_wait_for_it(model):
    calls = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = {("text", False): 0, ("text", True): 1, ("image", False): 1, ("image", True): 1}
    for (kind, is_sharded), count in expected.items():
        batch = make_batch(model, kind)
        calls.clear()
        run_step(model, batch, StepOptions(find_head(model), None, is_sharded))
        assert len(calls) == count, (kind, is_sharded)
    hook.remove()


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, Asked()),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, Asked(num_ranks=2)),  # accelerate launch --cpu
        ({"MASTER_PORT": "29500", "WORLD_SIZE": "1"}, Asked()),
        ({"MASTER_PORT": "29500", "WORLD_SIZE": "16"}, Asked(num_ranks=16)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, Asked(num_ranks=8)),  # srun without a launcher
        ({"SLURM_NTASKS": "8"}, Asked()),  # a shell inside an allocation
        ({"SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": "1", "WORLD_SIZE": "16"}, Asked(num_ranks=16)),
        ({"ACCELERATE_USE_FSDP": "true"}, Asked(fsdp=True)),
        ({"ACCELERATE_USE_DEEPSPEED": "True", "ACCELERATE_USE_FSDP": "false"}, Asked(deepspeed=True)),
    ],
)
def test_what_a_launcher_asks_for_is_read_from_its_variables(environment, asked):
    assert asked_by(environment) == asked


def test_fewer_ranks_than_were_started_are_refused():
    for asked, world_size in ((Asked(), 1), (Asked(num_ranks=2), 2), (Asked(num_ranks=2), 16)):
        check_ranks(asked, SimpleNamespace(world_size=world_size))
    with pytest.raises(ValueError, match="8 ranks or more, this run has 1"):
        check_ranks(Asked(num_ranks=8), SimpleNamespace(world_size=1))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_accelerate_silently_leaves_out_is_refused(name, tiny_run, tmp_path, monkeypatch, capfd):
    before = dict(os.environ)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code = main(["train", str(tiny_run.recipe), "--output_dir", str(tmp_path / "run")])
    for variable in os.environ.keys() - before.keys():  # accelerate's own, which later runs would believe
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    assert code == 2
    assert "was asked for, but the engine that runs is NO on a CPU" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_fsdp_has_to_be_the_second_version_and_to_save_whole_weights():
    args = SimpleNamespace(fsdp=None, deepspeed=None, device=torch.device("cpu"))

    def check(**plugin):
        state = SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=SimpleNamespace(**plugin))
        check_engine(Asked(fsdp=True), SimpleNamespace(args=args, accelerator=SimpleNamespace(state=state)))

    check(fsdp_version=2, state_dict_type="StateDictType.FULL_STATE_DICT")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        check(fsdp_version=1, state_dict_type="StateDictType.FULL_STATE_DICT")
    with pytest.raises(ValueError, match="fsdp_state_dict_type: FULL_STATE_DICT"):
        check(fsdp_version=2, state_dict_type="StateDictType.SHARDED_STATE_DICT")


def test_the_fsdp2_settings_split_every_layer_of_every_family(model):
    settings = load_config_from_file(str(ROOT / "zero_configs" / "fsdp2.yaml")).fsdp_config
    assert settings["fsdp_version"] == 2 and settings["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=settings["fsdp_auto_wrap_policy"])
    keep_layer_names(model)
    plugin.set_auto_wrap_policy(model)
    is_split = fsdp2_prepare_auto_wrap_policy(plugin, model)
    for layers in (model.model.language_model.layers, model.model.vision_tower.encoder.layers):
        assert all(is_split(layer) for layer in layers)
    assert not is_split(model.lm_head) and not is_split(model.model.multi_modal_projector)


def test_a_feature_cache_is_refused_where_other_ranks_have_a_tower_without_weights(tmp_path, monkeypatch):
    model, processor = tiny_vlm("llava")
    model.requires_grad_(False)
    FeatureCache(tmp_path, model, processor)
    for variable in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(variable, "true")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading"):
        FeatureCache(tmp_path, model, processor)
