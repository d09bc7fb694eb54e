"""
Prompts and completion ids -> scoring batches; scores -> tensors for the loss.

Shapes: `B` rows of the generation batch, `C` longest completion, `H` hidden size, `b` sequences of one scoring batch,
`L` its padded length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from trl.trainer.utils import pad

from .scoring import TeacherScores


@dataclass(frozen=True)
class ScoringBatch:
    """
    Sequences scored by one forward of the frozen model.

    Prompt and completion are joined first and padded on the left, so a completion always ends at the last column. It
    is appended as ids, never as text: the same ids stand in every context.

    Attributes:
        contexts (`tuple[str, ...]` of length `b`):
            Context of each sequence: `"base"`, `"teacher"` or `"reference_only"`.
        rows (`tuple[int, ...]` of length `b`):
            Row of the generation batch of each sequence.
        input_ids (`torch.Tensor` of shape `[b, L]`):
            Prompt and completion ids.
        attention_mask (`torch.Tensor` of shape `[b, L]`):
            1 for tokens, 0 for padding.
        completion_lengths (`tuple[int, ...]` of length `b`):
            Tokens of each completion.
    """

    contexts: tuple[str, ...]
    rows: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_lengths: tuple[int, ...]


class PurificationCollator:
    """
    Aligns the three contexts of each completion and turns their scores into training tensors.

    Args:
        pad_token_id (`int`):
            Padding id. Never attended to.
        max_sequences (`int`):
            Most sequences in a scoring batch.
        max_tokens (`int`, *optional*):
            Most tokens, padding included, in a scoring batch; a single longer sequence is a batch of its own.
        pad_to_multiple_of (`int`, *optional*):
            Length multiple of the scoring batches.
    """

    def __init__(
        self,
        pad_token_id: int,
        max_sequences: int,
        max_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        self.pad_token_id = pad_token_id
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.pad_to_multiple_of = pad_to_multiple_of

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """
        Groups sequences of similar length.

        Args:
            lengths (`Sequence[int]`):
                Tokens of each sequence.

        Returns:
            `list[list[int]]`: groups of indices, the longest sequences first (a lack of memory shows at once).
        """
        groups: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            # The group's first sequence is its longest, so its length is the padded length
            fits = groups and len(groups[-1]) < self.max_sequences
            if fits and self.max_tokens is not None:
                fits = (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= self.max_tokens
            if fits:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def scoring_batches(
        self, prompt_ids: dict[str, list[list[int]]], completion_ids: list[list[int]], num_batches: int | None = None
    ) -> list[ScoringBatch]:
        """
        Joins prompts and completions, sorts the sequences of all contexts by length and pads them.

        Args:
            prompt_ids (`dict[str, list[list[int]]]`):
                Prompt ids of every row, by context.
            completion_ids (`list[list[int]]`):
                Completion ids of every row, the same for all contexts.
            num_batches (`int`, *optional*):
                Number of batches to return at least: where parameters are sharded, all processes must run the same
                number of forwards. Groups are split, largest first, and when nothing is left to split the last batch
                is repeated; a repetition writes the same values again.

        Returns:
            `list[ScoringBatch]`.
        """
        keys = [(context, row) for context, rows in prompt_ids.items() for row in range(len(rows))]
        sequences = [prompt_ids[context][row] + completion_ids[row] for context, row in keys]
        groups = self.plan([len(sequence) for sequence in sequences])
        while num_batches is not None and len(groups) < num_batches:
            largest = max(range(len(groups)), key=lambda i: len(groups[i]))
            group = groups[largest]
            half = (len(group) + 1) // 2
            groups[largest : largest + 1] = [group[:half], group[half:]] if len(group) > 1 else [group, group]
        return [
            self._batch([keys[i] for i in group], [sequences[i] for i in group], completion_ids) for group in groups
        ]

    def _batch(
        self, keys: list[tuple[str, int]], sequences: list[list[int]], completion_ids: list[list[int]]
    ) -> ScoringBatch:
        ids = [torch.tensor(sequence) for sequence in sequences]
        return ScoringBatch(
            contexts=tuple(context for context, _ in keys),
            rows=tuple(row for _, row in keys),
            input_ids=self._pad(ids, self.pad_token_id),
            attention_mask=self._pad([torch.ones_like(i) for i in ids], 0),
            completion_lengths=tuple(len(completion_ids[row]) for _, row in keys),
        )

    def _pad(self, sequences: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad(sequences, padding_value=value, padding_side="left", pad_to_multiple_of=self.pad_to_multiple_of)

    def training_tensors(
        self, scores: TeacherScores, states: tuple[str, ...], dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Turns scores into the batch-first tensors that the loss reads.

        Args:
            scores ([`TeacherScores`]):
                Hidden states of each context.
            states (`tuple[str, ...]`):
                What the loss needs, of `"base"`, `"teacher"`, `"reference_only"` and `"delta"`. `delta` is
                `h_teacher - h_reference_only`, subtracted in fp32: through a linear head it carries the whole
                decomposed signal in half the memory.
            dtype (`torch.dtype`, *optional*):
                Dtype to store, the compute dtype. `None` keeps that of the scores.

        Returns:
            `dict[str, torch.Tensor]`: `"<state>_hidden"` of shape `[B, C, H]`.
        """
        return {f"{state}_hidden": _state(scores, state, dtype) for state in states}


def _state(scores: TeacherScores, state: str, dtype: torch.dtype | None) -> torch.Tensor:
    if state != "delta":
        return scores.hidden[state].to(dtype or scores.hidden[state].dtype)
    teacher, reference_only = scores.hidden["teacher"], scores.hidden["reference_only"]
    delta = torch.empty_like(teacher, dtype=dtype or teacher.dtype)
    for row in range(len(delta)):  # row by row: the fp32 difference of the whole batch would double the memory
        delta[row] = teacher[row].float() - reference_only[row].float()
    return delta
