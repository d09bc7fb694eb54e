"""
Triton twin of `kernels.rows.divergence_rows`: one program per row, at most three passes over it.

| pass | reads | writes | computes |
|---|---|---|---|
| 1 | student, base, delta | target in place of base | the tilt, three online log-sum-exps, entropies, forward KL |
| 2 | student, target | | the mean that the gradient subtracts, the divergence (not for the forward KL) |
| 3 | student, target | gradient | the gradient |

Every lane keeps its own running maximum and sums, so that the loops hold no reduction across lanes; the lanes are
combined once after each pass. Formulae and units are those of `kernels/rows.py`. The module needs Triton; it also runs
on CPU tensors under `TRITON_INTERPRET=1`, which is how its numbers are tested without a GPU.

Shapes: n rows (tokens) of one chunk, V vocabulary entries.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .rows import FLOOR, SAFE, RowStats
from .settings import LossSettings


_BLOCK = 2048  # eleven accumulators a lane have to stay in registers
_LOWEST = tl.constexpr(-1e30)  # of a lane that has seen nothing; finite, so that its difference to itself is 0
_LN2 = tl.constexpr(math.log(2.0))
_LOG2E = tl.constexpr(1.0 / math.log(2.0))


@triton.jit
def _tanh(x):
    # The exponential form loses the small arguments to cancellation; four terms of the series are exact there.
    e = tl.exp2(-2.0 * tl.abs(x) * _LOG2E)
    large = (1.0 - e) / (1.0 + e)
    square = x * x
    small = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, small, tl.where(x < 0, -large, large))


@triton.jit
def _step(top, value, mask):
    # New running maximum of each lane, the factor for its old sums, and the new term of its normaliser
    new = tl.maximum(top, tl.where(mask, value, _LOWEST))
    return new, tl.exp2(top - new), tl.where(mask, tl.exp2(value - new), 0.0)


@triton.jit
def _shift_of(top, SAFE: tl.constexpr):
    return tl.where(tl.abs(top) <= SAFE, 0.0, top)


@triton.jit
def _factor(s, t, shift_p, shift_q, inv_zp, inv_zq, odds, MODE: tl.constexpr):
    # p, q and what the gradient weighs p with: log2(p / q) up to a constant, or log2(1 + beta q / ((1 - beta) p))
    p = tl.exp2(s - shift_p) * inv_zp
    q = tl.exp2(t - shift_q) * inv_zq
    if MODE == 1:
        factor = (s - shift_p) - (t - shift_q)
    else:
        factor = tl.log2(1.0 + odds * (q / p))
    return p, q, factor


@triton.jit
def _bounded(p, q, log_p, log_q, beta, kl_clip, mask, MODE: tl.constexpr):
    # One entry's contribution in nats, bounded from above, and its slope in log p: zero where bounded
    if MODE == 0:
        term = q * (log_q - log_p) * _LN2
        slope = -q
    elif MODE == 1:
        term = p * (log_p - log_q) * _LN2
        slope = p * (log_p - log_q + _LOG2E)
    else:
        log_m = tl.log2(tl.maximum((1.0 - beta) * p + beta * q, 1.1754944e-38))
        slope = p * (log_p - log_m)
        term = (beta * q * (log_q - log_m) + (1.0 - beta) * slope) * _LN2
    slope = tl.where(mask & (term <= kl_clip), slope, 0.0)
    return tl.where(mask, tl.minimum(term, kl_clip), 0.0), slope


@triton.jit
def _divergence_kernel(
    s_ptr,
    t_ptr,
    d_ptr,
    g_ptr,
    shift_ptr,
    per_token_ptr,
    student_entropy_ptr,
    target_entropy_ptr,
    kl_student_ptr,
    kl_base_ptr,
    saturation_ptr,
    s_stride,
    t_stride,
    d_stride,
    g_stride,
    n_cols,
    delta_scale,
    tilt_gain,
    beta,
    kl_clip,
    MODE: tl.constexpr,  # 0 forward KL, 1 reverse KL, 2 generalised JSD
    HAS_DELTA: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_KL_BASE: tl.constexpr,
    HAS_SATURATION: tl.constexpr,
    HAS_KL_CLIP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    SAFE: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    d_row, g_row = d_ptr + row * d_stride, g_ptr + row * g_stride
    lanes = tl.arange(0, BLOCK)
    delta_scale = tl.cast(delta_scale, tl.float32)
    tilt_gain = tl.cast(tilt_gain, tl.float32)
    beta = tl.cast(beta, tl.float32)
    kl_clip = tl.cast(kl_clip, tl.float32)

    zero = tl.zeros([BLOCK], tl.float32)
    top_p, top_q, top_b = zero + _LOWEST, zero + _LOWEST, zero + _LOWEST
    sum_p, sum_q, sum_b = zero, zero, zero
    own_p, own_q, gap_q, tilt_q, saturated = zero, zero, zero, zero, zero
    if HAS_DELTA:
        shift = tl.load(shift_ptr + row) * delta_scale
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        mask = cols < n_cols
        s = tl.load(s_row + cols, mask=mask, other=0.0)
        t = tl.load(t_row + cols, mask=mask, other=0.0)
        if HAS_DELTA:
            top_b, rescale, e = _step(top_b, t, mask)
            sum_b = sum_b * rescale + e
            x = tl.load(d_row + cols, mask=mask, other=0.0) * delta_scale - shift
            if HAS_CLIP:
                if HAS_SATURATION:
                    saturated += tl.where(mask & (tl.abs(x) > 1.0), 1.0, 0.0)
                x = _tanh(x)
            t += x * tilt_gain
            tl.store(t_row + cols, t, mask=mask)
        top_q, rescale, e = _step(top_q, t, mask)
        sum_q = sum_q * rescale + e
        own_q = own_q * rescale + e * t
        gap_q = gap_q * rescale + e * (t - s)
        if HAS_KL_BASE:
            tilt_q = tilt_q * rescale + e * x
        top_p, rescale, e = _step(top_p, s, mask)
        sum_p = sum_p * rescale + e
        own_p = own_p * rescale + e * s

    m_p, m_q = tl.max(top_p, axis=0), tl.max(top_q, axis=0)
    lane_p, lane_q = tl.exp2(top_p - m_p), tl.exp2(top_q - m_q)
    z_p, z_q = tl.sum(sum_p * lane_p, axis=0), tl.sum(sum_q * lane_q, axis=0)
    forward = tl.sum(gap_q * lane_q, axis=0) / z_q - (m_q - m_p) - tl.log2(z_q / z_p)
    tl.store(student_entropy_ptr + row, (m_p - tl.sum(own_p * lane_p, axis=0) / z_p + tl.log2(z_p)) * _LN2)
    tl.store(target_entropy_ptr + row, (m_q - tl.sum(own_q * lane_q, axis=0) / z_q + tl.log2(z_q)) * _LN2)
    tl.store(kl_student_ptr + row, forward * _LN2)
    if HAS_KL_BASE:
        m_b = tl.max(top_b, axis=0)
        z_b = tl.sum(sum_b * tl.exp2(top_b - m_b), axis=0)
        tilt = tl.sum(tilt_q * lane_q, axis=0) / z_q * tilt_gain
        tl.store(kl_base_ptr + row, (tilt - (m_q - m_b) - tl.log2(z_q / z_b)) * _LN2)
    if HAS_SATURATION:
        tl.store(saturation_ptr + row, tl.sum(saturated, axis=0) / n_cols)

    # Moderate rows keep their logits as they are: subtracting the maximum would only round them
    shift_p, shift_q = _shift_of(m_p, SAFE), _shift_of(m_q, SAFE)
    inv_zp, inv_zq = tl.exp2(shift_p - m_p) / z_p, tl.exp2(shift_q - m_q) / z_q
    log_zp, log_zq = m_p - shift_p + tl.log2(z_p), m_q - shift_q + tl.log2(z_q)
    odds = beta / (1.0 - beta) if MODE == 2 else 0.0
    floor = m_p - FLOOR
    mean = 0.0
    if HAS_KL_CLIP:
        total, slopes = zero, zero
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            mask = cols < n_cols
            log_p = tl.load(s_row + cols, mask=mask, other=0.0) - shift_p - log_zp
            log_q = tl.load(t_row + cols, mask=mask, other=0.0) - shift_q - log_zq
            term, slope = _bounded(tl.exp2(log_p), tl.exp2(log_q), log_p, log_q, beta, kl_clip, mask, MODE)
            total += term
            slopes += slope
        mean = tl.sum(slopes, axis=0)
        tl.store(per_token_ptr + row, tl.sum(total, axis=0))
    elif MODE == 0:
        tl.store(per_token_ptr + row, forward * _LN2)
    else:
        mean_p, mean_q, gap_q = zero, zero, zero
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            mask = cols < n_cols
            s = tl.load(s_row + cols, mask=mask, other=0.0)
            t = tl.load(t_row + cols, mask=mask, other=0.0)
            if MODE == 2:
                s = tl.maximum(s, floor)
            p, q, factor = _factor(s, t, shift_p, shift_q, inv_zp, inv_zq, odds, MODE)
            mean_p += tl.where(mask, p * factor, 0.0)
            if MODE == 2:
                mean_q += tl.where(mask, q * factor, 0.0)
                gap_q += tl.where(mask, q * (t - s), 0.0)
        mean = tl.sum(mean_p, axis=0)
        if MODE == 1:
            divergence = (mean - log_zp + log_zq) * _LN2
        else:
            kl_target = tl.sum(gap_q, axis=0) - (m_q - m_p) - tl.log2(z_q / z_p) - tl.sum(mean_q, axis=0)
            divergence = (beta * kl_target - (1.0 - beta) * mean - tl.log2(1.0 - beta)) * _LN2
        tl.store(per_token_ptr + row, divergence)

    if HAS_GRAD:
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            mask = cols < n_cols
            s = tl.load(s_row + cols, mask=mask, other=0.0)
            t = tl.load(t_row + cols, mask=mask, other=0.0)
            if HAS_KL_CLIP:
                log_p, log_q = s - shift_p - log_zp, t - shift_q - log_zq
                p = tl.exp2(log_p)
                _, slope = _bounded(p, tl.exp2(log_q), log_p, log_q, beta, kl_clip, mask, MODE)
                grad = slope - p * mean
            elif MODE == 0:
                grad = tl.exp2(s - shift_p) * inv_zp - tl.exp2(t - shift_q) * inv_zq
            else:
                if MODE == 2:
                    s = tl.maximum(s, floor)
                p, _, factor = _factor(s, t, shift_p, shift_q, inv_zp, inv_zq, odds, MODE)
                grad = p * (factor - mean)
            tl.store(g_row + cols, grad.to(g_ptr.dtype.element_ty), mask=mask)


def divergence_rows(
    student: Tensor,  # [n, V] base-2; overwritten by the gradient
    target: Tensor,  # [n, V] base-2; the base's logits where `delta` is given; overwritten
    delta: Tensor | None,  # [n, V] base-2, teacher minus reference-only
    shift: Tensor | None,  # [n] base-2, what centring subtracts from `delta`
    settings: LossSettings,
    stats: RowStats,  # [n] each, written
    grad: Tensor | None,  # [n, V], where the gradient goes: `student` itself or a tensor of another dtype
) -> None:
    """Divergence, gradient and metrics, row by row; see `kernels.rows.divergence_rows`."""
    n, vocab = student.shape
    if n == 0:
        return
    _divergence_kernel[(n,)](
        student,
        target,
        student if delta is None else delta,
        student if grad is None else grad,
        stats.per_token if shift is None else shift,
        stats.per_token,
        stats.student_entropy,
        stats.target_entropy,
        stats.kl_target_student,
        stats.per_token if stats.kl_target_base is None else stats.kl_target_base,
        stats.per_token if stats.clip_saturation is None else stats.clip_saturation,
        student.stride(0),
        target.stride(0),
        0 if delta is None else delta.stride(0),
        0 if grad is None else grad.stride(0),
        vocab,
        settings.delta_scale,
        settings.tilt_gain,
        settings.beta,
        0.0 if settings.kl_clip is None else settings.kl_clip,
        MODE=0 if settings.beta == 0.0 else 1 if settings.beta == 1.0 else 2,
        HAS_DELTA=delta is not None,
        HAS_CLIP=settings.pmi_clip is not None,
        HAS_KL_BASE=delta is not None and stats.kl_target_base is not None,
        HAS_SATURATION=delta is not None and stats.clip_saturation is not None,
        HAS_KL_CLIP=settings.kl_clip is not None,
        HAS_GRAD=grad is not None,
        SAFE=SAFE,
        FLOOR=FLOOR,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
        num_warps=8,
    )
