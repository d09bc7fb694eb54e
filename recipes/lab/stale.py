"""Rollouts from old weights, as in asynchronous pipelines."""

from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback

from purified_opsd_trl import PurifiedOPSDTrainer


class StaleRolloutTrainer(PurifiedOPSDTrainer):
    """
    Generates with the student's weights of `lag` updates ago. Everything else is unchanged.

    Args:
        lag (`int`):
            Number of updates by which the sampler lags. During the first `lag` updates it is the initial policy.
            `0` is the usual on-policy rollout.
        args, kwargs:
            As for [`PurifiedOPSDTrainer`].
    """

    def __init__(self, *args: Any, lag: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.snapshots: deque[list[torch.Tensor]] = deque(maxlen=lag + 1)  # oldest first
        self.add_callback(_KeepSnapshots(self))

    def keep_snapshot(self) -> None:
        """Stores the student's weights and drops those older than the lag."""
        self.snapshots.append([parameter.detach().clone() for parameter in self.model.parameters()])

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        own = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._load(self.snapshots[0])
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, weights: list[torch.Tensor]) -> None:
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            parameter.copy_(weight)


class _KeepSnapshots(TrainerCallback):
    def __init__(self, trainer: StaleRolloutTrainer):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.keep_snapshot()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.keep_snapshot()
