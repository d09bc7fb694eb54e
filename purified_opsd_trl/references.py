"""
Which reference teacher and probe see: the row's own, none, or another row's; and wrong ones for `target: contrastive`.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from datasets import IterableDataset

from .contexts import Contexts, build_contexts
from .dataset import AnyDataset
from .errors import InputError


OTHER_REFERENCE = "other_reference"  # column that is added


class ReferenceSettings(Protocol):
    """What decides which reference a context holds; [`PurifiedOPSDConfig`] has it all."""

    @property
    def target(self) -> str: ...
    @property
    def reference_source(self) -> str: ...
    @property
    def reference_column(self) -> str: ...
    @property
    def wrong_reference_column(self) -> str | None: ...
    @property
    def teacher_prompt_template(self) -> str: ...
    @property
    def reference_prompt_template(self) -> str: ...
    @property
    def seed(self) -> int: ...


def seen_column(args: ReferenceSettings) -> str:
    """Column of the reference that teacher and probe see."""
    return OTHER_REFERENCE if args.reference_source == "other" else args.reference_column


def configured_contexts(row: Mapping[str, Any], args: ReferenceSettings) -> Contexts:
    """
    Builds the prompts of a row as the settings say.

    Args:
        row (`Mapping[str, Any]`):
            Row of a dataset that went through [`with_other_references`].
        args ([`~references.ReferenceSettings`]):
            Configuration.

    Returns:
        [`Contexts`]

    Raises:
        `InputError`: if the row cannot be used.
    """
    wrong = (args.wrong_reference_column or OTHER_REFERENCE) if args.target == "contrastive" else None
    return build_contexts(
        row,
        reference_column=seen_column(args),
        wrong_reference_column=wrong,
        without_reference=args.reference_source == "none",
        teacher_prompt_template=args.teacher_prompt_template,
        reference_prompt_template=args.reference_prompt_template,
    )


def other_rows(keys: Sequence[str], seed: int) -> list[int]:
    """
    Assigns another row to every row: the next one in a random order whose key differs.

    Args:
        keys (`Sequence[str]`):
            What must differ, by row.
        seed (`int`):
            Seed of the order.

    Returns:
        `list[int]`: row by row; a permutation where all keys differ.

    Raises:
        `InputError`: if there are no two different keys.
    """
    count = len(keys)
    if len(set(keys)) < 2:
        raise InputError("references of other rows are needed, but all rows have the same reference.")
    order = random.Random(seed).sample(range(count), count)
    others = [0] * count
    for place, row in enumerate(order):
        following = (order[(place + step) % count] for step in range(1, count))
        others[row] = next(other for other in following if keys[other] != keys[row])
    return others


def with_other_references(dataset: Any, args: ReferenceSettings, name: str) -> Any:
    """
    Adds the column `other_reference` where the settings need it.

    Args:
        dataset ([`~datasets.Dataset`] or `Mapping` of them, *optional*):
            Data whose columns have been checked.
        args ([`~references.ReferenceSettings`]):
            Configuration.
        name (`str`):
            How errors name the dataset.

    Returns:
        The dataset, or the mapping of datasets.

    Raises:
        `InputError`: for a stream, or a column of that name.
    """
    wrong = args.target == "contrastive" and args.wrong_reference_column is None
    if dataset is None or not (wrong or args.reference_source == "other"):
        return dataset
    if isinstance(dataset, Mapping):
        return {key: with_other_references(data, args, f"{name}[{key!r}]") for key, data in dataset.items()}
    return _with_column(dataset, args, name)


def _with_column(dataset: AnyDataset, args: ReferenceSettings, name: str) -> AnyDataset:
    if isinstance(dataset, IterableDataset):
        raise InputError(
            f"{name}: the references of other rows cannot be drawn from a stream. Load the dataset without "
            "`streaming`, or for `target: contrastive` name a `wrong_reference_column`."
        )
    if OTHER_REFERENCE in dataset.column_names:
        raise InputError(f"{name}: the column `{OTHER_REFERENCE}` would be overwritten. Rename it.")
    references = dataset[args.reference_column][:]
    try:
        others = other_rows([json.dumps(reference) for reference in references], args.seed)
    except InputError as error:
        raise InputError(f"{name}, column `{args.reference_column}`: {error}") from None
    return dataset.add_column(OTHER_REFERENCE, [references[row] for row in others])
