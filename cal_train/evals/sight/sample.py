"""Everything that the maps of one sample need, from its images and the token ids that were scored."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from cal_train.data.images import image_inputs
from cal_train.evals.sight.attention import attention_to_image
from cal_train.evals.sight.nearest import nearest_rows, token_texts, word_rows
from cal_train.evals.sight.values import SampleSight
from cal_train.evals.sight.views import views_of
from cal_train.models.head import Head
from cal_train.train.step import StepOptions, embed


@torch.no_grad()
def sample_sight(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    input_ids: np.ndarray,
    positions: np.ndarray,
    layers: Sequence[int] | None = None,
) -> SampleSight:
    """Return where the model looks for each label token of a sample, and what its image tokens are nearest to.

    Args:
        model: The VLM, in eval mode.
        processor: Of the model.
        images: The sample's, PIL RGB.
        input_ids: (S,), image placeholders expanded.
        positions: (N,) places of the label tokens in them; each is predicted from the place before it.
        layers: Whose attention is averaged. Default: all.

    Raises:
        ValueError: If the images take more or fewer tokens than there are placeholders, or as `attention_to_image` and
            `views_of`.
    """
    inputs, counts = image_inputs(processor, images)
    ids_1S = torch.as_tensor(input_ids, device=model.device)[None]
    is_image_1S = ids_1S == model.config.image_token_id
    if sum(counts) != int(is_image_1S.sum()):
        raise ValueError(
            f"the images take {sum(counts)} tokens, but the scored sample has {int(is_image_1S.sum())}: the model "
            "or the images are not those that were scored"
        )
    on_device = {name: value.to(model.device) for name, value in inputs.items()}
    embeds_1SD = embed(model, ids_1S, on_device, is_image_1S, StepOptions(Head()))
    queries_N = torch.as_tensor(positions, device=model.device) - 1
    attention_NM = attention_to_image(model, embeds_1SD, queries_N, is_image_1S[0].nonzero()[:, 0], layers)
    table_VD = cast(torch.Tensor, model.get_input_embeddings().weight)
    tokenizer = processor.tokenizer
    rows_M, cosines_M = nearest_rows(embeds_1SD[is_image_1S], table_VD, word_rows(tokenizer, len(table_VD)))
    return SampleSight(
        views_of(model, processor, inputs, counts),
        attention_NM.cpu().numpy(),
        tuple(token_texts(tokenizer, rows_M.tolist())),
        cosines_M.cpu().numpy(),
    )
