"""Room for the longest prompt in vLLM; weights sent to it without moving the base. The engine: tests/vllm_engine."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from purified_opsd_trl import PurifiedOPSDConfig, build_contexts
from purified_opsd_trl.config import DEFAULT_REFERENCE_PROMPT_TEMPLATE, DEFAULT_TEACHER_PROMPT_TEMPLATE
from purified_opsd_trl.rollout.colocated import merge_without_drift, reserve_vllm_length


def generation_of(model: Any) -> VLLMGeneration:
    """TRL's back end without an engine: what walks over the weights."""
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model, generation.accelerator = model, Accelerator(cpu=True)
    generation._dist = DistributedBackend(generation.accelerator)
    return generation


def trained(model: PreTrainedModel, **config: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    peft_model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peft_model


EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],  # one wrapper around another
}
HEAD = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("qwen3", {}),
        ("qwen3", {"use_dora": True}),
        ("qwen3", {"use_rslora": True}),
        ("qwen3", HEAD),
        ("phi", {"lora_bias": True, "target_modules": ["q_proj", "dense"]}),
        ("qwen3_moe", EXPERTS),
    ],
    ids=["lora", "dora", "rslora", "trained_head", "bias", "experts"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_sent_are_trls_and_the_base_stays(
    make_model: Callable[..., PreTrainedModel], architecture: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = trained(make_model(architecture, **(experts if config is EXPERTS else {})).to(dtype), **config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generation = generation_of(model)
    expected = {name: weight.clone() for name, weight in generation._iter_named_params()}
    moved = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    assert moved  # what TRL leaves behind
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])

    merge_without_drift(generation)
    for _ in range(2):
        sent = {name: weight.clone() for name, weight in generation._iter_named_params()}
        assert sent.keys() == expected.keys()
        for name, weight in expected.items():  # PEFT's own merge of the same weights
            assert torch.equal(sent[name], weight), name
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
    assert not any(getattr(module, "merged", False) for module in model.modules())
    model.merge_adapter()  # TRL's own way is there again
    assert any(getattr(module, "merged", False) for module in model.modules())


def test_what_is_replaced_is_as_it_was() -> None:
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    assert "self._iter_named_params()" in inspect.getsource(VLLMGeneration.sync_weights)


def contexts(row: Any) -> Any:
    return build_contexts(
        row,
        reference_column="reference",
        teacher_prompt_template=DEFAULT_TEACHER_PROMPT_TEMPLATE,
        reference_prompt_template=DEFAULT_REFERENCE_PROMPT_TEMPLATE,
    )


@pytest.fixture
def reserve(arguments: dict[str, Any], tokenizer: Any) -> Callable[..., int | None]:
    """`vllm_max_model_length` after looking at datasets."""

    def get(*datasets: Any, tools: list[Any] | None = None, **fields: Any) -> int | None:
        args = PurifiedOPSDConfig(**{**arguments, "use_vllm": True, **fields})
        named = [(f"data {i}", dataset) for i, dataset in enumerate(datasets)]
        reserve_vllm_length(args, "unused", tokenizer, named, contexts, tools)
        return args.vllm_max_model_length

    return get


def test_room_for_the_longest_prompt_of_all_data(
    reserve: Callable[..., int | None], conversational_dataset: Dataset, standard_dataset: Dataset, tokenizer: Any
) -> None:
    rendered = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in conversational_dataset["prompt"]
    ]
    chats = max(len(text.encode()) for text in map(without_markup, rendered))
    texts = max(len(prompt.encode()) for prompt in standard_dataset["prompt"])
    assert reserve(conversational_dataset) == chats + 8
    assert reserve(standard_dataset) == texts + 8
    assert reserve(conversational_dataset, standard_dataset) == max(chats, texts) + 8


def without_markup(text: str) -> str:
    """Text with one byte for each special token, which is one token."""
    return text.replace("<|im_start|>", "#").replace("<|im_end|>", "#")


def test_a_length_that_is_set_stays(reserve: Callable[..., int | None], standard_dataset: Dataset) -> None:
    assert reserve(standard_dataset, vllm_max_model_length=99) == 99
    assert reserve(standard_dataset, vllm_mode="server") is None
    assert reserve(standard_dataset, use_vllm=False) is None


def test_a_stream_has_no_longest_prompt(
    reserve: Callable[..., int | None], standard_dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert reserve(standard_dataset.to_iterable_dataset()) is None
    assert "data 0 is streamed" in caplog.text and "Set `vllm_max_model_length`" in caplog.text


def test_a_row_that_cannot_be_used_is_left_to_the_check_of_the_data(reserve: Callable[..., int | None]) -> None:
    assert reserve(Dataset.from_list([{"prompt": "x", "reference": ""}])) is None
