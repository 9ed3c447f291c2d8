"""Exact-match accuracy with and without the image, and delta of every answer token, in one pass over a test split.

Greedy decoding writes the reference answer if and only if, behind each of the answer's prefixes, the next token of the
answer (its end mark included) has the highest logit. So one forward pass over question and answer decides what
generation would need a pass per token for. *Blind* is the same model with the image tokens deleted and all position
ids kept, as CAL removes images.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase

from cal_train.cal.ablation import remove_images
from cal_train.data.collate import Collator
from cal_train.data.dataset import VlmDataset
from cal_train.data.sources import Source
from cal_train.models.head import find_head
from cal_train.train.features import FeatureCache
from cal_train.train.step import StepOptions, decode, embed, label_tokens


@dataclass(frozen=True)
class Answers:
    """What a model made of a split. Q questions, N answer tokens (end marks included) of all questions.

    ``is_right`` and ``is_right_blind`` (Q,) bool; ``types`` and ``scenes`` (Q,) str; ``delta`` (N,) target logit with
    minus without the image; ``is_visual`` (N,) bool: the token belongs to what only the picture tells; ``token_types``
    (N,) str: the type of the token's question.
    """

    types: np.ndarray
    scenes: np.ndarray
    is_right: np.ndarray
    is_right_blind: np.ndarray
    delta: np.ndarray
    is_visual: np.ndarray
    token_types: np.ndarray


@torch.no_grad()
def answer_split(model_folder: Path, data: Path, features: Path | None = None, batch_size: int = 64) -> Answers:
    """Let a saved model answer the single-question rows of a split.

    Args:
        model_folder: A trained model in Hugging Face layout; its own chat template is used.
        data: A test split of `cal_train.demo.splits`, its truth beside it.
        features: Folder of a feature cache; several questions share a picture.
        batch_size: Questions per forward pass.
    """
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval().requires_grad_(False)
    processor = AutoProcessor.from_pretrained(model_folder, backend="pil")
    truth = json.loads(data.with_suffix(".truth.json").read_text(encoding="utf-8"))
    texts = {row["id"]: row["conversations"][-1]["value"] for row in json.loads(data.read_text(encoding="utf-8"))}
    dataset = VlmDataset([Source(data, None)], processor, "chat", processor.tokenizer.model_max_length)
    if features is not None:
        cache = FeatureCache(features, model, processor)
        cache.fill(dataset, model.device)
        dataset.load_features = cache
    collator = Collator(processor.tokenizer.pad_token_id)
    columns: dict[str, list] = {name: [] for name in Answers.__dataclass_fields__}
    for batch in tqdm(DataLoader(dataset, batch_size, collate_fn=collator), desc=f"{model_folder.name}: {data.stem}"):
        if batch["dropped"]:
            raise ValueError(str(batch["dropped"][0]))
        seen, blind, delta = exact_matches(model, batch)
        labels = label_tokens(batch["labels"])
        for row, row_id in enumerate(batch["sample_ids"]):
            (turn,) = truth[row_id]
            ids = labels.ids[labels.rows == row].tolist()
            columns["is_visual"] += visual_tokens(processor.tokenizer, texts[row_id], turn["spans"], ids)
            columns["types"].append(turn["type"])
            columns["token_types"] += [turn["type"]] * len(ids)
            columns["scenes"].append(turn["scene"])
        columns["is_right"] += seen.tolist()
        columns["is_right_blind"] += blind.tolist()
        columns["delta"] += delta.tolist()
    return Answers(**{name: np.array(column) for name, column in columns.items()})


def exact_matches(model: PreTrainedModel, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Return whether greedy decoding writes each row's answer, with the image and blind, and delta per label token.

    Args:
        model: The VLM in eval mode.
        batch: Of `Collator`; one answer per row.

    Returns:
        Two bool tensors (B,) and delta (N,) over the label tokens in reading order.
    """
    labels = label_tokens(batch["labels"])
    image_mask_BS = batch["input_ids"] == model.config.image_token_id
    embeds_BSD = embed(model, batch["input_ids"], batch, image_mask_BS, StepOptions(find_head(model)))
    hidden_BSD = decode(model, embeds_BSD, batch["attention_mask"])
    text = remove_images(embeds_BSD, batch["attention_mask"], image_mask_BS)
    blind_BKD = decode(model, text.inputs_embeds, text.attention_mask, text.position_ids)
    sources_N = labels.positions - 1
    lm_head = model.lm_head
    with_NV = lm_head(hidden_BSD[labels.rows, sources_N])
    without_NV = lm_head(blind_BKD[labels.rows, text.last_kept[labels.rows, sources_N]])
    matches = []
    for logits_NV in (with_NV, without_NV):
        is_wrong_N = (logits_NV.argmax(-1) != labels.ids).long()
        num_wrong_B = torch.zeros(len(batch["labels"]), dtype=torch.long).index_add_(0, labels.rows, is_wrong_N)
        matches.append(num_wrong_B == 0)
    delta_N = (with_NV - without_NV).gather(1, labels.ids[:, None])[:, 0]
    return matches[0], matches[1], delta_N


def visual_tokens(
    tokenizer: PreTrainedTokenizerBase, answer: str, spans: list[tuple[int, int]], label_ids: list[int]
) -> list[bool]:
    """Return for each label token whether it overlaps a visual span of the answer.

    Raises:
        ValueError: If the labels are not the answer's tokens, with at most marks behind them.
    """
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if ids != label_ids[: len(ids)]:
        raise ValueError(f"labels {label_ids} are not the tokens {ids} of the answer {answer!r}")
    marks = [False] * (len(label_ids) - len(ids))
    return [any(start < b and a < end for a, b in spans) for start, end in offsets] + marks
