"""The signal of each target under own, other and no reference, against fp64 logits and the oracle's targets."""

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from purified_opsd_trl import InputError, cli
from purified_opsd_trl.diagnose.arguments import parse
from purified_opsd_trl.diagnose.controls import SIGNAL, sentences
from purified_opsd_trl.evaluate.backends import Completion, TransformersBackend
from recipes.diagnosis import figure
from recipes.diagnosis import run as recipe
from tests import reference
from tests.conftest import read_rows
from tests.test_diagnose import save_adapter


INSTRUCTION = "Use the worked solution to understand the problem, then solve the problem yourself, step by step."
OPTIONS = {
    "purified": "--pmi_beta 0.7 --pmi_clip 2 --pmi_center false",
    "teacher": "",
    "gated": "--pmi_beta 0.7 --pmi_clip 2",
    "interpolated": "--interpolation_weight 0.3",
    "contrastive": "--contrastive_alpha 0.7 --contrastive_floor -6 --contrastive_tau 0.01",
}
COMPLETION = "Wait, 2 + 3 = 5."  # bytes are ids


@pytest.fixture(autouse=True)
def _fixed_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(self: Any, requests: Any, sampling: Any) -> Any:
        for request in requests:
            yield Completion(request.key, list(COMPLETION.encode()), False)

    monkeypatch.setattr(TransformersBackend, "generate", generate)


def run(model_dir: Path, folder: Path, data: str, flags: str = "") -> dict[str, Any]:
    command = (
        f"diagnose --model_name_or_path {model_dir} --dataset_name {data} --dtype float32 --temperature 0.8 "
        f"--output_dir {folder} {flags}"
    )
    assert cli.main(command.split()) == 0
    return json.loads((folder / "diagnosis.json").read_text())


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [
    {"prompt": [{"role": "user", "content": f"What is {i} + 3?"}], "reference": f"{i} + 3 = {i + 3}."}
    for i in range(4)
]


def prompts(row: dict[str, Any], shown: str) -> dict[str, list[dict[str, str]]]:
    solution = f"Worked solution of this problem:\n{shown}\n\n{INSTRUCTION}"
    question = row["prompt"][0]["content"]
    return {
        "base": row["prompt"],
        "teacher": [{"role": "user", "content": f"{question}\n\n{solution}"}],
        "reference_only": [{"role": "user", "content": solution}],
    }


def shown_by(text: str) -> str:
    """The reference in a probe's prompt."""
    return text.removeprefix("user: Worked solution of this problem:\n").removesuffix(f"\n\n{INSTRUCTION}")


