"""No update is made that is not finite, and none is saved."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from purified_opsd_trl import PurifiedOPSDTrainer
from purified_opsd_trl.checkpoints import is_complete

from .reliability_cases import NaNTarget, build_trainer


def one_row_of_nan(inputs: dict[str, Any]) -> torch.Tensor:
    return inputs["base_hidden"].index_fill(0, torch.tensor([1]), math.nan)


class Spoil(TrainerCallback):
    """Spoils something before the third step."""

    def __init__(self, spoil: Callable[[], None]):
        self.spoil = spoil

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.spoil()


@pytest.mark.parametrize("cause", ["custom target", "teacher's head", "gradient", "states of one row"])
def test_training_stops_before_an_update_that_is_not_finite(model_dir: Path, tmp_path: Path, cause: str) -> None:
    cls = NaNTarget if cause == "custom target" else PurifiedOPSDTrainer
    trainer = build_trainer(model_dir, tmp_path, cls=cls, save_total_limit=1, teacher_model_kind="ema")

    def spoil() -> None:
        if cause == "teacher's head":
            with torch.no_grad():
                trainer.scoring_callback.teacher_model.get_output_embeddings().weight[5, 3] = math.inf
        elif cause == "gradient":
            next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
        elif cause == "states of one row":
            parts = trainer._parts
            trainer._parts = lambda model, inputs: parts(model, {**inputs, "base_hidden": one_row_of_nan(inputs)})

    trainer.add_callback(Spoil(spoil))
    row = r"1 of the batch \(one of 1" if cause == "states of one row" else r"\d of the batch "
    named = (
        "the gradient norm is nan"
        if cause == "gradient"
        else rf"the loss of row {row}.*prompt ends with '.*what is \d+ \+"
    )
    with pytest.raises(FloatingPointError, match=rf"Step 3: {named}.*before the update"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert all(
        entry["loss"] != 0 and math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    )
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"] and is_complete(
        tmp_path / "checkpoint-2"
    )
    saved = build_trainer(model_dir, tmp_path, max_steps=3, teacher_model_kind="ema", cls=cls)
    saved._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    for kept, present in zip(saved.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(kept, present)  # the third step changed nothing


def test_weights_that_an_update_made_infinite_are_not_saved(model_dir: Path, tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:  # the third step is too large, although its gradient is finite
                next(trainer.model.parameters()).data[0] = math.inf

    trainer = build_trainer(model_dir, tmp_path, save_total_limit=1)
    trainer.add_callback(Overflow())
    with pytest.raises(FloatingPointError, match="Step 3: the update made weights NaN or infinite.*are kept"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_rollout_of_weights_that_overflow_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    trainer = build_trainer(model_dir, tmp_path, learning_rate=1e30, save_strategy="no")
    with pytest.raises(FloatingPointError, match="Step 2: the student's probabilities are NaN.*the learning rate"):
        trainer.train()
