"""
One process with vLLM: trains, and compares every rollout with transformers.

    python -m tests.vllm_engine.worker PLAN.json

The plan: `model` (folder), `output` (folder), `lora`, `resume` (folder or null), `break_sync` (send no weights after
the first time), `sleep` (record the order of calls with sleep mode on), `adapters` (`vllm_adapter_sync`). Writes
`figures.json` beside the plan.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch


NEW_TOKENS = 12
SETTINGS: dict[str, Any] = {  # of every run beside vLLM
    "max_completion_length": NEW_TOKENS,
    "model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"},
    "learning_rate": 2e-2,  # so that every step changes the greedy tokens
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "seed": 0,
}


def patch_for_cpu() -> None:
    """What vLLM needs on a CPU so that TRL can load weights into it, in fp32. Nothing of it is in the package."""
    import trl.generation.vllm_generation as generation
    import vllm._custom_ops as custom_ops
    import vllm.model_executor.layers.utils as layers

    # Prepacked weights have no `weight_loader`
    custom_ops._supports_onednn = False
    layers.check_cpu_sgl_kernel = lambda *_: False
    engine = generation.LLM
    generation.LLM = lambda **arguments: engine(**{**arguments, "dtype": "float32", "enforce_eager": True})


def build(plan: dict[str, Any]) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed

    from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer

    set_seed(0)
    rows = [
        {"prompt": [{"role": "user", "content": f"what is {i} + {i * 3}?"}], "reference": f"{4 * i}"}
        for i in range(16)
    ]
    args = PurifiedOPSDConfig(
        plan["output"],
        use_vllm=True,
        vllm_adapter_sync=plan["adapters"],
        vllm_gpu_memory_utilization=0.3,
        generation_kwargs={"temperature": 0.0},
        max_steps=4,
        save_steps=2,
        **SETTINGS,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return PurifiedOPSDTrainer(
        plan["model"], args, Dataset.from_list(rows), peft_config=lora if plan["lora"] else None
    )


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Transformers' greedy completion."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=256,
    )
    return output[0, len(prompt) :].tolist()


def compare(trainer: Any, rollouts: list[dict[str, Any]]) -> None:
    """Records each rollout beside what transformers writes with the same weights."""
    generate = trainer.vllm_generation.generate

    def compared(prompts: list[list[int]], **arguments: Any) -> Any:
        result = generate(prompts=prompts, **arguments)
        trainer.model.eval()
        expected = [greedy(trainer.model, prompt) for prompt in prompts]
        trainer.model.train()
        rollouts.append({"vllm": [list(ids) for ids in result[1]], "transformers": expected})
        return result

    trainer.vllm_generation.generate = compared


def break_sync(generation: Any) -> None:
    """The bug of stale weights: only the first sync takes place."""
    sync, done = generation.sync_weights, []

    def once() -> None:
        if not done:
            done.append(True)
            sync()

    generation.sync_weights = once


def record_calls(trainer: Any) -> list[str]:
    """Order of sleeping, waking, writing and scoring. vLLM cannot sleep on a CPU: these calls do nothing."""
    calls: list[str] = []

    def recorded(owner: Any, name: str, label: str, call: bool) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tags = kwargs.get("tags")
            calls.append(f"{label} {'+'.join(tags)}" if tags else label)
            return original(*args, **kwargs) if call else None

        setattr(owner, name, wrapper)

    generation = trainer.vllm_generation
    generation.enable_sleep_mode = True
    generation._llm_weights_sleeping = True
    recorded(generation.llm, "sleep", "sleep", call=False)
    recorded(generation.llm, "wake_up", "wake", call=False)
    recorded(generation.llm, "generate", "generate", call=True)
    recorded(trainer.scoring_callback, "score", "score", call=True)
    recorded(trainer, "_compute_loss", "loss", call=True)
    return calls


def main(path: str) -> None:
    plan = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    patch_for_cpu()
    trainer = build(plan)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    rollouts: list[dict[str, Any]] = []
    compare(trainer, rollouts)
    if plan["break_sync"]:
        break_sync(trainer.vllm_generation)
    calls = record_calls(trainer) if plan["sleep"] else []
    trainer.train(resume_from_checkpoint=plan["resume"])
    engine = trainer.vllm_generation.llm.llm_engine
    prompts = [trainer._tokenize_prompts([row["prompt"]])[0][0] for row in trainer.train_dataset]
    weights = dict(trainer.model.named_parameters())
    folder = getattr(trainer.vllm_generation, "adapter_folder", None)
    figures = {
        "adapter_files": sorted(path.name for path in Path(folder.name).iterdir()) if folder else [],
        "rollouts": rollouts,
        "calls": calls,
        "max_model_len": engine.model_config.max_model_len,
        "longest_prompt": max(map(len, prompts)),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "base_moved": [name for name, before in frozen.items() if not torch.equal(before, weights[name])],
        "weights": {name: float(p.detach().double().abs().sum()) for name, p in weights.items()},
    }
    Path(path).with_name("figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
