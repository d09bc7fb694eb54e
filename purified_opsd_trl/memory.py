"""
What one optimizer step takes in memory, by arithmetic: without weights and without a GPU.

recipes/README.md has the formulas.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .estimate import Machine, Model, Step


@dataclass(frozen=True)
class Kept:
    """
    What training keeps of the model in memory.

    Attributes:
        weights, trainable (`int`):
            Number of weights, and of those that are trained: with LoRA the adapter's, which `weights` does not count.
        weight_bytes (`float`):
            Per weight: 2 in bf16, 4 in fp32, 0.5 in 4 bits.
        stage (`int`):
            ZeRO stage. 0 shards nothing, FSDP2 counts as 3.
        deepspeed (`bool`):
            Whether DeepSpeed keeps fp32 weights beside those in half precision.
        frozen_copy, average (`bool`):
            Whether a frozen copy exists, and an fp32 average of the trained weights.
    """

    weights: int
    trainable: int
    weight_bytes: float = 2.0
    stage: int = 0
    deepspeed: bool = False
    frozen_copy: bool = False
    average: bool = False


def memory(model: Model, step: Step, machine: Machine, kept: Kept, loss_budget: int = 512) -> dict[str, float]:
    """
    Peak memory of one GPU in training with Adam, without vLLM's share.

    Args:
        model ([`Model`]):
            The student.
        step ([`Step`]):
            Sizes and settings: the longest question and reference, not their means.
        machine ([`Machine`]):
            Number of GPUs, and bytes per activation as `bytes_per_weight`.
        kept ([`Kept`]):
            What is kept between phases, and how it is sharded.
        loss_budget (`int`, *optional*, defaults to `512`):
            `loss_memory_budget` in MiB.

    Returns:
        `dict[str, float]`: bytes by part; the largest phase is one of generation, scoring, and student with its loss.
    """
    share = [1 / machine.gpus if kept.stage >= least else 1.0 for least in (1, 2, 3)]
    if step.lora:  # a frozen base, and an adapter in fp32
        base, own, gradient, adam = kept.weight_bytes * kept.weights, 4.0, 4.0, 8.0
    elif kept.deepspeed:  # fp32 weights and two moments beside the half-precision weights and gradients
        base, own, gradient, adam = 0.0, 2.0, 2.0, 12.0
    else:
        base, own, gradient, adam = 0.0, kept.weight_bytes, kept.weight_bytes, 2 * kept.weight_bytes
    copied = 2.0 if kept.deepspeed else kept.weight_bytes
    size = machine.bytes_per_weight
    gathered = (model.body / model.layers + 2 * model.head) * size if kept.stage == 3 and machine.gpus > 1 else 0.0
    return {
        "weights": (base + own * kept.trainable) * share[2],
        "gradients": gradient * kept.trainable * share[1],
        "optimizer": adam * kept.trainable * share[0],
        "frozen copy": copied * kept.weights * share[2] if kept.frozen_copy else 0.0,
        "moving average": 4.0 * kept.trainable * share[2] if kept.average else 0.0,
        "gathered weights": gathered,
        "largest phase": max(_phases(model, step, machine, loss_budget).values()),
    }


def stored_scores(model: Model, step: Step, machine: Machine) -> int:
    """Bytes of the frozen states of one GPU's generation batch, from scoring until they are trained on."""
    return step.states * -(-step.rows // machine.gpus) * step.completion * model.hidden * machine.bytes_per_weight


def fitting(
    model: Model, step: Step, machine: Machine, kept: Kept, loss_budget: int, available: float
) -> dict[str, int | bool] | None:
    """
    Settings with which a step fits, as few changes as possible.

    Args:
        model ([`Model`]), step ([`Step`]), machine ([`Machine`]), kept ([`Kept`]), loss_budget (`int`):
            As in [`memory`].
        available (`float`):
            Bytes of a GPU that are there for training.

    Returns:
        `dict[str, int | bool]` or `None`: keys of the config with the largest budgets at which [`memory`] is at most
        `available`; empty if the step fits as it is, `None` if none of these settings is enough.
    """
    row, longest = step.question + step.completion, max(map(step.length, step.contexts))
    micro_batch = min(step.micro_batch, -(-step.rows // machine.gpus))

    def fits(**changes: Any) -> bool:
        return sum(memory(model, replace(step, **changes), machine, kept, loss_budget).values()) <= available

    for change in ({}, {"offload": True}, {"offload": True, "checkpointing": True}):
        for scoring in _budgets(step.scoring_tokens, step.scoring_batch * longest, longest):
            if fits(**change, scoring_tokens=scoring, train_tokens=1):  # a longer row is a part of its own
                budgets = _budgets(step.train_tokens, micro_batch * row, row)
                trained = next(n for n in budgets if fits(**change, scoring_tokens=scoring, train_tokens=n))
                found = {**change, "scoring_tokens": scoring, "train_tokens": trained}
                return {_KEYS[name]: value for name, value in found.items() if value != getattr(step, name)}
    return None


_KEYS = {"offload": "offload_scores", "checkpointing": "gradient_checkpointing"}
_KEYS |= {"scoring_tokens": "scoring_token_budget", "train_tokens": "train_token_budget"}


def _budgets(now: int, whole: int, least: int) -> Iterator[int]:
    """The budget as it is, then smaller ones in steps of 1,024 tokens down to the longest row."""
    yield now
    yield from range((min(now or whole, whole) - 1) // 1024 * 1024, least, -1024)
    if least < (now or whole):
        yield least


def _phases(model: Model, step: Step, machine: Machine, loss_budget: int) -> dict[str, float]:
    """Bytes of the phases, of which one runs at a time."""
    rows, size = -(-step.rows // machine.gpus), machine.bytes_per_weight
    row, longest = step.question + step.completion, max(map(step.length, step.contexts))
    scored, trained, cache = step.scoring_batch * longest, min(step.micro_batch, rows) * row, 0
    if step.scoring_tokens:
        scored = min(scored, step.scoring_tokens)
        cache = longest * model.kv_per_token * size if longest > step.scoring_tokens else 0  # it is run in chunks
    if step.train_tokens:
        trained = min(trained, max(step.train_tokens, row))
    layer = (2 * model.intermediate + 4 * model.hidden) * size  # bytes per token while a layer runs without gradient
    # With checkpointing each layer keeps its input, and one layer is recomputed; without, about 17 values per unit
    per_token = (1.5 if step.checkpointing else 17.0) * model.layers * model.hidden * size
    stored = stored_scores(model, step, machine)
    # The states of all contexts beside a difference of two; later TRL copies what is stored when it shuffles the rows
    most = max(len(step.contexts) + (step.states < len(step.contexts)), 2 * step.states)
    making = stored / step.states * most
    if step.offload:  # on the device are those of two scoring forwards, one of which is being copied
        stored, making = 0, 2 * scored * model.hidden * size
    picked = step.states * trained * model.hidden * size  # of the tokens of a part
    return {
        "generation": 0.0 if step.vllm else rows * row * model.kv_per_token * size,
        "scoring": scored * layer + cache + making,
        "student": trained * per_token + stored + picked + loss_budget * 2**20,
    }
