"""
`purified_opsd_trl.loss` against the fp64 oracle: every gradient, every metric, every kind of head.

Shapes: N tokens, V vocabulary entries, H hidden units of the student and K of the frozen model.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from purified_opsd_trl import loss as loss_module
from purified_opsd_trl.errors import InputError
from purified_opsd_trl.kernels import fused
from purified_opsd_trl.loss import FrozenStates, LMHead, LossSettings, TokenLoss, required_states, token_loss
from purified_opsd_trl.purification import purified_target_logits
from tests import reference
from tests.conftest import ARCHITECTURES, build_model


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


# The whole grid in fp64, where a wrong formula cannot hide behind rounding -------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("target", ["purified", "teacher"])
@pytest.mark.parametrize("kl_clip", [None, 0.02])
def test_fp64_grid(beta: float, target: str, kl_clip: float | None) -> None:
    case = make_case()
    for pmi_clip in (None, 0.05, 10.0):
        for pmi_center in (True, False):
            settings = LossSettings(
                target=target,
                beta=beta,
                pmi_beta=1.7,
                pmi_clip=pmi_clip,
                pmi_center=pmi_center,
                kl_clip=kl_clip,
                chunk_size=2,
            )
            assert_matches(case, settings, 1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "head",
    [
        {"bias": True},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"bias": True, "scale": 1.4, "softcap": 3.0},
        {"frozen_width": 11},
        {"frozen_width": 11, "bias": True, "softcap": 3.0},
    ],
    ids=str,
)
def test_heads(beta: float, head: dict[str, Any]) -> None:
    for target, temperature in (("purified", 1.0), ("purified", 0.7), ("teacher", 1.3)):
        settings = LossSettings(target=target, beta=beta, temperature=temperature, chunk_size=2)
        assert_matches(make_case(**head), settings, 1e-10)


@pytest.mark.parametrize("vocab", [17, 1000, 32003])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_fp32_over_vocabulary_sizes(vocab: int, beta: float) -> None:
    case = make_case(vocab, dtype=torch.float32)
    for target in ("purified", "teacher"):
        assert_matches(case, LossSettings(target=target, beta=beta, chunk_size=2), 5e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 9, None])
def test_chunks_change_nothing(chunk_size: int | None) -> None:
    assert_matches(make_case(1000), LossSettings(chunk_size=chunk_size), 1e-10)


@pytest.mark.parametrize("target", ["purified", "teacher"])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "bias": True}, {"frozen_width": 11}], ids=str)
def test_sampled_token(target: str, head: dict[str, Any]) -> None:
    case = make_case(1000, **head)
    settings = LossSettings(target=target, loss_type="sampled_token", chunk_size=2, temperature=1.2)
    assert_matches(case, settings, 1e-10)
    if target == "purified":
        result, _ = fused_loss(case, settings)
        torch.testing.assert_close(result.advantage_total, result.advantage_ref + result.advantage_it)


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
    settings = LossSettings(target=target, beta=beta, kl_clip=kl_clip, chunk_size=2)
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


# Weights, graphs, modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["divergence", "sampled_token"])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "bias": True}], ids=str)
def test_no_tokens(loss_type: str, head: dict[str, Any]) -> None:
    case = make_case(tokens=0, dtype=torch.float32, **head)
    result, gradients = fused_loss(case, LossSettings(loss_type=loss_type))
    assert result.loss == 0 and result.per_token.shape == (0,)
    for gradient in gradients:
        assert gradient is None or not gradient.any()
    assert gradients[1] is not None  # a data-parallel reduction waits for it
    some, _ = fused_loss(make_case(tokens=3, dtype=torch.float32, **head), LossSettings(loss_type=loss_type))
    there, elsewhere = ({name for name, value in vars(r).items() if value is not None} for r in (result, some))
    assert there == elsewhere  # processes add these up, also one without a token


def test_one_token() -> None:
    assert_matches(make_case(1000, tokens=1), LossSettings(), 1e-10)


def test_zero_weights() -> None:
    case = make_case(1000)
    some = replace(case, weights=torch.tensor([0.0, 0.2, 0.0, 0.3, 0.0]))
    assert_matches(some, LossSettings(chunk_size=2), 1e-10)
    _, (gradient, _, _) = fused_loss(some, LossSettings())
    assert gradient is not None and not gradient[::2].any() and gradient[1::2].all()
    result, gradients = fused_loss(replace(case, weights=torch.zeros(5)), LossSettings())
    assert result.loss == 0 and not any(g.any() for g in gradients if g is not None)
    assert (result.per_token > 0).all()


def test_negative_and_tiny_weights() -> None:
    weights = torch.tensor([1e-30, -2e-30, 0.0, 5e-31, 1e-30])
    assert_matches(replace(make_case(), weights=weights), LossSettings(), 1e-10)


def test_only_the_student_gets_a_gradient() -> None:
    case = make_case()
    hidden, head = case.inputs()
    frozen = case.frozen()
    leaves = [case.base, case.teacher, case.reference_only, frozen.weight, case.weights]
    for leaf in leaves:
        leaf.requires_grad_()
    settings = LossSettings(pmi_center=False)
    token_loss(
        hidden, head, case.states(("base", "teacher", "reference_only")), frozen, case.weights, settings
    ).loss.backward()
    assert hidden.grad is not None and head.weight.grad is not None
    assert all(leaf.grad is None for leaf in leaves)


def test_a_head_shared_with_the_frozen_model_learns_from_the_student_alone() -> None:
    case = make_case()
    hidden, head = case.inputs()
    token_loss(hidden, head, case.states(("base", "delta")), head, case.weights, LossSettings()).loss.backward()
    assert relative_error(head.weight.grad, oracle_loss(case, LossSettings()).grad_weight) <= 1e-10


def test_twice_in_one_graph() -> None:
    case = make_case()
    hidden, head = case.inputs()
    forward = LossSettings(beta=0.0)
    states = case.states(("base", "delta"))
    one = token_loss(hidden, head, states, case.frozen(), case.weights, LossSettings()).loss
    two = token_loss(hidden, head, states, case.frozen(), case.weights, forward).loss
    total = 3.0 * one - 0.5 * two
    total.backward(retain_graph=True)
    expected = 3.0 * oracle_loss(case, LossSettings()).grad_hidden - 0.5 * oracle_loss(case, forward).grad_hidden
    assert relative_error(hidden.grad, expected) <= 1e-10
    total.backward()  # the first pass has left the gradient as it was
    assert relative_error(hidden.grad, 2 * expected) <= 1e-10


def test_gradient_reaches_the_layers_below() -> None:
    case = make_case()
    layer = torch.nn.Linear(8, 8, dtype=torch.float64)
    head = LMHead(case.head.weight)
    states = case.states(("base", "delta"))
    result = token_loss(layer(case.hidden), head, states, case.frozen(), case.weights, LossSettings())
    result.loss.backward()
    moved = replace(case, hidden=layer(case.hidden).detach())
    expected = oracle_loss(moved, LossSettings()).grad_hidden.T @ case.hidden
    assert relative_error(layer.weight.grad, expected) <= 1e-10
    assert case.head.weight.grad is None


@pytest.mark.parametrize(
    "settings", [LossSettings(), LossSettings(loss_type="sampled_token")], ids=lambda s: s.loss_type
)
def test_same_input_same_bits(settings: LossSettings) -> None:
    case = make_case(32003, dtype=torch.float32)
    first, first_gradients = fused_loss(case, settings)
    second, second_gradients = fused_loss(case, settings)
    assert torch.equal(first.per_token, second.per_token) and torch.equal(first.loss, second.loss)
    for one, two in zip(first_gradients, second_gradients, strict=True):
        assert one is None or two is None or torch.equal(one, two)


def test_non_contiguous_inputs() -> None:
    def strided(x: Tensor) -> Tensor:
        wide = torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]

    case = make_case(1000, dtype=torch.float32, bias=True)
    head = replace(case.head, weight=case.head.weight.T.contiguous().T)
    other = replace(
        case,
        hidden=strided(case.hidden),
        base=strided(case.base),
        teacher=strided(case.teacher),
        reference_only=strided(case.reference_only),
        head=head,
        frozen_head=head,
        weights=torch.tensor(0.2).expand(5),
        labels=torch.stack([case.labels, case.labels], 1)[:, 0],
    )
    assert not other.hidden.is_contiguous() and not other.head.weight.is_contiguous()
    assert_matches(other, LossSettings(chunk_size=2), 5e-6)
    assert_matches(other, LossSettings(loss_type="sampled_token"), 5e-6)


def test_autocast_changes_nothing_on_a_cpu() -> None:
    case = make_case(1000, dtype=torch.float32, bias=True)
    plain, gradients = fused_loss(case, LossSettings())
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_gradients = fused_loss(case, LossSettings())
    assert torch.equal(plain.per_token, cast.per_token)
    assert all(torch.equal(a, b) for a, b in zip(gradients, cast_gradients, strict=True) if a is not None)
    with torch.autocast("cpu", torch.bfloat16):  # a student's norm may come out in bf16 while its weights stay fp32
        mixed, (gradient, _, _) = fused_loss(replace(case, hidden=case.hidden.bfloat16()), LossSettings())
    assert gradient is not None and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.per_token, plain.per_token, rtol=0.1, atol=0.01)


# What it costs -------------------------------------------------------------------------------------------------------


def count_products(case: Case, settings: LossSettings, *, head_grad: bool, states: tuple[str, ...]) -> float:
    """Multiply-adds of all matrix products, forward and backward, in units of N V H."""
    hidden, head = case.inputs()
    head.weight.requires_grad_(head_grad)
    with FlopCounterMode(display=False) as counter:
        result = token_loss(hidden, head, case.states(states), case.frozen(), case.weights, settings)
        if result.loss.requires_grad:
            result.loss.backward()
    tokens, width = case.hidden.shape
    return counter.get_total_flops() / (2 * tokens * width * case.head.weight.shape[0])


@pytest.mark.parametrize(
    ("settings", "states", "products"),
    [
        (LossSettings(chunk_size=2), ("base", "delta"), 3),
        (LossSettings(target="teacher", chunk_size=2), ("teacher",), 2),
        (LossSettings(pmi_center=False, chunk_size=2), ("base", "teacher", "reference_only"), 4),
    ],
    ids=["purified", "teacher", "uncentred"],
)
def test_matrix_products(settings: LossSettings, states: tuple[str, ...], products: int) -> None:
    case = make_case(1000)
    assert count_products(case, settings, head_grad=False, states=states) == products + 1
    assert count_products(case, settings, head_grad=True, states=states) == products + 2
    with torch.no_grad():
        assert count_products(case, settings, head_grad=True, states=states) == products


def test_no_gradient_work_for_frozen_inputs() -> None:
    case = make_case(1000)
    with FlopCounterMode(display=False) as counter:
        states = case.states(("base", "delta"))
        result = token_loss(case.hidden, case.frozen(), states, case.frozen(), case.weights, LossSettings())
    assert not result.loss.requires_grad
    assert counter.get_total_flops() == 3 * 2 * case.hidden.numel() * 1000
    torch.testing.assert_close(result.per_token, fused_loss(case, LossSettings())[0].per_token)


def test_shared_heads_are_projected_in_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    project = fused.project
    monkeypatch.setattr(fused, "project", lambda h, *args: (rows.append(len(h)), project(h, *args)))
    case = make_case()
    states = case.states(("base", "delta"))
    with torch.no_grad():
        token_loss(case.hidden, case.frozen(), states, case.frozen(), case.weights, LossSettings())
        token_loss(case.hidden, case.inputs()[1], states, case.frozen(), case.weights, LossSettings())
    assert rows == [15, 5, 10]


def test_memory_budget_chooses_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch rows of one chunk stay inside the budget, and fill it."""
    allocated: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (allocated.append((x := empty(*a, **k)).nbytes), x)[1])
    case = make_case(1000, tokens=200, dtype=torch.float32)
    head, states = case.frozen(), case.states(("base", "delta"))
    token_loss(case.hidden, head, states, head, case.weights, LossSettings(memory_budget=600_000))
    assert 550_000 < max(allocated) <= 600_000  # 3 rows of 4000 bytes a token: 50 tokens
    allocated.clear()
    token_loss(case.hidden, head, states, head, case.weights, LossSettings(memory_budget=1))
    assert max(allocated) == 3 * 4000  # a token is the least


