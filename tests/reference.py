"""
The oracle: every quantity of the method in fp64, dense, written from its definition.

Nothing here is fast, chunked or rearranged, and nothing is imported from the package: a test that compares the package
with this file compares two derivations. All four distributions are formed by a softmax of their own, although the
package gets away with fewer.

Shapes: N tokens (or any leading dimensions `...`), V vocabulary entries, H hidden units.
Units: log-probabilities, divergences and entropies are in nats.

Symbols of arXiv 2607.02234: student `pi_theta`, teacher `pi_T`, reference-only probe `pi_ref`, base `P_0`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """
    A language-model head: `softcap * tanh(z / softcap)` with `z = (h W^T + b) * scale`, or `z` itself without a cap.

    Args:
        weight (`torch.Tensor`): `[V, H]`.
        bias (`torch.Tensor`, *optional*): `[V]`.
        scale (`float`, *optional*, defaults to `1.0`): multiplier of the logits.
        softcap (`float`, *optional*): final softcapping.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """fp64 logits `[..., V]` of hidden states `[..., H]`; the sampling temperature divides the finished logits."""
        z = hidden.double() @ self.weight.double().T
        if self.bias is not None:
            z = z + self.bias.double()
        z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / temperature


@dataclass(frozen=True)
class Result:
    """Everything `evaluate` computes; gradients are `None` where there was nothing to differentiate."""

    loss: Tensor  # scalar, sum_n weights[n] * per_token[n]
    per_token: Tensor  # [N] divergence, or the token loss of `sampled_token`
    student_entropy: Tensor  # [N] nats
    target_entropy: Tensor  # [N] nats
    kl_target_student: Tensor  # [N] KL(target || student)
    kl_target_base: Tensor | None  # [N] KL(target || base)
    clip_saturation: Tensor | None  # [N] share of the vocabulary with |centered Delta_it| > c
    unused_vocab_mass: Tensor | None = None  # [N] the target's probability of the ids from `used_vocab` on
    advantage: Tensor | None = None  # [N] log P_target(y) - log pi_theta(y)
    advantage_total: Tensor | None = None  # [N] log pi_T(y) - log pi_theta(y)
    advantage_ref: Tensor | None = None  # [N] log pi_ref(y) - log pi_theta(y)
    advantage_it: Tensor | None = None  # [N] log pi_T(y) - log pi_ref(y)
    grad_logits: Tensor | None = None  # [N, V] of the student
    grad_hidden: Tensor | None = None  # [N, H] of the student
    grad_weight: Tensor | None = None  # [V, H] of the student's head
    grad_bias: Tensor | None = None  # [V] of the student's head


@dataclass(frozen=True)
class Decomposition:
    """
    Eq. 4, `Delta_total = Delta_ref + Delta_it`, and its summary over the vocabulary.

    `mass_*` are the same statistics under the inner product weighted by the student's probabilities,
    `<a, b> = sum_v pi_theta(v) a(v) b(v)`. A cosine with a zero vector, and a ratio to a zero vector, are 0.
    """

    total: Tensor  # [..., V] log pi_T - log pi_theta
    ref: Tensor  # [..., V] log pi_ref - log pi_theta
    it: Tensor  # [..., V] log pi_T - log pi_ref
    cos_total_ref: Tensor  # [...]
    cos_total_it: Tensor  # [...]
    norm_ratio_ref: Tensor  # [...] |Delta_ref| / |Delta_total|
    mass_cos_total_ref: Tensor  # [...]
    mass_cos_total_it: Tensor  # [...]
    mass_norm_ratio_ref: Tensor  # [...]
    norm_total: Tensor  # [...]
    norm_ref: Tensor  # [...]
    mass_norm_total: Tensor  # [...]
    mass_norm_ref: Tensor  # [...]


