"""
The part of the trainer that sees: images of the rollout, and of the contexts that the frozen model scores.

TRL processes the student's images. Each context of a row is processed anew, since its ids and the types of its tokens
are its own.
"""

import logging
from typing import Any

import torch
from trl.data_utils import prepare_multimodal_messages

from .contexts import Prompt
from .errors import InputError
from .images import IMAGE_COLUMNS, images_of
from .multimodal import Fields, sequence_fields
from .reading import ReadingTrainer


logger = logging.getLogger(__name__)


class VisionTrainer(ReadingTrainer):
    """Mixin of the trainer: images."""

    _is_vlm: bool  # TRL's, as the next one: the placeholder of images that tools return
    _image_pad_token_id: int | None
    is_fsdp_enabled: bool

    def rollout_row(self, row: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
        """The row that TRL generates from: with images in the messages instead of columns."""
        if self._is_vlm and not isinstance(prompt, str):
            prompt = prepare_multimodal_messages(prompt)
        return {**{name: value for name, value in row.items() if name not in IMAGE_COLUMNS}, "prompt": prompt}

    def _generate(self, prompts: list[Prompt]) -> tuple[Any, ...]:
        *ids, images, tool_images = super()._generate(prompts)  # type: ignore[misc]  # TRL's
        self._tool_images: list[list[Any]] = tool_images or [[] for _ in prompts]
        # A processor refuses None among the images of a batch, which is what TRL puts for a row without
        return *ids, images and [own or [] for own in images], tool_images

    def encode_contexts(
        self, prompts: dict[str, list[Prompt]], completion_ids: list[list[int]], output: dict[str, Any]
    ) -> tuple[dict[str, list[list[int]]], dict[str, list[Fields]] | None]:
        """
        Ids and images of every row, by context.

        Args:
            prompts (`dict[str, list]`):
                Prompts of the B rows, by context (`"base"`, `"teacher"`, `"reference_only"`).
            completion_ids (`list[list[int]]`):
                Completion ids of the B rows.
            output (`dict[str, Any]`):
                What TRL's rollout returned.

        Returns:
            `tuple[dict[str, list[list[int]]], dict[str, list[dict[str, torch.Tensor]]] | None]`: ids of the prompts,
            and fields: none if no row has an image, `None` if the model reads text alone.

        Raises:
            `InputError`: if parameters are sharded and some rows have images and others none.
        """
        if not self._is_vlm:
            return {context: self.tokenize_teacher_prompts(rows) for context, rows in prompts.items()}, None
        teacher = zip(prompts["teacher"], self._tool_images, strict=True)
        seen = [bool(images or images_of(prompt)) for prompt, images in teacher]
        self._require_one_kind(seen)
        if not any(seen):
            return {context: self.tokenize_teacher_prompts(rows) for context, rows in prompts.items()}, {}
        dropped = "pixel_values" not in output and any(self._tool_images)
        if dropped:  # TRL's answer to an image of a tool whose placeholders do not fit its features
            logger.warning("TRL dropped the images of a generation batch, so its rows are scored without them.")
        ids: dict[str, list[list[int]]] = {}
        fields: dict[str, list[Fields]] = {}
        for context, rows in prompts.items():
            kwargs = self.template_kwargs(student=context == "base")
            encoded = [
                sequence_fields(self.processing_class, prompt, completion, images, self._image_pad_token_id, **kwargs)
                for prompt, completion, images in zip(rows, completion_ids, self._tool_images, strict=True)
            ]
            ids[context] = [own for own, _ in encoded]
            fields[context] = [{} if dropped else own for _, own in encoded]
        return ids, fields

    def _require_one_kind(self, seen: list[bool]) -> None:
        """A process that runs the vision tower alone would wait forever for the others' shards of it."""
        if self.accelerator.num_processes == 1 or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return
        counts = torch.tensor([[sum(seen), len(seen)]], device=self.accelerator.device)
        images, rows = self.accelerator.gather(counts).sum(0).tolist()
        if images not in (0, rows):
            raise InputError(
                f"{images} of {rows} rows of this step have images, but with sharded parameters all or none must. "
                "Give every row an image, or train the two kinds in runs of their own."
            )
