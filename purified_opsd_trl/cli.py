"""The `purified-opsd` command: `train`, `diagnose`, `evaluate`, `bench` and `env`."""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from .errors import InputError


_COMMANDS = {
    "train": "train a model by purified self-distillation",
    "diagnose": "show what a teacher's signal consists of, without training",
    "evaluate": "sample and grade models on benchmarks, or compare results",
    "bench": "time the loss or a whole step against its peers",
    "env": "print what a bug report needs",
}


def launch_arguments(from_recipe: list[str], from_command_line: list[str]) -> list[str]:
    """
    Arguments of `accelerate launch`: the command line goes before the accelerate file, the file before the recipe.

    To the launcher every argument goes before its file. A recipe's `num_processes: 1` is for those who name no file,
    so what the file sets is left out of the recipe's arguments.

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
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

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


def _train(argv: list[str]) -> int:
    from trl.cli.commands.training import _subtract_subsequence

    from .shutdown import launch
    from .train import check_unknown_keys, make_parser

    # Parsed here once for `--help` and for errors before anything is launched; the script parses again for itself
    parser = make_parser(prog="purified-opsd train")
    *_, from_config, from_command_line = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    check_unknown_keys(parser, from_config + from_command_line)
    launch_args = launch_arguments(from_config, from_command_line)
    script_args = _subtract_subsequence(argv, from_command_line)
    # quiet: the script has said what is wrong; the launcher's own traceback would bury it
    module = "purified_opsd_trl.train"
    return launch([*launch_args, "--quiet", "-m", module, *script_args], module)


def _diagnose(argv: list[str]) -> int:
    from .diagnose import main as diagnose

    return diagnose(argv)


def _evaluate(argv: list[str]) -> int:
    from .evaluate import main as evaluate

    return evaluate(argv)


def _bench(argv: list[str]) -> int:
    from .bench import main as bench

    return bench(argv)


def _env(argv: list[str]) -> int:
    from .env import main as env

    return env(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a subcommand.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments; those of the process by default.

    Returns:
        `int`: exit status; 2 for input that cannot be used.
    """
    parser = argparse.ArgumentParser(prog="purified-opsd", description="Purified on-policy self-distillation for TRL.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("purified_opsd_trl"))
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        subparsers.add_parser(name, help=text, add_help=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_known_args(argv[:1])[0].command  # a subcommand parses its own arguments
    try:
        return {"train": _train, "diagnose": _diagnose, "evaluate": _evaluate, "bench": _bench, "env": _env}[command](
            argv[1:]
        )
    except (InputError, ImportError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
