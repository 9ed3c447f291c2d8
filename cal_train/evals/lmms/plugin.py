"""The model ``cal_train`` of lmms-eval: LLaVA, LLaVA-NeXT and MGM folders, batched, on one or several ranks.

Written for lmms-eval 0.7.3. Differs from its own ``llava_hf``: the prompt is the trained template's, with one begin
token; a batch may hold several documents; an error ends the run, where ``llava_hf`` goes on with an empty answer; it
answers log-likelihood tasks, which ``llava_hf`` cannot under transformers 5. As there, a task's stop strings
(``until``) are not applied: the model ends its answer itself.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from cal_train.data.processor import load_processor
from cal_train.evals.lmms.prompts import make_prompter
from cal_train.folders import from_folder
from cal_train.models.contrast import ImageContrast, check_contrast, without_images
from cal_train.models.families import FAMILIES

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 1024
"""Limit of an answer where the task sets none; that of ``llava_hf``."""
_DEFAULT_STOP = ["\n\n"]
"""What lmms-eval fills in where a task names no stop strings."""
_KNOWN_OPTIONS = {"max_new_tokens", "temperature", "top_p", "num_beams", "do_sample", "until"}


def check_model_folder(folder: str | Path) -> None:
    """Refuse a folder that this model cannot evaluate.

    Raises:
        ValueError: If it is no model folder, holds adapters only, or is of another family.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds adapters, not a whole model: fold them in with cal-train merge first")
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise ValueError(f"model folder {folder} does not exist or has no config.json: check the path")
    model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{folder} holds a model of type {model_type!r}: this evaluates {', '.join(FAMILIES)} folders "
            "(cal-train convert brings original checkpoints to that layout)"
        )


