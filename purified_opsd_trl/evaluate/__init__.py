"""
Evaluation with confidence intervals: samples, grades, summaries, comparisons.

```text
benchmarks -> prompts -> backends -> answers -> store -> summary -> compare
```
"""

from collections.abc import Sequence

from .arguments import EvaluateArguments, make_parser, parse


__all__ = ["EvaluateArguments", "main", "make_parser"]


def main(argv: Sequence[str]) -> int:
    """Runs `purified-opsd evaluate` with the arguments after the subcommand; returns the exit status."""
    args = parse(argv)
    from .compare import run_compare  # after the parser: `--help` does not wait for torch
    from .run import evaluate

    if args.compare:
        run_compare(args.compare, args.output_dir)
    else:
        evaluate(args)
    return 0
