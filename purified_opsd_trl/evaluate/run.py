"""
`purified-opsd evaluate`: samples, grades and summarises models on benchmarks.

```bash
purified-opsd evaluate --model Qwen/Qwen3-8B --checkpoints outputs/run --benchmarks aime24,aime25,hmmt25 \
    --num_samples 12 --output_dir evaluation
```
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import checkpoint_folders, is_whole
from ..errors import InputError
from ..markers import MarkerCounter
from .answers import grade
from .arguments import EvaluateArguments
from .backends import Backend, Completion, Request, Sampling, make_backend
from .benchmarks import Benchmark, Problem, load_benchmarks
from .store import SampleStore
from .summary import print_summary, summarise


@dataclass(frozen=True)
class Target:
    """
    One model to evaluate.

    Attributes:
        label (`str`):
            Name of its folder.
        model (`str`):
            Model id or path.
        adapter (`str`, *optional*):
            Path of an adapter on it.
    """

    label: str
    model: str
    adapter: str | None = None


def find_targets(args: EvaluateArguments) -> list[Target]:
    """
    The models that the arguments name: `model` itself unless adapters are given, each adapter, each checkpoint.

    Args:
        args ([`EvaluateArguments`]):
            Arguments.

    Returns:
        `list[Target]`

    Raises:
        `InputError`: if a folder is neither a model nor an adapter, was not written to its end, or two have one name.
    """
    targets = [] if args.adapter else [Target(_label(args.model), args.model)]
    targets += [Target(_label(path), args.model, path) for path in args.adapter]
    for folder in map(Path, args.checkpoints):
        for path in _whole_checkpoints(folder):
            label = f"{folder.name}-{path.name}" if path != folder else folder.name
            if (path / "adapter_config.json").is_file():
                targets.append(Target(label, args.model, str(path)))
            elif (path / "config.json").is_file():
                targets.append(Target(label, str(path)))
            else:
                raise InputError(
                    f"`checkpoints`: {path} holds neither a model (config.json) nor an adapter (adapter_config.json)."
                )
    labels = [target.label for target in targets]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise InputError(f"Two models are called `{twice}`; evaluate them into different `--output_dir`s.")
    return targets


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Those of a run, or the one that is named; a folder of another kind is taken as it is."""
    found = checkpoint_folders(folder)
    if not found and folder not in checkpoint_folders(folder.parent):
        return [folder]
    found = found or [folder]
    whole = [path for path in found if is_whole(path)]
    incomplete = ", ".join(path.name for path in found if path not in whole)
    if not whole:
        raise InputError(
            f"`checkpoints`: {folder} was not written to its end ({incomplete} holds no whole `trainer_state.json`, "
            "which comes last). Name another checkpoint; a folder whose weights are whole may go to `--adapter` or "
            "`--model`."
        )
    if incomplete:
        print(f"Passing over {incomplete} in {folder}: not written to the end")
    return whole


def _label(path: str) -> str:
    return Path(path.rstrip("/")).name


class Prompter:
    """
    Problems to prompt ids, by the model's chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        args ([`EvaluateArguments`]):
            Arguments.
    """

    def __init__(self, tokenizer: Any, args: EvaluateArguments):
        self.tokenizer = tokenizer
        self.args = args
        if tokenizer.chat_template is None and not args.no_chat_template:
            raise InputError(
                f"The tokenizer of {args.model} has no chat template. For a base model pass `--no_chat_template`."
            )

    def text(self, problem: Problem) -> str:
        """The prompt as the model sees it."""
        content = self.args.prompt_template.replace("{problem}", problem.problem)
        if self.args.no_chat_template:
            return content
        messages = [{"role": "user", "content": content}]
        if self.args.system_prompt:
            messages.insert(0, {"role": "system", "content": self.args.system_prompt})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.args.template_kwargs
        )

    def ids(self, problem: Problem) -> list[int]:
        """Prompt ids; a chat template writes its special tokens itself."""
        return self.tokenizer(self.text(problem), add_special_tokens=self.args.no_chat_template)["input_ids"]

    def settings(self, example: Problem) -> dict[str, Any]:
        """How problems become prompts, for the results."""
        template = None if self.args.no_chat_template else self.tokenizer.chat_template
        text = self.text(example)
        return {
            "chat_template_sha256": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
            "chat_template_kwargs": self.args.template_kwargs,
            "prompt_opens_thinking": text.rstrip().endswith("<think>"),
            "example_prompt": text,
        }


