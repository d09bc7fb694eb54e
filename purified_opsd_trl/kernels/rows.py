"""
Row transforms of one chunk in torch: from logits to the divergence, its gradient and the metrics.

Every function here works row by row on fp32 (or fp64) logits in **bits**, that is natural logits times `log2(e)`: the
factor is free inside the projection that produces them, and `exp2` is cheaper than `exp` on CPUs and GPUs alike. All
results are in nats. `kernels/triton_rows.py` holds the Triton twin of `divergence_rows`, with the same signature.

Shapes: n rows (tokens) of one chunk, V vocabulary entries.

With `p` the student, `q` the target and `m = (1 - beta) p + beta q`, writing `<x>_p = sum_v p(v) x(v)`:

| `beta` | divergence | gradient with respect to the student's logits |
|---|---|---|
| 0 | `KL(q || p)`, forward | `p - q` |
| 1 | `KL(p || q)`, reverse | `p (a - <a>_p)`, `a = log p - log q` |
| else | `beta KL(q || m) + (1 - beta) KL(p || m)` | `(1 - beta) p (a - <a>_p)`, `a = log p - log m` |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


LN2 = math.log(2.0)
LOG2E = 1.0 / LN2

# Elements of one block of rows: three scratch blocks and the logits they are made from stay in a core's cache.
_CPU_BLOCK = 1 << 18


@dataclass(frozen=True)
class RowSettings:
    """
    What the row transforms need to know besides the logits.

    Args:
        beta (`float`): interpolation of the divergence, TRL's convention (see the table above).
        pmi_beta (`float`): temperature of the reward, `target = base + clipped / pmi_beta`.
        pmi_clip (`float`, *optional*): bound `c` of the soft clip `c tanh(x / c)`, in nats.
        kl_clip (`float`, *optional*): upper bound of one vocabulary entry's contribution, in nats.
    """

    beta: float
    pmi_beta: float = 1.0
    pmi_clip: float | None = None
    kl_clip: float | None = None

    @property
    def delta_scale(self) -> float:
        """Factor from the difference of logits in bits to the argument of the clip, or to nats without a clip."""
        return LN2 if self.pmi_clip is None else LN2 / self.pmi_clip

    @property
    def tilt_gain(self) -> float:
        """Factor from the clipped argument to bits added to the base logits."""
        return (1.0 if self.pmi_clip is None else self.pmi_clip) * LOG2E / self.pmi_beta

    @property
    def grad_scale(self) -> float:
        """Factor that the written gradient still lacks; the caller multiplies it into its matrix product."""
        if self.beta == 0.0:
            return 1.0
        return LN2 if self.beta == 1.0 else LN2 * (1.0 - self.beta)


@dataclass(frozen=True)
class RowStats:
    """Per-token results, each `[N]` fp32; a field that does not apply stays `None`."""

    per_token: Tensor
    student_entropy: Tensor
    target_entropy: Tensor
    kl_target_student: Tensor
    kl_target_base: Tensor | None = None
    clip_saturation: Tensor | None = None

    def rows(self, start: int, end: int) -> RowStats:
        """Views of the rows `start` to `end`."""
        return RowStats(**{name: None if x is None else x[start:end] for name, x in vars(self).items()})


def divergence_rows(
    student: Tensor,  # [n, V] bits; overwritten by the gradient
    target: Tensor,  # [n, V] bits; the base's logits where `delta` is given; overwritten
    delta: Tensor | None,  # [n, V] bits, teacher minus reference-only; overwritten
    shift: Tensor | None,  # [n] bits, what centring subtracts from `delta`
    settings: RowSettings,
    stats: RowStats,  # [n] each, written
    grad: Tensor | None,  # [n, V], where the gradient goes: `student` itself or a tensor of another dtype
) -> None:
    """
    Divergence between student and target, its gradient and the metrics, row by row.

    With `delta`, the target is `softmax(base + c tanh((delta - shift) / c) / pmi_beta)` (Eq. 5-8, 13-17); without, the
    softmax of `target`. The gradient of the divergence with respect to the student's natural logits is
    `settings.grad_scale` times what is written.
    """
    n, vocab = student.shape
    block = max(1, _CPU_BLOCK // vocab) if student.device.type == "cpu" else n
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
        )


def _divergence_block(
    student: Tensor,
    target: Tensor,
    delta: Tensor | None,
    shift: Tensor | None,
    settings: RowSettings,
    stats: RowStats,
    grad: Tensor | None,
    scratch: Tensor,
) -> None:
    p, q, work = scratch.unbind(0)
    lse_base = None
    if delta is not None and shift is not None:
        lse_base = _purify(target, delta, shift, settings, stats, work)
    log_zp, _ = _softmax(student, p)
    log_zq, max_q = _softmax(target, q)

    cross = _dot(q, student, work)
    own = _dot(q, target, work)
    kl_forward = (own - cross - log_zq + log_zp).mul_(LN2)
    stats.student_entropy.copy_((log_zp - _dot(p, student, work)) * LN2)
    stats.target_entropy.copy_((log_zq - own) * LN2)
    stats.kl_target_student.copy_(kl_forward)
    if delta is not None and lse_base is not None and stats.kl_target_base is not None:
        tilt = _dot(q, delta, work).mul_(settings.tilt_gain)
        stats.kl_target_base.copy_((tilt - log_zq - max_q + lse_base) * LN2)

    out = work if grad is None or grad.dtype != work.dtype else grad
    if settings.kl_clip is not None:
        _clipped(student, target, p, q, work, log_zp, log_zq, settings, stats, grad)
        return
    if settings.beta == 0.0:
        stats.per_token.copy_(kl_forward)
        if grad is not None:
            torch.sub(p, q, out=out)
    else:
        if settings.beta == 1.0:
            reference, part = target, log_zq
        else:
            torch.lerp(p, q, settings.beta, out=work)
            # Both vanish only where neither contributes; the bound keeps 0 * log 0 finite.
            reference = work.clamp_(min=torch.finfo(work.dtype).tiny).log2_()
            part = _dot(q, target.sub_(reference), target) - log_zq
        # A constant of a row cancels in `a - <a>_p`, so the normalisers enter the divergence only.
        mean = torch.sub(student, reference, out=out).mul_(p).sum(-1)
        if settings.beta == 1.0:
            stats.per_token.copy_((mean - log_zp + part) * LN2)
        else:
            stats.per_token.copy_((settings.beta * part + (1 - settings.beta) * (mean - log_zp)) * LN2)
        if grad is not None:
            out.addcmul_(p, mean.neg_().unsqueeze(-1))
    if grad is not None and out is not grad:
        grad.copy_(out)


def _purify(
    base: Tensor, delta: Tensor, shift: Tensor, settings: RowSettings, stats: RowStats, work: Tensor
) -> Tensor:
    """`base` becomes the purified target's logits, `delta` the clipped tilt; returns the base's log-sum-exp, `[n]`."""
    top = base.amax(-1, keepdim=True)
    torch.sub(base, top, out=work)
    lse_base = work.exp2_().sum(-1).log2_().add_(top.squeeze(-1))
    scale = settings.delta_scale
    torch.add(shift * -scale, delta, alpha=scale, out=delta)
    if settings.pmi_clip is not None:
        if stats.clip_saturation is not None:
            torch.abs(delta, out=work)
            stats.clip_saturation.copy_(work.gt_(1.0).mean(-1))
        delta.tanh_()
    base.add_(delta, alpha=settings.tilt_gain)
    return lse_base


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """`logits` less their maximum in place, their softmax into `out`; returns log2 of the normaliser and the maximum."""
    top = logits.amax(-1, keepdim=True)
    logits.sub_(top)
    torch.exp2(logits, out=out)
    norm = out.sum(-1, keepdim=True)
    out.mul_(norm.reciprocal())
    return norm.squeeze(-1).log2_(), top.squeeze(-1)


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
    settings: RowSettings,
    stats: RowStats,
    grad: Tensor | None,
) -> None:
    """
    The divergence with every vocabulary entry's contribution bounded by `kl_clip` from above.

    A bounded entry has no derivative of its own, but still feels the normaliser: with `g(v)` the derivative of the
    entry's contribution with respect to `log p(v)`, zero where bounded, the gradient is `g - p sum_v g`.
    """
    assert settings.kl_clip is not None
    beta = settings.beta
    log_p = student.sub_(log_zp.unsqueeze(-1))
    log_q = target.sub_(log_zq.unsqueeze(-1))
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


def sampled_rows(
    student: Tensor,  # [n, V] bits; overwritten
    target: Tensor,  # [n, V] bits; the base's logits where `delta` is given; overwritten
    delta: Tensor | None,  # [n, V] bits; overwritten
    shift: Tensor | None,  # [n] bits
    labels: Tensor,  # [n] sampled token ids
    settings: RowSettings,
    stats: RowStats,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """
    The sampled-token loss `-A log p(y)` with `A = log q(y) - log p(y)` held constant, and the same metrics.

    Writes the whole gradient, `-A (onehot(y) - p)`. Returns `log p(y)` and `log q(y)`, each `[n]` in nats.
    """
    scores = [torch.empty_like(stats.per_token) for _ in range(2)]
    at = labels.unsqueeze(-1)
    kl_only = RowSettings(0.0, settings.pmi_beta, settings.pmi_clip)
    # The forward-KL transform leaves the shifted logits in place, from which both scores can be read.
    divergence_rows(student, target, delta, shift, kl_only, stats, None)
    for score, logits in zip(scores, (student, target), strict=True):
        score.copy_((logits.gather(-1, at).squeeze(-1) - logits.exp2().sum(-1).log2_()) * LN2)
    log_p, log_q = scores
    advantage = log_q - log_p
    stats.per_token.copy_(-advantage * log_p)
    if grad is not None:
        probs = torch.softmax(student * LN2, -1)
        probs.scatter_add_(-1, at, torch.full_like(at, -1, dtype=probs.dtype))
        grad.copy_(probs.mul_(advantage.to(probs.dtype).unsqueeze(-1)))
    return log_p, log_q
