"""
Datasets by name: a local file, a folder, a hub id or a mixture -> splits with a column `prompt`.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Json, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from trl import DatasetMixtureConfig, ScriptArguments
from trl import get_dataset as get_mixture

from .dataset import AnyDataset
from .errors import InputError


_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class PurifiedOPSDScriptArguments(ScriptArguments):
    """
    What to train on, beside TRL's [`~trl.ScriptArguments`].

    Args:
        dataset_prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the problem: text or messages.
        dataset_reference_column (`str`, *optional*):
            Column that holds the worked solution. `None` takes `reference_column`.
        system_prompt (`str`, *optional*):
            System turn put before text prompts.
        text_prompts (`bool`, *optional*, defaults to `False`):
            Whether to leave text prompts as text, without chat template (base models). By default each becomes a user
            turn.
    """

    dataset_prompt_column: str = field(
        default="prompt", metadata={"help": "Column that holds the problem: text or messages."}
    )
    dataset_reference_column: str | None = field(
        default=None, metadata={"help": "Column that holds the worked solution. None: `reference_column`."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System turn put before text prompts."})
    text_prompts: bool = field(
        default=False,
        metadata={"help": "Leave text prompts as text, without chat template. By default each becomes a user turn."},
    )

    @property
    def mapped_reference_column(self) -> str | None:
        """Name of the reference column after `map_columns`: a column `prompt` makes room for the question."""
        return "reference" if self.dataset_reference_column == "prompt" else self.dataset_reference_column


@dataclass(frozen=True)
class _AsMessages:
    """Turns text prompts into messages, row by row; a plain object, so that `datasets` can hash it."""

    system_prompt: str | None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = row.get("prompt")  # of a stream, not every row may have one
        if isinstance(prompt, str):
            if prompt.startswith('[{"role":'):  # what the `datasets` library may make of messages far into a file
                raise InputError(
                    "A prompt is the JSON text of messages: some files hold text prompts and others messages. Give "
                    "them all one format, or put them into one JSONL file."
                )
            system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
            return {"prompt": [*system, {"role": "user", "content": prompt}]}
        if self.system_prompt and prompt is not None:
            raise InputError(_UNUSED_SYSTEM_PROMPT)
        return {"prompt": prompt}


_UNUSED_SYSTEM_PROMPT = (
    "`system_prompt` is for text prompts that become messages; here it would have no effect. Put the system turn into "
    "the messages, or leave the key out."
)


def load_splits(
    script_args: PurifiedOPSDScriptArguments, dataset_args: DatasetMixtureConfig
) -> DatasetDict | IterableDatasetDict:
    """
    Loads the dataset: a local JSON, JSONL or Parquet file, a folder, a hub id, or TRL's `datasets:` mixture.

    Args:
        script_args ([`PurifiedOPSDScriptArguments`]):
            Where the dataset is.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture, which takes precedence.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]: all splits.

    Raises:
        `InputError`: if no dataset is named, it cannot be found, or a file cannot be read (the message names the file
            and the line).
    """
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    split = script_args.dataset_train_split
    with readable_errors(name or dataset_args.datasets):
        for file in _json_files(name):
            _check_encoding(file)
        if dataset_args.datasets:
            return get_mixture(dataset_args)
        if name is None:
            raise InputError("No dataset is named. Set `dataset_name` to a file, a folder or a hub id, or `datasets`.")
        file_format = _FILE_FORMATS.get(Path(name).suffix)
        if file_format is None or Path(name).is_dir():
            return load_dataset(name, name=script_args.dataset_config, streaming=streaming)
        if not Path(name).is_file():
            raise InputError(f"`dataset_name`: there is no file {name} (looked in {os.getcwd()}).")
        if streaming and file_format == "json" and not _is_array(name):
            return IterableDatasetDict({split: IterableDataset.from_generator(read_lines, gen_kwargs={"path": name})})
        if streaming or file_format != "json":
            return load_dataset(file_format, data_files={split: name}, streaming=streaming)
        try:  # strict: by default a change of type far into the file silently makes JSON text of that part
            return load_dataset("json", data_files={split: name}, on_mixed_types=None)
        except (DatasetGenerationError, pa.ArrowException):
            chunk = Path(name).stat().st_size + 1  # one chunk, so that the types are those of the complete file
            return load_dataset("json", data_files={split: name}, chunksize=chunk)


@contextmanager
def readable_errors(name: Any) -> Iterator[None]:
    """One line for what the `datasets` library raises; and no request to a download counter, which it would send."""
    counts, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    except InputError:
        raise
    except (OSError, DatasetNotFoundError) as error:
        raise InputError(f"The dataset {name} cannot be loaded: {_one_line(error)}") from error
    except (DatasetGenerationError, pa.ArrowException, ValueError, IndexError, StopIteration) as error:
        for file in _json_files(name):
            for _ in read_lines(str(file), one_format=True):
                pass
        raise InputError(f"The dataset {name} cannot be read: {_one_line(error.__cause__ or error)}") from error
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


@contextmanager
def rows_named_by_line(name: Any) -> Iterator[None]:
    """Adds the line of a JSONL file to every row that an error about the training data names."""
    try:
        yield
    except InputError as error:
        files = _json_files(name)
        if not str(error).startswith("train_dataset") or files != [Path(name)] or _is_array(name):
            raise
        with open(name, "rb") as file:
            numbers = [number for number, line in enumerate(file, 1) if line.strip()]  # blank lines are no rows
        text = re.sub(r"\brow (\d+)", lambda found: f"{found[0]} (line {numbers[int(found[1])]})", str(error))
        raise InputError(text) from error


def _json_files(name: Any) -> list[Path]:
    """Local JSONL files that a dataset's name stands for."""
    if not isinstance(name, str) or not Path(name).exists():
        return []
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.rglob("*.json*"))
    return [file for file in files if _FILE_FORMATS.get(file.suffix) == "json"]


