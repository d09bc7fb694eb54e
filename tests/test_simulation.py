"""The step simulator: what it counts against real models and torch's own count."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from recipes import simulate_step as simulation


def counted(model: Any, length: int, backward: bool = False) -> int:
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = model(input_ids=ids, use_cache=False)
        if backward:
            output.logits.sum().backward()
    return counter.get_total_flops()


def full_attention(model: Any, length: int) -> int:
    """FLOPs that torch counts for the half of the square above the diagonal."""
    return 2 * model.layers * model.heads * model.head_dim * length**2


def rotary(model: Any, length: int) -> int:
    """FLOPs of the angles, a product of positions and frequencies."""
    return model.head_dim * length


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_forward_flops(make_model_dir: Any, tied: bool) -> None:
    folder = make_model_dir(tied=tied)
    dimensions = simulation.read_model(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert dimensions.weights == matrices
    for length in (7, 32):
        expected = dimensions.forward(length) + full_attention(dimensions, length) + 2 * dimensions.head * length
        assert counted(model, length) == expected + rotary(dimensions, length)


def test_passes_of_a_student_step(make_model_dir: Any) -> None:
    # Of a full step: one forward, and twice as much backward; the head, which the loss pays for, set apart
    folder = make_model_dir()
    dimensions = simulation.read_model(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    head = 2 * dimensions.head * 32
    body = dimensions.forward(32) + full_attention(dimensions, 32)
    assert counted(model, 32, backward=True) == 3 * (body + head) + rotary(dimensions, 32)
    step = simulation.Step(rows=1, question=16, completion=16, lora=False, checkpointing=False)
    costs = {cost.name: cost for cost in simulation.simulate(dimensions, step, simulation.Machine(gpus=1))}
    assert costs["student"].flops == 3 * dimensions.forward(32)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6B", 0.596), ("1.7B", 1.72), ("4B", 4.02), ("8B", 8.19), ("32B", 32.8)],
)
def test_presets_have_the_published_sizes(name: str, billions: float) -> None:
    assert simulation.PRESETS[f"Qwen/Qwen3-{name}"].weights == pytest.approx(billions * 1e9, rel=0.01)


def test_a_preset_equals_a_model_of_its_config() -> None:
    preset = simulation.PRESETS["Qwen/Qwen3-0.6B"]
    config = AutoConfig.for_model(
        "qwen3",
        **{"num_hidden_layers": preset.layers, "hidden_size": preset.hidden, "num_attention_heads": preset.heads},
        **{"num_key_value_heads": preset.kv_heads, "head_dim": preset.head_dim, "vocab_size": preset.vocab},
        **{"intermediate_size": preset.intermediate, "tie_word_embeddings": preset.tied},
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert preset.weights == sum(p.numel() for p in model.parameters() if p.ndim == 2)


def test_phases_follow_their_definitions() -> None:
    model = simulation.PRESETS["Qwen/Qwen3-8B"]
    machine = simulation.Machine(gpus=8)
    step = simulation.Step(reference=4096)

    def costs(**changes: Any) -> dict[str, Any]:
        changed = dataclasses.replace(step, **changes)
        return {cost.name: cost for cost in simulation.simulate(model, changed, machine)}

    purified, plain, shared = costs(), costs(target="teacher"), costs(shared_prefix=True)
    # Two forwards fewer, and one product with the head fewer of four
    assert purified["scoring"].flops - plain["scoring"].flops == 4 * (
        model.forward(4096 + 1024) + model.forward(256 + 1024)
    )
    assert plain["loss"].flops == 0.75 * purified["loss"].flops
    assert purified["loss"].flops == 4 * 2 * 4096 * 151936 * 4 * 1024
    assert purified["scoring"].flops - shared["scoring"].flops == 4 * model.forward(4096)
    assert purified["generation"] == plain["generation"]
    # Each decoded token reads the weights once, whatever the number of rows
    tokens = 1024 * (model.body + model.head) * 2
    cache = 1024 * 4 * (256 + 512) * 2 * 36 * 8 * 128 * 2
    assert purified["generation"].bytes == tokens + cache


def test_sharding_and_gpus() -> None:
    model = simulation.PRESETS["Qwen/Qwen3-8B"]

    def seconds(**changes: Any) -> dict[str, float]:
        machine = simulation.Machine(**changes)
        return {cost.name: cost.seconds for cost in simulation.simulate(model, simulation.Step(), machine)}

    one, eight, uneven = seconds(gpus=1), seconds(gpus=8), seconds(gpus=31)
    assert eight["loss"] == pytest.approx(one["loss"] / 8)
    assert uneven["loss"] == pytest.approx(one["loss"] / 16)  # 32 rows on 31 GPUs: one has two
    slow_link = seconds(gpus=8, sharded=True, link=1e9)
    assert slow_link["scoring"] == pytest.approx(3 * 2 * model.weights * 7 / 8 / 1e9)
    assert seconds(gpus=8, tensor_parallel=8)["generation"] < 0.3 * eight["generation"]
    assert seconds(gpus=8, generation_gpus=1)["generation"] > eight["generation"]


def test_generation_ahead_overlaps_with_the_rest() -> None:
    model, step = simulation.PRESETS["Qwen/Qwen3-8B"], simulation.Step(reference=4096)
    machine = simulation.Machine(gpus=4, generation_gpus=4)
    ahead = dataclasses.replace(machine, ahead=True)
    after, during = simulation.simulate(model, step, machine), simulation.simulate(model, step, ahead)
    assert after[:4] == during[:4]
    rest = sum(cost.seconds for cost in during[1:])
    assert simulation.step_seconds(during, ahead) == max(during[0].seconds, rest) < during[0].seconds + rest
    assert simulation.step_seconds(after, machine) == pytest.approx(sum(cost.seconds for cost in after))
    # Of q, k, v, o and the three matrices of the MLP: inputs and outputs, times rank 64, 36 layers and 2 bytes
    sides = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 12288), (4096, 12288), (12288, 4096)]
    assert during[4].bytes == 2 * 36 * 64 * sum(a + b for a, b in sides)
    few = simulation.balance(model, dataclasses.replace(step, reference=16384), machine)
    assert few is not None
    for gpus, enough in ((few, True), (few - 1, False)):
        if gpus:
            costs = simulation.simulate(
                model, dataclasses.replace(step, reference=16384), dataclasses.replace(ahead, generation_gpus=gpus)
            )
            assert (costs[0].seconds <= sum(cost.seconds for cost in costs[1:])) == enough
    # A single long completion bounds the step however many servers there are
    assert simulation.balance(model, simulation.Step(completion=32768, reference=512), machine) is None


def test_the_command_prints_a_table_for_each_reference(capsys: pytest.CaptureFixture[str]) -> None:
    simulation.main(["--model", "Qwen/Qwen3-4B", "--gpus", "2", "--references", "512", "4096", "--no-checkpointing"])
    output = capsys.readouterr().out
    assert output.count("| step |") == 2 and "Reference of 4,096 tokens on 2 GPUs" in output
