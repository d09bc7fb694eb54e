"""Samples to numbers: per benchmark and over all."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .benchmarks import Benchmark
from .metrics import average, bootstrap_interval, majority, mean_of_means, pass_at_k


def summarize(
    records: Iterable[dict[str, Any]],
    benchmarks: Sequence[Benchmark],
    num_samples: int,
    markers: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """
    Summary of one model's samples: `benchmarks` by name, and `average` over them.

    Samples of other benchmarks, and those beyond the first `num_samples` per problem, are left out.
    """
    by_benchmark: dict[str, dict[str, list[dict[str, Any]]]] = {
        b.name: {p.id: [] for p in b.problems} for b in benchmarks
    }
    for record in records:
        problem = by_benchmark.get(record["benchmark"], {}).get(record["problem_id"])
        if problem is not None and record["sample"] < num_samples:
            problem.append(record)
    per_benchmark = {name: _benchmark(problems, num_samples, markers, seed) for name, problems in by_benchmark.items()}
    names = list(next(iter(per_benchmark.values()))["per_problem"])
    groups = {key: [list(b["per_problem"][key].values()) for b in per_benchmark.values()] for key in names}
    return {
        "num_samples": num_samples,
        "benchmarks": per_benchmark,
        "average": {key: _with_interval(values, seed) for key, values in groups.items()},
    }


def _with_interval(groups: list[list[float]], seed: int) -> dict[str, Any]:
    return {"mean": mean_of_means(groups), "interval_95": list(bootstrap_interval(groups, seed=seed))}


def _benchmark(
    problems: dict[str, list[dict[str, Any]]], num_samples: int, markers: Sequence[str], seed: int
) -> dict[str, Any]:
    n = num_samples
    correct = {name: [r["correct"] for r in samples] for name, samples in problems.items()}
    answers = {name: [r["answer"] for r in samples] for name, samples in problems.items()}
    per_problem = {f"avg@{n}": {name: average(c) for name, c in correct.items()}}
    for k in [k for k in (1, 2, 4, 8, 16, 32, 64) if k < n] + [n]:
        per_problem[f"pass@{k}"] = {name: pass_at_k(n, sum(c), k) for name, c in correct.items()}
    per_problem[f"maj@{n}"] = {name: majority(answers[name], c) for name, c in correct.items()}
    samples = [record for group in problems.values() for record in group]
    tokens = np.array([record["tokens"] for record in samples])
    total = max(int(tokens.sum()), 1)
    counts = {marker: sum(record["markers"].get(marker, 0) for record in samples) for marker in markers}
    ungradable = [record["ungradable"] for record in samples if record.get("ungradable")]
    return {
        "problems": len(problems),
        "samples": len(samples),
        **{key: _with_interval([list(values.values())], seed) for key, values in per_problem.items()},
        "truncation_rate": float(np.mean([record["truncated"] for record in samples])),
        "answer_rate": float(np.mean([record["answer"] is not None for record in samples])),
        "ungradable": {"samples": len(ungradable), "first_reason": ungradable[0] if ungradable else None},
        "tokens": {
            "mean": float(tokens.mean()),
            **{f"p{q}": float(np.percentile(tokens, q)) for q in (10, 50, 90)},
            "max": int(tokens.max()),
            "mean_correct": _mean([record["tokens"] for record in samples if record["correct"]]),
            "mean_wrong": _mean([record["tokens"] for record in samples if not record["correct"]]),
        },
        "markers_per_1k": {
            "total": 1000 * sum(counts.values()) / total,
            **{name: 1000 * count / total for name, count in counts.items()},
        },
        "marker_counts": counts,
        "per_problem": per_problem,
    }


def _mean(values: list[int]) -> float | None:
    return sum(values) / len(values) if values else None


def print_summary(results: dict[str, Any]) -> None:
    """Prints one model's results as a table, percentages with their 95 % intervals."""
    n = results["num_samples"]
    keys = [f"avg@{n}", f"pass@{n}", f"maj@{n}"]
    print(f"\n{results['label']} ({results['backend']}, 95 % bootstrap intervals over problems)")
    print(f"  {'':12}" + "".join(f"{key:>24}" for key in keys) + f"{'tokens':>9}{'cut':>7}{'markers/1k':>12}")
    for name, values in results["benchmarks"].items():
        print(
            f"  {name[:12]:12}"
            + "".join(f"{_percent(values[key]):>24}" for key in keys)
            + f"{values['tokens']['mean']:9.0f}{values['truncation_rate']:7.0%}"
            + f"{values['markers_per_1k']['total']:12.2f}"
        )
    if len(results["benchmarks"]) > 1:
        print(f"  {'average':12}" + "".join(f"{_percent(results['average'][key]):>24}" for key in keys))
    for name, values in results["benchmarks"].items():
        if count := values["ungradable"]["samples"]:
            reason = values["ungradable"]["first_reason"]
            print(f"  {name}: {count} samples could not be graded and count as wrong; the first: {reason}")


def _percent(value: dict[str, Any]) -> str:
    low, high = value["interval_95"]
    return f"{100 * value['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
