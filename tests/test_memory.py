"""The memory estimate against tensors that exist, the settings that it recommends, and copies to host memory."""

import logging
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from purified_opsd_trl import PurifiedOPSDTrainer
from purified_opsd_trl.errors import InputError
from purified_opsd_trl.estimate import Machine, Model, Step, simulate
from purified_opsd_trl.memory import Kept, fitting, memory, stored_scores
from purified_opsd_trl.offload import HostCopies
from purified_opsd_trl.plan import Layout, Plan, warn_if_too_large
from tests.trainer_cases import Build, fixed_rollout, one_step


QWEN3_8B = Model(36, 4096, 32, 8, 128, 12288, 151936)
GB = 10**9
# Target, loss type, contexts scored, states stored, products with a frozen head per token
TARGETS = [
    ("purified", "divergence", 3, 2, 4),
    ("purified", "sampled_token", 3, 3, 5),
    ("teacher", "divergence", 1, 1, 3),
    ("gated", "divergence", 3, 3, 5),
    ("interpolated", "divergence", 2, 2, 4),
    ("contrastive", "divergence", 2, 2, 4),
]


def plan_of(trainer: PurifiedOPSDTrainer) -> Plan:
    weights = sum(p.numel() for p in trainer.model.parameters())
    return Plan(trainer.args, Layout(), trainer.model.config, weights, weights, weight_bytes=4.0)


