"""What the console shows during training."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.monitoring.console import ConsoleTable


@pytest.mark.parametrize("disable_tqdm", [True, False], ids=["lines", "bar"])
def test_a_training_run(
    arguments: dict[str, Any],
    model_dir: Path,
    standard_dataset: Dataset,
    disable_tqdm: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One row per step and evaluation below a header, with the numbers that were logged; no line is long."""
    args = PurifiedOPSDConfig(
        **{**arguments, "disable_tqdm": disable_tqdm, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    )
    trainer = PurifiedOPSDTrainer(
        model=str(model_dir), args=args, train_dataset=standard_dataset, eval_dataset=standard_dataset.select([0])
    )
    warn_at_step_two(trainer)
    trainer.train()
    out, err = capfd.readouterr()
    lines = [line.split("\r")[-1] for line in out.splitlines()]
    assert max(map(len, lines)) <= 160
    assert "Training for 3 steps, 1 process on cpu" in lines
    header = next(line for line in lines if "KL to target" in line)
    rows = [line for line in lines if line.split()[:1] in (["1/3"], ["2/3"], ["3/3"], ["eval"])]
    assert [row.split()[0] for row in rows] == ["1/3", "2/3", "eval", "3/3", "eval"]
    assert {len(row) for row in rows} == {len(header)}
    logged = [log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log]
    assert [float(row.split()[1]) for row in rows] == pytest.approx(
        [log.get("loss", log.get("eval_loss")) for log in logged], rel=1e-3
    )
    assert [float(row.split()[2]) for row in rows[:2]] == pytest.approx(
        [log["purification/kl_target_student"] for log in logged[:2]], rel=1e-3
    )
    assert not any(line.startswith("{") for line in lines)
    if not disable_tqdm:  # the warning stands alone beside the bar
        assert "Look here" in err.replace("\r", "\n").split("\n")
    assert logging.root.handlers == trainer.handlers_before


def warn_at_step_two(trainer: Any) -> None:
    """Makes a step log a warning, as a guard does."""

    class Warn(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == 2:
                logging.getLogger("purified_opsd_trl.test").warning("Look here")

    trainer.handlers_before = list(logging.root.handlers)
    trainer.add_callback(Warn())


def test_the_dict_of_transformers(
    arguments: dict[str, Any],
    model_dir: Path,
    standard_dataset: Dataset,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = PurifiedOPSDConfig(**{**arguments, "max_steps": 1, "log_style": "dict"})
    PurifiedOPSDTrainer(model=str(model_dir), args=args, train_dataset=standard_dataset).train()
    out = capsys.readouterr().out
    assert "{'loss': " in out and "KL to target" not in out


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Logs metrics at a step and returns what is printed."""
    table = ConsoleTable()
    state = TrainerState(max_steps=100, global_step=10, num_input_tokens_seen=1000, is_world_process_zero=True)
    args: Any = SimpleNamespace(world_size=2, device=SimpleNamespace(type="cuda"))
    table.on_train_begin(args, state, TrainerControl())

    def log(step: int, **logs: Any) -> list[str]:
        state.global_step = step
        table.on_log(args, state, TrainerControl(), logs)
        return capsys.readouterr().out.splitlines()

    return log


def test_speed_counts_from_where_the_run_was_resumed(show: Callable[..., list[str]]) -> None:
    started, _, row = show(20, loss=1.0, step_time=2.0, num_tokens=5000)  # 4,000 tokens in 10 steps of 2 s
    assert started == "Training for 100 steps, 2 processes on cuda"
    assert row.split()[-2:] == ["2", "200"]
    (row,) = show(30, loss=1.0, step_time=2.0)  # no new rollouts in this window
    assert row.split()[-2:] == ["2", "-"]
    (row,) = show(40, loss=1.0, step_time=1.0, num_tokens=45000)  # 40,000 tokens in the 20 steps since
    assert row.split()[-2:] == ["1", "2,000"]


def test_the_header_comes_again(show: Callable[..., list[str]]) -> None:
    headers = [i for i in range(45) if any("KL to target" in line for line in show(i, loss=1.0))]
    assert headers == [0, 20, 40]


def test_other_logs(show: Callable[..., list[str]]) -> None:
    row = show(10, **{"eval_math_loss": 0.5, "eval_entropy": 1.25, "eval_runtime": 3.0})[-1].split()
    assert row[:4] == ["eval_math", "0.5", "-", "1.250"]
    assert show(10, train_runtime=3725.2, train_loss=0.25) == ["10 steps in 1:02:05, mean loss 0.25"]
    lines = show(10, **{f"my_metric_{i}": i / 3 for i in range(40)}, note="x" * 300)
    assert "my_metric_1 0.3333" in lines[0] and max(map(len, lines)) <= 160
    assert show(10, loss=None, grad_norm=float("nan"))[-1].split()[1] == "-"
