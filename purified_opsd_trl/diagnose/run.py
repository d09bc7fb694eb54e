"""
`purified-opsd diagnose`: does a plain teacher's signal consist of the reference, here?

```bash
purified-opsd diagnose --model Qwen/Qwen3-0.6B --dataset problems.jsonl --prompt_column problem \
    --reference_column solution --num_samples 20 --output_dir diagnosis
```
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig

from ..config import DEFAULT_REFERENCE_PROMPT_TEMPLATE, DEFAULT_TEACHER_PROMPT_TEMPLATE
from ..contexts import Contexts, build_contexts
from ..errors import InputError
from ..evaluate.backends import TransformersBackend
from ..evaluate.targets import find_targets
from ..extras import require_extra
from ..loading import PurifiedOPSDScriptArguments, load_splits, map_columns, pick_split
from ..markers import DEFAULT_MARKERS
from .measure import Meter, Models, Settings, completions, summarise
from .render import figures, html_page, print_verdict


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="purified-opsd diagnose",
        description="Show what a plain teacher's signal consists of, for a model or along the checkpoints of a run.",
    )
    add = parser.add_argument
    add("--model", required=True, help="Model id or path: the frozen base, and the student unless others are given.")
    add("--adapter", nargs="+", default=[], help="Adapters on the model, each a student.")
    add("--checkpoints", nargs="+", default=[], help="Run directories (all their checkpoint-*) or checkpoints.")
    add("--dataset", required=True, help="File (json, jsonl, parquet), folder or hub id.")
    add("--dataset_config", default=None, help="Configuration of a hub data set.")
    add("--dataset_split", default="train")
    add("--prompt_column", default="prompt")
    add("--reference_column", default="reference")
    add("--system_prompt", default=None, help="System turn put before text prompts.")
    add("--text_prompts", action="store_true", help="Leave text prompts as text, without chat template.")
    add("--teacher_prompt_template", default=DEFAULT_TEACHER_PROMPT_TEMPLATE)
    add("--reference_prompt_template", default=DEFAULT_REFERENCE_PROMPT_TEMPLATE)
    add("--chat_template_kwargs", type=json.loads, default={}, help="Arguments of the chat template, as JSON.")
    add("--num_samples", type=int, default=100, help="Problems, drawn at random. The paper takes 100.")
    add("--num_pages", type=int, default=8, help="Samples on the per-token page.")
    add("--alternatives", type=int, default=5, help="Likely tokens shown of each distribution.")
    add("--max_completion_length", type=int, default=1024, help="Longest completion in tokens.")
    add("--temperature", type=float, default=1.0)
    add("--batch_size", type=int, default=8, help="Completions drawn at once.")
    add("--dtype", default="auto")
    add("--seed", type=int, default=0)
    add("--markers", nargs="+", default=list(DEFAULT_MARKERS))
    add("--output_dir", default="diagnosis")
    return parser


def load_contexts(args: argparse.Namespace) -> list[Contexts]:
    """
    The prompts of a random choice of rows.

    Args:
        args (`argparse.Namespace`):
            Arguments.

    Returns:
        `list[Contexts]`

    Raises:
        `InputError`: if the data cannot be used; the message names the row.
    """
    script_args = PurifiedOPSDScriptArguments(
        dataset_name=args.dataset,
        dataset_config=args.dataset_config,
        dataset_train_split=args.dataset_split,
        dataset_prompt_column=args.prompt_column,
        dataset_reference_column=args.reference_column,
        system_prompt=args.system_prompt,
        text_prompts=args.text_prompts,
    )
    dataset = pick_split(load_splits(script_args, DatasetMixtureConfig()), args.dataset_split, "--dataset_split")
    dataset = map_columns(dataset, script_args)
    chosen = sorted(random.Random(args.seed).sample(range(len(dataset)), min(args.num_samples, len(dataset))))
    contexts = []
    for index in chosen:
        row: Mapping[str, Any] = dataset[index]
        try:
            contexts.append(
                build_contexts(
                    row,
                    reference_column=script_args.mapped_reference_column or args.reference_column,
                    teacher_prompt_template=args.teacher_prompt_template,
                    reference_prompt_template=args.reference_prompt_template,
                )
            )
        except InputError as error:
            raise InputError(f"{args.dataset}, row {index}, {error}") from None
    if not contexts:
        raise InputError(f"{args.dataset} holds no rows.")
    return contexts


def diagnose(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measures every student that the arguments name, and writes `diagnosis.json`, `diagnosis.html` and PNG figures.

    Args:
        args (`argparse.Namespace`):
            Arguments.

    Returns:
        `dict`: all numbers.

    Raises:
        `InputError`: for data or models that cannot be used.
        `ImportError`: without the extra `plot`.
    """
    require_extra("plot", "The figures of `diagnose`", module="matplotlib")
    for name in ("num_samples", "max_completion_length", "alternatives", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    if not args.temperature > 0:
        raise InputError(f"`--temperature` must be positive, got {args.temperature}.")
    targets = find_targets(args.model, args.adapter, args.checkpoints)
    contexts = load_contexts(args)
    settings = Settings(
        temperature=args.temperature,
        max_completion_length=args.max_completion_length,
        alternatives=args.alternatives,
        pages=args.num_pages,
        seed=args.seed,
        template_kwargs=args.chat_template_kwargs,
        markers=tuple(args.markers),
    )
    models = Models(TransformersBackend(args.model, args.dtype, args.batch_size))
    students = []
    for target in targets:
        own = target.model != args.model
        student = TransformersBackend(target.model, args.dtype, args.batch_size) if own else None
        models.use(student, target.adapter)
        students.append({"label": target.label, "step": _step(target.label), **_measure(models, contexts, settings)})
        print_verdict(students[-1])
    diagnosis = {"model": args.model, "dataset": args.dataset, "settings": vars(args), "students": students}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # NaN is no JSON, and would mean that something went wrong unseen
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    (folder / "diagnosis.html").write_text(html_page(diagnosis), encoding="utf-8")
    figures(diagnosis, folder)
    print(f"Written: {folder}/diagnosis.html, diagnosis.json and figures")
    return diagnosis


def _step(label: str) -> int:
    """Steps of a checkpoint by its name; 0 for a model that is not one."""
    _, found, number = label.rpartition("checkpoint-")
    return int(number) if found and number.isdigit() else 0


def _measure(models: Models, contexts: Sequence[Contexts], settings: Settings) -> dict[str, Any]:
    meter = Meter(models, settings)
    samples: list[dict[str, Any]] = []
    for index, ids in enumerate(completions(models, contexts, settings)):
        if ids:  # an empty completion has no token to look at
            samples.append(meter.sample(contexts[index], ids, with_alternatives=len(samples) < settings.pages))
    if not samples:
        raise InputError("All completions are empty; check the chat template and `--chat_template_kwargs`.")
    return {"summary": summarise(samples), "samples": samples}
