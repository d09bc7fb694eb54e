"""
Loss and scoring -> logs: sums over all processes, means over tokens.

A mean of per-process or per-micro-batch means would weigh a token in a short completion more than one in a long one.
Here every token of a logging window counts the same.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..loss import TokenLoss
from ..scores import ScoringStats


if TYPE_CHECKING:
    from accelerate import Accelerator


class TokenMeans:
    """Accumulates sums and numbers of tokens between two logs."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """
        Adds a batch.

        Args:
            sums (`Mapping[str, tuple[float, float]]`):
                Sum over the tokens and number of tokens, by metric name; the same on all processes.
        """
        for name, (total, number) in sums.items():
            pair = self._sums.setdefault(name, [0.0, 0.0])
            pair[0] += total
            pair[1] += number

    def flush(self) -> dict[str, float]:
        """
        Means since the last call. A metric without a token is absent, not zero.

        Returns:
            `dict[str, float]`
        """
        means = {name: total / number for name, (total, number) in self._sums.items() if number}
        self._sums.clear()
        return means


def loss_sums(result: TokenLoss, num_tokens: torch.Tensor, seconds: float) -> dict[str, torch.Tensor]:
    """
    What one micro-batch adds to the metrics, on this process. Every process has the same keys.

    Args:
        result ([`TokenLoss`]):
            Outcome of the loss.
        num_tokens (`torch.Tensor`):
            Tokens that carry loss, scalar.
        seconds (`float`):
            Time of the loss in seconds.

    Returns:
        `dict[str, torch.Tensor]`: scalars without gradient; `"tokens"` and `"seconds"` among them.
    """
    per_token = {
        "purification/target_entropy": result.target_entropy,
        "purification/clip_saturation": result.clip_saturation,
        "purification/unused_vocab_mass": result.unused_vocab_mass,
        "purification/kl_target_base": result.kl_target_base,
        "purification/kl_target_student": result.kl_target_student,
        "purification/advantage": result.advantage,
        "purification/advantage_total": result.advantage_total,
        "purification/advantage_ref": result.advantage_ref,
        "purification/advantage_it": result.advantage_it,
    }
    sums = {name: values.sum() for name, values in per_token.items() if values is not None}
    return {**sums, "tokens": num_tokens, "seconds": torch.tensor(seconds, device=num_tokens.device)}


def clock(device: torch.device) -> float:
    """
    The host's clock in seconds, read once a GPU has done what it was given.

    The trainer reads numbers off the device right before and right after what it times, so the wait costs nothing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reduce_loss_sums(
    sums: Mapping[str, torch.Tensor], accelerator: "Accelerator"
) -> tuple[dict[str, tuple[float, float]], float]:
    """
    Adds `loss_sums` up over all processes.

    Args:
        sums (`Mapping[str, torch.Tensor]`):
            This process's sums.
        accelerator ([`~accelerate.Accelerator`]):
            Reduces over the processes.

    Returns:
        `tuple[dict[str, tuple[float, float]], float]`: sum and number of tokens by metric name, and the mean time of
        the processes in seconds.
    """
    names = list(sums)
    # fp32: some accelerators have no fp64
    totals = accelerator.reduce(torch.stack([sums[name].float() for name in names]), "sum").tolist()
    by_name = dict(zip(names, totals, strict=True))
    tokens, seconds = by_name.pop("tokens"), by_name.pop("seconds")
    return {name: (total, tokens) for name, total in by_name.items()}, seconds / accelerator.num_processes


def scoring_metrics(stats: ScoringStats, accelerator: "Accelerator") -> dict[str, float]:
    """
    Cost of one scoring pass over all processes.

    Args:
        stats ([`ScoringStats`]):
            This process's cost.
        accelerator ([`~accelerate.Accelerator`]):
            Reduces over the processes.

    Returns:
        `dict[str, float]`: mean seconds of the processes, tokens of all of them a second, padded over real tokens.
    """
    counts = torch.tensor([stats.tokens, stats.padded_tokens, stats.seconds], dtype=torch.float32)
    tokens, padded, seconds = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
    seconds /= accelerator.num_processes
    return {
        "scoring/seconds": seconds,
        "scoring/tokens_per_second": tokens / seconds,
        "scoring/padding_ratio": padded / tokens,
    }
