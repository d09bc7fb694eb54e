"""What the trainer refuses, and what it stops at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import (
    LoraConfig,
    PromptTuningConfig,
)
from transformers import TrainerCallback
from trl import DistillationConfig

from purified_opsd_trl import (
    InputError,
    PurifiedOPSDConfig,
)
from tests.trainer_cases import (
    Build,
)


def test_non_finite_scores_stop_with_step_row_and_context(build: Build) -> None:
    trainer = build(max_steps=3, save_strategy="steps", save_steps=1)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.scoring_callback.teacher_model.lm_head.weight.data[:] = 0.0
                trainer.scoring_callback.teacher_model.model.norm.weight.data[0] = float("nan")

    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=r"Step 1: .* row 0 under the base context"):
        trainer.train()
    assert (Path(trainer.args.output_dir) / "checkpoint-1" / "model.safetensors").is_file()


def test_arguments_of_another_trainer_are_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a PurifiedOPSDConfig, got DistillationConfig"):
        build(trainer_kwargs={"args": DistillationConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True)})


def test_a_completion_longer_than_the_context_is_refused(build: Build) -> None:
    with pytest.raises(InputError, match=r"`max_completion_length` \(2048 tokens\) leaves no room .* 2048 tokens"):
        build(max_completion_length=2048)


def test_another_vocabulary_is_refused(build: Build, make_model_dir: Callable[..., Path]) -> None:
    other = make_model_dir(vocab_size=300)
    with pytest.raises(InputError, match="vocabulary of 274 tokens but the teacher has 300"):
        build(teacher_model_name_or_path=str(other), teacher_model_init_kwargs={"dtype": "float32"})


def test_another_teacher_of_the_same_vocabulary_is_used(build: Build, make_model_dir: Callable[..., Path]) -> None:
    other = make_model_dir(seed=5, hidden_size=64)
    trainer = build(lora=True, teacher_model_name_or_path=str(other))
    assert trainer.scoring_callback.teacher_model.config.hidden_size == 64
    trainer.train()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"init_lora_weights": "pissa"}, "`init_lora_weights='pissa'` .* not the initial policy"),
        # PEFT knows it from 0.19 on, and refuses it before
        ({"init_lora_weights": "lora_ga"}, "`init_lora_weights='lora_ga'` .* not the initial|Unknown .*lora_ga"),
        ({"bias": "lora_only"}, "`bias='lora_only'` .* trains biases"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
    ids=["pissa", "lora_ga", "bias", "lm_head"],
)
def test_adapters_that_hide_the_initial_policy_are_refused(build: Build, lora: dict[str, Any], message: str) -> None:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **lora})
    with pytest.raises(ValueError, match=message):
        build(trainer_kwargs={"peft_config": config})


def test_prompt_learning_is_refused(build: Build) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="Prompt-learning PEFT methods"):
        build(trainer_kwargs={"peft_config": config})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "pmi"}, "`target` must be one of purified, teacher, contrastive, gated, interpolated, got 'pmi'"),
        ({"pmi_beta": 0.0}, "`pmi_beta` must be a number above 0, got 0.0"),
        ({"pmi_clip": -1.0}, "`pmi_clip` must be a number at least 0 or null, got -1.0"),
        (
            {"teacher_prompt_template": "{question}"},
            "`teacher_prompt_template` must hold .*{question} and {reference}",
        ),
        ({"reference_prompt_template": "{question} {reference}"}, "`reference_prompt_template` must hold"),
        ({"teacher_model_kind": "live", "teacher_model_name_or_path": "x"}, "cannot be combined"),
        ({"loss_chunk_size": 0}, "`loss_chunk_size` must be an integer at least 1 or null, got 0"),
        ({"decomposition_steps": -1}, "`decomposition_steps` must be an integer at least 0, got -1"),
        ({"decomposition_max_tokens": 0}, "`decomposition_max_tokens` must be an integer at least 1, got 0"),
        ({"epistemic_window": 0}, "`epistemic_window` must be an integer at least 1, got 0"),
        ({"epistemic_band": 1.0}, "`epistemic_band` must be a number above 1, got 1.0"),
        ({"epistemic_markers": ["wait", " "]}, "`epistemic_markers` must list at least one word"),
        ({"epistemic_guard": "halt"}, "`epistemic_guard` must be one of 'warn', 'stop', 'ignore', got 'halt'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused_by_name(arguments: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PurifiedOPSDConfig(**{**arguments, **fields})


def test_the_config_survives_a_round_trip(arguments: dict[str, Any]) -> None:
    config = PurifiedOPSDConfig(**arguments, teacher_chat_template_kwargs='{"enable_thinking": false}', pmi_clip=0.0)
    assert config.teacher_chat_template_kwargs == {"enable_thinking": False}
    assert config.pmi_clip is None
    assert json.loads(config.to_json_string())["target"] == "purified"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_model_init_kwargs": {"dtype": "float32"}}, "`teacher_model_init_kwargs` has no effect without"),
        ({"teacher_model_revision": "main"}, "`teacher_model_revision` has no effect without"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "`num_return_sequences` must be 1"),
        ({"trainer_kwargs": {"teacher_model": "a/teacher"}}, "set `teacher_model_name_or_path` in the config"),
    ],
    ids=["init_kwargs", "revision", "num_return_sequences", "teacher_model"],
)
def test_arguments_that_a_self_teacher_cannot_honor(build: Build, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**fields)