def weights_fingerprint(model: str) -> str | None:
    """
    Tells weights in a folder from others that were there before, so that samples of a retrained model are not mixed.

    It is made of names, sizes and modification times, not of the contents: these are many gigabytes, which would be
    read at every call. So a copy that does not keep modification times counts as other weights.

    Args:
        model (`str`):
            Folder of a model or an adapter, or a hub id.

    Returns:
        `str` or `None`: fingerprint; `None` for what is not a local folder.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    described = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def evaluate_target(
    target: Target, backend: Backend, benchmarks: Sequence[Benchmark], args: EvaluateArguments
) -> dict[str, Any]:
    """
    Draws what is missing of one model's samples, and summarises all of them.

    Args:
        target ([`Target`]):
            Model.
        backend ([`Backend`]):
            Draws the samples.
        benchmarks (`Sequence[Benchmark]`):
            Problems.
        args ([`EvaluateArguments`]):
            Arguments.

    Returns:
        `dict`: the results, as written to `results.json`.
    """
    prompter = Prompter(backend.tokenizer, args)
    prompting = prompter.settings(benchmarks[0].problems[0])
    settings = {
        "model": target.model,
        "model_weights": weights_fingerprint(target.model),
        "adapter": target.adapter,
        "adapter_weights": target.adapter and weights_fingerprint(target.adapter),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "system_prompt": args.system_prompt,
        "prompt_template": args.prompt_template,
        "thinking": args.thinking,
        "chat_template_kwargs": args.template_kwargs,
        "chat_template_sha256": prompting["chat_template_sha256"],
        "dtype": args.dtype,
        "backend": type(backend).__name__.removesuffix("Backend").lower(),  # which `auto` is by then
    }
    folder = Path(args.output_dir, target.label)
    started = time.perf_counter()
    counter = MarkerCounter(args.markers)
    problems = {(b.name, p.id): p for b in benchmarks for p in b.problems}
    with SampleStore(folder, settings) as store:
        store.check_problems({key: problem.sha256 for key, problem in problems.items()})
        requests = [r for r in _requests(benchmarks, prompter, args) if r.key not in store.records]
        drawn = 0
        if requests:
            backend.load(target.adapter)
            for completion in backend.generate(requests, Sampling(*(settings[k] for k in _SAMPLING))):
                problem = problems[completion.key[:2]]
                store.append(_record(completion, problem, backend.tokenizer, counter, prompting))
                drawn += 1
                if drawn % 50 == 0 or drawn == len(requests):
                    print(f"{target.label}: {drawn}/{len(requests)} samples, {time.perf_counter() - started:.0f} s")
        results = {
            "label": target.label,
            "settings": settings,
            "backend": settings["backend"],
            "prompting": prompting,
            "versions": _versions(),
            "licences": {b.name: b.licence for b in benchmarks},
            "sources": {b.name: b.source for b in benchmarks},
            "problem_sha256": {b.name: {p.id: p.sha256 for p in b.problems} for b in benchmarks},
            "samples_drawn_now": drawn,
            **summarise(store.records.values(), benchmarks, args.num_samples, counter.markers, args.seed),
        }
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print_summary(results)
    print(f"Samples and results are in {folder}")
    return results


_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")


def _requests(benchmarks: Sequence[Benchmark], prompter: Prompter, args: EvaluateArguments) -> Iterator[Request]:
    # Sample by sample over all problems, so that an evaluation that is stopped early has seen every problem
    prompts = {(b.name, p.id): prompter.ids(p) for b in benchmarks for p in b.problems}
    for sample in range(args.num_samples):
        for (benchmark, problem), ids in prompts.items():
            digest = hashlib.sha256(f"{args.seed}/{benchmark}/{problem}/{sample}".encode()).digest()
            yield Request((benchmark, problem, sample), ids, int.from_bytes(digest[:4], "big") >> 1)


def _record(
    completion: Completion, problem: Problem, tokenizer: Any, counter: MarkerCounter, prompting: dict[str, Any]
) -> dict[str, Any]:
    text = tokenizer.decode(completion.ids, skip_special_tokens=True)
    found = grade(text, problem.answer, prompting["prompt_opens_thinking"])
    benchmark, problem_id, sample = completion.key
    return {
        "benchmark": benchmark,
        "problem_id": problem_id,
        "sample": sample,
        "problem_sha256": problem.sha256,
        "expected": problem.answer,
        "answer": found.answer,
        "correct": found.correct,
        "tokens": len(completion.ids),
        "truncated": completion.truncated,
        "markers": counter.count(text),
        "completion": text,
    }


def _versions() -> dict[str, str]:
    names = ("purified_opsd_trl", "torch", "transformers", "peft", "vllm", "math-verify")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def evaluate(args: EvaluateArguments) -> list[dict[str, Any]]:
    """
    Evaluates every model that the arguments name.

    Args:
        args ([`EvaluateArguments`]):
            Arguments.

    Returns:
        `list[dict]`: results of each model.
    """
    grade("1", "1")  # a missing extra is known before the first sample, not after it
    targets = find_targets(args)
    benchmarks = load_benchmarks(args.benchmarks, args.limit)
    kind = args.backend
    if kind == "auto":
        kind = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    results: list[dict[str, Any]] = []
    backend, loaded = None, None
    for target in targets:
        if backend is None or loaded != target.model:
            del backend  # the memory of one model at a time
            ranks = [_lora_rank(t.adapter) for t in targets if t.model == target.model and t.adapter]
            backend = make_backend(
                kind,
                target.model,
                dtype=args.dtype,
                batch_size=args.batch_size,
                max_model_len=args.max_model_len,
                max_lora_rank=max(ranks, default=0),
                tp=args.tensor_parallel_size,
            )
            loaded = target.model
        results.append(evaluate_target(target, backend, benchmarks, args))
    return results


def _lora_rank(adapter: str) -> int:
    path = Path(adapter, "adapter_config.json")
    if not path.is_file():
        raise InputError(f"`adapter`: {adapter} holds no adapter_config.json.")
    return int(json.loads(path.read_text(encoding="utf-8")).get("r", 8))
