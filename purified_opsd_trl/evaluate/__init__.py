"""
Evaluation with confidence intervals: samples, grades, summaries, comparisons.

```text
benchmarks -> prompts -> backends -> answers -> store -> summary -> compare
```
"""

from collections.abc import Sequence

from .arguments import EvaluateArguments, make_parser, parse
from .compare import run_compare
from .run import evaluate


__all__ = ["EvaluateArguments", "evaluate", "main", "make_parser", "run_compare"]


def main(argv: Sequence[str]) -> int:
    """Runs `purified-opsd evaluate` with the arguments after the subcommand; returns the exit status."""
    args = parse(argv)
    if args.compare:
        run_compare(args.compare, args.output_dir)
    else:
        evaluate(args)
    return 0
