"""Who writes the samples: vLLM, or transformers as a fallback. Both yield each completion once it is finished."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..extras import require_extra
from ..self_teacher import INITS_THAT_MOVE_THE_BASE
from .store import Key


@dataclass(frozen=True)
class Request:
    """
    One sample to draw.

    Attributes:
        key (`tuple[str, str, int]`):
            Benchmark, problem and number of the sample.
        prompt_ids (`list[int]`):
            Prompt.
        seed (`int`):
            Seed of this sample.
    """

    key: Key
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """
    One sample drawn.

    Attributes:
        key (`tuple[str, str, int]`):
            That of the request.
        ids (`list[int]`):
            Completion ids, without the end token and without padding.
        truncated (`bool`):
            Whether it was cut at the length limit.
    """

    key: Key
    ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class Sampling:
    """
    How samples are drawn.

    Attributes:
        temperature (`float`):
            0 is greedy.
        top_p (`float`):
            Nucleus; 1 is off.
        top_k (`int`):
            Most likely tokens kept; 0 is off.
        max_new_tokens (`int`):
            Longest completion in tokens.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


class Backend(Protocol):
    """Draws samples from one model, or from adapters on one model."""

    tokenizer: Any

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

    Args:
        model (`str`):
            Model id or path.
        dtype (`str`):
            Dtype of the weights, or `"auto"`.
        batch_size (`int`):
            Samples drawn at once.
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


def _generation_config(sampling: Sampling, ends: list[int], pad: int) -> Any:
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature}
        chosen |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(max_new_tokens=sampling.max_new_tokens, eos_token_id=ends, pad_token_id=pad, **chosen)


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
    everything if its initialisation changes the base, as PiSSA does.
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
    """
    Generation by vLLM's offline engine; every sample has its own seed.

    Args:
        model (`str`):
            Model id or path.
        dtype (`str`):
            Dtype of the weights, or `"auto"`.
        max_model_len (`int`, *optional*):
            Longest prompt plus completion. `None`: the model's context.
        max_lora_rank (`int`):
            Largest rank of the adapters to come; 0 for none.
        tensor_parallel_size (`int`):
            GPUs that share the model.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        max_model_len: int | None = None,
        max_lora_rank: int = 0,
        tensor_parallel_size: int = 1,
    ):
        require_extra("vllm", "`backend: vllm`")
        from transformers import AutoTokenizer
        from vllm import LLM

        lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": max(8, max_lora_rank)} if max_lora_rank else {}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            **lora,
        )
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
                max_tokens=sampling.max_new_tokens,
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


def make_backend(
    kind: str, model: str, *, dtype: str, batch_size: int, max_model_len: int | None, max_lora_rank: int, tp: int
) -> Backend:
    """
    The backend by name.

    Args:
        kind (`str`):
            `"vllm"`, `"transformers"`, or `"auto"`: vLLM if it is installed.
        model (`str`):
            Model id or path.
        dtype, batch_size, max_model_len, max_lora_rank, tp:
            See the classes.

    Returns:
        [`Backend`]
    """
    if kind == "vllm":
        return VLLMBackend(model, dtype, max_model_len, max_lora_rank, tp)
    return TransformersBackend(model, dtype, batch_size)
