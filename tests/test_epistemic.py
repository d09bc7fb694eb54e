"""Epistemic monitor: rates on the rollouts, and the guard of the rates."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from purified_opsd_trl.markers import DEFAULT_MARKERS
from purified_opsd_trl.monitoring.epistemic import EpistemicMonitor, MarkerSums, RateGuard
from tests.trainer_cases import Build


def test_rates_are_totals_over_all_tokens() -> None:
    monitor = EpistemicMonitor(DEFAULT_MARKERS)
    texts = ["Wait. Maybe 4.", "no markers \\boxed{4}", ""]
    ids = [list(range(10)), [1] * 30, []]
    metrics = monitor.observe(texts, ids, Accelerator(cpu=True), training=True)
    values = {name: total / number for name, (total, number) in metrics.items()}
    assert values["epistemic/wait_per_1k"] == values["epistemic/maybe_per_1k"] == 25.0
    assert values["epistemic/total_per_1k"] == values["epistemic/paper_per_1k"] == 50.0
    assert values["epistemic/hmm_per_1k"] == 0.0
    assert values["completions/answer_rate"] == pytest.approx(1 / 3)
    assert values["completions/distinct_2"] == pytest.approx((1 + 1 / 29 + 1) / 3)


def sums(rate: float, completions: int = 200, length: int = 500, seed: int = 0) -> MarkerSums:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.full((completions, 1), rate * length, dtype=torch.float64), generator=generator)
    return MarkerSums.of(counts, torch.full((completions,), float(length), dtype=torch.float64))


def test_sums_add_up_and_survive_packing() -> None:
    one, two = sums(0.01, seed=1), sums(0.02, seed=2)
    both = one + two
    assert both.completions == 400 and both.tokens == 200_000
    assert torch.equal(both.counts, one.counts + two.counts)
    assert torch.equal(MarkerSums.unpacked(both.packed(), 1).packed(), both.packed())


def test_the_standard_error_of_a_rate_is_that_of_repeated_draws() -> None:
    rates = [sums(0.01, completions=50, seed=seed).rate(0)[0] for seed in range(400)]
    _, variance = sums(0.01, completions=50, seed=1000).rate(0)
    assert math.sqrt(variance) == pytest.approx(torch.tensor(rates).std().item(), rel=0.2)


@pytest.mark.parametrize(
    ("rate", "side"), [(0.01, None), (0.007, None), (0.002, "below"), (0.0, "below"), (0.014, None), (0.04, "above")]
)
def test_the_guard_sees_collapse_and_explosion(rate: float, side: str | None) -> None:
    guard = RateGuard(["wait"], band=2.0, window=3)
    guard.update(sums(0.01))
    alarms = [alarm for step in range(5) for alarm in guard.update(sums(rate, seed=step))]
    assert guard.outside.get("wait") == side
    assert len(alarms) == (side is not None)  # once, not every step


def test_one_degenerate_completion_is_no_explosion() -> None:
    guard = RateGuard(["wait"], band=2.0, window=1)
    guard.update(sums(0.01))
    ordinary = sums(0.01, completions=31)
    loop = MarkerSums.of(torch.tensor([[500.0]], dtype=torch.float64), torch.tensor([500.0], dtype=torch.float64))
    assert guard.update(ordinary + loop) == []


def test_an_alarm_comes_again_after_the_rate_was_back_inside() -> None:
    guard = RateGuard(["wait"], band=2.0, window=1)
    found = [bool(guard.update(sums(rate, seed=i))) for i, rate in enumerate([0.01, 0.001, 0.001, 0.01, 0.001])]
    assert found == [False, True, False, False, True]


def speak(trainer: Any, text_by_step: dict[int, str]) -> None:
    """Every completion of a step is the given text."""

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        step = max(s for s in text_by_step if s <= trainer.state.global_step)
        return [list(text_by_step[step].encode()) for _ in prompt_ids]

    trainer._generate_single_turn = generate


THOUGHTFUL = "Wait, is it 4? Wait. Maybe 5. " * 8
TERSE = "It is 4, as one can see here. " * 8
GUARDED = {"max_completion_length": 256, "per_device_train_batch_size": 4, "epistemic_window": 1, "max_steps": 4}


@pytest.mark.parametrize("guard", ["warn", "stop", "ignore"])
def test_the_guard_in_a_run(build: Build, guard: str, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    trainer = build(epistemic_guard=guard, save_strategy="no", **GUARDED)
    speak(trainer, {0: THOUGHTFUL, 2: TERSE})
    with caplog.at_level(logging.WARNING, logger="purified_opsd_trl.monitoring.epistemic"):
        trainer.train()
    warned = [r.getMessage() for r in caplog.records if "has collapsed" in r.getMessage()]
    assert len(warned) == (0 if guard == "ignore" else 2)  # wait and maybe
    assert trainer.state.global_step == (3 if guard == "stop" else 4)
    assert Path(trainer.args.output_dir, "checkpoint-3").is_dir() == (guard == "stop")
    history = [e["epistemic/wait_per_1k"] for e in trainer.state.log_history if "epistemic/wait_per_1k" in e]
    assert history[0] == pytest.approx(1000 * 16 / 240) and history[2] == 0.0


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_keeps_its_baseline(build: Build, restore: bool, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    options = {**GUARDED, "save_strategy": "steps", "save_steps": 2}
    options["restore_callback_states_from_checkpoint"] = restore
    first = build(**{**options, "max_steps": 2})
    speak(first, {0: THOUGHTFUL})
    first.train()
    resumed = build(**options)
    speak(resumed, {0: TERSE})
    with caplog.at_level(logging.WARNING, logger="purified_opsd_trl.monitoring.epistemic"):
        resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir, "checkpoint-2")))
    assert [r.getMessage() for r in caplog.records if "`wait` has collapsed" in r.getMessage()]
    saved = json.loads(Path(first.args.output_dir, "checkpoint-2", "trainer_state.json").read_text())
    baseline = saved["stateful_callbacks"]["EpistemicMonitor"]["attributes"]["saved_rates"]["baseline"]
    assert baseline[1] == 4 * 240  # tokens


def test_tool_results_are_not_counted(build: Build) -> None:  # noqa: F811
    trainer = build()
    ids = torch.tensor([list(b"Wait. Wait.")])
    tool_mask = torch.tensor([[1] * 5 + [0] * 6])
    output = {"completion_ids": ids, "completion_mask": torch.ones_like(ids), "tool_mask": tool_mask}
    trainer._observe([{"prompt": "x"}], output, "train")
    assert trainer._token_means["train"].flush()["epistemic/wait_per_1k"] == 200.0
