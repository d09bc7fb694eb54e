"""Logs of `inspect_ai` (`.json`, or `.eval`, a ZIP archive of JSON files) as results that can be compared."""

import contextlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..markers import MarkerCounter
from .benchmarks import Benchmark, Problem
from .summary import summarize


_VALUES = {"C": True, "I": False, "1": True, "0": False, "True": True, "False": False, "1.0": True, "0.0": False}


def is_log(content: dict[str, Any]) -> bool:
    """Whether a JSON object is a log."""
    return isinstance(content.get("eval"), dict) and "status" in content


def read_archive(path: Path) -> dict[str, Any]:
    """The log in an `.eval` file, as a `.json` file would hold it; of the samples, without their events."""
    with contextlib.suppress(ImportError):
        import zipfile_zstd  # noqa: F401  # inspect_ai installs it: before Python 3.14, zipfile knows no Zstandard
    try:
        with zipfile.ZipFile(path) as archive:
            log = json.loads(archive.read("header.json"))
            names = [name for name in archive.namelist() if name.startswith("samples/")]
            log["samples"] = [_without_events(json.loads(archive.read(name))) for name in names]
    except NotImplementedError:
        raise InputError(
            f"`compare`: {path} is compressed with Zstandard, which this Python cannot read. Install `zipfile-zstd`, "
            "or convert the log: `inspect log convert --to json --output-dir <folder> <file>`."
        ) from None
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise InputError(f"`compare`: {path} is damaged or is no log of inspect_ai ({error}).") from None
    return log


def _without_events(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sample.items() if key not in ("events", "events_data", "attachments")}


def results_from_logs(logs: Sequence[tuple[Path, dict[str, Any]]], label: str | None) -> dict[str, Any]:
    """
    The logs of one model, one per task, as `results.json` would hold them.

    A sample is right or wrong by the first of its scorers; a problem is its input and its target. Raises an
    [`InputError`] if a log is incomplete, or a sample has no score of right or wrong. `label` defaults to the model.
    """
    counter = MarkerCounter()
    records: list[dict[str, Any]] = []
    benchmarks: list[Benchmark] = []
    epochs, scorers, models = set(), set(), set()
    for path, log in logs:
        if log["status"] != "success" or not log.get("samples"):
            raise InputError(f"`compare`: {path} is no finished evaluation (status `{log['status']}`) with samples.")
        task = str(log["eval"]["task"]).split("/")[-1]
        models.add(log["eval"]["model"])
        if len(models) > 1 or task in {b.name for b in benchmarks}:
            raise InputError(f"`compare`: {path.parent} must hold logs of one model, one per task.")
        scorer = next(iter(log["samples"][0].get("scores") or {}), "")
        drawn = list(_records(path, log["samples"], task, scorer, counter))
        problems = {s["id"]: Problem(str(s["id"]), _text(s["input"]), _text(s["target"])) for s in log["samples"]}
        benchmarks.append(Benchmark(task, str(path), tuple(problems.values())))
        epochs |= {len(drawn) / len(problems)}
        records += drawn
        scorers.add(scorer)
    n = int(min(epochs))
    keys = {(record["benchmark"], record["problem_id"], record["sample"]) for record in records}
    if epochs != {n} or len(keys) != len(records) or max(record["sample"] for record in records) != n - 1:
        raise InputError(f"`compare`: {logs[0][0].parent}: not every problem has the same number of samples.")
    summary = summarize(records, benchmarks, n, counter.markers, seed=0)
    for benchmark in summary["benchmarks"].values():
        if any(record["tokens"] == 0 for record in records):  # the provider did not count them
            benchmark["tokens"]["mean"] = benchmark["markers_per_1k"]["total"] = None
    config = (logs[0][1].get("plan") or {}).get("config") or {}
    return {
        "label": label or models.copy().pop(),
        "settings": {"model": models.pop(), "scorer": ", ".join(sorted(scorers)), **config},
        "problem_sha256": {b.name: {p.id: p.sha256 for p in b.problems} for b in benchmarks},
        **summary,
    }


def _records(
    path: Path, samples: Sequence[dict[str, Any]], task: str, scorer: str, counter: MarkerCounter
) -> Iterator[dict[str, Any]]:
    for sample in samples:
        score = (sample.get("scores") or {}).get(scorer) or {"value": None}
        correct = _VALUES.get(str(score["value"]))
        if correct is None:
            raise InputError(
                f"`compare`: {path}, sample {sample['id']}, epoch {sample['epoch']}: expected a score of C, I, 1, 0, "
                f"true or false, got {score['value']!r}."
            )
        output = sample.get("output") or {}
        choice = (output.get("choices") or [{}])[0]
        text = _text((choice.get("message") or {}).get("content") or "")
        yield {
            "benchmark": task,
            "problem_id": str(sample["id"]),
            "sample": sample["epoch"] - 1,
            "answer": score.get("answer"),
            "correct": correct,
            "tokens": (output.get("usage") or {}).get("output_tokens", 0),
            "truncated": choice.get("stop_reason") in ("max_tokens", "model_length"),
            "markers": counter.count(text),
        }


def _text(content: Any) -> str:
    """Text of a string, of messages, or of a message's parts, reasoning included."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(map(_text, content))
    parts = (content.get(key) for key in ("reasoning", "text", "content"))
    return "\n".join(_text(part) for part in parts if part)
