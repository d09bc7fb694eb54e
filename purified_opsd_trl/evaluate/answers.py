"""Answers out of completions, and whether they are right, by math-verify."""

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..extras import require_extra


# It warns when its timeouts are off; they are on here
logging.getLogger("math_verify").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Grade:
    """
    Attributes:
        answer (`str` or `None`):
            The answer found, in one spelling for equal values; `None` for none.
        correct (`bool`):
            Whether it equals the right one.
    """

    answer: str | None
    correct: bool


def final_text(completion: str, thinking_open: bool = False) -> str:
    """
    What a completion says after its thinking.

    Args:
        completion (`str`):
            Completion, with `<think>` tags if the model writes them.
        thinking_open (`bool`, *optional*, defaults to `False`):
            Whether the prompt itself ended in `<think>`.

    Returns:
        `str`: the part after the last `</think>`; nothing while the thinking is still open (cut at the length limit,
        say), as numbers in it are no answer.
    """
    before, tag, after = completion.rpartition("</think>")
    if tag:
        return after if "<think>" not in after else ""
    return "" if thinking_open or "<think>" in completion else completion


def grade(completion: str, answer: str, thinking_open: bool = False) -> Grade:
    """
    Compares a completion's answer with the right one.

    Args:
        completion (`str`):
            Completion.
        answer (`str`):
            Right answer, as text or LaTeX.
        thinking_open (`bool`, *optional*, defaults to `False`):
            Whether the prompt itself ended in `<think>`.

    Returns:
        [`Grade`]

    Raises:
        `ImportError`: without the extra `eval`.
    """
    require_extra("eval", "Grading answers", module="math_verify")
    from math_verify import parse, verify

    text = final_text(completion, thinking_open)
    found = parse(text) if text.strip() else []
    if not found:
        return Grade(None, False)
    return Grade(str(found[0]), bool(verify(_gold(answer), found)))


@lru_cache(maxsize=4096)
def _gold(answer: str) -> Any:
    from math_verify import parse

    # Boxed, so that a bare LaTeX expression is read as one
    return parse(answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}")
