"""Logits with and without the image, delta and weight for every label token of a data file."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, PreTrainedModel

from cal_train.cal.strategies import TokenWeighting
from cal_train.data.collate import Collator
from cal_train.data.dataset import VlmDataset
from cal_train.data.processor import load_processor
from cal_train.data.score_notes import (
    file_digest,
    image_processing_digest,
    model_digest,
    template_digest,
    tokenizer_digest,
)
from cal_train.data.sources import Source
from cal_train.evals.score_parts import Progress, ScoreParts
from cal_train.folders import from_folder
from cal_train.models.head import find_head
from cal_train.train.step import StepOptions, attach_step, label_tokens
from cal_train.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

SCORES = ("logit_with", "logit_without", "delta", "weight")


def score_file(
    model_folder: str | Path,
    data: str | Path,
    image_root: str | Path | None,
    output: str | Path,
    weighting: TokenWeighting,
    batch_size: int = 8,
    max_bad_samples: int = 0,
    max_length: int = 2048,
    image_position: Literal["keep", "front"] = "keep",
    template: str = "chat",
    image_aspect_ratio: Literal["square", "pad", "anyres"] | None = None,
) -> int:
    """Score a data file and write one JSON object per sample, in input order.

    Each object has ``id``, ``row`` (of the data file, from 0), ``input_ids`` (image placeholders expanded),
    ``label_positions`` (indices into ``input_ids``), ``tokens`` (their text) and, aligned with them, ``logit_with``,
    ``logit_without``, ``delta`` and ``weight``. The model runs in eval mode and float32.

    A run that was stopped goes on where it was when it is started again (`cal_train.evals.score_parts`), and ends with
    the same file. ``OUTPUT.about.json`` says what was scored with what.

    Args:
        model_folder: A model in Hugging Face layout.
        data: JSON, JSONL or Parquet file.
        image_root: Folder of the images. Default: the folder of the data file.
        output: JSON lines file; written aside as ``OUTPUT.part`` and renamed when complete.
        weighting: How weights follow from deltas; must contrast with and without image.
        batch_size: Rows per forward pass.
        max_bad_samples: Bad rows that are left out (and logged) before the run stops.
        max_length: Tokens per row.
        image_position: As in the recipe that trained; the model folder does not remember it.
        template: A template's name; ``chat`` is the folder's own. Scores to train on need the recipe's, and its aspect
            ratio.
        image_aspect_ratio: How images become square; None is what the folder says.

    Returns:
        The number of samples in the file.

    Raises:
        ValueError: If the weighting has nothing to contrast, the model folder is none, more rows are bad than
            allowed, or ``OUTPUT.part`` is of another model, other data or other options.
    """
    if weighting.ablation is None:
        raise ValueError("this strategy takes no image away, so there is nothing to score: use cal or cal_reference")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(model_folder, template, image_aspect_ratio)
    model = from_folder(AutoModelForImageTextToText, model_folder, dtype=torch.float32).eval()
    cast(nn.Module, model).to(device)  # transformers' own `to` is annotated without its arguments
    source = Source(Path(data), Path(image_root) if image_root else None)
    dataset = VlmDataset([source], processor, "chat", max_length, image_position)
    about = {
        "model_sha256": model_digest(model_folder),
        "tokenizer_sha256": tokenizer_digest(processor.tokenizer),  # pyright: ignore[reportAttributeAccessIssue]
        "template_sha256": template_digest(processor),
        "images_sha256": image_processing_digest(processor),
        "data_sha256": file_digest(data),
        "weighting": asdict(weighting),
        "batch_size": batch_size,  # the flat scope smooths across the rows of a batch
        "max_length": max_length,
        "image_position": image_position,
        "image_token_id": processor.image_token_id,  # pyright: ignore[reportAttributeAccessIssue]
        "paths": {
            "model": str(Path(model_folder).resolve()),
            "data": str(source.path.resolve()),
            "image_root": str(source.root.resolve()),
        },
    }
    parts = ScoreParts(output, about)
    done = _score_rows(model, dataset, processor.tokenizer, weighting, parts, batch_size, max_bad_samples)
    parts.finish(done)
    return done.samples


def _score_rows(
    model: PreTrainedModel,
    dataset: VlmDataset,
    tokenizer: Any,
    weighting: TokenWeighting,
    parts: ScoreParts,
    batch_size: int,
    max_bad_samples: int,
) -> Progress:
    """Score what is left of the data set into the part file; return what was done."""
    done = parts.progress()
    rows = Subset(dataset, range(done.rows, len(dataset)))
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=Collator(tokenizer.pad_token_id))
    bar = tqdm(total=len(dataset), initial=done.rows, desc="score", unit="row")
    with parts.open(done) as file, bar as progress, torch.random.fork_rng(devices=[]):
        torch.manual_seed(done.rows)
        for batch, scores in score_batches(model, loader, weighting):
            done.dropped += batch["dropped"]
            if len(done.dropped) > max_bad_samples:
                raise ValueError(
                    f"{done.dropped[-1]}\n{len(done.dropped)} bad rows, max_bad_samples is {max_bad_samples}"
                )
            numbers = range(done.rows, min(done.rows + batch_size, len(dataset)))
            bad = {problem.row for problem in batch["dropped"]}
            for record in records_of(batch, scores, tokenizer, [row for row in numbers if row not in bad]):
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                done.samples += 1
            done.rows = min(done.rows + batch_size, len(dataset))
            parts.save(file, done)
            torch.manual_seed(done.rows)  # random strategies draw the same weights in a run that was interrupted
            progress.update(done.rows - progress.n)
    for problem in done.dropped:
        logger.warning("left out: %s", problem)
    return done


@torch.no_grad()
def score_batches(
    model: PreTrainedModel, batches: Iterator[dict[str, Any]] | DataLoader, weighting: TokenWeighting
) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Yield each batch with its scores, each (N,) over the batch's label tokens in reading order."""
    attach_step(model)
    options = StepOptions(find_head(model), weighting)
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        outputs = model(step=options, **inputs)
        yield batch, {name: outputs[name].cpu() for name in SCORES}


def records_of(
    batch: Mapping[str, Any], scores: Mapping[str, torch.Tensor], tokenizer: Any, row_numbers: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield the score record of each sample of a batch; the stand-in row of an all-dropped batch has none.

    ``row_numbers`` are the samples' rows in the data file.
    """
    labels = label_tokens(batch["labels"])
    # Decoded behind a known token: alone, SentencePiece-like tokens lose their leading space.
    lead = tokenizer.encode("a", add_special_tokens=False)[-1:]
    lead_text = tokenizer.decode(lead)
    for row, sample_id in enumerate(batch["sample_ids"]):
        if (batch["labels"][row] == IGNORE_INDEX).all():
            continue
        mine = labels.rows == row
        yield {
            "id": sample_id,
            "row": row_numbers[row],
            "input_ids": batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist(),
            "label_positions": labels.positions[mine].tolist(),
            "tokens": [tokenizer.decode([*lead, token]).removeprefix(lead_text) for token in labels.ids[mine].tolist()],
            **{name: scores[name][mine].tolist() for name in SCORES},
        }
