"""
Prompts and completion ids -> scoring batches; scores -> tensors for the loss.

Shapes: `B` rows of the generation batch, `C` longest completion, `H` hidden size, `b` sequences of one scoring batch,
`L` its padded length, `S` tokens of a packed row, `p` shared prefixes of the batch, `P` their padded length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile
from typing import Any

import torch
from trl.trainer.utils import pad

from .multimodal import Fields, concatenate, layout
from .packing import Packing, arrange, pad_groups


# Tokens that teacher and reference-only prompt must share at least for their prefix to be run once: it takes one
# forward more, so a short prefix costs what it saves (docs/kernels.md, "Shared prefixes")
MIN_SHARED_TOKENS = 256

# The two contexts that begin alike where the template puts the reference first
_BRANCHES = ("teacher", "reference_only")


@dataclass(frozen=True)
class ScoringBatch:
    """
    Sequences scored together by the frozen model, in one forward, or in two where they continue shared prefixes.

    Prompt and completion are joined first. The completion is appended as ids, never as text: the same ids stand in
    every context. Padded sequences are padded on the left, so that a completion ends at the last column. Packed ones
    stand one after another in a single row. A sequence that is too long for one forward takes several (`chunks`).

    With prefixes, sequence `i` continues prefix `prefix_of[i]`: teacher and reference-only probe of a row the same,
    and so do rows with the same reference. The prefixes are padded on the left and the continuations on the right, so
    that the tokens of a sequence stay neighbours.

    Attributes:
        contexts (`tuple[str, ...]` of length `b`):
            Context of each sequence: `"base"`, `"teacher"` or `"reference_only"`.
        rows (`tuple[int, ...]` of length `b`):
            Row of the generation batch of each sequence.
        input_ids (`torch.Tensor` of shape `[b, L]`, packed `[1, S]`):
            Prompt and completion ids, without the prefix.
        attention_mask (`torch.Tensor` of shape `[b, L]`, packed `[1, S]`):
            1 for tokens, 0 for padding. The model does not see that of a packed row.
        completion_starts (`tuple[int, ...]` of length `b`):
            Column of each completion's first token, which is never the first column.
        completion_lengths (`tuple[int, ...]` of length `b`):
            Tokens of each completion.
        prefix_ids, prefix_mask (`torch.Tensor` of shape `[p, P]`, *optional*):
            Shared prefixes.
        prefix_of (`tuple[int, ...]` of length `b`):
            Prefix of each sequence; empty without prefixes.
        positions (`torch.Tensor` of shape `[1, S]`, *optional*):
            Of a packed row: position of each token in its sequence.
        chunks (`int`):
            Forwards that a single sequence is spread over, each with the keys and values of those before.
        fields (`dict[str, torch.Tensor]`):
            Images of the sequences and types of their tokens (`multimodal.py`); empty without images.
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
    positions: torch.Tensor | None = None
    chunks: int = 1
    fields: Fields = field(default_factory=dict)

    @property
    def forwards(self) -> int:
        """Forwards of the model that the batch takes."""
        return self.chunks if self.prefix_ids is None else 2

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
    packed: bool = False
    chunks: int = 1

    @property
    def forwards(self) -> int:
        return 2 if self.prefixes else self.chunks


