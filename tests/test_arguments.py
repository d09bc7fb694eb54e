"""The command line that all commands share: names, types, YAML files, and errors of one line."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from accelerate.commands.launch import launch_command_parser
from transformers import IntervalStrategy
from trl import DatasetMixtureConfig, ModelConfig

from purified_opsd_trl import InputError, PurifiedOPSDConfig
from purified_opsd_trl.arguments import CommandParser, check_types, read_yaml
from purified_opsd_trl.train import PurifiedOPSDScriptArguments


ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Settings:
    name: str | None = None
    rate: float = 0.5
    steps: int = 3
    words: list[str] = dataclasses.field(default_factory=lambda: ["a"])
    mode: Literal["on", "off"] = "on"
    extra: dict[str, Any] | str | None = None
    loud: bool = False
    strategy: IntervalStrategy | str = "no"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("`rate` must not\n be negative.")


def parser(**kwargs: Any) -> CommandParser:
    return CommandParser([Settings], prog="p", renamed={"speed": "rate"}, **kwargs)


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_the_command_line_takes_precedence_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "rate: 1e-4\nsteps: 7\nwords: [b, c]\nextra: {k: 1}\nname: null\nloud: true\n")
    expected = Settings(rate=1e-4, steps=9, words=["d", "e"], extra={"k": 1}, loud=True)
    for config in (["--config", path], [f"--config={path}"]):
        for words in ([*config, "--steps", "9", "--words", "d", "e"], ["--steps=9", "--words", "d", "e", *config]):
            assert parser().parse(words) == (expected,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 7\nrate: 1\nsteps: 8\n", "line 3: `steps` is set twice"),
        ("extra:\n  k: 1\n  k: 2\n", "line 3: `k` is set twice"),
        ("steps: [7\nrate: 1\n", "line 2, is not YAML"),
        ("steps: 7\n\trate: 1\n", "line 2, is not YAML"),
        ("", "must hold `key: value` lines"),
        ("# nothing\n", "must hold `key: value` lines"),
        ("- steps\n", "must hold `key: value` lines"),
        ("7: steps\n", "must hold `key: value` lines, with text as keys"),
        ("name: é\n".encode("latin-1"), "is not UTF-8"),
        ("stepz: 7\n", "There is no option `stepz`. Did you mean `steps`?"),
        ("speed: 7\n", "`speed` is now called `rate`"),
        ("steps: 7.5\n", "`steps` must be an integer, got 7.5"),
        ("steps: true\n", "`steps` must be an integer, got True"),
        ("steps:\n", "line 1: `steps` has no value"),
        ("steps: many\n", "`steps` must be an integer, got 'many'"),
        ("rate: [1]\n", r"`rate` must be a number, got \[1\]"),
        ("words: [1]\n", r"`words` must be a list of text, got \[1\]"),
        ("mode: on\n", "`mode` must be one of 'on', 'off', got True. Put it in quotes"),
        ("help: true\n", "There is no option `help`"),
        ("name: 1.10\n", "`name` must be text or null, got 1.1. Put it in quotes"),
        ("extra: [1]\n", r"`extra` must be a mapping or text or null, got \[1\]"),
        ("loud: 2\n", "`loud` must be true or false, got 2"),
        ("rate: -1\n", "`rate` must not be negative"),
        ("config: y.yaml\n", "There is no option `config`"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        parser().parse(["--config", write(tmp_path, text)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--stepz 7", "There is no option `stepz`. Did you mean `steps`?"),
        ("--step 7", "There is no option `step`"),  # no abbreviations: `--speed` could become one
        ("--speed=7", "`speed` is now called `rate`"),
        ("--steps 7 8", "`8` belongs to no option"),
        ("--steps many", "`steps` must be an integer, got 'many'"),
        ("--mode maybe", "`mode` must be one of 'on', 'off', got 'maybe'"),
        ("--words", "argument --words: expected at least one argument"),
        ("--config", "Name one file after `--config`"),
        ("--config a.yaml --config=b.yaml", "`--config` is given more than once"),
        ("--config=nowhere.yaml", "nowhere.yaml cannot be read: No such file or directory"),
        ("--config=.", "cannot be read: Is a directory"),
        ("--rate=-1", "`rate` must not be negative"),
    ],
)
def test_a_command_line_that_cannot_be_used_is_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        parser().parse(words.split())
    assert "\n" not in str(error.value)


def test_the_file_means_what_the_command_line_means(tmp_path: Path) -> None:
    # `epistemic_markers: wait` is a list of one word
    config = ["--config", write(tmp_path, "name: x\nwords: wait\n")]
    assert parser().parse(config) == parser().parse(["--name", "x", "--words", "wait"])
    assert parser().parse(config)[0].words == ["wait"]


def test_an_alias_of_itself_ends(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`steps` is set twice"):
        read_yaml(write(tmp_path, "extra: &a [*a]\nsteps: 1\nsteps: 2\n"))


def test_options_of_others_are_left_over(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 7\nnum_machines: 2\n")
    parsed = parser(other=["num_processes", "num_machines"]).parse_known(["--config", path, "--num-processes", "4"])
    assert parsed == ((Settings(steps=7),), ["--num_machines", "2"], ["--num-processes", "4"])


def test_a_field_of_another_type_is_named() -> None:
    check_types(Settings(rate=1, words=["a", "b"], strategy=IntervalStrategy.NO))
    for name, value in {"steps": 1.0, "words": "a", "mode": "up", "loud": 1, "name": 3}.items():
        with pytest.raises(InputError, match=f"`{name}` must be "):
            check_types(dataclasses.replace(Settings(), **{name: value}))


def test_help_names_every_field_and_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(Settings)) and "--config FILE" in shown


RECIPES = sorted(ROOT.glob("recipes/**/config*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_fits_the_types_of_trl(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(PurifiedOPSDConfig, "__post_init__", lambda self: None)  # bf16 asks for a GPU
    launch = [option for action in launch_command_parser()._actions for option in action.option_strings]
    types = [PurifiedOPSDScriptArguments, PurifiedOPSDConfig, ModelConfig, DatasetMixtureConfig]
    other = [*(option.removeprefix("--") for option in launch), "accelerate_config"]
    parsed, *_ = CommandParser(types, other=other).parse_known(["--config", str(path)])
    written = read_yaml(str(path))
    assert parsed[2].model_name_or_path == written.get("model_name_or_path")
    assert parsed[1].learning_rate == pytest.approx(float(written.get("learning_rate", parsed[1].learning_rate)))
