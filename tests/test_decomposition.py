"""Decomposition statistics and their monitor against the oracle."""

import copy
import math
import statistics
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from purified_opsd_trl.head import LMHead
from purified_opsd_trl.markers import TOKEN_CLASSES
from purified_opsd_trl.monitoring.decomposition import (
    DECOMPOSITION_METRICS,
    STATISTICS,
    THIRDS,
    decomposition_stats,
)
from purified_opsd_trl.monitoring.metrics import TokenMeans
from tests import reference
from tests.trainer_cases import Build, fixed_rollout, move_student


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_statistics_equal_the_oracle(scale: float) -> None:
    student, teacher, reference_only = (scale * torch.randn(7, 501) for _ in range(3))
    stats, parts = decomposition_stats(student, teacher, reference_only)
    expected = reference.decompose(student, teacher, reference_only)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(stats, name).double(), getattr(expected, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.it.double(), expected.it, rtol=1e-5, atol=1e-4)


def test_statistics_in_fp64_are_those_of_the_oracle_to_the_last_digits() -> None:
    logits = [torch.randn(5, 99, dtype=torch.float64) for _ in range(3)]
    stats, _ = decomposition_stats(*logits)
    for name, value in stats._asdict().items():
        torch.testing.assert_close(value, getattr(reference.decompose(*logits), name), rtol=1e-12, atol=1e-12)


def test_known_cases_come_out_exact() -> None:
    student, other = torch.randn(4, 33), torch.randn(4, 33)
    for kind in ("", "mass_"):
        # The question adds nothing to the reference: the whole signal is the reference
        stats, parts = decomposition_stats(student, other, other)
        assert torch.allclose(getattr(stats, f"{kind}cos_total_ref"), torch.ones(4))
        assert torch.equal(getattr(stats, f"{kind}cos_total_it"), torch.zeros(4))
        assert torch.allclose(getattr(stats, f"{kind}norm_ratio_ref"), torch.ones(4))
        # The teacher does not heed the reference: no signal, and its two parts cancel
        stats, parts = decomposition_stats(student, student, other)
        assert torch.equal(parts.ref, -parts.it)  # a - b and b - a, of the same two tensors
        for name in set(STATISTICS) - {"norm_ref", "mass_norm_ref"}:
            assert torch.equal(getattr(stats, name), torch.zeros(4))
        # The probe is the student: the whole signal is transferable
        stats, _ = decomposition_stats(student, other, student)
        assert torch.allclose(getattr(stats, f"{kind}cos_total_it"), torch.ones(4))
        assert torch.equal(getattr(stats, f"{kind}norm_ratio_ref"), torch.zeros(4))


def test_the_tail_rules_the_plain_statistic_and_not_the_weighted_one() -> None:
    student = torch.zeros(1, 1002)
    student[0, :2] = 20.0  # two likely tokens, a thousand that are never said
    teacher, reference_only = student.clone(), student.clone()
    teacher[0, 0] += 2.0  # the question moves what is likely
    reference_only[0, 2:] += 3.0
    teacher[0, 2:] += 3.0  # the reference moves the tail
    stats, _ = decomposition_stats(student, teacher, reference_only)
    assert stats.cos_total_ref > 0.9 and stats.mass_cos_total_ref < 0.1


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"logit_scale": 0.6}, {"softcap": 3.0}, {"bias": True, "softcap": 2.0}]
)
def test_projected_logits_equal_the_oracle(options: dict[str, Any]) -> None:
    bias = torch.randn(55) if options.get("bias") else None
    weight, hidden = torch.randn(55, 16), torch.randn(9, 16)
    scale, softcap = options.get("logit_scale", 1.0), options.get("softcap")
    logits = LMHead(weight, bias, scale, softcap, temperature=0.7).logits(hidden)
    expected = reference.Head(weight, bias, scale, softcap).logits(hidden, 0.7)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


# Decomposition monitor in the trainer ------------------------------------------------------------------------------


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.entries.append(dict(logs))


def norms(values: torch.Tensor, weight: torch.Tensor | float) -> list[float]:
    return (weight * values.double() ** 2).sum(-1).sqrt().tolist()


