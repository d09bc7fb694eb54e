"""The readable maths against the oracle: values and gradients, every dtype, odd shapes, extreme logits."""

import math
from itertools import product

import pytest
import torch

from purified_opsd_trl.purification import centre, decompose, divergence, purified_target_logits, soft_clip
from tests import reference as oracle


# Inputs are exact in all three dtypes (drawn, then rounded to bf16), so the tolerance covers the arithmetic alone:
# half precision is computed in fp32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
SHAPES = [(1, 1), (5, 2), (3, 17), (2, 3, 101), (257,), (2, 1, 3, 33), (0, 7)]
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def logits(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(torch.bfloat16).to(dtype)


def assert_oracle(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_decompose(shape, dtype) -> None:
    inputs = [logits(seed, shape, dtype) for seed in range(3)]
    actual, expected = decompose(*inputs), oracle.decompose(*inputs)
    for name in ("total", "ref", "it"):
        assert_oracle(getattr(actual, name), getattr(expected, name), dtype)


def test_decompose_by_hand() -> None:
    # student (1/4, 3/4), teacher (1/2, 1/2), reference-only (3/4, 1/4); the arguments are told apart
    log = torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2], [3 / 4, 1 / 4]], dtype=torch.float64).log()
    parts = decompose(log[0] + 5.0, log[1] - 2.0, log[2])
    ln2, ln3 = math.log(2), math.log(3)
    expected = torch.tensor([[ln2, ln2 - ln3], [ln3, -ln3], [ln2 - ln3, ln2]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(parts), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_purified_target(shape, dtype) -> None:
    inputs = [logits(seed, shape, dtype) for seed in range(3)]
    for pmi_beta, pmi_clip, pmi_center in product([0.5, 1.0, 2.0], [None, 1.0, 10.0], [True, False]):
        settings = {"pmi_beta": pmi_beta, "pmi_clip": pmi_clip, "pmi_center": pmi_center}
        actual = purified_target_logits(*inputs, **settings)
        assert_oracle(torch.log_softmax(actual, dim=-1), oracle.purified_target(*inputs, **settings), dtype)


def test_purified_target_by_hand_and_its_defaults() -> None:
    # log(pi_T / pi_ref) = (ln 4, -ln 2, ln 2/3); c = 1; see test_reference.py for the numbers
    p, q, r = (torch.tensor(x, dtype=torch.float64).log() for x in ([2, 1, 1], [1, 4, 3], [1, 1, 2]))
    target = purified_target_logits(p, q, r, pmi_beta=0.5, pmi_clip=1.0).softmax(-1)
    expected = torch.tensor([0.8402317768163652, 0.04042643896565116, 0.11934178421798382], dtype=torch.float64)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-14)
    explicit = purified_target_logits(p, q, r, pmi_beta=1.0, pmi_clip=10.0, pmi_center=True)
    assert torch.equal(purified_target_logits(p, q, r), explicit)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("beta", BETAS)
def test_divergence_and_its_gradient(beta, dtype) -> None:
    # the gradient comes back in the student's dtype, rounded there
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0.0)
    for shape in SHAPES:
        student = logits(0, shape, dtype).requires_grad_(True)
        target = logits(1, shape, dtype)
        weights = torch.rand(shape[:-1], dtype=torch.float64)
        actual = divergence(student, target, beta)
        (weights * actual).sum().backward()

        exact = student.detach().double().requires_grad_(True)
        expected = oracle.divergence(oracle.log_probs(exact), oracle.log_probs(target), beta)
        (weights * expected).sum().backward()
        assert actual.shape == shape[:-1]
        assert_oracle(actual.detach(), expected.detach(), dtype)
        torch.testing.assert_close(
            student.grad.double(), exact.grad, rtol=TOLERANCE[dtype] + rounding, atol=TOLERANCE[dtype] + rounding / 100
        )


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_of_the_whole_loss(beta) -> None:
    # target and divergence chained as in the trainer: the oracle differentiates its own chain
    inputs = [logits(seed, (7, 33)) for seed in range(4)]
    weights = torch.rand(7, dtype=torch.float64)
    student = inputs[0].clone().requires_grad_(True)
    base, teacher, reference_only = inputs[1:]
    target = purified_target_logits(teacher, reference_only, base, pmi_beta=0.7, pmi_clip=2.0)
    (weights * divergence(student, target, beta)).sum().backward()
    expected = oracle.evaluate(*inputs, weights, beta=beta, pmi_beta=0.7, pmi_clip=2.0)
    torch.testing.assert_close(student.grad, expected.grad_logits, rtol=0, atol=1e-12)


