"""The training step: embed, forward without the image, forward with it, weights, loss - in one root forward.

Both passes and the loss run inside a single call of the (wrapped) model. That is what makes one piece of code right
under DDP, ZeRO-1/2/3 and FSDP2, which gather and reshard parameters around the root's forward.

A row holds one sample, or several where the batch has ``segment_ids`` and ``position_ids`` (`cal_train.data.packing`).
Weights are made per sample and place in the sample, so that they do not depend on which samples share a row.

B rows, S positions, N scored or label tokens, R rows with an image, V vocabulary, D width; P samples (B, if nothing is
packed), T = longest sample - 1 shifted places.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cal_train.cal.ablation import mask_images, remove_images
from cal_train.cal.strategies import TokenWeighting, normalize, token_weights
from cal_train.data.collate import DELTA_BITS
from cal_train.models.families import family_of
from cal_train.models.head import Head, open_head, output_head
from cal_train.train.attention import check_packing, decode_packed
from cal_train.train.metrics import Stopwatch
from cal_train.train.targets import Layout, Targets, every_position, label_tokens, layout_of

Batch = dict[str, Any]


@dataclass(frozen=True)
class StepOptions:
    """What a step needs to know besides the batch."""

    head: Head
    weighting: TokenWeighting | None = None
    """None is plain training: every weight is 1."""
    is_sharded: bool = False
    """Parameters are split over ranks (ZeRO-3, FSDP2): every rank must run the same modules in every step."""
    has_cached_features: bool = False
    """Batches bring the features of the tower, which itself never runs."""
    ablated_clock: Stopwatch | None = None
    """Measures the pass without images."""
    has_stored_deltas: bool = False
    """Batches bring the deltas of their labels, so that no pass without images runs."""


def attach_step(model: PreTrainedModel) -> None:
    """Teach the model's root forward the call ``model(step=StepOptions, **batch)``; plain calls stay as they were."""
    open_head(model)
    plain_forward = model.forward

    def forward(*args: Any, step: StepOptions | None = None, **kwargs: Any) -> Any:
        return plain_forward(*args, **kwargs) if step is None else run_step(model, kwargs, step)

    model.forward = forward


