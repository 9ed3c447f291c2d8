"""Maps against the model's own attention matrices in float64, brute-force cosines, and pictures with known patches."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Gemma2Config, LlavaForConditionalGeneration

from cal_train.data.images import image_inputs
from cal_train.evals.sight import attention as attention_module
from cal_train.evals.sight.attention import attention_to_image
from cal_train.evals.sight.nearest import nearest_rows, token_texts, word_rows
from cal_train.evals.sight.sample import sample_sight
from cal_train.evals.sight.values import is_readable
from cal_train.evals.sight.views import views_of
from cal_train.models.anyres import num_tiles
from cal_train.models.layout import build_config
from cal_train.models.mgm_family import TINY_HD
from cal_train.testing import tiny_configs, tiny_tokenizer, tiny_vlm

FAMILIES = [("llava", None), ("llava_next", None), ("mgm", None), ("mgm", TINY_HD)]


def noise(*sizes_hw, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes_hw]


def sample_of(model, processor, images):
    """Token ids with the images' placeholders in the middle, and the positions of six label tokens behind them."""
    _, counts = image_inputs(processor, images)
    head = processor.tokenizer.encode("what is in the image?", add_special_tokens=False)
    tail = processor.tokenizer.encode("a red square on a blue background", add_special_tokens=False)
    ids = [*head, *[model.config.image_token_id] * sum(counts), *tail]
    return np.array(ids), np.arange(len(ids) - 6, len(ids))


@torch.no_grad()
def all_attentions(model, processor, images, ids):
    """Every layer's whole attention matrix, by plain transformers in float64: (layers, H, S, S)."""
    model = model.double()
    model.set_attn_implementation("eager")
    inputs = {
        name: v.double() if v.is_floating_point() else v for name, v in image_inputs(processor, images)[0].items()
    }
    if "image_sizes" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"][None]  # as transformers' own model takes one image's tiles
    outputs = model(input_ids=torch.tensor(ids)[None], output_attentions=True, **inputs)
    return torch.stack([layer[0] for layer in outputs.attentions])


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_attention_is_what_the_whole_matrices_hold_at_the_predicting_positions(family, options, monkeypatch):
    monkeypatch.setattr(attention_module, "QUERIES_AT_ONCE", 7)  # so that queries fall into several blocks
    model, processor = tiny_vlm(family, family_options=options)
    model.eval()
    images = noise((40, 70))
    ids, positions = sample_of(model, processor, images)
    before = model.config.get_text_config()._attn_implementation
    sight = sample_sight(model, processor, images, ids, positions)
    assert model.config.get_text_config()._attn_implementation == before != "eager"
    one_layer = sample_sight(model, processor, images, ids, positions, [1]).attention
    matrices = all_attentions(model, processor, images, ids)
    is_image = ids == model.config.image_token_id
    expected = matrices.mean(1)[:, positions - 1][:, :, is_image].numpy()
    assert sight.attention.shape == (6, is_image.sum())
    np.testing.assert_allclose(sight.attention, expected.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(one_layer, expected[1], rtol=0, atol=1e-6)
    assert (sight.attention.sum(1) < 1).all() and sight.attention.std(0).max() > 1e-5


def test_a_capped_and_windowed_language_model_is_read_with_its_cap_and_windows():
    """Gemma-2: every other layer sees four tokens back only, and scores are capped before the softmax."""
    tokenizer = tiny_tokenizer()
    _, vision = tiny_configs(tokenizer)
    text = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=0.5, query_pre_attn_scalar=1,
        initializer_range=0.5,
    )  # fmt: skip
    processor = tiny_vlm("llava", tokenizer)[1]
    config = build_config("llava", text, vision, tokenizer.get_vocab()["<image>"], vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config).eval()
    images = noise((30, 30))
    ids, positions = sample_of(model, processor, images)
    found = [sample_sight(model, processor, images, ids, positions, [layer]).attention for layer in (0, 1)]
    is_image = ids == model.config.image_token_id
    expected = all_attentions(model, processor, images, ids).mean(1)[:, positions - 1][:, :, is_image].numpy()
    np.testing.assert_allclose(np.stack(found), expected, rtol=0, atol=1e-5)
    assert found[0][-1].max() == 0 < found[1][-1].min()  # out of the window's sight; in full sight


