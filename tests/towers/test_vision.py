"""The vision tower against Hugging Face's own forward pass, and against tokens removed by hand."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from cal_train.testing import TINY_TEXT_TOWERS, TINY_VISION_TOWERS
from cal_train.towers.vision import VisionTower, vision_encoder

WITH_CLASS_TOKEN = ["clip", "dinov2"]
BATCH = 3


def make_tower(kind="clip", **options):
    """A tower whose positions and class token are large enough that losing one would show."""
    encoder = vision_encoder(TINY_VISION_TOWERS[kind])
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if any(part in name for part in ("position", "class_embedding", "cls_token")):
                parameter.normal_()
            elif parameter.ndim > 1:
                parameter.mul_(4)  # attention that depends visibly on what is attended to
    return VisionTower(encoder, **options).eval()


def images(batch_size=BATCH):
    return torch.randn(batch_size, 3, 16, 16)


@torch.no_grad()
def reference(encoder, pixel_values):
    """Pooled output and patch tokens behind the last norm, from the class's own forward."""
    outputs = encoder(pixel_values=pixel_values)
    if encoder.config.model_type == "clip_vision_model":  # its last hidden state is not normed yet
        return outputs.pooler_output, encoder.post_layernorm(outputs.last_hidden_state)[:, 1:]
    skip = int(encoder.config.model_type == "dinov2")
    return outputs.pooler_output, outputs.last_hidden_state[:, skip:]


@pytest.mark.parametrize("kind", TINY_VISION_TOWERS)
def test_equals_the_hugging_face_class_when_nothing_special_is_on(kind):
    tower, pixels = make_tower(kind), images()
    pooled, patches, mixture = tower(pixels)
    expected_pooled, expected_patches = reference(tower.encoder, pixels)
    assert mixture is None
    torch.testing.assert_close(pooled, expected_pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(patches, expected_patches, rtol=0, atol=1e-6)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_activation_follows_the_configuration(act):
    config = CLIPConfig(
        vision_config={**TINY_VISION_TOWERS["clip"], "hidden_act": act, "initializer_factor": 3.0},
        text_config=TINY_TEXT_TOWERS["clip"],
    )
    whole, pixels = CLIPModel(config).eval(), images()
    other = "gelu" if act == "quick_gelu" else "quick_gelu"
    same, different = (
        VisionTower(vision_encoder({**TINY_VISION_TOWERS["clip"], "hidden_act": name})).eval() for name in (act, other)
    )
    with torch.no_grad():
        expected = whole.vision_model(pixels).pooler_output
        for tower in (same, different):
            tower.encoder.load_state_dict(whole.vision_model.state_dict())
        torch.testing.assert_close(same(pixels)[0], expected, rtol=0, atol=1e-6)
        assert (different(pixels)[0] - expected).abs().max() > 1e-3


def run_on_subset_by_hand(encoder, pixels, subset):
    """The class's layers, one by one, over the tokens of one image that are left."""
    embedded = encoder.embeddings(pixels)
    leading = 0 if encoder.config.model_type == "siglip_vision_model" else 1
    tokens = torch.stack([embedded[0, i] for i in [*range(leading), *(leading + p for p in subset)]]).unsqueeze(0)
    if encoder.config.model_type == "clip_vision_model":
        tokens = encoder.pre_layrnorm(tokens)
    layers = encoder.encoder.layer if encoder.config.model_type == "dinov2" else encoder.encoder.layers
    for layer in layers:
        tokens = layer(tokens, None)
    norm = encoder.layernorm if encoder.config.model_type == "dinov2" else encoder.post_layernorm
    tokens = norm(tokens)
    pooled = tokens[:, 0] if leading else encoder.head(tokens)
    return pooled, tokens[:, leading:]


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY_VISION_TOWERS)
def test_visible_patches_are_the_only_ones_in_the_encoder(kind):
    tower, pixels = make_tower(kind), images()
    visible = torch.tensor([[3, 0, 15, 7], [1, 2, 3, 4], [9, 8, 14, 0]])
    pooled, patches, _ = tower(pixels, visible)
    for i in range(BATCH):
        expected_pooled, expected_patches = run_on_subset_by_hand(tower.encoder, pixels[i : i + 1], visible[i].tolist())
        torch.testing.assert_close(pooled[i : i + 1], expected_pooled, rtol=0, atol=1e-5)
        torch.testing.assert_close(patches[i : i + 1], expected_patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TINY_VISION_TOWERS)
