"""
The oracle itself, against numbers worked out by hand for three vocabulary entries, and against its own identities.

The probabilities below are chosen so that their logarithms are simple: with ln 2 = 0.6931..., tanh(ln 2) = 0.6.
"""

import math
from dataclasses import replace

import pytest
import torch

from tests.reference import (
    Head,
    clip_saturation,
    decompose,
    divergence,
    divergence_terms,
    entropy,
    evaluate,
    evaluate_hidden,
    kl,
    log_probs,
    purified_target,
)


LN2 = 0.6931471805599453

P = [1 / 2, 1 / 4, 1 / 4]
Q = [1 / 8, 1 / 2, 3 / 8]
R = [1 / 4, 1 / 4, 1 / 2]


def logits_of(probabilities: list[float], shift: float = 0.0) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log() + shift


def assert_numbers(actual: torch.Tensor, expected: list[float] | float, atol: float = 1e-14) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the target ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pmi_beta", "pmi_clip", "expected"),
    [
        # pi_T / pi_ref = (2, 1, 1/2); P_0 * ratio = (1/2, 1/4, 1/4)
        (1.0, None, [1 / 2, 1 / 4, 1 / 4]),
        # the ratio squared: P_0 * (4, 1, 1/4) = (1, 1/4, 1/8), normalizer 11/8
        (0.5, None, [8 / 11, 2 / 11, 1 / 11]),
        # c = 1: tanh(ln 2) = 0.6, so P_0 * (e^0.6, 1, e^-0.6), normalizer 0.9799
        (1.0, 1.0, [0.46485681115029254, 0.2551188270768439, 0.28002436177286344]),
    ],
)
def test_target_of_a_symmetric_log_ratio(pmi_beta, pmi_clip, expected) -> None:
    # log(pi_T / pi_ref) = (ln 2, 0, -ln 2) has mean 0: centring changes nothing
    for pmi_center in (True, False):
        target = purified_target(
            logits_of(P), logits_of(R), logits_of(R), pmi_beta=pmi_beta, pmi_clip=pmi_clip, pmi_center=pmi_center
        )
        assert_numbers(target.exp(), expected)


@pytest.mark.parametrize(
    ("pmi_beta", "pmi_center", "expected"),
    [
        # log(pi_T / pi_ref) = (ln 4, -ln 2, ln 2/3), mean ln(4/3)/3 = 0.0959; centred (1.2904, -0.7890, -0.5014);
        # tanh of it (0.8592, -0.6579, -0.4632)
        (1.0, True, [0.5706691792995987, 0.12517500299030002, 0.30415581771010125]),
        (0.5, True, [0.8402317768163652, 0.04042643896565116, 0.11934178421798382]),
        (2.0, True, [0.3998720248815218, 0.18727836888998053, 0.41284960622849765]),
        # uncentred: tanh(ln 4) = 15/17, tanh(-ln 2) = -3/5, tanh(ln 2/3) = -5/13
        (1.0, False, [0.5585121615588619, 0.12683961983850056, 0.3146482186026375]),
    ],
)
def test_target_where_centring_meets_the_clip(pmi_beta, pmi_center, expected) -> None:
    target = purified_target(
        logits_of(P), logits_of(Q), logits_of(R), pmi_beta=pmi_beta, pmi_clip=1.0, pmi_center=pmi_center
    )
    assert_numbers(target.exp(), expected)


def test_clip_saturation_counts_entries_beyond_the_clip() -> None:
    teacher, reference_only = logits_of(P), logits_of(Q)  # centred (1.2904, -0.7890, -0.5014)
    for clip, expected in [(1.3, 0.0), (1.0, 1 / 3), (0.7, 2 / 3), (0.5, 1.0)]:
        assert_numbers(clip_saturation(teacher, reference_only, clip), expected)
    # uncentred (1.3863, -0.6931, -0.4055): 0.7 is crossed once only
    assert_numbers(clip_saturation(teacher, reference_only, 0.7, pmi_center=False), 1 / 3)
    assert clip_saturation(teacher, reference_only, None) is None


