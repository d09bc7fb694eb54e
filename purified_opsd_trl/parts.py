"""
Parts of a micro-batch: rows that take one forward of the student, packed into one row or padded side by side.

Shapes: `B` rows of the micro-batch, `P` and `C` padded lengths of its prompts and completions, `N` tokens with loss,
`H` hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from .backbone import last_hidden_states, packed_hidden_states
from .multimodal import TOKEN_TYPES, batch_fields
from .packing import Forward


class Part(dict[str, Any]):
    """
    Tensors of some rows of a micro-batch, under their names in it.

    Args:
        inputs (`Mapping[str, Any]`):
            Tensors.
        rows (`Sequence[int]`):
            Their rows of the micro-batch.
        packed (`bool`):
            Whether the student runs them in one row without padding.
    """

    def __init__(self, inputs: Mapping[str, Any], rows: Sequence[int], packed: bool):
        super().__init__(inputs)
        self.rows, self.packed = tuple(rows), packed


def loss_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """`[B, C]`: 1 at the tokens that the student wrote and learns from, 0 at padding and tool results."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def row_lengths(inputs: Mapping[str, Any]) -> list[int]:
    """Tokens of each row, prompt and completion."""
    return (inputs["prompt_mask"].sum(dim=1) + inputs["completion_mask"].sum(dim=1)).tolist()


def take_part(inputs: Mapping[str, Any], forward: Forward, counts: bool = True) -> Part:
    """
    The rows of one forward, without the columns that only other rows need.

    Args:
        inputs (`Mapping[str, Any]`):
            The micro-batch; a tensor of `B` rows is cut, anything else is kept.
        forward ([`Forward`]):
            Rows, and whether they are packed.
        counts (`bool`, *optional*, defaults to `True`):
            Whether the rows carry loss; a repetition does not.

    Returns:
        [`Part`]
    """
    rows = forward.indices
    size = len(inputs["prompt_mask"])
    part = Part(inputs, rows, forward.packed)
    if rows != tuple(range(size)):
        by_row = split_pixel_values_by_grid(dict(inputs))  # images become lists, one element per row
        for name, value in by_row.items():
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == size:
                part[name] = value[torch.tensor(rows, device=value.device)]
            elif isinstance(value, list) and len(value) == size:
                part[name] = [value[row] for row in rows]
        part = Part(unsplit_pixel_values_by_grid(part), rows, forward.packed)
        prompt, completion = (int(part[f"{name}_mask"].sum(dim=1).max()) for name in ("prompt", "completion"))
        before = inputs["prompt_ids"].shape[1]
        for name, value in part.items():
            if name in TOKEN_TYPES:
                part[name] = value[:, before - prompt : before + completion]
            elif name in ("prompt_ids", "prompt_mask"):
                part[name] = value[:, value.shape[1] - prompt :]
            elif name in ("completion_ids", "completion_mask", "tool_mask") or name.endswith("_hidden"):
                part[name] = value[:, :completion]
    if not counts:
        part["tool_mask"] = torch.zeros_like(part["completion_mask"])
        if "decomposition_positions" in part:
            part["decomposition_positions"] = torch.full_like(part["decomposition_positions"], -1)
    return part


def with_more_forwards(forwards: list[Forward], missing: int) -> tuple[list[Forward], int]:
    """Splits the forwards of most rows; returns how many are still missing when each holds a single row."""
    forwards = list(forwards)
    while missing and max(len(one.indices) for one in forwards) > 1:
        largest = max(range(len(forwards)), key=lambda i: len(forwards[i].indices))
        one = forwards[largest]
        half = (len(one.indices) + 1) // 2
        halves = one.indices[:half], one.indices[half:]
        forwards[largest : largest + 1] = [replace(one, indices=indices) for indices in halves]
        missing -= 1
    return forwards, missing


def student_states(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    packed: bool,
    pad_to_multiple_of: int | None = None,
    alone_beyond: int | None = None,
) -> tuple[torch.Tensor, int]:
    """
    Hidden states of the student at the tokens that carry loss.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The unwrapped student, inside the forward of its wrapper.
        inputs (`Mapping[str, torch.Tensor]`):
            Prompts `[B, P]`, padded on the left, and completions `[B, C]`, padded on the right.
        packed (`bool`):
            Whether the rows run in one row without padding; otherwise they are joined and padded on the left.
        pad_to_multiple_of (`int`, *optional*):
            Length multiple of what runs.
        alone_beyond (`int`, *optional*):
            Tokens beyond which a row runs by itself, without padding.

    Returns:
        `torch.Tensor` of shape `[N, H]` and `int`: the states that predict the tokens, row by row, and the number of
        tokens that ran, with padding.
    """
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    wanted = torch.cat([torch.zeros_like(inputs["prompt_mask"]), loss_mask(inputs)], dim=1).bool()
    multiple = pad_to_multiple_of or 1
    if packed:
        positions = (mask.cumsum(dim=1) - 1)[mask]
        extra = -len(positions) % multiple  # one more sequence, which nothing reads
        positions = torch.cat([positions, torch.arange(extra, device=positions.device)])
        ids = torch.cat([ids[mask], ids.new_zeros(extra)])
        wanted = torch.cat([wanted[mask], wanted.new_zeros(extra)]).unsqueeze(0)
        hidden = packed_hidden_states(model, ids.unsqueeze(0), positions.unsqueeze(0))[:, :-1]
    else:
        longest = int(mask.sum(dim=1).max())
        order = mask.int().argsort(dim=1, stable=True)[:, -longest:]  # the padding first
        left = (-longest % multiple, 0)
        ids, mask, wanted = (pad(tensor.gather(1, order), left) for tensor in (ids, mask, wanted))
        fields = batch_fields(inputs)
        for name in TOKEN_TYPES & fields.keys():
            fields[name] = pad(fields[name].gather(1, order), left)
        apart = alone_beyond is not None and longest > alone_beyond
        hidden = last_hidden_states(model, ids, mask.to(inputs["prompt_mask"].dtype), ids.shape[1] - 1, apart, fields)
    return hidden[wanted[:, 1:].to(hidden.device)], ids.numel()
