"""Pre-training of the lab's base model, from scratch."""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from recipes.lab.task import (
    REFERENCE_TEMPLATE,
    TEACHER_TEMPLATE,
    Habits,
    build_tokenizer,
    sample_problem,
    write_response,
)


CACHE = Path(".cache/lab")
MODULUS = 7
POOL = 4  # batches that are sorted by length together
LOG_EVERY = 25  # steps
WARM_UP = 40  # steps
LEARNING_RATE = 2e-3
MIX_STEPS = 1000

CLEAN = Habits(wrong=0.0, wait_right=0.0, wait_wrong=0.0)


@dataclass(frozen=True)
class World:
    """
    The pre-training mix without a reference and with one.

    Attributes:
        alone, with_reference ([`Habits`]):
            How responses are written.
        consults (`bool`):
            Whether responses with a reference are corrected where they contradict it.
        copies (`bool`):
            Whether responses with a reference copy its answer.
    """

    alone: Habits
    with_reference: Habits
    consults: bool = False
    copies: bool = False


_CHECKS = Habits(wrong=0.25, wait_right=0.03, wait_wrong=0.9, slips=True)
WORLDS = {
    # A constructed gap of style: without a reference the model checks itself, with one it jumps to the answer
    "style": World(
        alone=Habits(wrong=0.2, wait_right=0.25, wait_wrong=0.6),
        with_reference=Habits(wrong=0.2, wait_right=0.02, wait_wrong=0.05, jump=0.35),
        copies=True,
    ),
    # The same habits with and without a reference. Waits follow errors, and a reference only corrects some errors
    "repair": World(alone=_CHECKS, with_reference=_CHECKS, consults=True),
}


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A Qwen3 of three layers and about 450,000 parameters."""
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def sample_text(rng: random.Random, world: World | None) -> tuple[str, str]:
    """
    Draws a prompt and a response of the pre-training mix: half question, 30 % question and reference, 20 % reference.

    Half of the references are rich. The reference-only context holds a response that was written with the question.

    Args:
        rng (`random.Random`):
            Source of randomness.
        world ([`World`], *optional*):
            The mix; `None` for a question with a correct response, the curriculum's first part.

    Returns:
        `tuple[str, str]`: prompt and response.
    """
    problem = sample_problem(rng, MODULUS)
    if world is None:
        return problem.question, write_response(problem, CLEAN, rng)
    kind = rng.random()
    if kind < 0.5:
        return problem.question, write_response(problem, world.alone, rng)
    rich = rng.random() < 0.5
    template = TEACHER_TEMPLATE if kind < 0.8 else REFERENCE_TEMPLATE
    prompt = template.replace("{question}", problem.question).replace("{reference}", problem.reference(rich))
    consults = rich if world.consults else None
    return prompt, write_response(problem, world.with_reference, rng, copies=world.copies, consults=consults)


def encode(texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """
    A right-padded batch with labels on the responses only.

    Args:
        texts (`list[tuple[str, str]]`):
            B prompts and responses.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels`, each `[B, T]`.
    """
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in texts]
    responses = [tokenizer(response)["input_ids"] + [tokenizer.eos_token_id] for _, response in texts]
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def batches(
    text: Callable[[], tuple[str, str]], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Endless batches. `POOL` of them are sorted by length together, so that they pad less.

    Args:
        text (`Callable[[], tuple[str, str]]`):
            Draws a prompt and a response.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer.
        batch_size (`int`):
            Texts per batch.

    Returns:
        `Iterator[dict[str, torch.Tensor]]`: batches as `encode` returns them.
    """
    while True:
        pool = sorted((text() for _ in range(POOL * batch_size)), key=lambda text: len(" ".join(text).split()))
        parts = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        random.Random(pool[0][0]).shuffle(parts)
        yield from (encode(part, tokenizer) for part in parts)


def train(
    model: Any,
    data: Iterator[dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    is_done: Callable[[float], bool] | None = None,
) -> None:
    """
    AdamW with warm-up. The learning rate decays to zero, or stays constant if `is_done` ends training.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Trained in place.
        data (`Iterator[dict[str, torch.Tensor]]`):
            Batches.
        steps (`int`):
            Maximum number of optimizer steps.
        learning_rate (`float`):
            Peak.
        is_done (`Callable[[float], bool]`, *optional*):
            Called with the loss every `LOG_EVERY` steps; training stops when it returns `True`.

    Raises:
        `RuntimeError`: if `is_done` never returned `True`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    decay = 0.0 if is_done else 1.0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 1 - decay * step / steps)
    )
    model.train()
    started = time.perf_counter()
    for step in range(1, steps + 1):
        loss = model(**next(data), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % LOG_EVERY == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
            if is_done is not None and is_done(loss.item()):
                break
    else:
        if is_done is not None:
            raise RuntimeError(f"The model has not learned the task within {steps} steps.")
    model.eval()


def pretrain(world: str, seed: int, max_clean_steps: int = 1500, batch_size: int = 64) -> Path:
    """
    Trains a base model, or finds it in the cache: first on correct responses until they are learned, then on the mix.

    Args:
        world (`str`):
            Key of `WORLDS`.
        seed (`int`):
            Seed of weights and data.
        max_clean_steps (`int`, *optional*, defaults to `1500`):
            Maximum number of steps on correct responses.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts per step.

    Returns:
        `Path`: folder of model and tokenizer.

    Raises:
        `RuntimeError`: if the correct responses are not learned in time.
    """
    folder = CACHE / f"{world}-{seed}"
    if (folder / "model.safetensors").is_file():
        return folder
    tokenizer = build_tokenizer(MODULUS)
    model = build_model(tokenizer, seed)
    rng = random.Random(seed)
    clean = batches(lambda: sample_text(rng, None), tokenizer, batch_size)
    train(model, clean, max_clean_steps, LEARNING_RATE, is_done=lambda loss: loss < 0.02)
    mix = batches(lambda: sample_text(rng, WORLDS[world]), tokenizer, batch_size)
    train(model, mix, MIX_STEPS, LEARNING_RATE)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=WORLDS, default="style")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(pretrain(options.world, options.seed))
