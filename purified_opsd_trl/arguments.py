"""
One command line for all commands: dataclasses with help texts, filled from a YAML file (`--config`) and from options.

What cannot be used is an [`InputError`] of one line that names the key.
"""

import dataclasses
import difflib
import types
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from .errors import InputError


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
        self.keys = {*self.hints, *map(_name, other)}  # what a file may hold; options have more spellings
        self.options = self.keys | {_name(option) for action in self._actions for option in action.option_strings}

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
            raise InputError(f"`{word}` belongs to no option. Lists are separated by spaces and follow their option.")
        return parsed

    def parse_known(self, argv: Sequence[str]) -> tuple[tuple[Any, ...], list[str], list[str]]:
        """
        Parses a command line that may hold options in `other`.

        Args:
            argv (`Sequence[str]`):
                Arguments after the command.

        Returns:
            `tuple`: one instance of each dataclass; what is left over of the file, as `--key value`; and of `argv`.

        Raises:
            `InputError`: as in `parse`.
        """
        words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        for word in words:
            if word.startswith("--") and word != "--config" and " " not in word:
                self._check_name(_name(word), self.options)
        if words.count("--config") > 1 or words[-1:] == ["--config"]:
            raise InputError("`--config` takes one file, and is given once.")
        if "--config" in words:
            read_yaml(words[words.index("--config") + 1])  # TRL reads it again, without these checks
        try:
            *parsed, from_file, left = self.parse_args_and_config(
                words, return_remaining_strings=True, separate_remaining_strings=True
            )
        except InputError:
            raise
        except ValueError as error:  # of a config's own checks
            raise InputError(" ".join(str(error).split())) from error
        return tuple(parsed), from_file, left

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Takes the content of a YAML file, as in TRL, after checking names and types."""
        defaults = {action.dest: action for action in self._actions}
        for key, value in config.items():
            self._check_name(key, self.keys)
            if key not in defaults or (value is None and defaults[key].default is None):
                continue
            hint = self.hints[key]
            if isinstance(value, bool) and not _fits(value, hint) and _fits("", hint):
                config[key] = str(value).lower()  # `resume_from_checkpoint: true`
            elif isinstance(value, str) and not _fits(value, hint) and _fits([value], hint):
                config[key] = [value]  # `lora_target_modules: all-linear`, as on the command line
            elif not (isinstance(value, str) and _converted(hint)):  # argparse converts strings, and checks them
                check_type(key, value, hint)
        return super().set_defaults_with_config(**config)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise InputError(message)

    def _check_name(self, name: str, known: set[str]) -> None:
        """Refuses a name that is outdated or that nobody knows."""
        if name in self.renamed:
            raise InputError(f"`{name}` is now called `{self.renamed[name]}`.")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            raise InputError(f"There is no option `{name}`.{f' Did you mean `{near[0]}`?' if near else ''}")


def _name(option: str) -> str:
    """Name of the field in `--some-name=value`."""
    return option.split("=", 1)[0].removeprefix("--").replace("-", "_")


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
        _check_duplicates(yaml.compose(text, yaml.SafeLoader), path)
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


def check_types(instance: Any) -> None:
    """
    Checks the fields of a dataclass against their annotations; for `__post_init__`.

    Args:
        instance (`Any`):
            Instance of a dataclass.

    Raises:
        `InputError`: for the first field whose value is of another type.
    """
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        check_type(field.name, getattr(instance, field.name), hints[field.name])


def check_type(name: str, value: Any, hint: Any) -> None:
    """
    Checks one value against an annotation. An integer is a number; `True` is neither.

    Args:
        name (`str`):
            Name of the setting, for the message.
        value (`Any`):
            Its value, in the types of YAML.
        hint (`Any`):
            Annotation, with its strings resolved.

    Raises:
        `InputError`: if the value does not fit.
    """
    if not _fits(value, hint):
        got = "nothing" if value is None else repr(value)
        text = _fits("", hint) or any(isinstance(arg, str) for arg in get_args(hint))  # choices
        quotes = " Put it in quotes." if text and isinstance(value, int | float) else ""
        raise InputError(f"`{name}` must be {_described(hint)}, got {got}.{quotes}")


def _fits(value: Any, hint: Any) -> bool:
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if kind is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if kind in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, args[0]) for item in value if args)
    if not isinstance(kind, type) or kind is Any:
        return True  # type variables and the like
    if issubclass(kind, Enum) and value in [member.value for member in kind]:
        return True
    return isinstance(value, kind) or (dataclasses.is_dataclass(kind) and isinstance(value, dict))


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
    if kind is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if kind in (list, tuple):
        return f"a list of {_described(args[0])}" if args else "a list"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
