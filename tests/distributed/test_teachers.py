"""Every kind of teacher on one process: what it scores with, how it follows the student, what a checkpoint keeps."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerCallback

from purified_opsd_trl import InputError, PurifiedOPSDConfig, PurifiedOPSDTrainer


Build = Callable[..., PurifiedOPSDTrainer]
PROMPTS = {
    "base": [[65, 66, 67], [68]],
    "teacher": [[65, 66, 67, 70, 71, 72], [68, 70, 71, 72, 73, 74, 75, 76]],
    "reference_only": [[70, 71, 72], [70, 71, 72, 73, 74, 75, 76]],
}
COMPLETIONS = [[97, 98, 99, 100], [101, 102]]


@pytest.fixture
def build(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    conversational_dataset: Dataset,
    arguments: dict[str, Any],
) -> Build:
    """Factory of trainers on the tiny model; `lora` and any field of the config."""

    def make(lora: bool = False, peft: dict[str, Any] | None = None, **fields: Any) -> PurifiedOPSDTrainer:
        torch.manual_seed(0)
        config = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **(peft or {})}
        return PurifiedOPSDTrainer(
            model=make_model(),
            args=PurifiedOPSDConfig(**{**arguments, "max_steps": 4, "learning_rate": 1e-2, **fields}),
            train_dataset=conversational_dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(**config) if lora else None,
        )

    return make


class Recorder(TrainerCallback):
    """The student's trained weights, in fp64, at the start and after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights.append({n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad})

    on_step_end = on_train_begin


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("rate", "every"), [(0.3, 1), (0.5, 2), (1.0, 1)])
def test_the_ema_teacher_scores_with_the_average(build: Build, lora: bool, rate: float, every: int) -> None:
    trainer = build(lora, teacher_model_kind="ema", teacher_update_rate=rate, teacher_sync_steps=every)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()

    average = recorder.weights[0]
    for step, weights in enumerate(recorder.weights[1:], start=1):
        if step % every == 0:
            average = {name: (1 - rate) * average[name] + rate * weights[name] for name in average}
    dense = copy.deepcopy(trainer.model).double().eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name in average:
                parameter.copy_(average[name])
    scores = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    for context, prompts in PROMPTS.items():
        for row, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                expected = torch.log_softmax(dense(input_ids=ids).logits[0, len(prompt) - 1 : -1], dim=-1)
            vocabulary = torch.arange(expected.shape[-1]).expand(2, 4, -1)
            found = scores.log_probs(vocabulary, context)[row, : len(completion)]
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    # away from the student, which moved on, unless it is copied each time
    name = next(iter(average))
    moved = (average[name] - recorder.weights[-1][name]).abs().max()
    assert moved == 0 if rate == 1.0 else moved > 1e-4  # 0 a + 1 w is w


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_scoring_with_the_average_leaves_the_student_alone(build: Build, lora: bool) -> None:
    trainer = build(lora, teacher_model_kind="ema", teacher_update_rate=0.1)
    trainer.train()
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()}
    trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    for name, parameter in trainer.model.named_parameters():
        # a copy put back
        assert torch.equal(parameter, before[name]) and parameter.requires_grad == flags[name], name


