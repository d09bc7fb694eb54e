"""One step of the trainer against computations that start from token ids and share nothing with it."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from purified_opsd_trl import (
    Contexts,
    PurifiedOPSDTrainer,
)
from tests.trainer_cases import (
    CASES,
    LORA,
    WAYS,
    Build,
    assert_one_step,
    by_hand,
    completions_for,
    first_rows,
    fixed_rollout,
    move_student,
    one_step,
    weights_after_one_step,
)


@pytest.mark.parametrize("way", ["padded", "packed parts"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("case", CASES)
def test_training_step_equals_the_computation_by_hand(build: Build, case: str, lora: bool, way: str) -> None:
    fields = {"per_device_train_batch_size": 4, **CASES[case], **WAYS[way]}
    trainer = build(lora, **fields)
    initial = copy.deepcopy(trainer.model.unload() if lora else trainer.model)
    if lora:
        trainer = build(lora, **fields)
    move_student(trainer)
    fixed_rollout(trainer)
    rows = first_rows(trainer, 4)
    assert_one_step(trainer, rows, *by_hand(trainer, rows, completions_for(trainer, rows), initial))


@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite", "phi"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_every_kind_of_head_is_exact(build: Build, architecture: str, lora: bool) -> None:
    targets = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])} if lora else {}
    options = {"architecture": architecture, "trainer_kwargs": targets, "per_device_train_batch_size": 2}
    initial = build(**{**options, "trainer_kwargs": {}}).model
    trainer = build(**options)
    move_student(trainer)
    fixed_rollout(trainer)
    rows = first_rows(trainer, 2)
    assert_one_step(trainer, rows, *by_hand(trainer, rows, completions_for(trainer, rows), initial))


def test_qlora_equals_the_computation_by_hand(
    build: Build, make_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    # On a CPU with AVX-512-bf16, a forward in evaluation mode repacks the four bits in place, for a product that
    # computes in bf16 and has no backward. Every CPU is told that it is one, so that scoring must not repack anywhere.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model_dir = make_model_dir(hidden_size=64, intermediate_size=128)  # rows of whole blocks, which repacking asks for
    in_4_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    trainer = build(lora=True, trainer_kwargs={"model": str(model_dir), "quantization_config": in_4_bits})
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16  # TRL's choice; here it would hide errors of less than 1 %
            parameter.data = parameter.data.float()
    move_student(trainer)
    fixed_rollout(trainer)
    rows = first_rows(trainer, 2)

    # A model without quantization that holds what the four bits stand for, and a student of it with the same adapter
    initial = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    quantized = 0
    for name, module in trainer.model.get_base_model().named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            layer = initial.get_submodule(name.removesuffix(".base_layer"))
            assert not torch.equal(layer.weight, weight)
            layer.weight.data.copy_(weight)
            quantized += 1
    assert quantized == 7 * initial.config.num_hidden_layers  # every linear layer but the head
    student = get_peft_model(copy.deepcopy(initial), copy.deepcopy(LORA))
    set_peft_model_state_dict(student, get_peft_model_state_dict(trainer.model))
    twin: Any = SimpleNamespace(args=trainer.args, processing_class=trainer.processing_class, model=student)
    trainer.model.train()
    trainer.scoring_callback.score({"base": [[65, 66, 67]]}, [[97, 98, 99]])
    with torch.no_grad():
        trainer.model.eval()(input_ids=torch.tensor([[65]]))  # as `evaluate` runs it
    states = [m.weight.quant_state for m in trainer.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
    assert_one_step(trainer, rows, *by_hand(twin, rows, completions_for(trainer, rows), initial))


def test_gradient_accumulation_changes_nothing(build: Build) -> None:
    # unequal completion lengths: a mean of means would show
    whole = weights_after_one_step(build, per_device_train_batch_size=4)
    for size, steps in ((2, 2), (1, 4)):
        parts = weights_after_one_step(build, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        for name, weight in parts.items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "fields", [{"pad_to_multiple_of": 16}, {"scoring_batch_size": 5}, {"scoring_token_budget": 300}], ids=str
)
def test_padding_changes_nothing(build: Build, fields: dict[str, Any]) -> None:
    plain = weights_after_one_step(build, per_device_train_batch_size=4)
    padded = weights_after_one_step(build, per_device_train_batch_size=4, **fields)
    for name, weight in padded.items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_changes_nothing(build: Build) -> None:
    plain = weights_after_one_step(build, lora=True)
    checkpointed = weights_after_one_step(build, lora=True, gradient_checkpointing=True)
    for name, weight in checkpointed.items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_teacher_stays_as_it_was_and_has_no_optimizer_state(build: Build, lora: bool) -> None:
    trainer = build(lora)
    teacher = trainer.model if lora else trainer.scoring_callback.teacher_model
    frozen = {n: p for n, p in teacher.named_parameters() if not p.requires_grad}
    before = {name: parameter.clone() for name, parameter in frozen.items()}
    student_before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert frozen and all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(parameter) for parameter in frozen.values()}
    assert any(
        not torch.equal(p, student_before[n]) for n, p in trainer.model.named_parameters() if n in student_before
    )


def test_at_the_start_student_base_and_live_teacher_agree(build: Build) -> None:
    losses = []
    for kind in ("base", "live"):
        trainer = build(teacher_model_kind=kind)
        fixed_rollout(trainer)
        losses.append(one_step(trainer, first_rows(trainer, 2)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_equal_teacher_and_reference_only_contexts_leave_nothing_to_learn(build: Build) -> None:
    # Delta_it = 0 makes the target the base, which the untrained student is
    class SameContexts(PurifiedOPSDTrainer):
        def build_contexts(self, row):
            contexts = super().build_contexts(row)
            return Contexts(contexts.base, contexts.teacher, contexts.teacher)

    trainer = build(trainer_class=SameContexts, optim="sgd")  # Adam would blow rounding errors up to full steps
    trainer.train()
    assert all(abs(entry["loss"]) < 1e-6 for entry in trainer.state.log_history if "loss" in entry)
    assert all(abs(e["purification/kl_target_base"]) < 1e-6 for e in trainer.state.log_history if "loss" in e)


def test_target_logits_can_be_overridden(build: Build) -> None:
    class TowardsTheTeacher(PurifiedOPSDTrainer):
        def target_logits(self, teacher, reference_only, base):
            return teacher

    results = []
    for trainer in (build(trainer_class=TowardsTheTeacher), build(target="teacher")):
        move_student(trainer)
        fixed_rollout(trainer)
        results.append(one_step(trainer, first_rows(trainer, 2)))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_target_logits_default_is_the_fused_target(build: Build) -> None:
    class SameTarget(PurifiedOPSDTrainer):
        def target_logits(self, teacher, reference_only, base):
            return super().target_logits(teacher, reference_only, base)

    results = []
    for trainer in (build(trainer_class=SameTarget), build()):
        move_student(trainer)
        fixed_rollout(trainer)
        results.append(one_step(trainer, first_rows(trainer, 2)))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["base", "live"])
def test_dropout_is_off_while_scoring(build: Build, kind: str) -> None:
    # of the attention, which is a function, and of the adapter, which is a module and is in use under `live`
    config = LoraConfig(**{**LORA.to_dict(), "lora_dropout": 0.5, "init_lora_weights": False})
    trainer = build(
        teacher_model_kind=kind, model_kwargs={"attention_dropout": 0.5}, trainer_kwargs={"peft_config": config}
    )
    trainer.model.train()
    scores = [trainer.scoring_callback.score({"base": [[65, 66, 67]]}, [[97, 98, 99]]) for _ in range(2)]
    assert torch.equal(scores[0].hidden["base"], scores[1].hidden["base"])  # the same operations on the same shapes


def test_plain_opsd_scores_the_teacher_alone(build: Build) -> None:
    trainer = build(target="teacher", decomposition_steps=0, self_check=False)
    asked = []
    score = trainer.scoring_callback.score
    trainer.scoring_callback.score = lambda prompts, completions: (
        asked.append(set(prompts)) or score(prompts, completions)
    )
    trainer.train()
    assert asked == [{"teacher"}] * 2


def test_tool_results_carry_no_loss(build: Build) -> None:
    trainer = build()
    fixed_rollout(trainer)
    trainer.create_optimizer()
    inputs = trainer._generate_and_score_completions(first_rows(trainer, 2))
    kept = inputs["completion_mask"].clone()
    kept[:, 1::2] = 0
    masked = trainer._compute_loss(trainer.model, {**inputs, "tool_mask": kept}, None)
    direct = trainer._compute_loss(trainer.model, {**inputs, "completion_mask": inputs["completion_mask"]}, None)
    assert masked[2].item() == kept.sum().item() < direct[2].item()
    # the masked loss is that of the kept tokens alone
    per_token = [
        trainer._compute_loss(trainer.model, {**inputs, "tool_mask": one}, torch.tensor(1.0))[0]
        for one in (torch.nn.functional.one_hot(i, kept.numel()).view_as(kept) for i in kept.flatten().nonzero()[:, 0])
    ]
    assert masked[0].item() == pytest.approx(torch.stack(per_token).mean().item(), rel=1e-5)


def test_a_batch_without_any_token_has_a_finite_zero_loss_with_a_graph(build: Build) -> None:
    trainer = build()
    fixed_rollout(trainer)
    trainer.create_optimizer()
    inputs = trainer._generate_and_score_completions(first_rows(trainer, 2))
    nothing = {**inputs, "tool_mask": torch.zeros_like(inputs["completion_mask"])}
    loss, entropy, tokens = trainer._compute_loss(trainer.model, nothing, None)
    assert (loss.item(), entropy.item(), tokens.item()) == (0.0, 0.0, 0)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_bf16_runs_under_autocast(build: Build) -> None:
    seen = []

    class Spy(PurifiedOPSDTrainer):
        def run_inside(self, wrapped, unwrapped, function, *args):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().run_inside(wrapped, unwrapped, function, *args)

    trainer = build(lora=True, trainer_class=Spy, bf16=True)
    trainer.train()
    assert seen and all(seen)
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in trainer.state.log_history if "loss" in e)


def test_a_trainable_head_beside_lora_keeps_the_frozen_one(build: Build) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = build(trainer_kwargs={"peft_config": config})
    original = trainer.model.get_output_embeddings().original_module.weight.clone()
    trainer.train()
    head = trainer.model.get_output_embeddings()
    assert torch.equal(head.original_module.weight, original)
    assert not torch.equal(head.modules_to_save["default"].weight, original)
    assert torch.equal(trainer.scoring_callback.frozen_head(trainer.model).weight, original)


def test_mass_on_ids_that_the_tokenizer_lacks_is_logged_and_can_be_masked(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(model_kwargs={"vocab_size": 300})  # 26 more than the tokenizer has
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "purification/unused_vocab_mass" in entry]
    assert logged and all(1e-3 < entry["purification/unused_vocab_mass"] < 1 for entry in logged)
    assert "mask_unused_vocab: true" in caplog.text
    trainer = build(model_kwargs={"vocab_size": 300}, mask_unused_vocab=True)
    head = trainer.model.get_output_embeddings().weight.detach().clone()
    trainer.train()
    assert not any("purification/unused_vocab_mass" in entry for entry in trainer.state.log_history)
    moved = (trainer.model.get_output_embeddings().weight != head).any(dim=1)
    assert moved[:274].any() and not moved[274:].any()