def test_hidden_patches_have_no_influence_and_no_gradient(kind):
    tower, pixels = make_tower(kind), images(1).requires_grad_()
    patches = tower(pixels, torch.tensor([[0, 5]]))[1]
    patches.pow(3).sum().backward()  # a plain sum behind a layer norm is constant
    gradient = pixels.grad.abs().sum(dim=(0, 1)).reshape(4, 4, 4, 4).sum(dim=(1, 3))  # per 4 x 4 pixel patch
    seen = torch.zeros(16, dtype=torch.bool)
    seen[[0, 5]] = True
    assert torch.equal(gradient.flatten() > 0, seen)


@torch.no_grad()
def test_all_patches_visible_in_another_order_gives_the_same_tokens_in_that_order():
    tower, pixels = make_tower(), images()
    order = torch.stack([torch.randperm(16) for _ in range(BATCH)])
    pooled, patches, _ = tower(pixels, order)
    plain_pooled, plain_patches, _ = tower(pixels)
    torch.testing.assert_close(pooled, plain_pooled, rtol=0, atol=1e-5)
    for i in range(BATCH):
        torch.testing.assert_close(patches[i], plain_patches[i, order[i]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (torch.zeros(BATCH, dtype=torch.int64), "shape"),
        (torch.zeros(BATCH + 1, 2, dtype=torch.int64), "shape"),
        (torch.zeros(BATCH, 0, dtype=torch.int64), "at least one"),
        (torch.zeros(BATCH, 16, dtype=torch.bool), "int64"),
    ],
)
def test_refuses_visible_patches_of_another_form(visible, message):
    with pytest.raises(ValueError, match=message):
        make_tower()(images(), visible)


@torch.no_grad()
def test_patch_dropout_is_the_same_as_choosing_these_patches():
    tower, pixels = make_tower(patch_dropout=0.25).train(), images(8)
    torch.manual_seed(5)
    pooled, patches, _ = tower(pixels)
    assert patches.shape == (8, 12, 32)
    torch.manual_seed(5)
    kept = torch.rand(8, 16).argsort(descending=True, dim=1)[:, :12].sort(dim=1).values
    expected = tower(pixels, kept)
    torch.testing.assert_close(patches, expected[1])
    torch.testing.assert_close(pooled, expected[0])
    assert len({tuple(row) for row in kept.tolist()}) > 1, "one draw per image"


@torch.no_grad()
def test_patch_dropout_replays_with_the_random_state_and_differs_without():
    tower, pixels = make_tower(patch_dropout=0.5).train(), images()
    state = torch.get_rng_state()
    first, second = tower(pixels)[0], tower(pixels)[0]
    torch.set_rng_state(state)
    assert torch.equal(tower(pixels)[0], first)
    assert not torch.allclose(first, second)


@torch.no_grad()
def test_patch_dropout_is_off_in_evaluation_and_for_chosen_patches():
    tower, pixels = make_tower(patch_dropout=0.5), images()
    assert tower(pixels)[1].shape[1] == 16
    assert tower.train()(pixels, torch.tensor([[0, 1, 2]] * BATCH))[1].shape[1] == 3


def test_patch_dropout_keeps_every_patch_equally_often():
    tower = make_tower(patch_dropout=0.75).train()
    first_patch_kept = 0
    for _ in range(30):
        pixels = images(32).requires_grad_()
        tower(pixels)[1].pow(3).sum().backward()
        first_patch_kept += int((pixels.grad[:, :, 0, 0].abs().sum(dim=1) > 0).sum())
    assert abs(first_patch_kept / (30 * 32) - 0.25) < 0.06  # more than four standard deviations


@torch.no_grad()
@pytest.mark.parametrize("kind", WITH_CLASS_TOKEN)
def test_one_mixture_token_is_the_class_token(kind):
    tower, pixels = make_tower(kind), images()
    one = VisionTower(tower.encoder, num_mixture_tokens=1).eval()
    pooled, patches, mixture = one(pixels)
    expected_pooled, expected_patches, none = tower(pixels)
    assert none is None and torch.equal(mixture[:, 0], pooled)
    assert torch.equal(pooled, expected_pooled) and torch.equal(patches, expected_patches)
    assert one.state_dict().keys() == tower.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("kind", WITH_CLASS_TOKEN)
