"""Grouping, padding and alignment of scoring batches."""

import pytest
import torch

from purified_opsd_trl import PurificationCollator, TeacherScores
from purified_opsd_trl.scoring import ScoringStats


PROMPTS = {"base": [[1, 2], [3]], "teacher": [[4, 5, 6, 7], [8, 9, 10]]}
COMPLETIONS = [[11, 12, 13], [14]]


def test_every_sequence_stands_once_ends_in_its_completion_and_is_padded_on_the_left() -> None:
    collator = PurificationCollator(pad_token_id=0, max_sequences=3)
    batches = collator.scoring_batches(PROMPTS, COMPLETIONS)
    seen = {}
    for batch in batches:
        assert len(batch.rows) <= 3
        for i, key in enumerate(zip(batch.contexts, batch.rows, strict=True)):
            mask = batch.attention_mask[i].bool()
            assert mask.tolist() == sorted(mask.tolist())  # padding first
            seen[key] = batch.input_ids[i][mask].tolist()
            assert (batch.input_ids[i][~mask] == 0).all()
            assert batch.completion_lengths[i] == len(COMPLETIONS[key[1]])
    assert seen == {
        ("base", 0): [1, 2, 11, 12, 13],
        ("base", 1): [3, 14],
        ("teacher", 0): [4, 5, 6, 7, 11, 12, 13],
        ("teacher", 1): [8, 9, 10, 14],
    }


def test_sequences_of_like_length_share_a_batch() -> None:
    collator = PurificationCollator(pad_token_id=0, max_sequences=2)
    assert collator.plan([10, 500, 12, 480]) == [[1, 3], [2, 0]]


@pytest.mark.parametrize("budget", [1, 20, 64, 1000])
def test_the_token_budget_bounds_padded_tokens(budget: int) -> None:
    lengths = [3, 17, 9, 9, 30, 1, 12]
    groups = PurificationCollator(0, max_sequences=4, max_tokens=budget).plan(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[i] for i in group)
        assert len(group) <= 4
        assert padded <= budget or len(group) == 1


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5, 9])
def test_the_number_of_batches_can_be_raised(wanted: int) -> None:
    collator = PurificationCollator(pad_token_id=0, max_sequences=4)
    batches = collator.scoring_batches(PROMPTS, COMPLETIONS, num_batches=wanted)
    assert len(batches) == max(1, wanted)
    keys = {key for batch in batches for key in zip(batch.contexts, batch.rows, strict=True)}
    assert len(keys) == 4


def test_lengths_are_padded_to_the_multiple() -> None:
    collator = PurificationCollator(pad_token_id=0, max_sequences=4, pad_to_multiple_of=16)
    (batch,) = collator.scoring_batches(PROMPTS, COMPLETIONS)
    assert batch.input_ids.shape == (4, 16)


def test_delta_is_the_fp32_difference_stored_in_the_dtype_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, reference_only = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    scores = TeacherScores(
        {"teacher": teacher, "reference_only": reference_only, "base": teacher},
        torch.ones(2, 3, dtype=torch.bool),
        head=None,  # type: ignore[arg-type]
        temperature=1.0,
        stats=ScoringStats(0, 0, 0, 0.0),
    )
    tensors = PurificationCollator(0, 1).training_tensors(scores, ("base", "delta"), torch.bfloat16)
    assert tensors.keys() == {"base_hidden", "delta_hidden"}
    assert torch.equal(tensors["delta_hidden"], (teacher - reference_only).bfloat16())
    assert tensors["base_hidden"].dtype == torch.bfloat16
