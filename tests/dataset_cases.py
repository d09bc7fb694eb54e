"""Readers of rows, and datasets for them."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from purified_opsd_trl import build_contexts
from purified_opsd_trl.rows import RowReader


def build(row: dict[str, Any]):
    return build_contexts(
        row,
        reference_column="reference",
        teacher_prompt_template="Q: {question} R: {reference}",
        reference_prompt_template="R: {reference}",
    )


def reader_of(tokenizer, max_reference_length=None, max_prompt_length=None, truncate=False, build=build) -> RowReader:
    return RowReader(
        tokenizer,
        build,
        "reference",
        max_reference_length=max_reference_length,
        max_prompt_length=max_prompt_length,
        truncate=truncate,
    )


def rows_of(*references: Any, prompt: Any = "q") -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "reference": reference} for reference in references])


def left_out(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "invalid_rows.jsonl").read_text(encoding="utf-8").splitlines()]