def _check_encoding(file: Path) -> None:
    """Finds what is not UTF-8 before the `datasets` library, which notices when a row is used."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as stream:
        try:
            while block := stream.read(1 << 20):
                decoder.decode(block)
        except UnicodeDecodeError as error:
            for _ in read_lines(str(file)):
                pass
            raise InputError(f"{file}: the file is not UTF-8. Convert it.") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_array(path: str | Path) -> bool:
    """Whether a JSON file is one array instead of one object per line."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def read_lines(path: str, one_format: bool = False) -> Iterator[dict[str, Any]]:
    """
    Reads a JSONL file line by line.

    Args:
        path (`str`):
            File.
        one_format (`bool`, *optional*, defaults to `False`):
            Whether a column must hold the same kind of value in every line.

    Yields:
        `dict[str, Any]`: a row per line; blank lines are skipped.

    Raises:
        `InputError`: for a line that is not one JSON object in UTF-8; the message names file and line.
    """
    kinds: dict[str, tuple[str, int]] = {}
    with open(path, "rb") as file:
        if _is_array(path):
            _parse(file.read(), path)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _parse(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: a line must be a JSON object, got {type(row).__name__}.")
            for column, value in row.items() if one_format else ():
                own = type(value).__name__
                kind, first = kinds.setdefault(column, (own, number)) if value is not None else (own, 0)
                if kind != own:
                    raise InputError(
                        f"{path}, line {number}: column `{column}` is a {own}, but a {kind} in line {first}. Use one "
                        "type per column."
                    )
            yield row


def _parse(data: bytes, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise InputError(f"{where}: the key {twice!r} occurs twice.")
        return dict(pairs)

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start + 1} is not UTF-8. Convert the file, e.g. from Latin-1 with `iconv -f latin1 "
            "-t utf8`."
        ) from None
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: the text holds half a surrogate pair, which UTF-8 cannot encode. Repair the step that wrote it."
        ) from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: this is not valid JSON ({error.msg}, {place}).") from None
    return value


def pick_split(splits: DatasetDict | IterableDatasetDict, split: str, key: str) -> AnyDataset:
    """
    One split of a dataset.

    Raises:
        `InputError`: if there is no such split; the message lists those there are and names `key`.
    """
    if split not in splits:
        raise InputError(
            f"The dataset has no split `{split}`; it has {', '.join(f'`{s}`' for s in splits)}. Set `{key}`."
        )
    return splits[split]


def map_columns(dataset: AnyDataset, script_args: PurifiedOPSDScriptArguments) -> AnyDataset:
    """
    Renames the prompt column and turns text prompts into messages.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset as loaded.
        script_args ([`PurifiedOPSDScriptArguments`]):
            Names of the columns, and what becomes of text prompts.

    Returns:
        The dataset with a column `"prompt"`. A reference column of that name becomes `"reference"`.

    Raises:
        `InputError`: if a column is not there, or two have to have the same name.
    """
    column, reference = script_args.dataset_prompt_column, script_args.dataset_reference_column
    columns = dataset.column_names
    if isinstance(dataset, IterableDataset):
        with readable_errors(script_args.dataset_name):
            columns = columns or list(next(iter(dataset), {}))
    if not columns:
        raise InputError("The dataset has no rows.")
    if column == reference:
        raise InputError(
            f"`dataset_prompt_column` and `dataset_reference_column` both name `{column}`. Name the column of the "
            "problem and that of its worked solution."
        )
    for name, key in ((column, "dataset_prompt_column"), (reference, "dataset_reference_column")):
        if name is not None and name not in columns:
            raise InputError(
                f"The dataset has no column `{name}`; its columns are {', '.join(f'`{c}`' for c in columns)}. Set "
                f"`{key}` to the column that holds the {'problem' if name == column else 'worked solution'}."
            )
    if column != "prompt":
        if reference == "prompt":
            if "reference" in columns:
                raise InputError(
                    "The column `prompt` is the reference, but there is a column `reference` as well. Rename one."
                )
            dataset = dataset.rename_column("prompt", "reference")
        elif "prompt" in columns:
            dataset = dataset.remove_columns("prompt")
        dataset = dataset.rename_column(column, "prompt")
    return _with_messages(dataset, script_args)


def _with_messages(dataset: AnyDataset, script_args: PurifiedOPSDScriptArguments) -> AnyDataset:
    """Text prompts as messages, where that is asked for; a stream, and a file of both, decides row by row."""
    kind = dataset.features["prompt"] if isinstance(dataset, Dataset) else None
    if script_args.text_prompts or not isinstance(kind, (Value, Json, type(None))):
        if script_args.system_prompt:
            raise InputError(_UNUSED_SYSTEM_PROMPT)
        return dataset
    return dataset.map(_AsMessages(script_args.system_prompt))
