"""
Metrics of an evaluation, over problems: P problems, n samples each, c of them correct.

The bootstrap resamples problems, not samples: the samples of a problem are not independent evidence about other
problems, and a benchmark of 30 problems stays one of 30 however often each is sampled.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


RESAMPLES = 10_000


def average(correct: Sequence[bool]) -> float:
    """avg@n of one problem: the share of its samples that are correct."""
    return sum(correct) / len(correct)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k <= n` samples is correct: `1 - C(n - c, k) / C(n, k)`."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """
    maj@n of one problem: whether the most frequent answer is correct; in expectation over a lot that breaks ties.

    Samples without an answer (`None`) do not vote; 0 if none votes. All correct samples are one answer.
    """
    # A correct answer has one key, whatever its spelling; `(False, ...)` cannot collide with it
    keys: list[Hashable] = [
        (True, None) if good else (False, answer)
        for answer, good in zip(answers, correct, strict=True)
        if good or answer is not None
    ]
    if not keys:
        return 0.0
    votes = Counter(keys)
    most = max(votes.values())
    winners = [key for key, count in votes.items() if count == most]
    return float((True, None) in winners) / len(winners)


def bootstrap_interval(
    groups: Sequence[Sequence[float]], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of the mean over benchmarks of the mean over problems.

    `groups` holds the value of each problem, by benchmark; problems are resampled within their benchmark.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for values in groups:
        array = np.asarray(values, dtype=float)
        total += array[rng.integers(len(array), size=(resamples, len(array)))].mean(axis=1)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(total / len(groups), [tail, 1.0 - tail])
    return float(low), float(high)


def mean_of_means(groups: Sequence[Sequence[float]]) -> float:
    """Mean over benchmarks of the mean over problems."""
    return sum(sum(values) / len(values) for values in groups) / len(groups)
