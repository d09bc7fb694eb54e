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
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command_parser
from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from .checkpoints import find_checkpoint, is_whole
from .config import PurifiedOPSDConfig
from .errors import InputError
from .extras import require_extra
from .loading import PurifiedOPSDScriptArguments, load_splits, map_columns, pick_split
from .monitoring.report import ReportCallback
from .trainer import PurifiedOPSDTrainer


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
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ReportCallback):
            callback.dataset = script_args.dataset_name
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
