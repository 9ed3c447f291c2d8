"""MGM and MGM-HD in the layout of the original repository, with timm's ConvNeXt as its second tower."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.models.convnext import ConvNeXt
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GemmaConfig, GemmaForCausalLM

from cal_train.models.convert.run import convert

BEFORE, AFTER = [1, 20, 30, 40], [50, 60, 70, 80, 90]
DIMS = (8, 12, 16, 20)


class OriginalMGM:
    """The parts of a tiny MGM. `logits` follows the paper with a loop over the patches."""

    def __init__(self, tiny, grid: int = 1, llm: str = "llama"):
        self.base = tiny.make_original()
        torch.manual_seed(5)
        self.aux = ConvNeXt(depths=(1, 2, 1, 1), dims=DIMS, ls_init_value=0.5).eval()
        for parameter in self.aux.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        width, aux_width = tiny.vision_width, sum(DIMS)
        self.query, self.key, self.value = (
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width)) for size in (width, aux_width, aux_width)
        )
        for module in (self.query, self.key, self.value):
            for parameter in module.parameters():
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        self.grid, self.is_global, self.image_scale = grid, grid > 1, 1.0
        self.config = self.base.config | {
            "model_type": "mgm" if llm == "llama" else "mgm_gemma",
            "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-tiny",
            "mm_hidden_size_aux": aux_width,
            "image_size_aux": 64 * grid,
            "image_grid": grid,
            "image_global": grid > 1,
        }
        if llm == "gemma":
            fields = {name: self.config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
            fields |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "gelu"}
            fields |= {"vocab_size": len(self.base.tokenizer), "initializer_range": 0.2, "bos_token_id": 1}
            self.base.llm = GemmaForCausalLM(GemmaConfig(**fields, eos_token_id=2, pad_token_id=0)).eval()
            del self.config["tie_word_embeddings"], self.config["rope_theta"]
            self.config |= fields
            self.image_scale = tiny.width**0.5
        self.base.config = self.config

    def state(self) -> dict[str, torch.Tensor]:
        state = self.base.state()
        for module, name in ((self.query, "query"), (self.key, "aux"), (self.value, "val")):
            state |= {f"model.vlm_uni_{name}_projector.{key}": value for key, value in module.state_dict().items()}
        for key, value in self.aux.state_dict().items():
            if key.startswith(("stem.", "stages.")):
                state[f"model.vision_tower_aux.vision_{key}"] = value
        return {name: value.detach().contiguous() for name, value in state.items()}

    @torch.no_grad()
    def mined(self, patches: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Return patches (n, n, W) plus what each finds in its part of the map (C, s n, s n)."""
        count = len(patches)
        side = cells.shape[-1] // count
        out = torch.empty_like(patches)
        for y in range(count):
            for x in range(count):
                area = cells[:, y * side : (y + 1) * side, x * side : (x + 1) * side].flatten(1).T
                scores = self.key(area) @ self.query(patches[y, x]) / patches.shape[-1] ** 0.5
                out[y, x] = patches[y, x] + scores.softmax(0) @ self.value(area)
        return out.flatten(0, 1)

    @torch.no_grad()
    def image(self, pixel_values: torch.Tensor, high_res: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of one image: the global one first, then the tiles row by row."""
        hidden = self.base.tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        count = int(hidden.shape[1] ** 0.5)
        patches = hidden.unflatten(1, (count, count))
        stages, x = [], self.aux.stem(high_res[None])
        for stage in self.aux.stages:
            x = stage(x)
            stages.append(x)
        size = stages[0].shape[-2:]
        cells = torch.cat([F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in stages], 1)[0]
        part = cells.shape[-1] // self.grid
        found = []
        if self.is_global:
            small = F.interpolate(cells[None], scale_factor=1 / self.grid, mode="bilinear", align_corners=False)[0]
            found.append(self.mined(patches[-1], small))
        for i in range(self.grid**2):
            row, column = divmod(i, self.grid)
            tile = cells[:, row * part : (row + 1) * part, column * part : (column + 1) * part]
            found.append(self.mined(patches[i], tile))
        return self.image_scale * self.base.projector(torch.cat(found))


def write(tiny, folder: Path, original: OriginalMGM, state: dict | None = None) -> tuple[Path, str]:
    source = tiny.write_original(folder / "source", original.base, original.state() if state is None else state)
    return source, str(tiny.write_tower(folder / "tower", original.base.tower))


@pytest.mark.parametrize(("grid", "llm"), [(1, "llama"), (2, "llama"), (1, "gemma")])
def test_mgm_computes_what_the_paper_says(tiny, tmp_path, grid, llm):
    original = OriginalMGM(tiny, grid, llm)
    source, tower = write(tiny, tmp_path, original)
    convert(source, tmp_path / "out", vision_tower=tower, template="vicuna_v1")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    vision = processor.image_processor(images=[picture], return_tensors="pt")
    assert vision["pixel_values"].shape[1] == (1 if grid == 1 else 5)
    assert vision["high_res_pixel_values"].shape[-1] == 64 * grid
    image = original.image(vision["pixel_values"][0], vision["high_res_pixel_values"][0])
    oracle = original.base.logits(BEFORE, image, AFTER)
    ids = torch.tensor([[*BEFORE, *[model.config.image_token_id] * len(image), *AFTER]])
    with torch.no_grad():
        ours = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **vision).logits[0]
    difference = float((ours[:, : oracle.shape[1]] - oracle).abs().max())
    assert difference < 5e-5 * float(oracle.abs().max()), difference


@pytest.mark.parametrize("llm", ["llama", "gemma"])
def test_mgm_returns_to_its_layout_bit_for_bit(tiny, tmp_path, llm):
    original = OriginalMGM(tiny, 2, llm)
    stored = original.state()
    if llm == "gemma":
        del stored["lm_head.weight"]  # tied, as the released 2B stores it
    source, tower = write(tiny, tmp_path, original, stored)
    convert(source, tmp_path / "hf", vision_tower=tower, template="vicuna_v1")
    convert(tmp_path / "hf", tmp_path / "back", to="original")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config == original.config
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(before), "the original code looks its mining weights up in the index"


def test_a_tied_head_that_was_stored_is_stored_again(tiny, tmp_path):
    original = OriginalMGM(tiny, 1, "gemma")
    state = original.state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    source, tower = write(tiny, tmp_path, original, state)
    report = convert(source, tmp_path / "hf", vision_tower=tower, template="vicuna_v1")
    assert report.dropped["lm_head.weight", "tied to the embedding"] == 1
    convert(tmp_path / "hf", tmp_path / "back", to="original")
    after = load_file(tmp_path / "back/model.safetensors")
    assert torch.equal(after["lm_head.weight"], state["lm_head.weight"])
    state["lm_head.weight"][0] += 1
    (tmp_path / "other").mkdir()
    other, _ = write(tiny, tmp_path / "other", original, state)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        convert(other, tmp_path / "out", vision_tower=tower, template="vicuna_v1")


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_a_second_tower_that_is_only_named_comes_from_its_folder(tiny, tmp_path, layout):
    original = OriginalMGM(tiny)
    state = {name: value for name, value in original.state().items() if "vision_tower_aux" not in name}
    source, tower = write(tiny, tmp_path, original, state)
    with pytest.raises(ValueError, match="--aux_tower"):
        convert(source, tmp_path / "out", vision_tower=tower)
    aux = tmp_path / "aux"
    aux.mkdir()
    if layout == "open_clip":
        saved = {f"visual.trunk.{name}": value for name, value in original.aux.state_dict().items()}
        torch.save(saved | {"logit_scale": torch.ones(())}, aux / "open_clip_pytorch_model.bin")
    else:
        whole, _ = write(tiny, tmp_path / "whole", original)
        convert(whole, tmp_path / "model", vision_tower=tower)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
        convnext = model.model.vision_tower_aux
        convnext.layernorm = nn.LayerNorm(DIMS[-1])  # what mining does not read, but a tower has
        convnext.save_pretrained(aux)
    convert(source, tmp_path / "out", vision_tower=tower, aux_tower=str(aux))
    written = load_file(tmp_path / "out/model.safetensors")
    name = "model.vision_tower_aux.encoder.stages.1.layers.1.pwconv1.weight"
    assert torch.equal(written[name], original.aux.state_dict()["stages.1.blocks.1.mlp.fc1.weight"])


def test_a_stage_one_file_of_mgm_brings_mining_and_towers(tiny, tmp_path):
    original = OriginalMGM(tiny)
    state = original.state()
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(original.config))
    trained = ("model.mm_projector", "model.vlm_uni", "model.vision_tower")
    torch.save({name: v for name, v in state.items() if name.startswith(trained)}, source / "mm_projector.bin")
    base = tmp_path / "base"
    original.base.llm.save_pretrained(base)
    original.base.tokenizer.save_pretrained(base)
    tower = str(tiny.write_tower(tmp_path / "tower", original.base.tower))
    convert(source, tmp_path / "out", base=base, vision_tower=tower)
    whole, _ = write(tiny, tmp_path / "whole", original)
    convert(whole, tmp_path / "expected", vision_tower=tower)
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_folder_of_mgm_keeps_its_names(tiny, tmp_path):
    source, tower = write(tiny, tmp_path, OriginalMGM(tiny, 2))
    convert(source, tmp_path / "hf", vision_tower=tower)
    convert(tmp_path / "hf", tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_map_that_does_not_fit_the_patches_is_refused(tiny, tmp_path):
    original = OriginalMGM(tiny)
    original.config["image_size_aux"] = 60
    source, tower = write(tiny, tmp_path, original)
    with pytest.raises(ValueError, match="high_res_size"):
        convert(source, tmp_path / "out", vision_tower=tower)


@pytest.mark.parametrize(
    "name", ["model.vlm_uni_val_projector.1.bias", "model.vision_tower_aux.vision_stem.0.weight", "model.norm.weight"]
)
def test_a_missing_weight_of_mgm_is_named(tiny, tmp_path, name):
    original = OriginalMGM(tiny)
    state = original.state()
    del state[name]
    source, tower = write(tiny, tmp_path, original, state)
    with pytest.raises(ValueError, match=r"lacks 1 weight|incomplete"):
        convert(source, tmp_path / "out", vision_tower=tower)
    assert not (tmp_path / "out").exists()
