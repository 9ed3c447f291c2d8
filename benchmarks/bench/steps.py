"""The training steps that are compared: ours, the stock Trainer's and one built as CAL's reference code is.

B rows, S positions, T = S - 1 shifted positions, V vocabulary, M = B * T flattened positions.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaForConditionalGeneration, Trainer

from cal_train.cal.strategies import STRATEGIES, TokenWeighting
from cal_train.conf import VlmTrainingArguments
from cal_train.testing import tiny_llava, tiny_processor, tiny_tokenizer
from cal_train.train.trainer import VlmTrainer
from cal_train.types import IGNORE_INDEX

BOS, IMAGE = 1, 4  # ids of the tiny tokenizer
FIRST_WORD = 20
PATCH = 14


@dataclass(frozen=True)
class Size:
    """A model whose language model does nearly all the work; the vision tower is that of `tiny_llava`."""

    image_size: int = 336
    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int = 1376  # the proportion of Llama-2-7B, 11008 / 4096
    num_layers: int = 6
    num_heads: int = 8

    @property
    def tokens_per_image(self) -> int:
        """Return the image tokens of one image."""
        return (self.image_size // PATCH) ** 2

    def text_config(self) -> dict[str, int]:
        """Return the language model's part of the configuration, as Llama spells it."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
        }


LLAVA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32064)


@dataclass(frozen=True)
class Shape:
    """A micro-batch: every row has the same images, text tokens and label tokens (the last of the text)."""

    num_images: int
    num_text: int
    num_labels: int
    num_rows: int = 1


@dataclass(frozen=True)
class Case:
    """What every variant is given."""

    size: Size
    shape: Shape
    has_checkpointing: bool = False

    @property
    def num_tokens(self) -> int:
        """Return the length of a row."""
        return self.shape.num_images * self.size.tokens_per_image + self.shape.num_text


class ReferenceCalTrainer(Trainer):
    """CAL as the reference code computes it: the whole sequence twice, all logits twice, one flat vector of weights.

    Written from the description of foundation-multimodal-models/CAL at 9d99569 (``llava_llama.py``): image keys masked,
    float32 logits of every position in both passes, the delta of token id 0 where there is no label, smoothing over the
    flattened batch, ``sum(w CE) / sum(w)``. Copies that are not needed are left out, in the reference's favour.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the weighted mean of a micro-batch."""
        ids_BS, mask_BS, labels_BS = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        image_mask_BS = ids_BS == IMAGE
        embeds_BSD = model.get_input_embeddings()(ids_BS)
        image_embeds = torch.cat(model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output)
        embeds_BSD = embeds_BSD.masked_scatter(image_mask_BS[..., None], image_embeds)
        with torch.no_grad():
            hidden_keys_BS = mask_BS * ~image_mask_BS
            without_BSV = model(inputs_embeds=embeds_BSD, attention_mask=hidden_keys_BS).logits.float()
        with_BSV = model(inputs_embeds=embeds_BSD, attention_mask=mask_BS).logits.float()
        return reference_loss(with_BSV, without_BSV, labels_BS)


