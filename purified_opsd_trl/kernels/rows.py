"""
Row transforms of one chunk in torch: from logits to the divergence, its gradient and the metrics.

Every function works row by row on fp32 (or fp64) **base-2 logits**, that is, natural logits times `log2(e)`: the
factor is free inside the product that forms them, and `exp2` is cheaper than `exp` on CPUs and GPUs alike. All results
are in nats. `kernels/triton_rows.py` holds the Triton twin of `divergence_rows`, with the same signature.

Shapes: n rows (tokens) of one chunk, V vocabulary entries.

With `p` the student, `q` the target and `m = (1 - beta) p + beta q`, writing `<x>_p = sum_v p(v) x(v)`:

| `beta` | divergence | gradient with respect to the student's logits |
|---|---|---|
| 0 | `KL(q || p)`, forward | `p - q` |
| 1 | `KL(p || q)`, reverse | `p (a - <a>_p)`, `a = log p - log q` |
| else | `beta KL(q || m) + (1 - beta) KL(p || m)` | `(1 - beta) p (<g>_p - g)`, `g = log(1 + r)` |

In the last line `r = beta q / ((1 - beta) p)`; it is the textbook `(1 - beta) p (a - <a>_p)` with `a = log p - log m`,
since `a = -g - log(1 - beta)`. The ratio is accurate where `p` and `q` are close; a difference of two logarithms of
size 10 is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..head import LN2, LOG2E
from .settings import LossSettings


# Elements of one block of rows: small enough for the scratch to stay in the last-level cache, large enough to outweigh
# the start of some forty parallel regions per block, which is slow where other processes compete for the cores.
_CPU_BLOCK = 1 << 20
# The same on a device without Triton: only the scratch has to stay small.
_DEVICE_BLOCK = 1 << 24

# Rows whose largest base-2 logit lies within this distance of zero need no shift before `exp2`.
SAFE = 60.0

# Distance below a row's largest base-2 logit from which a probability cannot matter to a divergence that is bounded.
FLOOR = 80.0


@dataclass(frozen=True)
class RowStats:
    """Per-token results, each `[N]` fp32; a field that does not apply stays `None`."""

    per_token: Tensor
    student_entropy: Tensor
    target_entropy: Tensor
    kl_target_student: Tensor
    kl_target_base: Tensor | None = None
    clip_saturation: Tensor | None = None
    unused_vocab_mass: Tensor | None = None

    def rows(self, start: int, end: int) -> RowStats:
        """Views of the rows `start` to `end`."""
        views: dict[str, Any] = {name: None if x is None else x[start:end] for name, x in vars(self).items()}
        return RowStats(**views)


def divergence_rows(
    student: Tensor,  # [n, V] base-2; overwritten by the gradient
    target: Tensor,  # [n, V] base-2; the base's logits where `delta` is given; overwritten
    delta: Tensor | None,  # [n, V] base-2, teacher minus reference-only; overwritten
    shift: Tensor | None,  # [n] base-2, what centring subtracts from `delta`
    settings: LossSettings,
    stats: RowStats,  # [n] each, written
    grad: Tensor | None,  # [n, V], where the gradient goes: `student` itself or a tensor of another dtype
    used: int | None = None,  # ids that the tokenizer has; the rest of the vocabulary is unused
) -> None:
    """
    Divergence between student and target, its gradient and the metrics, row by row.

    With `delta`, the target is `softmax(base + c tanh((delta - shift) / c) / pmi_beta)` (Eq. 5-8, 13-17); without, the
    softmax of `target`. The gradient of the divergence with respect to the student's natural logits is
    `settings.grad_scale` times what is written.
    """
    n, vocab = student.shape
    block = max(1, (_CPU_BLOCK if student.device.type == "cpu" else _DEVICE_BLOCK) // vocab)
    scratch = student.new_empty((3, min(block, n), vocab))
    for start in range(0, n, block):
        end = min(start + block, n)
        _divergence_block(
            student[start:end],
            target[start:end],
            None if delta is None else delta[start:end],
            None if shift is None else shift[start:end, None],
            settings,
            stats.rows(start, end),
            None if grad is None else grad[start:end],
            scratch[:, : end - start],
            used,
        )


def _divergence_block(
    student: Tensor,
    target: Tensor,
    delta: Tensor | None,
    shift: Tensor | None,
    settings: LossSettings,
    stats: RowStats,
    grad: Tensor | None,
    scratch: Tensor,
    used: int | None,
) -> None:
    p, q, work = scratch.unbind(0)
    out = work if grad is None or grad.dtype != work.dtype else grad
    lse_base = None
    if delta is not None and shift is not None:
        lse_base = _purify(target, delta, shift, settings, stats, work)

    shift_q, _ = _shift(target)
    log_zq = _softmax(target, q)
    if stats.unused_vocab_mass is not None:
        stats.unused_vocab_mass.copy_(q[:, used:].sum(-1) if used is not None else q.new_zeros(()))
    own = _dot(q, target, work)
    stats.target_entropy.copy_((log_zq - own) * LN2)
    if delta is not None and lse_base is not None and stats.kl_target_base is not None:
        tilt = _dot(q, delta, work) * settings.tilt_gain
        stats.kl_target_base.copy_((tilt - log_zq - shift_q + lse_base) * LN2)

    _, top_p = _shift(student)
    gap = _dot(q, torch.sub(target, student, out=work), work)
    mixed = 0.0 < settings.beta < 1.0 and settings.kl_clip is None
    floored = mixed and _raise_to_floor(student, top_p)
    log_zp = _softmax(student, p)
    stats.student_entropy.copy_((log_zp - _dot(p, student, work)) * LN2)
    kl_forward = gap - log_zq + log_zp  # base 2
    stats.kl_target_student.copy_(kl_forward * LN2)

    if settings.kl_clip is not None:
        _clipped(student, target, p, q, work, log_zp, log_zq, settings, stats, grad)
        return
    if settings.beta == 0.0:
        stats.per_token.copy_(kl_forward * LN2)
        if grad is not None:
            torch.sub(p, q, out=out)
    elif settings.beta == 1.0:
        # A constant of a row cancels in `a - <a>_p`, so the normalizers enter the divergence only.
        mean = torch.sub(student, target, out=out).mul_(p).sum(-1)
        stats.per_token.copy_((mean - log_zp + log_zq) * LN2)
        if grad is not None:
            out.addcmul_(p, mean.neg_().unsqueeze(-1))
    else:
        if floored:
            kl_forward = _dot(q, torch.sub(target, student, out=work), work) - log_zq + log_zp
        _mixture(p, q, target, kl_forward, settings.beta, stats, work, None if grad is None else out)
    if grad is not None and out is not grad:
        grad.copy_(out)


def _mixture(
    p: Tensor,
    q: Tensor,
    spent: Tensor,
    kl_forward: Tensor,
    beta: float,
    stats: RowStats,
    work: Tensor,
    grad: Tensor | None,
) -> None:
    """Divergence to the mixture `m`, and its gradient up to `grad_scale`; overwrites `spent` and `work`."""
    ratio = _log_ratio(p, q, beta, work)
    kl_target = kl_forward - _dot(q, ratio, spent)  # KL(q || m), and below -KL(p || m), plus log2(1 - beta)
    product = torch.mul(ratio, p, out=work if grad is None else grad)
    mean = product.sum(-1)
    mixture = (beta * kl_target - (1 - beta) * mean) * LN2
    stats.per_token.copy_(mixture - math.log(1 - beta))
    if grad is not None:
        grad.addcmul_(p, mean.neg_().unsqueeze(-1))  # p (g - <g>_p); `grad_scale` turns the sign


def _log_ratio(p: Tensor, q: Tensor, beta: float, out: Tensor) -> Tensor:
    """`log2(1 + beta q / ((1 - beta) p))`, which is `log2(m / p) - log2(1 - beta)`."""
    torch.div(q, p, out=out)
    if beta != 0.5:
        out.mul_(beta / (1 - beta))
    return out.add_(1.0).log2_()


def _purify(
    base: Tensor, delta: Tensor, shift: Tensor, settings: LossSettings, stats: RowStats, work: Tensor
) -> Tensor:
    """`base` becomes the purified target's logits, `delta` the clipped tilt; returns the base's log-sum-exp, `[n]`."""
    torch.exp2(base, out=work)  # a log-sum-exp without shift; redone with one where that leaves the range
    lse_base = work.sum(-1).log2_()
    if not bool(lse_base.abs().le(SAFE).all()):
        top = base.amax(-1, keepdim=True)
        lse_base = torch.sub(base, top, out=work).exp2_().sum(-1).log2_().add_(top.squeeze(-1))
    scale = settings.delta_scale
    torch.add(shift * -scale, delta, alpha=scale, out=delta)
    if settings.pmi_clip is not None:
        if stats.clip_saturation is not None:
            torch.abs(delta, out=work)
            stats.clip_saturation.copy_(work.gt_(1.0).mean(-1))
        delta.tanh_()
    base.add_(delta, alpha=settings.tilt_gain)
    return lse_base


def _shift(logits: Tensor) -> tuple[Tensor, Tensor]:
    """
    Subtracts each row's maximum in place where `exp2` could leave its range otherwise.

    Returns what was subtracted and the maximum of what remains, `[n]` each.

    Moderate logits are left alone: the subtraction would round them, and cost more accuracy than all the rest.
    """
    top = logits.amax(-1)
    shift = top.masked_fill(top.abs() <= SAFE, 0.0)
    if bool(shift.any()):
        logits.sub_(shift.unsqueeze(-1))
    return shift, top - shift


def _raise_to_floor(logits: Tensor, top: Tensor) -> bool:
    """Raises logits far below their row's maximum, so that a ratio of probabilities stays finite; True if any was."""
    floor = top - FLOOR
    if bool((logits.amin(-1) >= floor).all()):
        return False
    torch.maximum(logits, floor.unsqueeze(-1), out=logits)
    return True


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Softmax of shifted logits into `out`; returns the log2 of the normalizer, `[n]` fp64."""
    torch.exp2(logits, out=out)
    norm = out.sum(-1, keepdim=True)
    out.mul_(norm.reciprocal())
    return norm.squeeze(-1).double().log2_()


def _dot(a: Tensor, b: Tensor, work: Tensor) -> Tensor:
    torch.mul(a, b, out=work)
    return work.sum(-1)


def _clipped(
    student: Tensor,
    target: Tensor,
    p: Tensor,
    q: Tensor,
    work: Tensor,
    log_zp: Tensor,
    log_zq: Tensor,
    settings: LossSettings,
    stats: RowStats,
    grad: Tensor | None,
) -> None:
    """
    The divergence with every vocabulary entry's contribution bounded by `kl_clip` from above.

    A bounded entry has no derivative of its own, but still feels the normalizer: with `g(v)` the derivative of the
    entry's contribution with respect to `log p(v)`, zero where bounded, the gradient is `g - p sum_v g`.
    """
    assert settings.kl_clip is not None
    beta = settings.beta
    log_p = student.sub_(log_zp.to(student.dtype).unsqueeze(-1))
    log_q = target.sub_(log_zq.to(target.dtype).unsqueeze(-1))
    if beta == 0.0:
        terms, slope = q * (log_q - log_p) * LN2, -q
    elif beta == 1.0:
        gap = log_p - log_q
        terms, slope = p * gap * LN2, p * (gap + LOG2E)
    else:
        log_m = torch.lerp(p, q, beta).clamp_(min=torch.finfo(p.dtype).tiny).log2_()
        slope = p * (log_p - log_m)
        terms = (beta * q * (log_q - log_m) + (1 - beta) * slope) * LN2
    torch.clamp(terms, max=settings.kl_clip, out=work)
    stats.per_token.copy_(work.sum(-1))
    if grad is not None:
        slope.masked_fill_(terms > settings.kl_clip, 0.0)
        slope.addcmul_(p, slope.sum(-1, keepdim=True).neg_())
        grad.copy_(slope)


def sampled_token(
    student: Tensor,  # [n, V] base-2
    target: Tensor,  # [n, V] base-2
    labels: Tensor,  # [n] sampled token ids
    stats: RowStats,  # [n] each; `per_token` is written
    grad: Tensor | None,  # [n, V]
) -> tuple[Tensor, Tensor]:
    """
    The sampled-token loss `-A log p(y)` with `A = log q(y) - log p(y)` held constant.

    Writes the whole gradient, `-A (onehot(y) - p)`. Returns `log p(y)` and `log q(y)`, each `[n]` in nats.
    """
    at = labels.unsqueeze(-1)
    log_q = score(target, labels)
    log_probs = torch.log_softmax(student * LN2, -1)
    log_p = log_probs.gather(-1, at).squeeze(-1)
    advantage = log_q - log_p
    stats.per_token.copy_(-advantage * log_p)
    if grad is not None:
        probs = log_probs.exp_()
        probs.scatter_add_(-1, at, torch.full_like(at, -1, dtype=probs.dtype))
        grad.copy_(probs.mul_(advantage.unsqueeze(-1)))
    return log_p, log_q


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each row's label, `[n]` in nats, of logits `[n, V]` in base 2."""
    at_label = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return at_label * LN2 - torch.logsumexp(logits * LN2, -1)