@pytest.mark.parametrize("target", OPTIONS)
def test_every_target_under_every_reference(
    target: str, tmp_path: Path, model_dir: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    from peft import PeftModel

    adapter = save_adapter(tmp_path / "adapter", make_model())
    data = write(tmp_path / "data.jsonl", ROWS)
    flags = f"--target {target} {OPTIONS[target]} --adapter {adapter}"
    found = run(model_dir, tmp_path / "out", data, flags)
    frozen = make_model().double().eval()
    trained = PeftModel.from_pretrained(make_model(), adapter).double().eval()
    ids = list(COMPLETION.encode())

    def logits(model: Any, messages: Any) -> torch.Tensor:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.8

    seen_others = set()
    (student,) = found["students"]
    for sample in student["samples"][:2]:
        row = next(r for r in ROWS if r["prompt"][0]["content"] == sample["prompt"].removeprefix("user: "))
        sources = {"own": sample, **sample["controls"]}
        assert list(sources) == (["own"] if target == "contrastive" else ["own", "other", "none"])
        tilts = {}
        for source, measured in sources.items():
            shown = shown_by(measured["reference_prompt"])
            if source == "own":
                assert shown == row["reference"]
            elif source == "none":
                assert shown == ""
            else:
                assert shown != row["reference"] and shown in {r["reference"] for r in ROWS}
                seen_others.add(shown)
            at = {name: logits(frozen, messages) for name, messages in prompts(row, shown).items()}
            policy = reference.log_probs(logits(trained, row["prompt"]))
            base, ref = reference.log_probs(at["base"]), reference.log_probs(at["reference_only"])
            weight = torch.ones(len(ids), dtype=torch.float64)
            if target == "purified":
                expected = reference.purified_target(
                    at["teacher"], at["reference_only"], at["base"], pmi_beta=0.7, pmi_clip=2.0, pmi_center=False
                )
            elif target == "teacher":
                expected = reference.log_probs(at["teacher"])
            elif target == "gated":
                expected = reference.gated_target(at["base"], at["teacher"], at["reference_only"], 0.7, 2.0)
            elif target == "interpolated":
                expected = reference.interpolated_target(at["base"], at["teacher"], 0.3)
            else:
                wrongs = [logits(frozen, prompts(row, r["reference"])["teacher"]) for r in ROWS if r is not row]
                fits = [reference.contrastive_target(at["teacher"], w, 0.7, -6.0, 0.01) for w in wrongs]
                expected, weight = min(fits, key=lambda fit: abs(fit[1][0].item() - measured["weight"][0]))
            root = policy.exp().sqrt()
            change, it = expected - base, reference.log_probs(at["teacher"]) - ref
            tilts[source] = (
                change - change.mean(-1, keepdim=True),
                root * (change - (policy.exp() * change).sum(-1, keepdim=True)),
            )
            values = {
                "kl_target_base": reference.kl(expected, base),
                "norm_it": it.square().sum(-1).sqrt(),
                "mass_norm_it": (policy.exp() * it.square()).sum(-1).sqrt(),
                "cos_target_ref": cosine_similarity(expected - policy, ref - policy, dim=-1),
                "mass_cos_target_ref": cosine_similarity(root * (expected - policy), root * (ref - policy), dim=-1),
                "cos_own": cosine_similarity(tilts[source][0], tilts["own"][0], dim=-1),
                "mass_cos_own": cosine_similarity(tilts[source][1], tilts["own"][1], dim=-1),
                "weight": weight,
            }
            assert tuple(values) == SIGNAL
            for name, value in values.items():
                assert measured[name] == pytest.approx(value.tolist(), rel=2e-3, abs=2e-5), (source, name)
            if source != "own":
                assert min(values["cos_own"]) < 0.995  # else the references would not matter here
    assert len(seen_others) == (0 if target == "contrastive" else 2)


def test_the_summary_holds_the_means_of_each_source(tmp_path: Path, model_dir: Path) -> None:
    found = run(model_dir, tmp_path, write(tmp_path / "data.jsonl", ROWS))
    (student,) = found["students"]
    for source, summary in student["summary"]["controls"].items():
        for name in (*SIGNAL, "delta_ref", "mass_cos_total_ref"):
            values = [v for sample in student["samples"] for v in sample["controls"][source][name]]
            assert summary["groups"]["all"][name] == pytest.approx(sum(values) / len(values))
            kinds = [kind for sample in student["samples"] for kind in sample["classes"]]
            epistemic = [v for v, kind in zip(values, kinds, strict=True) if kind == 0]
            assert summary["groups"]["epistemic"][name] == pytest.approx(sum(epistemic) / len(epistemic))
        assert sum(part["tokens"] for part in summary["along_completion"]) == len(values)


def test_table_and_sentences_on_the_terminal_and_on_the_page(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(model_dir, tmp_path, write(tmp_path / "data.jsonl", ROWS), "--target gated")
    summary = found["students"][0]["summary"]
    printed, page = capsys.readouterr().out, (tmp_path / "diagnosis.html").read_text()
    means = [summary["groups"]["all"], *(summary["controls"][name]["groups"]["all"] for name in ("other", "none"))]
    line = next(line for line in printed.splitlines() if line.strip().startswith("cos(tilt, own tilt), weighted"))
    assert line.split()[-3:] == [f"{values['mass_cos_own']:.3f}" for values in means]
    assert "own    other     none" in printed and "weight of a token" not in printed
    said = sentences(summary, "gated")
    assert len(said) == 3 and all(sentence in printed and html.escape(sentence) in page for sentence in said)
    ratio = means[1]["kl_target_base"] / means[0]["kl_target_base"]
    assert f"another problem it moves the base {ratio:.2f} times as far" in said[1]
    assert "the signal of the target gated by the reference" in page


def test_other_references_never_repeat_the_own_one_and_follow_the_seed(tmp_path: Path, model_dir: Path) -> None:
    rows = read_rows("conversational")
    data = write(tmp_path / "data.jsonl", [*rows, *rows])  # every reference occurs twice
    shown = {
        run: [
            (shown_by(sample["reference_prompt"]), shown_by(sample["controls"]["other"]["reference_prompt"]))
            for sample in found["students"][0]["samples"]
        ]
        for run, found in {
            run: globals()["run"](model_dir, tmp_path / run, data, f"--reference_source own other --seed {run[0]}")
            for run in ("0a", "0b", "1")
        }.items()
    }
    assert all(own != other for pairs in shown.values() for own, other in pairs)
    assert shown["0a"] == shown["0b"] != shown["1"]


def test_a_dataset_with_one_reference(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data.jsonl", ROWS[:1])
    found = run(model_dir, tmp_path / "a", data)
    assert list(found["students"][0]["summary"]["controls"]) == ["none"]
    assert "The control `other` is left out: " in capsys.readouterr().out
    for flags in ("--reference_source own other", "--target contrastive"):
        assert cli.main(f"diagnose --model_name_or_path {model_dir} --dataset_name {data} {flags}".split()) != 0
        assert "all rows have the same reference" in capsys.readouterr().err


def test_a_base_model_takes_text(
    tmp_path: Path, make_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_model_dir(template=None)
    data = write(tmp_path / "data.jsonl", [{**row, "prompt": row["prompt"][0]["content"]} for row in ROWS])
    found = run(base, tmp_path / "out", data, "--text_prompts true")
    assert found["students"][0]["samples"][0]["prompt"] in {row["prompt"][0]["content"] for row in ROWS}
    assert cli.main(f"diagnose --model_name_or_path {base} --dataset_name {data}".split()) != 0
    assert "has no chat template. For a base model set `text_prompts: true`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--reference_source other own", "must begin with own"),
        ("--reference_source own own", "must begin with own"),
        ("--reference_source own others", "must begin with own"),
        ("--target contrastive --reference_source own none", "takes no control"),
        ("--target purifed", "`target` must be one of purified, teacher"),
        ("--pmi_beta 0", "pmi_beta"),
    ],
)
def test_refusals(flags: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(f"--model_name_or_path m --dataset_name d {flags}".split())


def test_the_recipe_pools_its_parts(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**ROWS[i % 4], "reference": f"Solution {i}."} for i in range(13)]
    write(tmp_path / "train.jsonl", rows)
    monkeypatch.setattr(recipe, "PROBLEMS", tmp_path / "train.jsonl")
    for module in (recipe, figure):
        monkeypatch.setattr(module, "OUTPUT", tmp_path / "out")
    for first in (0, 10):
        recipe.run(str(model_dir), first, 10, False, "teacher", ["own", "other"], 8)
    parts = [
        json.loads((tmp_path / "out" / model_dir.name / "teacher" / str(first) / "diagnosis.json").read_text())
        for first in (0, 10)
    ]
    samples = [sample for part in parts for sample in part["students"][0]["samples"]]
    assert [len(part["students"][0]["samples"]) for part in parts] == [10, 3]
    assert {shown_by(sample["reference_prompt"]) for sample in samples} == {row["reference"] for row in rows}
    (result,) = figure.collect()
    assert (result["model"], result["target"], result["prompts"]) == (model_dir.name, "teacher", "chat")
    values = [value for sample in samples for value in sample["controls"]["other"]["kl_target_base"]]
    assert result["summary"]["tokens"] == len(values)
    mean = result["summary"]["controls"]["other"]["groups"]["all"]["kl_target_base"]
    assert mean == pytest.approx(sum(values) / len(values), rel=1e-3)


def test_the_page_shows_the_committed_diagnosis() -> None:
    page = (Path(figure.__file__).parents[2] / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    lines = figure.table(figure.load()).splitlines()
    assert len(lines) > 2 and "\n".join(lines) in page
    assert all(result["summary"]["samples"] > 0 for result in figure.load())
