"""
Checks of the data: columns and formats before the model is loaded, every row before training or as it arrives.

A map-style dataset is read once, on the main process, and the result is kept for the next run with the same data and
settings. A streamed dataset is checked row by row. What is left out is counted, printed and written to a file.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import datasets.config
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .errors import InputError, one_line
from .images import IMAGE_COLUMNS, undecoded
from .rows import Fault, Row, RowReader


logger = logging.getLogger(__name__)

INVALID_ROWS_FILE = "invalid_rows.jsonl"
_READ_ROWS = 256  # rows read at once: enough to feed the tokenizer's threads
_NAMED = 10  # bad rows that a message names
_OTHER_FORMAT = "column `prompt`: some prompts are text and some messages. Use one format."

AnyDataset: TypeAlias = Dataset | IterableDataset
_Result = TypeVar("_Result")


def as_dataset(data: Any, name: str) -> AnyDataset:
    """
    Takes what TRL takes: a dataset of the `datasets` library, a list of rows, or a map-style torch dataset of rows.

    Args:
        data:
            The data.
        name (`str`):
            How errors name it, e.g. `"train_dataset"`.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        `InputError`: if it is none of these.
    """
    if isinstance(data, (Dataset, IterableDataset)):
        return data
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise InputError(f"{name} holds several splits ({', '.join(data)}); pass one of them, e.g. `{name}['train']`.")
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, (str, Mapping)):
        raise InputError(
            f"{name} must be a `Dataset` or `IterableDataset` of the `datasets` library or a list of rows, got "
            f"{type(data).__name__}."
        )
    rows = [data[i] for i in range(len(data))]
    other = next((i for i, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if other is not None:
        kind = type(rows[other]).__name__
        raise InputError(f"{name}, row {other}: a row must map column names to values, got {kind}.")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    try:
        return Dataset.from_list([{c: row.get(c) for c in columns} for row in rows], on_mixed_types="use_json")
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{name} cannot be converted to a `Dataset`: {one_line(error)}") from error


def check_columns(dataset: AnyDataset, name: str, reference_column: str) -> None:
    """
    Checks that the dataset has the columns the trainer reads.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to check. A streamed dataset that does not know its columns is not checked here.
        name (`str`):
            How errors name the dataset, e.g. `"train_dataset"`.
        reference_column (`str`):
            Name of the column that holds the worked solution.

    Raises:
        `InputError`: if a column is missing (the message lists those there are), or the dataset is empty.
    """
    columns = dataset.column_names
    if columns is None:
        return
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise InputError(f"{name} has no rows.")
    listed = ", ".join(f"`{column}`" for column in columns) or "none"
    for column, key in (("prompt", "dataset_prompt_column"), (reference_column, "reference_column")):
        if column not in columns:
            raise InputError(
                f"{name} has no column `{column}`; its columns are {listed}. Rename the column, or name yours with "
                f"`{key}`."
            )


def row_blocks(dataset: Dataset) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Reads a dataset block by block: number of a block's first row, and its rows; images stay as they are stored."""
    dataset = undecoded(dataset)
    for start in range(0, len(dataset), _READ_ROWS):
        columns = dataset[start : start + _READ_ROWS]
        yield start, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@dataclass
class Findings:
    """What a pass over a dataset found. Its size does not grow with the rows that are fine."""

    rows: int = 0
    invalid: list[int] = field(default_factory=list)
    overlong: list[int] = field(default_factory=list)
    named: list[str] = field(default_factory=list)  # the first invalid rows, with the reason
    worst: tuple[int, int] = (0, 0)  # row with the longest reference, and the tokens it is too long by
    text: int = 0  # rows whose prompt is text

    def add(self, index: int, row: Row, fault: Fault | None) -> Fault | None:
        """Counts a row; returns its fault, which may be that its format differs from that of the rows before."""
        is_text = isinstance(row.get("prompt"), str)
        usable = self.rows - len(self.invalid)
        if (fault is None or fault.excess) and usable and is_text != (self.text == usable):
            fault = Fault(_OTHER_FORMAT)
        self.rows += 1
        if fault is None or fault.excess:
            self.text += is_text
        if fault is not None and fault.excess:
            self.overlong.append(index)
            if fault.excess > self.worst[1]:
                self.worst = (index, fault.excess)
        elif fault is not None:
            self.invalid.append(index)
            if len(self.named) < _NAMED:
                self.named.append(f"row {index}, {fault.reason}")
        return fault


