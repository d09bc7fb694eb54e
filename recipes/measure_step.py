"""
Compare steps of the trainer on this CPU with the estimates of `simulate_step.py`.

    python recipes/measure_step.py                        # two random models
    python recipes/measure_step.py --demo .cache/smollm2-135m-instruct   # and the demo's (`make demo` fetches it)

Steps run on one thread, with generation by transformers, and are timed in CPU time, which other processes disturb
less. The rates of matrix products and of reading memory are measured. Two numbers are fitted to the first step: the
overhead of a layer per decoding step, and the share of the product rate that a forward reaches. The other steps are
predictions.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


time.perf_counter = time.process_time  # before anything is imported that times itself

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from simulate_step import Machine, Model, Step, read_model, simulate  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer  # noqa: E402


@dataclass(frozen=True)
class Point:
    """A step to run: a model's folder, and the tokens of question, reference and completion."""

    name: str
    model: Path
    question: int
    reference: int
    completion: int


def write_model(folder: Path, layers: int, hidden: int, vocab: int) -> Path:
    """A random Qwen3 with a tokenizer of one token per word."""
    config = AutoConfig.for_model(
        "qwen3",
        **{"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": 64},
        **{"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "vocab_size": vocab},
        **{"max_position_embeddings": 8192, "tie_word_embeddings": True, "eos_token_id": 0, "pad_token_id": 0},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<end>": 0, "w": 1}, unk_token="w"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return folder


def rates(model: Model) -> Machine:
    """Rates of one thread of this machine, for matrix products as wide as the model's."""
    a, b = torch.randn(512, model.hidden), torch.randn(model.hidden, model.intermediate)
    flops = 2 * 512 * model.hidden * model.intermediate / _median(lambda: a @ b)
    memory = torch.randn(64 * 2**20)
    bandwidth = 4 * memory.numel() / _median(memory.sum)
    return Machine(
        gpus=1,
        flops=flops,
        utilization=1.0,
        bandwidth=bandwidth,
        decode_utilization=1.0,
        overhead=0.0,
        bytes_per_weight=4,
    )


def fit(model: Model, step: Step, machine: Machine, measured: dict[str, float]) -> tuple[float, float]:
    """Overhead of a layer in seconds, and utilization, from one measured step."""
    costs = {cost.name: cost for cost in simulate(model, step, machine)}
    overhead = (measured["generation"] - costs["generation"].seconds) / (step.completion * model.layers)
    return max(overhead, 0.0), costs["scoring"].flops / (machine.flops * measured["scoring"])


def _median(function: Any, repetitions: int = 15) -> float:
    times = []
    for _ in range(repetitions):
        started = time.process_time_ns()
        for _ in range(3):
            function()
        times.append((time.process_time_ns() - started) / 3e9)
    return max(sorted(times)[repetitions // 2], 1e-7)


def run(point: Point, rows: int = 4) -> tuple[dict[str, float], Step]:
    """Seconds of generation, scoring, and student with loss in the third step, and the step as it ran."""
    output = tempfile.mkdtemp()
    words = {"question": " ".join(["w"] * point.question), "reference": " ".join(["w"] * point.reference)}
    args = PurifiedOPSDConfig(
        output,
        **{"max_steps": 3, "per_device_train_batch_size": rows, "gradient_checkpointing": False, "use_cpu": True},
        **{"bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True},
        **{"max_completion_length": point.completion, "decomposition_steps": 0, "dataloader_pin_memory": False},
        generation_kwargs={"min_new_tokens": point.completion},
        teacher_prompt_template="{question} {reference}",
        reference_prompt_template="{reference}",
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = PurifiedOPSDTrainer(
        str(point.model),
        args,
        Dataset.from_list([{"prompt": words["question"], "reference": words["reference"]}] * 12),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    steps: list[float] = []
    training_step = trainer.training_step

    def timed(*arguments: Any, **keywords: Any) -> Any:
        started = time.process_time()
        result = training_step(*arguments, **keywords)
        steps.append(time.process_time() - started)
        return result

    trainer.training_step = timed  # type: ignore[method-assign]
    trainer.train()
    entry = [log for log in trainer.state.log_history if "loss" in log][-1]
    generation, scoring = entry["timing/generation_seconds"], entry["scoring/seconds"]
    measured = {"generation": generation, "scoring": scoring, "student + loss": steps[-1] - generation - scoring}
    tokenizer = trainer.processing_class
    question, reference = (len(tokenizer(words[name])["input_ids"]) for name in ("question", "reference"))
    step = Step(rows, question, reference, point.completion, checkpointing=False, micro_batch=rows, scoring_batch=rows)
    return measured, step


def main() -> None:
    """Prints measured and simulated seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=None, help="Folder of the demo's model.")
    demo = parser.parse_args().demo
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    small = write_model(folder / "small", layers=4, hidden=256, vocab=8192)
    wide = write_model(folder / "wide", layers=8, hidden=512, vocab=32768)
    points = [Point("small", small, 64, 128, 64), Point("small, long reference", small, 64, 1024, 64)]
    points += [Point("wide", wide, 64, 256, 64), Point("wide, long reference", wide, 64, 1024, 64)]
    if demo is not None:
        points.append(Point("SmolLM2-135M", demo, 64, 128, 32))
    fitted: tuple[float, float] | None = None
    print("| step | phase | measured, s | simulated, s | simulated / measured |\n|---|---|---|---|---|")
    for point in points:
        model = read_model(str(point.model))
        machine = rates(model)
        measured, step = run(point)
        if fitted is None:
            fitted = fit(model, step, machine, measured)
            print(f"(fitted: {fitted[0] * 1e3:.2f} ms per layer and decoding step, utilization {fitted[1]:.2f})")
        machine = replace(machine, overhead=fitted[0], utilization=fitted[1])
        costs = {cost.name: cost.seconds for cost in simulate(model, step, machine)}
        simulated = {name: costs[name] for name in ("generation", "scoring")}
        simulated["student + loss"] = costs["student"] + costs["loss"]
        measured["step"], simulated["step"] = sum(measured.values()), sum(simulated.values())
        for name, seconds in measured.items():
            ratio = simulated[name] / seconds
            print(f"| {point.name} | {name} | {seconds:.2f} | {simulated[name]:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
