"""Every family of causal language models: exact, row by row or refused, and docs/models.md says which."""

import re
from pathlib import Path

import pytest

from tests.architectures import FAMILIES, QUICK, outcome, time_limit, toy_model, verdict


TABLE = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
LISTED = {
    family: heading.lower()
    for heading, families in re.findall(r"^\| (Exact|Row by row|Refused) \| (.*?) \|", TABLE, re.MULTILINE)
    for family in re.findall(r"`([^`]+)`", families)
}


@pytest.mark.parametrize("family", QUICK)
def test_what_becomes_of_a_family(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip(f"this transformers has no {family}")
    assert verdict(toy_model(family))[0] == QUICK[family] == LISTED[family]


# One family per mechanism: no base model, absolute positions, recurrence, a transformed head, non-causal attention
@pytest.mark.parametrize("family", ["llama4_text", "bart", "recurrent_gemma", "modernbert-decoder", "doge"])
def test_two_steps_of_a_family(family: str, tmp_path: Path) -> None:
    result = outcome(family, str(tmp_path))
    assert result.verdict == QUICK[family], result
    assert result.error < 1e-3  # nats; fp32 over logits of size 10


@pytest.mark.architectures
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    try:
        with time_limit(240):
            result = outcome(family, str(tmp_path))
    except TimeoutError as error:
        pytest.skip(str(error))
    if result.verdict in ("not built", "fails"):
        pytest.skip(f"{result.verdict}: {result.reason}")
    assert result.verdict == LISTED.get(family, result.verdict), result  # not in the table: not run when it was made
    assert result.error < 1e-3
