"""A Markdown extension: `$...$` and `$$` blocks become MathML when the site is built; pages need no script."""

import re
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.inlinepatterns import InlineProcessor


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(convert(m.group(1))), m.start(), m.end()


class _Block(BlockProcessor):
    def test(self, parent: Element, block: str) -> bool:
        return block.startswith("$$\n") and block.endswith("\n$$")

    def run(self, parent: Element, blocks: list[str]) -> None:
        math = convert(blocks.pop(0)[2:-2].strip(), display="block")
        held = self.parser.md.htmlStash.store(f'<div style="margin: 1em 0; overflow-x: auto">{math}</div>')
        self.parser.parseBlocks(parent, [held])


class _MathML(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # Below the code spans (190), which may hold a dollar sign
        md.inlinePatterns.register(_Inline(r"(?<![\\$\w])\$(?!\s)([^$]+?)(?<!\s)\$(?![\w$])", md), "math", 185)
        md.parser.blockprocessors.register(_Block(md.parser), "math", 175)


def makeExtension(**kwargs: Any) -> _MathML:
    """Entry point for Python-Markdown."""
    return _MathML(**kwargs)