def test_mixture_tokens_go_through_all_layers_each_with_its_position(kind):
    tower, pixels = make_tower(kind, num_mixture_tokens=3), images(1)
    encoder = tower.encoder
    embedded = encoder.embeddings(pixels)
    extra = (tower.extra_tokens + tower.extra_positions).unsqueeze(0)
    tokens = torch.cat([embedded[:, :1], extra, embedded[:, 1:]], dim=1)
    if kind == "clip":
        tokens = encoder.post_layernorm(encoder.encoder(encoder.pre_layrnorm(tokens)).last_hidden_state)
    else:
        tokens = encoder.layernorm(encoder.encoder(tokens).last_hidden_state)
    pooled, patches, mixture = tower(pixels)
    torch.testing.assert_close(mixture, tokens[:, :3], rtol=0, atol=1e-6)
    torch.testing.assert_close(patches, tokens[:, 3:], rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled, tokens[:, :3].mean(dim=1), rtol=0, atol=1e-6)
    assert not torch.allclose(mixture[:, 0], mixture[:, 1], atol=1e-2)


@pytest.mark.parametrize("kind", TINY_VISION_TOWERS)
def test_every_trainable_parameter_gets_a_gradient(kind):
    tower = make_tower(kind, num_mixture_tokens=0 if kind == "siglip" else 3).train()
    pooled, patches, _ = tower(images())
    (pooled.square().sum() + patches.square().sum()).backward()
    without = [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = [name for name, p in tower.named_parameters() if not p.requires_grad]
    assert frozen == (["encoder.embeddings.mask_token"] if kind == "dinov2" else [])


def test_a_headless_siglip_pools_the_mean_of_its_patches():
    tower = VisionTower(vision_encoder({**TINY_VISION_TOWERS["siglip"], "vision_use_head": False})).eval()
    pooled, patches, _ = tower(images())
    torch.testing.assert_close(pooled, patches.mean(dim=1))


@pytest.mark.parametrize("kind", TINY_VISION_TOWERS)
def test_activation_checkpointing_changes_neither_values_nor_gradients(kind):
    tower, pixels = make_tower(kind, patch_dropout=0.5).train(), images()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tower.encoder.activation_checkpointing_enable()
        tower.zero_grad()
        torch.manual_seed(3)
        tower(pixels)[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_keeps_fewer_activations():
    tower, pixels = make_tower().train(), images()

    def saved_by_layers():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            tower(pixels)[0].sum()
        return sum(sizes)

    plain = saved_by_layers()
    tower.encoder.activation_checkpointing_enable()
    assert saved_by_layers() < plain / 2


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY_VISION_TOWERS)
def test_a_folder_loads_at_another_size_with_the_class_s_own_interpolation(kind, tmp_path):
    tower = make_tower(kind)
    tower.encoder.save_pretrained(tmp_path)
    resized = VisionTower(vision_encoder(tmp_path, image_size=24)).eval()
    pixels = torch.randn(2, 3, 24, 24)
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    expected = tower.encoder(pixels, **options).pooler_output
    assert resized.encoder.config.image_size == 24
    torch.testing.assert_close(resized(pixels)[0], expected, rtol=0, atol=1e-5)


def test_of_a_dual_encoder_the_vision_half_is_taken(tmp_path):
    dual = CLIPModel(CLIPConfig(vision_config=TINY_VISION_TOWERS["clip"], text_config=TINY_TEXT_TOWERS["clip"])).eval()
    dual.save_pretrained(tmp_path)
    pixels = images()
    with torch.no_grad():
        pooled = VisionTower(vision_encoder(str(tmp_path))).eval()(pixels)[0]
        torch.testing.assert_close(pooled, dual.vision_model(pixels).pooler_output)


def test_refuses_images_of_another_size():
    with pytest.raises(ValueError, match="16 x 20 pixels came to a tower for 16 x 16"):
        make_tower()(torch.randn(1, 3, 16, 20))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("clip", {"patch_dropout": 1.0}, "patch_dropout"),
        ("clip", {"patch_dropout": -0.1}, "patch_dropout"),
        ("clip", {"num_mixture_tokens": -1}, "negative"),
        ("siglip", {"num_mixture_tokens": 4}, "class token"),
    ],
)
def test_refuses_options_that_do_not_fit(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make_tower(kind, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "vit"}, "unsupported: use one of clip_vision_model"),
        ({"hidden_size": 32}, "model_type None"),
        ({"model_type": "clip_vision_model", "hiden_size": 32}, "no field 'hiden_size'; did you mean hidden_size"),
        ({**TINY_VISION_TOWERS["clip"], "image_size": 18}, "not a multiple of the tower's patch size"),
    ],
)
def test_refuses_a_configuration_that_means_something_else(fields, message):
    with pytest.raises(ValueError, match=message):
        vision_encoder(fields)


def test_refuses_a_folder_that_lacks_weights(tmp_path):
    encoder = vision_encoder(TINY_VISION_TOWERS["clip"])
    state = {name: value for name, value in encoder.state_dict().items() if "layers.1.mlp" not in name}
    encoder.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 4 weights"):
        vision_encoder(tmp_path)
