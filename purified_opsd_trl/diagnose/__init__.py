"""
Diagnosis without training: what a plain teacher's signal consists of.

```text
rows -> contexts -> completions -> four distributions per token -> summary -> JSON, HTML
```
"""

from collections.abc import Sequence

from .arguments import DiagnoseArguments, make_parser, parse
from .run import diagnose


__all__ = ["DiagnoseArguments", "diagnose", "main", "make_parser"]


def main(argv: Sequence[str]) -> int:
    """Runs `purified-opsd diagnose` with the arguments after the subcommand; returns the exit status."""
    diagnose(parse(argv))
    return 0
