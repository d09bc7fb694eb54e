"""
Datasets by name: a local file, a folder, a hub id or a mixture -> splits with a column `prompt`.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
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


@dataclass(frozen=True)
class _AsMessages:
    """Turns text prompts into messages; a plain object, so that `datasets` can hash it."""

    system_prompt: str | None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return {"prompt": [*system, {"role": "user", "content": row["prompt"]}]}


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
        `InputError`: if no dataset is named, or it cannot be found.
    """
    name = script_args.dataset_name
    try:
        if dataset_args.datasets:
            return get_mixture(dataset_args)
        if name is None:
            raise InputError("No dataset is named. Set `dataset_name` to a file, a folder or a hub id, or `datasets`.")
        file_format = _FILE_FORMATS.get(Path(name).suffix)
        if file_format is not None and not Path(name).is_dir():
            if not Path(name).is_file():
                raise InputError(f"`dataset_name`: there is no file {name} (looked in {os.getcwd()}).")
            files = {script_args.dataset_train_split: name}
            return load_dataset(file_format, data_files=files, streaming=script_args.dataset_streaming)
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (FileNotFoundError, DatasetNotFoundError, ConnectionError) as error:
        raise InputError(f"The dataset {name or dataset_args.datasets} cannot be loaded: {error}") from error


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
        The dataset with a column `"prompt"`.

    Raises:
        `InputError`: if the column is not there.
    """
    column = script_args.dataset_prompt_column
    columns = dataset.column_names or list(next(iter(dataset)))
    if column not in columns:
        raise InputError(
            f"The dataset has no column `{column}`; its columns are {', '.join(f'`{c}`' for c in columns)}. Set "
            "`dataset_prompt_column` to the column that holds the problem."
        )
    if column != "prompt":
        if "prompt" in columns:
            dataset = dataset.remove_columns("prompt")
        dataset = dataset.rename_column(column, "prompt")
    first = next(iter(dataset), None)
    if first is not None and isinstance(first["prompt"], str) and not script_args.text_prompts:
        dataset = dataset.map(_AsMessages(script_args.system_prompt))
    elif script_args.system_prompt:
        raise InputError("`system_prompt` is for text prompts that become messages; here it would have no effect.")
    return dataset
