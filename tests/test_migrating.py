"""What docs/migrating.md says of TRL's SDFT: on the same rollouts both trainers have the same divergence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer

from .conftest import read_rows


EQUAL, RAGGED = (6, 6, 6, 6), (7, 2, 5, 1)
SHARED = {"max_completion_length": 8, "learning_rate": 5e-5, "per_device_train_batch_size": 4, "beta": 0.5}


@pytest.fixture
def dataset() -> Dataset:
    rows = read_rows("standard")[:4]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "privileged_context": row["reference"]}
            for row in rows
        ]
    )


def moved(trainer: Any) -> Any:
    """The student away from the base: both adapters get the same weights."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return trainer


def loss_and_gradient(trainer: Any, rows: list[dict[str, Any]]) -> tuple[float, torch.Tensor]:
    """Of the batch that these rows make, by the trainer's own code."""
    trainer.model.train()
    batch = trainer._prepare_inputs(rows)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch.get("num_items_in_batch"))
    trainer.model.zero_grad()
    loss.backward()
    gradients = [
        p.grad.flatten() for n, p in sorted(trainer.model.named_parameters()) if "lora_" in n and p.requires_grad
    ]
    return loss.item(), torch.cat(gradients)


def both(
    lengths: tuple[int, ...],
    dataset: Dataset,
    make_model: Callable[..., Any],
    tokenizer: Any,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Loss, gradient and logged divergence of the trainers as the page sets them."""
    generator = torch.Generator().manual_seed(1)
    completions = [torch.randint(97, 123, (length,), generator=generator).tolist() for length in lengths]
    settings = {**arguments, **SHARED, "max_steps": 1}
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {"train_dataset": dataset, "processing_class": tokenizer}
    sdft_settings = {name: value for name, value in settings.items() if name != "beta"}
    theirs = SDFTTrainer(
        make_model(),
        SDFTConfig(**sdft_settings, distillation_mode="full_logits", distillation_is_clip=None, num_generations=1),
        peft_config=lora,
        **common,
    )
    theirs._generate = lambda ids: (ids, completions)
    ours = PurifiedOPSDTrainer(
        make_model(),
        PurifiedOPSDConfig(
            **settings,
            target="teacher",
            reference_column="privileged_context",
            teacher_prompt_template="{question}\n\n{reference}",
            disable_dropout=True,
            decomposition_steps=0,
        ),
        peft_config=lora,
        **common,
    )
    ours._generate_single_turn = lambda ids, *_, **__: completions
    rows = list(dataset)
    results = {"sdft": loss_and_gradient(moved(theirs), rows), "ours": loss_and_gradient(moved(ours), rows)}
    (logged,) = theirs._metrics["train"]["self_distillation/distillation_loss"]
    return {**results, "sdft's tokens": logged}


def test_equal_lengths_give_sdfts_loss_and_gradient(
    dataset: Dataset, make_model: Callable[..., Any], tokenizer: Any, arguments: dict[str, Any]
) -> None:
    found = both(EQUAL, dataset, make_model, tokenizer, arguments)
    assert found["ours"][0] == pytest.approx(found["sdft"][0], rel=1e-5) and found["ours"][0] > 1e-3
    torch.testing.assert_close(found["ours"][1], found["sdft"][1], rtol=1e-4, atol=1e-7)


def test_ragged_lengths_differ_in_the_average_alone(
    dataset: Dataset, make_model: Callable[..., Any], tokenizer: Any, arguments: dict[str, Any]
) -> None:
    found = both(RAGGED, dataset, make_model, tokenizer, arguments)
    assert found["ours"][0] == pytest.approx(found["sdft's tokens"], rel=1e-5)
    assert abs(found["ours"][0] - found["sdft"][0]) > 1e-3 * found["ours"][0]