class LivingStates(TorchDispatchMode):
    """Counts tensors `[B, C, H]` with memory of their own that are alive at once."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.most = shape, 0
        self.living: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and tuple(result.shape) == self.shape:
            self.living.append(weakref.ref(result))
        tensors = [one for ref in self.living if (one := ref()) is not None]
        self.most = max(self.most, len({one.data_ptr() for one in tensors}))
        self.living = [weakref.ref(one) for one in tensors]
        return result


@pytest.mark.parametrize(("target", "loss_type", "contexts", "states", "products"), TARGETS)
def test_stored_scores_take_the_bytes_that_were_counted(
    build: Build, target: str, loss_type: str, contexts: int, states: int, products: int
) -> None:
    trainer = build(target=target, loss_type=loss_type, per_device_train_batch_size=4, decomposition_steps=0)
    fixed_rollout(trainer, (8,) * 8)
    plan = plan_of(trainer)
    step, machine = replace(plan._step([0, 0]), completion=8), Machine(gpus=1, bytes_per_weight=4)
    hidden = trainer.model.config.hidden_size
    rows = [trainer.train_dataset[i] for i in range(4)]
    living = LivingStates((4, 8, hidden))
    with living:
        one_step(trainer, rows)
    kept = [value for name, value in trainer._buffered_inputs[0].items() if name.endswith("_hidden")]
    assert len(kept) == states == step.states and len(step.contexts) == contexts
    assert sum(value.nbytes for value in kept) == stored_scores(plan.model(), step, machine)
    assert {value.shape for value in kept} == {(4, 8, hidden)}
    del kept
    with living:  # the next step, beside what the last has left
        one_step(trainer, rows)
    # Eight sequences scored at once, rows trained on by themselves: scoring is the largest phase, the layer that runs
    # and the states
    step = replace(step, scoring_batch=8, train_tokens=1, trainable_head=False)
    counted = memory(plan.model(), step, machine, Kept(0, 0), loss_budget=0)["largest phase"]
    layer = 8 * 8 * (2 * plan.model().intermediate + 4 * hidden) * 4
    assert living.most * 4 * 8 * hidden * 4 == counted - layer
    costs = {cost.name: cost for cost in simulate(plan.model(), step, machine)}
    assert costs["loss"].flops == products * 2 * hidden * trainer.model.config.vocab_size * 4 * 8
    assert costs["scoring"].tokens == contexts * 4 * 8


# The settings of docs/long.md: LoRA of rank 64, four rows of 1,024 + C tokens, eight accumulation steps
LONG = Step(rows=32, question=1024, reference=4096, completion=32768, vllm=True, micro_batch=4, scoring_batch=4)


def total(step: Step, kept: Kept = Kept(QWEN3_8B.weights, QWEN3_8B.adapter(64))) -> float:  # noqa: B008
    return sum(memory(QWEN3_8B, step, Machine(gpus=1), kept).values())


def test_the_largest_budgets_that_fit() -> None:
    kept = Kept(QWEN3_8B.weights, QWEN3_8B.adapter(64))
    short = replace(LONG, completion=7168)

    def found(step: Step, available: float) -> dict[str, Any] | None:
        return fitting(QWEN3_8B, step, Machine(gpus=1), kept, 512, available)

    assert found(short, total(short)) == {}
    changes = found(short, total(short) - 1)
    assert changes is not None and changes.keys() == {"train_token_budget"}
    budget = changes["train_token_budget"]
    assert budget % 1024 == 0 and total(replace(short, train_tokens=budget)) <= total(short) - 1
    assert total(replace(short, train_tokens=budget + 1024)) > total(short) - 1

    changes = found(LONG, 40 * GB)  # the stored states alone are too much for it
    assert changes is not None and changes.keys() == {"offload_scores", "train_token_budget"}
    assert total(replace(LONG, offload=True, train_tokens=changes["train_token_budget"])) <= 40 * GB
    assert total(replace(LONG, scoring_tokens=1024, train_tokens=1)) > 40 * GB
    plain = replace(LONG, checkpointing=False)
    changes = found(plain, 60 * GB)
    assert changes is not None and changes["gradient_checkpointing"] is True
    assert found(LONG, 20 * GB) is None  # a single row is more


def test_a_scoring_budget_is_recommended_where_scoring_is_the_larger_phase() -> None:
    step = replace(LONG, completion=1024, scoring_batch=512)
    changes = fitting(QWEN3_8B, step, Machine(gpus=1), Kept(QWEN3_8B.weights, 0), 512, 40 * GB)
    assert changes is not None and changes.keys() == {"scoring_token_budget"}
    assert total(replace(step, scoring_tokens=changes["scoring_token_budget"]), Kept(QWEN3_8B.weights, 0)) <= 40 * GB


def test_chunks_hold_keys_and_values_of_the_sequence() -> None:
    whole, chunked = replace(LONG, scoring_batch=1, offload=True), replace(LONG, scoring_tokens=8192, offload=True)
    sizes = [total(replace(one, train_tokens=1, micro_batch=0)) for one in (whole, chunked)]
    length = 1024 + 4096 + 32768
    states, layer = 2 * 4096 * 2, (2 * 12288 + 4 * 4096) * 2
    cache = length * 2 * 36 * 8 * 128 * 2
    assert sizes[1] - sizes[0] == pytest.approx(cache - (length - 8192) * (layer + states))


def test_a_run_that_does_not_fit_is_told_what_would(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(per_device_train_batch_size=8, max_completion_length=8, loss_memory_budget=1)
    plan = plan_of(trainer)
    with caplog.at_level(logging.WARNING, logger="purified_opsd_trl.plan"):
        warn_if_too_large(trainer)
        assert not caplog.messages  # there is no GPU
        warn_if_too_large(trainer, 80 * GB)
        assert not caplog.messages
        prompts = [0, 0]
        for row in trainer.train_dataset:
            contexts = trainer.build_contexts(row)
            for i, prompt in enumerate((contexts.base, contexts.teacher)):
                ids = trainer.processing_class.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
                prompts[i] = max(prompts[i], len(ids))
        with pytest.raises(
            InputError, match="needs about .* but the GPU has 0.0 GB. Set `train_token_budget: "
        ) as error:
            plan.memory(prompts, int(_needed(plan, prompts)) - 1)
        warn_if_too_large(trainer, int(_needed(plan, prompts)) - 1)
        warn_if_too_large(trainer, 1)
    (first, second) = caplog.messages
    assert first == f"By estimate this run {error.value}"
    assert "Shard with `--accelerate_config`" in second


def _needed(plan: Plan, prompts: list[int]) -> float:
    counted = plan.model(), plan._step(prompts), plan._machine(), plan._kept(), plan.args.loss_memory_budget
    return sum(memory(*counted).values())


@pytest.mark.parametrize("way", [{}, {"train_token_budget": 150, "padding_free": "true"}])
def test_offloaded_scores_train_alike(build: Build, way: dict[str, Any]) -> None:
    gradients = []
    for offload in (False, True):
        trainer = build(offload_scores=offload, per_device_train_batch_size=4, decomposition_steps=1, **way)
        fixed_rollout(trainer)
        one_step(trainer, [trainer.train_dataset[i] for i in range(4)])
        gradients.append([p.grad for p in trainer.model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_copies_on_a_cpu_are_there_at_once() -> None:
    copies = HostCopies(torch.device("cpu"))
    source = torch.arange(6.0).view(2, 3)
    out = copies.zeros(2, 3, dtype=torch.float32)
    copies.to_host(source, out)
    source.zero_()
    copies.wait()
    assert torch.equal(out, torch.arange(6.0).view(2, 3))
    assert copies.to_device(out)() is out
