"""
The backbone of a causal language model: everything below its output head.

Shapes: `b` sequences, `L` padded length, `S` tokens of a packed row, `H` hidden size.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def last_hidden_states(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    count: int,
    apart: bool = False,
    fields: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Runs the backbone and returns the states from which the last tokens are predicted.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model. Call it inside the forward of what DDP, FSDP or DeepSpeed made of it.
        input_ids (`torch.Tensor` of shape `[b, L]`):
            Token ids.
        attention_mask (`torch.Tensor` of shape `[b, L]`):
            1 for tokens, 0 for padding.
        count (`int`):
            Number of columns.
        apart (`bool`, *optional*, defaults to `False`):
            Run every row by itself, without padding, as [`run_rows_apart`] makes the model do from then on.
        fields (`Mapping[str, torch.Tensor]`, *optional*):
            Images and types of the tokens (`multimodal.py`). Such a batch is run as it is, of one row where rows must
            run apart.

    Returns:
        `torch.Tensor` of shape `[b, count, H]`: position `i` holds the state that predicts column `L - count + i`.
    """
    body = backbone(model)
    if (apart or runs_rows_apart(model)) and not fields:
        rows = [_row_alone(body, *row) for row in zip(input_ids, attention_mask.bool(), strict=True)]
        return torch.stack(rows)[:, :-1][:, -count:]
    positions = position_ids(body, attention_mask, input_ids.shape[1])
    outputs = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions, **(fields or {}))
    return outputs.last_hidden_state[:, :-1][:, -count:]


