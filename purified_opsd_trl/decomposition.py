"""
How much of the teacher's signal is the reference: the statistics of Eq. 4 per token, as the paper reports them.

Shapes: `[..., V]` is any number of leading dimensions and the vocabulary last.
"""

from typing import NamedTuple

import torch

from .kernels import Projector
from .kernels.projection import LOG2E, operand_dtype, project
from .purification import Decomposition, decompose


class DecompositionStats(NamedTuple):
    """
    Cosines and norm ratios of `Delta_total = Delta_ref + Delta_it` over the vocabulary, one value a token.

    The first three weight every vocabulary entry alike, as the paper does; the near-zero tail of the distributions
    dominates them. The `mass_*` three use the inner product `<a, b> = sum_v pi_theta(v) a(v) b(v)`: what the student
    might really say. A cosine with a zero vector, and a ratio to one, are 0.

    Attributes:
        cos_total_ref, mass_cos_total_ref (`torch.Tensor` of shape `[...]`):
            cos(Delta_total, Delta_ref): near 1, the signal is what the reference alone induces.
        cos_total_it, mass_cos_total_it (`torch.Tensor` of shape `[...]`):
            cos(Delta_total, Delta_it).
        norm_ratio_ref, mass_norm_ratio_ref (`torch.Tensor` of shape `[...]`):
            |Delta_ref| / |Delta_total|: above 1, the reference-induced part outweighs the whole signal.
    """

    cos_total_ref: torch.Tensor
    cos_total_it: torch.Tensor
    norm_ratio_ref: torch.Tensor
    mass_cos_total_ref: torch.Tensor
    mass_cos_total_it: torch.Tensor
    mass_norm_ratio_ref: torch.Tensor


STATISTICS = DecompositionStats._fields


def decomposition_stats(
    student: torch.Tensor, teacher: torch.Tensor, reference_only: torch.Tensor
) -> tuple[DecompositionStats, Decomposition]:
    """
    Statistics of the decomposition, and the log-ratios they are taken of.

    Args:
        student (`torch.Tensor` of shape `[..., V]`):
            Student logits, after temperature.
        teacher (`torch.Tensor` of shape `[..., V]`):
            Logits of the privileged teacher (question and reference in context).
        reference_only (`torch.Tensor` of shape `[..., V]`):
            Logits of the reference-only probe (reference in context, no question).

    Returns:
        `tuple`: [`DecompositionStats`] and [`Decomposition`].
    """
    parts = decompose(student, teacher, reference_only)
    plain = _stats(*parts)
    # sqrt(p) on both factors is p on their product
    root = torch.softmax(student.to(parts.total.dtype), dim=-1).sqrt_()
    mass = _stats(*(root * part for part in parts))
    return DecompositionStats(*plain, *mass), parts


def _stats(total: torch.Tensor, ref: torch.Tensor, it: torch.Tensor) -> tuple[torch.Tensor, ...]:
    norm_total, norm_ref, norm_it = (torch.linalg.vector_norm(x, dim=-1) for x in (total, ref, it))
    return (
        _ratio(torch.linalg.vecdot(total, ref), norm_total * norm_ref),
        _ratio(torch.linalg.vecdot(total, it), norm_total * norm_it),
        _ratio(norm_ref, norm_total),
    )


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    positive = denominator > 0
    return torch.where(positive, numerator / denominator.where(positive, torch.ones_like(denominator)), 0.0)


def project_logits(hidden: torch.Tensor, head: Projector) -> torch.Tensor:
    """
    Logits of a few tokens, without a copy of the head in another dtype.

    Args:
        hidden (`torch.Tensor` of shape `[n, H]`):
            Last hidden states.
        head ([`Projector`]):
            Head, gathered, with its temperature.

    Returns:
        `torch.Tensor` of shape `[n, V]`: logits in nats after temperature; fp32 (fp64 for fp64 states).
    """
    operands = hidden.to(operand_dtype(hidden))
    out_dtype = torch.float64 if operands.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.empty(hidden.shape[0], head.weight.shape[0], dtype=out_dtype, device=hidden.device)
        project(operands, head.weight, head.alpha, logits)
        head.finish(logits)
        head.uncapped(logits)
    return logits.div_(LOG2E)
