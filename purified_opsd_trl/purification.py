"""
The maths of purified self-distillation on logits, written to be read (arXiv 2607.02234).

Shapes: `[..., V]` is any number of leading dimensions and the vocabulary last. All logits are already divided by the
sampling temperature. Everything is computed in fp32 at least (fp64 stays fp64), on any device, and is differentiable.

The trainer's loss computes the same quantities chunk by chunk and fused (`purified_opsd_trl.loss`); this module is
what the diagnosis, custom targets and a reader use.

| name | symbol | weights | context |
|---|---|---|---|
| student | pi_theta | trained | question |
| teacher | pi_T | frozen base | question and reference |
| reference_only | pi_ref | frozen base | reference, no question |
| base | P_0 | frozen base | question |
"""

import math
from typing import NamedTuple

import torch


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    # fp16/bf16 would lose the tail of the vocabulary, where the log-ratios live
    return x if x.dtype == torch.float64 else x.float()


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(_at_least_fp32(logits), dim=-1)


class Decomposition(NamedTuple):
    """
    The three log-ratios of Eq. 4, `total = ref + it`, over the vocabulary (nats).

    Attributes:
        total (`torch.Tensor` of shape `[..., V]`):
            `log pi_T - log pi_theta`: the whole signal that plain self-distillation follows.
        ref (`torch.Tensor` of shape `[..., V]`):
            `log pi_ref - log pi_theta`: what the reference alone induces; the student never sees the reference, so it
            cannot transfer.
        it (`torch.Tensor` of shape `[..., V]`):
            `log pi_T - log pi_ref`: the inference-transferable part, the pointwise mutual information of the next
            token and the question given the reference.
    """

    total: torch.Tensor
    ref: torch.Tensor
    it: torch.Tensor


def decompose(student: torch.Tensor, teacher: torch.Tensor, reference_only: torch.Tensor) -> Decomposition:
    """
    Splits the teacher's signal into its reference-induced and its inference-transferable part (Eq. 4).

    Args:
        student (`torch.Tensor` of shape `[..., V]`):
            Student logits.
        teacher (`torch.Tensor` of shape `[..., V]`):
            Logits of the privileged teacher (question and reference in context).
        reference_only (`torch.Tensor` of shape `[..., V]`):
            Logits of the reference-only probe (reference in context, no question).

    Returns:
        [`Decomposition`]: log-ratios `[..., V]` in nats.
    """
    log_student, log_teacher, log_reference = _log_probs(student), _log_probs(teacher), _log_probs(reference_only)
    return Decomposition(
        total=log_teacher - log_student, ref=log_reference - log_student, it=log_teacher - log_reference
    )


def center(delta: torch.Tensor) -> torch.Tensor:
    """
    Subtracts the mean over the vocabulary (Eq. 14).

    Anything constant over the vocabulary disappears here, the log-normalizers of both distributions among it; that is
    why the fused loss may work on a difference of raw logits.

    Args:
        delta (`torch.Tensor` of shape `[..., V]`):
            Log-ratio or difference of logits (nats).

    Returns:
        `torch.Tensor` of shape `[..., V]`.
    """
    delta = _at_least_fp32(delta)
    return delta - delta.mean(dim=-1, keepdim=True)


def soft_clip(delta: torch.Tensor, clip: float | None) -> torch.Tensor:
    """
    Bounds every entry to `(-clip, clip)` by `clip * tanh(delta / clip)` (Eq. 15).

    Args:
        delta (`torch.Tensor` of shape `[..., V]`):
            Centred log-ratio (nats).
        clip (`float` or `None`):
            Bound c in nats. `None` leaves `delta` as it is.

    Returns:
        `torch.Tensor` of shape `[..., V]`.
    """
    delta = _at_least_fp32(delta)
    return delta if clip is None else clip * torch.tanh(delta / clip)


def purified_target_logits(
    teacher: torch.Tensor,
    reference_only: torch.Tensor,
    base: torch.Tensor,
    *,
    pmi_beta: float = 1.0,
    pmi_clip: float | None = 10.0,
    pmi_center: bool = True,
) -> torch.Tensor:
    """
    Unnormalized log-probabilities of the purified target (Eq. 5-8 and 13-17).

    `softmax` of the result maximizes `E_P[delta] - pmi_beta * KL(P || P_0)` over all distributions P: the (centered,
    clipped) log-ratio `delta = log pi_T - log pi_ref` is the reward and the base model the anchor.

    Args:
        teacher (`torch.Tensor` of shape `[..., V]`):
            Logits of the privileged teacher (question and reference in context).
        reference_only (`torch.Tensor` of shape `[..., V]`):
            Logits of the reference-only probe (reference in context, no question).
        base (`torch.Tensor` of shape `[..., V]`):
            Logits of the base model (question in context).
        pmi_beta (`float`, *optional*, defaults to `1.0`):
            Strength of the anchor. Larger means closer to the base.
        pmi_clip (`float` or `None`, *optional*, defaults to `10.0`):
            Bound c of the soft clip in nats; `None` switches it off.
        pmi_center (`bool`, *optional*, defaults to `True`):
            Whether to center the log-ratio over the vocabulary before the clip.

    Returns:
        `torch.Tensor` of shape `[..., V]`: target logits; apply `softmax` for the target distribution.
    """
    delta = _log_probs(teacher) - _log_probs(reference_only)
    if pmi_center:
        delta = center(delta)
    return _log_probs(base) + soft_clip(delta, pmi_clip) / pmi_beta


def divergence(student: torch.Tensor, target: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """
    Divergence between the student's and the target's next-token distribution, in TRL's convention.

    - `beta = 0`: forward KL, KL(target || student).
    - `beta = 1`: reverse KL, KL(student || target).
    - otherwise: generalized Jensen-Shannon divergence with the mixture `m = (1 - beta) * student + beta * target`:
      `beta * KL(target || m) + (1 - beta) * KL(student || m)`.

    Args:
        student (`torch.Tensor` of shape `[..., V]`):
            Student logits.
        target (`torch.Tensor` of shape `[..., V]`):
            Target logits.
        beta (`float`, *optional*, defaults to `0.5`):
            Interpolation coefficient in `[0, 1]`.

    Returns:
        `torch.Tensor` of shape `[...]`: divergence per token in nats.
    """
    log_student, log_target = _log_probs(student), _log_probs(target)
    if beta == 0.0:
        return _kl(log_target, log_student)
    if beta == 1.0:
        return _kl(log_student, log_target)
    log_mixture = torch.logaddexp(log_student + math.log1p(-beta), log_target + math.log(beta))
    return beta * _kl(log_target, log_mixture) + (1.0 - beta) * _kl(log_student, log_mixture)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q), the expectation of `log p - log q` under p, per token."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
