"""
Evaluation with honest intervals: samples, grades, summaries, comparisons.

```text
benchmarks -> (prompts) -> backends -> answers -> store -> summary -> compare
```
"""

from collections.abc import Sequence

from .arguments import EvaluateArguments, parse
from .compare import run_compare
from .run import evaluate


__all__ = ["EvaluateArguments", "evaluate", "main", "run_compare"]


def main(argv: Sequence[str]) -> int:
    """
    The subcommand `evaluate`.

    Args:
        argv (`Sequence[str]`):
            Arguments after the subcommand.

    Returns:
        `int`: exit status.
    """
    args, compared, output_dir = parse(argv)
    if args is None:
        run_compare(compared, output_dir)
    else:
        evaluate(args)
    return 0