def summaries_by_hand(student: torch.Tensor, parts: reference.Decomposition, chosen: list[int]) -> dict[str, float]:
    """What is reported of the chosen tokens, in fp64 from the definitions."""
    expected = {}
    mass = student.double().softmax(-1)
    for kind, weight in (("", torch.ones_like(mass)), ("mass_", mass)):
        total, ref, it = ([norms(x, weight)[i] for i in chosen] for x in (parts.total, parts.ref, parts.it))
        inner_ref = [(weight * parts.total * parts.ref).sum(-1)[i].item() for i in chosen]
        inner_it = [(weight * parts.total * parts.it).sum(-1)[i].item() for i in chosen]
        ratios = [r / t for r, t in zip(ref, total, strict=True)]
        cos_ref = [x / (t * r) for x, t, r in zip(inner_ref, total, ref, strict=True)]
        cos_it = [x / (t * i) for x, t, i in zip(inner_it, total, it, strict=True)]
        expected[f"{kind}cos_total_ref"] = statistics.fmean(cos_ref)
        expected[f"{kind}cos_total_it"] = statistics.fmean(cos_it)
        expected[f"{kind}norm_ratio_ref"] = sum(ref) / sum(total)
        expected[f"{kind}median_norm_ratio_ref"] = statistics.median(ratios)
        if not kind:
            expected["paper_norm_ratio_ref"] = statistics.fmean(ratios)
    return expected


