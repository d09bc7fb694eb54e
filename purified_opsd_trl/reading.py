"""
The part of the trainer that reads data: datasets checked before training, rows turned into prompts.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import Trainer

from .backbone import context_length
from .config import PurifiedOPSDConfig
from .contexts import Contexts, Prompt
from .dataset import AnyDataset, DatasetCheck, FirstStepGuard, as_dataset, check_columns
from .errors import InputError
from .images import IMAGE_COLUMNS, check_reads_images
from .references import OTHER_REFERENCE, configured_contexts, seen_column, with_other_references
from .rows import RowReader


class ReadingTrainer(Trainer):
    """Mixin of the trainer: datasets, rows and contexts."""

    args: PurifiedOPSDConfig
    model: Any
    chat_template: str | None
    chat_template_kwargs: Any
    tools: list[Any]
    _tokenize_prompts: Any  # TRL's

    def read_datasets(self) -> None:
        """Reads and checks every row of the datasets; those of a stream are checked as they arrive."""
        args = self.args
        for name, dataset in named_datasets(self.train_dataset, self.eval_dataset):
            column = next((column for column in dataset.column_names or () if column in IMAGE_COLUMNS), None)
            check_reads_images(self.processing_class, column, f"{name}: ")
        self.reader = make_reader(
            args, self.processing_class, self.build_contexts, self.model, self.chat_template, self.tools
        )
        # What these read of a row cannot be fingerprinted
        overridden = type(self).build_contexts is not ReadingTrainer.build_contexts or args.target == "contrastive"
        self._check_dataset = DatasetCheck(
            self.reader,
            args.invalid_rows,
            args.overlong_reference,
            args.output_dir or "",
            self.accelerator,
            show_progress=self.accelerator.is_local_main_process and not args.disable_tqdm,
            cache_key=None if overridden else self.reader.fingerprint(),
        )
        if self.train_dataset is not None:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
            self.train_dataset = self._check_dataset(
                self.train_dataset, "train_dataset", batch * self.accelerator.num_processes
            )
        if isinstance(self.train_dataset, IterableDataset):
            self.add_callback(FirstStepGuard())
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = {
                key: self._check_dataset(dataset, f"eval_dataset[{key!r}]")
                for key, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._check_dataset(self.eval_dataset, "eval_dataset")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        if eval_dataset is not None and not isinstance(eval_dataset, str):  # passed to `evaluate`
            eval_dataset = as_dataset(eval_dataset, "eval_dataset")
            check_columns(eval_dataset, "eval_dataset", self.args.reference_column)
            eval_dataset = with_other_references(eval_dataset, self.args, "eval_dataset")
            eval_dataset = self._check_dataset(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        read = [self.args.reference_column, OTHER_REFERENCE, self.args.wrong_reference_column]
        columns = [*columns, *(name for name in read if name is not None)]
        self._signature_columns = list(dict.fromkeys(columns))  # type: ignore[assignment]

    def build_contexts(self, row: Mapping[str, Any]) -> Contexts:
        """
        Builds the three prompts of one dataset row. Override it to word or arrange them differently.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row with all its columns.

        Returns:
            [`Contexts`]: the student and the base see `base`; `teacher` and `reference_only` are the frozen
            model's alone.

        Raises:
            `InputError`: if the row cannot be used.
        """
        return configured_contexts(row, self.args)

    def template_kwargs(self, student: bool) -> dict[str, Any]:
        """Chat template arguments; those of teacher and reference-only probe may differ (thinking on or off)."""
        teacher = None if student else self.args.teacher_chat_template_kwargs
        kwargs: Any = self.chat_template_kwargs if teacher is None else teacher
        return {"tools": self.tools or None, "chat_template": self.chat_template, **kwargs}

    def tokenize_teacher_prompts(self, prompts: list[Prompt]) -> list[list[int]]:
        """Token ids of prompts of the frozen model without images, with the chat template arguments of the teacher."""
        student_kwargs = self.chat_template_kwargs
        if self.args.teacher_chat_template_kwargs is not None:
            self.chat_template_kwargs = self.args.teacher_chat_template_kwargs
        try:
            return self._tokenize_prompts(prompts)[0]
        finally:
            self.chat_template_kwargs = student_kwargs


def make_reader(
    args: PurifiedOPSDConfig,
    processing_class: Any,
    build_contexts: Callable[[Mapping[str, Any]], Contexts],
    model: Any,
    chat_template: str | None = None,
    tools: list[Any] | None = None,
) -> RowReader:
    """
    The reader of rows that `args` ask for.

    Raises:
        `InputError`: if the completion alone fills the model's context.
    """
    context = context_length(model)
    if context is not None and args.max_completion_length >= context:
        raise InputError(
            f"`max_completion_length` ({args.max_completion_length} tokens) leaves no room for a prompt in the "
            f"model's context of {context} tokens. Lower it."
        )
    own = args.teacher_chat_template_kwargs
    kwargs: Any = (args.chat_template_kwargs if own is None else own) or {}
    return RowReader(
        processing_class,
        build_contexts,
        seen_column(args),
        template_kwargs={"tools": tools or None, "chat_template": chat_template, **kwargs},
        max_reference_length=args.max_reference_length,
        max_prompt_length=None if context is None else context - args.max_completion_length,
        truncate=args.overlong_reference == "truncate",
    )


def as_datasets(
    train_dataset: Any, eval_dataset: Any
) -> tuple[AnyDataset | None, AnyDataset | dict[str, AnyDataset] | None]:
    """Lists of rows and torch datasets as datasets; refuses what is neither."""
    if train_dataset is not None:
        train_dataset = as_dataset(train_dataset, "train_dataset")
    if isinstance(eval_dataset, Mapping):
        eval_dataset = {key: as_dataset(data, f"eval_dataset[{key!r}]") for key, data in eval_dataset.items()}
    elif eval_dataset is not None:
        eval_dataset = as_dataset(eval_dataset, "eval_dataset")
    return train_dataset, eval_dataset


def named_datasets(
    train_dataset: AnyDataset | None, eval_dataset: AnyDataset | dict[str, AnyDataset] | None
) -> Iterator[tuple[str, AnyDataset]]:
    """The datasets with the names that messages give them."""
    if train_dataset is not None:
        yield "train_dataset", train_dataset
    if isinstance(eval_dataset, Mapping):
        yield from ((f"eval_dataset[{key!r}]", dataset) for key, dataset in eval_dataset.items())
    elif eval_dataset is not None:
        yield "eval_dataset", eval_dataset
