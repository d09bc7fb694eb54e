"""Metrics by hand and by another method; the summary of samples."""

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from purified_opsd_trl.evaluate.benchmarks import load_benchmark
from purified_opsd_trl.evaluate.metrics import average, bootstrap_interval, majority, mean_of_means, pass_at_k
from purified_opsd_trl.evaluate.summary import summarize


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 5), (5, 5, 1), (6, 1, 4), (4, 3, 2)])
def test_pass_at_k_is_the_mean_over_all_choices(n: int, c: int, k: int) -> None:
    outcomes = [True] * c + [False] * (n - c)
    choices = list(itertools.combinations(outcomes, k))
    expected = Fraction(sum(any(choice) for choice in choices), len(choices))
    assert pass_at_k(n, c, k) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 1.0),
        (["4", "5", "5"], [True, False, False], 0.0),
        (["4", "5"], [True, False], 0.5),
        (["4", "5", "6"], [True, False, False], 1 / 3),
        (["1/2", "0.5", "5", "5"], [True, True, False, False], 0.5),  # one answer in two spellings
        ([None, None, "4"], [False, False, True], 1.0),  # who has no answer does not vote
        ([None, None], [False, False], 0.0),
    ],
)
def test_majority(answers: list[str | None], correct: list[bool], expected: float) -> None:
    assert majority(answers, correct) == pytest.approx(expected)


def test_average_is_the_share_correct() -> None:
    assert average([True, False, False, True]) == 0.5


def test_the_interval_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = np.random.default_rng(3).beta(0.5, 0.5, size=30)
    ours = bootstrap_interval([values.tolist()], resamples=50_000)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=0.95,
        n_resamples=50_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert ours != pytest.approx(bootstrap_interval([values.tolist()], level=0.5), abs=0.02)


def test_the_interval_of_an_average_is_stratified() -> None:
    # Two benchmarks without spread of their own: nothing varies, however far they are apart
    assert bootstrap_interval([[0.0] * 5, [1.0] * 7]) == (0.5, 0.5)
    assert mean_of_means([[0.0] * 5, [1.0] * 7]) == 0.5
    values = [np.random.default_rng(i).random(40).tolist() for i in range(2)]
    low, high = bootstrap_interval(values, resamples=50_000)
    error = np.sqrt(sum(np.var(v) / len(v) for v in values)) / 2
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.03)


def test_the_summary_equals_the_computation_by_hand(tmp_path: Path, record: Callable[..., dict[str, Any]]) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"id": "x", "problem": "p", "answer": "1"}\n{"id": "y", "problem": "p", "answer": "2"}\n')
    records = [
        record("x", 0, tokens=100, markers={"wait": 3}),
        record("x", 1, tokens=300),
        record("y", 0, correct=False, answer=None, tokens=500, truncated=True, markers={"wait": 1}, ungradable="why"),
        record("y", 1, tokens=100, ungradable=None),
        record("y", 2, tokens=9999, ungradable="other"),  # a sample more than asked for
    ]
    summary = summarize(records, [load_benchmark(str(path))], 2, ["wait"], seed=0)
    b = summary["benchmarks"]["b"]
    assert b["avg@2"]["mean"] == 0.75 and b["pass@1"]["mean"] == 0.75 and b["pass@2"]["mean"] == 1.0
    assert b["maj@2"]["mean"] == 1.0
    assert b["avg@2"]["interval_95"] == [0.5, 1.0]
    assert b["truncation_rate"] == 0.25 and b["answer_rate"] == 0.75
    assert b["tokens"]["mean"] == 250 and b["tokens"]["mean_wrong"] == 500 and b["samples"] == 4
    assert b["markers_per_1k"] == {"total": 4.0, "wait": 4.0} and b["marker_counts"] == {"wait": 4}
    assert b["ungradable"] == {"samples": 1, "first_reason": "why"}
    assert b["per_problem"]["avg@2"] == {"x": 1.0, "y": 0.5}
    assert summary["average"]["avg@2"]["mean"] == 0.75
