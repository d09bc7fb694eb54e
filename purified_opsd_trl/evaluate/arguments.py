"""Arguments of `purified-opsd evaluate`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..markers import DEFAULT_MARKERS
from .benchmarks import PRESETS


DEFAULT_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass
class EvaluateArguments:
    r"""
    What to evaluate, and how.

    Args:
        model (`str`):
            Model id or path; the base of the adapters.
        benchmarks (`list[str]`):
            Presets (`aime24`, `aime25`, `hmmt25`) or paths of JSONL files.
        adapter (`list[str]`, *optional*):
            Adapters on the model. The model without any is then not evaluated.
        checkpoints (`list[str]`, *optional*):
            Output directories of runs, whose `checkpoint-*` are all evaluated, or single checkpoints.
        output_dir (`str`, *optional*, defaults to `"evaluation"`):
            Folder; one subfolder a model.
        num_samples (`int`, *optional*, defaults to `12`):
            Samples a problem. The paper averages 12 runs.
        temperature, top_p, top_k (*optional*, defaults to `0.6`, `0.95`, `20`):
            Sampling. The paper does not state its own; these are what Qwen3 recommends for thinking.
        max_new_tokens (`int`, *optional*, defaults to `32768`):
            Longest completion in tokens.
        thinking (`str`, *optional*, defaults to `"template"`):
            `"on"` or `"off"` passes `enable_thinking` to the chat template; `"template"` leaves its default.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template.
        system_prompt (`str`, *optional*):
            System turn.
        prompt_template (`str`, *optional*):
            User turn, with `{problem}`.
        no_chat_template (`bool`, *optional*, defaults to `False`):
            Plain text prompts, for base models.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"vllm"`, `"transformers"`, or `"auto"`: vLLM if it is installed.
        batch_size (`int`, *optional*, defaults to `8`):
            Samples drawn at once by transformers.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that share the model under vLLM.
        max_model_len (`int`, *optional*):
            Longest prompt plus completion under vLLM.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the weights.
        limit (`int`, *optional*):
            Only the first problems of each benchmark.
        seed (`int`, *optional*, defaults to `0`):
            Seed of samples and bootstrap.
        markers (`list[str]`, *optional*):
            Epistemic markers to count.

    Raises:
        `InputError`: for a value that cannot be used.
    """

    model: str
    benchmarks: list[str]
    adapter: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    output_dir: str = "evaluation"
    num_samples: int = 12
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 32768
    thinking: str = "template"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    prompt_template: str = DEFAULT_PROMPT
    no_chat_template: bool = False
    backend: str = "auto"
    batch_size: int = 8
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    dtype: str = "auto"
    limit: int | None = None
    seed: int = 0
    markers: list[str] = field(default_factory=lambda: list(DEFAULT_MARKERS))

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_size", "tensor_parallel_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be at least 1, got {value}.")
        if self.temperature < 0:
            raise InputError(f"`temperature` must not be negative, got {self.temperature}.")
        if "{problem}" not in self.prompt_template:
            raise InputError("`prompt_template` must hold {problem}.")
        if not self.benchmarks:
            raise InputError(f"`benchmarks` names none. Presets: {', '.join(PRESETS)}.")

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of the chat template."""
        if self.thinking == "template":
            return self.chat_template_kwargs
        return {**self.chat_template_kwargs, "enable_thinking": self.thinking == "on"}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="purified-opsd evaluate",
        description="Sample, grade and summarise models on benchmarks, or compare results.",
    )
    add = parser.add_argument
    add("--model", help="Model id or path; the base of the adapters.")
    add("--adapter", nargs="+", default=[], help="Adapters on the model.")
    add("--checkpoints", nargs="+", default=[], help="Run directories (all their checkpoint-*) or checkpoints.")
    add("--benchmarks", default="", help=f"Comma-separated: {', '.join(PRESETS)}, or paths of .jsonl files.")
    add("--output_dir", default="evaluation", help="Folder; one subfolder a model.")
    add("--num_samples", type=int, default=12, help="Samples a problem.")
    add("--temperature", type=float, default=0.6)
    add("--top_p", type=float, default=0.95)
    add("--top_k", type=int, default=20, help="0 is off.")
    add("--max_new_tokens", type=int, default=32768)
    add("--thinking", choices=["template", "on", "off"], default="template", help="The template's enable_thinking.")
    add("--chat_template_kwargs", type=json.loads, default={}, help="Further template arguments, as JSON.")
    add("--system_prompt", default=None)
    add("--prompt_template", default=DEFAULT_PROMPT, help="User turn, with {problem}.")
    add("--no_chat_template", action="store_true", help="Plain text prompts, for base models.")
    add("--backend", choices=["auto", "vllm", "transformers"], default="auto")
    add("--batch_size", type=int, default=8, help="Samples at once (transformers).")
    add("--tensor_parallel_size", type=int, default=1, help="GPUs that share the model (vLLM).")
    add("--max_model_len", type=int, default=None, help="Longest prompt plus completion (vLLM).")
    add("--dtype", default="auto")
    add("--limit", type=int, default=None, help="Only the first problems of each benchmark.")
    add("--seed", type=int, default=0)
    add("--markers", nargs="+", default=list(DEFAULT_MARKERS), help="Epistemic markers to count.")
    add("--compare", nargs="+", default=None, help="results.json files, the first is the baseline; draws no samples.")
    return parser


def parse(argv: Sequence[str]) -> tuple[EvaluateArguments | None, list[str], str]:
    """
    Parses the command line.

    Args:
        argv (`Sequence[str]`):
            Arguments.

    Returns:
        `tuple`: arguments of an evaluation, or `None` and the files to compare; and the output directory.

    Raises:
        `InputError`: if neither a model nor files are given.
    """
    values = vars(make_parser().parse_args(argv))
    compare = values.pop("compare")
    if compare is not None:
        return None, compare, values["output_dir"]
    if values["model"] is None:
        raise InputError("`--model` is missing (or `--compare` with results to compare).")
    values["benchmarks"] = [name.strip() for name in values["benchmarks"].split(",") if name.strip()]
    return EvaluateArguments(**values), [], values["output_dir"]
