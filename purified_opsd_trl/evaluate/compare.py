"""
`purified-opsd evaluate --compare base opsd purified`: the paired table and its figure.

Two models answer the same problems, so differences are taken problem by problem and the problems are resampled: most
of the spread between problems cancels, and the interval of the difference is far narrower than those of the two means.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..extras import require_extra
from .inspect_logs import is_log, read_archive, results_from_logs
from .metrics import bootstrap_interval, mean_of_means
from .paper import paper_rows
from .store import read_json, write_json


_IDENTITY = {"model", "model_weights", "adapter", "adapter_weights"}  # what is compared differs in these


def load_results(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Results that can be paired: `results.json` files, logs of inspect_ai, or folders of either."""
    results = [_load(Path(path)) for path in paths]
    if len(results) < 2:
        raise InputError("`compare` needs at least two results.")
    first = results[0]
    for other, path in zip(results[1:], paths[1:], strict=True):
        if other["num_samples"] != first["num_samples"]:
            raise InputError(
                f"`compare`: {path} has {other['num_samples']} samples per problem, {paths[0]} has "
                f"{first['num_samples']}. Evaluate both with the same `num_generations`."
            )
        hashes = first.get("problem_sha256"), other.get("problem_sha256")  # results of old have none
        if _problems(other) != _problems(first) or (None not in hashes and hashes[0] != hashes[1]):
            raise InputError(f"`compare`: {path} and {paths[0]} were not evaluated on the same problems.")
    return results


def _load(path: Path) -> dict[str, Any]:
    """The results in a file or folder; a folder of logs holds one per task."""
    if path.is_dir() and not (path / "results.json").exists():
        if files := sorted(path.glob("*.eval")) or sorted(path.glob("*.json")):
            return results_from_logs([(file, _read(file)) for file in files], path.name)
    file = path / "results.json" if path.is_dir() else path
    content = _read(file)
    if is_log(content):
        return results_from_logs([(file, content)], None)
    try:
        _problems(content), _behavior(content), content["label"], content["settings"]["model"]
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"`compare`: {file} is neither a results.json of `purified-opsd evaluate` nor a log of inspect_ai."
        ) from None
    return content


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"`compare`: there is no file {file}.")
    return read_archive(file) if file.suffix == ".eval" else read_json(file, "Evaluate again, or restore it.")


def _problems(results: dict[str, Any]) -> dict[str, list[str]]:
    key = f"avg@{results['num_samples']}"
    return {name: sorted(b["per_problem"][key]) for name, b in results["benchmarks"].items()}


