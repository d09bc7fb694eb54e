"""Benchmarks: presets on the hub, or any local JSONL file with the fields `problem` and `answer`."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError


# Datasets on the hub whose split `train` has the columns `problem` and `answer`
PRESETS = {
    "aime24": "HuggingFaceH4/aime_2024",
    "aime25": "MathArena/aime_2025",
    "hmmt25": "MathArena/hmmt_feb_2025",
}


@dataclass(frozen=True)
class Problem:
    """One problem."""

    id: str  # unique within its benchmark: the row's `id`, or its number
    problem: str
    answer: str  # text or LaTeX

    @property
    def sha256(self) -> str:
        """Hash of text and answer: what a stored sample belongs to, whatever the file's name and the id."""
        return hashlib.sha256(json.dumps([self.problem, self.answer]).encode()).hexdigest()


@dataclass(frozen=True)
class Benchmark:
    """A set of problems."""

    name: str  # in results and samples
    source: str  # hub id or path
    problems: tuple[Problem, ...]


def load_benchmarks(names: Sequence[str], limit: int | None = None) -> list[Benchmark]:
    """Loads keys of `PRESETS` or local JSONL files, of each the first `limit` problems."""
    # Before anything is loaded: a preset comes from the hub
    given: dict[str, str] = {}
    for name in names:
        called = name if name in PRESETS else Path(name).stem
        if called in given:
            raise InputError(
                f"`benchmarks`: `{given[called]}` and `{name}` are both called `{called}`, and samples are stored by "
                "that name. Rename one of the files, or name it once."
            )
        given[called] = name
    return [load_benchmark(name, limit) for name in names]


def load_benchmark(name: str, limit: int | None = None) -> Benchmark:
    """Loads one preset or local JSONL file."""
    if name in PRESETS:
        rows, source = _from_hub(name), PRESETS[name]
    elif name.endswith((".jsonl", ".json")):
        rows, source, name = _from_file(Path(name)), name, Path(name).stem
    else:
        raise InputError(
            f"`benchmarks`: there is no preset `{name}`. Presets are {', '.join(PRESETS)}; for your own problems give "
            "the path of a .jsonl file with the fields `problem` and `answer`."
        )
    problems = tuple(_problem(row, index, source) for index, row in enumerate(rows[:limit]))
    if not problems:
        raise InputError(f"`benchmarks`: {source} holds no problems.")
    for id, count in Counter(problem.id for problem in problems).items():
        if count > 1:
            raise InputError(f"`benchmarks`: {source} holds the id {id!r} twice. Make ids unique, or remove them.")
    return Benchmark(name, source, problems)


def _from_hub(name: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return list(load_dataset(PRESETS[name], split="train"))
    except Exception as error:  # offline, renamed, gated: hub errors have no common type
        raise InputError(
            f"`benchmarks`: `{name}` ({PRESETS[name]}) cannot be loaded: {error}. Without a network, give a local "
            ".jsonl file with the fields `problem` and `answer`."
        ) from error


def _from_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"`benchmarks`: there is no file {path}.")
    rows = []
    # `splitlines` would also split at U+2028 and the like, which may stand in a JSON string
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # no JSON, or no UTF-8
            raise InputError(f"{path}, line {number}: not JSON ({error}). Write one object per line.") from None
    return rows


def _problem(row: Any, index: int, source: str) -> Problem:
    if not isinstance(row, Mapping):
        raise InputError(f"{source}, row {index}: expected an object with `problem` and `answer`.")
    for field in ("problem", "answer"):
        if row.get(field) is None or not str(row[field]).strip():
            raise InputError(
                f"{source}, row {index}: the field `{field}` is missing or empty; the row has "
                f"{', '.join(f'`{key}`' for key in row)}."
            )
    return Problem(str(row.get("id", index)), str(row["problem"]), str(row["answer"]))
