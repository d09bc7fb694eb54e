"""
Triton twin of `kernels.rows.divergence_rows`: one program per row, at most three passes over it.

| pass | reads | writes | computes |
|---|---|---|---|
| 1 | student, base, delta | target in place of base | the tilt, three online log-sum-exps, entropies, forward KL |
| 2 | student, target | | the mean that the gradient subtracts, the divergence (not for the forward KL) |
| 3 | student, target | gradient | the gradient |

Every lane takes four entries per step and keeps one running maximum and one sum of each kind, so that the loops hold
no reduction across threads; the lanes are combined once after each pass. Formulas and units are those of
`kernels/rows.py`. The module needs Triton. It also runs on CPU tensors under `TRITON_INTERPRET=1`, which is how its
numbers are tested without a GPU; `tests/test_triton_compile.py` compiles every variant and bounds its registers.

Shapes: n rows (tokens) of one chunk, V vocabulary entries.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import FLOOR, SAFE, RowStats
from .rows import divergence_rows as torch_divergence_rows
from .settings import LossSettings


# Entries of a row per step, and the threads that share them: four entries per thread, one load of 16 bytes. With at
# most 64 registers per thread, two or more blocks are resident on a multiprocessor of 65,536.
_BLOCK = 2048
_THREADS = 512
_LOWEST = tl.constexpr(-1e29)  # of a lane that has seen nothing; finite, so that its difference to itself is 0
_ABSENT = tl.constexpr(-1e30)  # a logit past the end of its row: a probability of 0 in every lane
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
def _step(top, value):
    # New running maximum of each lane, the factor for its old sums, and the new terms of its normalizer
    new = tl.maximum(top, tl.max(value, axis=1))
    return new, tl.exp2(top - new), tl.exp2(value - new[:, None])


@triton.jit
def _shift_of(top, SAFE: tl.constexpr):
    return tl.where(tl.abs(top) <= SAFE, 0.0, top)


@triton.jit
def _factor(log_p, log_q, whole, odds, MODE: tl.constexpr):
    # What the gradient weighs p with: log2(p / q) up to a constant, or log2(1 + beta q / ((1 - beta) p)). The ratio is
    # one power of the difference of logits, where q / p would take two and a division.
    if MODE == 1:
        return log_p - log_q
    return tl.log2(1.0 + odds * tl.exp2(log_q - log_p + whole))


@triton.jit
def _bounded(log_p, log_q, beta, kl_clip, MODE: tl.constexpr):
    # p, one entry's contribution in nats, bounded from above, and its slope in log p: zero where bounded
    p, q = tl.exp2(log_p), tl.exp2(log_q)
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
    return p, tl.minimum(term, kl_clip), tl.where(term <= kl_clip, slope, 0.0)


# Views of statistics start anywhere, and one entry per row gains nothing from alignment: no kernel of their own
@triton.jit(
    do_not_specialize_on_alignment=[
        "shift_ptr",
        "per_token_ptr",
        "student_entropy_ptr",
        "target_entropy_ptr",
        "kl_student_ptr",
        "kl_base_ptr",
        "saturation_ptr",
        "unused_ptr",
    ]
)
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
    unused_ptr,
    s_stride,
    t_stride,
    d_stride,
    g_stride,
    n_cols,
    delta_scale,
    tilt_gain,
    beta,
    kl_clip,
    n_used,
    MODE: tl.constexpr,  # 0 forward KL, 1 reverse KL, 2 generalized JSD
    HAS_DELTA: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_KL_BASE: tl.constexpr,
    HAS_SATURATION: tl.constexpr,
    HAS_UNUSED: tl.constexpr,
    HAS_KL_CLIP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    SAFE: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    d_row, g_row = d_ptr + row * d_stride, g_ptr + row * g_stride
    # A lane's four entries belong to one thread: neighbors where one load takes them all, else a quarter block apart
    lane, entry = tl.arange(0, BLOCK // 4)[:, None], tl.arange(0, 4)[None, :]
    lanes = 4 * lane + entry if ALIGNED else lane + BLOCK // 4 * entry
    delta_scale = tl.cast(delta_scale, tl.float32)
    tilt_gain = tl.cast(tilt_gain, tl.float32)
    beta = tl.cast(beta, tl.float32)
    kl_clip = tl.cast(kl_clip, tl.float32)
    n_used = tl.cast(n_used, tl.int32)

    zero = tl.zeros([BLOCK // 4], tl.float32)
    top_p, top_q, top_b = zero + _LOWEST, zero + _LOWEST, zero + _LOWEST
    sum_p, sum_q, sum_b = zero, zero, zero
    own_p, own_q, gap_q, tilt_q, saturated = zero, zero, zero, zero, zero
    if HAS_DELTA:
        shift = tl.load(shift_ptr + row) * delta_scale
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        mask = cols < n_cols
        s = tl.load(s_row + cols, mask=mask, other=_ABSENT)
        t = tl.load(t_row + cols, mask=mask, other=_ABSENT)
        if HAS_DELTA:
            top_b, rescale, e = _step(top_b, t)
            sum_b = sum_b * rescale + tl.sum(e, axis=1)
            x = tl.load(d_row + cols, mask=mask, other=0.0) * delta_scale - shift
            if HAS_CLIP:
                if HAS_SATURATION:
                    saturated += tl.sum(tl.where(mask & (tl.abs(x) > 1.0), 1.0, 0.0), axis=1)
                x = _tanh(x)
            t += x * tilt_gain
            tl.store(t_row + cols, t, mask=mask)
        top_q, rescale, e = _step(top_q, t)
        sum_q = sum_q * rescale + tl.sum(e, axis=1)
        own_q = own_q * rescale + tl.sum(e * t, axis=1)
        gap_q = gap_q * rescale + tl.sum(e * (t - s), axis=1)
        if HAS_KL_BASE:
            tilt_q = tilt_q * rescale + tl.sum(e * x, axis=1)
        top_p, rescale, e = _step(top_p, s)
        sum_p = sum_p * rescale + tl.sum(e, axis=1)
        own_p = own_p * rescale + tl.sum(e * s, axis=1)

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
    if HAS_UNUSED:
        # Blocks start where those of pass 1 do, so that each thread reads what it has written itself
        unused = zero
        for start in range(n_used // BLOCK * BLOCK, n_cols, BLOCK):
            cols = start + lanes
            t = tl.load(t_row + cols, mask=cols < n_cols, other=_ABSENT)
            unused += tl.sum(tl.where(cols < n_used, 0.0, tl.exp2(t - m_q)), axis=1)
        tl.store(unused_ptr + row, tl.sum(unused, axis=0) / z_q)

    # Moderate rows keep their logits as they are: subtracting the maximum would only round them
    shift_p, shift_q = _shift_of(m_p, SAFE), _shift_of(m_q, SAFE)
    inv_zp, inv_zq = tl.exp2(shift_p - m_p) / z_p, tl.exp2(shift_q - m_q) / z_q
    log_zp, log_zq = m_p - shift_p + tl.log2(z_p), m_q - shift_q + tl.log2(z_q)
    floor = m_p - shift_p - FLOOR
    # log2(q / p) of equal logits. In the ratio, its integer part goes exactly into the exponent, the rest into odds
    between = (m_p - shift_p) - (m_q - shift_q)
    norms = between + tl.log2(z_p / z_q)
    whole = tl.floor(between + 0.5)
    odds = beta / (1.0 - beta) * tl.exp2(between - whole) * (z_p / z_q) if MODE == 2 else 0.0
    mean = 0.0
    if HAS_KL_CLIP:
        total, slopes = zero, zero
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            mask = cols < n_cols
            log_p = tl.load(s_row + cols, mask=mask, other=_ABSENT) - shift_p - log_zp
            log_q = tl.load(t_row + cols, mask=mask, other=_ABSENT) - shift_q - log_zq
            _, term, slope = _bounded(log_p, log_q, beta, kl_clip, MODE)
            total += tl.sum(term, axis=1)
            slopes += tl.sum(slope, axis=1)
        mean = tl.sum(slopes, axis=0)
        tl.store(per_token_ptr + row, tl.sum(total, axis=0))
    elif MODE == 0:
        tl.store(per_token_ptr + row, forward * _LN2)
    else:
        mean_p, mean_q, gap_q = zero, zero, zero
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            mask = cols < n_cols
            s = tl.load(s_row + cols, mask=mask, other=_ABSENT) - shift_p
            t = tl.load(t_row + cols, mask=mask, other=_ABSENT) - shift_q
            p = tl.exp2(s)
            if MODE == 2:
                s = tl.maximum(s, floor)
                q = tl.exp2(t)
                gap_q += tl.sum(q * (t - s), axis=1)
            factor = _factor(s, t, whole, odds, MODE)
            mean_p += tl.sum(p * factor, axis=1)
            if MODE == 2:
                mean_q += tl.sum(q * factor, axis=1)
        mean = tl.sum(mean_p, axis=0) * inv_zp
        if MODE == 1:
            divergence = (mean - norms) * _LN2
        else:
            kl_target = (tl.sum(gap_q, axis=0) - tl.sum(mean_q, axis=0)) * inv_zq + norms
            divergence = (beta * kl_target - (1.0 - beta) * mean - tl.log2(1.0 - beta)) * _LN2
        tl.store(per_token_ptr + row, divergence)

    if HAS_GRAD:
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            mask = cols < n_cols
            s = tl.load(s_row + cols, mask=mask, other=_ABSENT) - shift_p
            t = tl.load(t_row + cols, mask=mask, other=_ABSENT) - shift_q
            if HAS_KL_CLIP:
                p, _, slope = _bounded(s - log_zp, t - log_zq, beta, kl_clip, MODE)
                grad = slope - p * mean
            elif MODE == 0:
                grad = tl.exp2(s) * inv_zp - tl.exp2(t) * inv_zq
            else:
                p = tl.exp2(s) * inv_zp
                if MODE == 2:
                    s = tl.maximum(s, floor)
                grad = p * (_factor(s, t, whole, odds, MODE) - mean)
            tl.store(g_row + cols, grad.to(g_ptr.dtype.element_ty), mask=mask)


def launch(
    student: Tensor,  # [n, V] base-2; overwritten by the gradient
    target: Tensor,  # [n, V] base-2; the base's logits where `delta` is given; overwritten
    delta: Tensor | None,  # [n, V] base-2, teacher minus reference-only
    shift: Tensor | None,  # [n] base-2, what centering subtracts from `delta`
    settings: LossSettings,
    stats: RowStats,  # [n] each, written
    grad: Tensor | None,  # [n, V], where the gradient goes: `student` itself or a tensor of another dtype
    used: int | None = None,  # ids that the tokenizer has; the rest of the vocabulary is unused
) -> tuple[list[Tensor | int | float], dict[str, Any]]:
    """Arguments of the kernel for one chunk, and its compile-time constants and options."""
    vocab = student.shape[1]
    strides = [0 if x is None else x.stride(0) for x in (student, target, delta, grad)]
    pointers = [
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
        stats.per_token if stats.unused_vocab_mass is None else stats.unused_vocab_mass,
    ]
    # An integer would be compiled into a kernel of its own
    kl_clip = 0.0 if settings.kl_clip is None else settings.kl_clip
    used = vocab if used is None else used
    scalars = [float(x) for x in (settings.delta_scale, settings.tilt_gain, settings.beta, kl_clip, used)]
    options = {
        "MODE": 0 if settings.beta == 0.0 else 1 if settings.beta == 1.0 else 2,
        "HAS_DELTA": delta is not None,
        "HAS_CLIP": delta is not None and settings.pmi_clip is not None,
        "HAS_KL_BASE": delta is not None and stats.kl_target_base is not None,
        "HAS_SATURATION": delta is not None and stats.clip_saturation is not None,
        "HAS_UNUSED": stats.unused_vocab_mass is not None,
        "HAS_KL_CLIP": settings.kl_clip is not None,
        "HAS_GRAD": grad is not None,
        "ALIGNED": all(x % 16 == 0 for x in (vocab, *strides)),
        "SAFE": SAFE,
        "FLOOR": FLOOR,
        "BLOCK": _BLOCK,
        "num_warps": _THREADS // (32 if torch.version.hip is None else 64),
    }
    return [*pointers, *strides, vocab, *scalars], options


def divergence_rows(
    student: Tensor,
    target: Tensor,
    delta: Tensor | None,
    shift: Tensor | None,
    settings: LossSettings,
    stats: RowStats,
    grad: Tensor | None,
    used: int | None = None,
) -> None:
    """Divergence, gradient and metrics, row by row; see `launch` for the shapes and `kernels.rows.divergence_rows`."""
    if student.dtype == torch.float64:  # the kernel accumulates in fp32
        torch_divergence_rows(student, target, delta, shift, settings, stats, grad, used)
    elif len(student):
        arguments, options = launch(student, target, delta, shift, settings, stats, grad, used)
        _divergence_kernel[(len(student),)](*arguments, **options)
