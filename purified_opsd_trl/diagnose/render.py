"""A diagnosis as a page and as a few printed lines."""

import html
import json
from collections.abc import Sequence
from typing import Any

from ..markers import TOKEN_CLASSES
from ..monitoring.decomposition import NAMES, SUMMARIES, share_in_words
from ..monitoring.page import Series, facts, line_chart, origin_facts, page, table, template
from .controls import by_source, sentences, table_rows
from .measure import DISTRIBUTIONS


BINS = (0.5, 1.0, 2.0, 4.0)  # nats; limits of the four shades
FEW_COMPLETIONS = 30  # below this number the verdict carries a caveat; the paper uses 100
# What the page's script reads of a sample
_PAGE_KEYS = (
    *("prompt", "reference_prompt", "pieces", "classes", "delta_ref", "delta_it", "delta_total"),
    *("cos_total_ref", "mass_cos_total_ref", "mass_norm_ratio_ref"),
    *(f"logprob_{name}" for name in DISTRIBUTIONS),
    "alternatives",
)


def verdict(summary: dict[str, Any]) -> str:
    """What the signal consists of, from the weighted statistics, with a caveat if it rests on few completions."""
    overall, samples = summary["groups"]["all"], summary["samples"]
    cosine = overall["mass_cos_total_ref"]
    text = (
        f"The teacher's signal points {share_in_words(cosine)} along what the reference alone induces: weighted "
        f"cos(total, ref) = {cosine:.2f}. The reference-induced part is {overall['mass_norm_ratio_ref']:.2f} times as "
        f"large as the signal (median over tokens: {overall['mass_median_norm_ratio_ref']:.2f}). Measured on "
        f"{summary['tokens']} tokens of {samples} completion{'s' if samples != 1 else ''}."
    )
    if samples < FEW_COMPLETIONS:
        text += f" Fewer than {FEW_COMPLETIONS} completions show a tendency only; the paper uses 100."
    return text


def print_verdict(student: dict[str, Any], target: str) -> None:
    """Prints the verdict and the statistics of one student, then the signal of the target by source of references."""
    overall = student["summary"]["groups"]["all"]
    print(f"{student['label']}: {verdict(student['summary'])}")
    for name in ("cos_total_ref", "cos_total_it", "norm_ratio_ref", "median_norm_ratio_ref"):
        print(f"  {NAMES[name]:26} plain {overall[name]:7.3f}   weighted {overall['mass_' + name]:7.3f}")
    print(f"  {'references':30}" + "".join(f"{source:>9}" for source in by_source(student["summary"])))
    for text, *values in table_rows(student["summary"], target):
        print(f"  {text:30}" + "".join(f"{value:9.3f}" for value in values))
    for sentence in sentences(student["summary"], target):
        print(f"  {sentence}")


def _charts(students: Sequence[dict[str, Any]]) -> str:
    """Charts along the checkpoints where there are several, and along the completion of the last student."""
    last = students[-1]
    markers = {f"markers/{name}": name for name in last["summary"]["markers_per_1k"]}
    by_step: dict[float, dict[str, Any]] = {}
    for student in students:
        summary = student["summary"]
        rates = {key: summary["markers_per_1k"][name] for key, name in markers.items()}
        by_step[student["step"]] = {**summary["groups"]["all"], **rates, "mean_length": summary["mean_length"]}
    parts = last["summary"]["along_completion"]
    by_place = {(i + 0.5) / len(parts): part for i, part in enumerate(parts) if part["tokens"]}
    drawn = []
    for chart in json.loads(template("diagnosis.json")):  # a chart that names no metrics draws all markers
        steps = chart["along"] == "step"
        if steps and not len(by_step) == len(students) > 1:
            continue
        points = sorted((by_step if steps else by_place).items())
        names = chart["metrics"] or markers
        series: Series = {text: [(x, values[name]) for x, values in points] for name, text in names.items()}
        title = chart["title"] if steps else f"{chart['title']} ({last['label']})"
        drawn.append(line_chart(title, series, x_label=chart["along"], description=chart["text"]))
    return "".join(drawn)