def test_the_average_is_kept_in_fp32(build: Build) -> None:
    # steps far below the resolution of bf16: a bf16 average would never move
    trainer = build(
        teacher_model_kind="ema", teacher_update_rate=0.01, learning_rate=1e-4, model_init_kwargs=None, max_steps=1
    )
    trainer.model.bfloat16()
    trainer.scoring_callback.teacher_model.bfloat16()
    callback = trainer.scoring_callback.ema
    callback.on_train_begin()
    start = {name: average.clone() for name, average in callback.averages.items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.01)
    for step in range(50):
        callback.on_step_end(trainer.args, SimpleNamespace(global_step=step), None)
    name = "model.embed_tokens.weight"
    student = trainer.model.get_input_embeddings().weight.float()
    expected = start[name] + (1 - 0.99**50) * (student - start[name])
    torch.testing.assert_close(callback.averages[name], expected, rtol=1e-5, atol=1e-6)
    teacher = trainer.scoring_callback.teacher_model.get_input_embeddings().weight
    # rounded from the average itself: `expected` may be on the other side of a rounding boundary
    assert torch.equal(teacher, callback.averages[name].bfloat16())
    assert not torch.equal(teacher, start[name].bfloat16())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_resuming_is_exact(build: Build, kind: str, lora: bool, tmp_path: Path) -> None:
    # rollouts are sampled, so the state of the random numbers matters; the rate is small, so that the average matters
    fields = {"teacher_model_kind": kind, "teacher_update_rate": 0.1, "save_strategy": "steps", "save_steps": 2}
    straight = build(lora, **fields)
    straight.train()
    checkpoint = Path(straight.args.output_dir) / "checkpoint-2"
    resumed = build(lora, **fields, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    for (name, weight), expected in zip(resumed.model.named_parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    assert (checkpoint / "ema_teacher.safetensors").is_file() == (kind == "ema")
    if kind == "ema":
        averages = straight.scoring_callback.ema.averages
        for name, average in resumed.scoring_callback.ema.averages.items():
            assert torch.equal(average, averages[name]), name
    if lora:
        assert not [folder for folder in checkpoint.iterdir() if folder.is_dir()]  # the student's adapter alone


def test_a_checkpoint_of_another_teacher_is_refused(build: Build) -> None:
    base = build(True, save_strategy="steps", save_steps=2, max_steps=2)
    base.train()
    with pytest.raises(InputError, match="is of another run: `teacher_model_kind` was 'base' and is 'ema'"):
        build(True, teacher_model_kind="ema").train(f"{base.args.output_dir}/checkpoint-2")
    ema = build(True, teacher_model_kind="ema", save_strategy="steps", save_steps=2, max_steps=2)
    ema.train()
    checkpoint = Path(ema.args.output_dir) / "checkpoint-2"
    save_file({"other": torch.zeros(1)}, checkpoint / "ema_teacher.safetensors")
    state = json.loads((checkpoint / "run_state.json").read_text())
    state["files"].pop("ema_teacher.safetensors")  # its size
    (checkpoint / "run_state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="holds other weights or shards"):
        build(True, teacher_model_kind="ema").train(f"{ema.args.output_dir}/checkpoint-2")


def test_an_instance_is_its_own_frozen_copy(build: Build) -> None:
    trainer = build()
    assert trainer.scoring_callback.teacher_model is not trainer.model
    pointers = {parameter.data_ptr() for parameter in trainer.model.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in trainer.scoring_callback.teacher_model.parameters()}


def test_a_trained_adapter_is_pointed_out(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(True, peft={"init_lora_weights": False})
    assert "already holds a trained adapter" in caplog.text


# Combinations that cannot work --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_model_kind": "ema", "teacher_model_name_or_path": "x"}, "`teacher_model_kind: ema` makes the stud"),
        ({"teacher_update_rate": 0.0}, "`teacher_update_rate` must be a number above 0 and at most 1, got 0.0"),
        ({"teacher_update_rate": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"teacher_sync_steps": 0}, "`teacher_sync_steps` must be an integer at least 1"),
    ],
    ids=str,
)
def test_settings_of_the_teacher_are_checked(arguments: dict[str, Any], fields: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PurifiedOPSDConfig(**{**arguments, **fields})


def test_an_averaged_head_beside_lora_is_refused(build: Build) -> None:
    with pytest.raises(InputError, match="output head is trained too .*`teacher_model_kind: base`"):
        build(True, peft={"modules_to_save": ["lm_head"]}, teacher_model_kind="ema")


def zero3(**zero: Any) -> Any:
    return SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": {"stage": 3, **zero}})


@pytest.mark.parametrize(
    ("kind", "state", "message"),
    [
        ("base", {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "Set `fsdp_version: 2`"),
        ("ema", {"deepspeed_plugin": zero3(offload_param={"device": "nvme"})}, "Set its `device` to `cpu`"),
        ("ema", {"deepspeed_plugin": zero3(zero_hpz_partition_size=8)}, "Remove these keys, or set `teacher_model"),
        ("ema", {"deepspeed_plugin": zero3(zero_quantized_weights=True)}, "Remove these keys"),
        (
            "base",
            {"parallelism_config": SimpleNamespace(cp_enabled=True, sp_enabled=False)},
            "complete sequences. Use",
        ),
    ],
    ids=["fsdp1", "nvme", "hpz", "quantized", "context_parallel"],
)
def test_ways_of_sharding_that_cannot_work_are_refused(
    build: Build, kind: str, state: dict[str, Any], message: str
) -> None:
    from purified_opsd_trl.self_teacher import check_combination

    trainer = build(teacher_model_kind=kind)
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(**{"deepspeed_plugin": None, **state}),
        parallelism_config=state.get("parallelism_config"),
    )
    with pytest.raises(InputError, match=message):
        check_combination(trainer, is_peft=False)


def test_a_sharded_instance_cannot_be_copied(build: Build) -> None:
    from purified_opsd_trl.self_teacher import load_frozen_copy

    trainer = build(teacher_model_kind="live")
    trainer.model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it has partitioned
    with pytest.raises(InputError, match="Pass the model id or path instead of the instance"):
        load_frozen_copy(trainer, None)
