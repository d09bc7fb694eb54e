"""The trainer against computations that start from token ids and share nothing with it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import (
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainerCallback
from trl import DistillationConfig

from purified_opsd_trl import (
    Contexts,
    InputError,
    PurifiedOPSDConfig,
    PurifiedOPSDTrainer,
    TeacherScoringCallback,
)
from tests import reference


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")

Build = Callable[..., PurifiedOPSDTrainer]


@pytest.fixture
def build(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    conversational_dataset: Dataset,
    arguments: dict[str, Any],
) -> Build:
    """Factory of trainers on the tiny model; `lora=True` and any field of the config."""

    def make(
        lora: bool = False,
        architecture: str = "qwen3",
        trainer_class: type[PurifiedOPSDTrainer] = PurifiedOPSDTrainer,
        trainer_kwargs: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **fields: Any,
    ) -> PurifiedOPSDTrainer:
        return trainer_class(
            **{
                "model": make_model(architecture, **(model_kwargs or {})),
                "args": PurifiedOPSDConfig(**{**arguments, **fields}),
                "train_dataset": conversational_dataset,
                "processing_class": tokenizer,
                "peft_config": copy.deepcopy(LORA) if lora else None,
                **(trainer_kwargs or {}),
            }
        )

    return make


def move_student(trainer: PurifiedOPSDTrainer) -> None:
    """Takes the student away from the base, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def fixed_rollout(trainer: PurifiedOPSDTrainer, lengths: tuple[int, ...] = (7, 3, 5, 8, 1, 6, 2, 4)) -> None:
    """Replaces sampling by completions that depend on the prompt alone, of unequal lengths."""

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        completions = []
        for ids in prompt_ids:
            generator = torch.Generator().manual_seed(sum(ids))
            length = lengths[sum(ids) % len(lengths)]
            completions.append(torch.randint(97, 123, (length,), generator=generator).tolist())
        return completions

    trainer._generate_single_turn = generate  # type: ignore[method-assign]


def by_hand(
    trainer: PurifiedOPSDTrainer, rows: list[dict[str, Any]], completions: list[list[int]], initial: PreTrainedModel
) -> tuple[float, dict[str, torch.Tensor]]:
    """
    Loss and gradients of one batch in fp64 from token ids: separate forwards without padding, dense softmaxes.

    Knows the templates' text, not the code that fills them.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    student, frozen = copy.deepcopy(trainer.model).double().train(), copy.deepcopy(initial).double().eval()
    instruction = "Use the worked solution to understand the problem, then solve the problem yourself, step by step."
    losses, count = [], sum(len(completion) for completion in completions)
    for row, completion in zip(rows, completions, strict=True):
        shown = f"Worked solution of this problem:\n{row['reference']}\n\n{instruction}"
        system = [turn for turn in row["prompt"] if turn["role"] == "system"]
        question = row["prompt"][-1]["content"]
        contexts = {
            "base": row["prompt"],
            "teacher": [*row["prompt"][:-1], {"role": "user", "content": f"{question}\n\n{shown}"}],
            "reference_only": [*system, {"role": "user", "content": shown}],
        }

        def logits(model: Any, messages: list[dict[str, str]], completion: list[int] = completion) -> torch.Tensor:
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            ids = torch.tensor([prompt + completion])
            return model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / args.temperature

        with torch.no_grad():
            scored = {name: logits(frozen, messages) for name, messages in contexts.items()}
        result = reference.objective(
            logits(student, contexts["base"]),
            scored["base"],
            scored["teacher"],
            scored["reference_only"],
            torch.full((len(completion),), 1.0 / count),
            target=args.target,
            loss_type=args.loss_type,
            beta=args.beta,
            pmi_beta=args.pmi_beta,
            pmi_clip=args.pmi_clip,
            pmi_center=args.pmi_center,
            kl_clip=args.kl_clip,
            labels=torch.tensor(completion),
        )
        losses.append(result.loss)
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.requires_grad and p.grad is not None}


def one_step(trainer: PurifiedOPSDTrainer, rows: list[dict[str, Any]]) -> float:
    """One `training_step` outside `train()`: loss, with the gradients left on the parameters."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer.training_step(trainer.model, rows, None).item()