# The target as the user's own function -------------------------------------------------------------------------------


def test_custom_target_equal_to_the_purified_one() -> None:
    case = make_case(1000, bias=True)
    settings = LossSettings(temperature=0.7, chunk_size=2)

    def target(teacher: Tensor, reference_only: Tensor, base: Tensor) -> Tensor:
        return purified_target_logits(teacher, reference_only, base, pmi_beta=1.0, pmi_clip=10.0, pmi_center=True)

    result, gradients = fused_loss(case, settings, target_logits=target)
    expected = oracle_loss(case, settings)
    for name in ("per_token", "target_entropy", "kl_target_base", "kl_target_student"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-10, atol=1e-10)
    assert result.clip_saturation is None
    assert gradients[0] is not None and relative_error(gradients[0], expected.grad_hidden) <= 1e-10


def test_custom_target_sees_finished_logits_chunk_by_chunk() -> None:
    case = make_case(dtype=torch.float32, bias=True, softcap=3.0, scale=1.4)
    seen: list[tuple[Tensor, ...]] = []

    def target(*logits: Tensor) -> Tensor:
        seen.append(tuple(x.clone() for x in logits))
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in logits)
        return logits[0]

    result, _ = fused_loss(case, LossSettings(temperature=0.7, chunk_size=2), target_logits=target)
    assert [len(x[0]) for x in seen] == [2, 2, 1]
    for index, hidden in enumerate((case.teacher, case.reference_only, case.base)):
        logits = torch.cat([chunk[index] for chunk in seen]).double()
        torch.testing.assert_close(logits, case.frozen_head.logits(hidden, 0.7), rtol=1e-5, atol=1e-5)
    plain = oracle_loss(case, LossSettings(target="teacher", temperature=0.7))
    torch.testing.assert_close(result.per_token.double(), plain.per_token, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_custom_target_with_masked_entries(beta: float) -> None:
    case = make_case(1000)

    def top_8(teacher: Tensor, reference_only: Tensor, base: Tensor) -> Tensor:
        return teacher.masked_fill(teacher < teacher.topk(8).values[..., -1:], -math.inf)

    result, gradients = fused_loss(case, LossSettings(beta=beta), target_logits=top_8)
    teacher = case.frozen_head.logits(case.teacher)
    log_q = reference.log_probs(top_8(teacher, teacher, teacher)).clamp(min=-1e5)
    log_p = reference.log_probs(case.head.logits(case.hidden))
    torch.testing.assert_close(result.per_token, reference.divergence(log_p, log_q, beta))
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


def test_custom_target_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"target_logits must return a tensor of shape \(5, 17\).*not \(5, 16\)"):
        fused_loss(make_case(), LossSettings(), target_logits=lambda teacher, probe, base: teacher[:, 1:])


