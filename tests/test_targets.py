"""Targets beyond the paper's: loss and gradient against their definitions, contexts, and the controls."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer, purified_target_logits
from purified_opsd_trl.errors import InputError
from purified_opsd_trl.kernels.settings import LossSettings
from purified_opsd_trl.loss import FrozenStates, required_states, token_loss
from purified_opsd_trl.references import OTHER_REFERENCE, other_rows
from purified_opsd_trl.targets import DENSE_TARGETS, DenseTarget
from tests import reference
from tests.loss_cases import Case, make_case, relative_error
from tests.trainer_cases import fixed_rollout, move_student


SETTINGS = {
    "gated": {"pmi_beta": 0.7, "pmi_clip": 2.0},
    "interpolated": {"interpolation_weight": 0.3},
    "contrastive": {"contrastive_alpha": 0.7, "contrastive_floor": -4.0, "contrastive_tau": 0.5},
}


def states_of(case: Case, settings: LossSettings) -> FrozenStates:
    """The case's third frozen states play the wrong reference as well."""
    third = case.reference_only
    all_states = {"base": case.base, "teacher": case.teacher, "reference_only": third, "wrong": third}
    return FrozenStates(**{name: all_states[name] for name in required_states(settings, True, False)})


def by_definition(case: Case, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, divergence per token, and gradients of hidden states and head weight, fp64 and dense."""
    hidden = case.hidden.double().requires_grad_()
    weight = case.head.weight.double().requires_grad_()
    head = reference.Head(weight, case.head.bias, case.head.scale, case.head.softcap)
    student = reference.log_probs(head.logits(hidden, settings.temperature))
    base, teacher, wrong = (
        case.frozen_head.logits(states, settings.temperature).detach()
        for states in (case.base, case.teacher, case.reference_only)
    )
    factor = torch.ones(len(hidden), dtype=torch.float64)
    if settings.target == "interpolated":
        target = reference.interpolated_target(base, teacher, settings.interpolation_weight)
    elif settings.target == "gated":
        target = reference.gated_target(base, teacher, wrong, settings.pmi_beta, settings.pmi_clip)
    else:
        a, f, t = settings.contrastive_alpha, settings.contrastive_floor, settings.contrastive_tau
        target, factor = reference.contrastive_target(teacher, wrong, a, f, t)
    per_token = reference.divergence(student, target, settings.beta)
    loss = (case.weights.double() * factor * per_token).sum()
    loss.backward()
    return loss.detach(), per_token.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("target", DENSE_TARGETS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "bias": True}, {"frozen_width": 11}], ids=str)
def test_loss_and_gradient(target: str, beta: float, head: dict[str, Any]) -> None:
    case = make_case(1000, **head)
    settings = LossSettings(target=target, beta=beta, temperature=1.2, loss_chunk_size=2, **SETTINGS[target])
    hidden, student = case.inputs()
    states = states_of(case, settings)
    result = token_loss(hidden, student, states, case.frozen(), case.weights, settings)
    result.loss.backward()
    loss, per_token, grad_hidden, grad_weight = by_definition(case, settings)
    torch.testing.assert_close(result.loss.double(), loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.per_token.double(), per_token, rtol=1e-9, atol=1e-9)
    assert relative_error(hidden.grad, grad_hidden) < 1e-9
    assert relative_error(student.weight.grad, grad_weight) < 1e-9


def test_the_weight_of_the_teacher_is_linear_in_the_steps(build: Callable[..., PurifiedOPSDTrainer]) -> None:
    """Each step's loss is the one of a run with that step's constant weight, from the same state."""

    def losses(**fields: Any) -> list[float]:
        trainer = build(target="interpolated", max_steps=3, learning_rate=0.0, shuffle_dataset=False, **fields)
        fixed_rollout(trainer)
        move_student(trainer)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found = losses(interpolation_weight=0.9, interpolation_weight_end=0.1)
    constant = [losses(interpolation_weight=weight)[step] for step, weight in enumerate((0.9, 0.5, 0.1))]
    assert found == pytest.approx(constant, rel=1e-6)
    assert len(set(constant)) == 3
    assert losses(interpolation_weight=0.9)[2] != pytest.approx(found[2], rel=1e-3)


def test_limits() -> None:
    case = make_case(1000)

    def per_token(target: str, **options: float) -> torch.Tensor:
        settings = LossSettings(target=target, **options)
        states = FrozenStates(teacher=case.teacher) if target == "teacher" else states_of(case, settings)
        return token_loss(case.hidden, case.inputs()[1], states, case.frozen(), case.weights, settings).per_token

    teacher = per_token("teacher")
    torch.testing.assert_close(per_token("interpolated", interpolation_weight=1.0), teacher)
    torch.testing.assert_close(per_token("contrastive", contrastive_alpha=0.0), teacher)
    towards_base = replace(case, teacher=case.base)
    settings = LossSettings(target="teacher")
    args = (case.inputs()[1], FrozenStates(teacher=towards_base.teacher), case.frozen(), case.weights, settings)
    torch.testing.assert_close(
        per_token("interpolated", interpolation_weight=0.0), token_loss(case.hidden, *args).per_token
    )


def test_the_gate_closes_where_the_probe_is_certain_and_opens_where_it_is_not() -> None:
    base, teacher = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"pmi_beta": 1.0, "pmi_clip": 10.0}
    gated = DENSE_TARGETS["gated"].logits
    certain = torch.full((1, 50), -40.0).index_fill_(1, torch.tensor([7]), 40.0)
    closed = gated(base=base, teacher=teacher, reference_only=certain, **options)
    torch.testing.assert_close(closed.softmax(-1), base.softmax(-1))
    flat = torch.zeros(1, 50)  # the largest probability is 1 / 50
    unclipped = gated(base=base, teacher=teacher, reference_only=flat, pmi_beta=1.0, pmi_clip=None)
    torch.testing.assert_close(unclipped.softmax(-1), (base + 0.98 * teacher).softmax(-1))


def test_the_same_reference_twice_carries_no_loss() -> None:
    case = make_case(1000)
    settings = LossSettings(target="contrastive")
    states = FrozenStates(teacher=case.teacher, wrong=case.teacher)
    assert abs(token_loss(case.hidden, case.inputs()[1], states, case.frozen(), case.weights, settings).loss) < 1e-12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "best"}, "`target`"),
        ({"interpolation_weight": 1.5}, "`interpolation_weight` must be a number from 0 to 1, got 1.5"),
        ({"contrastive_floor": 1.0}, "`contrastive_floor` must be a finite number up to 0, got 1.0"),
        ({"contrastive_alpha": -1.0}, "`contrastive_alpha` must be a number from 0, got -1.0"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LossSettings(**fields)


def test_another_target_takes_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    target = DenseTarget(("teacher",), ("temperature",), lambda *, teacher, temperature: teacher / temperature)
    monkeypatch.setitem(DENSE_TARGETS, "sharpened", target)
    case = make_case(1000)
    settings = PurifiedOPSDConfig("unused", target="sharpened", use_cpu=True, bf16=False).loss_settings
    states = states_of(case, settings)
    result = token_loss(case.hidden, case.inputs()[1], states, case.frozen(), case.weights, settings)
    plain = token_loss(case.hidden, case.inputs()[1], states, case.frozen(), case.weights, LossSettings("teacher"))
    torch.testing.assert_close(result.per_token, plain.per_token)  # temperature 1


def test_the_closed_form_case_of_other_public_code() -> None:
    """Its shapes, seed and settings: dense log-softmaxes, clip 10, beta 1 (docs/peers.md)."""
    torch.manual_seed(0)
    teacher, probe, base = (torch.randn(2, 3, 8) for _ in range(3))
    delta = teacher.log_softmax(-1) - probe.log_softmax(-1)
    delta = 10 * torch.tanh((delta - delta.mean(-1, keepdim=True)) / 10)
    expected = (base.log_softmax(-1) + delta).softmax(-1)
    torch.testing.assert_close(purified_target_logits(teacher, probe, base).softmax(-1), expected, rtol=0, atol=1e-5)


# In the trainer ------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": [{"role": "user", "content": f"question {n}"}], "reference": f"solution {n % 3}", "false": "no!"}
    for n in range(6)
]


@pytest.fixture
def build(tokenizer: Any, arguments: dict[str, Any], make_model: Callable[..., PreTrainedModel]) -> Callable[..., Any]:
    def make(rows: Any = ROWS, model: Any = None, **fields: Any) -> PurifiedOPSDTrainer:
        data = Dataset.from_list(rows) if isinstance(rows, list) else rows
        args = PurifiedOPSDConfig(**{**arguments, "max_steps": 1, **fields})
        return PurifiedOPSDTrainer(model or make_model(), args, data, processing_class=tokenizer)

    return make


def prompts_of(trainer: PurifiedOPSDTrainer) -> list[dict[str, str]]:
    """The last turn of each context, by row."""
    contexts = trainer.reader.contexts(list(trainer.train_dataset), "test")
    return [
        {name: value[-1]["content"] for name, value in vars(context).items() if value is not None}
        for context in contexts
    ]


@pytest.mark.parametrize("target", DENSE_TARGETS)
def test_a_step_with_each_target(build: Callable[..., Any], target: str) -> None:
    trainer = build(target=target)
    scored: list[set[str]] = []
    batches = trainer.scoring_batches
    trainer.scoring_batches = lambda prompts, *args: scored.append({*prompts}) or batches(prompts, *args)
    trainer.args.self_check, trainer.decomposition_monitor.every = False, 0
    trainer.train()
    assert scored == [{*DENSE_TARGETS[target].states}]
    assert trainer.state.log_history[0]["loss"] > 0


def test_the_wrong_reference_comes_from_another_row_or_a_column(build: Callable[..., Any]) -> None:
    for row, prompts in zip(ROWS, prompts_of(build(target="contrastive")), strict=True):
        assert row["reference"] in prompts["teacher"] and row["reference"] not in prompts["wrong"]
        assert "solution" in prompts["wrong"]
    trainer = build(target="contrastive", wrong_reference_column="false")
    assert OTHER_REFERENCE not in trainer.train_dataset.column_names
    assert all("no!" in prompts["wrong"] and "no!" not in prompts["teacher"] for prompts in prompts_of(trainer))


@pytest.mark.parametrize("target", ["purified", "teacher"])
def test_controls(build: Callable[..., Any], target: str) -> None:
    own, other, none = (prompts_of(build(target=target, reference_source=s)) for s in ("own", "other", "none"))
    for row, mine, theirs, empty in zip(ROWS, own, other, none, strict=True):
        for context in ("teacher", "reference_only"):
            assert row["reference"] in mine[context]
            assert "solution " in theirs[context] and row["reference"] not in theirs[context]
            assert mine[context].replace(row["reference"], "") == empty[context]
        assert mine["base"] == theirs["base"] == empty["base"]


def test_controls_are_drawn_with_the_seed(build: Callable[..., Any]) -> None:
    one, same, another = (
        build(reference_source="other", seed=seed).train_dataset[OTHER_REFERENCE][:] for seed in (1, 1, 2)
    )
    assert one == same != another


def test_a_step_with_each_control(build: Callable[..., Any]) -> None:
    losses = []
    for source in ("own", "other", "none"):
        trainer = build(reference_source=source)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert len(set(losses)) == 3


def test_other_rows() -> None:
    keys = [str(n) for n in range(50)]
    rows = other_rows(keys, seed=3)
    assert sorted(rows) == list(range(50)) and all(row != own for own, row in enumerate(rows))
    doubled = [str(n % 2) for n in range(10)]
    assert all(doubled[row] != doubled[own] for own, row in enumerate(other_rows(doubled, seed=0)))
    with pytest.raises(InputError, match="all rows have the same reference"):
        other_rows(["a", "a"], seed=0)


def test_what_cannot_be_drawn_is_refused(build: Callable[..., Any]) -> None:
    same = [{**row, "reference": "one"} for row in ROWS]
    with pytest.raises(InputError, match="train_dataset, column `reference`: .* all rows have the same reference"):
        build(rows=same, reference_source="other")
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    with pytest.raises(InputError, match="cannot be drawn from a stream"):
        build(rows=stream, reference_source="other")
    with pytest.raises(InputError, match="`target: contrastive` needs the row's own reference"):
        build(target="contrastive", reference_source="none")
