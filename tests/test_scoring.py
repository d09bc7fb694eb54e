"""Scores of the self-teacher against separate dense forwards."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer


PROMPTS = {
    "base": [[65, 66, 67], [68]],
    "teacher": [[65, 66, 67, 70, 71, 72], [68, 70, 71, 72, 73, 74, 75, 76]],
    "reference_only": [[70, 71, 72], [70, 71, 72, 73, 74, 75, 76]],
}
COMPLETIONS = [[97, 98, 99, 100], [101, 102]]


@pytest.fixture(params=["lora", "full", "live", "softcap"])
def trainer(
    request: pytest.FixtureRequest,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    conversational_dataset: Dataset,
    arguments: dict[str, Any],
) -> PurifiedOPSDTrainer:
    model = make_model("gemma2" if request.param == "softcap" else "qwen3")
    trainer = PurifiedOPSDTrainer(
        model=model,
        args=PurifiedOPSDConfig(
            **arguments, temperature=0.8, teacher_model_kind="live" if request.param == "live" else "base"
        ),
        train_dataset=conversational_dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if request.param == "lora" else None,
    )
    trainer.initial = copy.deepcopy(make_model("gemma2" if request.param == "softcap" else "qwen3"))
    if request.param != "live":  # move the student: the scores must not follow
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
    return trainer


def dense_log_probs(trainer: PurifiedOPSDTrainer, context: str, row: int) -> torch.Tensor:
    prompt, completion = PROMPTS[context][row], COMPLETIONS[row]
    with torch.no_grad():
        logits = trainer.initial.double()(input_ids=torch.tensor([prompt + completion])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / 0.8, dim=-1)


def test_log_probs_of_any_token_under_any_context(trainer: PurifiedOPSDTrainer) -> None:
    scores = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    alternatives = torch.arange(2 * 4 * 5).view(2, 4, 5) % 270
    for context in PROMPTS:
        log_probs = scores.log_probs(alternatives, context)
        for row, completion in enumerate(COMPLETIONS):
            n = len(completion)
            expected = dense_log_probs(trainer, context, row).gather(-1, alternatives[row, :n])
            torch.testing.assert_close(log_probs[row, :n].double(), expected, rtol=1e-4, atol=1e-5)
            assert not log_probs[row, n:].any()


def test_contrasts_read_off_what_reference_and_question_add(trainer: PurifiedOPSDTrainer) -> None:
    scores = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    sampled = torch.tensor([[97, 98, 99, 100], [101, 102, 0, 0]])
    for without in ("base", "reference_only"):
        contrast = scores.contrast(sampled, "teacher", without)
        for row, completion in enumerate(COMPLETIONS):
            ids = torch.tensor(completion).unsqueeze(-1)
            expected = dense_log_probs(trainer, "teacher", row) - dense_log_probs(trainer, without, row)
            torch.testing.assert_close(
                contrast[row, : len(completion)].double(), expected.gather(-1, ids)[:, 0], rtol=1e-4, atol=1e-5
            )


def test_scores_do_not_depend_on_batching(trainer: PurifiedOPSDTrainer) -> None:
    together = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    trainer.purification_collator.max_sequences = 1
    alone = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    for context in PROMPTS:
        torch.testing.assert_close(together.hidden[context], alone.hidden[context], rtol=1e-4, atol=1e-5)
    assert alone.stats.forwards == 6 and alone.stats.padded_tokens == alone.stats.tokens
    assert (
        together.stats.tokens
        == alone.stats.tokens
        == sum(len(p) + len(c) for rows in PROMPTS.values() for p, c in zip(rows, COMPLETIONS, strict=True))
    )


def test_scoring_leaves_mode_adapter_and_gradients_alone(trainer: PurifiedOPSDTrainer) -> None:
    trainer.model.train()
    flags = [parameter.requires_grad for parameter in trainer.model.parameters()]
    scores = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    assert trainer.model.training
    assert flags == [parameter.requires_grad for parameter in trainer.model.parameters()]
    assert not any(hidden.requires_grad for hidden in scores.hidden.values())


def test_scores_can_be_kept_in_host_memory(trainer: PurifiedOPSDTrainer) -> None:
    trainer.args.offload_scores = True
    assert {h.device.type for h in trainer.scoring_callback.score(PROMPTS, COMPLETIONS).hidden.values()} == {"cpu"}
