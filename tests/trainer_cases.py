"""Steps of the trainer on tiny models, and the same steps by hand from token ids, sharing nothing with it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
)
from transformers import PreTrainedModel

from purified_opsd_trl import (
    PurifiedOPSDTrainer,
)
from tests import reference


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")


Build = Callable[..., PurifiedOPSDTrainer]


def move_student(trainer: PurifiedOPSDTrainer) -> None:
    """Takes the student away from the base, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def fixed_rollout(trainer: PurifiedOPSDTrainer, lengths: tuple[int, ...] = (7, 3, 5, 8, 1, 6, 2, 4)) -> None:
    """Replaces sampling by completions that depend on the prompt alone, of unequal lengths."""

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        completions = []
        for ids in prompt_ids:
            generator = torch.Generator().manual_seed(sum(ids))
            length = lengths[sum(ids) % len(lengths)]
            completions.append(torch.randint(97, 123, (length,), generator=generator).tolist())
        return completions

    trainer._generate_single_turn = generate  # type: ignore[method-assign]


def by_hand(
    trainer: PurifiedOPSDTrainer, rows: list[dict[str, Any]], completions: list[list[int]], initial: PreTrainedModel
) -> tuple[float, dict[str, torch.Tensor]]:
    """
    Loss and gradients of one batch in fp64 from token ids: separate forwards without padding, dense softmaxes.

    Knows the templates' text, not the code that fills them.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    student, frozen = copy.deepcopy(trainer.model).double().train(), copy.deepcopy(initial).double().eval()
    instruction = "Use the worked solution to understand the problem, then solve the problem yourself, step by step."
    losses, count = [], sum(len(completion) for completion in completions)
    for row, completion in zip(rows, completions, strict=True):
        shown = f"Worked solution of this problem:\n{row['reference']}\n\n{instruction}"
        system = [turn for turn in row["prompt"] if turn["role"] == "system"]
        question = row["prompt"][-1]["content"]
        contexts = {
            "base": row["prompt"],
            "teacher": [*row["prompt"][:-1], {"role": "user", "content": f"{question}\n\n{shown}"}],
            "reference_only": [*system, {"role": "user", "content": shown}],
        }

        def logits(model: Any, messages: list[dict[str, str]], completion: list[int] = completion) -> torch.Tensor:
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            ids = torch.tensor([prompt + completion])
            return model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / args.temperature

        with torch.no_grad():
            scored = {name: logits(frozen, messages) for name, messages in contexts.items()}
        result = reference.objective(
            logits(student, contexts["base"]),
            scored["base"],
            scored["teacher"],
            scored["reference_only"],
            torch.full((len(completion),), 1.0 / count),
            target=args.target,
            loss_type=args.loss_type,
            beta=args.beta,
            pmi_beta=args.pmi_beta,
            pmi_clip=args.pmi_clip,
            pmi_center=args.pmi_center,
            kl_clip=args.kl_clip,
            labels=torch.tensor(completion),
        )
        losses.append(result.loss)
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.requires_grad and p.grad is not None}


def one_step(trainer: PurifiedOPSDTrainer, rows: list[dict[str, Any]]) -> float:
    """One `training_step` outside `train()`: loss, with the gradients left on the parameters."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer.training_step(trainer.model, rows, None).item()


def assert_one_step(
    trainer: PurifiedOPSDTrainer, rows: list[dict[str, Any]], loss: float, grads: dict[str, torch.Tensor]
) -> None:
    """One step has this loss and these gradients, and no others."""
    assert one_step(trainer, rows) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    own = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad and p.grad is not None}
    assert own.keys() == grads.keys()
    scale = max(grad.abs().max().item() for grad in grads.values())
    for name, grad in own.items():
        torch.testing.assert_close(grad.double(), grads[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


def first_rows(trainer: PurifiedOPSDTrainer, count: int) -> list[dict[str, Any]]:
    return [trainer.train_dataset[i] for i in range(count)]


def completions_for(trainer: PurifiedOPSDTrainer, rows: list[dict[str, Any]]) -> list[list[int]]:
    prompts = trainer.processing_class.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return trainer._generate_single_turn(prompts, None, {})


CASES = {
    "purified": {},
    "forward_kl": {"beta": 0.0},
    "reverse_kl": {"beta": 1.0},
    "generalized_jsd": {"beta": 0.3, "pmi_beta": 2.0, "pmi_clip": 1.5},
    "teacher": {"target": "teacher"},
    "uncentred": {"pmi_center": False, "pmi_clip": 0.0},
    "temperature": {"temperature": 0.7},
    "kl_clip": {"kl_clip": 0.01},
    "sampled_token": {"loss_type": "sampled_token"},
    "sampled_token_teacher": {"loss_type": "sampled_token", "target": "teacher"},
    "chunks": {"loss_chunk_size": 3},
    "one_by_one": {"scoring_batch_size": 1},
}


# Rows have 40 to 120 tokens: the budget makes parts of one row and of several
PADDED = {"padding_free": "false"}


PACKED = {"padding_free": "true"}


PARTS = {"train_token_budget": 150}


WAYS = {"padded": PADDED, "packed": PACKED, "padded parts": PADDED | PARTS, "packed parts": PACKED | PARTS}


every_way = pytest.mark.parametrize("way", WAYS)


def weights_after_one_step(build: Build, **fields: Any) -> dict[str, torch.Tensor]:
    fields = {"max_steps": 1, "optim": "sgd", "shuffle_dataset": False, "max_grad_norm": 1e9, **fields}
    trainer = build(learning_rate=1.0, **fields)
    fixed_rollout(trainer)
    move_student(trainer)
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
