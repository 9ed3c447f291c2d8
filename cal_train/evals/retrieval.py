"""Image-text retrieval with one or several captions per image.

Definition of the papers (CLIP, SigLIP, CoCa): of image to text, a hit is *any* of the image's captions among the first
k texts; of text to image, a hit is the caption's image among the first k images. COCO: 5,000 images, 25,010 texts;
Flickr30k: 1,000 images, 5,000 texts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cal_train.evals.score_tiles import Features, Score, num_rows, score_tiles


def retrieval_recall(
    images: Features,
    texts: Features,
    image_of_text: Tensor,
    score: Score,
    ks: Sequence[int] = (1, 5, 10),
    tile_size: tuple[int, int] = (256, 1024),
) -> dict[str, float]:
    """Return recall at k in both directions.

    Args:
        images: Features of I images.
        texts: Features of T texts.
        image_of_text: Number of each text's image, (T,) int64. Sorted is fastest: each tile is then computed once.
        score: Scores of a tile. For Llip's shortlist, ``partial(objective.shortlist_score, num_candidates=n)`` with
            one tile over everything: a pair outside of the shortlist scores minus infinity and is a miss.
        ks: Which recalls.
        tile_size: Images and texts of a tile; the scores of one tile are all that is held.

    Returns:
        ``image_to_text/recall@k`` and ``text_to_image/recall@k``, shares in [0, 1].

    Raises:
        ValueError: If an image has no text, or numbers and features do not fit.
    """
    image_rank, text_rank = retrieval_ranks(images, texts, image_of_text, score, tile_size)
    both = {"image_to_text": image_rank, "text_to_image": text_rank}
    return {f"{name}/recall@{k}": (rank < k).double().mean().item() for name, rank in both.items() for k in ks}


def retrieval_ranks(
    images: Features, texts: Features, image_of_text: Tensor, score: Score, tile_size: tuple[int, int] = (256, 1024)
) -> tuple[Tensor, Tensor]:
    """Return how many wrong candidates come before the right one.

    A wrong candidate with exactly the score of the right one comes first: a model that scores everything alike has no
    hits. Tiles with right pairs are computed twice, the same way, so that equal scores stay equal.

    Returns:
        Of every image the wrong texts before its best caption, (I,) int64, and of every text the wrong images before
        its own, (T,) int64. 0 is a hit at 1.

    Raises:
        ValueError: If an image has no text, or numbers and features do not fit.
    """
    num_images, num_texts = num_rows(images), num_rows(texts)
    _check_owners(image_of_text, num_images, num_texts)
    device = next(iter(images.values())).device
    owners = image_of_text.to(device)
    best_I, own_T = _right_scores(images, texts, owners, score, tile_size)
    image_rank_I = torch.zeros(num_images, dtype=torch.int64, device=device)
    text_rank_T = torch.zeros(num_texts, dtype=torch.int64, device=device)
    for tile in score_tiles(images, texts, score, tile_size):
        rows, columns, is_wrong = _places(tile.scores, tile.first_image, tile.first_text, owners)
        image_rank_I[rows] += ((tile.scores >= best_I[rows, None]) & is_wrong).sum(1)
        text_rank_T[columns] += ((tile.scores >= own_T[columns]) & is_wrong).sum(0)
    return image_rank_I.cpu(), text_rank_T.cpu()


def _right_scores(
    images: Features, texts: Features, owners: Tensor, score: Score, tile_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return every image's best score with a caption of its own (I,), and every text's with its image (T,)."""
    owner_list = owners.cpu()

    def holds_right_pair(i: int, i_end: int, t: int, t_end: int) -> bool:
        inside = owner_list[t:t_end]
        return bool(((inside >= i) & (inside < i_end)).any())

    best_I = own_T = torch.empty(0)
    for tile in score_tiles(images, texts, score, tile_size, wanted=holds_right_pair):
        if not best_I.numel():
            best_I = tile.scores.new_full((num_rows(images),), -torch.inf)
            own_T = tile.scores.new_full((num_rows(texts),), -torch.inf)
        rows, columns, is_wrong = _places(tile.scores, tile.first_image, tile.first_text, owners)
        right = tile.scores.masked_fill(is_wrong, -torch.inf)
        best_I[rows] = torch.maximum(best_I[rows], right.amax(1))
        own_T[columns] = torch.maximum(own_T[columns], right.amax(0))
    return best_I, own_T


def _places(scores: Tensor, first_image: int, first_text: int, owners: Tensor) -> tuple[slice, slice, Tensor]:
    rows = slice(first_image, first_image + scores.shape[0])
    columns = slice(first_text, first_text + scores.shape[1])
    numbers = torch.arange(rows.start, rows.stop, device=owners.device)
    return rows, columns, owners[columns][None] != numbers[:, None]


def _check_owners(image_of_text: Tensor, num_images: int, num_texts: int) -> None:
    if image_of_text.shape != (num_texts,):
        raise ValueError(f"image_of_text {tuple(image_of_text.shape)} does not match {num_texts} texts")
    if num_texts and (image_of_text.min() < 0 or image_of_text.max() >= num_images):
        raise ValueError(f"image_of_text has numbers outside of the {num_images} images")
    without = torch.bincount(image_of_text, minlength=num_images) == 0
    if without.any():
        raise ValueError(f"image {int(without.nonzero()[0])} has no text ({int(without.sum())} such images)")
