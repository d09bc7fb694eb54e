"""A diagnosis as a page and as a few printed lines."""

import html
from collections.abc import Callable, Sequence
from typing import Any

from ..markers import TOKEN_CLASSES
from ..monitoring.decomposition import NAMES, SUMMARIES, share_in_words
from ..monitoring.page import Series, facts, line_chart, origin_facts, page, table, template
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


def print_verdict(student: dict[str, Any]) -> None:
    """Prints the verdict and the statistics of one student."""
    overall = student["summary"]["groups"]["all"]
    print(f"{student['label']}: {verdict(student['summary'])}")
    for name in ("cos_total_ref", "cos_total_it", "norm_ratio_ref", "median_norm_ratio_ref"):
        print(f"  {NAMES[name]:26} plain {overall[name]:7.3f}   weighted {overall['mass_' + name]:7.3f}")


def _charts(students: Sequence[dict[str, Any]]) -> str:
    """Charts along the checkpoints where there are several, and along the completion of the last student."""

    def along_steps(value: Callable[[dict[str, Any]], float]) -> list[tuple[float, float | None]]:
        return sorted((s["step"], value(s["summary"])) for s in students)

    def statistics(*names: str) -> Series:
        both = [kind + name for name in names for kind in ("", "mass_")]
        return {NAMES[n]: along_steps(lambda s, n=n: s["groups"]["all"][n]) for n in both}  # type: ignore[misc]

    drawn: list[str] = []
    steps = [s["step"] for s in students]
    if len(set(steps)) == len(steps) > 1:
        markers = students[0]["summary"]["markers_per_1k"]
        per_marker = {m: along_steps(lambda s, m=m: s["markers_per_1k"][m]) for m in markers}  # type: ignore[misc]
        lengths = {"mean": along_steps(lambda s: s["mean_length"])}
        for title, text, series in (
            (
                "How much of the signal the reference alone induces",
                "Near 1: the teacher's signal points along what the reference alone induces.",
                statistics("cos_total_ref", "cos_total_it"),
            ),
            (
                "Size of the reference-induced part",
                "Above 1: it is larger than the whole signal, so the transferable part points against it.",
                statistics("norm_ratio_ref", "median_norm_ratio_ref"),
            ),
            ("Epistemic markers per 1,000 tokens", "A fall means that the student reflects less.", per_marker),
            ("Completion length in tokens", "A fall together with the markers is the collapse.", lengths),
        ):
            drawn.append(line_chart(title, series, description=text))
    last = students[-1]["summary"]["along_completion"]
    places = [((i + 0.5) / len(last), part) for i, part in enumerate(last) if part["tokens"]]
    for title, text, names in (
        (
            "Where in the completion the reference dominates",
            "Cosine of the signal with its two parts, from the start of the completion (0) to its end (1).",
            {name: NAMES[name] for name in ("mass_cos_total_ref", "mass_cos_total_it")},
        ),
        (
            "What the signal does to the token that the student wrote",
            "Mean log-ratio in nats; below 0 the signal makes the student's own token less likely.",
            {"delta_ref": "Δ ref", "delta_it": "Δ it"},
        ),
    ):
        series = {text: [(x, part[name]) for x, part in places] for name, text in names.items()}
        title = f"{title} ({students[-1]['label']})"
        drawn.append(line_chart(title, series, x_label="position in the completion", description=text))
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
            *(_tables(student) for student in students),
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


def _tables(student: dict[str, Any]) -> str:
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
        + table(wrote, ("completions", "value"), f"{label}: what the student wrote")
    )


def _key() -> str:
    """The shades, from the most negative to the most positive."""
    ranges = [f"{low:g} to {{sign}}{high:g}" for low, high in zip(BINS, BINS[1:], strict=False)]
    texts = [f"{{sign}}{text}" for text in ranges] + [f"beyond {{sign}}{BINS[-1]:g}"]
    shades = [[f'<span class="tok {name}{i}">{text.format(sign=sign)}</span>' for i, text in enumerate(texts, start=1)]
              for sign, name in (("−", "n"), ("+", "p"))]  # fmt: skip
    return "".join((*reversed(shades[0]), *shades[1]))
