"""The workflows, the hooks and the issue forms are valid, and run what a contributor can run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from purified_opsd_trl import cli

from .conftest import THREADS
from .test_release import MATRIX


ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# What a job may do beyond reading the repository
PERMISSIONS = {
    ("release.yml", "publish"): {"id-token": "write"},
    ("docs.yml", "deploy"): {"pages": "write", "id-token": "write"},
}
by_name = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def values(job: dict[str, Any], key: str) -> list[str]:
    """Values that a key of the job's matrix takes."""
    matrix = job["strategy"]["matrix"]
    return [*matrix.get(key, []), *(row[key] for row in matrix.get("include", []) if key in row)]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("dependabot", [ROOT / ".github/dependabot.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=["workflows", "issue forms", "dependabot", "citation"],
)
def test_schemas(schema: str, files: list[Path]) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def test_actionlint() -> None:
    """What a schema does not see: expressions, contexts, inputs of actions, shell code."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (binary := shutil.which("actionlint", path=places)) is None:
        pytest.skip("no actionlint; `make lint-workflows` installs it")
    done = subprocess.run([binary, *map(str, WORKFLOWS)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@by_name
def test_steps_run_what_a_contributor_can_run(path: Path) -> None:
    targets = re.search(r"^\.PHONY: (.+)$", MAKEFILE, flags=re.MULTILINE)[1].split()  # type: ignore[index]
    for job in load(path)["jobs"].values():
        for step in job["steps"]:
            if "run" not in step:
                continue
            program, *arguments = step["run"].split()
            if program != "make":
                assert program.startswith(".ci/") and os.access(ROOT / program, os.X_OK), step
                continue
            made = values(job, "target") if "matrix.target" in step["run"] else arguments
            assert made and set(made) <= set(targets), step


@by_name
def test_actions_are_pinned_and_jobs_may_do_little(path: Path) -> None:
    uses = re.findall(r"uses: (.+)", path.read_text(encoding="utf-8"))
    assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in uses), uses
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job.get("permissions", {}) == PERMISSIONS.get((path.name, name), {}), name
        assert job["timeout-minutes"] <= 90, name
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False, name


def test_nightly_runs_rows_of_the_matrix() -> None:
    job = load(ROOT / ".github/workflows/nightly.yml")["jobs"]["matrix"]
    rows = {row for words in values(job, "rows") for row in words.split()}
    newest = {name for name, row in MATRIX["ROWS"].items() if set(row[1:]) == {MATRIX["NEWEST"]}}
    assert rows == newest | set(MATRIX["AHEAD"])
    assert job["continue-on-error"] == "${{ matrix.may-fail }}"
    for entry in job["strategy"]["matrix"]["include"]:
        assert entry["may-fail"] == (entry["rows"] in MATRIX["AHEAD"])


def test_a_missing_interpreter_fails_the_matrix(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / ".ci/matrix"), "newest-3.13", "--output", str(tmp_path)]
    env = {**os.environ, "PYTHON313": str(tmp_path / "python3.13")}
    for flags, status in (([], 1), (["--allow-missing"], 0)):
        done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True)
        assert done.returncode == status and "| not run: no Python 3.13 (set PYTHON313) |" in done.stdout
        assert "not run" in (tmp_path / "table.md").read_text()


def test_hooks_are_those_of_make_lint() -> None:
    recipe = re.search(r"^lint: .+\n((?:\t.+\n)+)", MAKEFILE, flags=re.MULTILINE)[1]  # type: ignore[index]
    linted = [line.strip().removeprefix("$(BIN)/").removesuffix(" .") for line in recipe.splitlines()]
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in repository["hooks"]]
    assert hooks == linted and repository["repo"] == "local"


def test_issue_forms_ask_for_what_the_command_prints() -> None:
    assert [path.stem for path in FORMS] == ["bug", "feature", "negative_result"]
    assert "env" in cli._COMMANDS
    for path in FORMS:
        fields = {field["id"]: field for field in load(path)["body"] if field["type"] != "markdown"}
        if path.stem != "feature":
            assert "`purified-opsd env`" in fields["environment"]["attributes"]["label"]
            assert fields["environment"]["validations"]["required"] is True


def test_numerics_choose_the_threads() -> None:
    assert torch.get_num_threads() == THREADS == int(os.environ.get("TEST_THREADS", "1"))
