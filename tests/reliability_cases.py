"""Three epochs of a tiny run, and what it leaves: for the tests of reliability."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import set_seed

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer


ROOT = Path(__file__).parents[1]
ROWS = [
    {"prompt": f"what is {i} + {i + 7}?", "reference": f"{i} + {i + 7} = {2 * i + 7}. " * (1 + i % 3)}
    for i in range(16)
]
KINDS = {
    "full": {},
    "lora": {"lora": True},
    "ema": {"teacher_model_kind": "ema", "teacher_update_rate": 0.3},
    "packed parts": {
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "padding_free": "true"},
        **{"train_token_budget": 40, "offload_scores": True},
    },
    "streamed": {"stream": True, "max_steps": 12},
}
Build = Callable[..., PurifiedOPSDTrainer]


def build_trainer(
    model_dir: Path,
    output_dir: Path,
    *,
    cls: type[PurifiedOPSDTrainer] = PurifiedOPSDTrainer,
    lora: bool = False,
    stream: bool = False,
    rows: list[dict[str, Any]] = ROWS,
    **fields: Any,
) -> PurifiedOPSDTrainer:
    """Three epochs of 16 rows, four per step, with rollouts at random; a checkpoint after every step."""
    set_seed(0)
    arguments = {
        **{"output_dir": str(output_dir), "report_to": "none", "use_cpu": True, "bf16": False, "seed": 0},
        **{"gradient_checkpointing": False, "dataloader_pin_memory": False, "disable_tqdm": True, "logging_steps": 1},
        **{"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3, "per_device_train_batch_size": 2},
        **{"gradient_accumulation_steps": 2, "max_completion_length": 6, "learning_rate": 1e-3},
        **{"lr_scheduler_type": "constant", "decomposition_steps": 0},
        **{"model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"}},
        **fields,
    }
    data: Any = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    return cls(
        model=str(model_dir),
        args=PurifiedOPSDConfig(**arguments),
        train_dataset=data,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM") if lora else None,
    )


class NaNTarget(PurifiedOPSDTrainer):
    def target_logits(self, teacher: torch.Tensor, reference_only: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return teacher.log() if self.state.global_step == 2 else teacher  # NaN for negative logits


class Watched(PurifiedOPSDTrainer):
    """Notes the rows of every step and ends, as if killed, before the step that it is told."""

    dies_at: int | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: dict[int, list[str]] = {}
        self.forwards = 0

    def part_loss(self, *args: Any) -> Any:
        self.forwards += args[1].packed
        return super().part_loss(*args)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        step = self.state.global_step + 1
        if step == self.dies_at:
            raise KeyboardInterrupt
        self.seen.setdefault(step, []).extend(row["prompt"] for row in inputs)
        return super()._generate_and_score_completions(inputs)


def outcome(trainer: PurifiedOPSDTrainer) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[int, float]]:
    """Trained weights, averaged weights, loss of every step."""
    averages = list(trainer.scoring_callback.ema.averages.values()) if trainer.scoring_callback.ema else []
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return [p.detach() for p in trainer.model.parameters() if p.requires_grad], averages, losses
