"""Maps as the page's script reads them: bytes of attention, numbers of words, pictures as data URIs."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cal_train.evals.sight.values import SampleSight, is_readable

PICTURE_PX = 448


def map_records(
    sights: Sequence[SampleSight], pictures: dict[str, int], words: dict[str, int], clean: Callable[[str], str]
) -> list[dict[str, Any]]:
    """Return one record per model. N label tokens, M image tokens.

    Each record has ``views``, ``attention`` (base64 of N x M bytes, each row scaled so that its largest is 255),
    ``peaks`` and ``totals`` (N shares of all attention: of the strongest image token, of all), ``words`` (M numbers of
    words), ``legible`` (M, 1 where the word can be read), ``cosines`` (M) and ``readable`` (share).

    Args:
        sights: By model.
        pictures: Numbers of the pictures so far; is added to.
        words: Numbers of the words so far; is added to.
        clean: Makes a word from the vocabulary fit to be shown.
    """
    return [_record(sight, pictures, words, clean) for sight in sights]


def _record(
    sight: SampleSight, pictures: dict[str, int], words: dict[str, int], clean: Callable[[str], str]
) -> dict[str, Any]:
    peaks = sight.attention.max(1)
    scaled = sight.attention / np.where(peaks > 0, peaks, 1)[:, None]
    return {
        "views": [
            {
                "name": f"image {view.image + 1}, {view.name}" if sight.views[-1].image else view.name,
                "picture": pictures.setdefault(data_uri(view.picture), len(pictures)),
                "rows": view.tokens.shape[0],
                "columns": view.tokens.shape[1],
                "tokens": view.tokens.ravel().tolist(),
            }
            for view in sight.views
        ],
        "attention": base64.b64encode((scaled * 255).round().astype(np.uint8).tobytes()).decode(),
        "peaks": _rounded(peaks),
        "totals": _rounded(sight.attention.sum(1)),
        "words": [words.setdefault(clean(word), len(words)) for word in sight.words],
        "legible": [int(is_readable(word)) for word in sight.words],
        "cosines": np.round(sight.cosines.astype(np.float64), 2).tolist(),
        "readable": round(sight.share_readable, 3),
    }


def data_uri(picture: np.ndarray) -> str:
    """Return an RGB picture (height, width, 3) as a JPEG data URI of at most 448 px a side."""
    image = Image.fromarray(picture)
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values.astype(np.float64), 4).tolist()
