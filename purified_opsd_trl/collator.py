"""
Prompts and completion ids -> scoring batches; scores -> tensors for the loss.

Shapes: `B` rows of the generation batch, `C` longest completion, `H` hidden size, `b` sequences of one scoring batch,
`L` its padded length, `p` shared prefixes of the batch, `P` their padded length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from trl.trainer.utils import pad


# Tokens that teacher and reference-only prompt must share at least for their prefix to be run once: it takes one
# forward more, so a short prefix costs what it saves (docs/kernels.md, "Shared prefixes")
MIN_SHARED_TOKENS = 256

# The two contexts that begin alike where the template puts the reference first
_BRANCHES = ("teacher", "reference_only")


@dataclass(frozen=True)
class ScoringBatch:
    """
    Sequences scored together by the frozen model, in one forward, or in two where they continue shared prefixes.

    Prompt and completion are joined first and padded on the left, so that a completion ends at the last column. It is
    appended as ids, never as text: the same ids stand in every context.

    With prefixes, sequence `i` continues prefix `prefix_of[i]`: teacher and reference-only probe of a row the same,
    and so do rows with the same reference. The prefixes are padded on the left and the continuations on the right, so
    that the tokens of a sequence stay neighbours.

    Attributes:
        contexts (`tuple[str, ...]` of length `b`):
            Context of each sequence: `"base"`, `"teacher"` or `"reference_only"`.
        rows (`tuple[int, ...]` of length `b`):
            Row of the generation batch of each sequence.
        input_ids (`torch.Tensor` of shape `[b, L]`):
            Prompt and completion ids, without the prefix.
        attention_mask (`torch.Tensor` of shape `[b, L]`):
            1 for tokens, 0 for padding.
        completion_starts (`tuple[int, ...]` of length `b`):
            Column of each completion's first token, which is never the first column.
        completion_lengths (`tuple[int, ...]` of length `b`):
            Tokens of each completion.
        prefix_ids, prefix_mask (`torch.Tensor` of shape `[p, P]`, *optional*):
            Shared prefixes.
        prefix_of (`tuple[int, ...]` of length `b`):
            Prefix of each sequence; empty without prefixes.
    """

    contexts: tuple[str, ...]
    rows: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_starts: tuple[int, ...]
    completion_lengths: tuple[int, ...]
    prefix_ids: torch.Tensor | None = None
    prefix_mask: torch.Tensor | None = None
    prefix_of: tuple[int, ...] = ()

    @property
    def forwards(self) -> int:
        """Forwards of the model that the batch takes."""
        return 1 if self.prefix_ids is None else 2

    @property
    def masks(self) -> list[torch.Tensor]:
        """Attention masks of these forwards."""
        return [mask for mask in (self.prefix_mask, self.attention_mask) if mask is not None]


def shared_prefixes(prompt_ids: Mapping[str, list[list[int]]]) -> dict[int, tuple[int, ...]]:
    """
    Rows whose teacher and reference-only prompt begin with the same tokens.

    Args:
        prompt_ids (`Mapping[str, list[list[int]]]`):
            Prompt ids of every row, by context.

    Returns:
        `dict[int, tuple[int, ...]]`: ids of the common prefix by row, where it is worth a forward of its own. The last
        token of a prompt is never part of it: it predicts the first token of the completion.
    """
    prefixes = {}
    pairs = zip(prompt_ids.get("teacher", []), prompt_ids.get("reference_only", []), strict=False)
    for row, (teacher, reference_only) in enumerate(pairs):
        both = zip(teacher[:-1], reference_only[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], both))
        if common >= MIN_SHARED_TOKENS:
            prefixes[row] = tuple(teacher[:common])
    return prefixes


def unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The ids `[B, L]` that a mask `[B, L]` keeps, row by row."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


@dataclass(frozen=True)
class _Group:
    """Sequences of one batch as `(context, row)`, with the prefix of each where pairs of them share one."""

    keys: list[tuple[str, int]]
    prefixes: list[tuple[int, ...]] = field(default_factory=list)


class PurificationCollator:
    """
    Aligns the three contexts of each completion and turns their scores into training tensors.

    Args:
        pad_token_id (`int`):
            Padding id. Never attended to.
        max_sequences (`int`):
            Most sequences in a scoring batch.
        max_tokens (`int`, *optional*):
            Most tokens, padding included, in a scoring batch; a longer sequence, or the two of a row that share a
            prefix, are a batch of their own.
        pad_to_multiple_of (`int`, *optional*):
            Length multiple of the scoring batches.
        alone_beyond (`int`, *optional*):
            Tokens beyond which a sequence is a batch of its own, [`~backbone.longest_alike`].
    """

    def __init__(
        self,
        pad_token_id: int,
        max_sequences: int,
        max_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        alone_beyond: int | None = None,
    ):
        self.pad_token_id = pad_token_id
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.pad_to_multiple_of = pad_to_multiple_of
        self.alone_beyond = alone_beyond

    def plan(self, lengths: Sequence[int], width: int = 1) -> list[list[int]]:
        """
        Groups sequences of similar length.

        Args:
            lengths (`Sequence[int]`):
                Tokens of each sequence, or of the longest of each `width` sequences that stay together.
            width (`int`, *optional*, defaults to `1`):
                Sequences that each index stands for.

        Returns:
            `list[list[int]]`: groups of indices, the longest sequences first (a lack of memory shows at once).
        """
        groups: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            # The group's first sequence is its longest, so its length is the padded length
            count = width * (len(groups[-1]) + 1) if groups else 0
            fits = groups and count <= self.max_sequences
            if fits and self.alone_beyond is not None:
                fits = lengths[groups[-1][0]] <= self.alone_beyond
            if fits and self.max_tokens is not None:
                fits = count * lengths[groups[-1][0]] <= self.max_tokens
            if fits:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def scoring_batches(
        self,
        prompt_ids: dict[str, list[list[int]]],
        completion_ids: list[list[int]],
        share_prefixes: bool = False,
        agree: Callable[[int], int] | None = None,
    ) -> list[ScoringBatch]:
        """
        Joins prompts and completions, sorts the sequences of all contexts by length and pads them.

        Args:
            prompt_ids (`dict[str, list[list[int]]]`):
                Prompt ids of every row, by context.
            completion_ids (`list[list[int]]`):
                Completion ids of every row, the same for all contexts.
            share_prefixes (`bool`, *optional*, defaults to `False`):
                Whether the prefix that a row's teacher and reference-only prompt share is run once for both, and for
                all rows of the batch that begin so. The two stay in one batch, even where it may hold one sequence.
            agree (`Callable[[int], int]`, *optional*):
                Number of forwards of this process to the number that all processes must run, the largest of them:
                where parameters are sharded, one forward more on one process would hang. Batches are split, largest
                first, and when nothing is left to split the last one is repeated; a repetition writes the same values
                again.

        Returns:
            `list[ScoringBatch]`.
        """
        sequences = {
            (context, row): prompt + completion_ids[row]
            for context, prompts in prompt_ids.items()
            for row, prompt in enumerate(prompts)
        }
        groups = self._groups(sequences, shared_prefixes(prompt_ids) if share_prefixes else {})
        own = sum(2 if group.prefixes else 1 for group in groups)
        missing = 0 if agree is None else agree(own) - own
        if missing > 0:
            groups = _with_more_forwards(groups, missing)
        return [self._batch(group, sequences, completion_ids) for group in groups]

    def _groups(
        self, sequences: dict[tuple[str, int], list[int]], prefixes: dict[int, tuple[int, ...]]
    ) -> list[_Group]:
        longest: dict[tuple[int, ...], int] = {}  # by prefix: planned by it, rows with the same prefix stay neighbours
        for row, prefix in prefixes.items():
            length = max(len(sequences[context, row]) for context in _BRANCHES)
            longest[prefix] = max(length, longest.get(prefix, 0))
        paired = [row for prefix in longest for row in prefixes if prefixes[row] == prefix]
        groups = []
        for indices in self.plan([longest[prefixes[row]] for row in paired], width=2):
            rows = [paired[i] for i in indices]
            groups.append(_Group([(c, row) for c in _BRANCHES for row in rows], [prefixes[row] for row in rows] * 2))
        rest = [key for key in sequences if key[0] not in _BRANCHES or key[1] not in prefixes]
        alone = self.plan([len(sequences[key]) for key in rest])
        return [*groups, *(_Group([rest[i] for i in indices]) for indices in alone)]

    def _batch(
        self, group: _Group, sequences: dict[tuple[str, int], list[int]], completion_ids: list[list[int]]
    ) -> ScoringBatch:
        prefixes = group.prefixes or [()] * len(group.keys)
        ids = [sequences[key][len(prefix) :] for key, prefix in zip(group.keys, prefixes, strict=True)]
        lengths = [len(completion_ids[row]) for _, row in group.keys]
        input_ids, attention_mask = self._pad(ids, "right" if group.prefixes else "left")
        ends = [len(i) if group.prefixes else input_ids.shape[1] for i in ids]
        distinct = list(dict.fromkeys(group.prefixes))
        prefix_ids, prefix_mask = self._pad(distinct, "left") if distinct else (None, None)
        return ScoringBatch(
            contexts=tuple(context for context, _ in group.keys),
            rows=tuple(row for _, row in group.keys),
            input_ids=input_ids,
            attention_mask=attention_mask,
            completion_starts=tuple(end - length for end, length in zip(ends, lengths, strict=True)),
            completion_lengths=tuple(lengths),
            prefix_ids=prefix_ids,
            prefix_mask=prefix_mask,
            prefix_of=tuple(distinct.index(prefix) for prefix in group.prefixes),
        )

    def _pad(self, sequences: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [torch.tensor(sequence) for sequence in sequences]
        padded = [
            pad(tensors, padding_value=value, padding_side=side, pad_to_multiple_of=self.pad_to_multiple_of)
            for tensors, value in ((ids, self.pad_token_id), ([torch.ones_like(i) for i in ids], 0))
        ]
        return padded[0], padded[1]

    def training_tensors(
        self, hidden: Mapping[str, torch.Tensor], states: tuple[str, ...], dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Turns scores into the batch-first tensors that the loss reads.

        Args:
            hidden (`Mapping[str, torch.Tensor]`):
                Hidden states `[B, C, H]` of each context, [`TeacherScores.hidden`].
            states (`tuple[str, ...]`):
                What the loss needs, of `"base"`, `"teacher"`, `"reference_only"` and `"delta"`. `delta` is
                `h_teacher - h_reference_only`, subtracted in fp32: through a linear head it carries the whole
                decomposed signal in half the memory.
            dtype (`torch.dtype`, *optional*):
                Dtype to store, the compute dtype. `None` keeps that of the scores.

        Returns:
            `dict[str, torch.Tensor]`: `"<state>_hidden"` of shape `[B, C, H]`.
        """
        return {f"{state}_hidden": _state(hidden, state, dtype) for state in states}


