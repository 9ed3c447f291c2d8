"""Each method learns what it is for, on rendered scenes: coloured shapes in the four corners of a small image."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cal_train.objectives.families import build_objective
from cal_train.objectives.gather import ONE_RANK
from cal_train.objectives.sparc import word_patch_weights
from cal_train.objectives.sycoca import masks_of_scores, reconstruction_term
from cal_train.testing import tiny_two_tower
from cal_train.towers.outputs import TowerOutputs
from cal_train.train.tower_model import TowerModel, whole_step

pytestmark = pytest.mark.slow

COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]) * 2.0 - 1
SHAPES = torch.stack(
    [
        torch.ones(8, 8),  # square
        torch.ones(8, 8).tril(),  # triangle
        (torch.arange(8).view(-1, 1) // 2 % 2).expand(8, 8).float(),  # stripes
        ((torch.arange(8).view(-1, 1) - 3.5) ** 2 + (torch.arange(8) - 3.5) ** 2 < 12).float(),  # disc
    ]
)
BEGIN, END, FIRST_COLOUR, FIRST_SHAPE, FIRST_PLACE, FIRST_KIND = 1, 2, 3, 9, 13, 20


def scenes(batch_size: int, num_objects: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, 16, 16) and their objects (B, N, 3): colour, shape and corner, all different in an image.

    Single objects differ within the batch, corner included; so do colour and shape where 24 of them suffice.
    """
    if num_objects == 1:
        codes = torch.randperm(96, generator=generator)[:batch_size, None]
        kinds, corners = codes // 4, codes % 4
    else:
        corners = torch.rand(batch_size, 4, generator=generator).argsort(1)[:, :num_objects]
        kinds = torch.rand(batch_size, 24, generator=generator).argsort(1)[:, :num_objects]
        if batch_size * num_objects <= 24:
            kinds = torch.randperm(24, generator=generator)[: batch_size * num_objects].view(batch_size, -1)
    objects = torch.stack([kinds // 4, kinds % 4, corners], dim=2)
    images = torch.zeros(batch_size, 3, 16, 16)
    for row, things in enumerate(objects.tolist()):
        for colour, shape, corner in things:
            top, left = 8 * (corner // 2), 8 * (corner % 2)
            images[row, :, top : top + 8, left : left + 8] = COLOURS[colour].view(3, 1, 1) * SHAPES[shape]
    return images, objects


def place_captions(objects_BN3: Tensor) -> Tensor:
    """Return the words ``colour shape place`` of each object."""
    return (objects_BN3 + torch.tensor([FIRST_COLOUR, FIRST_SHAPE, FIRST_PLACE])).flatten(1)


def kind_captions(objects_BN3: Tensor) -> Tensor:
    """Return one word for each object."""
    return FIRST_KIND + 4 * objects_BN3[..., 0] + objects_BN3[..., 1]


def one_of_two_captions(objects_BN3: Tensor) -> Tensor:
    """Return ``colour shape`` of the first object: their order is random, so this is either caption of the image."""
    return objects_BN3[:, 0, :2] + torch.tensor([FIRST_COLOUR, FIRST_SHAPE])


@dataclass(frozen=True)
class Task:
    """What is drawn and what is told of it."""

    num_objects: int
    words: Callable[[Tensor], Tensor]
    batch_size: int = 32

    def draw(self, generator: torch.Generator, batch_size: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Return a batch and its objects."""
        images, objects = scenes(batch_size or self.batch_size, self.num_objects, generator)
        words = self.words(objects)
        ends = torch.ones(len(words), 1, dtype=torch.int64)
        ids = torch.cat([BEGIN * ends, words, END * ends], dim=1)
        return {"pixel_values": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, objects


RETRIEVAL = Task(1, place_captions)
GROUPING = Task(4, kind_captions)
TWO_CAPTIONS = Task(2, one_of_two_captions, batch_size=12)
PAINTING = Task(2, place_captions)


def train(
    task: Task, name: str, steps: int, tower_options: dict | None = None, has_positions: bool = True, **options
) -> TowerModel:
    """Train on fresh scenes; ``has_positions`` False makes sets of patches and words out of images and captions."""
    torch.manual_seed(0)
    towers = tiny_two_tower(**(tower_options or {}))
    if not has_positions:
        for name_of_table, table in towers.named_parameters():
            if "position_embedding" in name_of_table:
                torch.nn.init.zeros_(table.requires_grad_(False))
    model = TowerModel(towers, build_objective(name, towers.shape, {"embed_dim": 32, **options})).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch, _ = task.draw(generator)
        loss = model(whole_step, batch, ONE_RANK)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        model.objective.clamp_()
    return model


def encode(model: TowerModel, batch: dict[str, Tensor]) -> TowerOutputs:
    with torch.no_grad():
        return model.towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])


def in_batch_recall(model: TowerModel, task: Task, num_batches: int = 10) -> float:
    """Return the share of images whose own caption scores highest of the batch, over newly drawn scenes."""
    generator, hits = torch.Generator().manual_seed(99), []
    for _ in range(num_batches):
        batch, _ = task.draw(generator)
        outputs, objective = encode(model, batch), model.objective
        with torch.no_grad():
            scores = objective.score(objective.image_features(outputs), objective.text_features(outputs))
        hits.append((scores.argmax(1) == torch.arange(len(scores))).float().mean())
    return torch.stack(hits).mean().item()


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [("clip", 300, {}), ("siglip", 800, {"bias_init": "auto", "global_batch_size": RETRIEVAL.batch_size})],
)
def test_clip_and_siglip_find_the_caption_in_the_batch(name, steps, options):
    recall = in_batch_recall(train(RETRIEVAL, name, steps, **options), RETRIEVAL)
    print(f"{name}: in-batch R@1 {recall:.3f}")
    assert recall > 0.95


def mass_on_named_objects(patches: Tensor, tokens: Tensor, objects: Tensor) -> float:
    """Return how much of a word's patch weights lies on the corner of its object; chance is 1/4."""
    weights, _ = word_patch_weights(patches, tokens)
    grid = weights.unflatten(-1, (2, 2, 2, 2)).sum((-3, -1)).flatten(-2)  # (B, L, 4 corners)
    return grid[:, 1:-1].gather(2, objects[..., 2:]).mean().item()


def test_sparc_groups_the_patches_of_the_named_object():
    """Words and patches know no positions here, and lambda_g is twice lambda_f.

    The fine loss asks no more than that the words of a caption take different patches. With positions, word l may take
    patch l whatever the picture shows, and at this size it does; the global loss is what ties words to content.
    """
    batch, objects = GROUPING.draw(torch.Generator().manual_seed(99), 96)
    sets = {"tower_options": {"text": "bert", "text_pooling": "mean"}, "has_positions": False}
    heads = {"use_special_tokens": False, "special_token_ids": (BEGIN, END)}
    models = {
        "SPARC": train(GROUPING, "sparc", 200, **sets, **heads, contrastive_weight=2.0),
        "SPARC without the fine loss": train(GROUPING, "sparc", 200, **sets, **heads, fine_weight=0.0),
        "CLIP": train(GROUPING, "clip", 200, **sets),
    }
    masses = {}
    for name, model in models.items():
        outputs, head = encode(model, batch), model.objective
        patch_head, word_head = (
            (head.image_projection, head.text_projection)
            if name == "CLIP"
            else (head.patch_adapter, head.token_adapter)
        )
        with torch.no_grad():
            masses[name] = mass_on_named_objects(
                patch_head(outputs.patch_tokens), word_head(outputs.text_tokens), objects
            )
    print("mass of words on their object, chance 0.25:", {name: round(mass, 3) for name, mass in masses.items()})
    ours = masses.pop("SPARC")
    assert ours > 0.35 and ours > max(masses.values()) + 0.05


def test_llip_with_several_mixture_tokens_follows_the_caption():
    recalls = {}
    for num_tokens in (1, 8):
        model = train(
            TWO_CAPTIONS,
            "llip",
            1500,
            {"num_mixture_tokens": num_tokens},
            num_heads=4,
            temperature=1.0,
            init_scale=10.0,
            bias_init="auto",
            global_batch_size=TWO_CAPTIONS.batch_size,
        )
        recalls[num_tokens] = in_batch_recall(model, TWO_CAPTIONS, 30)
    print(f"in-batch R@1, one of two captions: K=1 {recalls[1]:.3f}, K=8 {recalls[8]:.3f}")
    assert recalls[8] > recalls[1] + 0.15


def test_sycoca_paints_what_the_caption_says():
    options = {"num_queries": 8, "decoder_layers": 1, "image_decoder_layers": 2, "num_heads": 4}
    model = train(PAINTING, "sycoca", 300, {"text_pooling": "cls_appended"}, **options)
    batch, _ = PAINTING.draw(torch.Generator().manual_seed(99), 96)
    sycoca, outputs = model.objective, encode(model, batch)
    _, high = masks_of_scores(sycoca.patch_scores(outputs), 0.5, 0.5)
    visible, hidden = (mask.nonzero()[:, 1].view(96, 8) for mask in (~high, high))
    target = batch["pixel_values"].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(96, 16, 48)
    target = target.gather(1, hidden[..., None].expand(-1, -1, 48))
    errors = {}
    with torch.no_grad():
        tokens = model.towers(pixel_values=batch["pixel_values"], visible_patches=visible).patch_tokens
        for name, order in (("own", torch.arange(96)), ("shuffled", torch.arange(96).roll(1))):
            painted = sycoca.image_decoder(
                tokens, visible, hidden, outputs.text_tokens[order], outputs.text_mask[order]
            )
            term = reconstruction_term(painted, target, normalize_target=True)
            errors[name] = (term.sum / term.weight).item()
    print(f"error of masked patches: own captions {errors['own']:.3f}, shuffled {errors['shuffled']:.3f}")
    assert errors["own"] < 0.8 * errors["shuffled"]
