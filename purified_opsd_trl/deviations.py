"""
How far a model's states are from what the loss takes them for: its output head, padding, later tokens.

Deviations are relative, `|x - y| / |y|` of each token, and are compared with what rounding alone does to this model.
Nothing here knows the name of an architecture.

Shapes: `b` sequences, `L` padded length, `H` hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .backbone import backbone, last_hidden_states
from .head import LMHead, gathered


# Tokens of the checked row and of its beginnings that are rows of their own. The second exceeds the windows of short
# convolutions and compressed attention also where it is padded; the shortest may get no mask at all. The padding of 73
# and 150 tokens is no multiple of such windows.
LENGTHS = (193, 160, 7)
LONG = LENGTHS[0]


@dataclass(frozen=True)
class Deviations:
    """
    How far a model's states are from what the loss takes them for; each relative, of its typical token.

    Attributes:
        head (`float`):
            Logits of the output head against the model's own, less their mean over the vocabulary.
        later (`float`):
            States of a row against those of the same row with more tokens after it.
        together (`float`):
            States of rows in one padded batch against those of the rows by themselves.
        rounding (`float`):
            States of a row in a batch of two equal ones against those of the row by itself.
    """

    head: float
    later: float
    together: float
    rounding: float


def tolerance(dtype: torch.dtype, layers: int, rounding: float) -> float:
    """
    Largest relative deviation that rounding may explain.

    Args:
        dtype (`torch.dtype`):
            Coarsest dtype that the model computes in.
        layers (`int`):
            Layers; each adds an independent rounding error, so the error grows with the square root.
        rounding (`float`):
            Deviation between two forwards of this model that differ in shape alone.

    Returns:
        `float`: at least 1e-3, the precision of the TF32 products that fp32 may run in.
    """
    return max(1e-3, 4 * torch.finfo(dtype).eps * math.sqrt(layers), 8 * rounding)


def deviations(model: Any, ids: list[int], pad_token_id: int, device: torch.device) -> Deviations:
    """
    Measures a model on one row. Call it inside the forward of what DDP, FSDP or DeepSpeed made of the model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model, without dropout.
        ids (`list[int]`):
            Token ids of the row, at least 4.
        pad_token_id (`int`):
            Padding id.
        device (`torch.device`):
            Device of the ids.

    Returns:
        [`Deviations`]
    """
    rows = [torch.tensor([ids[: max(2, len(ids) * n // LONG)]], device=device) for n in LENGTHS]
    alone = [states_alone(model, row) for row in rows]
    # Not `model(...)`: its hooks have run, and under FSDP2 a second time would leave the weights gathered
    logits = model.forward(input_ids=rows[1], use_cache=False)["logits"]
    head = LMHead.from_model(model)
    with gathered(head):
        own = head.logits(alone[1])
    twice = states_alone(model, rows[1].repeat(2, 1))[:1]
    batch, mask, starts = _padded([row[0] for row in rows], pad_token_id)
    together = last_hidden_states(model, batch, mask, batch.shape[1])
    half = is_half(coarsest_dtype(model))
    apart = [
        typical(states[start : start + row.shape[1]], expected[0], half)
        for states, start, row, expected in zip(together, starts, rows, alone, strict=True)
    ]
    return Deviations(
        head=typical(_centered(own), _centered(logits), half),
        later=max(typical(alone[0][:, : part.shape[1]], part, half) for part in alone[1:]),
        together=max(apart),
        rounding=typical(twice, alone[1], half),
    )


def states_alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[b, L, H]` as the model itself computes them: no mask, no positions."""
    return backbone(model)(input_ids=ids, use_cache=False)["last_hidden_state"]


def _padded(rows: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Ids and mask `[b, L]` of rows, padded as in training: prompts on the left, completions on the right."""
    prompts = [len(row) // 2 if i else len(row) - len(rows[1]) // 4 for i, row in enumerate(rows)]
    starts = [max(prompts) - prompt for prompt in prompts]
    ends = [start + len(row) for start, row in zip(starts, rows, strict=True)]
    ids = torch.full((len(rows), max(ends) + 1), pad, device=rows[0].device)  # the last state predicts one column more
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, starts[i] : ends[i]], mask[i, starts[i] : ends[i]] = row, 1
    return ids, mask, starts


def _centered(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() - logits.float().mean(-1, keepdim=True)


def typical(states: torch.Tensor, expected: torch.Tensor, half: bool) -> float:
    """
    Relative distance of `states` from `expected`, `[..., H]` each.

    Of the worst token; in half precision of the median one, since a mixture of experts may there send a token to
    another expert.
    """
    states, expected = states.float().flatten(0, -2), expected.float().flatten(0, -2)
    distance = (states - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)
    return float(distance.median() if half else distance.max())


def coarsest_dtype(model: Any) -> torch.dtype:
    """Of the dtypes of the floating-point parameters and of autocast the one with the fewest digits."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    if any(not p.is_floating_point() for p in model.parameters()):
        dtypes.add(torch.bfloat16)  # quantized weights are multiplied in half precision
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype has half precision."""
    return torch.finfo(dtype).bits <= 16
