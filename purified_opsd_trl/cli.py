"""The `purified-opsd` command: `train`, `check`, `diagnose`, `evaluate`, `bench` and `env`."""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from .errors import DEBUG_VARIABLE, exit_status


_COMMANDS = {
    "train": "train a model by purified self-distillation",
    "check": "show what a run would see and need, without training",
    "diagnose": "show what a teacher's signal consists of, without training",
    "evaluate": "sample and grade models on benchmarks, or compare results",
    "bench": "time the loss or a whole training step against other implementations",
    "env": "print what a bug report needs",
}


def _train(argv: list[str]) -> int:
    from .shutdown import launch
    from .train import launch_arguments, make_parser

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
