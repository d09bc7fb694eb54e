"""
One training process whose rollouts come from a `vllm serve` with adapters.

    python -m tests.vllm_engine.ahead_worker PLAN.json

The plan: `model` (folder), `output` (folder), `servers` (addresses; none: transformers writes), `ahead`, `rank`,
`resume` (folder), `mix_up` (request the version before the right one), `kill_in_step` (SIGKILL of itself),
`wait_in_step` (until the file `go` is there). Writes `figures.json` beside the plan.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .worker import SETTINGS, greedy


class Watcher(TrainerCallback):
    """Adapter weights at the beginning of each step; the kill or the wait of the plan."""

    def __init__(self, plan: dict[str, Any], folder: Path):
        self.plan, self.folder = plan, folder
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in named if p.requires_grad}
        if state.global_step == self.plan.get("kill_in_step"):
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self.plan.get("wait_in_step"):
            (self.folder / "waiting").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.05)


def build(plan: dict[str, Any], watcher: Watcher) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed

    from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer

    set_seed(0)
    rows = [
        {"prompt": [{"role": "user", "content": f"what is {i} + {i * 3}?"}], "reference": f"{4 * i}"}
        for i in range(16)
    ]
    served = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_adapter_sync": True,
        "vllm_server_base_url": plan["servers"],
        "vllm_server_timeout": 5.0,
        "rollouts_ahead": plan["ahead"],
        "generation_kwargs": {"temperature": 0.0},
    }
    args = PurifiedOPSDConfig(
        plan["output"],
        **(served if plan["servers"] else {"generation_kwargs": {"do_sample": False}}),
        max_steps=6,  # of 4 per epoch
        save_steps=3,
        decomposition_steps=0,
        **SETTINGS,
    )
    rank = plan.get("rank", 4)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return PurifiedOPSDTrainer(plan["model"], args, Dataset.from_list(rows), callbacks=[watcher], peft_config=lora)


def main(path: str) -> None:
    plan = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    watcher = Watcher(plan, Path(path).parent)
    trainer = build(plan, watcher)
    seen: list[tuple[list[list[int]], list[list[int]]]] = []
    generate = trainer._generate_single_turn

    def watched(prompt_ids: list[list[int]], *rest: Any) -> list[list[int]]:
        found = generate(prompt_ids, *rest)
        seen.append((prompt_ids, found))
        return found

    trainer._generate_single_turn = watched
    if plan.get("mix_up"):
        complete = trainer._complete
        trainer._complete = lambda prompts, version: complete(prompts, max(version - 1, trainer._first_version))
    trainer.train(resume_from_checkpoint=plan.get("resume"))
    weights = {name: float(p.detach().double().abs().sum()) for name, p in trainer.model.named_parameters()}
    figures = {
        "rollouts": compare(trainer, watcher, seen),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights,
    }
    Path(path).with_name("figures.json").write_text(json.dumps(figures))


def compare(trainer: Any, watcher: Watcher, seen: list[Any]) -> list[dict[str, Any]]:
    """Each rollout beside what transformers writes with the versions around its own."""
    logged = [entry.get("rollout/staleness") for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.model.eval()
    compared = []
    for (prompts, found), staleness, step in zip(seen, logged[-len(seen) :], sorted(watcher.weights), strict=True):
        expected = {}
        for version in {*range(step - 3, step + 1)} & watcher.weights.keys():
            model.load_state_dict(watcher.weights[version], strict=False)
            expected[version] = [greedy(model, prompt) for prompt in prompts]
        compared.append({"vllm": found, "transformers": expected, "staleness": staleness})
    return compared


if __name__ == "__main__":
    main(sys.argv[1])
