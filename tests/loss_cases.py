"""Random inputs of the loss, the loss under test, and the fp64 oracle on the same inputs."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from purified_opsd_trl.head import LMHead
from purified_opsd_trl.kernels.settings import LossSettings
from purified_opsd_trl.loss import FrozenStates, TokenLoss, required_states, token_loss
from tests import reference


METRICS = ("student_entropy", "target_entropy", "kl_target_student", "kl_target_base", "clip_saturation")
ADVANTAGES = ("advantage", "advantage_total", "advantage_ref", "advantage_it")


@dataclass
class Case:
    """Random tensors of one call, the same for the fused loss and for the oracle."""

    hidden: Tensor  # [N, H]
    head: reference.Head
    base: Tensor  # [N, K]
    teacher: Tensor  # [N, K]
    reference_only: Tensor  # [N, K]
    frozen_head: reference.Head
    weights: Tensor  # [N]
    labels: Tensor  # [N]

    def states(self, names: tuple[str, ...]) -> FrozenStates:
        delta = (self.teacher.double() - self.reference_only.double()).to(self.teacher.dtype)
        return FrozenStates(**{name: delta if name == "delta" else getattr(self, name) for name in names})

    def inputs(self) -> tuple[Tensor, LMHead]:
        """Leaf hidden states and head that require a gradient; a head shared with the frozen model stays shared."""
        bias = None if self.head.bias is None else self.head.bias.clone().requires_grad_()
        weight = self.head.weight.clone().requires_grad_()
        return self.hidden.clone().requires_grad_(), LMHead(weight, bias, self.head.scale, self.head.softcap)

    def frozen(self) -> LMHead:
        return LMHead(self.frozen_head.weight, self.frozen_head.bias, self.frozen_head.scale, self.frozen_head.softcap)


def make_case(
    vocab: int = 17,
    tokens: int = 5,
    width: int = 8,
    *,
    dtype: torch.dtype = torch.float64,
    frozen_width: int | None = None,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    std: float = 2.0,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    def head(width: int) -> reference.Head:
        weight = normal(vocab, width, std=std / math.sqrt(width))
        return reference.Head(weight, normal(vocab) if bias else None, scale, softcap)

    student_head = head(width)
    frozen_head = student_head if frozen_width is None else head(frozen_width)
    frozen = [normal(tokens, frozen_width or width) for _ in range(3)]
    weights = torch.rand(tokens, generator=generator) / tokens
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return Case(normal(tokens, width), student_head, *frozen, frozen_head, weights, labels)


def fused_loss(case: Case, settings: LossSettings, **kwargs: Any) -> tuple[TokenLoss, list[Tensor | None]]:
    """The loss after `backward`, and the gradients of hidden states, weight and bias."""
    hidden, head = case.inputs()
    states = case.states(required_states(settings, case.frozen().linear, "target_logits" in kwargs))
    result = token_loss(hidden, head, states, case.frozen(), case.weights, settings, labels=case.labels, **kwargs)
    result.loss.backward()
    return result, [None if x is None else x.grad for x in (hidden, head.weight, head.bias)]


def oracle_loss(case: Case, settings: LossSettings) -> reference.Result:
    names = ("target", "loss_type", "beta", "temperature", "pmi_beta", "pmi_clip", "pmi_center", "kl_clip")
    options = {name: getattr(settings, name) for name in names}
    return reference.evaluate_hidden(
        case.hidden,
        case.head,
        case.base,
        case.teacher,
        case.reference_only,
        case.frozen_head,
        case.weights,
        labels=case.labels,
        **options,
    )


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def assert_matches(case: Case, settings: LossSettings, tolerance: float) -> None:
    result, gradients = fused_loss(case, settings)
    expected = oracle_loss(case, settings)
    torch.testing.assert_close(result.loss, expected.loss.float(), rtol=max(tolerance, 1e-6), atol=1e-7)
    purified = settings.target == "purified"
    for name in ("per_token", *METRICS, *ADVANTAGES):
        value, wanted = getattr(result, name), getattr(expected, name)
        if not purified and name in ("kl_target_base", "advantage_ref", "advantage_it"):
            assert value is None, name  # the states for it were not given
            continue
        assert (value is None) == (wanted is None), name
        if wanted is not None:
            assert not value.requires_grad
            torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance, msg=name)
    for gradient, wanted in zip(
        gradients, (expected.grad_hidden, expected.grad_weight, expected.grad_bias), strict=True
    ):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            assert relative_error(gradient, wanted) <= tolerance
