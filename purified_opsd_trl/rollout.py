"""
What TRL's vLLM rollout needs to serve a self-teacher: room for the longest prompt, and a base that stays as it is.

Everything else about vLLM is TRL's (`trl.generation.vllm_generation`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from datasets import IterableDataset
from transformers import AutoTokenizer
from trl.trainer.utils import get_config_model_id

from .config import PurifiedOPSDConfig
from .contexts import Contexts
from .dataset import AnyDataset, on_main_process, row_blocks
from .rows import RowReader


logger = logging.getLogger(__name__)


def reserve_vllm_length(
    args: PurifiedOPSDConfig,
    model: Any,
    processing_class: Any,
    datasets: Iterable[tuple[str, AnyDataset]],
    build_contexts: Callable[[Mapping[str, Any]], Contexts],
    tools: list[Any] | None,
) -> None:
    """
    Sets an unset `args.vllm_max_model_length` to the longest prompt of the data plus `max_completion_length`.

    Left unset, a colocated vLLM needs memory for a sequence as long as the model's whole context (40,960 tokens for
    Qwen3), or refuses to start. TRL reads the value when it starts vLLM.

    Args:
        args ([`PurifiedOPSDConfig`]):
            Configuration, changed in place.
        model (`str` or [`~transformers.PreTrainedModel`]):
            The student, whose tokenizer is loaded if none is given.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        datasets (`Iterable[tuple[str, Dataset]]`):
            Names and datasets. With a streamed one the length stays unset, and a warning says so. Rows that cannot be
            used do not count; the check of the dataset names them.
        build_contexts (`Callable[[Mapping], Contexts]`):
            Row to contexts.
        tools (`list`, *optional*):
            Tools that the prompts describe.
    """
    if not args.use_vllm or args.vllm_mode != "colocate" or args.vllm_max_model_length is not None:
        return
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(
            model if isinstance(model, str) else get_config_model_id(model.config),
            revision=dict(args.model_init_kwargs or {}).get("revision"),  # type: ignore[arg-type]  # no longer JSON text
            trust_remote_code=args.trust_remote_code,
        )
    template_kwargs: dict[str, Any] = {"tools": tools or None, **dict(args.chat_template_kwargs or {})}  # type: ignore[arg-type]
    reader = RowReader(processing_class, build_contexts, args.reference_column, template_kwargs=template_kwargs)
    named = list(datasets)
    for name, dataset in named:
        if isinstance(dataset, IterableDataset):
            logger.warning(
                "%s is streamed, so its longest prompt is unknown and vLLM reserves memory for the model's whole "
                "context. Set `vllm_max_model_length` to the longest prompt plus `max_completion_length`.",
                name,
            )
            return

    def measure() -> int:
        longest = 0
        for _, dataset in named:
            for _, rows in row_blocks(dataset):
                longest = reader.longest_base(rows, at_least=longest)
        return longest

    _ = args.device  # sets up the processes, of which one reads the data
    if longest := on_main_process(measure, PartialState()):
        args.vllm_max_model_length = longest + int(args.max_completion_length or 0)


def merge_without_drift(generation: Any) -> None:
    """
    Makes the weight sync of a LoRA student leave the base weights bit for bit as they are.

    TRL adds the adapter to every base weight in place, sends the sums, and subtracts it again, which rounds: the base,
    our frozen teacher, would move a little at every sync, and a resumed run would not equal an uninterrupted one. Here
    one layer at a time is merged, sent and put back, at the cost of one layer's weight in memory.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            Generation back end of a trainer whose model is a [`~peft.PeftModel`].
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    original = generation._iter_named_params

    def iterate() -> Iterator[tuple[str, torch.Tensor]]:
        model = generation.model
        layers = {}
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
                owner = name.removeprefix("base_model.model.").replace(".base_layer", "")  # TRL's own naming
                for parameter in _changed_by(module):
                    layers[generation._fix_param_name_to_vllm(f"{owner}.{parameter}")] = module, parameter
        with _without_merging(model):
            for name, weight in original():
                if name in layers:
                    with _merged(*layers[name]) as weight:
                        yield name, weight
                else:
                    yield name, weight

    generation._iter_named_params = iterate


@contextmanager
def _without_merging(model: Any) -> Iterator[None]:
    """Disables TRL's own merging of the model."""
    model.merge_adapter = model.unmerge_adapter = lambda *_, **__: None
    try:
        yield
    finally:
        del model.merge_adapter, model.unmerge_adapter


def _changed_by(layer: Any) -> list[str]:
    """Names of the base layer's parameters that merging changes: one, where an adapter targets a bare parameter."""
    if hasattr(layer, "parameter_name"):
        return [layer.parameter_name]
    return [name for name, _ in layer.get_base_layer().named_parameters(recurse=False)]


@contextmanager
def _merged(layer: Any, parameter: str) -> Iterator[torch.Tensor]:
    """One parameter of a layer with its adapter merged; afterwards the base weight is bit for bit what it was."""
    base = layer.get_base_layer()
    kept = {name: getattr(base, name).data.clone() for name in _changed_by(layer)}
    layer.merge()
    try:
        merged = getattr(base, parameter)
        yield merged.full_tensor() if hasattr(merged, "full_tensor") else merged.data
    finally:
        layer.unmerge()
        for name, data in kept.items():
            getattr(base, name).data.copy_(data)