# --- divergences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "terms"),
    [
        # KL(Q || P): 1/8 ln 1/4, 1/2 ln 2, 3/8 ln 3/2
        (0, [-0.17328679513998632, 0.34657359027997264, 0.15204941554056164]),
        # KL(P || Q): 1/2 ln 4, 1/4 ln 1/2, 1/4 ln 2/3
        (1, [0.6931471805599453, -0.17328679513998632, -0.10136627702704111]),
        # m = (5/16, 3/8, 5/16): 1/2 (1/8 ln 2/5 + 1/2 ln 8/5), ...
        (0.5, [0.06023273656929922, 0.021237379599424656, 0.006292347984590274]),
        # m = 3/4 P + 1/4 Q = (13/32, 5/16, 9/32): 1/4 Q ln Q/m + 3/4 P ln P/m
        (0.25, [0.041031793156165265, 0.016911037784302634, 0.004885875106782546]),
    ],
)
def test_divergence_of_student_p_from_target_q(beta, terms) -> None:
    student, target = logits_of(P), logits_of(Q)
    assert_numbers(divergence_terms(student, target, beta), terms)
    assert_numbers(divergence(student, target, beta), sum(terms))


def test_kl_and_entropy() -> None:
    assert_numbers(kl(logits_of(Q), logits_of(P)), 0.32533621068054797)  # 1/4 ln 2 + 3/8 ln 3/2
    assert_numbers(kl(logits_of(P), logits_of(Q)), 0.41849410839291784)  # 3/4 ln 2 - 1/4 ln 3/2
    assert_numbers(entropy(logits_of(P)), 1.5 * LN2)
    assert_numbers(entropy(logits_of([1 / 3, 1 / 3, 1 / 3])), 1.0986122886681098)


@pytest.mark.parametrize(
    ("beta", "kl_clip", "expected"),
    [
        (0, 0.2, -0.17328679513998632 + 0.2 + 0.15204941554056164),  # the second term is bounded
        (0, 0.1, -0.17328679513998632 + 0.1 + 0.1),  # and the third; the sum may fall below zero
        (1, 0.2, 0.2 - 0.17328679513998632 - 0.10136627702704111),
        (0.5, 0.05, 0.05 + 0.021237379599424656 + 0.006292347984590274),
        (0.5, 1.0, 0.08776246415331415),  # nothing reaches the bound
    ],
)
def test_kl_clip_bounds_each_entry_before_the_sum(beta, kl_clip, expected) -> None:
    assert_numbers(divergence(logits_of(P), logits_of(Q), beta, kl_clip), expected)


# --- decomposition ------------------------------------------------------------------------------------------------


def test_decomposition() -> None:
    parts = decompose(logits_of(R, 1.5), logits_of(P, -2.0), logits_of(Q, 0.25))
    # student R, teacher P, reference-only Q
    ln23, ln34 = math.log(2 / 3), math.log(3 / 4)
    assert_numbers(parts.total, [LN2, 0.0, -LN2])
    assert_numbers(parts.ref, [-LN2, LN2, ln34])
    assert_numbers(parts.it, [2 * LN2, -LN2, ln23])
    torch.testing.assert_close(parts.total, parts.ref + parts.it, rtol=0, atol=1e-14)
    # <total, ref> = -ln2^2 - ln2 ln(3/4) = -0.28105; |total|^2 = 2 ln2^2; |ref|^2 = 2 ln2^2 + ln(3/4)^2 = 1.04367
    assert_numbers(parts.cos_total_ref, -0.2806451318302723, atol=1e-12)
    assert_numbers(parts.cos_total_it, 0.7908241898211624, atol=1e-12)
    assert_numbers(parts.norm_ratio_ref, 1.0421746796501141, atol=1e-12)
    # weighted by the student's (1/4, 1/4, 1/2): |total|^2 = 3/4 ln2^2, |ref|^2 = ln2^2/2 + ln(3/4)^2/2,
    # <total, ref> = -ln2^2/4 - ln2 ln(3/4)/2 = -0.02041
    assert_numbers(parts.mass_cos_total_ref, -0.06407231291280804, atol=1e-12)
    assert_numbers(parts.mass_cos_total_it, 0.7676221294681669, atol=1e-12)
    assert_numbers(parts.mass_norm_ratio_ref, 0.8840271963416948, atol=1e-12)


