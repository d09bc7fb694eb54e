"""Arguments of `purified-opsd evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..arguments import CommandParser, PositiveInt, Range, Share, as_mapping, check_markers, check_types, option
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
    """What to evaluate, and how. Each option's help text describes it; an invalid value raises an [`InputError`]."""

    model_name_or_path: str | None = option("Model id or path; the base of the adapters.", default=None)
    benchmarks: list[str] = option(f"{', '.join(PRESETS)}, or paths of .jsonl files.", default_factory=list)
    adapter: list[str] = option("Adapters on the model, evaluated instead of it.", default_factory=list)
    checkpoints: list[str] = option("Run directories (all their checkpoint-*) or checkpoints.", default_factory=list)
    compare: list[str] = option(
        "Only compare results, the first is the baseline: results.json files or inspect_ai logs.", default_factory=list
    )
    output_dir: str = option("Folder to write to; one subfolder per model.", default="evaluation")
    num_generations: PositiveInt = option("Samples per problem. The paper averages 12 runs.", default=12)
    # The paper does not state how it samples: temperature, top_p and top_k are what Qwen3 recommends for thinking
    temperature: Annotated[float, Range(0)] = option("Sampling temperature; 0 is greedy decoding.", default=0.6)
    top_p: Share = option("Share of the probability mass that is kept; 1 disables it.", default=0.95)
    top_k: Annotated[int, Range(0)] = option("Number of most likely tokens that are kept; 0 disables it.", default=20)
    max_completion_length: PositiveInt = option("Longest completion, in tokens.", default=32768)
    thinking: Literal["template", "on", "off"] = option("The chat template's enable_thinking.", default="template")
    chat_template_kwargs: dict[str, Any] | str | None = option("Further template arguments, as JSON.", default=None)
    system_prompt: str | None = option("System turn put before the problem.", default=None)
    prompt_template: str = option("User turn, with {problem}.", default=DEFAULT_PROMPT)
    text_prompts: bool = option("Plain text prompts without chat template, for base models.", default=False)
    backend: Literal["auto", "vllm", "transformers"] = option("What draws the samples.", default="auto")
    batch_size: PositiveInt = option("Samples that transformers draws at once.", default=8)
    vllm_tensor_parallel_size: PositiveInt = option("GPUs that share the model.", default=1)
    vllm_max_model_length: PositiveInt | None = option("Longest prompt plus completion, in tokens.", default=None)
    # Training shares the GPU with vLLM and defaults to 0.3; an evaluation usually has it to itself
    vllm_gpu_memory_utilization: Share = option("Share of the memory that vLLM may use.", default=0.9)
    dtype: str = option("Dtype of the weights.", default="auto")
    limit: PositiveInt | None = option("Number of problems of each benchmark, from its start.", default=None)
    seed: int = option("Seed of the samples and of the bootstrap.", default=0)
    epistemic_markers: list[str] = option("Words to count.", default_factory=lambda: list(DEFAULT_MARKERS))

    def __post_init__(self) -> None:
        self.chat_template_kwargs = as_mapping("chat_template_kwargs", self.chat_template_kwargs)
        check_types(self)
        check_markers(self.epistemic_markers)
        self.benchmarks = [name.strip() for word in self.benchmarks for name in word.split(",") if name.strip()]
        if "{problem}" not in self.prompt_template:
            raise InputError("`prompt_template` must hold {problem}.")
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
