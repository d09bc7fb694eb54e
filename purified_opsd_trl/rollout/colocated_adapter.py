"""
The adapter itself, not merged weights, for a colocated vLLM: a file per version, named in each request.

```text
sync: gather the adapter -> write version t -> generate: LoRARequest(version t) -> remove version t - 1
```
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..config import PurifiedOPSDConfig
from ..errors import InputError
from .adapters import NO_ADAPTER, WEIGHTS_NAME, adapter_weights, admitted_rank, check_servable


@contextmanager
def engine_with_lora(args: PurifiedOPSDConfig, model: Any, peft_config: Any) -> Iterator[None]:
    """
    Has TRL start a colocated vLLM with room for one adapter, which it has no argument for.

    Args:
        args ([`PurifiedOPSDConfig`]):
            Configuration; without `vllm_adapter_sync` in colocate mode nothing is changed.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Configuration of an adapter that is yet to be made.

    Raises:
        [`InputError`]: if there is no adapter.
    """
    if not (args.use_vllm and args.vllm_adapter_sync and args.vllm_mode == "colocate"):
        yield
        return
    config = peft_config or getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    if config is None:
        raise InputError(NO_ADAPTER)
    import trl.generation.vllm_generation as generation

    engine = generation.LLM
    generation.LLM = partial(engine, enable_lora=True, max_loras=1, max_lora_rank=admitted_rank(config))
    try:
        yield
    finally:
        generation.LLM = engine


def send_adapters(generation: Any) -> None:
    """
    Replaces the weight sync of a colocated vLLM: the base stays what it loaded, and requests name the adapter.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            Generation back end of a trainer whose model is a [`~peft.PeftModel`] with LoRA alone, started within
            [`engine_with_lora`].

    Raises:
        [`InputError`]: if the model trains anything that vLLM cannot load as an adapter.
    """
    from vllm.lora.request import LoRARequest

    model = generation.model
    check_servable(model)
    folder = tempfile.TemporaryDirectory(prefix="purified-opsd-adapters-")
    generation.adapter_folder = folder  # lives as long as the engine
    versions: list[Path] = []

    def sync() -> None:
        weights = adapter_weights(model, generation.accelerator)
        path = Path(folder.name) / str(len(versions) + 1)
        path.mkdir()
        save_file(weights, path / WEIGHTS_NAME)
        model.peft_config[model.active_adapter].save_pretrained(str(path))
        versions.append(path)
        # A name and a number of its own for each version: vLLM keeps prefixes and loaded adapters by them
        request = LoRARequest(f"v{len(versions)}", len(versions), str(path))
        generation.llm.generate = partial(type(generation.llm).generate, generation.llm, lora_request=request)
        for old in versions[-2:-1]:
            shutil.rmtree(old)

    generation.sync_weights = sync