def test_decomposition_of_equal_distributions_is_finite() -> None:
    parts = decompose(*[random_logits(0, 4, 7)] * 3)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in vars(parts).values())


# --- losses and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "kl_clip", "grad"),
    [
        # forward KL: student - target
        (0, None, [3 / 8, -1 / 4, -1 / 8]),
        # reverse KL: P (ln P/Q - KL) with ln P/Q = (ln 4, -ln 2, ln 2/3) and KL = 0.41849
        (1, None, [0.48390012636348636, -0.27791032223821573, -0.20598980412527063]),
        # JSD: 1/2 P (ln P/m - KL(P || m)), ln P/m = (ln 8/5, ln 2/3, ln 4/5), KL(P || m) = 0.07785
        (0.5, None, [0.09803849486961534, -0.06041434473442984, -0.0376241501351855]),
        # forward KL, second term bounded at 0.2: P * (1/8 + 3/8) - (1/8, 0, 3/8)
        (0, 0.2, [1 / 8, 1 / 8, -1 / 4]),
    ],
)
def test_gradient_of_the_divergence(beta, kl_clip, grad) -> None:
    weights = torch.tensor([2.0])
    student, teacher = logits_of(P, 3.0)[None], logits_of(Q, -1.0)[None]
    result = evaluate(student, None, teacher, None, weights, target="teacher", beta=beta, kl_clip=kl_clip)
    assert_numbers(result.loss, 2 * divergence(logits_of(P), logits_of(Q), beta, kl_clip).item())
    assert_numbers(result.grad_logits[0], [2 * g for g in grad])
    assert_numbers(result.student_entropy, [1.5 * LN2])
    assert_numbers(result.kl_target_student, [0.32533621068054797])
    assert result.kl_target_base is None and result.clip_saturation is None


def test_gradient_reaches_hidden_states_weight_and_bias() -> None:
    # one hidden unit h = 2 and W = (1, -1, 1/2), b chosen so that the logits are log P: the gradient of forward KL
    # with respect to the logits is P - Q = (3/8, -1/4, -1/8)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    student = Head(weight, logits_of(P) - 2 * weight[:, 0].double())
    teacher = Head(torch.zeros(3, 1), logits_of(Q))
    hidden = torch.tensor([[2.0]])
    result = evaluate_hidden(hidden, student, None, hidden, None, teacher, torch.ones(1), target="teacher", beta=0)
    assert_numbers(result.grad_bias, [3 / 8, -1 / 4, -1 / 8])
    assert_numbers(result.grad_weight[:, 0], [3 / 4, -1 / 2, -1 / 4])
    assert_numbers(result.grad_hidden, [[3 / 8 + 1 / 4 - 1 / 16]])


def test_metrics_name_the_direction_of_each_kl() -> None:
    # target = teacher Q; student P; base P: both divergences are KL(Q || P) = 1/4 ln 2 + 3/8 ln 3/2, not KL(P || Q)
    student, teacher = logits_of(P)[None], logits_of(Q)[None]
    result = evaluate(student, student + 1.0, teacher, None, torch.ones(1), target="teacher")
    assert_numbers(result.kl_target_student, [0.32533621068054797])
    assert_numbers(result.kl_target_base, [0.32533621068054797])
    assert_numbers(result.target_entropy, [0.9743147528693494])  # 1/8 ln 8 + 1/2 ln 2 + 3/8 ln 8/3


def test_temperature_divides_all_four_logits() -> None:
    hidden = [random_logits(seed, 5, 3) for seed in range(4)]
    student_head, frozen_head = (Head(random_logits(seed, 11, 3), softcap=4.0) for seed in (4, 5))
    logits = [head.logits(h) / 2.5 for h, head in zip(hidden, [student_head, *[frozen_head] * 3], strict=True)]
    expected = evaluate(*logits, torch.ones(5))
    actual = evaluate_hidden(hidden[0], student_head, *hidden[1:], frozen_head, torch.ones(5), temperature=2.5)
    for name in ("loss", "per_token", "target_entropy", "kl_target_base", "clip_saturation"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=1e-15)