def html_page(diagnosis: dict[str, Any]) -> str:
    """The diagnosis as one HTML file."""
    students = diagnosis["students"]
    shown = [
        {
            "label": student["label"],
            "samples": [
                {"title": _title(sample["prompt"]), **{key: sample[key] for key in _PAGE_KEYS}}
                for sample in student["samples"]
                if "alternatives" in sample
            ],
        }
        for student in students
    ]
    settings = [(key, str(value)) for key, value in diagnosis["settings"].items()]
    body = "".join(
        (
            f"<p><strong>{html.escape(verdict(students[-1]['summary']))}</strong></p>",
            facts(
                {
                    "Model": diagnosis["model"],
                    "Students": ", ".join(student["label"] for student in students),
                    "Dataset": f"{diagnosis['dataset']}, {students[-1]['summary']['samples']} problems",
                    **origin_facts(diagnosis["started"], diagnosis["seconds"], diagnosis["versions"]),
                }
            ),
            template("diagnosis.html").replace("{key}", _key()),
            f'<h2>Curves</h2><div class="charts">{_charts(students)}</div>',
            "<h2>Tables</h2>",
            *(_tables(student, diagnosis["settings"]["target"]) for student in students),
            f"<h2>Settings</h2>{table(settings, ('setting', 'value'), 'Settings')}",
        )
    )
    subtitle = "Diagnosis of a self-teacher (Eq. 4 of arXiv 2607.02234)"
    return page(
        "What the teacher's signal consists of",
        subtitle,
        body,
        style=template("tokens.css"),
        script=template("tokens.js"),
        data={"bins": BINS, "classes": TOKEN_CLASSES, "students": shown},
    )


def _title(prompt: str) -> str:
    text = " ".join(prompt.rpartition("user: ")[2].split())
    return text if len(text) <= 60 else text[:59] + "…"


def _tables(student: dict[str, Any], target: str) -> str:
    summary, label = student["summary"], student["label"]
    columns = ("tokens", *SUMMARIES, "delta_ref", "delta_it")
    rows = [[name.replace("_", " "), *(g.get(c, "") for c in columns)] for name, g in summary["groups"].items()]
    header = ["tokens of", *({**NAMES, "delta_ref": "Δ ref", "delta_it": "Δ it"}.get(c, c) for c in columns)]
    wrote = [
        ("completions", summary["samples"]),
        ("mean length (tokens)", summary["mean_length"]),
        ("answer rate", summary["answer_rate"]),
        ("distinct 2-grams", summary["distinct_2"]),
        *((f"{name} per 1,000 tokens", rate) for name, rate in summary["markers_per_1k"].items()),
    ]
    return (
        f"<h3>{html.escape(label)}</h3><p>{html.escape(verdict(summary))}</p>"
        + table(rows, header, f"{label}: statistics of the signal; Δ: log-ratio of the sampled token, in nats")
        + "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences(summary, target))
        + table(
            table_rows(summary, target),
            ("mean over tokens", *by_source(summary)),
            f"{label}: the signal of the target {target} by the reference that teacher and probe see",
        )
        + table(wrote, ("completions", "value"), f"{label}: what the student wrote")
    )


def _key() -> str:
    """The shades, from the most negative to the most positive."""
    texts = [f"{{0}}{low:g} to {{0}}{high:g}" for low, high in zip(BINS, BINS[1:], strict=False)]
    texts.append(f"beyond {{0}}{BINS[-1]:g}")
    shades = [[f'<span class="tok n{i}">{text.format("−")}</span>' for i, text in enumerate(texts, start=1)]]
    shades.append([f'<span class="tok p{i}">{text.format("+")}</span>' for i, text in enumerate(texts, start=1)])
    return "".join((*reversed(shades[0]), *shades[1]))
