"""Settings of the loss: built and validated once, by the config, and read as they are by the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InputError
from ..head import LN2, LOG2E
from ..targets import DENSE_TARGETS


@dataclass(frozen=True)
class LossSettings:
    """
    Settings of the loss.

    Args:
        target (`str`, *optional*, defaults to `"purified"`):
            `"purified"`, `"teacher"` for plain on-policy self-distillation, or one of `DENSE_TARGETS`.
        loss_type (`str`, *optional*, defaults to `"divergence"`):
            `"divergence"` over the full vocabulary, or `"sampled_token"`: `-A log pi_theta(y)` with the advantage
            `A = log P_target(y) - log pi_theta(y)` held constant.
        beta (`float`, *optional*, defaults to `0.5`):
            0: forward `KL(target || student)`. 1: reverse `KL(student || target)`. Between: `beta KL(target || m) +
            (1 - beta) KL(student || m)` with `m = (1 - beta) student + beta target`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; divides all logits.
        pmi_beta (`float`, *optional*, defaults to `1.0`):
            Strength of the anchor: larger keeps the target closer to the base.
        pmi_clip (`float`, *optional*, defaults to `10.0`):
            Bound `c` of the soft clip `c tanh(x / c)`, nats. `None` for no clip.
        pmi_center (`bool`, *optional*, defaults to `True`):
            Whether `Delta_it` is centered over the vocabulary.
        interpolation_weight (`float`, *optional*, defaults to `0.5`):
            `"interpolated"`: weight of the teacher's logits against the base's, from 0 to 1.
        contrastive_alpha (`float`, *optional*, defaults to `0.5`):
            `"contrastive"`: strength of the contrast; 0 is the teacher.
        contrastive_floor (`float`, *optional*, defaults to `-10.0`):
            `"contrastive"`: lower bound of the log-probabilities under the wrong reference, nats.
        contrastive_tau (`float`, *optional*, defaults to `1.0`):
            `"contrastive"`: `KL(correct || wrong)` at which a token has half of its weight, nats. 0 for full weight.
        kl_clip (`float`, *optional*):
            Upper bound of the contribution of one vocabulary entry to a token's divergence, nats.
        mask_unused_vocab (`bool`, *optional*, defaults to `False`):
            Whether rows of the head beyond the tokenizer's vocabulary are left out of all distributions.
        loss_chunk_size (`int`, *optional*):
            Tokens whose logits exist at once. `None` chooses it from `loss_memory_budget`.
        loss_memory_budget (`float`, *optional*, defaults to `512`):
            Scratch memory, MiB.

    Raises:
        [`InputError`]: for a value outside its range.
    """

    target: str = "purified"
    loss_type: str = "divergence"
    beta: float = 0.5
    temperature: float = 1.0
    pmi_beta: float = 1.0
    pmi_clip: float | None = 10.0
    pmi_center: bool = True
    interpolation_weight: float = 0.5
    contrastive_alpha: float = 0.5
    contrastive_floor: float = -10.0
    contrastive_tau: float = 1.0
    kl_clip: float | None = None
    mask_unused_vocab: bool = False
    loss_chunk_size: int | None = None
    loss_memory_budget: float = 512

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise InputError(f"`{name}` must be {expected}, got {getattr(self, name)!r}.")

        names = ("purified", "teacher", *DENSE_TARGETS)
        check("target", self.target in names, f"one of {', '.join(names)}")
        check("interpolation_weight", 0.0 <= self.interpolation_weight <= 1.0, "a number from 0 to 1")
        check("contrastive_floor", -math.inf < self.contrastive_floor <= 0.0, "a finite number up to 0")
        for name in ("contrastive_alpha", "contrastive_tau"):
            check(name, 0.0 <= getattr(self, name) < math.inf, "a number from 0")
        check("loss_type", self.loss_type in ("divergence", "sampled_token"), "'divergence' or 'sampled_token'")
        check("beta", 0.0 <= self.beta <= 1.0, "a number from 0 to 1")
        check("pmi_beta", 0 < self.pmi_beta < math.inf, "a positive number (larger is closer to the base)")
        for name in ("temperature", "loss_memory_budget"):
            check(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("pmi_clip", "kl_clip", "loss_chunk_size"):
            check(name, getattr(self, name) is None or 0 < getattr(self, name) < math.inf, "a positive number or None")
        if self.loss_type == "sampled_token" and self.kl_clip is not None:
            raise InputError(
                "`kl_clip` bounds the terms of a divergence and has no meaning with `loss_type: sampled_token`. "
                "Remove one of the two keys."
            )

    @property
    def delta_scale(self) -> float:
        """Factor from the base-2 difference of logits to the argument of the clip, or to nats without a clip."""
        return LN2 if self.pmi_clip is None else LN2 / self.pmi_clip

    @property
    def tilt_gain(self) -> float:
        """Factor from the clipped argument to what is added to the base's base-2 logits."""
        return (1.0 if self.pmi_clip is None else self.pmi_clip) * LOG2E / self.pmi_beta

    @property
    def grad_scale(self) -> float:
        """Factor that the gradient written by the row transform still lacks; the matrix product applies it."""
        if self.beta == 0.0:
            return 1.0
        if self.beta == 1.0:
            return LN2
        return LN2 * (1.0 - self.beta) * (-1.0 if self.kl_clip is None else 1.0)
