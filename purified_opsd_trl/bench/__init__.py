"""`purified-opsd bench`: the loss, scoring or a complete optimization step, beside other implementations."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence


_BENCHMARKS = {
    "loss": "forward and backward of the loss",
    "scoring": "scoring with the reference first, its prefix run once",
    "step": "scoring, loss, backward and update of one step",
    "pipeline": "training with rollouts ahead, against a running vLLM server",
    "gpu": "everything that only a GPU can show, in one report",
}


def main(argv: Sequence[str]) -> int:
    """Runs `purified-opsd bench` with the arguments after the subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="purified-opsd bench", description=__doc__)
    subparsers = parser.add_subparsers(dest="bench", required=True)
    for name, text in _BENCHMARKS.items():
        subparsers.add_parser(name, add_help=False, help=text)
    name = parser.parse_args(argv[:1]).bench
    return importlib.import_module(f".{name}", __package__).run(argv[1:])
