"""
Counts epistemic markers on the rollouts, and warns when their rates change.

Completions are the independent units, not tokens: a single degenerate completion may hold hundreds of "Wait". The
variance of a rate is therefore that between completions (ratio estimator), and at least that of a Poisson count.

Shapes: N completions, M markers.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..markers import PAPER_MARKERS, MarkerCounter, distinct, has_answer


if TYPE_CHECKING:
    from accelerate import Accelerator


logger = logging.getLogger(__name__)

_NGRAMS = (2, 4)
# Distance from the band in standard errors: a rate at its edge raises a false alarm about once in 740 steps
_STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class MarkerSums:
    """
    Sums over completions from which rates and their variances follow. They add up over steps and processes.

    `tokens` and `tokens_squared` are of the completions' lengths; `counts`, `counts_squared` and `counts_tokens` `[M]`
    are, per marker, of its count, the square, and its product with the length.
    """

    completions: float
    tokens: float
    tokens_squared: float
    counts: torch.Tensor
    counts_squared: torch.Tensor
    counts_tokens: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor, lengths: torch.Tensor) -> "MarkerSums":
        """Sums of counts `[N, M]` and lengths `[N]` of N completions, fp64."""
        return cls(
            completions=float(len(lengths)),
            tokens=lengths.sum().item(),
            tokens_squared=lengths.square().sum().item(),
            counts=counts.sum(0),
            counts_squared=counts.square().sum(0),
            counts_tokens=(counts * lengths.unsqueeze(1)).sum(0),
        )

    def packed(self) -> torch.Tensor:
        """One vector `[3 + 3 M]`."""
        return torch.cat([torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in astuple(self)])

    @classmethod
    def unpacked(cls, vector: torch.Tensor, markers: int) -> "MarkerSums":
        """Inverse of `packed` for `markers` = M."""
        completions, tokens, tokens_squared = vector[:3].tolist()
        return cls(completions, tokens, tokens_squared, *vector[3:].split(markers))

    def __add__(self, other: "MarkerSums") -> "MarkerSums":
        return MarkerSums.unpacked(self.packed() + other.packed(), len(self.counts))

    def rate(self, marker: int) -> tuple[float, float]:
        """Rate per token of a marker (its index), and the variance of that estimate."""
        count = self.counts[marker].item()
        rate = count / self.tokens
        between = (
            self.counts_squared[marker].item()
            - 2 * rate * self.counts_tokens[marker].item()
            + rate**2 * self.tokens_squared
        ) * (self.completions / max(self.completions - 1, 1))
        # Half a count more: a count of zero does not show that the rate is zero
        return rate, max(between, count + 0.5) / self.tokens**2


class RateGuard:
    """
    Compares the rates of the last `window` steps with those of the first.

    A marker is outside its band when its rate lies more than three standard errors (of both rates) below
    `baseline / band` (collapse) or above `baseline * band` (explosion). An alarm is raised once, and again only after
    the rate has been inside in between.
    """

    def __init__(self, markers: Sequence[str], band: float, window: int):
        self.markers = tuple(markers)
        self.band = band
        self.window = window
        self.baseline: MarkerSums | None = None
        self.recent: deque[MarkerSums] = deque(maxlen=window)
        self.outside: dict[str, str] = {}  # marker -> "below" or "above"

    def update(self, sums: MarkerSums) -> list[str]:
        """Adds one step, the first of which is the baseline; returns a message per marker that newly left its band."""
        if sums.tokens == 0:
            return []
        if self.baseline is None:
            self.baseline = sums
        self.recent.append(sums)
        present = self.recent[0]
        for step in list(self.recent)[1:]:
            present = present + step
        alarms, outside = [], {}
        for index, name in enumerate(self.markers):
            side = self._side(present, index)
            if side is not None:
                outside[name] = side
                if self.outside.get(name) != side:
                    alarms.append(self._message(name, side, present, index))
        self.outside = outside
        return alarms

    def _side(self, present: MarkerSums, index: int) -> str | None:
        assert self.baseline is not None
        now, now_variance = present.rate(index)
        before, before_variance = self.baseline.rate(index)
        for side, factor, sign in (("below", 1 / self.band, -1.0), ("above", self.band, 1.0)):
            limit = factor * before
            # At the limit the count would vary by at least this much
            variance = max(now_variance, limit / present.tokens) + factor**2 * before_variance
            if sign * (now - limit) > _STANDARD_ERRORS * math.sqrt(variance):
                return side
        return None

    def _message(self, name: str, side: str, present: MarkerSums, index: int) -> str:
        assert self.baseline is not None
        before = 1000 * self.baseline.counts[index].item() / self.baseline.tokens
        now = 1000 * present.counts[index].item() / present.tokens
        change = "has collapsed" if side == "below" else "has exploded"
        limit = before / self.band if side == "below" else before * self.band
        return (
            f"`{name}` {change}: {now:.3g} per 1,000 tokens over the last {len(self.recent)} steps, {before:.3g} "
            f"before training (limit {limit:.3g}). The student's reasoning style is changing; read the completions "
            "and purification/mass_cos_total_ref. `epistemic_guard` and `epistemic_band` configure this alarm."
        )

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, in JSON types."""
        return {
            "baseline": None if self.baseline is None else self.baseline.packed().tolist(),
            "recent": [sums.packed().tolist() for sums in self.recent],
            "outside": dict(self.outside),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        count = len(self.markers)

        def unpack(values: list[float]) -> MarkerSums:
            return MarkerSums.unpacked(torch.tensor(values, dtype=torch.float64), count)

        self.baseline = None if state["baseline"] is None else unpack(state["baseline"])
        self.recent = deque(map(unpack, state["recent"]), maxlen=self.window)
        self.outside = dict(state["outside"])


class EpistemicMonitor(TrainerCallback, ExportableState):
    """
    Counts epistemic markers, repetition and answers on the training rollouts, and guards the markers' rates.

    The baseline is measured on the rollouts of the first step, which are generated before the first update. When a
    rate leaves its band ([`RateGuard`]), `guard="warn"` logs a warning, `"stop"` also saves a checkpoint and ends
    training, `"ignore"` does nothing. Baseline, window and alarms are part of the checkpoint.
    """

    def __init__(self, markers: Sequence[str], guard: str = "warn", band: float = 2.0, window: int = 10):
        self.counter = MarkerCounter(markers)
        self.guard = guard
        self.rates = RateGuard(self.counter.markers, band, window)
        self._observed: MarkerSums | None = None

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "args": {
                "markers": list(self.counter.markers),
                "guard": self.guard,
                "band": self.rates.band,
                "window": self.rates.window,
            },
            "attributes": {"saved_rates": self.rates.state()},
        }

    @property
    def saved_rates(self) -> dict[str, Any]:
        """Baseline, window and alarms for a checkpoint; assigning restores them."""
        return self.rates.state()

    @saved_rates.setter
    def saved_rates(self, state: dict[str, Any]) -> None:
        self.rates.load(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # transformers restores callbacks by name only on request; the guard must not lose its baseline by default
        callbacks: Any = state.stateful_callbacks or {}  # a dict by now; the annotation is that of the constructor
        saved = callbacks.get(type(self).__name__)
        if isinstance(saved, dict) and list(self.counter.markers) == saved["args"]["markers"]:
            self.saved_rates = saved["attributes"]["saved_rates"]

    def observe(
        self, texts: Sequence[str], ids: Sequence[Sequence[int]], accelerator: "Accelerator", training: bool
    ) -> dict[str, tuple[float, float]]:
        """
        Counts on the rollouts of one generation batch: total and number (of tokens or completions) by metric name.

        `texts` and `ids` are this process's completions. The guard ignores those that are not from training.
        """
        counts = torch.tensor([list(self.counter.count(text).values()) for text in texts], dtype=torch.float64)
        lengths = torch.tensor([len(row) for row in ids], dtype=torch.float64)
        sums = MarkerSums.of(counts.reshape(len(texts), len(self.counter.markers)), lengths)
        others = torch.tensor(
            [sum(has_answer(text) for text in texts), *(sum(distinct(row, n) for row in ids) for n in _NGRAMS)],
            dtype=torch.float64,
        )
        # fp32, because some accelerators have no fp64; counts below 2**24 are exact
        packed = torch.cat([sums.packed(), others]).float().to(accelerator.device)
        packed = accelerator.reduce(packed, "sum").double().cpu()
        sums = MarkerSums.unpacked(packed[: -len(others)], len(self.counter.markers))
        answered, *distincts = packed[-len(others) :].tolist()
        if training:
            self._observed = sums
        per_marker = dict(zip(self.counter.markers, sums.counts.tolist(), strict=True))
        metrics = {f"epistemic/{name}_per_1k": (1000 * n, sums.tokens) for name, n in per_marker.items()}
        metrics["epistemic/total_per_1k"] = (1000 * sum(per_marker.values()), sums.tokens)
        if set(PAPER_MARKERS) <= per_marker.keys():
            metrics["epistemic/paper_per_1k"] = (1000 * sum(per_marker[name] for name in PAPER_MARKERS), sums.tokens)
        metrics["completions/answer_rate"] = (answered, sums.completions)
        for n, value in zip(_NGRAMS, distincts, strict=True):
            metrics[f"completions/distinct_{n}"] = (value, sums.completions)
        return metrics

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._observed is None:
            return control
        new = self.rates.update(self._observed)
        self._observed = None
        if self.guard == "ignore" or not new:
            return control
        # All processes hold the same sums, so they make the same decision
        if state.is_world_process_zero:
            for alarm in new:
                logger.warning("Step %d: %s", state.global_step, alarm)
            if self.guard == "stop":
                logger.warning(
                    "Step %d: `epistemic_guard: stop` ends training here, with a checkpoint.", state.global_step
                )
        if self.guard == "stop":
            control.should_save = True
            control.should_training_stop = True
        return control