# Input that does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("target", "student", "'purified' or 'teacher'"),
        ("loss_type", "kl", "'divergence' or 'sampled_token'"),
        ("beta", 1.5, "from 0 to 1"),
        ("beta", math.nan, "from 0 to 1"),
        ("temperature", 0.0, "positive"),
        ("pmi_beta", -1.0, "positive"),
        ("pmi_clip", 0.0, "positive number or None"),
        ("kl_clip", -0.1, "positive number or None"),
        ("chunk_size", 0, "positive number or None"),
        ("memory_budget", 0, "positive"),
    ],
)
def test_settings_out_of_range(field: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError, match=f"{field}=.*{expected}"):
        LossSettings(**{field: value})


def test_clip_without_a_divergence() -> None:
    with pytest.raises(InputError, match="kl_clip"):
        LossSettings(loss_type="sampled_token", kl_clip=0.1)


def test_tensors_that_do_not_fit() -> None:
    case = make_case()
    hidden, head = case.inputs()
    states = case.states(("base", "delta"))
    with pytest.raises(InputError, match=r"\('base', 'delta'\), but `delta` is missing"):
        token_loss(hidden, head, FrozenStates(base=case.base), head, case.weights, LossSettings())
    with pytest.raises(InputError, match="`base` has 5 tokens, the student's hidden states have 4"):
        token_loss(hidden[:4], head, states, head, case.weights[:4], LossSettings())
    with pytest.raises(InputError, match="needs `labels`"):
        sampled = LossSettings(loss_type="sampled_token")
        token_loss(hidden, head, case.states(("base", "teacher", "reference_only")), head, case.weights, sampled)
    with pytest.raises(InputError, match="17 vocabulary entries, the frozen head 18"):
        other = LMHead(torch.zeros(18, 8, dtype=torch.float64))
        token_loss(hidden, head, states, other, case.weights, LossSettings())


