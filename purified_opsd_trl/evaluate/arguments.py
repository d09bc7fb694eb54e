"""Arguments of `purified-opsd evaluate`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..arguments import CommandParser, check_types, option
from ..errors import InputError
from ..markers import DEFAULT_MARKERS
from .benchmarks import PRESETS


DEFAULT_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

RENAMED = {
    "model": "model_name_or_path",
    "max_new_tokens": "max_completion_length",
    "num_samples": "num_generations",
    "max_model_len": "vllm_max_model_length",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "no_chat_template": "text_prompts",
    "markers": "epistemic_markers",
}


@dataclass
class EvaluateArguments:
    r"""
    What to evaluate, and how.

    Args:
        model_name_or_path (`str`, *optional*):
            Model id or path; the base of the adapters. Required unless `compare` is given.
        benchmarks (`list[str]`, *optional*):
            Presets (`aime24`, `aime25`, `hmmt25`) or paths of JSONL files. Required unless `compare` is given.
        adapter (`list[str]`, *optional*):
            Adapters on the model. The model without any is then not evaluated.
        checkpoints (`list[str]`, *optional*):
            Output directories of runs, of which every `checkpoint-*` is evaluated, or single checkpoints.
        compare (`list[str]`, *optional*):
            Results to compare, the first of them the baseline: `results.json` files, logs of `inspect_ai`, or folders
            of either. No samples are drawn.
        output_dir (`str`, *optional*, defaults to `"evaluation"`):
            Folder to write to; one subfolder per model.
        num_generations (`int`, *optional*, defaults to `12`):
            Samples per problem. The paper averages 12 runs.
        temperature (`float`, *optional*, defaults to `0.6`):
            Sampling temperature; 0 is greedy decoding. The paper does not state how it samples: the defaults of
            `temperature`, `top_p` and `top_k` are what Qwen3 recommends for thinking.
        top_p (`float`, *optional*, defaults to `0.95`):
            Share of the probability mass that is kept; 1 disables it.
        top_k (`int`, *optional*, defaults to `20`):
            Number of most likely tokens that are kept; 0 disables it.
        max_completion_length (`int`, *optional*, defaults to `32768`):
            Longest completion, in tokens.
        thinking (`str`, *optional*, defaults to `"template"`):
            `"on"` or `"off"` passes `enable_thinking` to the chat template; `"template"` leaves its default.
        chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Further arguments of the chat template, as a mapping or as JSON.
        system_prompt (`str`, *optional*):
            System turn put before the problem.
        prompt_template (`str`, *optional*):
            User turn, with the placeholder `{problem}`.
        text_prompts (`bool`, *optional*, defaults to `False`):
            Whether prompts are plain text without chat template, for base models.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"vllm"`, `"transformers"`, or `"auto"`: vLLM if it is installed.
        batch_size (`int`, *optional*, defaults to `8`):
            Samples that transformers draws at once.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that share the model under vLLM.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt plus completion under vLLM, in tokens. `None`: the model's context.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            Share of the memory that vLLM may use. Training shares the GPU with vLLM and defaults to 0.3; an evaluation
            usually has the GPU to itself.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the weights.
        limit (`int`, *optional*):
            Number of problems of each benchmark that are evaluated, from its start. `None`: all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples and of the bootstrap.
        epistemic_markers (`list[str]`, *optional*):
            Words to count in the completions.

    Raises:
        `InputError`: for a value that cannot be used.
    """

    model_name_or_path: str | None = option("Model id or path; the base of the adapters.", default=None)
    benchmarks: list[str] = option(f"{', '.join(PRESETS)}, or paths of .jsonl files.", default_factory=list)
    adapter: list[str] = option("Adapters on the model, evaluated instead of it.", default_factory=list)
    checkpoints: list[str] = option("Run directories (all their checkpoint-*) or checkpoints.", default_factory=list)
    compare: list[str] = option(
        "Only compare results, the first is the baseline: results.json files or inspect_ai logs.", default_factory=list
    )
    output_dir: str = option("Folder to write to; one subfolder per model.", default="evaluation")
    num_generations: int = option("Samples per problem.", default=12)
    temperature: float = option("Sampling temperature; 0 is greedy decoding.", default=0.6)
    top_p: float = option("Share of the probability mass that is kept; 1 disables it.", default=0.95)
    top_k: int = option("Number of most likely tokens that are kept; 0 disables it.", default=20)
    max_completion_length: int = option("Longest completion, in tokens.", default=32768)
    thinking: Literal["template", "on", "off"] = option("The chat template's enable_thinking.", default="template")
    chat_template_kwargs: dict[str, Any] | str | None = option("Further template arguments, as JSON.", default=None)
    system_prompt: str | None = option("System turn put before the problem.", default=None)
    prompt_template: str = option("User turn, with {problem}.", default=DEFAULT_PROMPT)
    text_prompts: bool = option("Plain text prompts without chat template, for base models.", default=False)
    backend: Literal["auto", "vllm", "transformers"] = option("What draws the samples.", default="auto")
    batch_size: int = option("Samples that transformers draws at once.", default=8)
    vllm_tensor_parallel_size: int = option("GPUs that share the model.", default=1)
    vllm_max_model_length: int | None = option("Longest prompt plus completion, in tokens.", default=None)
    vllm_gpu_memory_utilization: float = option("Share of the memory that vLLM may use.", default=0.9)
    dtype: str = option("Dtype of the weights.", default="auto")
    limit: int | None = option("Number of problems of each benchmark, from its start.", default=None)
    seed: int = option("Seed of the samples and of the bootstrap.", default=0)
    epistemic_markers: list[str] = option("Words to count.", default_factory=lambda: list(DEFAULT_MARKERS))

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except json.JSONDecodeError as error:
                raise InputError(f"`chat_template_kwargs` is not JSON: {error}.") from None
        check_types(self)
        self.benchmarks = [name.strip() for word in self.benchmarks for name in word.split(",") if name.strip()]
        at_least_one = ("num_generations", "max_completion_length", "batch_size", "limit")
        for name in (*at_least_one, "vllm_tensor_parallel_size", "vllm_max_model_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be at least 1, got {value}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"`temperature` must be 0 (greedy) or a positive number, got {self.temperature}.")
        for name in ("top_p", "vllm_gpu_memory_utilization"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"`{name}` must be above 0 and at most 1, got {getattr(self, name)}.")
        if self.top_k < 0:
            raise InputError(f"`top_k` must be 0 (off) or a positive number, got {self.top_k}.")
        if "{problem}" not in self.prompt_template:
            raise InputError("`prompt_template` must hold {problem}.")
        if not all(marker.strip() for marker in self.epistemic_markers):
            raise InputError("`epistemic_markers` must not list empty words.")
        if not self.compare and self.model_name_or_path is None:
            raise InputError("`model_name_or_path` is missing (or `compare`, with results to compare).")
        if not self.compare and not self.benchmarks:
            raise InputError(f"`benchmarks` names none. Presets: {', '.join(PRESETS)}.")

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of the chat template."""
        given: Any = self.chat_template_kwargs or {}
        return given if self.thinking == "template" else {**given, "enable_thinking": self.thinking == "on"}


def make_parser(prog: str = "purified-opsd evaluate") -> CommandParser:
    """Parser of the command line."""
    description = "Sample, grade and summarize models on benchmarks, or compare results."
    return CommandParser([EvaluateArguments], prog=prog, description=description, renamed=RENAMED)


def parse(argv: Sequence[str]) -> EvaluateArguments:
    """Arguments of a command line."""
    (args,) = make_parser().parse(argv)
    return args
