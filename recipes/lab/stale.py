"""Rollouts from old weights, as in asynchronous pipelines."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from purified_opsd_trl import PurifiedOPSDTrainer


class StaleRolloutTrainer(PurifiedOPSDTrainer):
    """
    Generates with the student's weights of `lag` updates ago. Everything else is unchanged.

    `distances` holds, for each step, the mean `KL(policy now || policy that wrote)` in nats per written token.

    Args:
        lag (`int`):
            Number of updates by which the sampler lags. During the first `lag` updates it is the initial policy.
            `0` is the usual on-policy rollout.
        args, kwargs:
            As for [`PurifiedOPSDTrainer`].
    """

    def __init__(self, *args: Any, lag: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.distances: list[float] = []
        self.snapshots: deque[list[torch.Tensor]] = deque(maxlen=lag + 1)  # oldest first
        self.add_callback(_KeepSnapshots(self))

    def keep_snapshot(self) -> None:
        """Stores the student's weights and drops those older than the lag."""
        self.snapshots.append([parameter.detach().clone() for parameter in self.model.parameters()])

    @contextmanager
    def _weights_that_write(self) -> Iterator[None]:
        own = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._load(self.snapshots[0])
        try:
            yield
        finally:
            self._load(own)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._weights_that_write():
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.snapshots.maxlen != 1:  # with a lag
            now = self._log_probs(output)
            with self._weights_that_write():
                wrote = self._log_probs(output)
            written = output["completion_mask"].bool()
            self.distances.append(float((now.exp() * (now - wrote)).sum(-1)[written].mean()))
        return output

    @torch.no_grad()
    def _log_probs(self, output: dict[str, Any]) -> torch.Tensor:
        """`[B, C, V]` at the tokens of the completions."""
        parts = ("prompt", "completion")
        ids, mask = (torch.cat([output[f"{part}_{name}"] for part in parts], dim=1) for name in ("ids", "mask"))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(ids, attention_mask=mask, position_ids=positions).logits
        return logits[:, output["prompt_ids"].shape[1] - 1 : -1].log_softmax(-1)

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