def test_head_applies_scale_then_softcap_then_temperature() -> None:
    head = Head(torch.tensor([[3.0], [-1.0]]), torch.tensor([1.0, 0.0]), scale=0.5, softcap=4.0)
    # z = (2 * 3 + 1, 2 * -1) / 2 = (3.5, -1); 4 tanh(z / 4); then divided by T = 2
    assert_numbers(head.logits(torch.tensor([2.0]), 2.0), [2 * math.tanh(3.5 / 4), -2 * math.tanh(1 / 4)])


def test_sampled_token_loss() -> None:
    # student P, base R, teacher P, reference-only R: target = P_0 * (2, 1, 1/2) = P again, so the advantage is 0;
    # with student R instead, at y = 0: log 1/2 - log 1/4 = ln 2 and -A log pi_theta = 2 ln2^2
    labels = torch.tensor([0, 2])
    student = logits_of(R).expand(2, 3)
    result = evaluate(
        student,
        logits_of(R).expand(2, 3),
        logits_of(P).expand(2, 3),
        logits_of(R).expand(2, 3),
        torch.tensor([1.0, 0.5]),
        loss_type="sampled_token",
        pmi_clip=None,
        labels=labels,
    )
    assert_numbers(result.advantage, [LN2, -LN2])
    assert_numbers(result.advantage_total, [LN2, -LN2])
    assert_numbers(result.advantage_ref, [0.0, 0.0])
    assert_numbers(result.advantage_it, [LN2, -LN2])
    assert_numbers(result.per_token, [2 * LN2**2, -(LN2**2)])
    assert_numbers(result.loss, 1.5 * LN2**2)
    # d(-A log pi(y)) / d logits = A (pi - onehot(y)), the advantage held constant
    assert_numbers(result.grad_logits[0], [-0.75 * LN2, 0.25 * LN2, 0.5 * LN2])
    assert_numbers(result.grad_logits[1], [-0.125 * LN2, -0.125 * LN2, 0.25 * LN2])