class PurificationCollator:
    """
    Aligns the three contexts of each completion and turns their scores into training tensors.

    Args:
        pad_token_id (`int`):
            Padding id. Never attended to.
        max_sequences (`int`):
            Most sequences in a padded scoring batch. A packed one holds as many tokens as a padded one of the
            longest sequences would.
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
        return pad_groups(lengths, self.max_sequences, self.max_tokens, width, self.alone_beyond)

    def scoring_batches(
        self,
        prompt_ids: dict[str, list[list[int]]],
        completion_ids: list[list[int]],
        share_prefixes: bool = False,
        agree: Callable[[int], int] | None = None,
        packing: Packing | None = None,
        chunk: bool = False,
        fields: Mapping[str, list[Fields]] | None = None,
    ) -> list[ScoringBatch]:
        """
        Joins prompts and completions, sorts the sequences of all contexts by length, and packs or pads them.

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
            packing ([`Packing`], *optional*):
                When to pack. `None` pads.
            chunk (`bool`, *optional*, defaults to `False`):
                Whether a sequence of more than `max_tokens` tokens is spread over several forwards.
            fields (`Mapping[str, list[dict]]`, *optional*):
                Images of every row, by context. Sequences share a batch where their fields can be concatenated.
                Batches with images come first, the same number of them on every process that has any.

        Returns:
            `list[ScoringBatch]`.
        """
        sequences = {
            (context, row): prompt + completion_ids[row]
            for context, prompts in prompt_ids.items()
            for row, prompt in enumerate(prompts)
        }
        images = {(c, row): own for c, rows in (fields or {}).items() for row, own in enumerate(rows) if own}
        with_images = self._image_groups(sequences, images)
        text = {key: ids for key, ids in sequences.items() if key not in images}
        prefixes = shared_prefixes(prompt_ids) if share_prefixes else {}
        if chunk and self.max_tokens is not None:  # a pair that is too long for one forward is chunked, not shared
            for row in [row for row in prefixes if 2 * len(sequences["teacher", row]) > self.max_tokens]:
                del prefixes[row]
        groups = self._groups(text, prefixes, packing, chunk)
        if agree is not None:
            if fields is not None:
                with_images = _with_agreed_forwards(with_images, agree)
            groups = _with_agreed_forwards(groups, agree)
        return [self._batch(group, sequences, completion_ids, images) for group in [*with_images, *groups]]

    def _image_groups(
        self, sequences: dict[tuple[str, int], list[int]], images: dict[tuple[str, int], Fields]
    ) -> list[_Group]:
        layouts: dict[Any, list[tuple[str, int]]] = {}
        for key, fields in images.items():
            layouts.setdefault(layout(fields), []).append(key)
        return [
            _Group([keys[i] for i in indices])
            for keys in layouts.values()
            for indices in self.plan([len(sequences[key]) for key in keys])
        ]

    def _groups(
        self,
        sequences: dict[tuple[str, int], list[int]],
        prefixes: dict[int, tuple[int, ...]],
        packing: Packing | None,
        chunk: bool,
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
        if chunk and (most := self.max_tokens) is not None:
            overlong = sorted((key for key in rest if len(sequences[key]) > most), key=lambda k: -len(sequences[k]))
            groups[:0] = [_Group([key], chunks=-(-len(sequences[key]) // most)) for key in overlong]
            rest = [key for key in rest if len(sequences[key]) <= most]
        alone = arrange(
            [len(sequences[key]) for key in rest], self.max_sequences, self.max_tokens, packing, self.alone_beyond
        )
        return [*groups, *(_Group([rest[i] for i in one.indices], packed=one.packed) for one in alone)]

    def _batch(
        self,
        group: _Group,
        sequences: dict[tuple[str, int], list[int]],
        completion_ids: list[list[int]],
        images: dict[tuple[str, int], Fields],
    ) -> ScoringBatch:
        prefixes = group.prefixes or [()] * len(group.keys)
        ids = [sequences[key][len(prefix) :] for key, prefix in zip(group.keys, prefixes, strict=True)]
        lengths = [len(completion_ids[row]) for _, row in group.keys]
        positions = None
        if group.packed:
            input_ids, attention_mask = self._pad([[token for one in ids for token in one]], "right")
            rest = range(input_ids.shape[1] - sum(map(len, ids)))  # of `pad_to_multiple_of`: one more sequence
            positions = torch.tensor([[i for one in (*ids, rest) for i in range(len(one))]])
            ends = list(accumulate(map(len, ids)))
        else:
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
            positions=positions,
            chunks=group.chunks,
            fields=concatenate([images[key] for key in group.keys if key in images], input_ids.shape[1]),
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


def _with_agreed_forwards(groups: list[_Group], agree: Callable[[int], int]) -> list[_Group]:
    own = sum(group.forwards for group in groups)
    missing = agree(own) - own
    return _with_more_forwards(groups, missing) if missing > 0 and groups else groups


def _with_more_forwards(groups: list[_Group], missing: int) -> list[_Group]:
    """Splits or repeats groups until they take `missing` forwards more."""
    if all(group.prefixes for group in groups):  # the last pairs apart take two forwards, as they did together
        keys = groups.pop().keys
        half = len(keys) // 2
        groups = [*groups, _Group(keys[:half]), _Group(keys[half:])]
    for _ in range(missing):
        largest = max(range(len(groups)), key=lambda i: 0 if groups[i].forwards > 1 else len(groups[i].keys))
        group = groups[largest]
        if group.chunks > 1:  # nothing but chunked sequences
            groups[largest] = replace(group, chunks=group.chunks + 1)
            continue
        half = (len(group.keys) + 1) // 2
        parts = [group.keys[:half], group.keys[half:]] if len(group.keys) > 1 else [group.keys, group.keys]
        groups[largest : largest + 1] = [replace(group, keys=part) for part in parts]
    return groups
