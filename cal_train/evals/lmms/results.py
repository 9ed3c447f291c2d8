"""What an evaluation leaves behind: ``results.json``, ``results.md`` and ``samples/TASK.jsonl``.

A line of samples has ``doc_id``, ``question``, ``target``, ``answer``, ``scores`` (the metrics that one document has a
number for) and ``key``, which two runs on the same documents share.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

RESULTS, TABLE, SAMPLES = "results.json", "results.md", "samples"
_NOT_METRICS = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media",
}  # fmt: skip


def sample_record(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return our record of one of lmms-eval's samples."""
    question = next((a for a in sample["arguments"] if isinstance(a, str)), "")
    answers = sample["filtered_resps"]
    told = json.dumps([sample["doc"], sample["target"]], sort_keys=True, default=str)
    scores = {name: score_of(value) for name, value in sample.items() if name not in _NOT_METRICS}
    return {
        "doc_id": sample["doc_id"],
        "key": hashlib.sha256(told.encode()).hexdigest()[:16],
        "question": question,
        "target": sample["target"],
        "answer": answers[0] if len(answers) == 1 else answers,
        "scores": {name: score for name, score in scores.items() if score is not None},
    }


def score_of(value: Any) -> float | None:
    """Return a document's score as a number, or None for metrics of the whole corpus (CIDEr), which have none."""
    if isinstance(value, Mapping):
        value = value.get("score", value.get("overall"))  # as most tasks name it, and MMT-Bench
    return float(value) if isinstance(value, Real) else None


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a task from lmms-eval's row, without standard errors; ``,none`` is cut from their names."""
    found = {}
    for name, value in row.items():
        metric, _, filter_name = name.partition(",")
        if isinstance(value, Real) and filter_name and "_stderr" not in metric:
            found[metric if filter_name == "none" else name] = float(value)
    return found


def write_results(folder: Path, summary: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the three parts; ``results.json`` last, so that it stands for a complete folder."""
    (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        (folder / SAMPLES / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / TABLE).write_text(markdown_of(summary), encoding="utf-8")
    (folder / RESULTS).write_text(json.dumps(summary, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8")


def read_results(folder: str | Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return the summary of a results folder and its samples by task.

    Raises:
        ValueError: If there are no results in it, or a file of samples is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / RESULTS).is_file():
        what = "has no results.json" if folder.is_dir() else "does not exist"
        raise ValueError(f"results folder {folder} {what}: give the --output of a finished cal-train eval")
    samples = {}
    path = folder / RESULTS
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        for task in summary["tasks"]:
            path = folder / SAMPLES / f"{task}.jsonl"
            samples[task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): run cal-train eval again") from None
    return summary, samples


def markdown_of(summary: Mapping[str, Any]) -> str:
    """Return the results as Markdown: one row per metric, then what was published, then how it was run."""
    rows = [["task", "metric", "value", "documents"], ["---", "---", "---:", "---:"]]
    for task, found in summary["tasks"].items():
        rows += [[task, name, f"{value:.4f}", str(found["num_documents"])] for name, value in found["metrics"].items()]
    text = f"# {summary['suite']}: {summary['model']}\n\n" + _table(rows)
    if summary.get("expected"):
        text += "\n" + _published(summary["expected"])
    text += "\n" + "\n".join(f"- {name}: {value}" for name, value in summary["settings"].items())
    text += "\n" + "\n".join(f"- {name} {version}" for name, version in summary["versions"].items()) + "\n"
    prompts = [["task", "prompt"], ["---", "---"]]
    prompts += [[task, f"`{json.dumps(found['prompt'])}`"] for task, found in summary["tasks"].items()]
    return text + "\n" + _table(prompts)


def _published(expected: Mapping[str, Any]) -> str:
    models = list(expected["models"])
    rows = [["task", "metric", *models], ["---", "---", *["---:"] * len(models)]]
    for task, metric in expected["metrics"].items():
        cells = [expected["models"][model].get(task) for model in models]
        rows.append([task, metric, *("" if cell is None else str(cell) for cell in cells)])
    return f"Published ({expected['source']}; {expected['scale']}):\n\n" + _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