def test_only_blocks_of_attention_exist(monkeypatch):
    """The largest thing that the plain attention function is asked for is one block of queries."""
    import transformers.models.llama.modeling_llama as modeling

    sizes, plain = [], modeling.eager_attention_forward

    def watched(module, query, *args, **kwargs):
        sizes.append(query.shape[2])
        return plain(module, query, *args, **kwargs)

    monkeypatch.setattr(modeling, "eager_attention_forward", watched)
    monkeypatch.setattr(attention_module, "QUERIES_AT_ONCE", 16)
    model, processor = tiny_vlm("llava_next")
    images = noise((60, 60))
    ids, positions = sample_of(model.eval(), processor, images)
    sample_sight(model, processor, images, ids, positions)
    assert len(ids) > 32 and max(sizes) == 16 and sum(sizes) == 2 * len(ids)


def test_layers_that_are_not_there_are_named():
    model, _ = tiny_vlm("llava")
    empty = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="layers 1 to 2: the language model has layers 0 to 1"):
        attention_to_image(model, torch.zeros(1, 3, 32), empty, empty, [1, 2])
    with pytest.raises(ValueError, match="layers none"):
        attention_to_image(model, torch.zeros(1, 3, 32), empty, empty, [])


def test_another_number_of_image_tokens_than_was_scored_is_refused():
    model, processor = tiny_vlm("llava")
    ids, positions = sample_of(model, processor, noise((30, 30)))
    with pytest.raises(ValueError, match="the images take 8 tokens, but the scored sample has 4"):
        sample_sight(model.eval(), processor, noise((30, 30), (30, 30)), ids, positions)


def test_nearest_rows_are_those_of_brute_force_with_rows_left_out(monkeypatch):
    monkeypatch.setattr("cal_train.evals.sight.nearest.ROWS_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)
    embeds, table = torch.randn(11, 5, generator=generator), torch.randn(40, 5, generator=generator)
    table[3] = 0.0  # a row that was never trained may be zero
    is_word = torch.rand(40, generator=generator) < 0.7
    rows, cosines = nearest_rows(embeds, table, is_word)
    a, b = embeds.double().numpy(), table.double().numpy()
    for i in range(11):
        every = [
            a[i] @ b[v] / (np.linalg.norm(a[i]) * max(np.linalg.norm(b[v]), 1e-12)) if is_word[v] else -9
            for v in range(40)
        ]
        assert rows[i] == int(np.argmax(every)) and abs(cosines[i] - max(every)) < 1e-6
    with pytest.raises(ValueError, match="every token is special"):
        nearest_rows(embeds, table, torch.zeros(40, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace"])
def test_special_tokens_and_padding_rows_are_no_words_but_bytes_are(kind):
    tokenizer = tiny_tokenizer(kind)
    is_word = word_rows(tokenizer, len(tokenizer) + 5)
    vocabulary = tokenizer.get_vocab()
    assert not is_word[[vocabulary[mark] for mark in ("<image>", "<s>", "<|im_start|>")]].any()
    assert not is_word[len(tokenizer) :].any()
    byte = "<0x0A>" if kind == "metaspace" else "\u010a"
    assert is_word[vocabulary[byte]] and int(is_word.sum()) == len(tokenizer) - 14
    half_a_letter = vocabulary["<0xC3>" if kind == "metaspace" else "\u00c3"]
    assert token_texts(tokenizer, [half_a_letter]) == ["<0xC3>" if kind == "metaspace" else "\u00c3"]
    assert token_texts(tokenizer, [tokenizer.encode("a red")[-1]])[0].strip() == ("red" if kind == "bytelevel" else "d")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" drum", True),
        ("\u732b\u304c", True),
        ("ing", True),
        ("a", False),
        ("<0x0A>", False),
        ("\n", False),
        ("x2", False),
    ],
)
def test_a_readable_token_is_letters(text, expected):
    assert is_readable(text) is expected


