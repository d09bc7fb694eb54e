"""
Self-contained HTML: one file, no network, light and dark, usable by keyboard and screen reader.

Charts are inline SVG. Each has its numbers in a table below it and distinguishes its series by dashes and by color.
"""

import html
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any


# Points (x, y) by name; a y of None is a gap in the line
Series = Mapping[str, Sequence[tuple[float, float | None]]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 240, 52, 12, 10, 34
_COLORS = 7
# Characters that HTML forbids and that a model may generate
_NO_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
LESS = "\\u003c"  # `<` in JSON
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 3", "12 4")


def template(name: str) -> str:
    """Text of a file in `templates/`."""
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def page(title: str, subtitle: str, body: str, *, style: str = "", script: str = "", data: Any = None) -> str:
    """A complete HTML document; `data` is JSON for the script, in an element with the id `data`."""
    # `</` would end the element early and `<!--` open a comment, and completions may hold any text
    text = "" if data is None else json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", LESS)
    holder = f'<script type="application/json" id="data">{text}</script>' if text else ""
    code = f"<script>{script}</script>" if script else ""
    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "style": template("page.css") + style,
        "body": body,
        "scripts": holder + code,
    }
    document = re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], template("page.html"))
    return _NO_HTML.sub("\ufffd", document)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str], caption: str = "") -> str:
    """A table that scrolls sideways on its own; numbers are rounded to four digits."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{html.escape(str(cell))}</th>'
            if i == 0
            else f'<td class="number">{number(cell)}</td>'
            if isinstance(cell, int | float) and not isinstance(cell, bool)
            else f"<td>{html.escape(str(cell))}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>\n"
        for row in rows
    )
    label = html.escape(caption or "table", quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"{f'<caption>{html.escape(caption)}</caption>' if caption else ''}"
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def facts(rows: Mapping[str, str]) -> str:
    """Short facts for the top of a page."""
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in rows.items() if text)
    return f'<dl class="facts">{items}</dl>'


def origin_facts(started: float, seconds: float, versions: Mapping[str, str]) -> dict[str, str]:
    """When something ran (seconds since the epoch), for how long, and with what."""
    hours, minutes = divmod(round(seconds / 60), 60)
    short = f"{seconds:.0f} s" if seconds < 60 else f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return {
        "Started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)),
        "Duration": short,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def number(value: float) -> str:
    """Four significant digits; integers as they are."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def line_chart(title: str, series: Series, *, x_label: str = "step", description: str = "") -> str:
    """A line chart as a `<figure>`, with legend and table; empty without any point."""
    series = {name: points for name, points in series.items() if any(y is not None for _, y in points)}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    x0, x1 = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 1, xs[0] + 1)
    y0, y1 = _limits([y for points in series.values() for _, y in points if y is not None])

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM),
        )

    x_ticks = _ticks(x0, x1, whole=all(x == int(x) for x in xs))
    parts = [_axes(at, x_ticks, _ticks(y0, y1), (y0, y1), x_label)]
    legend = []
    for i, (name, points) in enumerate(series.items()):
        dashes = _DASHES[i % len(_DASHES)]
        color = f"series s{i % _COLORS}"
        style = f'class="{color}" stroke-dasharray="{dashes}"' if dashes else f'class="{color}"'
        for run in _runs(points):
            placed = [at(x, y) for x, y in run]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline {style} points="{path}"></polyline>')
            if len(points) <= 30 or len(run) == 1:
                parts += [f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="2"></circle>' for x, y in placed]
        legend.append(
            f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><line {style} x1="0" y1="5" x2="28" y2="5"></line></svg>'
            f"{html.escape(name)}</li>"
        )
    values = {name: dict(points) for name, points in series.items()}
    rows = [
        [number(x), *("" if (y := values[name].get(x)) is None else y for name in series)] for x in sorted(set(xs))
    ]
    numbers = table(rows, [x_label, *series], f"{title}: numbers")
    return figure(title, description, (_WIDTH, _HEIGHT), parts, numbers, f'<ul class="legend">{"".join(legend)}</ul>')


def figure(
    title: str, description: str, size: tuple[int, int], parts: Sequence[str], numbers: str, legend: str = ""
) -> str:
    """A picture of SVG elements on a canvas of this size, with the table of its numbers below, folded."""
    label = html.escape(f"{title}. {description} The table below holds its numbers.", quote=True)
    note = f'<p class="muted">{html.escape(description)}</p>' if description else ""
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{note}"
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{label}">{"".join(parts)}</svg>{legend}'
        f"<details><summary>Numbers of “{html.escape(title)}”</summary>{numbers}</details></figure>"
    )


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The points between the gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None:
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Range of the vertical axis: from zero unless the values vary little for their size."""
    low, high = min(values), max(values)
    if low >= 0 and (low == high or low < high / 2):
        return 0.0, high or 1.0
    if low == high:  # negative
        return low, 0.0
    return low, high


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= 5:
            step *= factor
            break
    step = max(step, 1) if whole else step
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def _axes(at: Any, x_ticks: list[float], y_ticks: list[float], y_range: tuple[float, float], x_label: str) -> str:
    y0, _ = y_range
    bottom = _HEIGHT - _BOTTOM
    lines = []
    for y in y_ticks:
        height = at(x_ticks[0], y)[1]
        lines.append(
            f'<line class="axis" x1="{_LEFT}" y1="{height:.1f}" x2="{_WIDTH - _RIGHT}" y2="{height:.1f}"></line>'
        )
        lines.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{_tick(y)}</text>')
    for x in x_ticks:
        lines.append(f'<text x="{at(x, y0)[0]:.1f}" y="{bottom + 14}" text-anchor="middle">{_tick(x)}</text>')
    lines.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    return "".join(lines)


def _tick(value: float) -> str:
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"
