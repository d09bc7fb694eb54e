"""Grouping, padding and alignment of scoring batches."""

from functools import partial

import pytest
import torch

from purified_opsd_trl import PurificationCollator
from purified_opsd_trl.collator import ScoringBatch, shared_prefixes


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
def test_the_number_of_forwards_can_be_raised(wanted: int) -> None:
    collator = PurificationCollator(pad_token_id=0, max_sequences=4)
    batches = collator.scoring_batches(PROMPTS, COMPLETIONS, agree=partial(max, wanted))
    assert len(batches) == max(1, wanted)
    keys = {key for batch in batches for key in zip(batch.contexts, batch.rows, strict=True)}
    assert len(keys) == 4


def test_lengths_are_padded_to_the_multiple() -> None:
    collator = PurificationCollator(pad_token_id=0, max_sequences=4, pad_to_multiple_of=16)
    (batch,) = collator.scoring_batches(PROMPTS, COMPLETIONS)
    assert batch.input_ids.shape == (4, 16)


# Prefixes shared by the teacher's and the reference-only prompt ------------------------------------------------------

REFERENCES = [[5] * 400, [6] * 258, [7] * 255, [8] * 300]
SHARING = {
    "base": [[1], [2], [3], [4]],
    "teacher": [[*reference, 50, 51, 60] for reference in REFERENCES[:3]] + [REFERENCES[3]],
    "reference_only": [[*reference, 60] for reference in REFERENCES[:3]] + [REFERENCES[3]],
}
WRITTEN = [[11, 12], [13], [14, 15, 16], [17]]


def tokens_by_key(batches: list[ScoringBatch]) -> dict[tuple[str, int], list[int]]:
    """Every sequence put together again from prefix and rest."""
    found = {}
    for batch in batches:
        for i, key in enumerate(zip(batch.contexts, batch.rows, strict=True)):
            ids = batch.input_ids[i][batch.attention_mask[i].bool()].tolist()
            if batch.prefix_ids is not None and batch.prefix_mask is not None:
                parent = batch.prefix_of[i]
                ids = batch.prefix_ids[parent][batch.prefix_mask[parent].bool()].tolist() + ids
            start, length = batch.completion_starts[i], batch.completion_lengths[i]
            assert start > 0 and batch.input_ids[i, start : start + length].tolist() == WRITTEN[key[1]]
            found[key] = ids
    return found


WHOLE = {
    (context, row): prompt + WRITTEN[row] for context, prompts in SHARING.items() for row, prompt in enumerate(prompts)
}


def test_a_shared_prefix_is_found_on_token_ids_and_leaves_a_token_of_each_prompt() -> None:
    # row 2 shares 255 tokens, below the threshold; row 3 shares all 300, of which the last one is kept back
    lengths = {row: len(prefix) for row, prefix in shared_prefixes(SHARING).items()}
    assert lengths == {0: 400, 1: 258, 3: 299}
    assert shared_prefixes({"teacher": SHARING["teacher"]}) == {}


@pytest.mark.parametrize("most", [1, 2, 4, 6, 100])
def test_prefix_and_rest_make_up_every_sequence(most: int) -> None:
    collator = PurificationCollator(0, max_sequences=most)
    assert tokens_by_key(collator.scoring_batches(SHARING, WRITTEN)) == WHOLE
    batches = collator.scoring_batches(SHARING, WRITTEN, share_prefixes=True)
    assert tokens_by_key(batches) == WHOLE
    shared = [batch for batch in batches if batch.prefix_ids is not None]
    assert sum(len(batch.rows) for batch in shared) == 6
    for batch in batches:
        assert len(batch.rows) <= max(most, 2 if batch in shared else 1)
    for batch in shared:
        assert batch.prefix_mask is not None
        half = len(batch.rows) // 2
        assert batch.contexts == ("teacher",) * half + ("reference_only",) * half
        assert batch.rows[:half] == batch.rows[half:]
        for mask in batch.prefix_mask.tolist():
            assert mask == sorted(mask)  # padding first
        for mask in batch.attention_mask.tolist():
            assert mask == sorted(mask, reverse=True)  # padding last
    tokens = sum(int(mask.sum()) for batch in batches for mask in batch.masks)
    assert tokens == sum(map(len, WHOLE.values())) - 400 - 258 - 299


