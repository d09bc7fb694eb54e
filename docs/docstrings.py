"""A griffe extension: docstrings in TRL's format, as Markdown for the API page."""

import re
from typing import Any

import griffe


_SECTION = re.compile(r"(Args|Parameters|Attributes|Returns|Raises|Example):$")
_ITEM = re.compile(r"    ([\w*]+) \((.*)\):$")
_LINK = re.compile(r"\[`~?((?:\w+\.)*)(\w+(?:\.\w+)*)`\](?!\()")


def to_markdown(text: str) -> str:
    """
    Sections become headings in bold, their entries list items; everything else is Markdown already.

    Args:
        text (`str`):
            Docstring, without common indentation.

    Returns:
        `str`
    """
    lines: list[str] = []
    section = None
    for line in _LINK.sub(lambda match: f"`{match.group(2)}`", text).splitlines():
        if found := _SECTION.match(line):
            section = found.group(1)
            lines += ["", f"**{section}**", ""]
        elif section is None or section == "Example" or (line and not line.startswith("    ")):
            section = section if section == "Example" else None
            lines.append(line)
        elif line.startswith("    > "):  # a heading between parameters
            lines += ["", f"*{line[6:]}*", ""]
        elif item := _ITEM.match(line):
            lines += [f"- `{item.group(1)}` ({item.group(2)}):"]
        elif section == "Raises" and line.startswith("    `"):
            lines.append(f"- {line.strip()}")
        else:
            lines.append(line[4:])
    return "\n".join(lines)


class TRLDocstrings(griffe.Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
