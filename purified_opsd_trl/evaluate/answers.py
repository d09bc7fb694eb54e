"""Answers in completions, and whether they are right, by math-verify."""

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..extras import require_extra


# It warns when its timeouts are off; they are on here
logging.getLogger("math_verify").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Grade:
    """What became of a completion."""

    answer: str | None  # the answer found, in one spelling for equal values
    correct: bool  # whether it equals the right one
    ungradable: str | None = None  # why it could not be compared; it then counts as wrong


def final_text(completion: str, thinking_open: bool = False) -> str:
    """
    What a completion says after its thinking: the part after the last `</think>`.

    While the thinking is still open (cut at the length limit, say) that is nothing, as numbers in it are no answer.
    `thinking_open` says whether the prompt itself ended in `<think>`.
    """
    before, tag, after = completion.rpartition("</think>")
    if tag:
        return after if "<think>" not in after else ""
    return "" if thinking_open or "<think>" in completion else completion


def grade(completion: str, answer: str, thinking_open: bool = False) -> Grade:
    """Compares a completion's answer with the right one, text or LaTeX. No completion raises."""
    require_extra("eval", "Grading answers", module="math_verify")
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException  # not an `Exception`

    text = final_text(completion, thinking_open)
    found: list[Any] = []
    correct, failure = False, None
    try:
        found = parse(text, raise_on_error=True) if text.strip() else []
        correct = bool(found) and bool(verify(_gold(answer), found, raise_on_error=True))
    except (Exception, TimeoutException) as error:
        # Either may fail in many ways; verify alone goes on with the next pair of forms if it may not raise
        correct = bool(found) and bool(verify(_gold(answer), found))
        failure = None if correct else _reason(error)
    try:
        spelled = str(found[0]) if found else None
    except Exception:  # Python spells no integer of more than 4,300 digits
        spelled = str(found[-1])[:200] if isinstance(found[-1], str) else None
    return Grade(spelled, correct, failure)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


@lru_cache(maxsize=4096)
def _gold(answer: str) -> Any:
    from math_verify import parse

    # Boxed, so that a bare LaTeX expression is read as one
    return parse(answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}")
