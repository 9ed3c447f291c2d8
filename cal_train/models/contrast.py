"""Visual contrastive decoding: generate what the image makes likelier, CAL's idea at the time of the answer.

The logits of the next token become (1 + alpha) * with image - alpha * without, among the tokens whose probability with
the image is at least beta times that of the likeliest (equations 3 and 4). Differs from the paper, whose second pass
sees a noised image: here its tokens are taken away and the text keeps its positions, as in CAL's own second pass
(`cal_train.cal.ablation`; masking them as keys gives the same logits).

R rows of a batch that have an image, K text tokens of a prompt, V vocabulary.

Source: Leng et al. 2023, arXiv:2311.16922.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel


def check_contrast(alpha: float, beta: float) -> None:
    """Refuse settings that are none.

    Raises:
        ValueError: Naming the value.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"vcd_alpha {alpha}: give 0 (plain decoding) or more; the paper uses 1")
    if not 0 <= beta <= 1:
        raise ValueError(
            f"vcd_beta {beta} is not between 0 (any token) and 1 (the likeliest alone); the paper uses 0.1"
        )


def without_images(input_ids_BS: Tensor, attention_mask_BS: Tensor, image_token_id: int) -> dict[str, Tensor]:
    """Return prompts with their image tokens taken away and every other token at its position, padded on the left.

    Args:
        input_ids_BS: Prompts with expanded image placeholders, padded on the left.
        attention_mask_BS: 1 for tokens, 0 for padding.
        image_token_id: Of the placeholders.

    Returns:
        ``input_ids``, ``attention_mask`` and ``position_ids``, (B, K) each, as ``generate`` and the model take them.
    """
    is_text_BS = attention_mask_BS.bool() & (input_ids_BS != image_token_id)
    num_text_B1 = is_text_BS.sum(1, keepdim=True)
    width = max(int(num_text_B1.max()), 1)
    # a stable sort moves what is kept to the end without changing its order
    kept_BK = torch.argsort(is_text_BS.to(torch.int8), dim=1, stable=True)[:, -width:]
    mask_BK = (torch.arange(width, device=input_ids_BS.device) >= width - num_text_B1).long()
    positions_BS = (attention_mask_BS.cumsum(1) - 1).clamp_min(0)
    return {
        # what fills the places before a shorter prompt is hidden, but must be no image token
        "input_ids": input_ids_BS.gather(1, kept_BK).masked_fill(mask_BK == 0, 0),
        "attention_mask": mask_BK,
        "position_ids": positions_BS.gather(1, kept_BK) * mask_BK,
    }


