"""
Images of a row: in its columns and in the messages of its prompts.

```text
row      -> messages   images of the columns put where the messages hold room for them
messages -> images     opened; pixels are decoded when a processor reads them
```
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from os import PathLike, fspath
from typing import Any

import numpy as np
from datasets import Dataset, Image, List

from .errors import InputError


IMAGE_COLUMNS = ("image", "images")
_FRAME = 16  # tokens that a processor may put around the placeholders of one image, at most


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """Images in the columns of a row, in order and as they are stored."""
    single, several = row.get("image"), row.get("images")
    if several is not None and (isinstance(several, str | bytes) or not isinstance(several, Sequence | np.ndarray)):
        raise InputError(f"column `images`: a list of images is needed, got {type(several).__name__}.")
    if single is not None and several is not None and len(several):
        raise InputError("columns `image` and `images` both hold images. Use one of them.")
    return [single] if single is not None else [] if several is None else list(several)


def place_images(messages: list[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """
    Puts images into messages: into parts `{"type": "image"}` without an image, or before the first user turn's text.

    Args:
        messages (`list[dict]`):
            Messages, with contents as text or as lists of parts.
        images (`Sequence`):
            Images of the row's columns.

    Returns:
        `list[dict]`: messages in which every image part holds its image.

    Raises:
        `InputError`: if the messages have room for another number of images.
    """
    contents = [m["content"] if isinstance(m["content"], list) else [] for m in messages]
    room = sum(part["type"] == "image" and "image" not in part for parts in contents for part in parts)
    if images and not room:
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
        text = messages[first]["content"]
        own = text if isinstance(text, list) else [{"type": "text", "text": text or ""}]
        placed = [{"type": "image", "image": image} for image in images]
        return [{**m, "content": [*placed, *own]} if i == first else m for i, m in enumerate(messages)]
    if room != len(images):
        raise InputError(
            f"column `prompt`: the messages have room for {room} images (parts of type image), but the row has "
            f"{len(images)}."
        )
    left = iter(images)
    return [
        {
            **m,
            "content": [{**p, "image": next(left)} if p["type"] == "image" and "image" not in p else p for p in parts],
        }
        if parts
        else m
        for m, parts in zip(messages, contents, strict=True)
    ]


def check_reads_images(processing_class: Any, column: str | None, where: str = "") -> None:
    """Refuses a column of images where the model has a tokenizer alone; `where` begins the message."""
    if column is not None and getattr(processing_class, "image_processor", None) is None:
        raise InputError(
            f"{where}column `{column}` holds images, but the model reads text alone. Train a vision-language model, "
            "or remove the images."
        )


def images_of(prompt: Any) -> list[Any]:
    """Images in the messages of a prompt, in order; none in a prompt that is text."""
    contents = [] if isinstance(prompt, str) else [m.get("content") for m in prompt]
    return [p["image"] for parts in contents if isinstance(parts, list) for p in parts if p["type"] == "image"]


def open_images(prompts: Sequence[Any], row: Mapping[str, Any], processing_class: Any) -> list[Any]:
    """
    Prompts of one row with opened images (`PIL`) in place of paths and bytes; an image in several is opened once.

    Args:
        prompts (`Sequence[list[dict]]`):
            Prompts, some of them with images.
        row (`Mapping[str, Any]`):
            Their row, for the name of the column in errors.
        processing_class:
            Processor or tokenizer.

    Returns:
        `list[list[dict]]`: the prompts.

    Raises:
        `InputError`: if an image cannot be read, or the model reads text alone.
    """
    column = next((name for name in IMAGE_COLUMNS if row.get(name) is not None), "prompt")
    check_reads_images(processing_class, column)
    opened: dict[int, Any] = {}
    try:
        return [_with_opened(prompt, opened) for prompt in prompts]
    except InputError as error:
        raise InputError(f"column `{column}`: {error}") from None


def _with_opened(prompt: Any, opened: dict[int, Any]) -> Any:
    if not images_of(prompt):
        return prompt
    return [
        {**m, "content": [{**p, "image": _opened(p["image"], opened)} if p["type"] == "image" else p for p in parts]}
        if isinstance(parts := m.get("content"), list)
        else m
        for m in prompt
    ]


def _opened(value: Any, opened: dict[int, Any]) -> Any:
    if id(value) not in opened:
        opened[id(value)] = _open(value)
    return opened[id(value)]


def _open(value: Any) -> Any:
    from PIL import Image as PILImage
    from PIL import ImageOps

    if isinstance(value, PILImage.Image):
        return value
    source = (
        (value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else value
    )  # what `datasets` stores
    if isinstance(source, np.ndarray):
        return PILImage.fromarray(source)
    if not isinstance(source, bytes | str | PathLike):
        raise InputError(f"an image must be a PIL image, a path, or the bytes of a file, got {type(value).__name__}.")
    named = "its bytes" if isinstance(source, bytes) else fspath(source)
    if str(named).startswith(("http://", "https://")):
        raise InputError(
            f"the image {named} is an address. Nothing is downloaded while training: save the file first."
        )
    try:
        image = PILImage.open(BytesIO(source) if isinstance(source, bytes) else source)
        return ImageOps.exif_transpose(image)  # as `datasets` does
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:
        raise InputError(f"an image cannot be read ({named}: {' '.join(str(error).split())}).") from None


def token_bound(processor: Any, images: Sequence[Any]) -> int | None:
    """Most tokens that images take in a prompt, from their sizes alone; `None` if the processor cannot tell."""
    if not images:
        return 0
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        return None
    counted = count(image_sizes=[(image.height, image.width) for image in images])
    return sum(counted["num_image_tokens"]) + _FRAME * len(images)


def undecoded(dataset: Dataset) -> Dataset:
    """The dataset with image columns as they are stored, so that reading a row decodes no pixels."""
    for column in set(IMAGE_COLUMNS).intersection(dataset.column_names):
        feature = dataset.features[column]
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    return dataset
