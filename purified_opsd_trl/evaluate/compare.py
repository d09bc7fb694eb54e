"""
`purified-opsd evaluate --compare base.json opsd.json purified.json`: the paired table and its figure.

Two models answer the same problems, so their difference is taken problem by problem and the problems are drawn again:
most of the spread between problems cancels, and the interval of the difference is far narrower than those of the two
means suggest.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..extras import require_extra
from .metrics import bootstrap_interval, mean_of_means
from .paper import paper_rows


def load_results(paths: Sequence[str]) -> list[dict[str, Any]]:
    """
    Reads result files and checks that they can be paired.

    Args:
        paths (`Sequence[str]`):
            `results.json` files, or folders that hold one.

    Returns:
        `list[dict]`

    Raises:
        `InputError`: if one cannot be read, or they differ in benchmarks, problems or the number of samples.
    """
    results = []
    for path in paths:
        file = Path(path, "results.json") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InputError(f"`compare`: there is no file {file}.")
        results.append(json.loads(file.read_text(encoding="utf-8")))
        if "benchmarks" not in results[-1]:
            raise InputError(f"`compare`: {file} is no results.json of `purified-opsd evaluate`.")
    if len(results) < 2:
        raise InputError("`compare` needs two result files at least.")
    first = results[0]
    for other, path in zip(results[1:], paths[1:], strict=True):
        if other["num_samples"] != first["num_samples"]:
            raise InputError(
                f"`compare`: {path} has {other['num_samples']} samples a problem, {paths[0]} has "
                f"{first['num_samples']}. Evaluate both with the same `--num_samples`."
            )
        hashes = first.get("problem_sha256"), other.get("problem_sha256")  # results of old have none
        if _problems(other) != _problems(first) or (None not in hashes and hashes[0] != hashes[1]):
            raise InputError(f"`compare`: {path} and {paths[0]} were not evaluated on the same problems.")
    return results


def _problems(results: dict[str, Any]) -> dict[str, list[str]]:
    key = f"avg@{results['num_samples']}"
    return {name: sorted(b["per_problem"][key]) for name, b in results["benchmarks"].items()}


def compare(results: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """
    Differences from the first model, paired by problem, with 95 % bootstrap intervals over problems.

    Args:
        results (`Sequence[dict]`):
            Results that `load_results` found comparable; the first is the baseline.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict`: by benchmark (and `average`), by model: mean, interval, difference and its interval; in percentage
        points. And what else differs: settings, tokens, markers.
    """
    first = results[0]
    n = first["num_samples"]
    metric = f"avg@{n}"
    names = list(first["benchmarks"])
    scopes = {name: [name] for name in names} | ({"average": names} if len(names) > 1 else {})
    labels = _labels(results)
    table: dict[str, Any] = {}
    for scope, members in scopes.items():
        table[scope] = {}
        for label, result in zip(labels, results, strict=True):
            values = [_values(result, name, metric) for name in members]
            before = [_values(first, name, metric) for name in members]
            paired = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(before, values, strict=True)]
            table[scope][label] = {
                "mean": 100 * mean_of_means(values),
                "interval_95": [100 * x for x in bootstrap_interval(values, seed=seed)],
                "difference": 100 * mean_of_means(paired),
                "difference_interval_95": [100 * x for x in bootstrap_interval(paired, seed=seed)],
            }
    behaviour = {
        label: {
            name: {
                "tokens": b["tokens"]["mean"],
                "truncation_rate": b["truncation_rate"],
                "answer_rate": b["answer_rate"],
                "markers_per_1k": b["markers_per_1k"]["total"],
            }
            for name, b in result["benchmarks"].items()
        }
        for label, result in zip(labels, results, strict=True)
    }
    return {
        "metric": metric,
        "baseline": labels[0],
        "table": table,
        "behaviour": behaviour,
        "settings_that_differ": _differing(results, labels),
        "paper": paper_rows(first["settings"]["model"], names),
    }


def _labels(results: Sequence[dict[str, Any]]) -> list[str]:
    labels = [result["label"] for result in results]
    return [label if labels.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(labels)]


def _values(result: dict[str, Any], benchmark: str, metric: str) -> list[float]:
    values = result["benchmarks"][benchmark]["per_problem"][metric]
    return [values[problem] for problem in sorted(values)]


_IDENTITY = {"model", "model_weights", "adapter", "adapter_weights"}  # what is compared differs in these


def _differing(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    keys = sorted({key for result in results for key in result["settings"]} - _IDENTITY)
    return {
        key: {label: result["settings"].get(key) for label, result in zip(labels, results, strict=True)}
        for key in keys
        if len({json.dumps(result["settings"].get(key), sort_keys=True) for result in results}) > 1
    }


def markdown(comparison: dict[str, Any]) -> str:
    """The comparison as Markdown tables."""
    scopes, labels = list(comparison["table"]), list(comparison["behaviour"])
    lines = [
        f"# {comparison['metric']} (%), 95 % bootstrap intervals over problems",
        "",
        f"Differences are from `{comparison['baseline']}`, paired by problem.",
        "",
        "| model | " + " | ".join(scopes) + " |",
        "|---|" + "---|" * len(scopes),
    ]
    for label in labels:
        cells = []
        for scope in scopes:
            row = comparison["table"][scope][label]
            cell = f"{row['mean']:.1f} [{row['interval_95'][0]:.1f}, {row['interval_95'][1]:.1f}]"
            if label != comparison["baseline"]:
                low, high = row["difference_interval_95"]
                cell += f"<br>{row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            cells.append(cell)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for name, scores in comparison["paper"].items():
        cells = ["" if scores.get(scope) is None else f"{scores[scope]:.1f}" for scope in scopes]
        lines.append(f"| *paper: {name}* | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| model | benchmark | tokens | cut | answered | markers a 1,000 tokens |",
        "|---|---|---|---|---|---|",
    ]
    for label, benchmarks in comparison["behaviour"].items():
        for name, b in benchmarks.items():
            lines.append(
                f"| {label} | {name} | {b['tokens']:.0f} | {b['truncation_rate']:.0%} | {b['answer_rate']:.0%} | "
                f"{b['markers_per_1k']:.2f} |"
            )
    for key, values in comparison["settings_that_differ"].items():
        lines += ["", f"Not alike: `{key}` ({', '.join(f'{label}: {value}' for label, value in values.items())})."]
    return "\n".join(lines) + "\n"


def figure(comparison: dict[str, Any], path: Path) -> None:
    """
    Means with intervals, and paired differences with theirs, as PNG.

    Args:
        comparison (`dict`):
            What `compare` returned.
        path (`Path`):
            File to write.

    Raises:
        `ImportError`: without the extra `plot`.
    """
    require_extra("plot", "The figure of `--compare`", module="matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scopes, labels = list(comparison["table"]), list(comparison["behaviour"])
    canvas = FigureCanvasAgg(Figure(figsize=(11, 1.5 + 0.45 * len(scopes) * len(labels)), layout="constrained"))
    left, right = canvas.figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(labels)
    for i, label in enumerate(labels):
        offsets = [s + (i - (len(labels) - 1) / 2) * height for s in range(len(scopes))]
        for axis, value, interval in (
            (left, "mean", "interval_95"),
            (right, "difference", "difference_interval_95"),
        ):
            if axis is right and i == 0:
                continue
            rows = [comparison["table"][scope][label] for scope in scopes]
            centres = [row[value] for row in rows]
            errors = [
                [max(0.0, row[value] - row[interval][0]) for row in rows],
                [max(0.0, row[interval][1] - row[value]) for row in rows],
            ]
            axis.errorbar(centres, offsets, xerr=errors, fmt="osD^v"[i % 5], color=f"C{i}", capsize=3, label=label)
    left.set_yticks(range(len(scopes)), scopes)
    left.invert_yaxis()
    left.set_xlabel(f"{comparison['metric']} (%)")
    right.set_xlabel(f"difference from {comparison['baseline']} (points, paired)")
    right.axvline(0.0, color="0.5", linewidth=1)
    left.legend(fontsize="small")
    canvas.figure.suptitle("95 % bootstrap intervals over problems")
    canvas.figure.savefig(path, dpi=120)


def run_compare(paths: Sequence[str], output_dir: str) -> dict[str, Any]:
    """
    Compares result files; writes `comparison.json`, `comparison.md` and `comparison.png`.

    Args:
        paths (`Sequence[str]`):
            `results.json` files; the first is the baseline.
        output_dir (`str`):
            Folder to write to.

    Returns:
        `dict`: the comparison.
    """
    require_extra("plot", "The figure of `--compare`", module="matplotlib")
    comparison = compare(load_results(paths))
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    text = markdown(comparison)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    figure(comparison, folder / "comparison.png")
    print(text)
    print(f"Written: {folder}/comparison.json, .md, .png")
    return comparison
