"""
The guard's statistics: has a marker's rate left the band around its baseline, beyond the noise of counting?

Completions are the independent units, not tokens: a single degenerate completion holds hundreds of "Wait". The
variance of a rate is therefore taken between completions (ratio estimator), never below that of a Poisson count.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch


# Distance from the band that counts, in standard errors: a rate right on its edge alarms once in some 740 looks
_STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class MarkerSums:
    """
    Sums over completions from which rates and their variances follow. They add up over steps and processes.

    Attributes:
        completions, tokens, tokens_squared (`float`):
            Number of completions, and sums of their lengths and squared lengths in tokens.
        counts, counts_squared, counts_tokens (`torch.Tensor` of shape `[M]`):
            By marker, sums of the count, its square, and its product with the length.
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
        """
        Rate a token, and the variance of that estimate.

        Args:
            marker (`int`):
                Index of the marker.

        Returns:
            `tuple[float, float]`
        """
        count = self.counts[marker].item()
        rate = count / self.tokens
        between = (
            self.counts_squared[marker].item()
            - 2 * rate * self.counts_tokens[marker].item()
            + rate**2 * self.tokens_squared
        ) * (self.completions / max(self.completions - 1, 1))
        # Half a count more, as none at all is no proof that the rate is zero
        return rate, max(between, count + 0.5) / self.tokens**2


class RateGuard:
    """
    Compares the rates of the last steps with those of the first.

    A marker is outside its band when its rate lies more than three standard errors below `baseline / band` (collapse)
    or above `baseline * band` (explosion); the error is that of both rates. An alarm is raised once, and again only
    after the rate has been back inside.

    Args:
        markers (`Sequence[str]`):
            Names, for the messages.
        band (`float`):
            Factor by which a rate may fall or rise.
        window (`int`):
            Steps over which the present rate is taken.
    """

    def __init__(self, markers: Sequence[str], band: float, window: int):
        self.markers = tuple(markers)
        self.band = band
        self.window = window
        self.baseline: MarkerSums | None = None
        self.recent: deque[MarkerSums] = deque(maxlen=window)
        self.outside: dict[str, str] = {}  # marker -> "below" or "above"

    def update(self, sums: MarkerSums) -> list[str]:
        """
        Takes one step's sums in.

        Args:
            sums ([`MarkerSums`]):
                Sums over all completions of the step. The first ever become the baseline.

        Returns:
            `list[str]`: a message for each marker that has newly left its band.
        """
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
            # If the rate were at the limit, its count would vary like this at least
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
            f"`{name}` {change}: {now:.3g} a 1,000 tokens over the last {len(self.recent)} steps, {before:.3g} before "
            f"training (limit {limit:.3g}). The student is changing how it thinks; look at the completions and at "
            "purification/mass_cos_total_ref. `epistemic_guard` and `epistemic_band` set this alarm."
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