def test_required_states() -> None:
    three = ("base", "teacher", "reference_only")
    sampled = LossSettings(loss_type="sampled_token")
    assert required_states(LossSettings(), True, False) == ("base", "delta")
    assert required_states(LossSettings(), False, False) == three
    assert required_states(LossSettings(pmi_center=False), True, False) == three
    assert required_states(sampled, True, False) == three
    assert required_states(LossSettings(target="teacher"), True, False) == ("teacher",)
    assert required_states(LossSettings(target="teacher"), True, True) == three


def test_base_states_give_the_plain_loss_its_metric() -> None:
    case = make_case(softcap=3.0)
    hidden, head = case.inputs()
    settings = LossSettings(target="teacher")
    states = case.states(("base", "teacher"))
    result = token_loss(hidden, head, states, case.frozen(), case.weights, settings)
    expected = oracle_loss(case, settings)
    torch.testing.assert_close(result.kl_target_base, expected.kl_target_base)
    torch.testing.assert_close(result.per_token, expected.per_token)


# Heads of real models ------------------------------------------------------------------------------------------------

OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2": {"logit_scale": 0.7, "head_dim": 16, "num_key_value_heads": 1},
    "hyperclovax": {"logits_scaling": 0.4, "num_key_value_heads": 1},
    "falcon_h1": {
        "lm_head_multiplier": 0.3,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "num_key_value_heads": 2,
    },
    "minicpm3": {"dim_model_base": 16, "num_key_value_heads": 2},
    "recurrent_gemma": {"logits_soft_cap": 4.0, "num_key_value_heads": 1, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "tie_word_embeddings": True},
}


