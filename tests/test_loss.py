"""The fused loss against the fp64 oracle: every setting, weights, graphs and modes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from purified_opsd_trl.head import LMHead
from purified_opsd_trl.kernels.settings import LossSettings
from purified_opsd_trl.loss import token_loss
from tests.loss_cases import assert_matches, fused_loss, make_case, oracle_loss, relative_error


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
                loss_chunk_size=2,
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
        settings = LossSettings(target=target, beta=beta, temperature=temperature, loss_chunk_size=2)
        assert_matches(make_case(**head), settings, 1e-10)


@pytest.mark.parametrize("vocab", [17, 1000, 32003])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_fp32_over_vocabulary_sizes(vocab: int, beta: float) -> None:
    case = make_case(vocab, dtype=torch.float32)
    for target in ("purified", "teacher"):
        assert_matches(case, LossSettings(target=target, beta=beta, loss_chunk_size=2), 5e-6)


@pytest.mark.parametrize("loss_chunk_size", [1, 2, 3, 5, 9, None])
def test_chunks_change_nothing(loss_chunk_size: int | None) -> None:
    assert_matches(make_case(1000), LossSettings(loss_chunk_size=loss_chunk_size), 1e-10)


@pytest.mark.parametrize("target", ["purified", "teacher"])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "bias": True}, {"frozen_width": 11}], ids=str)
def test_sampled_token(target: str, head: dict[str, Any]) -> None:
    case = make_case(1000, **head)
    settings = LossSettings(target=target, loss_type="sampled_token", loss_chunk_size=2, temperature=1.2)
    assert_matches(case, settings, 1e-10)
    if target == "purified":
        result, _ = fused_loss(case, settings)
        torch.testing.assert_close(result.advantage_total, result.advantage_ref + result.advantage_it)


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
    assert_matches(some, LossSettings(loss_chunk_size=2), 1e-10)
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
    assert_matches(other, LossSettings(loss_chunk_size=2), 5e-6)
    assert_matches(other, LossSettings(loss_type="sampled_token"), 5e-6)


def test_autocast_changes_nothing_on_a_cpu() -> None:
    case = make_case(1000, dtype=torch.float32, bias=True)
    plain, gradients = fused_loss(case, LossSettings())
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_gradients = fused_loss(case, LossSettings())
    # autocast is left before the first product, so the operations are the same
    assert torch.equal(plain.per_token, cast.per_token)
    assert all(torch.equal(a, b) for a, b in zip(gradients, cast_gradients, strict=True) if a is not None)
    with torch.autocast("cpu", torch.bfloat16):  # a student's norm may come out in bf16 while its weights stay fp32
        mixed, (gradient, _, _) = fused_loss(replace(case, hidden=case.hidden.bfloat16()), LossSettings())
    assert gradient is not None and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.per_token, plain.per_token, rtol=0.1, atol=0.01)


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