def test_an_embedding_of_a_word_is_nearest_to_that_word():
    """The oracle is a model whose projector is made to answer with the row of one token."""
    model, processor = tiny_vlm("llava")
    token = processor.tokenizer.encode(" square", add_special_tokens=False)[-1]
    projector = model.model.multi_modal_projector
    torch.nn.init.zeros_(projector.linear_2.weight)
    with torch.no_grad():
        projector.linear_2.bias.copy_(3.0 * model.get_input_embeddings().weight[token])
    ids, positions = sample_of(model, processor, noise((30, 30)))
    sight = sample_sight(model.eval(), processor, noise((30, 30)), ids, positions)
    assert sight.words == tuple(token_texts(processor.tokenizer, [token])) * 4
    np.testing.assert_allclose(sight.cosines, 1.0, atol=1e-6)


def marked(height, width, y, x):
    """A black image with one white point region, given in relative coordinates."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[int((y - 0.04) * height) : int((y + 0.04) * height), int((x - 0.04) * width) : int((x + 0.04) * width)] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("family", "options"), FAMILIES)
@pytest.mark.parametrize("shape", [(200, 200), (120, 300)])
@pytest.mark.parametrize("where", [(0.3, 0.4), (0.8, 0.7)])
def test_the_token_drawn_over_a_mark_is_the_token_that_the_mark_changes(family, options, shape, where):
    """Oracle: one number per patch in the place of its features, packed by the model: it differs from black, or not."""
    model, processor = tiny_vlm(family, family_options=options)
    images = [Image.new("RGB", (50, 90)), marked(*shape, *where)]
    inputs, counts = image_inputs(processor, images)
    views = [view for view in views_of(model, processor, inputs, counts) if view.image == 1]
    assert [view.name for view in views] == (["whole", "tiles"] if family == "llava_next" or options else ["whole"])
    covered = [views[k].tokens[views[k].tokens >= 0] for k in range(len(views))]
    newlines = views[-1].tokens.shape[0] if family == "llava_next" else 0
    assert sorted(np.concatenate(covered)) == sorted(set(np.concatenate(covered)))
    assert sum(map(len, covered)) + newlines == counts[1] and min(map(min, covered)) == counts[0]
    for view in views:
        assert view.picture.shape[0] % view.tokens.shape[0] == 0 and view.picture.dtype == np.uint8
        assert patches_of(view).max() > 100  # the mark is in the picture
    changed = changed_tokens(model, processor, images)
    assert changed and changed <= bright_tokens(views)
    assert len(bright_tokens(views)) < sum(map(len, covered))


def patches_of(view):
    """(rows, height, columns, width, 3) of the picture."""
    rows, columns = view.tokens.shape
    height, width, _ = view.picture.shape
    return view.picture.astype(float).reshape(rows, height // rows, columns, width // columns, 3)


def bright_tokens(views):
    return {
        int(token)
        for view in views
        for token, bright in zip(view.tokens.ravel(), patches_of(view).max((1, 3, 4)).ravel(), strict=True)
        if bright > 0 and token >= 0
    }


def changed_tokens(model, processor, images):
    """Which image tokens change when the second image turns black, if every patch sees only itself."""

    def values(images):
        inputs, _ = image_inputs(processor, images)
        pixels = inputs["pixel_values"]
        tiles = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
        patch = model.config.vision_config.patch_size
        means = torch.nn.functional.avg_pool2d(tiles, patch).mean(1).flatten(1)  # (tiles, P): one number a patch
        if "image_sizes" not in inputs:
            return means.flatten()
        sizes = inputs["image_sizes"].tolist()
        side, pinpoints = model.config.vision_config.image_size, model.config.image_grid_pinpoints
        parts = means[..., None].split([num_tiles(size, pinpoints, side) for size in sizes])
        newline = torch.full((1,), -7.0)
        return torch.cat(model.model.pack_image_features(parts, sizes, "default", newline)[0])[:, 0]

    black = [images[0], Image.new("RGB", images[1].size)]
    return set((values(images) != values(black)).nonzero()[:, 0].tolist())
