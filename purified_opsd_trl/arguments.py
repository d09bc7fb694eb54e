"""
One command line for all commands: dataclasses with help texts, filled from a YAML file (`--config`) and from options.

What cannot be used is an [`InputError`] of one line that names the key.
"""

import dataclasses
import difflib
import functools
import json
import math
import numbers
import os
import re
import types
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from .errors import InputError


@dataclasses.dataclass(frozen=True)
class Range:
    """
    Finite numbers that a field admits, as `Annotated[float, Range(0, 1)]`.

    Args:
        low (`float`):
            Smallest one.
        high (`float`, *optional*, defaults to `inf`):
            Largest one.
        above (`bool`, *optional*, defaults to `False`):
            Whether `low` itself is left out.
    """

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        lower = f"{'above' if self.above else 'at least'} {self.low:g}"
        return lower if self.high == math.inf else f"{lower} and at most {self.high:g}"


PositiveInt = Annotated[int, Range(1)]
PositiveFloat = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1, above=True)]


def option(help: str, **kwargs: Any) -> Any:
    """Field of a dataclass of arguments, with its help text; other arguments are those of `dataclasses.field`."""
    return dataclasses.field(metadata={"help": help}, **kwargs)


class CommandParser(TrlParser):
    """
    TRL's parser over dataclasses, strict about names and types. Options take precedence over the YAML file.

    Options are written in full, with underscores or hyphens; `--config file.yaml` and `--config=file.yaml` are alike.

    Args:
        dataclass_types (`Sequence[type]`):
            Dataclasses whose fields carry `metadata={"help": ...}`.
        prog (`str`, *optional*):
            Name of the command, for `--help`.
        description (`str`, *optional*):
            What the command does, for `--help`.
        renamed (`Mapping[str, str]`, *optional*):
            Names that fields once had, and the names that they have now. The old names are refused.
        other (`Collection[str]`, *optional*):
            Names that belong to somebody else, such as the options of `accelerate launch`. They are left over.
    """

    def __init__(
        self,
        dataclass_types: Sequence[Any],
        prog: str | None = None,
        description: str | None = None,
        renamed: Mapping[str, str] | None = None,
        other: Collection[str] = (),
    ):
        epilog = "--config FILE reads options from a YAML file; those on the command line take precedence."
        super().__init__(dataclass_types, prog=prog, description=description, epilog=epilog, allow_abbrev=False)
        self.hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
        self.renamed = renamed or {}
        self.other = frozenset(other)

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """
        Parses a command line of which nothing may be left over.

        Args:
            argv (`Sequence[str]`):
                Arguments after the command.

        Returns:
            `tuple`: one instance of each dataclass.

        Raises:
            `InputError`: for an unknown name, a value of a wrong type, or a file that cannot be read.
        """
        parsed, *left = self.parse_known(argv)
        for word in (word for words in left for word in words):
            self.error(f"`{word}` belongs to no option. Lists are separated by spaces and follow their option.")
        return parsed

    def parse_known(self, argv: Sequence[str]) -> tuple[tuple[Any, ...], list[str], list[str]]:
        """
        Parses a command line that may hold options in `other`.

        Args:
            argv (`Sequence[str]`):
                Arguments after the command.

        Returns:
            `tuple`: one instance of each dataclass; what is left over of the file, as `--key value`; and of `argv`,
            options of `other` with their values.

        Raises:
            `InputError`: as in `parse`.
        """
        words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if (count := words.count("--config")) > 1 or words[-1:] == ["--config"]:
            self.error("Name one file after `--config`." if count == 1 else "`--config` is given more than once.")
        if count:
            read_yaml(words[words.index("--config") + 1])  # TRL reads it again, without these checks
        for word in words:
            self._check_name(word.split("=", 1)[0], only_renamed=True)
        try:
            *parsed, from_file, left = self.parse_args_and_config(
                words, return_remaining_strings=True, separate_remaining_strings=True
            )
        except InputError:
            raise
        except ValueError as error:  # of a config's own checks
            raise InputError(" ".join(str(error).split())) from error
        for before, word in zip(["", *left], left, strict=False):
            self._check_name(word.split("=", 1)[0])
            if self.other and not word.startswith("--") and not before.startswith("--"):
                self.error(f"`{word}` belongs to no option.")
        return tuple(parsed), from_file, left

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Takes the content of a YAML file, as in TRL, after checking names and types."""
        defaults = {action.dest: action for action in self._actions}
        for key, value in config.items():
            self._check_name(f"--{key}")
            if key not in defaults or (value is None and defaults[key].default is None):
                continue
            hint = self.hints[key]
            if isinstance(value, bool) and key == "resume_from_checkpoint":
                config[key] = str(value).lower()
            elif isinstance(value, str) and "," not in value and not _fits(value, hint) and _fits([value], hint):
                config[key] = [value]  # one word, as on the command line: `lora_target_modules: all-linear`
            elif not (isinstance(value, str) and _converted(hint)):  # argparse converts strings, and checks them
                check_type(key, value, hint)
        return super().set_defaults_with_config(**config)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage, in the words of `check_type` where argparse could not convert."""
        refused = re.match(r"argument --(\w+)\S*: (?:invalid (?:.* )?(?:value|choice):|Truthy.*: got) '?(.*)", message)
        if refused and refused[1] in self.hints:
            value = re.sub(r"'?( but expected .*| \(choose from .*)?$", "", refused[2], count=1)
            message = f"`{refused[1]}` must be {_described(self.hints[refused[1]])}, got {value!r}."
        raise InputError(message)

    def _check_name(self, option: str, only_renamed: bool = False) -> None:
        """Refuses a name that is outdated or that nobody knows."""
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name in self.other:
            return
        if name in self.renamed:
            self.error(f"`{name}` is now called `{self.renamed[name]}`.")
        if not only_renamed and name not in self.hints:
            near = difflib.get_close_matches(name, [*self.hints, *self.other], n=1)
            raise InputError(f"There is no option `{name}`.{f' Did you mean `{near[0]}`?' if near else ''}")


