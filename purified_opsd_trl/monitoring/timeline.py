"""Who worked when: rollouts on the servers and steps of the trainer, side by side in time."""

import html
from collections.abc import Sequence
from typing import Any

from .page import figure, table


_WIDTH, _LEFT, _RIGHT, _LANE, _BAR, _BOTTOM = 480, 60, 8, 26, 18, 34
_COLUMNS = ("step", "adapter of step", "requested", "written", "trainer asks", "trainer has it")

Bar = tuple[float, float, str, str]  # begin and end in seconds, label, what it is


def timeline(rollouts: Sequence[tuple[int, Any]], end: float) -> str:
    """
    A picture of the last steps as a `<figure>`; empty without rollouts of servers.

    Args:
        rollouts (`Sequence[tuple[int, Rollout]]`):
            Steps and their [`~purified_opsd_trl.rollout.ahead.Rollout`], in order.
        end (`float`):
            When the last step ended, by the clock of the rollouts (`time.perf_counter`).

    Returns:
        `str`: HTML.
    """
    if not rollouts:
        return ""
    zero = rollouts[0][1].awaited
    ends = [rollout.awaited for _, rollout in rollouts[1:]] + [end]
    trainer: list[Bar] = []
    for (step, rollout), done in zip(rollouts, ends, strict=True):
        trainer.append((rollout.awaited - zero, rollout.taken - zero, "", f"waits for step {step}"))
        trainer.append((rollout.taken - zero, done - zero, str(step), f"trains step {step}"))
    written = [
        (max(rollout.asked - zero, 0.0), rollout.answered - zero, str(step), f"step {step}, adapter {rollout.version}")
        for step, rollout in rollouts
        if rollout.answered > zero
    ]
    span = end - zero
    waited = sum(rollout.taken - rollout.awaited for _, rollout in rollouts) / span
    idle = 1 - _covered(written, span) / span
    text = (
        f"The trainer waited for {waited:.0%} of this time, and the servers had nothing to write for {idle:.0%}. "
        "Numbers are steps; an outline is waiting."
    )
    lanes = [("trainer", trainer), *(("server" if i == 0 else "", lane) for i, lane in enumerate(_lanes(written)))]
    rows = [
        [
            step,
            rollout.version,
            *(round(at - zero, 3) for at in (rollout.asked, rollout.answered, rollout.awaited, rollout.taken)),
        ]
        for step, rollout in rollouts
    ]
    title = f"Who worked when: the last {len(rollouts)} steps" if len(rollouts) > 1 else "Who worked when"
    numbers = table(rows, _COLUMNS, "Seconds from the beginning of the picture")
    return figure(title, text, (_WIDTH, len(lanes) * _LANE + _BOTTOM), _picture(lanes, span), numbers)


def _covered(bars: Sequence[Bar], span: float) -> float:
    """Seconds in which at least one batch was being written."""
    covered = reached = 0.0
    for begin, end, *_ in sorted(bars):
        covered += max(0.0, min(end, span) - max(begin, reached))
        reached = max(reached, end)
    return covered


def _lanes(bars: Sequence[Bar]) -> list[list[Bar]]:
    """Bars in as few rows as it takes for none to overlap."""
    lanes: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda bar: bar[0]):
        free = next((lane for lane in lanes if lane[-1][1] <= bar[0]), None)
        if free is None:
            lanes.append(free := [])
        free.append(bar)
    return lanes or [[]]


def _picture(lanes: Sequence[tuple[str, Sequence[Bar]]], span: float) -> list[str]:
    """SVG elements: a row of bars per lane, and the seconds below."""
    scale = (_WIDTH - _LEFT - _RIGHT) / span
    parts = []
    for i, (name, bars) in enumerate(lanes):
        top = i * _LANE + 4
        parts.append(f'<text x="{_LEFT - 6}" y="{top + 13}" text-anchor="end">{name}</text>')
        for begin, end, text, what in bars:
            x, width = _LEFT + begin * scale, max((end - begin) * scale, 0.5)
            kind = ("work " + ("s0" if name == "trainer" else "s1")) if text else "wait"
            parts.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{top}" width="{width:.1f}" height="{_BAR}">'
                f"<title>{html.escape(what)}: {end - begin:.2f} s</title></rect>"
            )
            if text and width > 8 * len(text):
                middle = x + width / 2
                parts.append(f'<text class="on" x="{middle:.1f}" y="{top + 13}" text-anchor="middle">{text}</text>')
    bottom = len(lanes) * _LANE + 18
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, anchor = _LEFT + share * span * scale, "end" if share == 1 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{bottom}" text-anchor="{anchor}">{share * span:.3g} s</text>')
    return parts
