"""The pages say what the code does: their code runs, their commands parse, and their messages exist."""

import argparse
import ast
import dataclasses
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from trl import DatasetMixtureConfig, ModelConfig
from trl.experimental.sdft import SDFTConfig
from trl.trainer.base_config import _BaseConfig

from purified_opsd_trl import PurifiedOPSDConfig, diagnose, evaluate
from purified_opsd_trl.bench import measure
from purified_opsd_trl.loading import PurifiedOPSDScriptArguments
from purified_opsd_trl.train import make_parser

from .conftest import read_rows


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of the page's code blocks in a language."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start()].count("\n") + 2, match.group(1))
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def _pages_with(language: str) -> Any:
    pages = [page for page in PAGES if _blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


# Python runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every config asks for one short step on the CPU, whatever the page says."""
    as_written = PurifiedOPSDConfig.__post_init__

    def smaller(self: PurifiedOPSDConfig) -> None:
        self.max_steps, self.max_completion_length, self.per_device_train_batch_size = 1, 8, 2
        self.use_cpu, self.bf16, self.gradient_checkpointing, self.dataloader_pin_memory = True, False, False, False
        self.report_to, self.save_strategy, self.disable_tqdm = "none", "no", True
        as_written(self)

    monkeypatch.setattr(PurifiedOPSDConfig, "__post_init__", smaller)


@pytest.fixture
def small_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model_dir: Callable[..., Path], small_settings: None
) -> None:
    """
    A folder in which the pages' code runs as it stands.

    A hub id is a relative path too, here of a tiny model; the pages speak of two files of data.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen3-0.6B").symlink_to(make_model_dir())
    rows = 2 * read_rows("standard")  # the default generation batch is 16 rows
    files = {
        "problems": [{"problem": row["prompt"], "solution": row["reference"]} for row in rows],
        "messages": [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "reference": row["reference"]} for row in rows
        ],
    }
    for name, written in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)), encoding="utf-8")


@_pages_with("python")
def test_python_runs(page: Path, small_world: None) -> None:
    namespace: dict[str, Any] = {"__name__": page.stem}
    for line, code in _blocks(page, "python"):
        # The line numbers of a traceback are those of the page
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


# Commands and settings exist -----------------------------------------------------------------------------------------


def _commands() -> list[Any]:
    """The commands on the pages, without variables, comments, continuation lines and what they write to files."""
    commands = []
    for page in PAGES:
        for line, block in _blocks(page, "bash"):
            block = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.MULTILINE | re.DOTALL)
            for command in block.replace("\\\n", " ").splitlines():
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    commands.append(pytest.param(page, words, id=f"{page.stem}:{line}:{'-'.join(words[:3])}"))
    return commands


def _files() -> Iterator[tuple[str, str]]:
    """Path and text of the settings that the pages say to write to a file (`# path` in the first line)."""
    for page in PAGES:
        for _, block in _blocks(page, "yaml"):
            if written := re.match(r"# (\S+\.yaml)\n", block):
                yield written.group(1), block


def _train(words: list[str]) -> None:
    make_parser().parse_known(words)


def _purified_opsd(words: list[str]) -> None:
    command, *rest = words
    if command in ("train", "check"):
        _train(rest)
    elif command == "bench":
        module = importlib.import_module(f"purified_opsd_trl.bench.{rest[0]}")
        measure.parse(getattr(module, f"{rest[0].title()}Arguments"), rest[1:])
    elif command == "evaluate":
        evaluate.make_parser().parse(rest)
    elif command == "diagnose":
        diagnose.make_parser().parse(rest)
    else:
        assert command == "env" and not rest


def _accelerate(words: list[str]) -> None:
    launch, script = words[1 : words.index("-m")], words[words.index("-m") + 1 :]
    options = launch_command_parser().parse_args([*launch, "-m", script[0]])
    assert options.config_file is None or (ROOT / options.config_file).is_file()
    assert script[0] == "purified_opsd_trl.train"
    _train(script[1:])


def _pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"(?:purified-opsd-trl|\.)\[(.*?)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize(("page", "words"), _commands())
def test_commands_parse(
    page: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_settings: None
) -> None:
    # The repository's folders, and the settings that a page says to write to a file (`# path` in the first line)
    monkeypatch.chdir(tmp_path)
    for folder in ("recipes", "tests", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for path, block in _files():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(block, encoding="utf-8")
    monkeypatch.setattr(argparse.ArgumentParser, "error", lambda self, message: pytest.fail(message))
    known = {"purified-opsd": _purified_opsd, "accelerate": _accelerate, "pip": _pip, "make": _make}
    if words[0] in known:
        known[words[0]](words[1:])
    for path in (word for word in words if re.match(r"(recipes|docs|tests|purified_opsd_trl)/", word)):
        assert (ROOT / path).exists(), f"{path} does not exist"


@_pages_with("yaml")
def test_settings_exist(page: Path, small_settings: None) -> None:
    configs = (PurifiedOPSDScriptArguments, PurifiedOPSDConfig, ModelConfig, DatasetMixtureConfig)
    known = {field.name for config in configs for field in dataclasses.fields(config)} | {"accelerate_config"}
    known |= {action.dest for action in launch_command_parser()._actions}
    # Files of other commands are parsed with their commands
    others = re.findall(r"purified-opsd (?:diagnose|evaluate|bench) --config (\S+)", page.read_text(encoding="utf-8"))
    for line, block in _blocks(page, "yaml"):
        if any(block.startswith(f"# {path}\n") for path in others):
            continue
        settings = yaml.safe_load(block)
        assert set(settings) <= known, f"{page.name}, line {line}: no such settings: {set(settings) - known}"
        ours = {field.name for field in dataclasses.fields(PurifiedOPSDConfig)} & set(settings)
        PurifiedOPSDConfig(**{"output_dir": "unused", **{name: settings[name] for name in ours}})


def _keys(cell: str) -> set[str]:
    """Settings named in a table cell: `key`, `key: value`, but no `{placeholder}` and no value."""
    spans = re.findall(r"`([^`]+)`", cell)
    return {span.split(":")[0] for span in spans if re.fullmatch(r"[a-z][a-z_0-9*]+(: \S+)?", span)}


def test_migrating_from_sdft_names_every_key() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    section = page.split("| `SDFTConfig` | here | |")[1].split("## From the official OPSD code")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][1:]
    theirs = {field.name for field in dataclasses.fields(SDFTConfig)}
    own = theirs - {field.name for field in dataclasses.fields(_BaseConfig)}
    ours = {field.name for field in dataclasses.fields(PurifiedOPSDConfig)}
    named: set[str] = set()
    for left, right, *_ in rows:
        keys = set() if "column" in left else _keys(left)
        keys |= {name for name in own for key in keys if key.endswith("*") and name.startswith(key[:-1])}
        keys = {key for key in keys if not key.endswith("*")}
        assert keys <= theirs, f"SDFTConfig has no {keys - theirs}"
        counterparts = keys if "the same" in right else _keys(right) - {"reference"}
        assert counterparts <= ours, f"PurifiedOPSDConfig has no {counterparts - ours}"
        named |= keys
    assert own <= named, f"docs/migrating.md does not say what becomes of {own - named}"


def test_migrating_from_sdft_starts_from_settings_of_sdft() -> None:
    ((_, before),) = _blocks(ROOT / "docs" / "migrating.md", "py")  # not run: a complete run of another trainer
    calls = [node for node in ast.walk(ast.parse(before)) if isinstance(node, ast.Call)]
    (config,) = (call for call in calls if ast.unparse(call.func) == "SDFTConfig")
    names = {keyword.arg for keyword in config.keywords}
    assert names and names <= {field.name for field in dataclasses.fields(SDFTConfig)}


def test_the_file_tree_has_a_line_for_every_module() -> None:
    (tree,) = (text for _, text in _blocks(ROOT / "CONTRIBUTING.md", "text") if text.startswith("purified_opsd_trl/"))
    package = tree.split("recipes/\n")[0]
    lines = re.findall(r"^  ([\w.]+/?) {2,}\S", package, re.MULTILINE)
    modules = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "purified_opsd_trl").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    } - {"__init__.py"}
    for name in sorted(modules - set(lines)):
        pytest.fail(f"CONTRIBUTING.md: the file tree has no line for purified_opsd_trl/{name}")
    assert len(lines) == len(set(lines)) and set(lines) == modules, f"there is no {set(lines) - modules}"


# Messages on the troubleshooting page exist -------------------------------------------------------------------------


def _template(node: ast.expr) -> str:
    """A message as the reader sees it: without backticks, `…` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_template, node.values))
    return node.value.replace("`", "") if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def _messages() -> Iterator[str]:
    """Every string of the package that may be a part of a message."""
    for path in sorted((ROOT / "purified_opsd_trl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                yield re.sub(r"%[sd]", "…", _template(node))


def test_no_entry_of_the_troubleshooting_page_is_stale() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    rows = [row for row in rows if "(transformers)" not in row and "accelerate launch" not in row]
    entries = [entry for row in rows for entry in re.findall(r"`([^`]+)`", row)]
    messages = list(_messages())
    assert len(entries) > 10
    stale = [entry for entry in entries if not any(entry in text for text in messages)]
    assert not stale, f"docs/troubleshooting.md has entries that no message matches: {stale}"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_links_and_pictures_are_there_and_stay_inside_the_site(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            file = (page.parent / target).resolve()
            assert file.is_file() and file.is_relative_to(ROOT / "docs"), target