def decomposition_by_hand(trainer: Any, initial: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What is reported of every token of the rows' completions, in fp64 from token ids, by metric name."""
    tokenizer = trainer.processing_class
    student, frozen = copy.deepcopy(trainer.model).double().eval(), copy.deepcopy(initial).double().eval()
    logits: dict[str, list[torch.Tensor]] = {"student": [], "teacher": [], "reference_only": []}
    groups: list[tuple[str, ...]] = []
    for row in rows:
        contexts = trainer.build_contexts(row)

        def ids(messages: Any) -> list[int]:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

        completion = trainer._generate_single_turn([ids(row["prompt"])], None, {})[0]
        prompts = (contexts.base, contexts.teacher, contexts.reference_only)
        for name, messages in zip(logits, prompts, strict=True):
            prompt = ids(messages)
            with torch.no_grad():
                model = student if name == "student" else frozen
                scores = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logits[name].append(scores / trainer.args.temperature)
        for position, token in enumerate(completion):
            kind = "digits/" if chr(token).isdigit() else "other/"
            groups.append(("", THIRDS[position * 3 // len(completion)] + "/", kind))
    joined = {name: torch.cat(values) for name, values in logits.items()}
    parts = reference.decompose(**joined)
    return {
        f"purification/{group}{name}": value
        for group in {group for token in groups for group in token}
        for name, value in summaries_by_hand(
            joined["student"], parts, [i for i, token in enumerate(groups) if group in token]
        ).items()
    }


@pytest.mark.parametrize("fields", [{}, {"target": "teacher"}, {"loss_memory_budget": 1, "temperature": 0.7}])
def test_the_monitor_equals_the_computation_by_hand(build: Build, fields: dict[str, Any]) -> None:  # noqa: F811
    trainer = build(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, shuffle_dataset=False, **fields
    )
    initial = copy.deepcopy(trainer.model)
    move_student(trainer)
    fixed_rollout(trainer)
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    seen: list[dict[str, Any]] = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.extend(inputs) or generate(inputs)
    logs = Logs()
    trainer.add_callback(logs)
    student = copy.deepcopy(trainer.model)
    trainer.train()
    trainer.model = student  # as it was when the step was measured
    expected = decomposition_by_hand(
        trainer, initial, [r for r in rows if any(r["prompt"] == s["prompt"] for s in seen)]
    )
    logged = {name: value for name, value in logs.entries[0].items() if name in DECOMPOSITION_METRICS}
    assert logged == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert "purification/mass_median_norm_ratio_ref" in logged and len(logged) >= 5 * 9


def test_one_token_without_signal_does_not_decide_the_ratio(build: Build) -> None:  # noqa: F811
    student = torch.randn(9, 50, dtype=torch.float64)
    teacher, reference_only = (student + torch.randn(9, 50, dtype=torch.float64) for _ in range(2))
    teacher[4] = student[4] + 1e-9 * torch.randn(50, dtype=torch.float64)  # teacher and student agree
    monitor = build().decomposition_monitor
    heads = [LMHead(torch.eye(50, dtype=torch.float64)) for _ in range(2)]
    inputs = {
        "decomposition_positions": torch.arange(9).unsqueeze(0),
        "decomposition_groups": torch.zeros(1, 9, 2, dtype=torch.long),
        "decomposition_teacher": teacher.unsqueeze(0),
        "decomposition_reference_only": reference_only.unsqueeze(0),
        "completion_ids": torch.zeros(1, 9, dtype=torch.long),
    }
    sampled = [name for name in inputs if name != "completion_ids"]
    means = TokenMeans()
    for part in (slice(0, 2), slice(2, 9)):  # two micro-batches of one step
        monitor.measure(student.unsqueeze(0), *heads, inputs | {name: inputs[name][:, part] for name in sampled})
        means.add(monitor.collect(Accelerator(cpu=True)))
    logged = means.flush()
    expected = summaries_by_hand(student, reference.decompose(student, teacher, reference_only), list(range(9)))
    for name, value in expected.items():
        assert logged[f"purification/{name}"] == pytest.approx(value, rel=1e-5), name
    assert logged["purification/paper_norm_ratio_ref"] > 1e6
    assert 0.5 < logged["purification/norm_ratio_ref"] < 2 and 0.5 < logged["purification/median_norm_ratio_ref"] < 2


def test_only_every_nth_step_is_measured(build: Build) -> None:  # noqa: F811
    trainer = build(max_steps=5, decomposition_steps=2)
    logs = Logs()
    trainer.add_callback(logs)
    trainer.train()
    measured = ["purification/cos_total_ref" in entry for entry in logs.entries[:5]]
    assert measured == [True, False, True, False, True]
    trainer = build(max_steps=2, decomposition_steps=0)
    trainer.add_callback(logs := Logs())
    trainer.train()
    assert not any("purification/cos_total_ref" in entry for entry in logs.entries)


def test_monitoring_changes_no_training(build: Build) -> None:  # noqa: F811
    weights = []
    for steps in (0, 1):
        trainer = build(lora=True, decomposition_steps=steps, max_steps=3)
        trainer.train()
        weights.append({n: p.clone() for n, p in trainer.model.named_parameters()})
    # the same operations on the same shapes: the monitor adds some, and draws from a generator of its own
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_sample_is_bounded_seeded_and_uniform(build: Build) -> None:  # noqa: F811
    trainer = build(per_device_train_batch_size=4, decomposition_max_tokens=5)
    monitor = trainer.decomposition_monitor
    hidden = torch.arange(4 * 8).reshape(4, 8, 1).float()
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1, 3:] = False
    scores = type("Scores", (), {})()
    scores.hidden, scores.completion_mask = {"teacher": hidden, "reference_only": -hidden}, mask
    ids = torch.full((4, 8), ord("x"))
    hits = torch.zeros(4, 8)
    for step in range(400):
        monitor.step, monitor.due = step, True
        sampled = monitor.sample(scores, ids, mask.long(), process=0, total=int(mask.sum()))
        again = monitor.sample(scores, ids, mask.long(), process=0, total=int(mask.sum()))
        positions = sampled["decomposition_positions"]
        assert torch.equal(positions, again["decomposition_positions"])
        assert (positions >= 0).sum() == 5
        rows, slots = (positions >= 0).nonzero(as_tuple=True)
        columns = positions[rows, slots]
        assert torch.equal(sampled["decomposition_teacher"][rows, slots], hidden[rows, columns])
        hits[rows, columns] += 1
    assert not hits[~mask].any()
    expected = 400 * 5 / mask.sum()
    assert (hits[mask] - expected).abs().max() < 5 * math.sqrt(expected)


def test_thirds_and_classes(build: Build) -> None:  # noqa: F811
    trainer = build()
    monitor = trainer.decomposition_monitor
    text = "Wait, 12! a"
    ids = torch.tensor([list(text.encode())])
    scores = type("Scores", (), {})()
    scores.hidden = dict.fromkeys(("teacher", "reference_only"), torch.zeros(1, len(text), 1))
    scores.completion_mask = torch.ones(1, len(text), dtype=torch.bool)
    monitor.due = True
    sampled = monitor.sample(scores, ids, torch.ones(1, len(text)), process=0, total=len(text))
    thirds, kinds = sampled["decomposition_groups"][0].T.tolist()
    assert thirds == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert [TOKEN_CLASSES[k] for k in kinds] == ["epistemic"] * 4 + ["other"] * 2 + ["digits"] * 2 + ["other"] * 3
