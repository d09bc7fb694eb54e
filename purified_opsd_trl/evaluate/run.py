"""
`purified-opsd evaluate`: samples, grades and summarizes models on benchmarks.

```bash
purified-opsd evaluate --model_name_or_path Qwen/Qwen3-8B --checkpoints outputs/run \
    --benchmarks aime24 aime25 hmmt25 --num_generations 12 --output_dir evaluation
```
"""

import hashlib
import importlib.util
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..env import versions
from ..errors import InputError
from ..markers import MarkerCounter
from .answers import grade
from .arguments import EvaluateArguments
from .backends import Backend, Completion, Request, Sampling, TransformersBackend, VLLMBackend
from .benchmarks import Benchmark, Problem, load_benchmarks
from .compare import write_comparison
from .store import SampleStore, write_json
from .summary import print_summary, summarize
from .targets import Target, find_targets, lora_rank, weights_fingerprint


_PACKAGES = ("purified_opsd_trl", "torch", "transformers", "peft", "vllm", "math-verify")  # a result depends on


class Prompter:
    """Turns problems into prompt ids, by the model's chat template."""

    def __init__(self, tokenizer: Any, args: EvaluateArguments):
        self.tokenizer = tokenizer
        self.args = args
        if tokenizer.chat_template is None and not args.text_prompts:
            raise InputError(
                f"The tokenizer of {args.model_name_or_path} has no chat template. For a base model, set "
                "`text_prompts`."
            )

    def text(self, problem: Problem) -> str:
        """The prompt as the model sees it."""
        content = self.args.prompt_template.replace("{problem}", problem.problem)
        if self.args.text_prompts:
            return content
        messages = [{"role": "user", "content": content}]
        if self.args.system_prompt:
            messages.insert(0, {"role": "system", "content": self.args.system_prompt})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.args.template_kwargs
        )

    def ids(self, problem: Problem) -> list[int]:
        """Prompt ids; a chat template writes its special tokens itself."""
        return self.tokenizer(self.text(problem), add_special_tokens=self.args.text_prompts)["input_ids"]


def evaluate_target(
    target: Target, backend: Backend, benchmarks: Sequence[Benchmark], args: EvaluateArguments
) -> dict[str, Any]:
    """Draws what is missing of one model's samples, and summarizes all of them as in `results.json`."""
    prompter = Prompter(backend.tokenizer, args)
    example = prompter.text(benchmarks[0].problems[0])
    thinking_open = example.rstrip().endswith("<think>")
    settings = _settings(target, backend, args)
    folder = Path(args.output_dir, target.label)
    counter = MarkerCounter(args.epistemic_markers)
    problems = {(b.name, p.id): p for b in benchmarks for p in b.problems}
    with SampleStore(folder, settings) as store:
        store.check_problems({key: problem.sha256 for key, problem in problems.items()})
        requests = [r for r in _requests(benchmarks, prompter, args) if r.key not in store.records]
        if requests:
            _check_length(requests, args.max_completion_length, backend.context)
            backend.load(target.adapter)
            sampling = Sampling(args.temperature, args.top_p, args.top_k, args.max_completion_length)
            started = time.perf_counter()
            for drawn, completion in enumerate(backend.generate(requests, sampling), start=1):
                problem = problems[completion.key[:2]]
                store.append(_record(completion, problem, backend.tokenizer, counter, thinking_open))
                if drawn % 50 == 0 or drawn == len(requests):
                    print(f"{target.label}: {drawn}/{len(requests)} samples, {time.perf_counter() - started:.0f} s")
        results = {
            "label": target.label,
            "settings": settings,
            "backend": settings["backend"],
            "prompting": {
                **{key: settings[key] for key in ("chat_template_sha256", "chat_template_kwargs")},
                "prompt_opens_thinking": thinking_open,
                "example_prompt": example,
            },
            "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
            "sources": {b.name: b.source for b in benchmarks},
            "problem_sha256": {b.name: {p.id: p.sha256 for p in b.problems} for b in benchmarks},
            "samples_drawn_now": len(requests),
            **summarize(store.records.values(), benchmarks, args.num_generations, counter.markers, args.seed),
        }
        write_json(folder / "results.json", results)
    print_summary(results)
    print(f"Samples and results are in {folder}")
    return results


