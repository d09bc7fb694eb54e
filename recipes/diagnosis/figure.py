"""
Table and figure of the diagnosis of small models.

    python -m recipes.diagnosis.figure --collect     summarizes what run.py left in outputs/diagnosis; then as below
    python -m recipes.diagnosis.figure               prints the table and draws the figure from results.jsonl
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purified_opsd_trl.diagnose.measure import summarize
from purified_opsd_trl.markers import TOKEN_CLASSES
from recipes.diagnosis.run import OUTPUT


RESULTS = Path(__file__).parent / "results.jsonl"
FIGURE = Path("docs/img/diagnosis_models.png")
SOURCES = {"own": "#1d4ed8", "other": "#c2410c", "none": "#6b7280"}
FEW = 20  # tokens below which a class is not drawn
CURVES = {
    "cos_total_ref": "cos(total, ref)",
    "cos_total_it": "cos(total, it)",
    "norm_ratio_ref": "|ref| / |total|",
}
ROWS = (
    *CURVES.items(),
    ("paper_norm_ratio_ref", "mean of |ref| / |total|"),
    ("kl_target_base", "KL(target to base)"),
    ("cos_own", "cos(tilt, own tilt)"),
)


def collect() -> list[dict[str, Any]]:
    """One summary per model and target, over the samples of all its parts."""
    found = []
    for folder in sorted(OUTPUT.glob("*/*")):
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/diagnosis.json"))]
        if parts:
            samples = [sample for part in parts for sample in part["students"][0]["samples"]]
            settings = parts[0]["settings"]
            found.append(
                {
                    "model": folder.parent.name,
                    "target": folder.name,
                    "prompts": "text" if settings["text_prompts"] else "chat",
                    "max_completion_length": settings["max_completion_length"],
                    "seconds": round(sum(part["seconds"] for part in parts)),
                    "summary": rounded(summarize(samples)),
                }
            )
    return found


def rounded(value: Any) -> Any:
    """Numbers of a JSON value with four digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.4g}"))


def load(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The committed results."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_source(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups and curves of each source of references."""
    return {"own": summary, **summary["controls"]}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Means over all tokens, plain and weighted, by model and source."""
    head = " | ".join(text for _, text in ROWS).replace("|ref|", r"\|ref\|").replace("|total|", r"\|total\|")
    lines = [f"| model, target | reference | problems | tokens | {head} |"]
    lines.append("|---" * (4 + len(ROWS)) + "|")
    for result in results:
        for source, found in by_source(result["summary"]).items():
            means = found["groups"]["all"]
            cells = [
                f"{means[name]:.2f}" + (f" / {means['mass_' + name]:.2f}" if f"mass_{name}" in means else "")
                for name, _ in ROWS
            ]
            first = (
                f"{result['model']}, {result['target']}",
                source,
                str(result["summary"]["samples"]),
                str(means["tokens"]),
            )
            lines.append("| " + " | ".join((*first, *cells)) + " |")
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One row of panels per model: three curves along the completion, and the direction by token class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in results if result["target"] == "purified"]
    size = (13, 0.6 + 2.5 * len(results))
    figure, axes = plt.subplots(len(results), 4, figsize=size, layout="constrained", squeeze=False)
    for row, result in zip(axes, results, strict=True):
        for axis, (name, title) in zip(row, CURVES.items(), strict=False):
            _curves(axis, result["summary"], name)
            axis.set_title(title, fontsize=9)
        _classes(row[3], result["summary"])
        row[3].set_title("cos(total, ref), weighted, by token class", fontsize=9)
        row[0].set_ylabel(result["model"], fontsize=8)
    for axis in axes[-1][:3]:
        axis.set_xlabel("position in the completion")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axis: Any, summary: dict[str, Any], name: str) -> None:
    for source, found in by_source(summary).items():
        parts = found["along_completion"]
        places = [(i + 0.5) / len(parts) for i in range(len(parts))]
        for prefix, style, weight in (("mass_", "-", "weighted"), ("", "--", "plain")):
            values = [part.get(prefix + name) for part in parts]
            axis.plot(places, values, style, color=SOURCES[source], label=f"{source}, {weight}", linewidth=1.6)
    level = 1.0 if name.startswith("norm") else 0.0
    axis.axhline(level, color="#9ca3af", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def _classes(axis: Any, summary: dict[str, Any]) -> None:
    names = [name for name in TOKEN_CLASSES if summary["groups"][name]["tokens"] >= FEW]
    for shift, (source, found) in enumerate(by_source(summary).items()):
        places = [i + 0.27 * (shift - 1) for i in range(len(names))]
        values = [found["groups"][name]["mass_cos_total_ref"] for name in names]
        axis.bar(places, values, 0.25, color=SOURCES[source])
    labels = [f"{name}\n{summary['groups'][name]['tokens']}" for name in names]
    axis.set_xticks(range(len(names)), labels, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="rewrite results.jsonl from outputs/diagnosis")
    if parser.parse_args().collect:
        RESULTS.write_text("".join(json.dumps(result) + "\n" for result in collect()), encoding="utf-8")
    loaded = load()
    print(table(loaded))
    draw(loaded, FIGURE)