def read_yaml(path: str) -> dict[str, Any]:
    """
    Reads a file of settings.

    Args:
        path (`str`):
            YAML file that holds a mapping.

    Returns:
        `dict[str, Any]`

    Raises:
        `InputError`: if it cannot be read, is no YAML, is no mapping with text as keys, or has a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.SafeLoader)
        _check_duplicates(root, path)
        config = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"`config`: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"`config`: {path} is not UTF-8: {error.reason} at byte {error.start}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"`config`: {where}, is not YAML: {reason}.") from None
    if not isinstance(config, dict) or not config or not all(isinstance(key, str) for key in config):
        raise InputError(f"`config`: {path} must hold `key: value` lines, with text as keys.")
    for key, value in root.value:
        if isinstance(value, yaml.ScalarNode) and not value.value and value.style is None:
            raise InputError(
                f"`config`: {path}, line {key.start_mark.line + 1}: `{key.value}` has no value. Write one, or remove "
                "the line for the default."
            )
    return config


def _check_duplicates(node: Any, path: str, seen: frozenset[int] = frozenset()) -> None:
    """Refuses a mapping with a key twice, of which YAML would silently take the last."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen |= {id(node)}  # an alias may point back at its own collection
    found: set[str] = set()
    for child in node.value:
        key, value = child if isinstance(child, tuple) else (None, child)
        if isinstance(key, yaml.ScalarNode):
            if key.value in found:
                raise InputError(f"`config`: {path}, line {key.start_mark.line + 1}: `{key.value}` is set twice.")
            found.add(key.value)
        _check_duplicates(value, path, seen)


def check_types(instance: Any, skip: Collection[str] = (), hints: Mapping[str, Any] | None = None) -> None:
    """
    Checks the fields of a dataclass against their annotations; for `__post_init__`.

    Args:
        instance (`Any`):
            Instance of a dataclass.
        skip (`Collection[str]`, *optional*):
            Fields that are not checked.
        hints (`Mapping[str, Any]`, *optional*):
            Annotations that take the place of a field's own.

    Raises:
        `InputError`: for the first field whose value is of another type.
    """
    all_hints = {**_hints(instance.__class__), **(hints or {})}
    for field in dataclasses.fields(instance):
        if field.name not in skip:
            check_type(field.name, getattr(instance, field.name), all_hints[field.name])


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def check_type(name: str, value: Any, hint: Any) -> None:
    """
    Checks one value against an annotation, with its [`Range`]. An integer is a number; `True` and NaN are neither.

    Args:
        name (`str`):
            Name of the setting, for the message.
        value (`Any`):
            Its value, in the types of YAML. A path is text.
        hint (`Any`):
            Annotation, with its strings resolved.

    Raises:
        `InputError`: if the value does not fit.
    """
    if not _fits(value, hint):
        got = "nothing" if value is None else repr(value)
        advice = ""
        text = _fits("", hint) or any(isinstance(choice, str) for choice in get_args(hint))
        if text and isinstance(value, int | float):
            advice = " Put it in quotes."
        elif isinstance(value, str) and _fits([value], hint):
            advice = f" Write it as a list: `[{value}]`."
        elif isinstance(value, str) and _is_number(value) and _fits(float(value), hint):
            advice = " Write it without quotes."
        raise InputError(f"`{name}` must be {_described(hint)}, got {got}.{advice}")


def as_mapping(name: str, value: Any) -> Any:
    """
    A mapping that was given as JSON; anything else as it is, for `check_types` to judge.

    Args:
        name (`str`):
            Name of the setting, for the message.
        value (`Any`):
            Its value.

    Returns:
        `Any`

    Raises:
        `InputError`: for text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise InputError(f"`{name}` must be a mapping, or one as JSON: {value!r} is not: {error}.") from None


def check_markers(markers: Collection[str]) -> None:
    """
    Checks the words to count.

    Args:
        markers (`Collection[str]`):
            Value of `epistemic_markers`.

    Raises:
        `InputError`: for an empty list or an empty word.
    """
    if not markers or not all(marker.strip() for marker in markers):
        raise InputError("`epistemic_markers` must list at least one word, and no empty ones.")


def _fits(value: Any, hint: Any) -> bool:
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if kind is Annotated:
        return _fits(value, args[0]) and all(value in bound for bound in args[1:] if isinstance(bound, Range))
    if kind is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool) and value == value
    if kind in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, args[0]) for item in value if args)
    if not isinstance(kind, type) or kind is Any:
        return True  # type variables and the like
    if issubclass(kind, Enum) and value in [member.value for member in kind]:
        return True
    if kind is str:
        return isinstance(value, str | os.PathLike)
    return isinstance(value, kind) or (dataclasses.is_dataclass(kind) and isinstance(value, dict))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _converted(hint: Any) -> bool:
    """Whether argparse makes something else of a string."""
    return any(_converted(arg) for arg in get_args(hint)) if _is_union(hint) else hint in (int, float, bool)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


_WORDS: dict[Any, str] = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    types.NoneType: "null",
}


def _described(hint: Any) -> str:
    kind, args = get_origin(hint) or hint, get_args(hint)
    if _is_union(hint):
        return " or ".join(dict.fromkeys(_described(arg) for arg in args))
    if kind is Annotated:
        return " ".join([_described(args[0]), *(str(bound) for bound in args[1:])])
    if kind is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if kind in (list, tuple):
        return f"a list of {_described(args[0])}" if args else "a list"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
