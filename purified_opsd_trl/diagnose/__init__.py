"""
Diagnosis without training: what a plain teacher's signal consists of.

```text
rows -> contexts -> completions -> four distributions a token -> summary -> JSON, HTML, PNG
```
"""

from collections.abc import Sequence

from .run import diagnose, make_parser


__all__ = ["diagnose", "main", "make_parser"]


def main(argv: Sequence[str]) -> int:
    """
    The subcommand `diagnose`.

    Args:
        argv (`Sequence[str]`):
            Arguments after the subcommand.

    Returns:
        `int`: exit status.
    """
    diagnose(make_parser().parse_args(argv))
    return 0
