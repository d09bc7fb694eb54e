"""
The tensors of a vision-language model beside the token ids, `fields`: pixel values, grids, types of the tokens.

```text
prompt of one row -> ids and fields
rows of a batch   -> fields, concatenated along their first dimension; types of tokens padded on the left
```

Shapes: `b` sequences of a batch, `L` padded length. The other dimensions of a field depend on the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from trl.data_utils import prepare_multimodal_messages

from .images import images_of


Fields: TypeAlias = dict[str, torch.Tensor]

TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}  # fields of shape [b, L]; the others belong to the images
_FIELDS = (  # those that TRL hands to the student
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "image_position_ids"),
    *sorted(TOKEN_TYPES),
)


def encode(processor: Any, prompt: Any, **template_kwargs: Any) -> tuple[list[int], Fields]:
    """
    Token ids of one prompt, with every image expanded to its placeholders, and the fields of its images.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor.
        prompt (`list[dict]`):
            Messages with opened images.
        template_kwargs:
            Keyword arguments of `apply_chat_template`.

    Returns:
        `tuple[list[int], dict[str, torch.Tensor]]`: ids, and fields; none for a prompt without images.
    """
    encoded = processor.apply_chat_template(
        [prepare_multimodal_messages(prompt)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **template_kwargs,
    )
    ids = [int(i) for i in encoded["input_ids"][0]]
    return ids, _fields(encoded) if "pixel_values" in encoded else {}


def sequence_fields(
    processor: Any,
    prompt: Any,
    completion_ids: list[int],
    tool_images: Sequence[Any],
    image_token: int | None,
    **kwargs: Any,
) -> tuple[list[int], Fields]:
    """
    Ids of one prompt, and fields of the sequence that the completion makes of it.

    Images that tools returned have their placeholders in the completion, so that every context reads them.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor.
        prompt (`list[dict]`):
            Messages with opened images.
        completion_ids (`list[int]`):
            Completion ids.
        tool_images (`Sequence`):
            Images that tools returned, in order.
        image_token (`int`, *optional*):
            Id of the placeholder in the completion.
        kwargs:
            Keyword arguments of `apply_chat_template`.

    Returns:
        `tuple[list[int], dict[str, torch.Tensor]]`: ids of the prompt, and fields.
    """
    ids, fields = encode(processor, prompt, **kwargs)
    if tool_images:  # as TRL does for the student
        fields = _fields(processor.image_processor(images=[*images_of(prompt), *tool_images], return_tensors="pt"))
        types = torch.tensor([[int(i == image_token) for i in [*ids, *completion_ids]]])
        return ids, {**fields, "mm_token_type_ids" if "image_grid_thw" in fields else "token_type_ids": types}
    for name in TOKEN_TYPES & fields.keys():
        fields[name] = torch.cat([fields[name], fields[name].new_zeros(1, len(completion_ids))], dim=1)
    return ids, fields


def _fields(encoded: Mapping[str, Any]) -> Fields:
    known = {name: encoded[name] for name in _FIELDS if encoded.get(name) is not None}
    return {n: v if isinstance(v, torch.Tensor) else torch.as_tensor(np.array(v)) for n, v in known.items()}


def layout(fields: Fields) -> tuple[Any, ...]:
    """What two rows must have in common for their fields to be concatenated; empty without fields."""
    return tuple((name, () if name in TOKEN_TYPES else value.shape[1:]) for name, value in sorted(fields.items()))


def concatenate(rows: Sequence[Fields], length: int) -> Fields:
    """Fields of a batch of sequences with one layout, whose ids `[b, length]` are padded on the left."""
    return {
        name: torch.cat([_padded(row[name], length) if name in TOKEN_TYPES else row[name] for row in rows])
        for name in (rows[0] if rows else ())
    }


def _padded(types: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(types, (length - types.shape[1], 0))


def batch_fields(inputs: Mapping[str, Any]) -> Fields:
    """Fields of a micro-batch of TRL's; of one whose images are all in other micro-batches, the types of tokens."""
    fields = {name: inputs[name] for name in _FIELDS if inputs.get(name) is not None}
    if "pixel_values" in fields and not fields["pixel_values"].numel():
        return {name: value for name, value in fields.items() if name in TOKEN_TYPES}
    return fields
