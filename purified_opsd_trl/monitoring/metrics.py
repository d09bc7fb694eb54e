"""
Loss and scoring -> logs: sums over all processes, means over tokens.

A mean of per-process or per-micro-batch means would weigh a token in a short completion more than one in a long one.
Here every token of a logging window counts the same.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging
from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops_per_device

from ..loss import TokenLoss
from ..scores import ScoringStats


if TYPE_CHECKING:
    from accelerate import Accelerator


logger = logging.get_logger(__name__)

# What a part of a micro-batch takes: its tokens with loss, its tokens, its tokens with padding, seconds of the loss
COSTS = ("tokens", "student_tokens", "student_padded", "seconds")
UNUSED_VOCAB_MASS = 1e-3  # share of the target's mass from which a run is warned


class TokenMeans:
    """Accumulates sums and numbers of tokens between two logs, and values of which the median is logged."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._values: dict[str, list[torch.Tensor]] = {}

    def add(self, batch: Mapping[str, tuple[float, float] | torch.Tensor]) -> None:
        """Adds, by metric name, a numerator and a denominator (sum and number of tokens), or values `[n]`."""
        for name, item in batch.items():
            if isinstance(item, torch.Tensor):
                self._values.setdefault(name, []).append(item)
            else:
                pair = self._sums.setdefault(name, [0.0, 0.0])
                pair[0] += item[0]
                pair[1] += item[1]

    def flush(self) -> dict[str, float]:
        """Ratios of the sums and medians of the values since the last call. A metric without a token is absent."""
        means = {name: total / number for name, (total, number) in self._sums.items() if number}
        for name, parts in self._values.items():
            if len(values := torch.cat(parts)):
                means[name] = values.double().quantile(0.5).item()  # unlike `median`, the mean of the middle two
        self._sums.clear()
        self._values.clear()
        return means


def loss_sums(result: TokenLoss, num_tokens: torch.Tensor, seconds: float) -> dict[str, torch.Tensor]:
    """Sums of one micro-batch on this process, scalars without gradient; every process has the same keys."""
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
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Adds `loss_sums` up over all processes: sum and tokens by name; `COSTS`, the seconds as a mean."""
    names = list(sums)
    # fp32: some accelerators have no fp64
    totals = accelerator.reduce(torch.stack([sums[name].float() for name in names]), "sum").tolist()
    by_name = dict(zip(names, totals, strict=True))
    costs = {name: by_name.pop(name) for name in COSTS}
    costs["seconds"] /= accelerator.num_processes
    return {name: (total, costs["tokens"]) for name, total in by_name.items()}, costs


def generation_metrics(
    mask: torch.Tensor, seconds: float, accelerator: "Accelerator"
) -> dict[str, tuple[float, float]]:
    """Tokens that all processes wrote (1 in `[B, C]`) and the mean of their seconds."""
    sums = torch.tensor([float(mask.sum()), seconds], device=accelerator.device)
    tokens, total = accelerator.reduce(sums, "sum").tolist()
    return {"generation/tokens_per_second": (tokens, total / accelerator.num_processes)}


def training_metrics(
    tokens: float, rows: int, seconds: float, config: Any, accelerator: "Accelerator"
) -> dict[str, tuple[float, float]]:
    """
    Speed of the student's passes over one micro-batch, generation and scoring apart.

    Args:
        tokens (`float`):
            Tokens of prompts and completions of all processes, without padding.
        rows (`int`):
            Rows of all processes.
        seconds (`float`):
            Time of forward, loss, backward, and update where there is one in it.
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the language model.
        accelerator ([`~accelerate.Accelerator`]):
            Processes and device.

    Returns:
        `dict[str, tuple[float, float]]`: numerators and seconds. Model FLOPs utilization (%, TRL's convention: three
        forwards per token, attention to the complete row) only where the device's peak is known.
    """
    metrics = {"training/tokens_per_second": (tokens, seconds)}
    peak = _peak_flops(accelerator, str(config.dtype).removeprefix("torch."))
    if peak is not None:
        try:
            flops = compute_flops_per_token(config, round(tokens / rows))
        except AttributeError:  # a kind of model whose FLOPs TRL does not count
            return metrics
        metrics["training/mfu"] = (compute_mfu(flops, tokens, accelerator.num_processes, peak), seconds)
    return metrics


def _peak_flops(accelerator: "Accelerator", dtype: str) -> float | None:
    """Peak FLOPs per second of a known device."""
    if accelerator.device.type != "cuda":
        return None
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, dtype)
    return get_peak_flops_per_device(accelerator, dtype)


def scoring_metrics(stats: ScoringStats, accelerator: "Accelerator") -> dict[str, float]:
    """Cost of one scoring pass: mean seconds of the processes, their tokens per second, padded per real token."""
    counts = torch.tensor([stats.tokens, stats.padded_tokens, stats.seconds], dtype=torch.float32)
    tokens, padded, seconds = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
    seconds /= accelerator.num_processes
    return {
        "scoring/seconds": seconds,
        "scoring/tokens_per_second": tokens / seconds,
        "scoring/padding_ratio": padded / tokens,
    }


def warn_of_unused_vocab(means: Mapping[str, float]) -> None:
    """Warns once where the target puts more than a thousandth of its mass on ids that the tokenizer lacks."""
    mass = means.get("purification/unused_vocab_mass", 0.0)
    if mass > UNUSED_VOCAB_MASS:
        logger.warning_once(
            f"The target puts {mass:.1%} of its mass on ids that the tokenizer does not have. Set "
            "`mask_unused_vocab: true` to leave them out."
        )