@pytest.mark.parametrize("loss_type", ["divergence", "sampled_token"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradient_equals_finite_differences(loss_type, softcap) -> None:
    tensors = [random_logits(seed, *shape, scale=1.0) for seed, shape in enumerate([(4, 3), (6, 3), (6,), (4, 3)])]
    hidden, weight, bias, base = tensors
    frozen = Head(random_logits(9, 6, 3, scale=1.0), None, 1.3, softcap)
    teacher, reference_only = random_logits(10, 4, 3), random_logits(11, 4, 3)
    weights, labels = torch.tensor([0.5, 0.0, 1.0, 0.25]), torch.tensor([0, 5, 2, 2])

    def run(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, advantage: torch.Tensor | None = None):
        head = Head(weight, bias, 0.7, softcap)
        result = evaluate_hidden(
            hidden, head, base, teacher, reference_only, frozen, weights,
            temperature=1.7, beta=0.3, pmi_clip=0.8, loss_type=loss_type, labels=labels,
        )  # fmt: skip
        if advantage is None or loss_type == "divergence":
            return result
        # differences see the surrogate with the advantage of the unperturbed student, as the gradient does
        log_p = result.per_token / -result.advantage
        return replace(result, loss=(weights.double() * -advantage * log_p).sum())

    result = run(hidden, weight, bias)
    inputs = {"grad_hidden": hidden, "grad_weight": weight, "grad_bias": bias}
    for position, (name, value) in enumerate(inputs.items()):
        numeric = torch.zeros_like(value)
        for index in range(value.numel()):
            step = torch.zeros_like(value)
            step.view(-1)[index] = 1e-5
            losses = []
            for sign in (1, -1):
                moved = [hidden, weight, bias]
                moved[position] = value + sign * step
                losses.append(run(*moved, result.advantage).loss)
            numeric.view(-1)[index] = (losses[0] - losses[1]) / 2e-5
        torch.testing.assert_close(getattr(result, name), numeric, rtol=1e-6, atol=1e-9)


# --- identities ---------------------------------------------------------------------------------------------------

ALL_BETAS = [0, 0.1, 0.5, 0.9, 1]


@pytest.mark.parametrize("pmi_center", [True, False])
def test_equal_teacher_and_reference_only_give_the_base(pmi_center) -> None:
    teacher, base = random_logits(0, 5, 11), random_logits(1, 5, 11)
    target = purified_target(teacher, teacher + 4.0, base, pmi_center=pmi_center)
    torch.testing.assert_close(target, log_probs(base), rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", ALL_BETAS)
def test_student_at_the_target_has_no_loss_and_no_gradient(beta) -> None:
    teacher, reference_only, base = (random_logits(seed, 5, 11) for seed in range(3))
    student = purified_target(teacher, reference_only, base) + 7.0
    result = evaluate(student, base, teacher, reference_only, torch.ones(5), beta=beta)
    torch.testing.assert_close(result.per_token, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(result.grad_logits, torch.zeros(5, 11, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("loss_type", ["divergence", "sampled_token"])
def test_adding_a_constant_to_any_logits_changes_nothing(which, loss_type) -> None:
    logits = [random_logits(seed, 5, 11) for seed in range(4)]
    shifted = list(logits)
    shifted[which] = shifted[which] + torch.tensor([3.0, -40.0, 0.5, 100.0, 0.0])[:, None]
    settings = {"loss_type": loss_type, "pmi_clip": 1.0, "labels": torch.tensor([0, 3, 10, 3, 1])}
    expected = evaluate(*logits, torch.ones(5), **settings)
    actual = evaluate(*shifted, torch.ones(5), **settings)
    for name, value in vars(expected).items():
        if value is not None:
            torch.testing.assert_close(getattr(actual, name), value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("pmi_beta", [0.5, 1.0, 2.0])
def test_without_clip_and_centring_the_target_has_a_closed_form(pmi_beta) -> None:
    teacher, reference_only, base = (random_logits(seed, 5, 11) for seed in range(3))
    target = purified_target(teacher, reference_only, base, pmi_beta=pmi_beta, pmi_clip=None, pmi_center=False)
    closed = base.softmax(-1) * (teacher.softmax(-1) / reference_only.softmax(-1)) ** (1 / pmi_beta)
    torch.testing.assert_close(target.exp(), closed / closed.sum(-1, keepdim=True), rtol=1e-12, atol=0)
    wide = purified_target(teacher, reference_only, base, pmi_beta=pmi_beta, pmi_clip=1e6, pmi_center=False)
    torch.testing.assert_close(wide, target, rtol=0, atol=1e-8)


def test_target_maximizes_reward_less_the_anchor() -> None:
    # Eq. 5: P_target is the argmax of E_P[Delta_it] - pmi_beta KL(P || P_0); its value is pmi_beta log Z
    teacher, reference_only, base = (random_logits(seed, 11, scale=1.0) for seed in range(3))
    target = purified_target(teacher, reference_only, base, pmi_beta=2.0, pmi_clip=None)
    reward = log_probs(teacher) - log_probs(reference_only)

    def value(log_p: torch.Tensor) -> float:
        return ((log_p.exp() * reward).sum() - 2.0 * kl(log_p, log_probs(base))).item()

    best = value(target)
    for seed in range(20):
        assert value(log_probs(target + random_logits(seed, 11, scale=0.05))) < best


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalized_jsd_is_bounded_and_swaps_its_arguments(beta) -> None:
    student, target = log_probs(random_logits(0, 50, 11)), log_probs(random_logits(1, 50, 11))
    value = divergence(student, target, beta)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (value > 0).all() and (value < bound).all()
    torch.testing.assert_close(value, divergence(target, student, 1 - beta), rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", ALL_BETAS)
def test_extreme_logits_stay_finite(beta) -> None:
    logits = [random_logits(seed, 6, 9, scale=300.0) for seed in range(4)]
    for settings in ({}, {"kl_clip": 0.05}, {"pmi_clip": None}):
        result = evaluate(*logits, torch.ones(6), beta=beta, **settings)
        assert all(value.isfinite().all() for value in vars(result).values() if value is not None)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_tokens_and_all_masked_give_a_finite_zero(rows) -> None:
    logits = [random_logits(seed, rows, 9) for seed in range(4)]
    result = evaluate(*logits, torch.zeros(rows))
    assert result.loss.item() == 0.0
    assert torch.equal(result.grad_logits, torch.zeros(rows, 9, dtype=torch.float64))
