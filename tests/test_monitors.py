"""Decomposition and epistemic monitors against the oracle and against counts made by hand."""

import copy
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from purified_opsd_trl.head import LMHead
from purified_opsd_trl.markers import (
    DEFAULT_MARKERS,
    TOKEN_CLASSES,
    MarkerCounter,
    TokenClassifier,
    distinct,
    has_answer,
)
from purified_opsd_trl.monitoring.decomposition import (
    DECOMPOSITION_METRICS,
    STATISTICS,
    THIRDS,
    decomposition_stats,
)
from purified_opsd_trl.monitoring.epistemic import EpistemicMonitor, MarkerSums, RateGuard
from tests import reference
from tests.conftest import free_port
from tests.test_trainer import Build, build, fixed_rollout, move_student  # noqa: F401  # `build` is a fixture


# Statistics --------------------------------------------------------------------------------------------------------


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
        for name in STATISTICS:
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


def decomposition_by_hand(trainer: Any, initial: Any, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Statistics of every token of the rows' completions, in fp64 from token ids, by metric name."""
    tokenizer = trainer.processing_class
    student, frozen = copy.deepcopy(trainer.model).double().eval(), copy.deepcopy(initial).double().eval()
    values: dict[str, list[float]] = {name: [] for name in DECOMPOSITION_METRICS}
    for row in rows:
        contexts = trainer.build_contexts(row)

        def ids(messages: Any) -> list[int]:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

        completion = trainer._generate_single_turn([ids(row["prompt"])], None, {})[0]

        @torch.no_grad()
        def logits(model: Any, messages: Any, completion: list[int] = completion) -> torch.Tensor:
            prompt = ids(messages)
            scores = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            return scores / trainer.args.temperature

        expected = reference.decompose(
            logits(student, contexts.base),
            logits(frozen, contexts.teacher),
            logits(frozen, contexts.reference_only),
        )
        for position, token in enumerate(completion):
            third = THIRDS[position * 3 // len(completion)]
            kind = "digits" if chr(token).isdigit() else "other"
            for name in STATISTICS:
                value = getattr(expected, name)[position].item()
                for group in ("", f"{third}/", f"{kind}/"):
                    values[f"purification/{group}{name}"].append(value)
    return values


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
    trainer.model = student  # as it was when the step was looked at
    expected = decomposition_by_hand(
        trainer, initial, [r for r in rows if any(r["prompt"] == s["prompt"] for s in seen)]
    )
    logged = logs.entries[0]
    for name, values in expected.items():
        if values:
            assert logged[name] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-5), name
        else:
            assert name not in logged


def test_only_the_due_steps_are_looked_at_and_the_rest_costs_nothing(build: Build) -> None:  # noqa: F811
    trainer = build(max_steps=5, decomposition_steps=2)
    logs = Logs()
    trainer.add_callback(logs)
    trainer.train()
    looked = ["purification/cos_total_ref" in entry for entry in logs.entries[:5]]
    assert looked == [True, False, True, False, True]
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


def test_the_per_token_table_is_kept_with_the_completions(build: Build) -> None:  # noqa: F811
    trainer = build(max_steps=1, log_completions=True, decomposition_max_tokens=6)
    trainer.train()
    frame = pd.read_parquet(Path(trainer.args.output_dir, "completions", "tokens_00001.parquet"))
    assert len(frame) == 6
    assert set(frame.columns) == {"step", "token", "class", "third", "delta_total", "delta_ref", "delta_it"}
    assert (frame["delta_total"] - frame["delta_ref"] - frame["delta_it"]).abs().max() < 1e-4


def test_the_per_token_table_reaches_wandb(
    build: Build,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = build(max_steps=1, log_completions=True, decomposition_max_tokens=6, report_to="wandb")
    trainer.train()
    wandb.finish()
    (table,) = tmp_path.rglob("token_decomposition*.json")
    content = json.loads(table.read_text())
    assert len(content["data"]) == 6 and "delta_it" in content["columns"]


def test_trackio_gets_the_numbers_and_the_table(
    build: Build,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    trainer = build(
        max_steps=1, log_completions=True, decomposition_max_tokens=6, report_to="trackio", run_name="one", project="p"
    )
    trainer.train()
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("p", "one")
    logged = trainer.state.log_history[0]
    numbers = {name: value for entry in logs for name, value in entry.items()}
    for name in ("purification/mass_cos_total_ref", "epistemic/total_per_1k"):
        assert numbers[f"train/{name}"] == pytest.approx(logged[name], rel=1e-6)
    assert "token_decomposition" in numbers


# Markers -----------------------------------------------------------------------------------------------------------

TRICKY = [
    ("Wait, wait! WAIT? await waiting waiter", {"wait": 3}),
    ("\n\nWait—that is wrong.\tWait", {"wait": 2}),
    ("wait...wait", {"wait": 2}),
    ("\\check{x} is an accent, check $x$.", {"check": 1}),
    ("checked, checks, re-check, check_sum, Check:", {"check": 2}),
    ("Hmm, Hmmmm. hm", {"hmm": 2}),
    ("May be maybe MAYBE", {"maybe": 2}),
    ("Perhaps_not perhaps2 (perhaps)", {"perhaps": 1}),
    ("Actually, factually; alternatively", {"actually": 1, "alternatively": 1}),
    ("等等wait一下", {"wait": 1}),
    ("Éwait waité", {}),
    ("**Wait** <think>Wait</think>", {"wait": 2}),
    ("", {}),
]


@pytest.mark.parametrize(("text", "expected"), TRICKY, ids=lambda value: value[:12] if isinstance(value, str) else "")
def test_markers_are_counted_as_words(text: str, expected: dict[str, int]) -> None:
    assert MarkerCounter().count(text) == dict.fromkeys(DEFAULT_MARKERS, 0) | expected


def test_phrases_and_other_scripts_can_be_markers() -> None:
    counter = MarkerCounter(["wait", "Wait a moment", "等等"])
    assert counter.count("wait  a\nmoment, wait, 等等等等") == {"wait": 1, "wait a moment": 1, "等等": 2}


def sentencepiece_like(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """A Llama-2-style tokenizer: `▁` for spaces, and a decoder that drops the first one."""
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=vocabulary[0])


def test_token_classes_do_not_depend_on_the_tokenizer(tokenizer: Any) -> None:
    pieces = ["<unk>", "▁a", "a", "▁W", "ait", "▁Wait", "▁await", ",", "▁12", "3x", "▁\n"]
    split = sentencepiece_like(pieces)
    classifier = TokenClassifier(split, MarkerCounter())

    def classes(*tokens: str) -> list[str]:
        ids = [pieces.index(token) for token in tokens]
        return [TOKEN_CLASSES[kind] for kind in classifier.classify(ids)]

    assert classes("▁W", "ait", ",", "▁12", "3x") == ["epistemic", "epistemic", "other", "digits", "other"]
    assert classes("▁Wait", "▁await", "▁Wait") == ["epistemic", "other", "epistemic"]
    assert classes("▁a", "ait", "▁W", "▁a") == ["other", "other", "other", "other"]
    by_byte = TokenClassifier(tokenizer, MarkerCounter())
    ids = list("é wait 7".encode())
    assert [TOKEN_CLASSES[k] for k in by_byte.classify(ids)] == ["other"] * 3 + ["epistemic"] * 4 + ["other", "digits"]


def test_answers_and_repetition() -> None:
    answered = ["so \\boxed{4}", "#### 12", "The answer is 5.", "**Answer:** 3"]
    assert all(has_answer(text) for text in answered)
    assert not any(has_answer(text) for text in ["", "\\boxed{}", "I wonder", "####", "the answer"])
    assert distinct([1, 2, 1, 2, 1], 2) == 0.5
    assert distinct([7], 2) == 1.0
    assert distinct([1, 2, 3, 4], 2) == 1.0


# Epistemic monitor -------------------------------------------------------------------------------------------------


def test_rates_are_totals_over_all_tokens() -> None:
    monitor = EpistemicMonitor(DEFAULT_MARKERS)
    texts = ["Wait. Maybe 4.", "no markers \\boxed{4}", ""]
    ids = [list(range(10)), [1] * 30, []]
    metrics = monitor.observe(texts, ids, Accelerator(cpu=True), training=True)
    values = {name: total / number for name, (total, number) in metrics.items()}
    assert values["epistemic/wait_per_1k"] == values["epistemic/maybe_per_1k"] == 25.0
    assert values["epistemic/total_per_1k"] == values["epistemic/paper_per_1k"] == 50.0
    assert values["epistemic/hmm_per_1k"] == 0.0
    assert values["completions/answer_rate"] == pytest.approx(1 / 3)
    assert values["completions/distinct_2"] == pytest.approx((1 + 1 / 29 + 1) / 3)


def sums(rate: float, completions: int = 200, length: int = 500, seed: int = 0) -> MarkerSums:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.full((completions, 1), rate * length, dtype=torch.float64), generator=generator)
    return MarkerSums.of(counts, torch.full((completions,), float(length), dtype=torch.float64))


def test_sums_add_up_and_survive_packing() -> None:
    one, two = sums(0.01, seed=1), sums(0.02, seed=2)
    both = one + two
    assert both.completions == 400 and both.tokens == 200_000
    assert torch.equal(both.counts, one.counts + two.counts)
    assert torch.equal(MarkerSums.unpacked(both.packed(), 1).packed(), both.packed())


def test_the_standard_error_of_a_rate_is_that_of_repeated_draws() -> None:
    rates = [sums(0.01, completions=50, seed=seed).rate(0)[0] for seed in range(400)]
    _, variance = sums(0.01, completions=50, seed=1000).rate(0)
    assert math.sqrt(variance) == pytest.approx(torch.tensor(rates).std().item(), rel=0.2)


@pytest.mark.parametrize(
    ("rate", "side"), [(0.01, None), (0.007, None), (0.002, "below"), (0.0, "below"), (0.014, None), (0.04, "above")]
)
def test_the_guard_sees_collapse_and_explosion(rate: float, side: str | None) -> None:
    guard = RateGuard(["wait"], band=2.0, window=3)
    guard.update(sums(0.01))
    alarms = [alarm for step in range(5) for alarm in guard.update(sums(rate, seed=step))]
    assert guard.outside.get("wait") == side
    assert len(alarms) == (side is not None)  # once, not every step


def test_one_degenerate_completion_is_no_explosion() -> None:
    guard = RateGuard(["wait"], band=2.0, window=1)
    guard.update(sums(0.01))
    ordinary = sums(0.01, completions=31)
    loop = MarkerSums.of(torch.tensor([[500.0]], dtype=torch.float64), torch.tensor([500.0], dtype=torch.float64))
    assert guard.update(ordinary + loop) == []


def test_an_alarm_comes_again_after_the_rate_was_back_inside() -> None:
    guard = RateGuard(["wait"], band=2.0, window=1)
    found = [bool(guard.update(sums(rate, seed=i))) for i, rate in enumerate([0.01, 0.001, 0.001, 0.01, 0.001])]
    assert found == [False, True, False, False, True]


def speak(trainer: Any, text_by_step: dict[int, str]) -> None:
    """Every completion of a step is the given text."""

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        step = max(s for s in text_by_step if s <= trainer.state.global_step)
        return [list(text_by_step[step].encode()) for _ in prompt_ids]

    trainer._generate_single_turn = generate


THOUGHTFUL = "Wait, is it 4? Wait. Maybe 5. " * 8
TERSE = "It is 4, as one can see here. " * 8
GUARDED = {"max_completion_length": 256, "per_device_train_batch_size": 4, "epistemic_window": 1, "max_steps": 4}


@pytest.mark.parametrize("guard", ["warn", "stop", "ignore"])
def test_the_guard_in_a_run(build: Build, guard: str, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    trainer = build(epistemic_guard=guard, save_strategy="no", **GUARDED)
    speak(trainer, {0: THOUGHTFUL, 2: TERSE})
    with caplog.at_level(logging.WARNING, logger="purified_opsd_trl.monitors"):
        trainer.train()
    warned = [r.getMessage() for r in caplog.records if "has collapsed" in r.getMessage()]
    assert len(warned) == (0 if guard == "ignore" else 2)  # wait and maybe
    assert trainer.state.global_step == (3 if guard == "stop" else 4)
    assert Path(trainer.args.output_dir, "checkpoint-3").is_dir() == (guard == "stop")
    history = [e["epistemic/wait_per_1k"] for e in trainer.state.log_history if "epistemic/wait_per_1k" in e]
    assert history[0] == pytest.approx(1000 * 16 / 240) and history[2] == 0.0


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_keeps_its_baseline(build: Build, restore: bool, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    options = {**GUARDED, "save_strategy": "steps", "save_steps": 2}
    options["restore_callback_states_from_checkpoint"] = restore
    first = build(**{**options, "max_steps": 2})
    speak(first, {0: THOUGHTFUL})
    first.train()
    resumed = build(**options)
    speak(resumed, {0: TERSE})
    with caplog.at_level(logging.WARNING, logger="purified_opsd_trl.monitors"):
        resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir, "checkpoint-2")))
    assert [r.getMessage() for r in caplog.records if "`wait` has collapsed" in r.getMessage()]
    saved = json.loads(Path(first.args.output_dir, "checkpoint-2", "trainer_state.json").read_text())
    baseline = saved["stateful_callbacks"]["EpistemicMonitor"]["attributes"]["saved_rates"]["baseline"]
    assert baseline[1] == 4 * 240  # tokens


WORKER = """
import json, os, sys, torch
from datasets import Dataset
from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer
from tests.test_trainer import fixed_rollout, move_student
torch.set_num_threads(1)
model, folder, batch = sys.argv[1:]
rows = [{"prompt": f"What is {i} + {i * i}" + " now" * i + "?", "reference": f"It is {i + i * i}."} for i in range(8)]
args = PurifiedOPSDConfig(
    folder, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    save_strategy="no", logging_steps=1, max_steps=2, per_device_train_batch_size=int(batch),
    max_completion_length=8, decomposition_steps=1, shuffle_dataset=False, model_init_kwargs={"dtype": "float32"},
)
trainer = PurifiedOPSDTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows))
assert trainer.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
move_student(trainer)
fixed_rollout(trainer)
trainer.train()
if trainer.accelerator.is_main_process:
    print("LOGS" + json.dumps(trainer.state.log_history))
if trainer.accelerator.num_processes > 1:
    torch.distributed.destroy_process_group()
"""


def logs_of(model_dir: Path, folder: Path, processes: int) -> list[dict[str, Any]]:
    port = free_port()
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    if processes > 1:
        env |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, str(model_dir), str(folder), str(4 // processes)]
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} if processes > 1 else {} for r in range(processes)]
    running = [
        subprocess.Popen(command, env=env | rank, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    outputs = [process.communicate(timeout=400) for process in running]
    assert all(process.returncode == 0 for process in running), outputs[0][1][-3000:]
    return json.loads(outputs[0][0].split("LOGS")[1].splitlines()[0])


@pytest.mark.slow
def test_two_processes_report_the_means_of_one(model_dir: Path, tmp_path: Path) -> None:
    alone, together = (logs_of(model_dir, tmp_path / str(n), n)[0] for n in (1, 2))
    shared = [name for name in alone if name.startswith(("purification/", "epistemic/", "completions/"))]
    assert len(shared) > 40
    for name in shared:
        assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


def test_tensorboard_gets_the_same_numbers(build: Build) -> None:  # noqa: F811
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = build(max_steps=1, report_to="tensorboard")
    trainer.train()
    (events,) = Path(trainer.args.output_dir).rglob("events.out.tfevents.*")
    reader = accumulator.EventAccumulator(str(events))
    reader.Reload()
    logged = trainer.state.log_history[0]
    for name in ("purification/mass_cos_total_ref", "epistemic/total_per_1k", "completions/distinct_2"):
        assert reader.Scalars(f"train/{name}")[0].value == pytest.approx(logged[name], rel=1e-6)


def test_tool_results_are_not_counted(build: Build) -> None:  # noqa: F811
    trainer = build()
    ids = torch.tensor([list(b"Wait. Wait.")])
    tool_mask = torch.tensor([[1] * 5 + [0] * 6])
    output = {"completion_ids": ids, "completion_mask": torch.ones_like(ids), "tool_mask": tool_mask}
    trainer._observe([{"prompt": "x"}], output, "train")
    assert trainer._token_means["train"].flush()["epistemic/wait_per_1k"] == 200.0
