"""
Checks of the data before training: columns, rows, and references that are too long.

Everything that can be known up front is decided up front: a map-style dataset is read once, with a progress bar, and
what was dropped or truncated is counted and printed. A streamed dataset is checked batch by batch as it arrives.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .contexts import Contexts, Prompt, reference_text
from .errors import InputError


logger = logging.getLogger(__name__)

_READ_ROWS = 256  # rows tokenized at once: enough to feed the tokenizer's threads

AnyDataset: TypeAlias = Dataset | IterableDataset


def row_blocks(dataset: Dataset) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """
    Reads a data set block by block.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data set.

    Returns:
        `Iterator[tuple[int, list[dict[str, Any]]]]`: number of a block's first row, and its rows.
    """
    for start in range(0, len(dataset), _READ_ROWS):
        yield start, [dataset[i] for i in range(start, min(start + _READ_ROWS, len(dataset)))]


def check_columns(dataset: AnyDataset, name: str, reference_column: str) -> None:
    """
    Checks that the dataset has the columns the trainer reads.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to check. A streamed dataset that does not know its columns is not checked here.
        name (`str`):
            How errors name the dataset, e.g. `"train_dataset"`.
        reference_column (`str`):
            Name of the column that holds the worked solution.

    Raises:
        `InputError`: if a column is missing (the message lists those there are), the dataset is empty, or it holds
            images.
    """
    columns = dataset.column_names
    if columns is None:
        return
    listed = ", ".join(f"`{column}`" for column in columns) or "none"
    for column, key in (("prompt", "dataset_prompt_column"), (reference_column, "reference_column")):
        if column not in columns:
            raise InputError(
                f"{name} has no column `{column}`; its columns are {listed}. Rename the column, or name yours with "
                f"`{key}`."
            )
    images = {"image", "images"}.intersection(columns)
    if images:
        raise InputError(f"{name}: images (column `{images.pop()}`) are not supported; only text can be distilled.")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise InputError(f"{name} has no rows.")


def check_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Checks that the tokenizer can render a prompt in its format.

    Text must not be the output of a chat template: the teacher's template wraps the question, and wrapped around
    `<|im_start|>user...` it would put the reference outside every turn. Messages need a chat template.

    Args:
        prompt (`str` or `list[dict]`):
            The row's prompt.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.

    Raises:
        `InputError`: if a text prompt holds a special token, or the prompt is messages and there is no chat template.
    """
    if not isinstance(prompt, str):
        if tokenizer.chat_template is None:
            raise InputError(
                "column `prompt`: the prompt is a list of messages, but the model's tokenizer has no chat template. "
                "Set `processing_class.chat_template`, take the instruction-tuned variant of the model, or give the "
                "prompts as text."
            )
        return
    found = next((token for token in tokenizer.all_special_tokens if token in prompt), None)
    if found is not None:
        raise InputError(
            f"column `prompt`: the text holds the special token {found!r}, so a chat template seems to have been "
            "applied already. Give the prompt as messages instead and the trainer applies the template, to each "
            "context on its own."
        )


