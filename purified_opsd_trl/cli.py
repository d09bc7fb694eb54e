"""The `purified-opsd` command: `train`, `diagnose`, `evaluate` and `bench`."""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from .errors import InputError


_COMMANDS = {
    "train": "train a model by purified self-distillation",
    "diagnose": "show what a teacher's signal consists of, without training",
    "evaluate": "sample and grade models on benchmarks, or compare results",
    "bench": "time the loss or a whole step against its peers",
}


def _train(argv: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    from .train import check_unknown_keys, make_parser

    # Parsed here once for `--help` and for errors before anything is launched; the script parses again for itself
    parser = make_parser(prog="purified-opsd train")
    *_, from_config, from_command_line = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    check_unknown_keys(parser, from_config + from_command_line)
    launch_args = resolve_accelerate_config_argument(from_config + from_command_line)
    script_args = _subtract_subsequence(argv, from_command_line)
    # quiet: the script has said what is wrong; the launcher's own traceback would bury it
    launch_command(
        launch_command_parser().parse_args([*launch_args, "--quiet", "-m", "purified_opsd_trl.train", *script_args])
    )
    return 0


def _diagnose(argv: list[str]) -> int:
    from .diagnose import main as diagnose

    return diagnose(argv)


def _evaluate(argv: list[str]) -> int:
    from .evaluate import main as evaluate

    return evaluate(argv)


def _bench(argv: list[str]) -> int:
    from .bench import main as bench

    return bench(argv)


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
        return {"train": _train, "diagnose": _diagnose, "evaluate": _evaluate, "bench": _bench}[command](argv[1:])
    except (InputError, ImportError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
