"""Run a suite through lmms-eval in this process, and write what came out.

lmms-eval is called as a library, not as a command: its command ends with exit code 0 when an evaluation fails, its
options cannot hold a path with a comma, and its result files would have to be found by their time stamps. One process
per rank is the launcher's business, as in training.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from loguru import logger as lmms_logger

from cal_train.evals.lmms.manifest import MODEL_ID
from cal_train.evals.lmms.plugin import CalTrain, check_model_folder
from cal_train.evals.lmms.results import metrics_of, sample_record, write_results
from cal_train.evals.lmms.suites import Suite, check_tasks

PACKAGES = ("cal_train", "lmms_eval", "transformers", "torch", "datasets", "accelerate")


def evaluate(
    model: str | Path,
    suite: Suite,
    output: str | Path,
    limit: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str = "auto",
    through: Literal["cal_train", "llava_hf"] = "cal_train",
    asking: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Evaluate a model folder on a suite and write the results folder; return its summary on rank 0, None elsewhere.

    Args:
        model: Model folder in Hugging Face layout.
        suite: What to run.
        output: Folder of the results.
        limit: Documents of each task, instead of the suite's limit.
        batch_size: Documents of a forward pass.
        device: Such as ``cpu``. Default: what accelerate picks.
        dtype: Of the weights; ``auto`` is as saved.
        through: Our model of lmms-eval, or its own one for LLaVA and LLaVA-NeXT (one document at a time).
        asking: What our model is to do differently: its arguments ``vcd_alpha``, ``vcd_beta``, ``without_image``.

    Raises:
        ValueError: If the model folder or a task cannot be used, or a task has no documents.
    """
    check_model_folder(model)
    lmms_logger.remove()
    lmms_logger.add(sys.stderr, level="WARNING")
    tasks = _task_manager(suite)
    check_tasks(suite, tasks.all_tasks)
    started = time.perf_counter()
    limit = limit or suite.limit
    evaluated = _load(through, str(model), batch_size, device, dtype, asking or {})
    found = simple_evaluate(
        model=evaluated,
        tasks=list(suite.tasks),
        task_manager=tasks,
        limit=limit,
        batch_size=batch_size,
        bootstrap_iters=0,  # standard errors are lmms-eval's own; ours come with a comparison
        # what tasks read of the command's options: where files for a test server go
        cli_args=argparse.Namespace(output_path=str(output), process_with_media=False, reasoning_tags=None),
        process_docs_parallel=1,
    )
    if found is None:
        return None
    settings = {
        "through": through,
        "batch_size": batch_size,
        "ranks": evaluated.world_size,
        "dtype": dtype,
        "limit": limit,
        **(asking or {}),
        "prompt_variant": suite.prompt_variant,
        "chat_template_sha256": _template_hash(Path(model)),
        "seconds": round(time.perf_counter() - started, 1),
    }
    samples = {
        task: sorted((sample_record(row) for row in rows), key=lambda row: row["doc_id"])
        for task, rows in found["samples"].items()
    }
    summary = summarize(found, {task: len(rows) for task, rows in samples.items()}, suite.prompt_variant) | {
        "model": str(model),
        "suite": suite.name,
        "settings": settings,
        "versions": {package: version(package) for package in PACKAGES},
        "expected": json.loads(suite.expected.read_text(encoding="utf-8")) if suite.expected else None,
    }
    write_results(Path(output), summary, samples)
    return summary


def summarize(found: Mapping[str, Any], num_documents: Mapping[str, int], variant: str) -> dict[str, Any]:
    """Return metrics, prompt, generation options and version of each task.

    Raises:
        ValueError: If a task was asked nothing.
    """
    if empty := [task for task, count in num_documents.items() if not count]:
        raise ValueError(f"task {empty[0]} has no documents: is its data file empty?")
    summary = {}
    for task, config in found["configs"].items():
        prompts = config.get("lmms_eval_specific_kwargs") or {}
        summary[task] = {
            "metrics": metrics_of(found["results"][task]),
            "higher_is_better": found["higher_is_better"].get(task, {}),
            "num_documents": num_documents[task],
            "prompt": prompts.get(variant, prompts),
            "generation": config.get("generation_kwargs", {}),
            "data": {key: config[key] for key in ("dataset_path", "dataset_name", "test_split") if config.get(key)},
            "version": found["versions"].get(task),
        }
    groups = {name: metrics_of(row) for name, row in found["results"].items() if name not in summary}
    return {"tasks": summary, "groups": {name: metrics for name, metrics in groups.items() if metrics}}


def _task_manager(suite: Suite) -> TaskManager:
    """Return the index of tasks; lmms-eval's own thousands of files are read only if the suite needs one of them."""
    options: dict[str, Any] = {"model_name": suite.prompt_variant}
    if suite.include_path:
        options["include_path"] = str(suite.include_path)
        own = TaskManager("WARNING", include_defaults=False, **options)
        if set(suite.tasks) <= set(own.all_tasks):
            return own
    return TaskManager("WARNING", **options)


def _load(through: str, model: str, batch_size: int, device: str | None, dtype: str, asking: Mapping[str, Any]) -> lmms:
    if through == MODEL_ID:
        return CalTrain(model, device, dtype, batch_size, **asking)
    if asking:
        raise ValueError(f"{', '.join(asking)}: only our own model of lmms-eval can do that, not {through}")
    if batch_size != 1:
        raise ValueError(f"--batch_size {batch_size}: {through} asks one document at a time, leave it out")
    theirs: Callable[..., lmms] = get_model(through, force_simple=True)
    here = Accelerator()  # what each of several ranks has, which theirs takes for granted to be a CUDA device
    place = device if device and here.num_processes == 1 else str(here.device)
    return theirs(pretrained=model, batch_size=batch_size, device=place, device_map=place, dtype=dtype)


def _template_hash(model: Path) -> str | None:
    template = model / "chat_template.jinja"
    return hashlib.sha256(template.read_bytes()).hexdigest()[:16] if template.is_file() else None