def _state(hidden: Mapping[str, torch.Tensor], state: str, dtype: torch.dtype | None) -> torch.Tensor:
    if state != "delta":
        return hidden[state].to(dtype or hidden[state].dtype)
    teacher, reference_only = hidden["teacher"], hidden["reference_only"]
    delta = torch.empty_like(teacher, dtype=dtype or teacher.dtype)
    for row in range(len(delta)):  # row by row: the fp32 difference of the whole batch would double the memory
        delta[row] = teacher[row].float() - reference_only[row].float()
    return delta


def _with_more_forwards(groups: list[_Group], missing: int) -> list[_Group]:
    """Splits or repeats groups until they take `missing` forwards more."""
    if all(group.prefixes for group in groups):  # the last pairs apart take two forwards, as they did together
        keys = groups.pop().keys
        half = len(keys) // 2
        groups = [*groups, _Group(keys[:half]), _Group(keys[half:])]
    for _ in range(missing):
        largest = max(range(len(groups)), key=lambda i: 0 if groups[i].prefixes else len(groups[i].keys))
        keys = groups[largest].keys
        half = (len(keys) + 1) // 2
        parts = [keys[:half], keys[half:]] if len(keys) > 1 else [keys, keys]
        groups[largest : largest + 1] = [_Group(part) for part in parts]
    return groups