def packed_hidden_states(model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Runs the backbone on sequences that stand one after another in a single row, without padding.

    Attention stays inside a sequence: transformers finds the ends where the positions start again.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model, of which [`why_not_packable`] and [`packing_is_exact`] approve.
        input_ids (`torch.Tensor` of shape `[1, S]`):
            Token ids of all sequences.
        positions (`torch.Tensor` of shape `[1, S]`):
            Position of each token in its sequence.

    Returns:
        `torch.Tensor` of shape `[1, S, H]`: the state after each token.
    """
    body = backbone(model)
    mask: Any = None
    if body.config.model_type == "gpt_oss":  # makes its masks without looking at the positions, but takes masks made
        embedded = body.get_input_embeddings()(input_ids)
        kwargs: dict[str, Any] = {"attention_mask": None, "past_key_values": None, "position_ids": positions}
        mask = {
            "full_attention": create_causal_mask(body.config, embedded, **kwargs),
            "sliding_attention": create_sliding_window_causal_mask(body.config, embedded, **kwargs),
        }
    outputs = body(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return outputs.last_hidden_state


@torch.no_grad()
def packing_is_exact(model: Any, device: torch.device) -> torch.Tensor:
    """
    Whether a packed row gives the states of its sequences: tried on two short ones.

    A model whose code makes its own mask, or looks at neighbors in another way, lets the second sequence see the
    first. Half of the second one's states would then be far off; rounding in bf16, or a token that another expert
    takes, moves few of them.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model, in evaluation mode. Call it inside the forward of its wrapper. Two forwards.
        device (`torch.device`):
            Device of the ids.

    Returns:
        `torch.Tensor`: a scalar truth value; DeepSpeed's hooks want tensors of a forward.
    """
    count = 16
    ids = (torch.arange(2 * count, device=device) * 37 + 11) % model.config.get_text_config().vocab_size
    positions = torch.arange(count, device=device).repeat(2)
    packed = packed_hidden_states(model, ids[None], positions[None])[0, count:].float()
    alone = packed_hidden_states(model, ids[None, count:], positions[None, :count])[0].float()
    errors = (packed - alone).norm(dim=-1) / alone.norm(dim=-1)
    return errors.median() < 0.05


def position_ids(body: Any, attention_mask: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """
    Keyword argument `position_ids` `[b, count]` of the last columns: positions among the tokens, without the padding.

    Models with absolute positions (GPT-2 and others) number the columns otherwise, so that padding on the left would
    change what they compute. Empty for a backbone that takes no such argument, or that gives the tokens of an image
    positions in three dimensions (Qwen-VL), which it computes itself.

    Args:
        body (`torch.nn.Module`):
            Backbone.
        attention_mask (`torch.Tensor` of shape `[b, L]`):
            1 for tokens, 0 for padding; with a cache, over cached and new columns.
        count (`int`):
            Number of columns of this forward.

    Returns:
        `dict[str, torch.Tensor]`
    """
    if hasattr(body, "get_rope_index") or "position_ids" not in inspect.signature(body.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]}


def backbone(model: Any) -> Any:
    """The module that maps token ids to last hidden states, under PEFT as well."""
    model = model.base_model.model if is_peft_model(model) else model
    body = model.base_model
    return model.model if body is model else body  # Llama 4 and Mllama name no base model


def run_rows_apart(model: Any) -> None:
    """Makes `last_hidden_states` run every row of this model by itself, without padding."""
    backbone(model).rows_apart = True


def runs_rows_apart(model: Any) -> bool:
    """Whether `run_rows_apart` was called for this model."""
    return getattr(backbone(model), "rows_apart", False)


def _row_alone(body: Any, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """States `[L, H]` of one row `[L]`, run without its padding, whose states are zero."""
    for module in body.modules():  # dynamic scaling keeps the frequencies of the longest sequence so far
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if original is not None:
                module.register_buffer(f"{prefix}inv_freq", original.to(ids.device), persistent=False)
                setattr(module, name, module.original_max_seq_len)
    states = body(input_ids=ids[keep].unsqueeze(0), use_cache=False).last_hidden_state[0]
    return states.new_zeros(len(ids), states.shape[-1]).index_put((keep.to(states.device),), states)


def longest_alike(model: Any) -> int | None:
    """
    Longest sequence in tokens up to which rows of a batch do not change each other's rotary embedding.

    Beyond it, longrope takes other frequencies for the complete batch, and dynamic scaling those of its longest row,
    so a row must run by itself.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model.

    Returns:
        `int`, *optional*: tokens; `None` if the length of a batch changes nothing.
    """
    config = model.config.get_text_config()
    limits = []
    for part in _rope_parts(config):
        if part.get("rope_type") == "longrope":
            original = part.get("original_max_position_embeddings")
            limits.append(int(original or config.max_position_embeddings))
        elif part.get("rope_type") == "dynamic":
            limits.append(int(config.max_position_embeddings) - 1)
    return min(limits, default=None)


def _rope_parts(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a configuration, and those of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in (rope, *rope.values()) if isinstance(part, dict)]


def context_length(model: Any) -> int | None:
    """Longest sequence in tokens that the model's configuration allows; `None` if it sets no limit."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if length is None or length <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    # The one kind of scaling whose configuration keeps the length before scaling
    return int(length * rope.get("factor", 1.0)) if rope.get("rope_type") == "dynamic" else length


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode (no dropout, no gradient checkpointing) and back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def keep_trainable_4bit(model: torch.nn.Module) -> None:
    """
    Keeps bitsandbytes from repacking the 4-bit weights of a model that is trained.

    On CPUs with AVX-512-bf16 a 4-bit layer in evaluation mode repacks its weight for a kernel without a backward:
    after the first scoring pass, or after `evaluate`, the gradients would be silently wrong.

    Args:
        model (`torch.nn.Module`):
            The student.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def why_not_packable(model: Any) -> str | None:
    """
    Why sequences in one row of a model would not be scored as they are on their own.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model.

    Returns:
        `str`, *optional*: the reason; `None` if nothing in its configuration speaks against it. Whether its code
        keeps the sequences apart is for [`packing_is_exact`] to try.
    """
    if "position_ids" not in inspect.signature(backbone(model).forward).parameters:
        return f"{model.config.model_type} takes no positions, from which the ends of the sequences would be read"
    return why_not_shareable(model)


def why_not_shareable(model: Any) -> str | None:
    """
    Why a model cannot continue one prefix in two ways and score exactly what separate forwards score.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model.

    Returns:
        `str`, *optional*: the reason; `None` if it can.
    """
    config = model.config.get_text_config()
    if runs_rows_apart(model):
        return f"rows of {config.model_type} run one by one"
    if config is not model.config:
        return f"{model.config.model_type} is more than a language model"
    if longest_alike(model) is not None:
        return f"the rotary embedding of {config.model_type} depends on the length of the complete sequence"
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others or getattr(model, "_is_stateful", False):
        kinds_named = f" ({', '.join(sorted(others))})" if others else ""
        return f"{config.model_type} has layers other than full and sliding-window attention{kinds_named}"
    return None