class ImageContrast(LogitsProcessor):
    """Contrast of one call of ``generate``: pass it in ``logits_processor``, and make a new one for the next call.

    Greedy, sampled and beam decoding, several sequences per prompt, prompts of several lengths padded on the left. Rows
    without an image, or without any text, are decoded as they are. The second pass has a cache of its own over the text
    alone. Scores of contrasted rows are normalised log-probabilities, so that beams can be compared.

    Args:
        model: LLaVA, LLaVA-NeXT or MGM, in eval mode.
        inputs: What ``generate`` gets: ``input_ids`` and ``attention_mask`` (B, S), padded on the left.
        alpha: Strength; 0 leaves every score as it is and runs no second pass.
        beta: Share of the largest probability that a token must have.

    Raises:
        ValueError: If alpha or beta is out of range.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], alpha: float = 1.0, beta: float = 0.1):
        check_contrast(alpha, beta)
        self.model: Any = model
        self.alpha = alpha
        self.log_beta = math.log(beta) if beta > 0 else -math.inf
        self.prompt_ids, self.prompt_mask = inputs["input_ids"], inputs["attention_mask"]
        is_image_BS = self.prompt_ids == self.model.config.image_token_id
        self.is_contrasted = is_image_BS.any(1) & (self.prompt_mask.bool() & ~is_image_BS).any(1)
        self.seen_ids: Tensor | None = None
        self.cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (rows, V) of the next token.

        Args:
            input_ids: Everything so far, (rows, length).
            scores: Logits or log-probabilities with the image.

        Raises:
            ValueError: If the call is not the next step of the generation that this object was made for.
        """
        if self.alpha == 0 or not self.is_contrasted.any():
            return scores
        without_RV = self._start(input_ids) if self.seen_ids is None else self._continue(input_ids)
        self.seen_ids = input_ids
        with_RV = scores[self.rows]
        floor_R1 = with_RV.max(-1, keepdim=True).values + self.log_beta
        contrast_RV = (1 + self.alpha) * with_RV - self.alpha * without_RV.to(scores.dtype)
        contrast_RV = contrast_RV.masked_fill(with_RV < floor_R1, -math.inf).log_softmax(-1)
        return scores.index_copy(0, self.rows, contrast_RV)

    def _start(self, input_ids: Tensor) -> Tensor:
        """Run the prompts without their images; rows of one prompt (beams, several sequences) lie side by side."""
        num_prompts = len(self.prompt_ids)
        self.copies = len(input_ids) // num_prompts
        expected = self.prompt_ids.repeat_interleave(self.copies, 0)
        if not torch.equal(input_ids, expected):
            raise ValueError("this contrast was made for other prompts: make a new one for each call of generate")
        self.rows = self.is_contrasted.repeat_interleave(self.copies).nonzero()[:, 0]
        chosen = self.is_contrasted.nonzero()[:, 0].repeat_interleave(self.copies)
        text = without_images(self.prompt_ids[chosen], self.prompt_mask[chosen], self.model.config.image_token_id)
        self.key_mask = text["attention_mask"]
        self.last_position = self.prompt_mask[chosen].sum(1, keepdim=True) - 1
        return self._run(text["input_ids"], text["position_ids"])

    def _continue(self, input_ids: Tensor) -> Tensor:
        """Run the newest token of each row."""
        self._follow_beams(input_ids)
        newest_R1 = input_ids[self.rows, -1:]
        self.key_mask = torch.cat([self.key_mask, torch.ones_like(newest_R1)], dim=1)
        self.last_position = self.last_position + 1
        return self._run(newest_R1, self.last_position)

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run tokens behind the cached ones; return the logits after the last, (R, V)."""
        outputs = self.model(
            input_ids=ids,
            attention_mask=self.key_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = outputs.past_key_values
        return outputs.logits[:, -1].float()

    def _follow_beams(self, input_ids: Tensor) -> None:
        """Bring the cache into the order of the rows, which a beam search changes from step to step.

        A row goes on from a row of its prompt with the same tokens; where several have them, their caches are equal.
        """
        assert self.seen_ids is not None
        prefix = input_ids[:, :-1]
        if prefix.shape != self.seen_ids.shape:
            raise ValueError(
                f"a step of {input_ids.shape[1]} tokens follows one of {self.seen_ids.shape[1]}: contrastive decoding "
                "goes token by token, without an assistant, and needs a new object for each call of generate"
            )
        if torch.equal(prefix, self.seen_ids):
            return
        grouped = (-1, self.copies, prefix.shape[1])
        is_parent = (prefix.view(grouped)[:, :, None] == self.seen_ids.view(grouped)[:, None]).all(-1)
        if not is_parent.any(-1).all():
            raise ValueError("a row's tokens go on from no row of the step before: make a new contrast for each call")
        parents = is_parent.int().argmax(-1) + torch.arange(len(is_parent), device=prefix.device)[:, None] * self.copies
        place_of_row = torch.zeros(len(prefix), dtype=torch.long, device=prefix.device)
        place_of_row[self.rows] = torch.arange(len(self.rows), device=prefix.device)
        order = place_of_row[parents.flatten()[self.rows]]
        self.cache.reorder_cache(order)  # masks and positions are those of the prompt: equal for all its rows
