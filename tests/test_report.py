"""`report.html` of a run, and the HTML that all pages are made of."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from purified_opsd_trl.monitoring.page import line_chart, number, page, table
from purified_opsd_trl.monitoring.report import ReportCallback, render
from tests.browser import accessibility_violations, chromium, evaluate_in_page, html_errors, requests_made
from tests.test_trainer import Build, build  # noqa: F401  # `build` is a fixture


@pytest.fixture
def report(build: Build) -> tuple[Any, Path]:  # noqa: F811
    trainer = build(max_steps=3, hub_token="secret-token", decomposition_steps=1)
    trainer.train()
    return trainer, Path(trainer.args.output_dir, "report.html")


def test_the_report_holds_what_was_logged(report: tuple[Any, Path]) -> None:
    trainer, path = report
    text = path.read_text()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rows = re.findall(r'<th scope="row">(\d)</th><td class="number">([^<]*)</td>', text[text.index("Loss: numbers") :])
    assert [value for _, value in rows[:3]] == [number(loss) for loss in losses]
    for title in ("Signal against the reference", "Epistemic markers", "Completion length", "Repetition", "Entropy"):
        assert title in text
    assert "Early (after 0 steps)" in text and "Late (after 2 steps)" in text
    assert "epistemic_guard" in text and "transformers" in text
    assert "secret-token" not in text
    assert html_errors(text) == [] and requests_made(text) == []


@chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_has_no_accessibility_violations(report: tuple[Any, Path], tmp_path: Path, dark: bool) -> None:
    assert accessibility_violations(report[1], tmp_path, dark=dark) == []


def test_completions_cannot_break_the_report(build: Build) -> None:  # noqa: F811
    args = build().args
    hostile = {"step": 0, "prompt": "<h1>&amp;", "completion": "</pre><script>alert(1)</script>\0"}
    text = render([], args, [hostile], [hostile], 0)
    assert "<script" not in text and "&lt;h1&gt;&amp;amp;" in text and "\0" not in text
    assert html_errors(text) == []


def test_a_resumed_run_reports_its_first_completions(build: Build) -> None:  # noqa: F811
    first = build(max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    state = json.loads(Path(first.args.output_dir, "checkpoint-1", "trainer_state.json").read_text())
    early = state["stateful_callbacks"]["ReportCallback"]["attributes"]["early"]
    resumed = build(max_steps=2, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir, "checkpoint-1")))
    callback = next(c for c in resumed.callback_handler.callbacks if isinstance(c, ReportCallback))
    assert callback.early == early and early[0]["step"] == 0
    assert callback.late[0]["step"] == 1


def test_a_diverged_run_is_reported_too(build: Build) -> None:  # noqa: F811
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": math.nan}]
    text = render([*history, {"step": 1, "entropy": 1e30}, {"step": 2, "entropy": 1e30}], build().args, [], [], 3)
    assert '<th scope="row">1</th><td class="number">2</td>' in text and "inf" not in text.lower().split("<h2>conf")[0]
    assert html_errors(text) == []


def test_a_report_that_cannot_be_written_loses_no_training(
    build: Build,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = build(max_steps=1)
    Path(trainer.args.output_dir, "report.html").mkdir(parents=True)
    trainer.train()
    assert trainer.state.global_step == 1
    assert "The training report could not be written: IsADirectoryError" in caplog.text


def test_settings_other_than_their_default(build: Build) -> None:  # noqa: F811
    text = render([], build(pmi_beta=2.0).args, [], [], 0)
    changed = text[text.index("Settings other than their default") : text.index("All settings")]
    assert "pmi_beta" in changed
    assert "epistemic_markers" not in changed and "pmi_clip" not in changed


# Charts ------------------------------------------------------------------------------------------------------------


def test_a_chart_puts_points_where_they_belong() -> None:
    figure = line_chart("T", {"a": [(0.0, 1.0), (10.0, 3.0), (5.0, 2.0)], "empty": []})
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', figure)[1].split()]
    (x0, y0), (x1, y1), (xm, ym) = points
    assert x0 < xm < x1 and y1 < ym < y0  # up is less
    assert (xm, ym) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=0.1)
    assert "empty" not in figure
    assert line_chart("T", {"empty": []}) == ""
    assert "polyline" in line_chart("T", {"one": [(1.0, 5.0)]})  # a single point has no range of its own


def test_tables_escape_and_round() -> None:
    text = table([["<a>", 1.23456789, 7, "<b>"]], ["x", "y", "z", "w"], "c & d")
    assert '<th scope="row">&lt;a&gt;</th>' in text and ">1.235<" in text and ">7<" in text and "&lt;b&gt;" in text
    assert "c &amp; d" in text


@chromium
def test_the_data_of_a_page_survives_any_text(tmp_path: Path) -> None:
    value = {"text": "</script><!-- <script> \u2028 \" ' & é 等"}
    path = tmp_path / "page.html"
    path.write_text(page("T", "S", "<p>body</p>", data=value), encoding="utf-8")
    script = "return JSON.parse(document.getElementById('data').textContent);"
    assert evaluate_in_page(path, script, tmp_path) == value