def run_step(model: PreTrainedModel, batch: Batch, options: StepOptions) -> dict[str, Tensor]:
    """Return the weighted loss sum of a micro-batch and how its label tokens were weighted.

    Args:
        model: The VLM itself (this runs inside its forward).
        batch: ``input_ids``, ``attention_mask``, ``labels`` (B, S), of packed rows ``segment_ids`` and
            ``position_ids`` (B, S), stored deltas if there are any (`cal_train.data.collate.DELTA_BITS`), and the
            family's vision inputs or ``vision_features``.
        options: Head, weighting and what the engine asks for.

    Returns:
        ``loss_sum`` (sum of w * CE, with gradient) and ``weight_sum`` after normalisation. With an ablated pass also
        ``logit_with``, ``logit_without``, ``delta`` and ``weight`` (before normalisation), each (N,) over label tokens,
        sample by sample; with stored deltas the last two.
    """
    layout = layout_of(batch)
    labels = label_tokens(batch["labels"], layout)
    grid = layout.grid()
    if layout.segment_ids is not None:
        check_packing(family_of(model).language_model(model).config, options.weighting, grid[1])
    image_mask_BS = batch["input_ids"] == model.config.image_token_id
    embeds_BSD = embed(model, batch["input_ids"], batch, image_mask_BS, options)

    weighting = options.weighting
    stored = stored_contrast(weighting, batch, grid, labels) if options.has_stored_deltas and weighting else None
    contrasting = weighting if weighting is not None and weighting.ablation is not None and stored is None else None
    if contrasting is not None:
        scored = labels if contrasting.scope == "labels" else every_position(batch["labels"], layout)
        with options.ablated_clock or contextlib.nullcontext():
            without_N, is_ablated_N = logits_without_image(
                model, embeds_BSD, layout, image_mask_BS, scored, contrasting, options
            )

    hidden_BSD = decode(model, embeds_BSD, *layout)
    score_hidden_BSD = hidden_BSD.detach()
    if contrasting is not None and has_dropout(model):
        with torch.no_grad(), dropout_off(model):
            score_hidden_BSD = decode(model, embeds_BSD.detach(), *layout)

    def weigh_and_lose(label_hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> dict[str, Tensor]:
        weight_N, report = torch.ones(len(labels.ids), device=label_hidden_ND.device), {}
        if stored is not None:
            weight_N, report = stored["weight"], stored
        elif contrasting is not None:
            score_hidden_ND = score_hidden_BSD[scored.rows, scored.positions - 1]
            with_N = options.head.target_logits(score_hidden_ND, weight_VD, bias_V, scored.ids)
            no_image_N = torch.where(is_ablated_N, without_N, with_N)
            report = contrast(contrasting, grid, labels, scored, with_N, no_image_N)
            weight_N = report["weight"]
        scale_N = weight_N if weighting is None else normalize(weighting, weight_N, labels.samples, grid[0])
        loss_sum = options.head.loss_sum(label_hidden_ND, weight_VD, bias_V, labels.ids, scale_N)
        return {"loss_sum": loss_sum, "weight_sum": scale_N.sum(), **report}

    return output_head(model)(hidden_BSD[labels.rows, labels.positions - 1], inside=weigh_and_lose)


@torch.no_grad()
def contrast(
    weighting: TokenWeighting,
    grid: tuple[int, int],
    labels: Targets,
    scored: Targets,
    with_N: Tensor,
    without_N: Tensor,
) -> dict[str, Tensor]:
    """Return logits with and without the image, their difference and the weight, each (N,) over the label tokens.

    ``grid`` is the number of samples and the length of the longest (`Layout.grid`).
    """
    with_PT, without_PT = torch.zeros(2, grid[0], grid[1] - 1, device=with_N.device)
    label_mask_PT = torch.zeros_like(with_PT, dtype=torch.bool)
    with_PT[scored.samples, scored.places - 1] = with_N.float()
    without_PT[scored.samples, scored.places - 1] = without_N.float()
    label_mask_PT[labels.samples, labels.places - 1] = True
    delta_PT = with_PT - without_PT
    return {
        "logit_with": with_PT[label_mask_PT],
        "logit_without": without_PT[label_mask_PT],
        "delta": delta_PT[label_mask_PT],
        "weight": token_weights(weighting, delta_PT, label_mask_PT),
    }


@torch.no_grad()
def stored_contrast(
    weighting: TokenWeighting, batch: Batch, grid: tuple[int, int], labels: Targets
) -> dict[str, Tensor]:
    """Return ``delta`` and ``weight`` (N,) of the label tokens from the deltas that a batch brings.

    Raises:
        ValueError: If a batch with labels brings none (one whose rows were all dropped has neither).
    """
    bits_BS = batch.get(DELTA_BITS)
    if bits_BS is None and len(labels.ids):
        raise ValueError("the batch has labels but no stored deltas: its data set reads none")
    delta_N = torch.zeros(0, device=labels.ids.device)
    if bits_BS is not None:
        delta_N = bits_BS.view(torch.float32)[labels.rows, labels.positions]
    delta_PT = torch.zeros(grid[0], grid[1] - 1, device=labels.ids.device)
    label_mask_PT = torch.zeros_like(delta_PT, dtype=torch.bool)
    delta_PT[labels.samples, labels.places - 1] = delta_N
    label_mask_PT[labels.samples, labels.places - 1] = True
    return {"delta": delta_N, "weight": token_weights(weighting, delta_PT, label_mask_PT)}


def embed(
    model: PreTrainedModel, input_ids_BS: Tensor, batch: Batch, image_mask_BS: Tensor, options: StepOptions
) -> Tensor:
    """Return the input embeddings (B, S, D) with the image embeddings in the place of the image tokens.

    Args:
        model: The VLM.
        input_ids_BS: Token ids with expanded image placeholders.
        batch: May hold the family's ``VISION_INPUTS``, or ``vision_features`` from the cache.
        image_mask_BS: True at image placeholders.
        options: Of the step.

    Raises:
        ValueError: If the images make more or fewer embeddings than there are placeholders.
    """
    family = family_of(model)
    embeds_BSD = model.get_input_embeddings()(input_ids_BS)
    images = {name: batch[name] for name in family.VISION_INPUTS if batch.get(name) is not None}
    features = batch.get("vision_features")
    if features is None and images:
        features = family.vision_features(model, images)
    if features is None:
        idle = idle_vision(model, options)
        return embeds_BSD if idle is None else embeds_BSD + idle.to(embeds_BSD.dtype)
    image_embeds = family.image_embeds(model, features, images).to(embeds_BSD.dtype)
    if len(image_embeds) != int(image_mask_BS.sum()):
        raise ValueError(
            f"the images make {len(image_embeds)} embeddings but the batch has {int(image_mask_BS.sum())} image "
            "tokens: the processor's patch_size or select strategy does not fit the vision tower"
        )
    return embeds_BSD.masked_scatter(image_mask_BS[..., None], image_embeds)


def idle_vision(model: PreTrainedModel, options: StepOptions) -> Tensor | None:
    """Return a zero in which every part that only images reach has a share, or None where nothing needs it.

    Added to a batch without images, it gives every trained parameter a gradient (of 0) in every step, whichever rows a
    rank has drawn. Where parameters are sharded, a blank image also takes all of those parts through the collectives
    of the other ranks; elsewhere no image is run.
    """
    family = family_of(model)
    if options.is_sharded:
        images = family.blank_images(model)
        has_cache = options.has_cached_features
        features = family.blank_features(model) if has_cache else family.vision_features(model, images)
        return 0.0 * family.image_embeds(model, features, images).sum()
    trained = [parameter for parameter in family.vision_parameters(model) if parameter.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return None
    return 0.0 * torch.stack([parameter.flatten()[0].float() for parameter in trained]).sum()


@torch.no_grad()
def logits_without_image(
    model: PreTrainedModel,
    embeds_BSD: Tensor,
    layout: Layout,
    image_mask_BS: Tensor,
    scored: Targets,
    weighting: TokenWeighting,
    options: StepOptions,
) -> tuple[Tensor, Tensor]:
    """Return each target's logit when the image is taken away, and whether there was anything to take away.

    Samples without an image are not run again: nothing changes for them (with ``mask``, they run where they share a row
    with others). With ``remove``, a target that follows an image
    is predicted from the last text token before it; where no text precedes, there is nothing to compare with.

    Returns:
        Logits (N,), and a mask (N,) that is False where the logit with the image holds as it is.
    """
    is_image_sample_P = layout.has_any(image_mask_BS)
    rows_R = image_mask_BS.any(1).nonzero()[:, 0]
    if len(rows_R) == 0:
        if not options.is_sharded:
            return torch.zeros(len(scored.ids), device=embeds_BSD.device), is_image_sample_P[scored.samples]
        rows_R = rows_R.new_zeros(1)  # every rank runs the same modules, so any row will do
    elif layout.segment_ids is not None and weighting.ablation == "remove":
        is_run_BS = torch.nn.functional.pad(is_image_sample_P, (1, 0))[layout.segment_ids]
        layout = layout._replace(attention_mask=layout.attention_mask * is_run_BS)
    with dropout_off(model):
        hidden_RKD, source_RS = ablated_states(
            model, embeds_BSD[rows_R], layout.take(rows_R), image_mask_BS[rows_R], weighting
        )
    index_of_row_B = torch.zeros(len(image_mask_BS), dtype=torch.long, device=rows_R.device)
    index_of_row_B[rows_R] = torch.arange(len(rows_R), device=rows_R.device)
    row_N = index_of_row_B[scored.rows]
    source_N = source_RS[row_N, scored.positions - 1]
    logits_N = output_head(model)(
        hidden_RKD[row_N, source_N.clamp_min(0)],
        inside=lambda hidden, weight, bias: options.head.target_logits(hidden, weight, bias, scored.ids),
    )
    return logits_N, is_image_sample_P[scored.samples] & (source_N >= 0)


def ablated_states(
    model: PreTrainedModel, embeds_RSD: Tensor, layout: Layout, image_mask_RS: Tensor, weighting: TokenWeighting
) -> tuple[Tensor, Tensor]:
    """Return hidden states without the image, (R, K, D), and which of the K stands for each position, (R, S) or -1."""
    if weighting.ablation == "remove":
        text = remove_images(embeds_RSD, layout.attention_mask, image_mask_RS, layout.position_ids, layout.segment_ids)
        hidden_RKD = decode(model, text.inputs_embeds, text.attention_mask, text.position_ids, text.segment_ids)
        return hidden_RKD, text.last_kept
    hidden_keys_RS = mask_images(layout.attention_mask, image_mask_RS)
    hidden_RSD = decode(model, embeds_RSD, hidden_keys_RS, layout.position_ids, layout.segment_ids)
    return hidden_RSD, torch.arange(embeds_RSD.shape[1], device=embeds_RSD.device).expand(embeds_RSD.shape[:2])


def decode(
    model: PreTrainedModel,
    embeds_BSD: Tensor,
    attention_mask_BS: Tensor,
    position_ids_BS: Tensor | None = None,
    segment_ids_BS: Tensor | None = None,
) -> Tensor:
    """Run the language model without its head; return the last hidden states (B, S, D)."""
    language_model = family_of(model).language_model(model)
    if segment_ids_BS is not None and position_ids_BS is not None:
        return decode_packed(language_model, embeds_BSD, attention_mask_BS, position_ids_BS, segment_ids_BS)
    return language_model(
        inputs_embeds=embeds_BSD,
        attention_mask=attention_mask_BS,
        position_ids=position_ids_BS,
        use_cache=False,
    ).last_hidden_state


def has_dropout(model: PreTrainedModel) -> bool:
    """Return whether the language model drops anything in its present mode (LoRA dropout, attention dropout)."""
    decoder = family_of(model).language_model(model)
    attention_dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0) or 0.0
    return decoder.training and (
        attention_dropout > 0 or any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in decoder.modules())
    )


@contextlib.contextmanager
def dropout_off(model: PreTrainedModel) -> Iterator[None]:
    """Put the language model into eval mode and back: scores with dropout on would be noise."""
    training = [m for m in family_of(model).language_model(model).modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
