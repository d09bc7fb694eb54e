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

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate.commands.launch import launch_command_parser
from transformers.utils import cached_file, logging
from trl import DatasetMixtureConfig, ModelConfig, get_peft_config, get_quantization_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .arguments import CommandParser
from .checkpoints import check_named_checkpoint, find_checkpoint
from .config import PurifiedOPSDConfig
from .errors import InputError, exit_status, one_line
from .extras import require_extra
from .loading import PurifiedOPSDScriptArguments, load_splits, map_columns, pick_split, rows_named_by_line


if TYPE_CHECKING:
    from .trainer import PurifiedOPSDTrainer

logger = logging.get_logger(__name__)

RENAMED = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "prompt_column": "dataset_prompt_column",
    "max_new_tokens": "max_completion_length",
    "markers": "epistemic_markers",
}
_WANDB_TIMEOUT = 5  # seconds


def check_checkpoint(training_args: PurifiedOPSDConfig) -> str | bool | None:
    """
    Checkpoint to resume from: a path, or for `true` the newest complete one in the output directory.

    Raises:
        `InputError`: if there is none, or the one named is incomplete or damaged.
    """
    value = training_args.resume_from_checkpoint
    if value is None or str(value).lower() == "false":
        return None
    if str(value).lower() == "true":
        return find_checkpoint(training_args.output_dir or "")
    check_named_checkpoint(value)
    return value


def check_model(name: str, revision: str | None) -> None:
    """Raises an `InputError` if the model is not there; only its `config.json` is read."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not os.path.isdir(os.path.expanduser(name)):
        raise InputError(f"`model_name_or_path`: there is no folder {name} (looked in {os.getcwd()}).")
    try:
        cached_file(name, "config.json", revision=revision)
    except OSError as error:
        raise InputError(f"`model_name_or_path`: {name} cannot be loaded: {one_line(error)}") from error


def _check_output_dir(folder: str) -> None:
    """Checks that the output directory can be written, before anything is loaded."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"`output_dir`: {folder} cannot be created: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"`output_dir`: {folder} cannot be written to.")


