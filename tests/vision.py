"""Tiny vision-language models with their processors, and rows with images; shared by the tests of images."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from trl.chat_template_utils import (
    gemma3_chat_template,
    llava_next_chat_template,
    qwen2_5_vl_chat_template,
    qwen3_vl_chat_template,
)

from .conftest import ADDED_TOKENS, SPECIAL_TOKENS, build_tokenizer


VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>")
GEMMA_TOKENS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
FIRST = 256 + len(SPECIAL_TOKENS) + len(ADDED_TOKENS)
IDS = {token: FIRST + i for i, token in enumerate((*VISION_TOKENS, *GEMMA_TOKENS, "<tool_call>", "</tool_call>"))}

_TEXT = {
    "vocab_size": FIRST + len(IDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 260,
}
_QWEN_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen2_5_vl() -> dict[str, Any]:
    vision = {**_QWEN_VISION, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.3}
    return {**_QWEN_IDS, "text_config": {**_TEXT, "rope_parameters": _MROPE}, "vision_config": vision}


def _qwen3_vl() -> dict[str, Any]:
    vision = {**_QWEN_VISION, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "initializer_range": 0.3}
    return {**_QWEN_IDS, "text_config": {**_TEXT, "rope_parameters": _MROPE}, "vision_config": vision}


def _gemma3() -> dict[str, Any]:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4, "vision_use_head": False}
    text = {
        **_TEXT,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "boi_token_index": IDS["<start_of_image>"],
        "eoi_token_index": IDS["<end_of_image>"],
        "image_token_index": IDS["<image_soft_token>"],
        "initializer_range": 0.3,
    }


def _llava_next() -> dict[str, Any]:
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    return {
        "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": None},
        "vision_config": vision,
        "image_token_index": IDS["<image>"],
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
        "vision_feature_layer": -2,  # as released: the last layer of the tower is not read
        "initializer_range": 0.3,
    }


CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "llava_next": _llava_next,
}


def build_vlm(name: str, seed: int = 0) -> PreTrainedModel:
    """A two-layer fp32 vision-language model in eval mode."""
    config = AutoConfig.for_model(name, tie_word_embeddings=False, dtype="float32", **CONFIGS[name]())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if not parameter.any() or "vision" in parameter_name or "projector" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)  # images must matter, and nothing may stay zero
    model.generation_config.eos_token_id = 260
    return model.eval()


class _WithoutVideo:
    """Qwen's processors want one for videos, which needs torchvision; images do not."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = IDS[self.image_token], IDS[self.video_token]
        self.vision_start_token, self.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        self.vision_start_token_id, self.vision_end_token_id = IDS["<|vision_start|>"], IDS["<|vision_end|>"]
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen2_5VLImages(_WithoutVideo, Qwen2_5_VLProcessor):  # noqa: N801
    pass


class Qwen3VLImages(_WithoutVideo, Qwen3VLProcessor):
    pass


def build_processor(name: str) -> ProcessorMixin:
    """The processor of a family with tiny images and the byte-level tokenizer."""
    tokenizer = build_tokenizer("gemma" if name == "gemma3" else "chatml")
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [*tokenizer.extra_special_tokens, *VISION_TOKENS, *GEMMA_TOKENS]}
    )
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in IDS} == IDS
    if name == "gemma3":
        for attribute, token in zip(("boi_token", "image_token", "eoi_token"), GEMMA_TOKENS, strict=True):
            setattr(tokenizer, attribute, token)
            setattr(tokenizer, f"{attribute}_id", IDS[token])
        images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        return Gemma3Processor(images, tokenizer, chat_template=gemma3_chat_template, image_seq_length=4)
    if name == "llava_next":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        )
        return LlavaNextProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            chat_template=llava_next_chat_template,
            num_additional_image_tokens=1,
        )
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096})
    kinds = {
        "qwen2_5_vl": (Qwen2_5VLImages, qwen2_5_vl_chat_template),
        "qwen3_vl": (Qwen3VLImages, qwen3_vl_chat_template),
    }
    kind, template = kinds[name]
    return kind(images, tokenizer, chat_template=template)


def picture(number: int, width: int = 16, height: int = 16) -> Image.Image:
    """An image of random pixels."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def image_rows(count: int = 4) -> list[dict[str, Any]]:
    """Rows with an image each, of several sizes."""
    sizes = [(16, 16), (32, 16), (16, 24), (24, 24)]
    return [
        {
            "prompt": [{"role": "user", "content": f"Which angle is {'x' * i}?"}],
            "reference": f"It is {30 + i} degrees.",
            "image": picture(i, *sizes[i % 4]),
        }
        for i in range(count)
    ]


def image_dataset(count: int = 4) -> Dataset:
    """The rows as a dataset."""
    return Dataset.from_list(image_rows(count))
