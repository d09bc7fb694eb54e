"""`purified-opsd bench`: the loss, scoring, or a whole optimisation step, against what others pay for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """
    Runs one of the benchmarks and writes its report.

    Args:
        argv (`Sequence[str]`):
            `loss`, `scoring` or `step`, then the flags of that benchmark (`--help` lists them).

    Returns:
        `int`: exit status.
    """
    parser = argparse.ArgumentParser(prog="purified-opsd bench", description=__doc__)
    subparsers = parser.add_subparsers(dest="bench", required=True)
    subparsers.add_parser("loss", add_help=False, help="forward and backward of the loss")
    subparsers.add_parser("scoring", add_help=False, help="scoring with the reference first, its prefix run once")
    subparsers.add_parser("step", add_help=False, help="scoring, loss, backward and update of one step")
    bench = parser.parse_args(argv[:1]).bench
    if bench == "loss":
        from .loss import run as run_loss

        return run_loss(argv[1:])
    if bench == "scoring":
        from .scoring import run as run_scoring

        return run_scoring(argv[1:])
    from .step import run as run_step

    return run_step(argv[1:])