def keep_wandb_offline() -> None:
    """Keeps the run of wandb on this disk where its server cannot be reached, instead of waiting and failing."""
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared") or "WANDB_DISABLED" in os.environ:
        return
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        urllib.request.urlopen(url, timeout=_WANDB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says
    except OSError as error:
        os.environ["WANDB_MODE"] = "offline"
        if os.environ.get("RANK", "0") == "0":
            reason = getattr(error, "reason", error)
            logger.warning(
                f"wandb: {url} cannot be reached ({reason}). The run is kept offline in "
                f"{os.environ.get('WANDB_DIR', 'wandb')}/; upload it with `wandb sync`."
            )


def check_extras(training_args: PurifiedOPSDConfig, model_args: ModelConfig) -> None:
    """Raises an `ImportError` if a setting needs an extra that is not installed."""
    if model_args.use_peft:
        require_extra("peft", "`use_peft`")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        require_extra("quantization", "`load_in_4bit` or `load_in_8bit`", module="bitsandbytes")
    if training_args.deepspeed is not None:
        require_extra("deepspeed", "`deepspeed`")
    if "wandb" in (training_args.report_to or []):
        require_extra("wandb", "`report_to: wandb`")


def _load_data(
    script_args: PurifiedOPSDScriptArguments, training_args: PurifiedOPSDConfig, dataset_args: DatasetMixtureConfig
) -> tuple[Any, Any]:
    """Training data and, where the run evaluates, evaluation data, in the trainer's columns."""
    splits = load_splits(script_args, dataset_args)
    train = map_columns(pick_split(splits, script_args.dataset_train_split, "dataset_train_split"), script_args)
    if training_args.eval_strategy == "no":
        return train, None
    return train, map_columns(pick_split(splits, script_args.dataset_test_split, "dataset_test_split"), script_args)


def main(
    script_args: PurifiedOPSDScriptArguments,
    training_args: PurifiedOPSDConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> "PurifiedOPSDTrainer":
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
            Mixture of datasets.

    Returns:
        [`PurifiedOPSDTrainer`]: after training.

    Raises:
        `InputError`: if a setting or the data cannot be used.
        `ImportError`: if a setting needs an extra that is not installed.
    """
    from .monitoring.report import ReportCallback  # not needed for `--help`

    name = model_args.model_name_or_path
    if name is None:
        raise InputError("No model is named. Set `model_name_or_path` to a folder or a hub id.")
    assert training_args.output_dir is not None  # the config sets it
    check_model(name, model_args.model_revision)
    _check_output_dir(training_args.output_dir)
    check_extras(training_args, model_args)
    if "wandb" in (training_args.report_to or []):
        keep_wandb_offline()
    checkpoint = check_checkpoint(training_args)
    if script_args.mapped_reference_column is not None:
        training_args.reference_column = script_args.mapped_reference_column
    train_dataset, eval_dataset = _load_data(script_args, training_args, dataset_args)
    with rows_named_by_line(script_args.dataset_name):
        trainer = make_trainer(training_args, model_args, train_dataset, eval_dataset)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ReportCallback):
            callback.dataset = script_args.dataset_name
    trainer.dataset_name = script_args.dataset_name
    with rows_named_by_line(script_args.dataset_name):  # a stream is checked as it is trained on
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    on_hub = script_args.dataset_name if not os.path.exists(script_args.dataset_name or "") else None
    trainer.create_model_card(model_name=Path(training_args.output_dir).name, dataset_name=on_hub)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=on_hub)
    return trainer


def make_trainer(
    args: PurifiedOPSDConfig, model_args: ModelConfig, train_dataset: Any, eval_dataset: Any = None
) -> "PurifiedOPSDTrainer":
    """The trainer of a model that is loaded as `model_args` say."""
    from .trainer import PurifiedOPSDTrainer  # not needed for `--help`

    # The quantization goes to the trainer as an argument of its own, not through `model_init_kwargs`
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),  # type: ignore[dict-item]  # parsed to a dict by the config
    }
    return PurifiedOPSDTrainer(
        model=str(model_args.model_name_or_path),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def make_parser(prog: str | None = None) -> CommandParser:
    """Parser over script, training, model and mixture arguments; options of `accelerate launch` are left over."""
    types: Any = (PurifiedOPSDScriptArguments, PurifiedOPSDConfig, ModelConfig, DatasetMixtureConfig)
    launcher = {option for action in launch_command_parser()._actions for option in action.option_strings}
    names = {option.removeprefix("--").replace("-", "_") for option in launcher if option.startswith("--")}
    return CommandParser(types, prog=prog, renamed=RENAMED, other={*names, "accelerate_config"})


def launch_arguments(from_recipe: list[str], from_command_line: list[str]) -> list[str]:
    """
    Arguments of `accelerate launch`: the command line takes precedence over the accelerate file, the file over the
    recipe.

    To the launcher every argument takes precedence over its file. A recipe's `num_processes: 1` is for those who name
    no file, so what the file sets is left out of the recipe's arguments.

    Args:
        from_recipe (`list[str]`):
            Launcher arguments of the recipe, `--key value` each.
        from_command_line (`list[str]`):
            Those of the command line.

    Returns:
        `list[str]`: with `--accelerate_config` resolved to a file.

    Raises:
        [`InputError`]: if `--accelerate_config` is neither a file nor the name of one of TRL's.
    """
    try:
        arguments = resolve_accelerate_config_argument(from_recipe + from_command_line)
    except ValueError as error:
        raise InputError(str(error)) from error
    if "--config_file" not in arguments:
        return arguments
    file = Path(arguments[arguments.index("--config_file") + 1])
    in_file = yaml.safe_load(file.read_text(encoding="utf-8"))
    pairs = zip(from_recipe[::2], from_recipe[1::2], strict=True)
    kept = [word for key, value in pairs if key.removeprefix("--") not in in_file for word in (key, value)]
    return resolve_accelerate_config_argument(kept + from_command_line)


def run(argv: Sequence[str] | None = None) -> None:
    """
    Entry point of the script: parses and trains. Errors that a user can fix are printed as one line.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments; those of the process by default.

    Raises:
        `SystemExit`: with status 2, for such an error.
    """
    try:
        parsed, _, _ = make_parser().parse_known(sys.argv[1:] if argv is None else argv)
        main(*parsed)
    except Exception as error:
        sys.exit(exit_status(error))


if __name__ == "__main__":
    run()
