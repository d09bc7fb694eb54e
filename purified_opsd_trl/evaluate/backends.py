"""What draws the samples: vLLM, or transformers as a fallback. Both yield each completion once it is finished."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..extras import require_extra
from ..self_teacher import INITS_THAT_MOVE_THE_BASE
from .store import Key


@dataclass(frozen=True)
class Request:
    """One sample to draw."""

    key: Key
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One sample drawn."""

    key: Key  # that of its request
    ids: list[int]  # without end token and padding
    truncated: bool  # cut at the length limit


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn; the names are those of [`EvaluateArguments`]."""

    temperature: float
    top_p: float
    top_k: int
    max_completion_length: int


class Backend(Protocol):
    """Draws samples from one model, or from adapters on one model."""

    tokenizer: Any
    context: int | None  # longest prompt plus completion, where the model has a limit

    def load(self, adapter: str | None) -> None:
        """Puts an adapter (or none) on the model."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Draws all requests, in any order."""


class TransformersBackend:
    """
    Generation by transformers, batch by batch.

    The samples of a batch share one random stream, seeded by its first request: a resumed evaluation draws the missing
    samples from the same distribution, not the same samples. Of the model's own generation config only the end tokens
    are kept: penalties and filters there would make its samples differ from vLLM's.
    """

    _kept: list[tuple[str, torch.nn.Parameter, torch.Tensor]]

    def __init__(self, model: str, dtype: str, batch_size: int):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.batch_size = batch_size
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self._base = loaded.to(device).eval()
        self.model: Any = self._base
        self.context = _context(loaded.config.get_text_config())

    def load(self, adapter: str | None) -> None:
        if self.model is not self._base:
            self._base = _without_adapter(self.model)
            with torch.no_grad():
                for _, parameter, before in self._kept:
                    parameter.copy_(before)
        self.model = self._base
        if adapter is not None:
            require_extra("peft", "`adapter`")
            from peft import PeftModel

            self._kept = _overwritable(self._base, adapter)
            self.model = PeftModel.from_pretrained(self._base, adapter).eval()

    def overwritten(self) -> list[str]:
        """Weights of the base into which the loaded adapter wrote other values, so that disabling it is not enough."""
        if self.model is self._base:
            return []
        return [name for name, parameter, before in self._kept if not torch.equal(parameter.cpu(), before)]

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        # Those of the model's generation config as well: a chat model may end its turn by another token than its text
        ends = self._base.generation_config.eos_token_id
        stop = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        config = _generation_config(sampling, sorted(stop), pad)
        # `generate` fills in from the model's config what is unset in the one it is passed
        self._base.generation_config = config
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            width = max(len(request.prompt_ids) for request in batch)
            ids = torch.tensor([[pad] * (width - len(r.prompt_ids)) + r.prompt_ids for r in batch])
            lengths = torch.tensor([len(request.prompt_ids) for request in batch])
            mask = (torch.arange(width) >= width - lengths.unsqueeze(1)).long()
            torch.manual_seed(batch[0].seed)
            output = self.model.generate(
                input_ids=ids.to(self._base.device),
                attention_mask=mask.to(self._base.device),
                generation_config=config,
            )
            for request, row in zip(batch, output[:, width:].tolist(), strict=True):
                end = next((i for i, token in enumerate(row) if token in stop), None)
                yield Completion(request.key, row[:end], truncated=end is None)


def _context(config: Any) -> int | None:
    """Tokens that the positions reach, as vLLM counts them; `None` for a model without a limit of its own."""
    longest = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if longest is not None and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
        stretched = rope.get("original_max_position_embeddings", longest) * rope.get("factor", 1.0)
        longest = max(longest, int(stretched))
    return longest


def _generation_config(sampling: Sampling, ends: list[int], pad: int) -> Any:
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"max_new_tokens": sampling.max_completion_length, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(eos_token_id=ends, pad_token_id=pad, **chosen)


def _without_adapter(model: Any) -> Any:
    """The base model. `PeftModel.unload()` alone leaves the trained copies of `modules_to_save` in it."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)
    return model.unload()


def _overwritable(base: Any, adapter: str) -> list[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """
    Names, weights and copies (on the host) of what loading an adapter may write into the base itself.

    That is what the adapter's file holds under the base's own names (biases, embeddings that it adapts), and
    everything if its initialization changes the base, as PiSSA does.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    names = {
        key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        for key in load_peft_weights(adapter, device="cpu")
    }
    init = getattr(PeftConfig.from_pretrained(adapter), "init_lora_weights", True)
    moves_all = isinstance(init, str) and init.lower().startswith(INITS_THAT_MOVE_THE_BASE)
    return [
        (name, parameter, parameter.detach().to("cpu", copy=True))
        for name, parameter in base.named_parameters()
        if moves_all or name in names
    ]


class VLLMBackend:
    """Generation by vLLM's offline engine; every sample has its own seed."""

    def __init__(
        self,
        model: str,
        dtype: str,
        *,
        max_model_length: int | None,
        max_lora_rank: int,
        tensor_parallel_size: int,
        gpu_memory_utilization: float,
    ):
        require_extra("vllm", "`backend: vllm`")
        from transformers import AutoTokenizer
        from vllm import LLM
        from vllm.platforms import current_platform

        settings: dict[str, Any] = {}
        if max_lora_rank:
            settings |= {"enable_lora": True, "max_lora_rank": max(8, max_lora_rank)}
        if current_platform.is_cpu():
            # A prompt that is prefilled in parts rewinds its request's generator, which a CPU generator refuses
            settings["enable_chunked_prefill"] = False
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=max_model_length,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            **settings,
        )
        self.context: int | None = self.llm.llm_engine.model_config.max_model_len
        self._lora: Any = None
        self._adapters = 0

    def load(self, adapter: str | None) -> None:
        self._lora = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._adapters += 1  # vLLM caches adapters by number: a new one is a new number
            self._lora = LoRARequest(f"adapter-{self._adapters}", self._adapters, adapter)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        waiting = {}
        for number, request in enumerate(requests):
            params = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_completion_length,
                seed=request.seed,
            )
            name = str(number)
            waiting[name] = request
            prompt: Any = {"prompt_token_ids": request.prompt_ids}
            engine.add_request(name, prompt, params, lora_request=self._lora)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                completion = output.outputs[0]
                # The end token is the last id where it ended the completion
                ids = list(completion.token_ids)
                truncated = completion.finish_reason == "length"
                if not truncated and ids and ids[-1] in self.tokenizer.all_special_ids:
                    ids.pop()
                request = waiting[output.request_id.split("-")[0]]
                yield Completion(request.key, ids, truncated)
