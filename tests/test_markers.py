"""Epistemic markers against counts made by hand."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from purified_opsd_trl.markers import (
    DEFAULT_MARKERS,
    TOKEN_CLASSES,
    MarkerCounter,
    TokenClassifier,
    distinct,
    has_answer,
)


TRICKY = [
    ("Wait, wait! WAIT? await waiting waiter", {"wait": 3}),
    ("\n\nWait—that is wrong.\tWait", {"wait": 2}),
    ("wait...wait", {"wait": 2}),
    ("\\check{x} is an accent, check $x$.", {"check": 1}),
    ("checked, checks, re-check, check_sum, Check:", {"check": 2}),
    ("Hmm, Hmmmm. hm", {"hmm": 2}),
    ("May be maybe MAYBE", {"maybe": 2}),
    ("Perhaps_not perhaps2 (perhaps)", {"perhaps": 1}),
    ("Actually, factually; alternatively", {"actually": 1, "alternatively": 1}),
    ("等等wait一下", {"wait": 1}),
    ("Éwait waité", {}),
    ("**Wait** <think>Wait</think>", {"wait": 2}),
    ("", {}),
]


@pytest.mark.parametrize(("text", "expected"), TRICKY, ids=lambda value: value[:12] if isinstance(value, str) else "")
def test_markers_are_counted_as_words(text: str, expected: dict[str, int]) -> None:
    assert MarkerCounter().count(text) == dict.fromkeys(DEFAULT_MARKERS, 0) | expected


def test_phrases_and_other_scripts_can_be_markers() -> None:
    counter = MarkerCounter(["wait", "Wait a moment", "等等"])
    assert counter.count("wait  a\nmoment, wait, 等等等等") == {"wait": 1, "wait a moment": 1, "等等": 2}


def sentencepiece_like(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """A Llama-2-style tokenizer: `▁` for spaces, and a decoder that drops the first one."""
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=vocabulary[0])


def test_token_classes_do_not_depend_on_the_tokenizer(tokenizer: Any) -> None:
    pieces = ["<unk>", "▁a", "a", "▁W", "ait", "▁Wait", "▁await", ",", "▁12", "3x", "▁\n"]
    split = sentencepiece_like(pieces)
    classifier = TokenClassifier(split, MarkerCounter())

    def classes(*tokens: str) -> list[str]:
        ids = [pieces.index(token) for token in tokens]
        return [TOKEN_CLASSES[kind] for kind in classifier.classify(ids)]

    assert classes("▁W", "ait", ",", "▁12", "3x") == ["epistemic", "epistemic", "other", "digits", "other"]
    assert classes("▁Wait", "▁await", "▁Wait") == ["epistemic", "other", "epistemic"]
    assert classes("▁a", "ait", "▁W", "▁a") == ["other", "other", "other", "other"]
    by_byte = TokenClassifier(tokenizer, MarkerCounter())
    ids = list("é wait 7".encode())
    assert [TOKEN_CLASSES[k] for k in by_byte.classify(ids)] == ["other"] * 3 + ["epistemic"] * 4 + ["other", "digits"]


def test_answers_and_repetition() -> None:
    answered = ["so \\boxed{4}", "#### 12", "The answer is 5.", "**Answer:** 3"]
    assert all(has_answer(text) for text in answered)
    assert not any(has_answer(text) for text in ["", "\\boxed{}", "I wonder", "####", "the answer"])
    assert distinct([1, 2, 1, 2, 1], 2) == 0.5
    assert distinct([7], 2) == 1.0
    assert distinct([1, 2, 3, 4], 2) == 1.0
