"""The `purified-opsd` command: `train`, `diagnose`, `evaluate`, `bench` and `env`."""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import DEBUG_VARIABLE, InputError, exit_status


_COMMANDS = {
    "train": "train a model by purified self-distillation",
    "diagnose": "show what a teacher's signal consists of, without training",
    "evaluate": "sample and grade models on benchmarks, or compare results",
    "bench": "time the loss or a whole training step against other implementations",
    "env": "print what a bug report needs",
}


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
    import yaml
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
    from .shutdown import launch
    from .train import make_parser

    # Parsed here once for `--help` and for errors before anything is launched; the script parses again for itself
    parsed, from_config, from_command_line = make_parser(prog="purified-opsd train").parse_known(argv)
    use_cpu = ["--use_cpu", "true"] if parsed[1].use_cpu else []  # may be inferred, which is then said only once
    module = "purified_opsd_trl.train"
    return launch([*launch_arguments(from_config, from_command_line), "-m", module, *argv, *use_cpu], module)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a subcommand.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments; those of the process by default.

    Returns:
        `int`: exit status. 2 for what the user can fix; its line is on stderr, its traceback with `--debug`.
    """
    parser = argparse.ArgumentParser(prog="purified-opsd", description="Purified on-policy self-distillation for TRL.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("purified_opsd_trl"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        subparsers.add_parser(name, help=text, add_help=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    first = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    args = parser.parse_args(argv[: first + 1])  # a subcommand parses its own arguments
    rest = argv[first + 1 :]
    # After the subcommand too; with a value it is an option of transformers
    debug = [i for i, word in enumerate(rest) if word == "--debug" and "".join(rest[i + 1 : i + 2])[:2] in ("", "--")]
    rest = [word for i, word in enumerate(rest) if i not in debug]
    if args.debug or debug:
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        if args.command == "train":
            return _train(rest)
        return importlib.import_module(f".{args.command}", __package__).main(rest)
    except Exception as error:
        return exit_status(error)


if __name__ == "__main__":
    raise SystemExit(main())
