"""Rounding errors of the fused loss in fp32, bf16 and fp16."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from purified_opsd_trl.kernels.settings import LossSettings
from tests import reference
from tests.loss_cases import METRICS, Case, fused_loss, make_case, oracle_loss, relative_error


# Precision -----------------------------------------------------------------------------------------------------------


def naive_gradient(case: Case, beta: float) -> Tensor:
    """Gradient of the hidden states by the textbook formula in the case's own dtype: four softmaxes, then autograd."""
    hidden, head = case.inputs()
    student, base, teacher, probe = (
        torch.log_softmax(h @ head.weight.T.detach(), -1)
        for h in (hidden, case.base, case.teacher, case.reference_only)
    )
    delta = teacher - probe
    delta = 10 * torch.tanh((delta - delta.mean(-1, keepdim=True)) / 10)
    target = torch.log_softmax(base + delta, -1)
    mixture = torch.logaddexp(student + math.log(1 - beta), target + math.log(beta))
    terms = beta * target.exp() * (target - mixture) + (1 - beta) * student.exp() * (student - mixture)
    (terms.sum(-1) * case.weights).sum().backward()
    assert hidden.grad is not None
    return hidden.grad


@pytest.mark.parametrize(("std", "bound"), [(1.0, 1e-6), (3.0, 4e-6)])
def test_fp32_gradient_error(std: float, bound: float) -> None:
    case = make_case(4000, 32, 512, dtype=torch.float32, std=std)
    _, (gradient, _, _) = fused_loss(case, LossSettings())
    expected = oracle_loss(case, LossSettings()).grad_hidden
    assert gradient is not None and expected is not None
    error = relative_error(gradient, expected)
    assert error <= bound
    assert error <= 1.1 * relative_error(naive_gradient(case, 0.5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradient_error(dtype: torch.dtype) -> None:
    case = make_case(4000, 32, 512, dtype=dtype)
    result, (gradient, grad_weight, _) = fused_loss(case, LossSettings())
    expected = oracle_loss(case, LossSettings())
    assert result.loss.dtype == result.per_token.dtype == torch.float32
    assert gradient is not None and grad_weight is not None and expected.grad_hidden is not None
    assert gradient.dtype == grad_weight.dtype == dtype
    error = relative_error(gradient, expected.grad_hidden)
    assert error <= 1e-2
    assert error <= relative_error(naive_gradient(case, 0.5), expected.grad_hidden)
    assert relative_error(grad_weight, expected.grad_weight) <= 1e-2
    torch.testing.assert_close(result.per_token.double(), expected.per_token, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("target", ["purified", "teacher"])
@pytest.mark.parametrize("kl_clip", [None, 0.02])
def test_extreme_logits(beta: float, target: str, kl_clip: float | None) -> None:
    case = make_case(1000, dtype=torch.float32, std=1e4)
    case.weights[:] = 1.0
    settings = LossSettings(target=target, beta=beta, kl_clip=kl_clip, loss_chunk_size=2)
    result, gradients = fused_loss(case, settings)
    expected = oracle_loss(case, settings)
    for name in ("per_token", *METRICS):
        value = getattr(result, name)
        if value is not None:
            assert torch.isfinite(value).all(), name
            # logits of 1e4 are known to 1e-3, and so is everything that is made of their differences
            torch.testing.assert_close(value.double(), getattr(expected, name), rtol=1e-4, atol=2e-2, msg=name)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


def test_probabilities_below_half_precision() -> None:
    """Most entries have a probability under 6e-8, the smallest number of fp16; the JSD does not lose them."""
    case = make_case(32003, dtype=torch.float16, std=6.0)
    expected = oracle_loss(case, LossSettings())
    result, (gradient, _, _) = fused_loss(case, LossSettings())
    assert gradient is not None and expected.grad_hidden is not None
    torch.testing.assert_close(result.per_token.double(), expected.per_token, rtol=2e-3, atol=1e-4)
    assert relative_error(gradient, expected.grad_hidden) <= 1e-2


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_student_at_the_target(beta: float) -> None:
    case = make_case(1000, dtype=torch.float32, std=3.0)
    case = replace(case, teacher=case.hidden)
    result, gradients = fused_loss(case, LossSettings(target="teacher", beta=beta))
    assert result.per_token.abs().max() <= 2e-6
    assert result.kl_target_student.abs().max() <= 2e-6
    scale = float(case.head.weight.norm())
    assert all(float(g.norm()) <= 1e-6 * scale for g in gradients if g is not None)


def test_without_evidence_the_target_is_the_base() -> None:
    case = make_case(1000)
    case = replace(case, reference_only=case.teacher)
    result, _ = fused_loss(case, LossSettings(beta=0.0))
    assert result.kl_target_base is not None and result.kl_target_base.abs().max() <= 1e-12
    log_base = reference.log_probs(case.frozen_head.logits(case.base))
    log_student = reference.log_probs(case.head.logits(case.hidden))
    torch.testing.assert_close(result.per_token, reference.kl(log_base, log_student))