def _settings(target: Target, backend: Backend, args: EvaluateArguments) -> dict[str, Any]:
    """What the samples depend on."""
    template = "" if args.text_prompts else str(backend.tokenizer.chat_template)
    named = ("temperature", "top_p", "top_k", "max_completion_length", "seed", "system_prompt", "prompt_template")
    return {
        "model": target.model,
        "model_weights": weights_fingerprint(target.model),
        "adapter": target.adapter,
        "adapter_weights": target.adapter and weights_fingerprint(target.adapter),
        **{name: getattr(args, name) for name in (*named, "thinking", "dtype")},
        "chat_template_kwargs": args.template_kwargs,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
        "backend": type(backend).__name__.removesuffix("Backend").lower(),  # which `auto` is by then
    }


def _requests(benchmarks: Sequence[Benchmark], prompter: Prompter, args: EvaluateArguments) -> Iterator[Request]:
    # Sample by sample over all problems, so that an evaluation that is stopped early has seen every problem
    prompts = {(b.name, p.id): prompter.ids(p) for b in benchmarks for p in b.problems}
    for sample in range(args.num_generations):
        for (benchmark, problem), ids in prompts.items():
            digest = hashlib.sha256(f"{args.seed}/{benchmark}/{problem}/{sample}".encode()).digest()
            yield Request((benchmark, problem, sample), ids, int.from_bytes(digest[:4], "big") >> 1)


def _check_length(requests: Sequence[Request], max_completion_length: int, context: int | None) -> None:
    """Refuses completions that the model's context cannot hold behind the longest prompt."""
    longest = max(len(request.prompt_ids) for request in requests)
    if context is not None and longest + max_completion_length > context:
        raise InputError(
            f"`max_completion_length` ({max_completion_length}) is too large: the context is {context} tokens, of "
            f"which the longest prompt takes {longest}. Set it to {max(context - longest, 0)} or less."
        )


def _record(
    completion: Completion, problem: Problem, tokenizer: Any, counter: MarkerCounter, thinking_open: bool
) -> dict[str, Any]:
    text = tokenizer.decode(completion.ids, skip_special_tokens=True)
    found = grade(text, problem.answer, thinking_open)
    benchmark, problem_id, sample = completion.key
    return {
        "benchmark": benchmark,
        "problem_id": problem_id,
        "sample": sample,
        "problem_sha256": problem.sha256,
        "expected": problem.answer,
        "answer": found.answer,
        "correct": found.correct,
        "ungradable": found.ungradable,
        "tokens": len(completion.ids),
        "truncated": completion.truncated,
        "markers": counter.count(text),
        "completion": text,
    }


def evaluate(args: EvaluateArguments) -> list[dict[str, Any]]:
    """
    Evaluates every model that the arguments name, and compares them with the first if there are several.

    Args:
        args ([`EvaluateArguments`]):
            Arguments.

    Returns:
        `list[dict]`: results of each model, as written to its `results.json`.

    Raises:
        `InputError`: for models, benchmarks or samples on disk that cannot be used.
        `ImportError`: for an extra that is not installed.
    """
    grade("1", "1")  # a missing extra is known before the first sample, not after it
    assert args.model_name_or_path is not None  # the arguments have checked it
    targets = find_targets(args.model_name_or_path, args.adapter, args.checkpoints)
    benchmarks = load_benchmarks(args.benchmarks, args.limit)
    results: list[dict[str, Any]] = []
    backend, loaded = None, None
    for target in targets:
        if backend is None or loaded != target.model:
            del backend  # the memory of one model at a time
            ranks = [lora_rank(t.adapter) for t in targets if t.model == target.model and t.adapter]
            backend, loaded = _make_backend(target.model, args, max(ranks, default=0)), target.model
        results.append(evaluate_target(target, backend, benchmarks, args))
    if len(results) > 1:
        write_comparison(results, Path(args.output_dir))
    return results


def _make_backend(model: str, args: EvaluateArguments, max_lora_rank: int) -> Backend:
    if args.backend == "transformers" or (args.backend == "auto" and importlib.util.find_spec("vllm") is None):
        return TransformersBackend(model, args.dtype, args.batch_size)
    return VLLMBackend(
        model,
        args.dtype,
        max_model_length=args.vllm_max_model_length,
        max_lora_rank=max_lora_rank,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
    )