def last_hidden_and_logits(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids = torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        return model.base_model(ids).last_hidden_state, model(ids).logits


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHER_FAMILIES])
def test_head_from_model(architecture: str) -> None:
    if architecture not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    if architecture in ARCHITECTURES:
        model = build_model(architecture)
    else:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        small = {**sizes, "num_hidden_layers": 2, "initializer_range": 0.3, "pad_token_id": 0}
        config = AutoConfig.for_model(architecture, **{**small, **OTHER_FAMILIES[architecture]})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    hidden, logits = last_hidden_and_logits(model)
    head = LMHead.from_model(model)
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-4, atol=1e-4)
    raw = hidden @ head.weight.T
    changed = not torch.allclose(raw, logits, rtol=1e-3, atol=1e-3)
    assert changed == (head.bias is not None or head.logit_scale != 1.0 or head.softcap is not None)


def test_head_of_a_tied_model_is_its_embedding() -> None:
    model = build_model(tied=True)
    assert LMHead.from_model(model).weight is model.get_input_embeddings().weight


def test_head_under_lora() -> None:
    model = build_model()
    weight = model.lm_head.weight
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert LMHead.from_model(peft_model).weight is weight


def test_head_in_modules_to_save() -> None:
    peft_model = get_peft_model(build_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained = LMHead.from_model(peft_model).weight
    assert trained.requires_grad
    with peft_model.disable_adapter():
        original = LMHead.from_model(peft_model).weight
    assert original is not trained and not original.requires_grad


def test_head_with_an_adapter_of_its_own() -> None:
    peft_model = get_peft_model(build_model(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(InputError, match="remove 'lm_head' from `target_modules`"):
        LMHead.from_model(peft_model)


def test_quantised_head() -> None:
    model = build_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="uint8.*quantisation"):
        LMHead.from_model(model)


def test_model_without_a_head() -> None:
    with pytest.raises(InputError, match="no output embeddings"):
        LMHead.from_model(build_model().model)


# Sharded heads -------------------------------------------------------------------------------------------------------


def test_partitioned_heads_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3: a partitioned parameter is empty outside the context that gathers it."""
    case = make_case(1000, frozen_width=11)
    full = [torch.nn.Parameter(head.weight.clone()) for head in (case.head, case.frozen_head)]
    data = [p.data for p in full]
    gathered: list[tuple[Any, ...]] = []

    @contextmanager
    def gather(*params: torch.nn.Parameter) -> Iterator[None]:
        gathered.append(params)
        for param, whole in zip(params, data, strict=True):
            param.data = whole
        yield
        for param in params:
            param.data = torch.empty(0, dtype=torch.float64)

    for param in full:
        param.ds_status = "partitioned"
        param.data = torch.empty(0, dtype=torch.float64)
    monkeypatch.setattr(loss_module, "maybe_gather_lm_head_ctx", gather)
    hidden = case.hidden.clone().requires_grad_()
    heads = LMHead(full[0]), LMHead(full[1])
    result = token_loss(hidden, heads[0], case.states(("base", "delta")), heads[1], case.weights, LossSettings())
    assert gathered == [tuple(full)]
    full[0].data = data[0]
    result.loss.backward()
    expected = oracle_loss(case, LossSettings())
    assert relative_error(hidden.grad, expected.grad_hidden) <= 1e-10
    assert relative_error(full[0].grad, expected.grad_weight) <= 1e-10 and full[1].grad is None


def test_sharded_tensors(tmp_path: Any) -> None:
    """FSDP2: a `DTensor` head is made whole once, and its gradient goes back to the shards."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = make_case(1000, bias=True)
        mesh = init_device_mesh("cpu", (1,))
        weight = torch.nn.Parameter(distribute_tensor(case.head.weight, mesh, [Shard(0)]))
        bias = torch.nn.Parameter(distribute_tensor(case.head.bias, mesh, [Shard(0)]))
        head = LMHead(weight, bias)
        hidden = case.hidden.clone().requires_grad_()
        states = case.states(("base", "delta"))
        token_loss(hidden, head, states, head, case.weights, LossSettings()).loss.backward()
        expected = oracle_loss(case, LossSettings())
        assert isinstance(weight.grad, DTensor) and isinstance(bias.grad, DTensor)
        assert relative_error(weight.grad.full_tensor(), expected.grad_weight) <= 1e-10
        assert relative_error(bias.grad.full_tensor(), expected.grad_bias) <= 1e-10
        assert relative_error(hidden.grad, expected.grad_hidden) <= 1e-10
    finally:
        torch.distributed.destroy_process_group()


def test_trl_agrees_on_the_plain_divergence() -> None:
    """TRL's own kernel, an implementation that neither we nor the oracle share code with."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    case = make_case(1000, dtype=torch.float32, bias=True, scale=0.6, softcap=4.0, frozen_width=11)
    for beta in (0.0, 0.3, 1.0):
        hidden, head = case.inputs()
        divergence, entropy = ChunkedDivergenceFunction.apply(
            *(hidden, head.weight, head.bias),
            *(case.teacher, case.frozen_head.weight, case.frozen_head.bias),
            *(beta, 0.7, 0.6, 4.0, 0.6, 4.0),
        )
        (divergence * case.weights).sum().backward()
        settings = LossSettings(target="teacher", beta=beta, temperature=0.7)
        result, gradients = fused_loss(case, settings)
        torch.testing.assert_close(result.per_token, divergence, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.student_entropy, entropy, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(gradients, (hidden.grad, head.weight.grad, head.bias.grad), strict=True):
            assert ours is not None and relative_error(ours, theirs.double()) <= 1e-5
