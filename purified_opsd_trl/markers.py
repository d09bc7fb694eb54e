"""
Counts epistemic markers: words by which a model expresses doubt and checks itself ("Wait", "Perhaps").

Counting works on decoded text, so that it does not depend on how a tokenizer splits a word.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


DEFAULT_MARKERS = ("wait", "maybe", "perhaps", "check", "hmm", "actually", "alternatively")
PAPER_MARKERS = ("wait", "maybe", "perhaps", "check")  # the four that the paper counts

TOKEN_CLASSES = ("epistemic", "digits", "other")

# Letters that continue a Latin word; Chinese or Japanese text next to "wait" does not
_LATIN = r"A-Za-z\u00c0-\u024f0-9_"
_ANSWER = re.compile(r"\\boxed\s*\{\s*[^\s}]|####\s*\S|\banswer\s*(?:is|:)\s*\S", re.IGNORECASE)


@dataclass(frozen=True)
class Marker:
    """One occurrence: the marker in lower case, and its span in the text in characters."""

    name: str
    start: int
    end: int


class MarkerCounter:
    r"""
    Finds markers (words or phrases) as whole words.

    Case does not matter, and any white space matches a space inside a marker. Text inside a longer word ("checked",
    "await", "check_sum") or after a backslash (LaTeX's `\check`) is not a marker. A marker that ends in a doubled
    letter a-z may be prolonged: "hmm" finds "Hmmmm". Overlapping markers ("wait", "wait a moment") count once, as the
    longest.
    """

    def __init__(self, markers: Sequence[str] = DEFAULT_MARKERS):
        self.markers = tuple(dict.fromkeys(marker.strip().lower() for marker in markers))
        longest_first = sorted(self.markers, key=len, reverse=True)
        groups = (f"(?P<m{self.markers.index(marker)}>{_pattern(marker)})" for marker in longest_first)
        self._regex = re.compile("|".join(groups), re.IGNORECASE)

    def find(self, text: str) -> list[Marker]:
        """All occurrences, in order."""
        return [
            Marker(self.markers[int(match.lastgroup[1:])], match.start(), match.end())
            for match in self._regex.finditer(text)
            if match.lastgroup is not None
        ]

    def count(self, text: str) -> dict[str, int]:
        """Occurrences of each marker, zeros included."""
        counts = dict.fromkeys(self.markers, 0)
        for marker in self.find(text):
            counts[marker.name] += 1
        return counts


def _pattern(marker: str) -> str:
    body = r"\s+".join(re.escape(word) for word in marker.split())
    if re.search(r"([a-z])\1$", marker):
        body += re.escape(marker[-1]) + "*"
    left = rf"(?<![{_LATIN}\\])" if re.match(f"[{_LATIN}]", marker[0]) else ""
    right = rf"(?![{_LATIN}])" if re.match(f"[{_LATIN}]", marker[-1]) else ""
    return left + body + right


class TokenClassifier:
    """
    Sorts the tokens of a completion into `TOKEN_CLASSES`.

    A token is `epistemic` if it holds a letter of a marker, however the tokenizer splits the word; `digits` if it
    holds a digit and no letter; otherwise `other`.
    """

    def __init__(self, tokenizer: Any, counter: MarkerCounter):
        self.tokenizer = tokenizer
        self.counter = counter
        self._pieces: dict[int, str] = {}
        # Some tokenizers drop the space before the first token of a text: decode every token behind an anchor
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text: str = self._decode(self._anchor)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each of the C tokens; a part of a character's bytes becomes a replacement character."""
        for token in set(ids) - self._pieces.keys():
            self._pieces[token] = self._decode([*self._anchor, token])[len(self._anchor_text) :]
        return [self._pieces[token] for token in ids]

    def classify(self, ids: Sequence[int]) -> list[int]:
        """Index into `TOKEN_CLASSES` of each of the C tokens of one completion."""
        pieces = self.pieces(ids)
        spans = iter(self.counter.find("".join(pieces)))
        span, start, classes = next(spans, None), 0, []
        for piece in pieces:
            end = start + len(piece)
            while span is not None and span.end <= start:
                span = next(spans, None)
            # The part of the token inside the marker must be more than white space
            inside = span is not None and piece[max(span.start - start, 0) : max(span.end - start, 0)].strip()
            if inside:
                classes.append(TOKEN_CLASSES.index("epistemic"))
            elif any(c.isdigit() for c in piece) and not any(c.isalpha() for c in piece):
                classes.append(TOKEN_CLASSES.index("digits"))
            else:
                classes.append(TOKEN_CLASSES.index("other"))
            start = end
        return classes


def has_answer(text: str) -> bool:
    r"""Whether a completion states an answer: `\boxed{...}`, `#### ...`, "answer is ..." or "answer: ..."."""
    return _ANSWER.search(text) is not None


def distinct(ids: Sequence[int], n: int) -> float:
    """Share of distinct n-grams in a token sequence, in (0, 1]: near 0 in a loop, 1 for fewer than `n` tokens."""
    total = len(ids) - n + 1
    return len({tuple(ids[i : i + n]) for i in range(total)}) / total if total > 0 else 1.0
