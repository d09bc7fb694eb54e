"""
Arranges sequences into forwards: packed into one row without padding, or padded side by side, whichever costs less.

```text
lengths -> forwards (indices, packed) -> [1, S] ids and positions, or [b, L] ids and mask -> last hidden states
```

Shapes: `b` padded sequences, `L` their padded length, `S` tokens of a packed row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .estimate import Model


# Tokens below which a forward takes no less time: its launches, or its reading of the weights, outweigh the products
MIN_TOKENS = 64

_VARIABLE_LENGTHS = ("flash", "flex")  # parts of the names of attention implementations that skip other sequences


@dataclass(frozen=True)
class Forward:
    """
    Sequences of one forward.

    Args:
        indices (`tuple[int, ...]`):
            Which sequences.
        packed (`bool`):
            Whether they stand in one row without padding.
    """

    indices: tuple[int, ...]
    packed: bool = False


@dataclass(frozen=True)
class Packing:
    """
    When to pack sequences, and what the layers of a forward cost.

    Args:
        by_cost (`bool`):
            Whether to pack only where it costs fewer FLOPs than padding; otherwise always.
        dense (`bool`):
            Whether attention computes the scores of all pairs of the row's tokens and masks those of other sequences,
            as `sdpa` and `eager` do.
        per_token (`float`):
            FLOPs of the linear maps per token.
        per_pair (`float`):
            FLOPs of attention per pair of a query and a key.
    """

    by_cost: bool
    dense: bool
    per_token: float
    per_pair: float

    @classmethod
    def of_model(cls, config: Any, by_cost: bool) -> "Packing":
        """
        Costs by the model's shape. `by_cost` has no effect where attention skips the tokens of other sequences.

        Args:
            config ([`~transformers.PretrainedConfig`]):
                Configuration of the model.
            by_cost (`bool`):
                Whether to pack only where it pays.

        Returns:
            [`Packing`]
        """
        dense = not any(name in str(config._attn_implementation) for name in _VARIABLE_LENGTHS)
        text = config.get_text_config()
        hidden, heads = text.hidden_size, text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        inner = getattr(text, "intermediate_size", None) or 4 * hidden
        if (experts := getattr(text, "num_experts_per_tok", None)) is not None:
            inner = experts * (getattr(text, "moe_intermediate_size", None) or inner)
        layers = text.num_hidden_layers
        body = Model(layers, hidden, heads, groups, head_dim, inner, vocab=0).body
        return cls(by_cost and dense, dense, 2.0 * body, 4.0 * layers * heads * head_dim)

    def flops(self, lengths: Sequence[int], packed: bool) -> float:
        """FLOPs of one forward over sequences of these lengths; causal attention without a mask takes half."""
        longest, count, total = max(lengths), len(lengths), sum(lengths)
        if not packed:
            total = count * longest
            pairs = total * longest / (2 if min(lengths) == longest else 1)
        elif self.dense and count > 1:
            pairs = total**2
        else:
            pairs = sum(length**2 for length in lengths) / 2
        return max(total, MIN_TOKENS) * self.per_token + pairs * self.per_pair


def arrange(
    lengths: Sequence[int],
    max_sequences: int,
    max_tokens: int | None = None,
    packing: Packing | None = None,
    alone_beyond: int | None = None,
) -> list[Forward]:
    """
    Groups sequences into forwards.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each sequence.
        max_sequences (`int`):
            Most sequences of a padded forward. A packed one may hold more: as many tokens as a padded one of the
            longest sequences would.
        max_tokens (`int`, *optional*):
            Most tokens of a forward, padding included; a longer sequence has one of its own.
        packing ([`Packing`], *optional*):
            When to pack. `None` pads.
        alone_beyond (`int`, *optional*):
            Tokens beyond which a padded sequence has a forward of its own, [`~backbone.longest_alike`].

    Returns:
        `list[Forward]`: those with the longest sequences first (a lack of memory shows at once).
    """
    padded = [Forward(tuple(group)) for group in pad_groups(lengths, max_sequences, max_tokens, 1, alone_beyond)]
    if packing is None or not lengths:
        return padded
    longest = max(lengths)
    capacity = max_sequences * longest if max_tokens is None else max_tokens
    if not packing.by_cost:
        return _packed(lengths, capacity)
    plans = [padded]
    # The scores of all pairs of a packed row take no more room than those of the padded rows do
    limit = min(capacity, longest * math.isqrt(max_sequences))
    room = min(longest, capacity)
    while room <= limit:
        plans.append(_packed(lengths, room))
        room *= 2

    def flops(plan: list[Forward]) -> float:
        return sum(packing.flops([lengths[i] for i in one.indices], one.packed) for one in plan)

    return min(plans, key=flops)  # the first of equals: padded


def pad_groups(
    lengths: Sequence[int],
    max_sequences: int,
    max_tokens: int | None = None,
    width: int = 1,
    alone_beyond: int | None = None,
) -> list[list[int]]:
    """
    Groups sequences of similar length, to be padded.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each sequence, or of the longest of each `width` sequences that stay together.
        max_sequences (`int`):
            Most sequences of a group.
        max_tokens (`int`, *optional*):
            Most tokens of a group, padding included.
        width (`int`, *optional*, defaults to `1`):
            Sequences that each index stands for.
        alone_beyond (`int`, *optional*):
            Tokens beyond which a sequence is a group of its own.

    Returns:
        `list[list[int]]`: groups of indices, the longest sequences first.
    """
    groups: list[list[int]] = []
    for index in _longest_first(lengths):
        # The group's first sequence is its longest, so its length is the padded length
        count = width * (len(groups[-1]) + 1) if groups else 0
        fits = groups and count <= max_sequences
        if fits and max_tokens is not None:
            fits = count * lengths[groups[-1][0]] <= max_tokens
        if fits and alone_beyond is not None:
            fits = lengths[groups[-1][0]] <= alone_beyond
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _packed(lengths: Sequence[int], capacity: int) -> list[Forward]:
    """Packs of at most `capacity` tokens: each sequence goes where the least room is left."""
    packs: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        fitting = [i for i, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            packs[best].append(index)
            room[best] -= lengths[index]
        else:
            packs.append([index])
            room.append(capacity - lengths[index])
    return [Forward(tuple(pack), packed=True) for pack in packs]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