def test_rows_with_the_same_reference_share_it_too() -> None:
    prompts = {
        "teacher": [
            [*REFERENCES[i], *question] for i, question in [(0, [50]), (1, [51, 52]), (0, [53] * 9), (0, [54])]
        ],
        "reference_only": [[*REFERENCES[i], 60] for i in (0, 1, 0, 0)],
    }
    for most, prefixes in ((100, [2]), (6, [1, 1]), (4, [1, 2]), (2, [1, 1, 1, 1])):
        batches = PurificationCollator(0, max_sequences=most).scoring_batches(prompts, WRITTEN, share_prefixes=True)
        assert [len(batch.prefix_ids) for batch in batches if batch.prefix_ids is not None] == prefixes
        assert tokens_by_key(batches) == {
            (context, row): ids[row] + WRITTEN[row] for context, ids in prompts.items() for row in range(4)
        }


@pytest.mark.parametrize("budget", [50, 800, 1700])
def test_the_token_budget_holds_in_both_forwards(budget: int) -> None:
    collator = PurificationCollator(0, max_sequences=100, max_tokens=budget)
    for batch in collator.scoring_batches(SHARING, WRITTEN, share_prefixes=True):
        alone = len(batch.rows) == (2 if batch.prefix_ids is not None else 1)
        assert alone or all(mask.numel() <= budget for mask in batch.masks)


@pytest.mark.parametrize("without_base", [False, True])
@pytest.mark.parametrize("most", [1, 4, 100])
def test_processes_agree_on_forwards_whatever_they_share(most: int, without_base: bool) -> None:
    prompts = {name: ids for name, ids in SHARING.items() if not (without_base and name == "base")}
    collator = PurificationCollator(0, max_sequences=most)
    own = sum(batch.forwards for batch in collator.scoring_batches(prompts, WRITTEN, share_prefixes=True))
    for wanted in range(own + 12):
        batches = collator.scoring_batches(prompts, WRITTEN, agree=partial(max, wanted), share_prefixes=True)
        assert sum(batch.forwards for batch in batches) == max(own, wanted)
        assert tokens_by_key(batches) == {key: ids for key, ids in WHOLE.items() if key[0] in prompts}
        assert all(len(batch.rows) <= max(most, 2) for batch in batches)


def test_pairs_alone_can_be_raised_too() -> None:
    prompts = {name: [SHARING[name][0]] for name in ("teacher", "reference_only")}
    collator = PurificationCollator(0, max_sequences=4)
    assert len(collator.scoring_batches(prompts, WRITTEN[:1], share_prefixes=True)) == 1
    for wanted in (3, 4, 7):
        batches = collator.scoring_batches(prompts, WRITTEN[:1], agree=partial(max, wanted), share_prefixes=True)
        assert sum(batch.forwards for batch in batches) == wanted
        assert tokens_by_key(batches) == {(name, 0): WHOLE[name, 0] for name in prompts}


def test_delta_is_the_fp32_difference_stored_in_the_dtype_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, reference_only = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    hidden = {"teacher": teacher, "reference_only": reference_only, "base": teacher}
    tensors = PurificationCollator(0, 1).training_tensors(hidden, ("base", "delta"), torch.bfloat16)
    assert tensors.keys() == {"base_hidden", "delta_hidden"}
    assert torch.equal(tensors["delta_hidden"], (teacher - reference_only).bfloat16())
    assert tensors["base_hidden"].dtype == torch.bfloat16
