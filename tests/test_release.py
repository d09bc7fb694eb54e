"""What a release states about itself agrees with itself, and with what is tested."""

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version


ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
MATRIX = runpy.run_path(str(ROOT / ".ci/matrix"))
PYTHONS = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]


def lowest(specifiers: SpecifierSet) -> str:
    return next(s.version for s in specifiers if s.operator == ">=")


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["title"] == PROJECT["name"] and citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] and "2607.02234" in citation["preferred-citation"]["url"]


def test_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", text, flags=re.MULTILINE)
    assert len(versions) == text.count("\n## ") and versions[0][0] == PROJECT["version"]
    assert all(date != "Unreleased" for _, date in versions[1:])
    kinds = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    assert kinds and kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_matrix_covers_the_ends_of_the_ranges() -> None:
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["peft"]]
    ranges = {r.name: r.specifier for r in map(Requirement, requirements) if r.specifier}
    assert set(ranges) == set(MATRIX["PACKAGES"])
    for column, name in enumerate(MATRIX["PACKAGES"], start=1):
        versions = {row[column] for row in MATRIX["ROWS"].values()}
        assert MATRIX["NEWEST"] in versions, f"no row has the newest {name}"
        fixed = versions - {MATRIX["NEWEST"]}
        assert all(version in ranges[name] for version in fixed)
        assert min(map(Version, fixed)) == Version(lowest(ranges[name])), f"no row has the oldest {name}"


def test_the_versions_of_python_are_those_of_the_matrix() -> None:
    assert {row[0] for row in MATRIX["ROWS"].values()} == set(PYTHONS)
    assert min(PYTHONS, key=Version) == lowest(SpecifierSet(PROJECT["requires-python"]))
    ci: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert ci["jobs"]["make"]["strategy"]["matrix"]["python"] == PYTHONS


def test_the_source_distribution_holds_what_the_tests_read() -> None:
    sdist = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]
    included = {*sdist["only-include"], "pyproject.toml", "README.md", "LICENSE"}  # hatchling adds the last three
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    named = {name for text in texts for name in re.findall(r'\b(?:ROOT|REPO) / "([^"/]+)', text)}
    assert {"docs", ".github", "Makefile"} <= named  # the pattern finds what it is meant to find
    assert named <= included


def test_one_owner() -> None:
    """The account that publishes is a placeholder until there is one: it stands in pyproject.toml alone."""
    urls = PROJECT["urls"]
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= set(urls)
    owner, name = urls["Repository"].removeprefix("https://github.com/").split("/")
    assert name == PROJECT["name"]
    assert urls["Documentation"] == f"https://{owner}.github.io/{name}"
    assert urls["Issues"] == f"{urls['Repository']}/issues"
    assert urls["Changelog"] == f"{urls['Repository']}/blob/main/CHANGELOG.md"
    pattern = re.compile(rf"github\.com/[\w.-]+/{name}|[\w.-]+\.github\.io/{name}")
    folders = [ROOT / folder for folder in ("purified_opsd_trl", "recipes", "docs", ".github", ".ci")]
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *(path for folder in folders for path in folder.rglob("*"))]
    texts = (path for path in files if path.suffix in (".md", ".py", ".toml", ".yml", ".yaml", ".cff", ".txt", ""))
    repeated = [path for path in texts if path.is_file() and pattern.search(path.read_text(encoding="utf-8"))]
    assert not repeated, f"name the owner in pyproject.toml only, not in {repeated}"
