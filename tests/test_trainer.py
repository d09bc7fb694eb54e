"""The trainer over several steps: data, learning, logs, resuming, what can be replaced."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from purified_opsd_trl import (
    InputError,
    TeacherScoringCallback,
)
from tests.trainer_cases import (
    Build,
    first_rows,
    fixed_rollout,
)


def sums(first: range) -> Dataset:
    """Additions with a worked solution."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {a} + {b}?"}],
                "reference": f"{a} + {b} = {a + b}. The answer is {a + b}.",
            }
            for a in first
            for b in range(10)
        ]
    )


def test_parts_of_text_reach_the_student_as_text(build: Build, make_tokenizer: Callable[..., Any]) -> None:
    # Qwen3's template renders a list of parts as nothing at all
    rows = [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}], "reference": "2"}] * 2
    options = {"train_dataset": Dataset.from_list(rows), "processing_class": make_tokenizer("qwen3")}
    trainer = build(trainer_kwargs=options)
    ids = trainer._generate_and_score_completions(first_rows(trainer, 2))["prompt_ids"][0]
    assert "1+1?" in trainer.processing_class.decode(ids)


def test_a_dataset_passed_to_evaluate_is_checked(build: Build) -> None:
    unseen = Dataset.from_list([{"prompt": [{"role": "user", "content": "q"}], "reference": "r" * 3000}] * 2)
    with pytest.raises(InputError, match="eval_dataset: 2 of 2 rows have a reference that is too long"):
        build().evaluate(eval_dataset=unseen)


def test_the_scoring_callback_can_be_replaced_and_sees_the_events(build: Build) -> None:
    class Recorder(TeacherScoringCallback):
        steps = 0
        contexts: set[str] = set()

        def score(self, prompt_ids, completion_ids):
            self.contexts |= set(prompt_ids)
            return super().score(prompt_ids, completion_ids)

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    recorder = Recorder()
    build(trainer_kwargs={"scoring_callback": recorder}).train()
    assert recorder.steps == 2
    assert recorder.contexts == {"base", "teacher", "reference_only"}


def test_no_token_of_the_reference_reaches_the_student(build: Build, conversational_dataset: Dataset) -> None:
    marked = conversational_dataset.map(lambda row: {"reference": "§§§" + row["reference"]})
    trainer = build(trainer_kwargs={"train_dataset": marked})
    output = trainer._generate_and_score_completions(first_rows(trainer, 4))
    marker = trainer.processing_class("§§§", add_special_tokens=False)["input_ids"]
    text = output["prompt_ids"].flatten().tolist()
    assert not any(text[i : i + len(marker)] == marker for i in range(len(text)))


def test_learning_lowers_the_held_out_divergence_from_the_target(build: Build) -> None:
    trainer = build(
        lora=True,
        max_steps=30,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=20,
        trainer_kwargs={"train_dataset": sums(range(0, 24)), "eval_dataset": sums(range(24, 26))},
    )
    trainer.evaluate()
    before = trainer.state.log_history[-1]
    trainer.train()
    trainer.evaluate()
    after = trainer.state.log_history[-1]
    for metric in ("eval_loss", "eval_purification/kl_target_student"):
        assert after[metric] < 0.8 * before[metric], metric


def test_metrics_reach_the_logs(build: Build) -> None:
    trainer = build()
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    for name in (
        "purification/clip_saturation",
        "purification/target_entropy",
        "purification/kl_target_base",
        "purification/kl_target_student",
        "scoring/seconds",
        "scoring/tokens_per_second",
        "scoring/padding_ratio",
        "timing/generation_seconds",
        "timing/loss_seconds",
        "entropy",
        "completions/mean_length",
    ):
        assert isinstance(entry[name], float), name
    assert entry["scoring/padding_ratio"] >= 1.0
    assert 0.0 <= entry["purification/clip_saturation"] <= 1.0


def test_metrics_are_means_over_tokens_not_over_micro_batches(build: Build) -> None:
    logs = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = build(
            max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps, shuffle_dataset=False
        )
        fixed_rollout(trainer)
        trainer.train()
        logs.append(next(e for e in trainer.state.log_history if "loss" in e))
    for name in logs[0]:
        if name.startswith("purification/"):
            assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name


def test_streamed_data_is_checked_as_it_arrives(build: Build, conversational_dataset: Dataset) -> None:
    rows = list(conversational_dataset)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    build(trainer_kwargs={"train_dataset": stream}).train()
    rows[0]["reference"] = " "
    broken = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(InputError, match="train_dataset, row 0, column `reference`: .*empty"):
        build(trainer_kwargs={"train_dataset": broken}, shuffle_dataset=False).train()


def test_the_model_card_cites_the_paper(build: Build) -> None:
    trainer = build(save_strategy="steps", save_steps=2)
    trainer.train()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "2607.02234" in card and "Purified OPSD" in card and "Zhanming Shen" in card


def test_resuming_continues_where_training_stopped(build: Build) -> None:
    straight = build(lora=True, max_steps=4, generation_kwargs={"do_sample": False})
    straight.train()
    build(lora=True, max_steps=4, generation_kwargs={"do_sample": False}, save_strategy="steps", save_steps=2).train()
    resumed = build(
        lora=True, max_steps=4, generation_kwargs={"do_sample": False}, save_strategy="steps", save_steps=2
    )
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for (name, weight), expected in zip(resumed.model.named_parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_a_checkpoint_of_another_trainer_can_be_resumed_and_saved(build: Build) -> None:
    build(max_steps=1, save_strategy="steps", save_steps=1).train()
    resumed = build(max_steps=2, save_strategy="steps", save_steps=1)
    folder = Path(resumed.args.output_dir)
    state_file = folder / "checkpoint-1" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    assert state["stateful_callbacks"].pop("ReportCallback") and state["stateful_callbacks"].pop("EpistemicMonitor")
    state_file.write_text(json.dumps(state))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    saved = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert {"ReportCallback", "EpistemicMonitor", "TrainerControl"} <= set(saved["stateful_callbacks"])


def test_no_telemetry_is_sent(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI")
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: pytest.fail("telemetry"))
    build()