def _behavior(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """What else is compared, by benchmark."""
    return {
        name: {
            "tokens": b["tokens"]["mean"],
            "truncation_rate": b["truncation_rate"],
            "answer_rate": b["answer_rate"],
            "markers_per_1k": b["markers_per_1k"]["total"],
        }
        for name, b in results["benchmarks"].items()
    }


def compare(results: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """
    Differences from the first model, paired by problem, with 95 % bootstrap intervals over problems.

    In `table`, by benchmark (and `average`) and by model: mean, difference and their intervals, in percentage points.
    Besides, what else differs: `behavior` (tokens, markers, ...) and `settings_that_differ`.
    """
    first = results[0]
    metric = f"avg@{first['num_samples']}"
    names = list(first["benchmarks"])
    scopes = {name: [name] for name in names} | ({"average": names} if len(names) > 1 else {})
    labels = [result["label"] for result in results]
    labels = [label if labels.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(labels)]
    named = dict(zip(labels, results, strict=True))
    table: dict[str, Any] = {}
    for scope, members in scopes.items():
        table[scope] = {}
        before = [_values(first, name, metric) for name in members]
        for label, result in named.items():
            values = [_values(result, name, metric) for name in members]
            paired = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(before, values, strict=True)]
            table[scope][label] = {
                "mean": 100 * mean_of_means(values),
                "interval_95": [100 * x for x in bootstrap_interval(values, seed=seed)],
                "difference": 100 * mean_of_means(paired),
                "difference_interval_95": [100 * x for x in bootstrap_interval(paired, seed=seed)],
            }
    keys = sorted({key for result in results for key in result["settings"]} - _IDENTITY)
    settings = {key: {label: result["settings"].get(key) for label, result in named.items()} for key in keys}
    return {
        "metric": metric,
        "baseline": labels[0],
        "table": table,
        "behavior": {label: _behavior(result) for label, result in named.items()},
        "settings_that_differ": {
            key: values
            for key, values in settings.items()
            if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1
        },
        "paper": paper_rows(first["settings"]["model"], names),
    }


def _values(result: dict[str, Any], benchmark: str, metric: str) -> list[float]:
    values = result["benchmarks"][benchmark]["per_problem"][metric]
    return [values[problem] for problem in sorted(values)]


def markdown(comparison: dict[str, Any]) -> str:
    """The comparison as Markdown tables."""
    scopes = list(comparison["table"])
    lines = [
        f"# {comparison['metric']} (%), 95 % bootstrap intervals over problems",
        "",
        f"Differences are from `{comparison['baseline']}`, paired by problem.",
        "",
        "| model | " + " | ".join(scopes) + " |",
        "|---|" + "---|" * len(scopes),
    ]
    for label in comparison["behavior"]:
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
    lines += ["", "| model | benchmark | tokens | cut | answered | markers per 1,000 tokens |", "|---" * 6 + "|"]
    for label, benchmarks in comparison["behavior"].items():
        for name, b in benchmarks.items():
            shown = zip(b.values(), (".0f", ".0%", ".0%", ".2f"), strict=True)
            cells = ["unknown" if value is None else format(value, form) for value, form in shown]
            lines.append(f"| {label} | {name} | {' | '.join(cells)} |")
    for key, values in comparison["settings_that_differ"].items():
        lines += ["", f"Different settings: `{key}` ({', '.join(f'{k}: {value}' for k, value in values.items())})."]
    return "\n".join(lines) + "\n"


def figure(comparison: dict[str, Any], path: Path) -> None:
    """Means and paired differences with their intervals, as PNG; needs the extra `plot`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scopes, labels = list(comparison["table"]), list(comparison["behavior"])
    canvas = FigureCanvasAgg(Figure(figsize=(11, 1.5 + 0.45 * len(scopes) * len(labels)), layout="constrained"))
    left, right = canvas.figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(labels)
    for i, label in enumerate(labels):
        offsets = [s + (i - (len(labels) - 1) / 2) * height for s in range(len(scopes))]
        rows = [comparison["table"][scope][label] for scope in scopes]
        for axis, value, interval in ((left, "mean", "interval_95"), (right, "difference", "difference_interval_95")):
            if axis is right and i == 0:
                continue
            centers = [row[value] for row in rows]
            below = [max(0.0, row[value] - row[interval][0]) for row in rows]
            above = [max(0.0, row[interval][1] - row[value]) for row in rows]
            style = {"fmt": "osD^v"[i % 5], "color": f"C{i}", "capsize": 3, "label": label}
            axis.errorbar(centers, offsets, xerr=[below, above], **style)
    left.set_yticks(range(len(scopes)), scopes)
    left.invert_yaxis()
    left.set_xlabel(f"{comparison['metric']} (%)")
    right.set_xlabel(f"difference from {comparison['baseline']} (points, paired)")
    right.axvline(0.0, color="0.5", linewidth=1)
    left.legend(fontsize="small")
    canvas.figure.suptitle("95 % bootstrap intervals over problems")
    canvas.figure.savefig(path, dpi=120)


def write_comparison(results: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Writes `comparison.json`, `.md` and, with the extra `plot`, `.png`; prints the table."""
    comparison = compare(results)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", comparison)
    text = markdown(comparison)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        figure(comparison, folder / "comparison.png")
    print(f"\n{text}\nWritten: {folder}/comparison.json, .md{', .png' if drawn else ' (no figure without `plot`)'}")
    return comparison


def run_compare(paths: Sequence[str], output_dir: str) -> dict[str, Any]:
    """
    Compares results, and writes `comparison.json`, `comparison.md` and `comparison.png`.

    Args:
        paths (`Sequence[str]`):
            `results.json` files, logs of inspect_ai, or folders of either; the first is the baseline.
        output_dir (`str`):
            Folder to write to.

    Returns:
        `dict`: the comparison.

    Raises:
        `InputError`: if one cannot be read, or they differ in benchmarks, problems or the number of samples.
        `ImportError`: without the extra `plot`.
    """
    require_extra("plot", "The figure of `compare`", module="matplotlib")
    return write_comparison(load_results(paths), Path(output_dir))
