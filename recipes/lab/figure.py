"""
Table and figure of the lab's results.

    python -m recipes.lab.figure [--results recipes/lab/results.jsonl] [--output docs/img/lab.png]
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from purified_opsd_trl.targets import DENSE_TARGETS
from recipes.lab.run import Run


RESULTS = Path(__file__).parent / "results.jsonl"
COLORS = {"base": "#6b7280", "teacher": "#c2410c", "purified": "#1d4ed8"}
NAMES = {"base": "base", "teacher": "OPSD", "purified": "purified OPSD"} | {name: name for name in DENSE_TARGETS}


def load(path: Path) -> list[dict[str, Any]]:
    """All results of a file, sorted by the names of their runs; none where there is no file yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    # With the defaults of settings that came later
    results = [{**result, "run": asdict(Run(**result["run"]))} for result in map(json.loads, lines)]
    return sorted(results, key=lambda result: Run(**result["run"]).name)


def spread(rates: Sequence[float | None], digits: int = 2) -> str:
    """Mean, and standard deviation over runs where there are two or more, of the runs that have this rate."""
    values = _present(rates)
    if math.isnan(values[0]):
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def setting(run: dict[str, Any]) -> str:
    """What a run varies besides target and seeds, in words."""
    parts = [run["world"], "rich reference" if run["rich"] else "answer only"]
    parts += [f"beta {run['pmi_beta']:g}"] * (run["pmi_beta"] != 1.0) + [f"c {run['pmi_clip']:g}"] * (
        run["pmi_clip"] != 10.0
    )
    parts += [f"divergence beta {run['beta']:g}"] * (run["beta"] != 0.5)
    parts += [f"{run['teacher']} teacher"] * (run["teacher"] != "base")
    parts += [f"lag {run['lag']}"] * (run["lag"] != 0)
    parts += [f"learning rate {run['learning_rate']:g}"] * (run["learning_rate"] != 1e-3)
    return ", ".join(parts)


COLUMNS = (
    ("accuracy", "sampled", "accuracy", 3),
    ("greedy", "greedy", "accuracy", 3),
    ("waits", "sampled", "waits", 2),
    ("greedy waits", "greedy", "waits", 2),
    ("P(wait, wrong)", "sampled", "wait_given_wrong", 2),
    ("P(wait, right)", "sampled", "wait_given_right", 2),
    ("repaired", "sampled", "repaired_given_wait", 2),
    ("errors", "sampled", "error_rate", 2),
    ("jumps", "sampled", "jumps", 2),
)


def table(results: list[dict[str, Any]]) -> str:
    """One row per setting and target, at the last step; the bases' own rates come first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        run, curve = result["run"], result["curve"]
        groups[(setting(run), NAMES[run["target"]])].append(
            {**curve[-1], "seed": run["seed"], "repeat": run["repeat"]}
        )
        base = {**curve[0], "seed": run["seed"], "repeat": 0}
        # The base depends neither on the target nor on the repeat: one row per seed
        rows = groups[(run["world"], NAMES["base"])]
        if all(row["seed"] != run["seed"] for row in rows):
            rows.append(base)
    lines = ["| setting | model | seeds x runs | " + " | ".join(name for name, *_ in COLUMNS) + " |"]
    lines.append("|---" * (3 + len(COLUMNS)) + "|")
    for (name, model), rows in sorted(groups.items(), key=lambda item: item[0]):
        seeds = {row["seed"] for row in rows}
        cells = [spread([row[decoding][key] for row in rows], digits) for _, decoding, key, digits in COLUMNS]
        lines.append(f"| {name} | {model} | {len(seeds)} x {len(rows) / len(seeds):g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PANELS = (
    ("sampled", "accuracy", "accuracy, temperature 1"),
    ("greedy", "accuracy", "accuracy, greedy"),
    ("sampled", "waits", "waits a response, temperature 1"),
    ("sampled", "wait_given_wrong", "P(wait | wrong result), temperature 1"),
)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """
    Curves against steps: mean over runs as a line, lowest to highest run as a band. One row of panels per world.

    Args:
        results (`list[dict]`):
            Results; of those with every setting at its default the base, OPSD and purified OPSD are drawn.
        path (`Path`):
            PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {
        world: [r for r in results if setting(r["run"]) == f"{world}, answer only" and r["run"]["target"] in COLORS]
        for world in sorted({r["run"]["world"] for r in results}, reverse=True)
    }
    runs = {world: found for world, found in runs.items() if found}
    figure, axes = plt.subplots(
        len(runs), len(PANELS), figsize=(12, 0.5 + 2.6 * len(runs)), layout="constrained", squeeze=False
    )
    for row, (world, found) in zip(axes, runs.items(), strict=True):
        for axis, (decoding, key, title) in zip(row, PANELS, strict=True):
            _draw_panel(axis, found, decoding, key)
            axis.set_title(title, fontsize=9)
        row[0].set_ylabel(f"{world} world")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


