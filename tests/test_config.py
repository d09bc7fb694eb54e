"""Every field of the config against every kind of wrong value: in Python, in YAML and on the command line."""

import dataclasses
import logging
import math
import random
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import yaml

from purified_opsd_trl import InputError, PurifiedOPSDConfig, config_checks
from purified_opsd_trl.arguments import CommandParser


HINTS = get_type_hints(PurifiedOPSDConfig)  # without bounds: what is out of range is said here once more
OWN = [
    field.name
    for field in dataclasses.fields(PurifiedOPSDConfig)
    if field.name in vars(PurifiedOPSDConfig)["__annotations__"]
]
WRONG: dict[Any, list[Any]] = {
    bool: ["maybe", 2, 0.5, [True], {}],
    int: ["x", 1.5, True, [1], -1, math.nan, math.inf],
    float: ["x", True, [1.0], -1.0, math.nan, math.inf],
    str: [5, 0.5, True, ["text"], {}],
    Literal: ["nonsense", "", 5, True, ["base"]],
    list: ["wait", [1], [None], [""], [], {"wait": 1}, 5, True],
    dict: [5, "x", "{", "[1]", ["a"], True],
}
OUT_OF_RANGE: dict[str, list[Any]] = {
    **dict.fromkeys(["beta", "teacher_update_rate"], [1.5]),
    **dict.fromkeys(["pmi_beta", "kl_clip", "teacher_update_rate", "epistemic_band"], [0, 0.0]),
    **dict.fromkeys(
        ["max_completion_length", "max_reference_length", "scoring_batch_size", "scoring_token_budget"], [0]
    ),
    **dict.fromkeys(["loss_chunk_size", "loss_memory_budget", "teacher_sync_steps", "epistemic_window"], [0]),
    "decomposition_max_tokens": [0],
    "teacher_prompt_template": ["{question}", "{reference}", ""],
    "reference_prompt_template": ["{question} {reference}", ""],
    "reference_column": ["", " "],
    "per_device_train_batch_size": [0, -1, 1.5, "x", None],  # inherited ones
    "temperature": [0, -1.0, math.nan, "x", None],
    "top_p": [0, 1.5],
    "top_k": [-1],
    "max_steps": ["x", 1.5, None, True],
    "seed": ["x", None],
    "chat_template_kwargs": [5, "{"],
    "use_vllm": ["maybe", None],
}


def kinds(name: str) -> list[Any]:
    hint = HINTS[name]
    members = get_args(hint) if NoneType in get_args(hint) else (hint,)
    return [get_origin(member) or member for member in members]


def cases() -> list[tuple[str, Any]]:
    """Field and wrong value; a field that admits a mapping or its JSON is tested as a mapping."""
    found = []
    for name in OWN:
        kind = next((kind for kind in kinds(name) if kind is dict), kinds(name)[0])
        nothing = [] if NoneType in kinds(name) else [None]
        found += [(name, value) for value in [*WRONG[kind], *nothing]]
    found.remove(("contrastive_floor", -1.0))  # the one field that is negative
    found.remove(("padding_free", True))  # YAML's `true`
    return found + [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]


CASES = cases()


def selection(*cases: tuple[str, Any]) -> list[Any]:
    """A random choice of 40; the others only in the long run."""
    chosen = set(random.Random(0).sample(range(len(cases)), 40))
    marks = {True: [], False: [pytest.mark.every_variant]}
    return [pytest.param(*case, id=label(case), marks=marks[i in chosen]) for i, case in enumerate(cases)]


def label(case: tuple[str, Any]) -> str:
    return f"{case[0]}={case[1]!r}"


def refuses(parse: Any, name: str) -> None:
    with pytest.raises(InputError) as refused:
        parse()
    assert f"`{name}`" in str(refused.value) and "\n" not in str(refused.value)


def test_the_cases_cover_every_field() -> None:
    assert {"pmi_beta", "epistemic_markers", "log_style", "beta"} <= set(OWN) <= {name for name, _ in CASES}
    assert len(CASES) >= 200


@pytest.mark.parametrize(("name", "value"), CASES, ids=map(label, CASES))
def test_python(name: str, value: Any, tmp_path: Path) -> None:
    refuses(lambda: PurifiedOPSDConfig(**{"output_dir": str(tmp_path), name: value}), name)


@pytest.mark.parametrize(("name", "value"), selection(*(case for case in CASES if case[1] != "wait")))
def test_yaml(name: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path), name: value}))
    refuses(lambda: CommandParser([PurifiedOPSDConfig]).parse(["--config", str(file)]), name)


def on_command_line(case: tuple[str, Any]) -> bool:
    """Whether the value is as wrong there, where all is text, and a list of one word is that word."""
    name, value = case
    first = kinds(name)[0]
    if first is list:
        return value in ([], [""])
    as_text = first in (str, dict) and not isinstance(value, str)
    return not as_text and not isinstance(value, list | dict) and not (first is bool and value is True)


@pytest.mark.parametrize(("name", "value"), selection(*filter(on_command_line, CASES)))
def test_command_line(name: str, value: Any) -> None:
    words = value if isinstance(value, list) else [str(value)]
    with pytest.raises(InputError, match=name) as refused:
        CommandParser([PurifiedOPSDConfig]).parse([f"--{name}", *words])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("pmi_clip", 0, None),
        ("pmi_clip", None, None),
        ("pmi_clip", 5, 5),
        ("pmi_beta", np.float64(2), 2.0),
        ("loss_chunk_size", np.int64(8), 8),
        ("teacher_chat_template_kwargs", '{"enable_thinking": false}', {"enable_thinking": False}),
        ("epistemic_markers", ["wait"], ["wait"]),
        ("output_dir", Path("somewhere"), "somewhere"),
        ("decomposition_steps", 0, 0),
        ("teacher_update_rate", 1, 1),
    ],
)
def test_what_is_accepted(name: str, value: Any, kept: Any) -> None:
    assert getattr(PurifiedOPSDConfig(**{"output_dir": "run", name: value}), name) == kept


def test_a_config_can_be_built_from_another(arguments: dict[str, Any]) -> None:
    first = PurifiedOPSDConfig(**arguments)
    assert dataclasses.replace(first, pmi_beta=2.0).to_dict() == {**first.to_dict(), "pmi_beta": 2.0}


def test_use_cpu_is_inferred(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        args = PurifiedOPSDConfig("run")
    assert args.use_cpu and args.bf16 and args.device.type == "cpu"
    assert caplog.messages == ["There is no accelerator: training runs on the CPU (`use_cpu: true`)."]
    caplog.clear()
    assert PurifiedOPSDConfig("run", use_cpu=True).use_cpu and not caplog.messages


def test_a_device_without_bf16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(config_checks, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(
        InputError, match="`bf16` is the default, but this device does not support it. Set `bf16: false`"
    ):
        PurifiedOPSDConfig("run")
    assert not PurifiedOPSDConfig("run", bf16=False).use_cpu
