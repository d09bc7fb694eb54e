"""`report.html` of a run, and the HTML that all pages are made of."""

import html
import importlib.metadata
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from purified_opsd_trl.monitoring.page import line_chart, number, page, table
from purified_opsd_trl.monitoring.report import ReportCallback, render
from tests.browser import accessibility_violations, chromium, evaluate_in_page, html_errors, overflow, requests_made
from tests.trainer_cases import Build


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
    for title in ("How much of the teacher&#x27;s signal", "Epistemic markers", "Completion length", "Repetition"):
        assert f"<figcaption>{title}" in text
    assert "Early (after 0 steps)" in text and "Late (after 2 steps)" in text
    assert "epistemic_guard" in text and "transformers" in text
    assert "secret-token" not in text and "hub_token" not in text
    assert html_errors(text) == [] and requests_made(text) == []


@chromium
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_report_does_not_scroll_sideways(report: tuple[Any, Path], tmp_path: Path, width: int) -> None:
    assert overflow(report[1], tmp_path, width) == []


@chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_has_no_accessibility_violations(report: tuple[Any, Path], tmp_path: Path, dark: bool) -> None:
    assert accessibility_violations(report[1], tmp_path, dark=dark) == []


def test_completions_cannot_break_the_report(build: Build) -> None:  # noqa: F811
    args = build().args
    hostile = {"step": 0, "prompt": "<h1>&amp;", "completion": "</pre><script>alert(1)</script>\0"}
    text = render([], args, {}, [hostile], [hostile], 0)
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
    text = render([*history, {"step": 1, "entropy": 1e30}, {"step": 2, "entropy": 1e30}], build().args, {}, [], [], 3)
    assert (
        '<th scope="row">1</th><td class="number">2</td>' in text
        and "inf" not in text.lower().split("<h2>settings")[0]
    )
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
    text = render([], build(pmi_beta=2.0).args, {}, [], [], 0)
    changed = text[text.index("Settings other than their default") : text.index("All settings")]
    assert "pmi_beta" in changed
    assert "epistemic_markers" not in changed and "pmi_clip" not in changed and "accelerator_config" not in changed


def test_credentials_in_nested_settings_are_left_out(build: Build) -> None:  # noqa: F811
    args = build().args
    args.model_init_kwargs = {"dtype": "float32", "token": "secret-token"}
    text = render([], args, {}, [], [], 0)
    assert "model_init_kwargs" in text and "float32" in text and "secret-token" not in text


def test_the_first_screen_identifies_the_run_and_answers(report: tuple[Any, Path]) -> None:
    trainer, path = report
    text = path.read_text()
    top = html.unescape(text[text.index("<main>") : text.index("<h2>Curves")])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, *_, last = (entry["purification/kl_target_student"] for entry in logged)
    for part in (number(first), number(last)):
        assert f" {part} " in top, part
    cosine, ratio = (logged[-1][f"purification/mass_{name}"] for name in ("cos_total_ref", "norm_ratio_ref"))
    assert f"cos(total, ref) = {cosine:.2f}. That part was {ratio:.2f} times" in top
    assert trainer.model.config._name_or_path in top and "none (all weights are trained)" in top
    rows = len(trainer.train_dataset)
    assert (
        f"{rows} rows" in top and "purified, pmi_beta 1.0" in top and f"trl {importlib.metadata.version('trl')}" in top
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.4, 0.2], "fell from 0.4 to 0.2"),
        ([0.2, 9.0, 0.4], "rose from 0.2 to 0.4"),
        ([0.4, 0.41], "stayed at 0.41"),
        ([4.0, 2.0, *[9.0] * 6, 1.0, 0.0], "fell from 3 to 0.5"),  # a fifth of the values at each end
        ([math.nan], "Not measured"),
    ],
)
def test_did_it_learn(build: Build, values: list[float], text: str) -> None:  # noqa: F811
    history = [{"step": i, "purification/kl_target_student": value} for i, value in enumerate(values)]
    page_text = render(history, build().args, {}, [], [], 0)
    learned = page_text[page_text.index("Did it learn?") : page_text.index("Did it keep thinking?")]
    assert text in learned


@pytest.mark.parametrize("rate", [0.0, 3.0])
def test_did_it_keep_thinking(build: Build, rate: float) -> None:  # noqa: F811
    history = [{"step": i, "epistemic/total_per_1k": rate, "completions/mean_length": 50.0 - i} for i in (1, 20)]
    text = render(history, build().args, {}, [], [], 0)
    assert ("It wrote no markers" in text) is (rate == 0) and "length fell from 49 to 30 tokens" in text
    assert ("markers stayed at 3 per 1,000 tokens" in text) is (rate > 0)


def test_late_completions_are_of_the_first_problems_where_these_return(build: Build) -> None:  # noqa: F811
    callback = ReportCallback()
    callback.observe(0, ["a", "b", "c", "d"], ["a0", "b0", "c0", "d0"])
    callback.observe(1, ["e", "d"], ["e1", "d1"])
    callback.observe(2, ["f", "d"], ["f2", "d2"])
    args, state = build().args, build().state
    state.log_history, state.is_world_process_zero = [], True
    callback.on_train_end(args, state, None)  # type: ignore[arg-type]
    text = Path(args.output_dir, "report.html").read_text()
    shown = re.findall(r'<pre tabindex="0">(.*?)</pre>', text)
    assert shown == ["d0", "d2"] and "The same problems." in text
    callback.again.clear()
    callback.on_train_end(args, state, None)  # type: ignore[arg-type]
    text = Path(args.output_dir, "report.html").read_text()
    assert re.findall(r'<pre tabindex="0">(.*?)</pre>', text) == ["a0", "b0", "c0", "f2", "d2"]
    assert "Different problems" in text


def test_no_terminated_completion_is_a_gap(build: Build) -> None:  # noqa: F811
    history = [{"step": i, "completions/mean_terminated_length": v} for i, v in enumerate([7.0, 8.0, 0.0, 9.0])]
    text = render(history, build().args, {}, [], [], 0)
    figure = text[text.index("<figcaption>Completion length") :]
    figure = figure[: figure.index("</figure>")]
    lines = [points.split() for points in re.findall(r'<polyline [^>]*points="([^"]*)"', figure)]
    assert [len(points) for points in lines] == [2, 1]
    assert re.findall(r'<th scope="row">(\d)</th><td[^>]*>([^<]*)</td>', figure) == [
        ("0", "7"), ("1", "8"), ("2", ""), ("3", "9"),
    ]  # fmt: skip


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


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([0.0, 0.0], 0, 1), ([3.0, 3.0], 0, 3), ([0.0, 0.4], 0, 0.4), ([5.0, 5.2], 5, 5.2), ([-2.0, -2.0], -2, 0)],
)
def test_axes_are_sane(values: list[float], low: float, high: float) -> None:
    figure = line_chart("T", {"a": list(enumerate(values, start=1))})
    labels = [float(label) for label in re.findall(r'text-anchor="end">([^<]*)<', figure)]
    assert min(labels) >= low and max(labels) <= high and len(labels) >= 2
    steps = re.findall(r'text-anchor="middle">([\d.-]+)<', figure)
    assert steps == ["1", "2"]  # no half steps


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
