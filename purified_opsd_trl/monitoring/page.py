"""
Self-contained HTML: one file, no network, light and dark, usable by keyboard and screen reader.

Charts are inline SVG; each has its numbers as a table beneath it, and tells its series apart by dashes as well as by
colour.
"""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any


Series = Mapping[str, Sequence[tuple[float, float]]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 240, 52, 12, 10, 34
_COLOURS = 7
# Characters that no HTML document may hold, and that a young model may well write
_NO_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
LESS = "\\u003c"  # `<` in JSON
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 3", "12 4")


def template(name: str) -> str:
    """Text of a file in `templates/`."""
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def page(title: str, subtitle: str, body: str, *, style: str = "", script: str = "", data: Any = None) -> str:
    """
    A whole HTML document.

    Args:
        title (`str`):
            Title and first heading.
        subtitle (`str`):
            Text under it.
        body (`str`):
            HTML of the main part.
        style (`str`, *optional*):
            CSS beside that of every page.
        script (`str`, *optional*):
            JavaScript, run at the end of the document.
        data (`Any`, *optional*):
            JSON data for the script, in an element with the id `data`.

    Returns:
        `str`
    """
    # `</` would end the element early and `<!--` open a comment, and completions may hold any text
    text = "" if data is None else json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", LESS)
    holder = f'<script type="application/json" id="data">{text}</script>' if text else ""
    code = f"<script>{script}</script>" if script else ""
    document = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{template("page.css")}{style}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<p class="muted">{html.escape(subtitle)}</p>
</header>
<main>
{body}
</main>
{holder}
{code}
</body>
</html>
"""
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


def number(value: float) -> str:
    """Four significant digits; integers as they are."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def line_chart(title: str, series: Series, *, x_label: str = "step", description: str = "") -> str:
    """
    A line chart as a `<figure>`, with legend and table.

    Args:
        title (`str`):
            Caption.
        series (`Mapping[str, Sequence[tuple[float, float]]]`):
            Points `(x, y)` by name; series without points are left out.
        x_label (`str`, *optional*, defaults to `"step"`):
            What x is.
        description (`str`, *optional*):
            What to look for.

    Returns:
        `str`: HTML; empty without any point.
    """
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    (x0, x1), (y0, y1) = _limits(xs), _limits(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_axes(at, _ticks(x0, x1), _ticks(y0, y1), (y0, y1), x_label)]
    legend = []
    for i, (name, points) in enumerate(series.items()):
        style = f'class="series s{i % _COLOURS}" stroke-dasharray="{_DASHES[i % len(_DASHES)]}"'
        if not _DASHES[i % len(_DASHES)]:
            style = f'class="series s{i % _COLOURS}"'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline {style} points="{path}"></polyline>')
        parts += [
            f'<circle class="series s{i % _COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2"></circle>'
            for x, y in (at(*point) for point in points)
            if len(points) <= 30
        ]
        legend.append(
            f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><line {style} x1="0" y1="5" x2="28" y2="5"></line></svg>'
            f"{html.escape(name)}</li>"
        )
    columns = sorted(set(xs))
    values = {name: dict(points) for name, points in series.items()}
    rows = [[number(x), *(values[name].get(x, "") for name in series)] for x in columns]
    label = html.escape(f"{title}. {description} The table below holds its numbers.", quote=True)
    note = f'<p class="muted">{html.escape(description)}</p>' if description else ""
    numbers = table(rows, [x_label, *series], f"{title}: numbers")
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul>{note}'
        f"<details><summary>Numbers of “{html.escape(title)}”</summary>{numbers}</details></figure>"
    )


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = max(0.5, 1e-3 * abs(low))
        return low - margin, high + margin
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= 5:
            step *= factor
            break
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