def log_probs(logits: Tensor) -> Tensor:
    """`log softmax` over the vocabulary, `[..., V]`, fp64."""
    logits = logits.double()
    return logits - torch.logsumexp(logits, dim=-1, keepdim=True)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p || q)`, the expectation under `p`, `[...]`. An entry with `p = 0` adds nothing."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats, `[...]`."""
    return -(log_p.exp() * log_p).sum(-1)


def centred_delta_it(teacher: Tensor, reference_only: Tensor, pmi_center: bool = True) -> Tensor:
    """`Delta_it = log pi_T - log pi_ref` of two logit tensors, `[..., V]`; centred: less its vocabulary mean."""
    delta = log_probs(teacher) - log_probs(reference_only)
    if pmi_center:
        delta = delta - delta.mean(-1, keepdim=True)
    return delta


def purified_target(
    teacher: Tensor,
    reference_only: Tensor,
    base: Tensor,
    *,
    pmi_beta: float = 1.0,
    pmi_clip: float | None = 10.0,
    pmi_center: bool = True,
) -> Tensor:
    """
    Log-probabilities `[..., V]` of `P_target = softmax(log P_0 + clipped / pmi_beta)` (Eq. 5-8, 13-17).

    `clipped = c tanh(centred / c)`; without a clip it is `centred` itself.
    """
    delta = centred_delta_it(teacher, reference_only, pmi_center)
    if pmi_clip is not None:
        delta = pmi_clip * torch.tanh(delta / pmi_clip)
    return log_probs(log_probs(base) + delta / pmi_beta)


def interpolated_target(base: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """Log-probabilities `[..., V]` of `softmax((1 - w) log P_0 + w log pi_T)`."""
    return log_probs((1 - weight) * log_probs(base) + weight * log_probs(teacher))


def gated_target(
    base: Tensor, teacher: Tensor, reference_only: Tensor, pmi_beta: float, pmi_clip: float | None
) -> Tensor:
    """Log-probabilities `[..., V]` of the purified target whose centered log-ratio is scaled by `1 - max pi_ref`."""
    log_ref = log_probs(reference_only)
    ratio = log_probs(teacher) - log_ref
    ratio = (1 - log_ref.max(dim=-1, keepdim=True).values.exp()) * (ratio - ratio.mean(dim=-1, keepdim=True))
    if pmi_clip is not None:
        ratio = pmi_clip * (ratio / pmi_clip).tanh()
    return log_probs(log_probs(base) + ratio / pmi_beta)


def contrastive_target(
    correct: Tensor, wrong: Tensor, alpha: float, floor: float, tau: float
) -> tuple[Tensor, Tensor]:
    """
    Log-probabilities `[..., V]` of `softmax((1 + alpha) log p_c - alpha max(log p_w, floor))`, and the weight `[...]`
    of each token, `KL(p_c || p_w) / (KL(p_c || p_w) + tau)`.
    """
    log_c, log_w = log_probs(correct), log_probs(wrong)
    distance = kl(log_c, log_w)
    bounded = torch.where(log_w < floor, torch.full_like(log_w, floor), log_w)
    return log_probs((1 + alpha) * log_c - alpha * bounded), distance / (distance + tau)


def clip_saturation(
    teacher: Tensor, reference_only: Tensor, pmi_clip: float | None, pmi_center: bool = True
) -> Tensor | None:
    """Share of the vocabulary, `[...]` in [0, 1], on which `|centred Delta_it|` lies above the clip."""
    if pmi_clip is None:
        return None
    return (centred_delta_it(teacher, reference_only, pmi_center).abs() > pmi_clip).double().mean(-1)


def divergence_terms(student_log_p: Tensor, target_log_p: Tensor, beta: float) -> Tensor:
    """
    What each vocabulary entry contributes to the divergence, `[..., V]`; entries may be negative, their sum is not.

    TRL's convention for `beta`: 0 is the forward `KL(target || student)`, 1 the reverse `KL(student || target)`, and
    between them `beta KL(target || m) + (1 - beta) KL(student || m)` with `m = (1 - beta) student + beta target`.
    """
    student_p, target_p = student_log_p.exp(), target_log_p.exp()
    if beta == 0:
        return target_p * (target_log_p - student_log_p)
    if beta == 1:
        return student_p * (student_log_p - target_log_p)
    mixture_log_p = torch.logaddexp(student_log_p + math.log(1 - beta), target_log_p + math.log(beta))
    return beta * target_p * (target_log_p - mixture_log_p) + (1 - beta) * student_p * (student_log_p - mixture_log_p)


def divergence(student_log_p: Tensor, target_log_p: Tensor, beta: float, kl_clip: float | None = None) -> Tensor:
    """
    Divergence per token, `[...]`, of two log-probability tensors `[..., V]`.

    `kl_clip` bounds the contribution of each vocabulary entry from above before the sum: `sum_v min(term(v), kl_clip)`
    with the terms of `divergence_terms` (for `0 < beta < 1` the two weighted halves are added first, then bounded). A
    bounded entry has no gradient of its own. The result can be negative, since negative terms are left alone.
    """
    terms = divergence_terms(student_log_p, target_log_p, beta)
    if kl_clip is not None:
        terms = terms.clamp(max=kl_clip)
    return terms.sum(-1)


def decompose(student: Tensor, teacher: Tensor, reference_only: Tensor) -> Decomposition:
    """Decomposition of three logit tensors `[..., V]` (Eq. 4) with cosines and norm ratios over the vocabulary."""
    log_s, log_t, log_r = log_probs(student), log_probs(teacher), log_probs(reference_only)
    total, ref, it = log_t - log_s, log_r - log_s, log_t - log_r
    one, mass = torch.ones_like(log_s), log_s.exp()
    return Decomposition(
        total=total,
        ref=ref,
        it=it,
        cos_total_ref=_cosine(total, ref, one),
        cos_total_it=_cosine(total, it, one),
        norm_ratio_ref=_norm_ratio(ref, total, one),
        mass_cos_total_ref=_cosine(total, ref, mass),
        mass_cos_total_it=_cosine(total, it, mass),
        mass_norm_ratio_ref=_norm_ratio(ref, total, mass),
        norm_total=_norm(total, one),
        norm_ref=_norm(ref, one),
        mass_norm_total=_norm(total, mass),
        mass_norm_ref=_norm(ref, mass),
    )


def _norm(a: Tensor, weight: Tensor) -> Tensor:
    return (weight * a * a).sum(-1).sqrt()


def _cosine(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    norms = _norm(a, weight) * _norm(b, weight)
    inner = (weight * a * b).sum(-1)
    return torch.where(norms > 0, inner / norms.where(norms > 0, torch.ones_like(norms)), torch.zeros_like(norms))


def _norm_ratio(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    norm = _norm(b, weight)
    safe = norm.where(norm > 0, torch.ones_like(norm))
    return torch.where(norm > 0, _norm(a, weight) / safe, torch.zeros_like(norm))


def objective(
    student: Tensor,
    base: Tensor | None,
    teacher: Tensor,
    reference_only: Tensor | None,
    weights: Tensor,
    *,
    target: str = "purified",
    loss_type: str = "divergence",
    beta: float = 0.5,
    pmi_beta: float = 1.0,
    pmi_clip: float | None = 10.0,
    pmi_center: bool = True,
    kl_clip: float | None = None,
    labels: Tensor | None = None,
    used_vocab: int | None = None,
) -> Result:
    """
    Loss and metrics from four logit tensors; whatever requires grad stays attached to the graph.

    Args:
        student, base, teacher, reference_only (`torch.Tensor`): logits `[N, V]`, already divided by the temperature.
            With `target="teacher"`, `base` and `reference_only` may be `None`.
        weights (`torch.Tensor`): `[N]`; the loss is `sum_n weights[n] * per_token[n]`.
        target (`str`, *optional*, defaults to `"purified"`): or `"teacher"`, plain self-distillation.
        loss_type (`str`, *optional*, defaults to `"divergence"`): or `"sampled_token"`, which needs `labels` `[N]`:
            with `A = log P_target(y) - log pi_theta(y)` held constant, `per_token = -A log pi_theta(y)`.
        beta, pmi_beta, pmi_clip, pmi_center, kl_clip: see `divergence` and `purified_target`.
    """
    log_student = log_probs(student)
    saturation = None
    if target == "purified":
        log_target = purified_target(
            teacher, reference_only, base, pmi_beta=pmi_beta, pmi_clip=pmi_clip, pmi_center=pmi_center
        )
        saturation = clip_saturation(teacher, reference_only, pmi_clip, pmi_center)
    elif target == "teacher":
        log_target = log_probs(teacher)
    else:
        raise ValueError(f"target={target!r}")

    advantages: dict[str, Tensor] = {}
    if loss_type == "divergence":
        per_token = divergence(log_student, log_target, beta, kl_clip)
    elif loss_type == "sampled_token":
        advantages = sampled_token_advantages(student, teacher, reference_only, log_target, labels)
        per_token = -advantages["advantage"].detach() * _at(log_student, labels)
    else:
        raise ValueError(f"loss_type={loss_type!r}")

    return Result(
        loss=(weights.double() * per_token).sum(),
        per_token=per_token,
        student_entropy=entropy(log_student),
        target_entropy=entropy(log_target),
        kl_target_student=kl(log_target, log_student),
        kl_target_base=None if base is None else kl(log_target, log_probs(base)),
        clip_saturation=saturation,
        unused_vocab_mass=None if used_vocab is None else log_target.exp()[:, used_vocab:].sum(-1),
        **advantages,
    )


def evaluate(
    student: Tensor,
    base: Tensor | None,
    teacher: Tensor,
    reference_only: Tensor | None,
    weights: Tensor,
    **settings: Any,
) -> Result:
    """`objective`, detached, with the gradient of the loss with respect to the student's logits."""
    logits = student.detach().double().requires_grad_(True)
    result = objective(logits, base, teacher, reference_only, weights, **settings)
    (grad_logits,) = torch.autograd.grad(result.loss, [logits])
    return _detached(result, grad_logits=grad_logits)


def evaluate_hidden(
    student_hidden: Tensor,
    student_head: Head,
    base_hidden: Tensor | None,
    teacher_hidden: Tensor,
    reference_only_hidden: Tensor | None,
    frozen_head: Head,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    **settings: Any,
) -> Result:
    """
    `objective` from hidden states `[N, H]` and the two heads, detached, with the gradients of the student's hidden
    states, head weight and head bias. The frozen head and states are constants, also where the tensors are shared.
    """
    hidden = student_hidden.detach().double().requires_grad_(True)
    weight = student_head.weight.detach().double().requires_grad_(True)
    bias = None if student_head.bias is None else student_head.bias.detach().double().requires_grad_(True)
    student = Head(weight, bias, student_head.scale, student_head.softcap).logits(hidden, temperature)

    frozen = [
        None if states is None else frozen_head.logits(states, temperature).detach()
        for states in (base_hidden, teacher_hidden, reference_only_hidden)
    ]
    result = objective(student, *frozen, weights, **settings)
    result.loss.backward()
    return _detached(
        result, grad_hidden=hidden.grad, grad_weight=weight.grad, grad_bias=None if bias is None else bias.grad
    )


def sampled_token_advantages(
    student: Tensor, teacher: Tensor, reference_only: Tensor | None, log_target: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The advantage at the sampled token `y` and, where the probe was scored, its three parts; each `[N]`."""
    log_s, log_t = _at(log_probs(student), labels), _at(log_probs(teacher), labels)
    advantages = {"advantage": _at(log_target, labels) - log_s, "advantage_total": log_t - log_s}
    if reference_only is not None:
        log_r = _at(log_probs(reference_only), labels)
        advantages |= {"advantage_ref": log_r - log_s, "advantage_it": log_t - log_r}
    return advantages


def _at(log_p: Tensor, labels: Tensor) -> Tensor:
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _detached(result: Result, **grads: Tensor | None) -> Result:
    values = {name: value.detach() if isinstance(value, Tensor) else value for name, value in vars(result).items()}
    return Result(**(values | grads))
