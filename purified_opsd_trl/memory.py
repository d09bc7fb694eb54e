"""
What one optimizer step takes in memory, by arithmetic: without weights and without a GPU.

recipes/README.md has the formulas.
"""

from dataclasses import dataclass

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


def _phases(model: Model, step: Step, machine: Machine, loss_budget: int) -> dict[str, float]:
    """Bytes of the phases, of which one runs at a time."""
    rows, size = -(-step.rows // machine.gpus), machine.bytes_per_weight
    prompt, whole = step.question + step.completion, step.question + step.reference + step.completion
    scored = step.scoring_batch * whole
    if step.scoring_tokens:
        scored = min(scored, max(step.scoring_tokens, whole))
    scores = (2 if step.target == "purified" else 1) * rows * step.completion * model.hidden * size
    layer = (2 * model.intermediate + 4 * model.hidden) * size  # bytes per token while a layer runs without gradient
    # With checkpointing each layer keeps its input, and one layer is recomputed; without, about 17 values per unit
    per_token = (1.5 if step.checkpointing else 17.0) * model.layers * model.hidden * size
    return {
        "generation": 0.0 if step.vllm else rows * prompt * model.kv_per_token * size,
        "scoring": scored * layer + scores,
        "student": min(step.micro_batch, rows) * prompt * per_token + scores + loss_budget * 2**20,
    }
