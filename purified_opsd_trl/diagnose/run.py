"""`purified-opsd diagnose`: measures every student that the arguments name, and writes the results."""

import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig

from ..contexts import Contexts
from ..env import run_versions
from ..errors import InputError
from ..evaluate.backends import TransformersBackend
from ..evaluate.targets import find_targets
from ..images import images_of
from ..loading import PurifiedOPSDScriptArguments, load_splits, map_columns, pick_split
from .arguments import DiagnoseArguments
from .controls import contexts_of, with_sources
from .measure import Meter, Models, completions, summarize
from .render import html_page, print_verdict


def load_contexts(args: DiagnoseArguments) -> list[dict[str, Contexts]]:
    """The prompts of a random choice of rows, by source; an [`InputError`] names a row that cannot be used."""
    script_args = PurifiedOPSDScriptArguments(
        dataset_name=args.dataset_name,
        dataset_config=args.dataset_config,
        dataset_train_split=args.dataset_split,
        dataset_prompt_column=args.dataset_prompt_column,
        dataset_reference_column=args.dataset_reference_column,
        system_prompt=args.system_prompt,
        text_prompts=args.text_prompts,
    )
    dataset = pick_split(load_splits(script_args, DatasetMixtureConfig()), args.dataset_split, "dataset_split")
    dataset = map_columns(dataset, script_args)
    dataset, seen = with_sources(dataset, args, script_args.mapped_reference_column or args.dataset_reference_column)
    chosen = sorted(random.Random(args.seed).sample(range(len(dataset)), min(args.num_samples, len(dataset))))
    contexts = []
    for index in chosen:
        row: Mapping[str, Any] = dataset[index]
        try:
            contexts.append(contexts_of(row, seen))
            if images_of(contexts[-1]["own"].base):
                raise InputError("the prompt holds images, but `diagnose` reads text alone. Leave such rows out.")
        except InputError as error:
            raise InputError(f"{args.dataset_name}, row {index}, {error}") from None
    if not contexts:
        raise InputError(f"`dataset_name`: {args.dataset_name} has no rows.")
    return contexts


def diagnose(args: DiagnoseArguments) -> dict[str, Any]:
    """
    Measures every student that the arguments name, and writes `diagnosis.json` and `diagnosis.html`.

    Args:
        args ([`~diagnose.DiagnoseArguments`]):
            Arguments.

    Returns:
        `dict`: all numbers, as in `diagnosis.json`.

    Raises:
        `InputError`: for data, models or an output folder that cannot be used.
    """
    folder = _output_folder(args.output_dir)
    started = time.time()
    targets = find_targets(args.model_name_or_path, args.adapter, args.checkpoints)
    contexts = load_contexts(args)
    models = Models(TransformersBackend(args.model_name_or_path, args.dtype, args.batch_size))
    students = []
    for target in targets:
        own = target.model != args.model_name_or_path
        student = TransformersBackend(target.model, args.dtype, args.batch_size) if own else None
        models.use(student, target.adapter)
        students.append({"label": target.label, "step": _step(target.label), **_measure(models, contexts, args)})
        print_verdict(students[-1], args.target)
    diagnosis = {
        "model": args.model_name_or_path,
        "dataset": args.dataset_name,
        "started": started,
        "seconds": time.time() - started,
        "versions": run_versions(),
        "settings": dataclasses.asdict(args),
        "students": students,
    }
    # NaN is not JSON, and would be a sign of an error
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    (folder / "diagnosis.html").write_text(html_page(diagnosis), encoding="utf-8")
    print(f"Results are in {folder / 'diagnosis.html'} and {folder / 'diagnosis.json'}")
    return diagnosis


def _output_folder(name: str) -> Path:
    """Creates the folder and writes to it before hours are spent on measuring."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"`output_dir`: {name} cannot be written: {error.strerror}.") from None
    return folder


def _step(label: str) -> int:
    """Steps of a checkpoint by its name; 0 for a model that is not one."""
    _, found, number = label.rpartition("checkpoint-")
    return int(number) if found and number.isdigit() else 0


def _measure(models: Models, contexts: Sequence[dict[str, Contexts]], args: DiagnoseArguments) -> dict[str, Any]:
    meter = Meter(models, args)
    samples: list[dict[str, Any]] = []
    for index, ids in enumerate(completions(models, [sources["own"] for sources in contexts], args)):
        if ids:  # an empty completion has no token to measure
            samples.append(meter.sample(contexts[index], ids, with_alternatives=len(samples) < args.num_pages))
    if not samples:
        raise InputError("All completions are empty. Check the chat template and `chat_template_kwargs`.")
    return {"summary": summarize(samples), "samples": samples}
