"""`purified-opsd check`: what a run would see and need, by the options of `purified-opsd train`, without training."""

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from huggingface_hub import file_exists
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import cached_file
from trl import ModelConfig, get_peft_config

from .contexts import Contexts
from .dataset import DatasetCheck, check_columns
from .env import accelerators, run_versions
from .errors import InputError, one_line
from .extras import require_extra
from .loading import load_splits, map_columns, pick_split
from .plan import Layout, Plan, weight_bytes
from .reading import make_reader
from .references import configured_contexts, with_other_references
from .train import check_extras, check_model, launch_arguments, make_parser


_SAMPLE = 512  # rows whose lengths are measured, and rows of a stream that are read
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


class _Check:
    """The parts in their order; each returns what it prints, and raises what `train` would stop at."""

    parts = {  # name: the parts whose results it needs
        "versions": (),
        "extras": (),
        "devices": (),
        "model": (),
        "data": (),
        "rows": ("model", "data"),
        "contexts": ("rows",),
        "lengths": ("rows",),
        "memory": ("lengths",),
        "time": ("lengths",),
    }

    def __init__(self, script: Any, args: Any, model_args: ModelConfig, mixture: Any, launcher: list[str]):
        self.script, self.args, self.model_args, self.mixture = script, args, model_args, mixture
        if script.mapped_reference_column is not None:
            args.reference_column = script.mapped_reference_column
        self.layout = Layout.of_launcher(launcher)
        self.build: Callable[[Any], Contexts] = partial(configured_contexts, args=args)

    def versions(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in run_versions().items())

    def extras(self) -> str:
        check_extras(self.args, self.model_args)
        if self.args.use_vllm:
            require_extra("vllm", "`use_vllm`")
        return "all that the settings need are installed"

    def devices(self) -> str:
        return f"{'; '.join(accelerators().values())} here; the run: {self.layout}"

    def model(self) -> str:
        name, revision = self.model_args.model_name_or_path, self.model_args.model_revision
        if name is None:
            raise InputError("No model is named. Set `model_name_or_path` to a folder or a hub id.")
        check_model(name, revision)
        _check_weights(name, revision)
        trust = {"trust_remote_code": self.args.trust_remote_code}
        self.config = AutoConfig.from_pretrained(name, revision=revision, **trust)
        processor = AutoProcessor.from_pretrained(name, revision=revision, **trust)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        sees = getattr(processor, "image_processor", None) is not None
        with torch.device("meta"):
            auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            model = auto.from_config(self.config, **trust)
            weights = sum(p.numel() for p in model.parameters())
            if (lora := get_peft_config(self.model_args)) is not None:
                from peft import get_peft_model

                model = get_peft_model(model, lora)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        student = copy.copy(self.args)
        student.teacher_chat_template_kwargs = None
        self.reader, self.student_reader = (
            make_reader(args, processor, self.build, SimpleNamespace(config=self.config))
            for args in (self.args, student)
        )
        self.plan = Plan(
            self.args, self.layout, self.config, weights, trainable, weight_bytes(self.model_args, self.config)
        )
        return f"{name}: {self.config.model_type}, {weights:,} weights, {trainable:,} trained"

    def data(self) -> str:
        splits = load_splits(self.script, self.mixture)
        if self.args.eval_strategy != "no":
            map_columns(pick_split(splits, self.script.dataset_test_split, "dataset_test_split"), self.script)
        train = pick_split(splits, self.script.dataset_train_split, "dataset_train_split")
        self.dataset = map_columns(train, self.script)
        check_columns(self.dataset, "train_dataset", self.args.reference_column)
        self.dataset = with_other_references(self.dataset, self.args, "train_dataset")
        if isinstance(self.dataset, IterableDataset):
            self.dataset = Dataset.from_list(list(self.dataset.take(_SAMPLE)))
            return f"{self.script.dataset_name}: a stream, of which {len(self.dataset):,} rows are read"
        return f"{self.script.dataset_name or 'mixture'}: {len(self.dataset):,} rows"

    def rows(self) -> str:
        args, total = self.args, len(self.dataset)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.layout.gpus
        with tempfile.TemporaryDirectory() as folder:  # rows that are dropped are written to it
            check = DatasetCheck(
                self.reader, args.invalid_rows, args.overlong_reference, folder, Accelerator(cpu=True), False
            )
            self.dataset = check(self.dataset, "train_dataset", batch)
        return f"{len(self.dataset):,} of {total:,} can be used; a step uses {batch}"

    def contexts(self) -> str:
        prompts = self.reader.contexts([self.dataset[0]], "train_dataset")[0]
        shown = zip(("student and base", "teacher", "reference-only probe"), self._texts(prompts), strict=True)
        return "of the first row, as the model sees them\n" + "\n".join(
            f"----- {name}, {self._tokens(text):,} tokens -----\n{text}" for name, text in shown
        )

    def lengths(self) -> str:
        args, every = self.args, max(1, len(self.dataset) // _SAMPLE)
        sample = [self.dataset[i] for i in range(0, len(self.dataset), every)][:_SAMPLE]
        counted = [
            [self._tokens(text) for text in self._texts(prompts)]
            for prompts in self.reader.contexts(sample, "train_dataset")
        ]
        self.longest = [max(column) for column in zip(*counted, strict=True)]
        self.mean = [round(sum(column) / len(counted)) for column in zip(*counted, strict=True)]
        limit, room = args.vllm_max_model_length, self.longest[0] + args.max_completion_length
        if args.use_vllm and limit is not None and room > limit:
            raise InputError(
                f"`vllm_max_model_length` is {limit}, but a prompt with its completion takes {room} tokens."
            )
        names = ("question", "teacher", "reference-only")
        prompt = ", ".join(
            f"{n} {m:,} (longest {x:,})" for n, m, x in zip(names, self.mean, self.longest, strict=True)
        )
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return (
            f"mean tokens of {len(sample):,} rows: {prompt}; completion up to {args.max_completion_length:,}; "
            f"model's context {context or 'without limit'}"
        )

    def memory(self) -> str:
        return self.plan.memory(self.longest)

    def time(self) -> str:
        return self.plan.time(self.mean, len(self.dataset))

    def _texts(self, prompts: Contexts) -> list[str]:
        """Student's, teacher's and probe's prompt, each with its own chat template arguments."""
        frozen = [self.reader.text(prompt) for prompt in (prompts.teacher, prompts.reference_only)]
        return [self.student_reader.text(prompts.base), *frozen]

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_weights(name: str, revision: str | None) -> None:
    """Looks for the weights, without downloading them."""
    if os.path.isdir(name):
        if not [file for file in Path(name).iterdir() if file.suffix in (".safetensors", ".bin")]:
            raise InputError(f"`model_name_or_path`: {name} holds no weights (*.safetensors or *.bin).")
        return
    here = {"revision": revision, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    if any(cached_file(name, file, **here) for file in _WEIGHTS):
        return
    if not any(file_exists(name, file, revision=revision) for file in _WEIGHTS):
        raise InputError(f"`model_name_or_path`: {name} has no weights ({', '.join(_WEIGHTS)}).")


def main(argv: Sequence[str]) -> int:
    """
    Prints what a run would see and need, a part per line, and the first row in its three contexts.

    Args:
        argv (`Sequence[str]`):
            The command line of `purified-opsd train`.

    Returns:
        `int`: 1 if a part failed, 0 otherwise.
    """
    parsed, from_config, from_command_line = make_parser(prog="purified-opsd check").parse_known(argv)
    script, args, model_args, mixture = parsed
    check = _Check(script, args, model_args, mixture, launch_arguments(from_config, from_command_line))
    open_ends: dict[str, str] = {}
    for name, needs in check.parts.items():
        try:
            if missing := [part for part in needs if part in open_ends]:
                open_ends[name] = f"not checked: it needs {' and '.join(missing)}"
            else:
                print(f"{name:9} {getattr(check, name)()}", flush=True)
        except (InputError, ImportError, OSError) as error:
            open_ends[name] = f"FAILED: {one_line(error)}"
        if name in open_ends:
            print(f"{name:9} {open_ends[name]}", flush=True)
    return 1 if open_ends else 0
