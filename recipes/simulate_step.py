"""
Estimate what one optimizer step costs and where the time goes, by arithmetic: without weights and without a GPU.

    python recipes/simulate_step.py --model Qwen/Qwen3-8B --gpus 8 --flops 989e12 --bandwidth 3.35e12 --link 400e9 \
        --sharded --references 512 4096 16384
    python recipes/simulate_step.py --model Qwen/Qwen3-8B --gpus 4 --generation_gpus 4 --ahead

`--model` is a folder or hub id, whose config is read, or one of `PRESETS`. `purified-opsd check` does the same for a
recipe. docs/scaling.md has the error on measured steps.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from purified_opsd_trl.estimate import Cost, Machine, Model, Step, balance, simulate, step_seconds
from purified_opsd_trl.memory import Kept, memory


PRESETS = {
    "Qwen/Qwen3-0.6B": Model(28, 1024, 16, 8, 128, 3072, 151936, tied=True),
    "Qwen/Qwen3-1.7B": Model(28, 2048, 16, 8, 128, 6144, 151936, tied=True),
    "Qwen/Qwen3-4B": Model(36, 2560, 32, 8, 128, 9728, 151936, tied=True),
    "Qwen/Qwen3-8B": Model(36, 4096, 32, 8, 128, 12288, 151936),
    "Qwen/Qwen3-32B": Model(64, 5120, 64, 8, 128, 25600, 151936),
}


def read_model(name: str) -> Model:
    """
    Dimensions of a preset, folder or hub id.

    Args:
        name (`str`):
            A key of `PRESETS`, or what `AutoConfig` reads.

    Returns:
        [`Model`]
    """
    if name in PRESETS:
        return PRESETS[name]
    from transformers import AutoConfig

    return Model.of_config(AutoConfig.from_pretrained(name))


def table(costs: Sequence[Cost], total: float) -> str:
    """Markdown table of phases and of the step's `total` seconds."""
    lines = ["| phase | tokens / GPU | TFLOP / GPU | GB | seconds | share |", "|---|---|---|---|---|---|"]
    for cost in [*costs, Cost("step", 0, sum(c.flops for c in costs), 0.0, total)]:
        tokens = f"{cost.tokens:,.0f}" if cost.tokens else ""
        gigabytes = f"{cost.bytes / 1e9:,.1f}" if cost.bytes else ""
        lines.append(
            f"| {cost.name} | {tokens} | {cost.flops / 1e12:,.3g} | {gigabytes} | {cost.seconds:,.3g} | "
            f"{cost.seconds / total:.0%} |"
        )
    return "\n".join(lines)


def _add_fields(parser: argparse.ArgumentParser, kind: type) -> None:
    for field in fields(kind):
        option = f"--{field.name}"
        if isinstance(field.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(option, type=type(field.default), default=field.default)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one table per reference length."""
    parser = argparse.ArgumentParser(description="Estimate what one optimizer step costs.")
    parser.add_argument("--model", default="Qwen/Qwen3-8B", help=f"Folder, hub id, or one of {', '.join(PRESETS)}.")
    parser.add_argument(
        "--references", type=int, nargs="+", default=[512, 4096, 16384], help="Reference lengths in tokens."
    )
    parser.add_argument("--stage", type=int, default=0, help="ZeRO stage; FSDP2 is 3.")
    _add_fields(parser, Step)
    _add_fields(parser, Machine)
    values = vars(parser.parse_args(argv))
    model = read_model(values["model"])
    step = Step(**{name: values[name] for name in asdict(Step())})
    machine = Machine(**{name: values[name] for name in asdict(Machine())})
    trainable = model.adapter(step.rank) if step.lora else model.weights
    kept = Kept(model.weights, trainable, machine.bytes_per_weight, values["stage"], frozen_copy=not step.lora)
    for reference in values["references"]:
        sized = replace(step, reference=reference)
        print(f"\nReference of {reference:,} tokens on {machine.gpus} GPUs (estimate)\n")
        costs = simulate(model, sized, machine)
        print(table(costs, step_seconds(costs, machine)))
        if machine.ahead:
            servers = balance(model, sized, machine)
            needed = f"{servers} server GPUs" if servers else "no number of server GPUs"
            print(f"\n{needed} would write as fast as {machine.gpus} GPUs train")
        peak = sum(memory(model, sized, machine, kept).values()) / 1e9
        print(f"\nPeak memory per GPU: {peak:.1f} GB, without vLLM's share")


if __name__ == "__main__":
    main()
