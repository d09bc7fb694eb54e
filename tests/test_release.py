"""What a release states about itself agrees with itself."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement


ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"] == PROJECT["name"] and citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper) and "2607.02234" in paper["url"]
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])


def test_the_matrix_covers_the_ends_of_the_ranges() -> None:
    ranges = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    (line,) = re.findall(r"^pairs=\((.*)\)$", (ROOT / ".ci/matrix").read_text(), flags=re.MULTILINE)
    pairs = [dict(zip(("trl", "transformers"), pair.split(), strict=True)) for pair in re.findall(r'"(.*?)"', line)]
    assert len(pairs) >= 2
    for name in ("trl", "transformers"):
        versions = [pair[name] for pair in pairs]
        assert all(version in ranges[name] for version in versions)
        lowest = next(s.version for s in ranges[name] if s.operator == ">=")
        assert min(versions, key=lambda v: tuple(map(int, v.split(".")))).startswith(lowest)
