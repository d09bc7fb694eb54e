"""A diagnosis as a page, as figures, and as a few lines."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extras import require_extra
from ..markers import TOKEN_CLASSES
from ..monitoring.decomposition import STATISTICS
from ..monitoring.page import Series, line_chart, page, table, template
from .measure import DISTRIBUTIONS


BINS = (0.5, 1.0, 2.0, 4.0)  # nats; limits of the four shades
_NAMES = {
    "cos_total_ref": "cos(total, ref)",
    "cos_total_it": "cos(total, it)",
    "norm_ratio_ref": "|ref| / |total|",
    "mass_cos_total_ref": "cos(total, ref), weighted",
    "mass_cos_total_it": "cos(total, it), weighted",
    "mass_norm_ratio_ref": "|ref| / |total|, weighted",
}
# What of a sample the page's script reads
_PAGE_KEYS = (
    "prompt",
    "reference_prompt",
    "pieces",
    "classes",
    "delta_ref",
    "delta_it",
    "delta_total",
    "cos_total_ref",
    "mass_cos_total_ref",
    "mass_norm_ratio_ref",
    *(f"logprob_{name}" for name in DISTRIBUTIONS),
    "alternatives",
)


def verdict(summary: dict[str, Any]) -> str:
    """One sentence on what the signal consists of, from the weighted statistics."""
    overall = summary["groups"]["all"]
    cosine, ratio = overall["mass_cos_total_ref"], overall["mass_norm_ratio_ref"]
    kind = "mostly" if cosine >= 0.8 else "in good part" if cosine >= 0.4 else "little of it"
    return (
        f"The teacher's signal is {kind} what the reference alone induces: weighted cos(total, ref) = {cosine:.2f}, "
        f"|ref| / |total| = {ratio:.2f}, over {summary['tokens']} tokens of {summary['samples']} completions."
    )


def print_verdict(student: dict[str, Any]) -> None:
    """Prints the verdict and the statistics of one student."""
    overall = student["summary"]["groups"]["all"]
    print(f"{student['label']}: {verdict(student['summary'])}")
    for name in ("cos_total_ref", "cos_total_it", "norm_ratio_ref"):
        print(f"  {_NAMES[name]:18} plain {overall[name]:7.3f}   weighted {overall['mass_' + name]:7.3f}")


def curves(students: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str, Series]]:
    """
    What the figures draw: along the checkpoints where there are several, and along the completion.

    Args:
        students (`Sequence[dict]`):
            Diagnosis of each student.

    Returns:
        `dict`: `(title, x label, series)` by file name.
    """
    drawn: dict[str, tuple[str, str, Series]] = {}

    def along_steps(value: Any) -> list[tuple[float, float]]:
        return sorted((s["step"], value(s["summary"])) for s in students)

    steps = [s["step"] for s in students]
    if len(set(steps)) == len(steps) > 1:
        for file, title, names in (
            ("cosines", "What the signal consists of", ("cos_total_ref", "cos_total_it")),
            ("norm_ratio", "Size of the reference-induced part", ("norm_ratio_ref",)),
        ):
            drawn[file] = (
                title,
                "step",
                {
                    _NAMES[kind + name]: along_steps(lambda s, key=kind + name: s["groups"]["all"][key])
                    for name in names
                    for kind in ("", "mass_")
                },
            )
        drawn["markers"] = (
            "Epistemic markers a 1,000 tokens",
            "step",
            {m: along_steps(lambda s, m=m: s["markers_per_1k"][m]) for m in students[0]["summary"]["markers_per_1k"]},
        )
        drawn["lengths"] = (
            "Completion length (tokens)",
            "step",
            {"mean": along_steps(lambda s: s["mean_length"])},
        )
    last = students[-1]["summary"]["along_completion"]
    places = [((i + 0.5) / len(last), part) for i, part in enumerate(last) if part["tokens"]]
    for file, title, names in (
        ("position_cosines", "Cosines along the completion", ("mass_cos_total_ref", "mass_cos_total_it")),
        ("position_deltas", "Log-ratios of the sampled token along the completion", ("delta_ref", "delta_it")),
    ):
        drawn[file] = (
            f"{title} ({students[-1]['label']})",
            "position in the completion",
            {_NAMES.get(name, name.replace("_", " ")): [(x, part[name]) for x, part in places] for name in names},
        )
    return drawn


def figures(diagnosis: dict[str, Any], folder: Path) -> list[Path]:
    """
    The curves as PNG files.

    Args:
        diagnosis (`dict`):
            The diagnosis.
        folder (`Path`):
            Where to write.

    Returns:
        `list[Path]`: files written.

    Raises:
        `ImportError`: without the extra `plot`.
    """
    require_extra("plot", "The figures of `diagnose`", module="matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for name, (title, x_label, series) in curves(diagnosis["students"]).items():
        canvas = FigureCanvasAgg(Figure(figsize=(6, 4), layout="constrained"))
        axis = canvas.figure.subplots()
        for i, (label, points) in enumerate(series.items()):
            style = ("-", "--", ":", "-.")[i % 4]
            axis.plot([x for x, _ in points], [y for _, y in points], style, marker="os^D"[i % 4], label=label)
        axis.set(title=title, xlabel=x_label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        paths.append(folder / f"{name}.png")
        canvas.figure.savefig(paths[-1], dpi=120)
    return paths


def html_page(diagnosis: dict[str, Any]) -> str:
    """
    The whole diagnosis as one HTML file.

    Args:
        diagnosis (`dict`):
            The diagnosis.

    Returns:
        `str`
    """
    students = diagnosis["students"]
    data = {
        "bins": BINS,
        "classes": TOKEN_CLASSES,
        "students": [
            {
                "label": s["label"],
                "samples": [
                    {"title": _title(sample["prompt"]), **{key: sample[key] for key in _PAGE_KEYS}}
                    for sample in s["samples"]
                    if "alternatives" in sample
                ],
            }
            for s in students
        ],
    }
    charts = "".join(line_chart(title, series, x_label=x) for title, x, series in curves(students).values())
    body = "".join(
        (
            f"<p>{html.escape(verdict(students[-1]['summary']))}</p>",
            "<h2>Token by token</h2>",
            _READER,
            f'<h2>Curves</h2><div class="charts">{charts}</div>',
            "<h2>Tables</h2>",
            *(_tables(student) for student in students),
            "<h2>Settings</h2>",
            table([(k, str(v)) for k, v in diagnosis["settings"].items()], ("setting", "value"), "Settings"),
        )
    )
    subtitle = f"{diagnosis['model']} on {diagnosis['dataset']}: total = ref + it (Eq. 4 of arXiv 2607.02234)"
    return page(
        "What the teacher's signal consists of",
        subtitle,
        body,
        style=template("tokens.css"),
        script=template("tokens.js"),
        data=data,
    )


def _title(prompt: str) -> str:
    text = " ".join(prompt.rpartition("user: ")[2].split())
    return text if len(text) <= 60 else text[:59] + "…"


def _tables(student: dict[str, Any]) -> str:
    summary = student["summary"]
    columns = ("tokens", *STATISTICS, "delta_ref", "delta_it")
    rows = [[name, *(group.get(c, "") for c in columns)] for name, group in summary["groups"].items()]
    header = ["tokens of", *(_NAMES.get(c, c.replace("_", " ")) for c in columns)]
    label = student["label"]
    facts = [
        ("completions", summary["samples"]),
        ("mean length (tokens)", summary["mean_length"]),
        ("answer rate", summary["answer_rate"]),
        ("distinct 2-grams", summary["distinct_2"]),
        *((f"{name} a 1,000 tokens", rate) for name, rate in summary["markers_per_1k"].items()),
    ]
    return (
        f"<h3>{html.escape(label)}</h3><p>{html.escape(verdict(summary))}</p>"
        + table(rows, header, f"{label}: means over tokens; delta: log-ratio of the sampled token, nats")
        + table(facts, ("completions", "value"), f"{label}: what the student wrote")
    )


def _key() -> str:
    limits = [*BINS, None]
    shades = []
    for sign, name in (("−", "n"), ("+", "p")):
        for i, low in enumerate(BINS):
            high = limits[i + 1]
            text = f"{sign}{low:g} to {sign}{high:g}" if high is not None else f"beyond {sign}{low:g}"
            shades.append(f'<span class="tok {name}{i + 1}">{text}</span>')
    return "".join((*reversed(shades[: len(BINS)]), *shades[len(BINS) :]))


_READER = f"""
<noscript><p>This part needs JavaScript; tables and curves below do not. diagnosis.json holds every number.</p>
</noscript>
<p>The student's completion, each token coloured by how much more (orange, solid underline) or less (blue, dotted
underline) likely the teacher's signal makes it, in nats. Point at a token for the likely alternatives under the four
distributions; click to hold it. With the keyboard: arrow keys move, <kbd>n</kbd> and <kbd>p</kbd> go to the next and
the previous epistemic token, <kbd>Home</kbd> and <kbd>End</kbd> to the ends.</p>
<div class="controls">
<label>Student <select id="student"></select></label>
<label>Problem <select id="sample"></select></label>
<fieldset><legend>Colour by</legend>
<label><input type="radio" name="mode" value="delta_ref" checked> Δ ref</label>
<label><input type="radio" name="mode" value="delta_it"> Δ it</label>
<label><input type="radio" name="mode" value="delta_total"> their sum</label>
</fieldset>
</div>
<p class="key" aria-label="Key of the colours, in nats" role="group">{_key()}</p>
<div class="reader">
<div id="tokens" class="completion tokens" role="listbox" tabindex="0" aria-label="Tokens of the completion"></div>
<section id="details" class="details" aria-live="polite" aria-label="The token in focus" tabindex="0"></section>
</div>
<details><summary>Prompts</summary>
<h3>What the student sees</h3><pre id="prompt" tabindex="0"></pre>
<h3>What the reference-only probe sees</h3><pre id="reference" tabindex="0"></pre>
</details>
"""