SWEEP = (
    ({}, "purified, beta 1, c 10", "#1d4ed8", "-"),
    ({"pmi_beta": 0.5}, "beta 0.5", "#0f766e", "--"),
    ({"pmi_beta": 2.0}, "beta 2", "#7c3aed", "-."),
    ({"pmi_clip": 2.0}, "c 2", "#a16207", ":"),
    ({"target": "teacher"}, "OPSD", COLORS["teacher"], "-"),
)
# A twentieth of the default learning rate: with the default, a run is almost over before a lag of 16 has passed
SLOW = {"learning_rate": 5e-5, "eval_every": 5}
LAGS = tuple(
    ({"target": target, "lag": lag, **SLOW}, f"{NAMES[target]}, lag {lag}", color, line)
    for target, color in list(COLORS.items())[1:]
    for lag, line in ((0, "-"), (4, "--"), (16, ":"))
)


def draw_settings(results: list[dict[str, Any]], settings: Sequence[tuple[Any, str, str, str]], path: Path) -> None:
    """
    Curves of the style world at other settings: the mean over base models, one run on each.

    Args:
        results (`list[dict]`):
            Results.
        settings (`Sequence[tuple]`):
            Changes to the default purified run, label, color and line style.
        path (`Path`):
            PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    usual = {**asdict(Run()), "seed": None}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (decoding, key, title) in zip(axes, PANELS, strict=False):
        for change, label, color, line in settings:
            curves = [r["curve"] for r in results if {**r["run"], "seed": None} == {**usual, **change}]
            axis.plot(*_mean(curves, decoding, key), line, color=color, label=label, linewidth=2)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        _style(axis, key)
    columns = len(settings) if len(settings) < 6 else 3
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mean(curves: list[list[dict[str, Any]]], decoding: str, key: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean over runs at each, of those that have this rate; NaN where none has."""
    points = [*zip(*curves, strict=True)]
    rates = [_present([point[decoding][key] for point in at]) for at in points]
    return [at[0]["step"] for at in points], [*map(statistics.fmean, rates)]


def _present(rates: Sequence[float | None]) -> list[float]:
    return [rate for rate in rates if rate is not None] or [math.nan]


def _draw_panel(axis: Any, runs: list[dict[str, Any]], decoding: str, key: str) -> None:
    for target in ("teacher", "purified"):
        curves = [r["curve"] for r in runs if r["run"]["target"] == target]
        steps, mean = _mean(curves, decoding, key)
        values = [_present([point[decoding][key] for point in at]) for at in zip(*curves, strict=True)]
        axis.plot(steps, mean, color=COLORS[target], label=NAMES[target], linewidth=2)
        axis.fill_between(steps, [*map(min, values)], [*map(max, values)], color=COLORS[target], alpha=0.18, lw=0)
    base = statistics.fmean(_present([run["curve"][0][decoding][key] for run in runs]))
    axis.axhline(base, color=COLORS["base"], linestyle="--", linewidth=1.2, label=NAMES["base"])
    _style(axis, key)


def _style(axis: Any, key: str) -> None:
    axis.set_ylim(0, None if key == "waits" else 1.03)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=Path("docs/img/lab.png"))
    arguments = parser.parse_args()
    loaded = load(arguments.results)
    print(table(loaded))
    draw(loaded, arguments.output)
