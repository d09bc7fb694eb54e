"""Matrix products and memory of the loss, custom targets, and inputs that do not fit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from purified_opsd_trl.errors import InputError
from purified_opsd_trl.head import LMHead
from purified_opsd_trl.kernels import fused
from purified_opsd_trl.kernels.settings import LossSettings
from purified_opsd_trl.loss import FrozenStates, required_states, token_loss
from purified_opsd_trl.purification import purified_target_logits
from tests import reference
from tests.loss_cases import Case, fused_loss, make_case, oracle_loss, relative_error


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
        (LossSettings(loss_chunk_size=2), ("base", "delta"), 3),
        (LossSettings(target="teacher", loss_chunk_size=2), ("teacher",), 2),
        (LossSettings(pmi_center=False, loss_chunk_size=2), ("base", "teacher", "reference_only"), 4),
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
    token_loss(case.hidden, head, states, head, case.weights, LossSettings(loss_memory_budget=600_000 / 2**20))
    assert 550_000 < max(allocated) <= 600_000  # 3 rows of 4000 bytes a token: 50 tokens
    allocated.clear()
    token_loss(case.hidden, head, states, head, case.weights, LossSettings(loss_memory_budget=1 / 2**20))
    assert max(allocated) == 3 * 4000  # a token is the least


# The target as the user's own function -------------------------------------------------------------------------------


def test_custom_target_equal_to_the_purified_one() -> None:
    case = make_case(1000, bias=True)
    settings = LossSettings(temperature=0.7, loss_chunk_size=2)

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

    result, _ = fused_loss(case, LossSettings(temperature=0.7, loss_chunk_size=2), target_logits=target)
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
        ("target", "student", "one of purified, teacher, contrastive"),
        ("loss_type", "kl", "'divergence' or 'sampled_token'"),
        ("beta", 1.5, "from 0 to 1"),
        ("beta", math.nan, "from 0 to 1"),
        ("temperature", 0.0, "positive"),
        ("pmi_beta", -1.0, "positive"),
        ("pmi_clip", 0.0, "positive number or None"),
        ("kl_clip", -0.1, "positive number or None"),
        ("loss_chunk_size", 0, "positive number or None"),
        ("loss_memory_budget", 0, "positive"),
    ],
)
def test_settings_out_of_range(field: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError, match=f"`{field}` must be .*{expected}"):
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


# Rows of the head beyond the tokenizer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "states"),
    [("divergence", ("base", "delta")), ("sampled_token", ("base", "teacher", "reference_only"))],
)
def test_the_mass_of_unused_ids_is_measured(loss_type: str, states: tuple[str, ...]) -> None:
    case = make_case(100, bias=True)
    settings = LossSettings(loss_type=loss_type, loss_chunk_size=2)
    hidden, head = case.inputs()
    result = token_loss(
        *(hidden, head, case.states(states), case.frozen(), case.weights, settings), labels=case.labels, used_vocab=90
    )
    assert result.unused_vocab_mass is not None
    teacher, probe, base = (
        case.frozen().logits(getattr(case, name)) for name in ("teacher", "reference_only", "base")
    )
    target = purified_target_logits(teacher, probe, base)
    torch.testing.assert_close(result.unused_vocab_mass, target.softmax(-1)[:, 90:].sum(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_masked_ids_take_no_part(beta: float) -> None:
    case = make_case(100, bias=True)
    hidden, head = case.inputs()
    masked = token_loss(
        *(hidden, head, case.states(("base", "delta")), case.frozen(), case.weights),
        LossSettings(beta=beta, mask_unused_vocab=True),
        used_vocab=90,
    )
    masked.loss.backward()
    short_hidden, whole = case.inputs()
    short = LMHead(whole.weight[:90], whole.bias[:90])
    frozen = LMHead(case.frozen().weight[:90], case.frozen().bias[:90])
    states = case.states(("base", "delta"))
    expected = token_loss(short_hidden, short, states, frozen, case.weights, LossSettings(beta=beta))
    expected.loss.backward()
    torch.testing.assert_close(masked.per_token, expected.per_token, rtol=0, atol=0)  # the very same computation
    torch.testing.assert_close(hidden.grad, short_hidden.grad, rtol=0, atol=0)
    torch.testing.assert_close(head.weight.grad, whole.weight.grad, rtol=0, atol=0)
    assert not head.weight.grad[90:].any()
