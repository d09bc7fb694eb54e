"""
`purified-opsd bench pipeline`: the same training with 0, 1, 2, ... batches ahead, against a running `vllm serve`.

The prediction comes from the run without batches ahead: a step takes the longer of its generation and of all the rest.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from ..config import PurifiedOPSDConfig
from ..errors import InputError
from ..extras import require_extra
from ..trainer import PurifiedOPSDTrainer
from . import measure
from .measure import option


@dataclass
class PipelineArguments(measure.BenchArguments):
    """Time training with rollouts ahead against a running vLLM server."""

    model_name_or_path: str = option("Qwen/Qwen3-0.6B", "Model that the server serves.")
    dtype: str = option("float32", "Dtype of the model.")
    servers: list[str] = option(["http://127.0.0.1:8000"], "Addresses of servers.")
    ahead: list[int] = option([0, 1, 2], "Values of rollouts_ahead, one run each, the first of them 0.")
    steps: int = option(12, "Optimizer steps of a run. The first and last few, when the pipeline fills, do not count.")
    per_device_train_batch_size: int = option(4, "Rows of a step.")
    completion_length: int = option(64, "Tokens of a completion; it does not end before.")
    reference_length: int = option(64, "Words of a reference.")
    lora_r: int = option(16, "Rank of LoRA on all linear layers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ahead or self.ahead[0] != 0 or min(self.ahead) < 0:
            raise InputError(f"`ahead` must begin with 0, what the others are compared with, got {self.ahead}.")
        if self.steps < 2 * max(self.ahead) + 2:
            raise InputError(
                f"`steps` must be at least {2 * max(self.ahead) + 2} with `ahead` up to {max(self.ahead)}."
            )


class _StepTimes(TrainerCallback):
    """When each step ended; the first entry is the beginning of training."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Training begins."""
        self.ends = [time.perf_counter()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has made its step."""
        self.ends.append(time.perf_counter())


def train(args: PipelineArguments, ahead: int, folder: Path, on_cpu: bool) -> dict[str, float]:
    """Means over the steps of a run in which the pipeline is full: seconds of a step, and of waiting in it."""
    from peft import LoraConfig

    config = PurifiedOPSDConfig(
        str(folder / str(ahead)),
        use_vllm=True,
        vllm_mode="server",
        vllm_adapter_sync=True,
        vllm_server_base_url=args.servers,
        vllm_adapter_dir=str(folder / "adapters"),
        rollouts_ahead=ahead,
        generation_kwargs={"ignore_eos": True},
        max_completion_length=args.completion_length,
        model_init_kwargs={"dtype": args.dtype},
        per_device_train_batch_size=args.per_device_train_batch_size,
        max_steps=args.steps,
        decomposition_steps=0,
        logging_steps=1,
        bf16=not on_cpu,
        use_cpu=on_cpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=args.seed,
    )
    rows = [
        {
            "prompt": f"What is {i} + {3 * i}? Explain each step.",
            "reference": "word " * args.reference_length + str(4 * i),
        }
        for i in range(args.per_device_train_batch_size * args.steps)
    ]
    lora = LoraConfig(r=args.lora_r, lora_alpha=args.lora_r, target_modules="all-linear")
    times = _StepTimes()
    trainer = PurifiedOPSDTrainer(
        args.model_name_or_path, config, Dataset.from_list(rows), callbacks=[times], peft_config=lora
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    most = max(args.ahead)
    full = range(most + 1, args.steps - most)  # the same steps in every run
    logs = [entry for entry in trainer.state.log_history if "rollout/wait_seconds" in entry]
    return {
        "seconds": statistics.mean(times.ends[step + 1] - times.ends[step] for step in full),
        "wait": statistics.mean(logs[step]["rollout/wait_seconds"] for step in full),
        "idle": statistics.mean(logs[step]["rollout/idle_seconds"] for step in full),
        "steps": len(full),
    }


def predicted(present: dict[str, float], ahead: int) -> float:
    """Seconds of a step, from those of a run without batches ahead."""
    rest = present["seconds"] - present["wait"]
    return max(present["wait"], rest) if ahead else present["seconds"]


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    args = measure.parse(PipelineArguments, argv)
    device = args.prepare()
    require_extra("peft", "`bench pipeline`")
    with tempfile.TemporaryDirectory() as folder:
        found = {ahead: train(args, ahead, Path(folder), device.type == "cpu") for ahead in args.ahead}
    table = [["ahead", "s/step", "steps/h", "waiting", "server idle", "/ 0 ahead", "predicted"]]
    for ahead, one in found.items():
        seconds = one["seconds"]
        shares = [f"{one[part] / seconds:.0%}" for part in ("wait", "idle")]
        gains = [f"{found[0]['seconds'] / value:.2f}" for value in (seconds, predicted(found[0], ahead))]
        table.append([str(ahead), f"{seconds:.2f}", f"{3600 / seconds:.0f}", *shares, *gains])
    report = {"benchmark": "pipeline", "runs": {str(ahead): one for ahead, one in found.items()}}
    measure.write_report(args, report, "Training with rollouts ahead", table)
    return 0