@dataclass(frozen=True)
class DatasetCheck:
    """
    Reads every row of a dataset and applies the policies for rows that cannot be used.

    Args:
        reader ([`RowReader`]):
            Reads rows.
        invalid_rows (`str`):
            `"error"` or `"drop"`.
        overlong_reference (`str`):
            `"error"`, `"drop"` or `"truncate"`.
        output_dir (`str`):
            Folder for the file with the rows that were left out.
        accelerator ([`~accelerate.Accelerator`]):
            Processes that share the result.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        cache_key (`str`, *optional*):
            Everything but the data that the result depends on. `None` keeps no result.
    """

    reader: RowReader
    invalid_rows: str
    overlong_reference: str
    output_dir: str
    accelerator: Accelerator
    show_progress: bool = True
    cache_key: str | None = None

    def __call__(self, dataset: AnyDataset, name: str, least_rows: int = 1) -> AnyDataset:
        """
        Checks a dataset.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Dataset with `prompt` and the reference column.
            name (`str`):
                How messages name the dataset.
            least_rows (`int`, *optional*, defaults to `1`):
                Rows of one generation batch.

        Returns:
            The dataset without the rows that were dropped. A streamed dataset is checked as its rows arrive.

        Raises:
            `InputError`: if a row cannot be used and is not to be dropped, or too few are left.
        """
        if isinstance(dataset, IterableDataset):
            return dataset.filter(_StreamCheck(self, name), with_indices=True)
        findings = on_main_process(lambda: self._find(dataset, name), self.accelerator)
        left_out = list(findings.invalid)
        if findings.invalid and self.invalid_rows == "error":
            raise InputError(_invalid_message(name, findings))
        if findings.overlong and self.overlong_reference == "error":
            raise InputError(_overlong_message(name, findings))
        if findings.text and self.reader.chat_template is not None:
            logger.warning(_text_warning(name))
        for rows, policy, what in (
            (findings.invalid, self.invalid_rows, "that cannot be used"),
            (findings.overlong, self.overlong_reference, "whose reference is too long"),
        ):
            if rows and policy == "truncate":
                count = f"the reference of {len(rows)} of {findings.rows} rows is too long and will be truncated."
                self.accelerator.print(f"{name}: {count}")
            elif rows:
                self.accelerator.print(f"{name}: dropped {len(rows)} of {findings.rows} rows {what}.")
                left_out = sorted({*left_out, *rows})
        if (usable := findings.rows - len(left_out)) < least_rows:
            raise InputError(
                f"{name} has {usable} usable rows, fewer than the {least_rows} of one generation batch "
                "(`per_device_train_batch_size` x processes x `gradient_accumulation_steps`). Lower one of these, or "
                "add rows."
            )
        if not left_out:
            return dataset
        if self.accelerator.is_main_process:
            self._write(dataset, name, left_out)
        return dataset.select(np.delete(np.arange(len(dataset)), left_out))

    def _find(self, dataset: Dataset, name: str) -> Findings:
        cached = self._cache_file(dataset)
        if cached is not None and cached.is_file():
            try:
                return Findings(**json.loads(cached.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                logger.warning("%s is damaged, so %s is checked again.", cached, name)
        findings = Findings()
        with tqdm(total=len(dataset), desc=f"Checking {name}", unit=" rows", disable=not self.show_progress) as bar:
            for start, rows in row_blocks(dataset):
                for index, (row, fault) in enumerate(zip(rows, self.reader.faults(rows), strict=True), start):
                    findings.add(index, row, fault)
                bar.update(len(rows))
        if cached is not None:
            _keep(cached, findings)
        return findings

    def _cache_file(self, dataset: Dataset) -> Path | None:
        if self.cache_key is None:
            return None
        key = hashlib.sha256(f"{dataset._fingerprint} {self.cache_key}".encode()).hexdigest()
        return Path(datasets.config.HF_DATASETS_CACHE) / "purified_opsd_trl" / f"{key}.json"

    def _write(self, dataset: Dataset, name: str, left_out: list[int]) -> None:
        file = LeftOutRows(self.output_dir)
        for start in range(0, len(left_out), _READ_ROWS):
            indices = left_out[start : start + _READ_ROWS]
            rows = [dataset[i] for i in indices]
            for index, row, fault in zip(indices, rows, self.reader.faults(rows), strict=True):
                file.add(name, index, row, _OTHER_FORMAT if fault is None else fault.reason)


class _StreamCheck:
    """Filter of a streamed dataset: `(row, position) -> keep?`."""

    def __init__(self, check: DatasetCheck, name: str):
        self.check, self.name = check, name
        self.findings = Findings()
        self.file = LeftOutRows(check.output_dir)

    def __call__(self, row: Row, index: int) -> bool:
        if index == 0:
            self.findings = Findings()  # another epoch
        found, check = self.findings, self.check
        fault = found.add(index, row, check.reader.faults([row])[0])
        if found.text == 1 and found.rows - len(found.invalid) == 1 and check.reader.chat_template is not None:
            logger.warning(_text_warning(self.name))
        policy = check.overlong_reference if fault is not None and fault.excess else check.invalid_rows
        if fault is None or policy == "truncate":
            return True
        if policy == "error":
            raise InputError(
                _overlong_message(self.name, found) if fault.excess else _invalid_message(self.name, found)
            )
        count = len(found.invalid) + len(found.overlong)
        if count <= _NAMED or count % 100 == 0:
            logger.warning("%s: left out row %d (%d so far), %s", self.name, index, count, fault.reason)
        if check.accelerator.is_main_process:
            self.file.add(self.name, index, row, fault.reason)
        return False


class LeftOutRows:
    """
    File of the rows that were left out, one JSON object per line: dataset, row, reason, and the row itself.

    Lines are appended, each once: a resumed run, or another epoch, meets the same rows again.

    Args:
        output_dir (`str`):
            Folder of the file.
    """

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / INVALID_ROWS_FILE
        self._known: set[bytes] | None = None  # digests of the lines, read when the first one is added

    def add(self, name: str, index: int, row: Row, reason: str) -> None:
        """Appends a row unless the file has it."""
        data = {column: value for column, value in row.items() if column not in IMAGE_COLUMNS}
        line = json.dumps({"dataset": name, "row": index, "reason": reason, "data": data}, default=str)
        if self._known is None:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
            self._known = {_digest(known) for known in lines}
        if _digest(line) in self._known:
            return
        self._known.add(_digest(line))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class FirstStepGuard(TrainerCallback):
    """Refuses a training that ended before its first step because a streamed dataset had too few usable rows."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and args.max_steps > 0:
            raise InputError(
                "train_dataset ended before the first step: it has fewer usable rows than one generation batch. Check "
                f"{Path(args.output_dir) / INVALID_ROWS_FILE}, or lower `per_device_train_batch_size` or "
                "`gradient_accumulation_steps`."
            )


def on_main_process(compute: Callable[[], _Result], accelerator: Accelerator | PartialState) -> _Result:
    """
    Computes on the main process alone; every process gets its result, or raises its error.

    Args:
        compute (`Callable[[], T]`):
            What to compute.
        accelerator ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`]):
            Processes, all of which must call.

    Returns:
        What the main process computed.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = compute()
        except Exception as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _keep(path: Path, findings: Findings) -> None:
    """Writes a result for the next run; a folder that cannot be written only costs that run the time."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(vars(findings)), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("The check of the data cannot be kept for the next run: %s", error)


def _digest(line: str) -> bytes:
    return hashlib.sha256(line.encode()).digest()


def _text_warning(name: str) -> str:
    return (
        f"{name}: the prompts are text, so the model's chat template is not applied. Give messages "
        '(`[{"role": "user", "content": ...}]`) if this is a chat model.'
    )


def _invalid_message(name: str, findings: Findings) -> str:
    more = len(findings.invalid) - len(findings.named)
    named = "; ".join(findings.named) + (f"; and {more} more" if more else "")
    return (
        f"{name}, {named} ({len(findings.invalid)} of {findings.rows} rows cannot be used; set `invalid_rows: drop` "
        "to leave such rows out)"
    )


def _overlong_message(name: str, findings: Findings) -> str:
    worst, excess = findings.worst
    return (
        f"{name}: {len(findings.overlong)} of {findings.rows} rows have a reference that is too long (row {worst} by "
        f"{excess} tokens). Set `overlong_reference` to `drop` or `truncate`, raise `max_reference_length`, or lower "
        "`max_completion_length`."
    )