def check_reference(reference: str, column: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Checks that a reference stays inside the turn it is put into.

    Args:
        reference (`str`):
            Text of the worked solution.
        column (`str`):
            Its column, for the error.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.

    Raises:
        `InputError`: if it holds a special token; `<|im_end|>`, say, would end the teacher's user turn.
    """
    found = next((token for token in tokenizer.all_special_tokens if token in reference), None)
    if found is not None:
        raise InputError(
            f"column `{column}`: the reference holds the special token {found!r}, which would break out of the "
            "teacher's turn. Remove it from the text."
        )


@dataclass(frozen=True)
class ReferenceLimit:
    """
    Finds, and on request truncates, references that are too long.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        tokenize (`Callable[[list[Prompt]], list[list[int]]]`):
            Renders and tokenizes teacher prompts.
        build_contexts (`Callable[[Mapping], Contexts]`):
            Row to contexts.
        reference_column (`str`):
            Name of the column that holds the worked solution.
        max_reference_length (`int` or `None`):
            Longest reference in tokens.
        max_prompt_length (`int` or `None`):
            Longest teacher prompt in tokens: the model's context minus `max_completion_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    tokenize: Callable[[list[Prompt]], list[list[int]]]
    build_contexts: Callable[[Mapping[str, Any]], Contexts]
    reference_column: str
    max_reference_length: int | None
    max_prompt_length: int | None

    def check(self, row: dict[str, Any], where: str) -> None:
        """
        Checks that contexts can be built from a row and rendered.

        Args:
            row (`dict[str, Any]`):
                Dataset row.
            where (`str`):
                How the error names the row.

        Raises:
            `InputError`: if the row cannot be used; the message names row and column.
        """
        try:
            self.build_contexts(row)
            check_prompt(row["prompt"], self.tokenizer)
            check_reference(self._reference(row), self.reference_column, self.tokenizer)
        except InputError as error:
            raise InputError(f"{where}, {error}") from None

    def _reference(self, row: Mapping[str, Any]) -> str:
        return reference_text(row[self.reference_column], self.reference_column)

    def excess(self, rows: list[dict[str, Any]], where: str = "", first: int = 0) -> list[int]:
        """
        Tokens by which each row is too long, by either limit; 0 where it fits.

        Args:
            rows (`list[dict[str, Any]]`):
                Dataset rows.
            where (`str`, *optional*):
                How errors name the rows' origin.
            first (`int`, *optional*, defaults to `0`):
                Number of the first row, for errors.

        Returns:
            `list[int]`: one number a row, in tokens.

        Raises:
            `InputError`: if the chat template refuses a prompt, e.g. one with a system turn.
        """
        contexts = [self.build_contexts(row) for row in rows]
        lengths = self._prompt_lengths(contexts, where, first)
        limit = self.max_prompt_length
        excess = [0 if limit is None else max(0, length - limit) for length in lengths]
        if self.max_reference_length is not None:
            references = [self._reference(row) for row in rows]
            reference_ids = self.tokenizer(text=references, add_special_tokens=False)["input_ids"]
            over = (len(ids) - self.max_reference_length for ids in reference_ids)
            excess = [max(a, b) for a, b in zip(excess, over, strict=True)]
        return excess

    def _prompt_lengths(self, contexts: list[Contexts], where: str, first: int) -> list[int]:
        """Tokens of the longer of each row's two prompts that hold the reference."""
        try:
            teacher = self.tokenize([c.teacher for c in contexts])
            reference_only = self.tokenize([c.reference_only for c in contexts])
        except TemplateError as error:
            if len(contexts) == 1:
                raise InputError(
                    f"{where}, row {first}, column `prompt`: the model's chat template refuses these messages "
                    f"({error}). Many templates know no system turn, or want user and assistant to alternate."
                ) from error
            for index, context in enumerate(contexts):  # one of them is the culprit
                self._prompt_lengths([context], where, first + index)
            raise
        return [max(len(a), len(b)) for a, b in zip(teacher, reference_only, strict=True)]

    def truncate(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """
        Keeps as many first tokens of the reference as fit.

        Args:
            row (`dict[str, Any]`):
                Dataset row.
            where (`str`):
                How the error names the row.

        Returns:
            `dict[str, Any]`: the row with a shorter reference, a string or messages as before.

        Raises:
            `InputError`: if the question alone leaves no room for a reference.
        """
        while (excess := self.excess([row])[0]) > 0:
            # Retokenized text can be a token longer or shorter at the cut, hence the loop
            shorter = self._without_last_tokens(self._reference(row), excess)
            if not shorter.strip():
                raise InputError(
                    f"{where}: the question leaves no room for a reference (limit {self.max_prompt_length} prompt "
                    f"tokens, {self.max_reference_length} reference tokens). Lower `max_completion_length` or leave "
                    "the row out."
                )
            is_text = isinstance(row[self.reference_column], str)
            reference = shorter if is_text else [{**row[self.reference_column][0], "content": shorter}]
            row = {**row, self.reference_column: reference}
        return row

    def _without_last_tokens(self, text: str, count: int) -> str:
        if not self.tokenizer.is_fast:  # no offsets: decode, less what a cut inside a character leaves
            ids = self.tokenizer(text=text, add_special_tokens=False)["input_ids"]
            return str(self.tokenizer.decode(ids[: max(0, len(ids) - count)])).rstrip("\ufffd")[: len(text) - 1]
        offsets = self.tokenizer(text=text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: offsets[-count][0]] if count < len(offsets) else ""

    def enforce(self, rows: list[dict[str, Any]], policy: str, where: str) -> list[dict[str, Any]]:
        """
        Applies the limit to rows that no pass before training has seen: streamed, or passed to `evaluate`.

        Args:
            rows (`list[dict[str, Any]]`):
                Dataset rows.
            policy (`str`):
                `"error"` or `"truncate"`; `"drop"`, too late here, is an error as well.
            where (`str`):
                How errors name the rows.

        Returns:
            `list[dict[str, Any]]`: the rows, truncated where needed.

        Raises:
            `InputError`: if a row is too long and the policy is not `"truncate"`.
        """
        for index, row in enumerate(rows):
            self.check(row, f"{where}, row {index}")
        excess = self.excess(rows, where)
        if policy != "truncate" and any(excess):
            raise InputError(_overlong_message(where, {i: e for i, e in enumerate(excess) if e}, len(rows)))
        named = zip(rows, excess, (f"{where}, row {index}" for index in range(len(rows))), strict=True)
        return [self.truncate(row, name) if e else row for row, e, name in named]


def prepare_dataset(
    dataset: AnyDataset,
    name: str,
    *,
    limit: ReferenceLimit,
    policy: str,
    report: Callable[[str], None],
    show_progress: bool = True,
) -> AnyDataset:
    """
    Reads every row once: checks it and applies the policy for references that are too long.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with `prompt` and the reference column.
        name (`str`):
            How messages name the dataset.
        limit ([`ReferenceLimit`]):
            The limit and how to measure it.
        policy (`str`):
            `"error"`, `"drop"` or `"truncate"`.
        report (`Callable[[str], None]`):
            Prints one line.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        The dataset: the same rows, fewer (`"drop"`) or with shorter references (`"truncate"`). A streamed dataset is
        returned as it is; its rows are checked as they arrive.

    Raises:
        `InputError`: if a row cannot be used, if rows are too long under `"error"`, or if none is left.
    """
    if isinstance(dataset, IterableDataset):
        if policy == "drop":
            raise InputError(
                f"{name} is streamed, so rows cannot be dropped up front. Set `overlong_reference` to `truncate` or "
                "`error`, or filter the dataset yourself."
            )
        return dataset
    if isinstance(dataset[0]["prompt"], str) and limit.tokenizer.chat_template is not None:
        logger.warning(
            "%s: the prompts are text, so the model's chat template is not applied. Give messages "
            '(`[{"role": "user", "content": ...}]`) if this is a chat model.',
            name,
        )
    excess: dict[int, int] = {}
    blocks = tqdm(
        row_blocks(dataset),
        total=-(-len(dataset) // _READ_ROWS),
        desc=f"Checking {name}",
        unit="block",
        disable=not show_progress,
    )
    for start, rows in blocks:
        for index, row in enumerate(rows, start):
            limit.check(row, f"{name}, row {index}")
        excess.update({start + i: tokens for i, tokens in enumerate(limit.excess(rows, name, start)) if tokens})
    if not excess:
        return dataset
    if policy == "error":
        raise InputError(_overlong_message(name, excess, len(dataset)))
    if policy == "drop":
        report(f"{name}: dropped {len(excess)} of {len(dataset)} rows whose reference is too long.")
        if len(excess) == len(dataset):
            raise InputError(_overlong_message(name, excess, len(dataset)))
        return dataset.select([i for i in range(len(dataset)) if i not in excess])
    column = limit.reference_column
    shorter = {i: limit.truncate(dataset[i], f"{name}, row {i}")[column] for i in excess}
    report(f"{name}: truncated the reference of {len(shorter)} of {len(dataset)} rows.")
    return dataset.map(_Replace(column, shorter), with_indices=True, desc=f"Truncating {name}")


@dataclass(frozen=True)
class _Replace:
    """Puts other values into some rows of a column; a plain object, so that `datasets` can hash it."""

    column: str
    values: dict[int, Any]

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        return {self.column: self.values.get(index, row[self.column])}


def _overlong_message(where: str, excess: dict[int, int], total: int) -> str:
    worst = max(excess, key=lambda i: excess[i])
    return (
        f"{where}: {len(excess)} of {total} rows have a reference that is too long (row {worst} by {excess[worst]} "
        "tokens). Set `overlong_reference` to `drop` or `truncate`, raise `max_reference_length`, or lower "
        "`max_completion_length`."
    )