def reference_loss(with_BSV: Tensor, without_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Return the reference code's loss from both sets of logits."""
    labels_M = labels_BS[:, 1:].reshape(-1)
    is_label_M = labels_M != IGNORE_INDEX
    with_MV, without_MV = (x[:, :-1].reshape(len(labels_M), -1) for x in (with_BSV, without_BSV))
    with torch.no_grad():
        target_M1 = labels_M.where(is_label_M, 0)[:, None]
        delta_M = (with_MV.gather(1, target_M1) - without_MV.gather(1, target_M1))[:, 0]
        weight_M = F.avg_pool1d(delta_M.clamp(1, 5)[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    ce_M = F.cross_entropy(with_MV, labels_M, reduction="none", ignore_index=IGNORE_INDEX)
    return (ce_M * weight_M).sum() / (weight_M[is_label_M].sum() + 1e-6)


def _stock(trainer_class: type[Trainer]) -> Callable[..., Trainer]:
    def build(model: LlavaForConditionalGeneration, args: VlmTrainingArguments) -> Trainer:
        model.config.text_config.use_cache = False  # the Trainer turns off the outer one only
        return trainer_class(model=model, args=args, processing_class=tiny_processor())

    return build


def _ours(weighting: TokenWeighting | None) -> Callable[..., Trainer]:
    def build(model: LlavaForConditionalGeneration, args: VlmTrainingArguments) -> Trainer:
        return VlmTrainer(model, args, tiny_processor(), weighting, train_dataset=None, data_collator=list)

    return build


VARIANTS: dict[str, Callable[..., Trainer]] = {
    "plain": _ours(None),
    "CAL": _ours(STRATEGIES["cal"]),
    "CAL (mask)": _ours(replace(STRATEGIES["cal"], ablation="mask")),
    "stock": _stock(Trainer),
    "reference CAL": _stock(ReferenceCalTrainer),
    "reference preset": _ours(STRATEGIES["cal_reference"]),
}


def build_trainer(variant: str, case: Case) -> Trainer:
    """Return the trainer of a variant on its own copy of the same weights, vision tower frozen."""
    size = case.size
    model = tiny_llava(tiny_tokenizer(), image_size=size.image_size, **size.text_config())
    model.model.vision_tower.requires_grad_(False)
    with torch.no_grad():  # logits of the same spread at every width: the deltas reach both clamp limits
        model.lm_head.weight *= 40 / size.hidden_size**0.5
    if case.has_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    args = VlmTrainingArguments(
        output_dir=tempfile.gettempdir(), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    trainer = VARIANTS[variant](model, args)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_batch(case: Case) -> dict[str, Tensor]:
    """Return a batch as the collator makes it: BOS, words, images, words, labels; no padding; equal on every call."""
    shape, generator = case.shape, torch.Generator().manual_seed(0)
    num_before = (shape.num_text - shape.num_labels) // 2
    ids = torch.randint(FIRST_WORD, case.size.vocab_size, (shape.num_rows, case.num_tokens), generator=generator)
    ids[:, 0] = BOS
    ids[:, num_before : num_before + case.num_tokens - shape.num_text] = IMAGE
    labels = ids.clone()
    labels[:, : -shape.num_labels] = IGNORE_INDEX
    side, num_images = case.size.image_size, shape.num_rows * shape.num_images
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(num_images, 3, side, side, generator=generator),
    }


def run_step(trainer: Trainer, batch: dict[str, Tensor]) -> float:
    """Run what the Trainer runs for one micro-batch, forward and backward, clear the gradients, return the loss."""
    batches, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    loss = trainer.training_step(trainer.model, batches[0], num_items)
    trainer.model.zero_grad()
    return loss.item()


def step_flops(text: Any, case: Case) -> dict[str, float]:
    """Return the multiply-adds (x2) of each variant's step from the configuration: decoder, causal attention, head.

    A backward is two forwards; checkpointing runs the decoder's forward once more. The vision tower, the projector and
    everything element-wise are left out.

    Args:
        text: Configuration of a Llama-like language model.
        case: Lengths, label count and checkpointing.
    """
    width, layers = text.hidden_size, text.num_hidden_layers
    key_value_width = width * text.num_key_value_heads // text.num_attention_heads
    linear = 2 * width * (2 * width + 2 * key_value_width + 3 * text.intermediate_size)

    def decoder(num_tokens: int) -> float:
        pairs = num_tokens * (num_tokens + 1) / 2
        return case.shape.num_rows * layers * (num_tokens * linear + 4 * width * pairs)

    def head(num_tokens: int) -> float:
        return case.shape.num_rows * 2 * num_tokens * width * text.vocab_size

    passes = 4 if case.has_checkpointing else 3
    full, num_labels = decoder(case.num_tokens), case.shape.num_labels
    plain = passes * full + 3 * head(num_labels)
    stock = passes * full + 3 * head(case.num_tokens)
    return {
        "plain": plain,
        "CAL": plain + decoder(case.shape.num_text),
        "CAL (mask)": plain + full,
        "stock": stock,
        "reference CAL": stock + full + head(case.num_tokens),
    }