class CalTrain(lmms):
    """A model folder behind lmms-eval's interface.

    Args:
        pretrained: Model folder in Hugging Face layout.
        device: Such as ``cpu`` or ``cuda:1``. Default: what accelerate picks. With several ranks, each has its own.
        dtype: Of the weights: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        batch_size: Documents, or choices, of a forward pass.
        max_batch_size: Unused; lmms-eval passes it for automatic batch sizes, which there are none of.
        attn_implementation: Name of an attention of transformers.
        vcd_alpha: Strength of contrastive decoding (`cal_train.models.contrast`); 0 is plain decoding. Log-likelihood
            tasks are not decoded and stay as they are.
        vcd_beta: Share of the largest probability that a token must have to be chosen by contrastive decoding.
        without_image: Ask every document without its images: what a model knows, or guesses, without looking. The
            prompt stays as it is; its image tokens are deleted and the text keeps its positions, as in CAL's own pass.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        attn_implementation: str | None = None,
        vcd_alpha: float = 0.0,
        vcd_beta: float = 0.1,
        without_image: bool = False,
    ):
        super().__init__()
        check_model_folder(pretrained)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size {batch_size!r} is not a positive number")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")
        check_contrast(float(vcd_alpha), float(vcd_beta))
        if without_image not in (True, False):
            raise ValueError(f"without_image {without_image!r} is neither True nor False")
        if without_image and vcd_alpha:
            raise ValueError("vcd_alpha contrasts with and without the image: leave it, or without_image, out")
        self.vcd_alpha, self.vcd_beta = float(vcd_alpha), float(vcd_beta)
        self.without_image = bool(without_image)
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.processor: Any = load_processor(pretrained)
        self.prompter = make_prompter(self.processor)
        model: Any = from_folder(
            AutoModelForImageTextToText, pretrained, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return one answer per request, in order."""
        answers: dict[int, str] = {}
        for numbers in self._batches(requests, lambda args: repr(sorted(args[1].items()))):
            chosen = [_arguments(requests[n]) for n in numbers]
            with _named(chosen[0][4], [args[3] for args in chosen]):
                questions = [self._question(args[0], *args[2:6]) for args in chosen]
                texts = [self.prompter.prompt(text, len(images)) for text, images in questions]
                inputs = self._inputs(texts, [image for _, images in questions for image in images])
                options = self._generation_options(chosen[0][1], chosen[0][4])
                if self.vcd_alpha:
                    contrast = ImageContrast(self.model, inputs, self.vcd_alpha, self.vcd_beta)
                    options["logits_processor"] = [contrast]
                ids = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
                answers |= dict(
                    zip(numbers, self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True)
                )
        return [answers[n] for n in range(len(requests))]

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return (negative log-likelihood, whether greedy decoding writes it) of each request's answer, in order.

        Summed over the answer's tokens, its end mark left out. lmms-eval takes the smallest for the best, and makes
        text of all but a `GenerationResult`.
        """
        if self.vcd_alpha and self._rank == 0:
            _say_once("contrastive decoding has no effect on tasks that score given answers")
        results: dict[int, GenerationResult] = {}
        for numbers in self._batches(requests, lambda args: ""):
            chosen = [_arguments(requests[n]) for n in numbers]
            with _named(chosen[0][4], [args[3] for args in chosen]):
                scores = self._score_answers(chosen)
            results |= {n: GenerationResult(text=score) for n, score in zip(numbers, scores, strict=True)}  # pyright: ignore[reportArgumentType]
        return [results[n] for n in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: no task of several rounds is supported."""
        raise ValueError(f"task {_arguments(requests[0])[5]} asks in several rounds, which this model does not support")

    def _score_answers(self, chosen: Sequence[tuple]) -> list[tuple[float, bool]]:
        tokenizer = self.processor.tokenizer
        texts, images, tails = [], [], []
        for text, target, to_visual, doc_id, task, split in chosen:
            answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            text, own = self._question(text, to_visual, doc_id, task, split)
            prompt, whole = self.prompter.prompt_and_answer(text, len(own), answer)
            prompt_ids, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, whole))
            shared = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
            texts.append(whole)
            images += own
            tails.append(ids[shared:])
        inputs = self._inputs(texts, images)
        num_kept = max(map(len, tails)) + 1  # with padding on the left every answer ends with its row
        inputs = {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0), **inputs}
        logits = self.model(**inputs, logits_to_keep=num_kept, use_cache=False).logits.float()
        scores = []
        for row, ids in enumerate(tails):
            if inputs["input_ids"][row, -len(ids) :].tolist() != ids:
                raise ValueError(f"the prompt does not end with the tokens of its answer {texts[row][-40:]!r}")
            log_probs = logits[row, -len(ids) - 1 : -1].log_softmax(-1)
            target_ids = torch.tensor(ids, device=logits.device)
            loss = -log_probs.gather(-1, target_ids[:, None]).sum().item()
            scores.append((loss, bool((log_probs.argmax(-1) == target_ids).all())))
        return scores

    def _question(self, text: str, to_visual: Any, doc_id: Any, task: str, split: str) -> tuple[str, list[Image.Image]]:
        """Return a document's text and images, as they are to be asked."""
        images = list(to_visual(self.task_dict[task][split][doc_id]) or [])
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(f"document {doc_id} shows a {type(image).__name__}: this model takes pictures only")
        return text, [image.convert("RGB") for image in images]

    def _inputs(self, texts: list[str], images: list[Image.Image]) -> dict[str, Tensor]:
        batch = self.processor(
            images=images or None,
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=self.prompter.adds_special_tokens(texts[0]),
            return_tensors="pt",
        )
        inputs = dict(batch.to(self.device, self.model.dtype))
        if self.without_image:
            return without_images(inputs["input_ids"], inputs["attention_mask"], self.model.config.image_token_id)
        return inputs

    def _generation_options(self, given: dict[str, Any], task: str) -> dict[str, Any]:
        ignored = sorted(given.keys() - _KNOWN_OPTIONS)
        if given.get("until") not in (None, _DEFAULT_STOP):
            ignored.append(f"until={given['until']}")
        if ignored and self._rank == 0:
            _say_once(f"task {task}: generation options that have no effect here: {', '.join(ignored)}")
        temperature = float(given.get("temperature") or 0)
        options = {
            "max_new_tokens": given.get("max_new_tokens", DEFAULT_NEW_TOKENS),
            "num_beams": given.get("num_beams") or 1,
            "do_sample": temperature > 0,
            "temperature": temperature or None,
            "top_p": given.get("top_p") if temperature else None,
            # folders of a training may turn it off; without it, gaps in positions would be taken for packed sequences
            "use_cache": True,
            "pad_token_id": self.processor.tokenizer.pad_token_id,
        }
        if self.model.generation_config.eos_token_id is None:
            options["eos_token_id"] = self.processor.tokenizer.eos_token_id
        return options

    def _batches(self, requests: list[Instance], settings_of: Any) -> Iterator[list[int]]:
        """Yield numbers of requests that share a task, a split and settings, longest first, with a progress bar."""
        keys = [(str(a[4]), str(a[5]), settings_of(a)) for a in map(_arguments, requests)]
        order = sorted(range(len(requests)), key=lambda n: (keys[n], -len(_arguments(requests[n])[0]), n))
        with tqdm(total=len(requests), desc="evaluate", unit="request", disable=self._rank != 0) as progress:
            start = 0
            while start < len(order):
                numbers = [n for n in order[start : start + self.batch_size] if keys[n] == keys[order[start]]]
                yield numbers
                progress.update(len(numbers))
                start += len(numbers)


def _arguments(request: Instance) -> tuple[Any, ...]:
    """Return text, target or options, function for the images, document, task and split of a request."""
    return request.arguments


@contextmanager
def _named(task: str, doc_ids: Sequence[Any]) -> Iterator[None]:
    """Let an error say in which documents it happened."""
    try:
        yield
    except Exception as error:
        kind = ValueError if isinstance(error, (ValueError, OSError)) else RuntimeError
        documents = ", ".join(dict.fromkeys(map(str, doc_ids)))
        raise kind(f"task {task}, document {documents}: {type(error).__name__}: {error}") from error


@lru_cache
def _say_once(message: str) -> None:
    logger.warning(message)
