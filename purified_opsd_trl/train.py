"""
Training script, run by `purified-opsd train` and by `accelerate launch -m purified_opsd_trl.train --config ...`.

```bash
purified-opsd train \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name problems.jsonl --dataset_prompt_column problem --dataset_reference_column solution \
    --use_peft --lora_r 64 \
    --output_dir outputs/Qwen3-0.6B-Purified-OPSD
```
"""

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command_parser
from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl import get_dataset as get_mixture

from .checkpoints import find_checkpoint, is_whole
from .config import PurifiedOPSDConfig
from .dataset import AnyDataset
from .errors import InputError
from .extras import require_extra
from .trainer import PurifiedOPSDTrainer


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
    Loads the data set: a local JSON, JSONL or Parquet file, a folder, a hub id, or TRL's `datasets:` mixture.

    Args:
        script_args ([`PurifiedOPSDScriptArguments`]):
            Where the data set is.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture, which takes precedence.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]: all splits.

    Raises:
        `InputError`: if no data set is named, or it cannot be found.
    """
    name = script_args.dataset_name
    try:
        if dataset_args.datasets:
            return get_mixture(dataset_args)
        if name is None:
            raise InputError(
                "No data set is named. Set `dataset_name` to a file, a folder or a hub id, or `datasets`."
            )
        file_format = _FILE_FORMATS.get(Path(name).suffix)
        if file_format is not None and not Path(name).is_dir():
            if not Path(name).is_file():
                raise InputError(f"`dataset_name`: there is no file {name} (looked in {os.getcwd()}).")
            files = {script_args.dataset_train_split: name}
            return load_dataset(file_format, data_files=files, streaming=script_args.dataset_streaming)
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (FileNotFoundError, DatasetNotFoundError, ConnectionError) as error:
        raise InputError(f"The data set {name or dataset_args.datasets} cannot be loaded: {error}") from error


def pick_split(splits: DatasetDict | IterableDatasetDict, split: str, key: str) -> AnyDataset:
    """
    One split of a data set.

    Raises:
        `InputError`: if there is no such split; the message lists those there are and names `key`.
    """
    if split not in splits:
        raise InputError(
            f"The data set has no split `{split}`; it has {', '.join(f'`{s}`' for s in splits)}. Set `{key}`."
        )
    return splits[split]


def map_columns(dataset: AnyDataset, script_args: PurifiedOPSDScriptArguments) -> AnyDataset:
    """
    Renames the prompt column and turns text prompts into messages.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Data set as loaded.
        script_args ([`PurifiedOPSDScriptArguments`]):
            Names of the columns, and what becomes of text prompts.

    Returns:
        The data set with a column `"prompt"`.

    Raises:
        `InputError`: if the column is not there.
    """
    column = script_args.dataset_prompt_column
    columns = dataset.column_names or list(next(iter(dataset)))
    if column not in columns:
        raise InputError(
            f"The data set has no column `{column}`; its columns are {', '.join(f'`{c}`' for c in columns)}. Set "
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


def check_checkpoint(training_args: PurifiedOPSDConfig) -> str | bool | None:
    """
    Checkpoint to resume from: a path, or for `true` the newest whole one in the output directory.

    Raises:
        `InputError`: if there is none, or the one named was not written to its end.
    """
    value = training_args.resume_from_checkpoint
    if value is None or str(value).lower() == "false":
        return None
    if str(value).lower() == "true":
        return find_checkpoint(training_args.output_dir or "")
    if not os.path.isdir(value):
        raise InputError(f"`resume_from_checkpoint`: there is no folder {value}.")
    if not is_whole(value):
        raise InputError(
            f"`resume_from_checkpoint`: {value} is incomplete, the job was killed while it wrote it. Name an earlier "
            "checkpoint, or set `true` to take the newest whole one."
        )
    return value


def _check_extras(training_args: PurifiedOPSDConfig, model_args: ModelConfig) -> None:
    if model_args.use_peft:
        require_extra("peft", "`use_peft`")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        require_extra("quantization", "`load_in_4bit` or `load_in_8bit`", module="bitsandbytes")
    if training_args.deepspeed is not None:
        require_extra("deepspeed", "`deepspeed`")
    if "wandb" in (training_args.report_to or []):
        require_extra("wandb", "`report_to: wandb`")


def main(
    script_args: PurifiedOPSDScriptArguments,
    training_args: PurifiedOPSDConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> PurifiedOPSDTrainer:
    """
    Trains as the four dataclasses say, saves the model and its card.

    Args:
        script_args ([`PurifiedOPSDScriptArguments`]):
            What to train on.
        training_args ([`PurifiedOPSDConfig`]):
            How to train.
        model_args ([`~trl.ModelConfig`]):
            Which model, and its adapter.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture of data sets.

    Returns:
        [`PurifiedOPSDTrainer`]: after training.

    Raises:
        `InputError`: if a setting or the data cannot be used.
        `ImportError`: if a setting needs an extra that is not installed.
    """
    if model_args.model_name_or_path is None:
        raise InputError("No model is named. Set `model_name_or_path` to a folder or a hub id.")
    _check_extras(training_args, model_args)
    checkpoint = check_checkpoint(training_args)
    if script_args.dataset_reference_column is not None:
        training_args.reference_column = script_args.dataset_reference_column
    splits = load_splits(script_args, dataset_args)
    train_dataset = pick_split(splits, script_args.dataset_train_split, "dataset_train_split")
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = map_columns(
            pick_split(splits, script_args.dataset_test_split, "dataset_test_split"), script_args
        )
    # The quantization goes to the trainer as an argument of its own, not through `model_init_kwargs`
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),  # type: ignore[dict-item]  # parsed to a dict by the config
    }
    trainer = PurifiedOPSDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=map_columns(train_dataset, script_args),
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    assert training_args.output_dir is not None
    on_hub = script_args.dataset_name if not os.path.exists(script_args.dataset_name or "") else None
    trainer.create_model_card(model_name=Path(training_args.output_dir).name, dataset_name=on_hub)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=on_hub)
    return trainer


def make_parser(prog: str | None = None) -> TrlParser:
    """Parser over script, training, model and mixture arguments, in TRL's convention."""
    types: Any = (PurifiedOPSDScriptArguments, PurifiedOPSDConfig, ModelConfig, DatasetMixtureConfig)
    return TrlParser(types, prog=prog)


def check_unknown_keys(parser: TrlParser, remaining: Sequence[str]) -> None:
    """
    Checks that what the parser did not take is meant for `accelerate launch`.

    Args:
        parser ([`~trl.TrlParser`]):
            The script's parser.
        remaining (`Sequence[str]`):
            Strings it left over, from the YAML file and the command line.

    Raises:
        `InputError`: for a key that neither knows; the message suggests the nearest one.
    """
    ours = {option for action in parser._actions for option in action.option_strings}
    accelerates = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for key in (item.split("=")[0] for item in remaining if item.startswith("--")):
        if key not in accelerates and key != "--accelerate_config":
            near = difflib.get_close_matches(key, ours, n=1)
            hint = f" Did you mean `{near[0].removeprefix('--')}`?" if near else ""
            raise InputError(f"Unknown key `{key.removeprefix('--')}`, in the YAML file or on the command line.{hint}")


def run(argv: Sequence[str] | None = None) -> None:
    """
    Entry point of the script: parses, trains, and prints errors of the user's making as one line.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments; those of the process by default.
    """
    try:
        parser = make_parser()
        *parsed, remaining = parser.parse_args_and_config(argv, return_remaining_strings=True)
        check_unknown_keys(parser, remaining)
        main(*parsed)
    except (InputError, ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
