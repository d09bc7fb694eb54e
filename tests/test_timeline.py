"""The picture of who worked when: its bars, and the shares of time in its sentence."""

import re

from purified_opsd_trl.monitoring.timeline import timeline
from purified_opsd_trl.rollout.ahead import Rollout


def rollout(asked: float, answered: float, awaited: float, taken: float, version: int = 0) -> Rollout:
    return Rollout(version, [[[1]]], asked, answered, awaited, taken, idle=0.0, in_flight=0)


def bars(page: str, kind: str) -> list[tuple[float, float, float]]:
    """Left edge, width and top of the bars of a kind."""
    found = re.findall(rf'<rect class="{kind}" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', page)
    return [(float(x), float(width), float(y)) for x, y, width in found]


def test_nothing_without_servers() -> None:
    assert timeline([], 1.0) == ""


def test_one_after_the_other() -> None:
    # Written for 2 s, trained for 2 s, three times: either waits half of the time
    steps = [(i + 1, rollout(4.0 * i, 4.0 * i + 2, 4.0 * i, 4.0 * i + 2, version=i)) for i in range(3)]
    page = timeline(steps, 12.0)
    assert "The trainer waited for 50% of this time, and the servers had nothing to write for 50%." in page
    scale = (480 - 60 - 8) / 12
    places = [(60 + 4 * i * scale, 2 * scale) for i in range(3)]
    assert [(x, w) for x, w, _ in bars(page, "work s1")] == [(round(x, 1), round(w, 1)) for x, w in places]
    trained = [(x, w) for x, w, _ in bars(page, "work s0")]
    assert trained == [(round(x + 2 * scale, 1), round(w, 1)) for x, w in places]
    assert len(bars(page, "wait")) == 3
    assert '<td class="number">2</td>' in page  # the adapter of the third step


def test_batches_that_are_written_at_once_have_lanes_of_their_own() -> None:
    # The first was there before; the next two were requested at 0 s and 1 s, and are written until 3 s and 4 s
    steps = [
        (1, rollout(-2, -1, 0, 0)),
        (2, rollout(0, 3, 2, 3)),
        (3, rollout(1, 4, 4.5, 4.5)),
    ]
    page = timeline(steps, 8.0)
    written = bars(page, "work s1")
    assert len(written) == 2 and len({top for *_, top in written}) == 2
    assert "waited for 12% of this time, and the servers had nothing to write for 50%" in page  # 1 s and 4 s of 8