def assert_one_step(
    trainer: PurifiedOPSDTrainer, rows: list[dict[str, Any]], loss: float, grads: dict[str, torch.Tensor]
) -> None:
    """One step has this loss and these gradients, and no others."""
    assert one_step(trainer, rows) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    own = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad and p.grad is not None}
    assert own.keys() == grads.keys()
    scale = max(grad.abs().max().item() for grad in grads.values())
    for name, grad in own.items():
        torch.testing.assert_close(grad.double(), grads[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


def first_rows(trainer: PurifiedOPSDTrainer, count: int) -> list[dict[str, Any]]:
    return [trainer.train_dataset[i] for i in range(count)]


def completions_for(trainer: PurifiedOPSDTrainer, rows: list[dict[str, Any]]) -> list[list[int]]:
    prompts = trainer.processing_class.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return trainer._generate_single_turn(prompts, None, {})


CASES = {
    "purified": {},
    "forward_kl": {"beta": 0.0},
    "reverse_kl": {"beta": 1.0},
    "generalized_jsd": {"beta": 0.3, "pmi_beta": 2.0, "pmi_clip": 1.5},
    "teacher": {"target": "teacher"},
    "uncentred": {"pmi_center": False, "pmi_clip": 0.0},
    "temperature": {"temperature": 0.7},
    "kl_clip": {"kl_clip": 0.01},
    "sampled_token": {"loss_type": "sampled_token"},
    "sampled_token_teacher": {"loss_type": "sampled_token", "target": "teacher"},
    "chunks": {"loss_chunk_size": 3},
    "one_by_one": {"scoring_batch_size": 1},
}


# Rows have 40 to 120 tokens: the budget makes parts of one row and of several
PADDED = {"padding_free": "false"}
PACKED = {"padding_free": "true"}
PARTS = {"train_token_budget": 150}
WAYS = {"padded": PADDED, "packed": PACKED, "padded parts": PADDED | PARTS, "packed parts": PACKED | PARTS}
every_way = pytest.mark.parametrize("way", WAYS)


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


def weights_after_one_step(build: Build, **fields: Any) -> dict[str, torch.Tensor]:
    fields = {"max_steps": 1, "optim": "sgd", "shuffle_dataset": False, "max_grad_norm": 1e9, **fields}
    trainer = build(learning_rate=1.0, **fields)
    fixed_rollout(trainer)
    move_student(trainer)
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


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


def test_parts_of_text_reach_the_student_as_text(build: Build, make_tokenizer: Callable[..., Any]) -> None:
    # Qwen3's template renders a list of parts as nothing at all
    rows = [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}], "reference": "2"}] * 2
    options = {"train_dataset": Dataset.from_list(rows), "processing_class": make_tokenizer("qwen3")}
    trainer = build(trainer_kwargs=options)
    ids = trainer._generate_and_score_completions(first_rows(trainer, 2))["prompt_ids"][0]
    assert "1+1?" in trainer.processing_class.decode(ids)


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


def test_plain_opsd_scores_the_teacher_alone(build: Build) -> None:
    trainer = build(target="teacher", decomposition_steps=0, self_check=False)
    asked = []
    score = trainer.scoring_callback.score
    trainer.scoring_callback.score = lambda prompts, completions: (
        asked.append(set(prompts)) or score(prompts, completions)
    )
    trainer.train()
    assert asked == [{"teacher"}] * 2


def test_no_token_of_the_reference_reaches_the_student(build: Build, conversational_dataset: Dataset) -> None:
    marked = conversational_dataset.map(lambda row: {"reference": "§§§" + row["reference"]})
    trainer = build(trainer_kwargs={"train_dataset": marked})
    output = trainer._generate_and_score_completions(first_rows(trainer, 4))
    marker = trainer.processing_class("§§§", add_special_tokens=False)["input_ids"]
    text = output["prompt_ids"].flatten().tolist()
    assert not any(text[i : i + len(marker)] == marker for i in range(len(text)))


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


# Bad input ---------------------------------------------------------------------------------------------------------


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


def test_a_trainable_head_beside_lora_keeps_the_frozen_one(build: Build) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = build(trainer_kwargs={"peft_config": config})
    original = trainer.model.get_output_embeddings().original_module.weight.clone()
    trainer.train()
    head = trainer.model.get_output_embeddings()
    assert torch.equal(head.original_module.weight, original)
    assert not torch.equal(head.modules_to_save["default"].weight, original)
    assert torch.equal(trainer.scoring_callback.frozen_head(trainer.model).weight, original)


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
