"""Fixtures of the tests of `purified-opsd evaluate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """Factory of samples, as `samples.jsonl` holds them."""
    return _record


def _record(problem: str, sample: int, **fields: Any) -> dict[str, Any]:
    return {
        "benchmark": "b",
        "problem_id": problem,
        "sample": sample,
        "answer": "1",
        "correct": True,
        "tokens": 100,
        "truncated": False,
        "markers": {"wait": 0},
        **fields,
    }


@pytest.fixture
def problems(tmp_path: Path) -> str:
    """A file of four sums."""
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def flags(model_dir: Path, problems: str, tmp_path: Path) -> list[str]:
    """A short evaluation: 4 problems, 3 samples each, into `out`."""
    return (
        f"evaluate --model_name_or_path {model_dir} --benchmarks {problems} --output_dir {tmp_path / 'out'} "
        "--num_generations 3 --max_completion_length 12 --batch_size 4 --backend transformers --dtype float32"
    ).split()


@pytest.fixture
def read_samples() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads the samples in a folder."""
    return lambda folder: [json.loads(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]