def test_divergence_default_is_the_symmetric_one() -> None:
    student, target = logits(0, (4, 9)), logits(1, (4, 9))
    assert torch.equal(divergence(student, target), divergence(student, target, 0.5))
    torch.testing.assert_close(divergence(student, target), divergence(target, student), rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_distributions_have_no_divergence_and_no_gradient(beta, dtype) -> None:
    student = logits(0, (6, 50), dtype).requires_grad_(True)
    value = divergence(student, student.detach() + 8.0, beta)
    value.sum().backward()
    atol = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=atol)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=atol)


@pytest.mark.parametrize("pmi_center", [True, False])
def test_equal_teacher_and_reference_only_give_the_base(pmi_center) -> None:
    teacher, base = logits(0, (6, 50), torch.float32), logits(1, (6, 50), torch.float32)
    target = purified_target_logits(teacher, teacher, base, pmi_center=pmi_center)
    # the target's log-probabilities, from -17 up, are rounded by half an ulp, 2^-20, and so is their normaliser
    torch.testing.assert_close(target.softmax(-1), base.softmax(-1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("pmi_center", [True, False])
@pytest.mark.parametrize("which", range(3))
def test_a_constant_added_to_any_logits_changes_nothing(which, pmi_center) -> None:
    inputs = [logits(seed, (6, 50)) for seed in range(3)]
    shifted = [x + (100.0 if i == which else 0.0) for i, x in enumerate(inputs)]
    settings = {"pmi_clip": 0.5, "pmi_center": pmi_center}
    expected = purified_target_logits(*inputs, **settings).softmax(-1)
    torch.testing.assert_close(purified_target_logits(*shifted, **settings).softmax(-1), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_are_finite_and_right(beta, dtype) -> None:
    # near-one-hot distributions that disagree: the tails underflow in fp32, their log-ratios are hundreds of nats
    inputs = [logits(seed, (8, 40), dtype, scale=200.0) for seed in range(4)]
    student = inputs[0].requires_grad_(True)
    target = purified_target_logits(*inputs[1:])
    value = divergence(student, target, beta)
    value.sum().backward()
    assert value.isfinite().all() and target.isfinite().all() and student.grad.isfinite().all()
    teacher, reference_only, base = inputs[1:]
    expected = oracle.evaluate(inputs[0], base, teacher, reference_only, torch.ones(8), beta=beta)
    torch.testing.assert_close(value.detach().double(), expected.per_token, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centre(dtype) -> None:
    delta = logits(0, (3, 4, 11), dtype) + 5.0
    expected = torch.stack([row - sum(row.tolist()) / 11 for row in delta.view(-1, 11)]).view(3, 4, 11)
    torch.testing.assert_close(centre(delta), expected)
    torch.testing.assert_close(centre(centre(delta)), centre(delta))


def test_soft_clip() -> None:
    delta = torch.tensor([-math.inf, -30.0, -1.0, 0.0, 1e-3, 1.0, 30.0, math.inf], dtype=torch.float64)
    expected = torch.tensor([2 * math.tanh(x / 2) for x in delta.tolist()], dtype=torch.float64)
    torch.testing.assert_close(soft_clip(delta, 2.0), expected, rtol=0, atol=1e-15)
    assert soft_clip(delta, None) is delta
    small = logits(0, (50,), scale=0.01)
    torch.testing.assert_close(soft_clip(small, 10.0), small, rtol=1e-5, atol=0)  # identity near zero


def test_half_precision_log_ratios_keep_the_tail() -> None:
    # in bf16 arithmetic log-probabilities around -20 are spaced 0.125 apart; the log-ratio below is 2^-6 everywhere
    # but at one entry
    student = torch.linspace(-20, 0, 64).to(torch.bfloat16)
    teacher = student.clone()
    teacher[-1] += 1.0
    parts = decompose(student, teacher, student)
    expected = oracle.decompose(student, teacher, student)
    torch.testing.assert_close(parts.total.double(), expected.total, rtol=0, atol=1e-5)
