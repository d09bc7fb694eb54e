"""The command `purified-opsd evaluate`: what it writes, resumes and refuses."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from purified_opsd_trl import InputError, cli
from purified_opsd_trl.evaluate.arguments import RENAMED, EvaluateArguments, parse
from purified_opsd_trl.evaluate.backends import TransformersBackend
from purified_opsd_trl.evaluate.benchmarks import load_benchmark
from purified_opsd_trl.evaluate.run import Prompter
from purified_opsd_trl.evaluate.targets import find_targets


Read = Callable[[Path], list[dict[str, Any]]]


def test_the_command_writes_samples_and_results(
    flags: list[str], model_dir: Path, tmp_path: Path, read_samples: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 0
    folder = tmp_path / "out" / model_dir.name
    samples = read_samples(folder)
    assert {(s["problem_id"], s["sample"]) for s in samples} == {(str(p), s) for p in range(4) for s in range(3)}
    assert len(samples) == 12 and all(s["tokens"] <= 12 for s in samples)
    results = json.loads((folder / "results.json").read_text())
    assert results["prompting"]["example_prompt"].endswith("<|im_start|>assistant\n")
    assert results["prompting"]["chat_template_sha256"] and results["settings"]["thinking"] == "template"
    assert results["benchmarks"]["sums"]["samples"] == 12
    assert results["backend"] == results["settings"]["backend"] == "transformers"
    assert "avg@3" in capsys.readouterr().out
    # Again: nothing is drawn; one sample more a problem: only those
    before = (folder / "samples.jsonl").read_bytes()
    assert cli.main(flags) == 0
    assert (folder / "samples.jsonl").read_bytes() == before
    flags[flags.index("--num_generations") + 1] = "4"
    assert cli.main(flags) == 0
    assert (folder / "samples.jsonl").read_bytes().startswith(before)
    assert len(read_samples(folder)) == 16


@pytest.mark.parametrize("changed", ["problem", "answer"])
def test_samples_of_other_problems_are_not_taken_over(
    changed: str, flags: list[str], problems: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 0
    samples = tmp_path / "out" / model_dir.name / "samples.jsonl"
    before = samples.read_bytes()
    rows = [json.loads(line) for line in Path(problems).read_text().splitlines()]
    rows[2][changed] += "0"
    Path(problems).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(flags) == 2
    error = capsys.readouterr().err
    assert "samples of another problem '2' of `sums`" in error and "another `output_dir`" in error
    assert cli.main([*flags, "--limit", "2"]) == 0  # the problem is not asked for
    assert samples.read_bytes() == before
    # Samples of a version that did not write the hash
    lines = [json.loads(line) for line in before.splitlines()]
    samples.write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k != "problem_sha256"}) + "\n" for line in lines)
    )
    assert cli.main([*flags, "--limit", "2"]) == 2
    assert "samples of another problem" in capsys.readouterr().err


def test_samples_of_other_weights_are_not_mixed(
    flags: list[str], make_model: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(seed: int) -> None:
        model = get_peft_model(make_model(seed=seed), LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "adapter")

    train(0)
    assert cli.main([*flags, "--adapter", str(tmp_path / "adapter")]) == 0
    assert cli.main([*flags, "--adapter", str(tmp_path / "adapter")]) == 0
    train(1)
    assert cli.main([*flags, "--adapter", str(tmp_path / "adapter")]) == 2
    assert "drawn with other settings: `adapter_weights` ('" in capsys.readouterr().err


def test_several_checkpoints_in_one_call(
    flags: list[str], make_model: Callable[..., Any], read_samples: Read, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (10, 5):
        model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=float(step))
        model.save_pretrained(run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    flags += ["--checkpoints", str(run), "--temperature", "0"]
    assert cli.main(flags) == 0
    folders = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert [f for f in folders if f.startswith("run-")] == ["run-checkpoint-10", "run-checkpoint-5"]
    texts = {
        tuple(s["completion"] for s in sorted(read_samples(tmp_path / "out" / f), key=lambda s: s["problem_id"]))
        for f in folders
    }
    assert len(texts) == 3  # base and both adapters answer differently
    # The arms are paired in one table and one picture
    table = json.loads((tmp_path / "out" / "comparison.json").read_text())["table"]["sums"]
    assert list(table) == [Path(flags[2]).name, "run-checkpoint-5", "run-checkpoint-10"]
    for label, row in table.items():
        results = json.loads((tmp_path / "out" / label / "results.json").read_text())
        assert row["mean"] == pytest.approx(100 * results["benchmarks"]["sums"]["avg@3"]["mean"])
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    labels = [target.label for target in find_targets("m", checkpoints=[str(run)])]
    assert labels == ["m", "run-checkpoint-5", "run-checkpoint-10"]


def test_only_whole_checkpoints_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def checkpoint(folder: Path, state: str | None) -> str:
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
        return str(folder)

    def labels(folder: Path | str) -> list[str]:
        return [target.label for target in find_targets("m", checkpoints=[str(folder)])][1:]

    run = tmp_path / "run"
    whole = '{"global_step": 1}'
    for name, state in (("20", whole), ("3", whole), ("40", None), ("30", '{"glob'), ("best", whole)):
        checkpoint(run / f"checkpoint-{name}", state)
    assert labels(run) == ["run-checkpoint-3", "run-checkpoint-20"]
    assert "Skipping checkpoint-30, checkpoint-40" in capsys.readouterr().out
    assert labels(run / "checkpoint-20") == ["run-checkpoint-20"]  # as in the whole run
    assert labels(run / "checkpoint-best") == ["run-checkpoint-best"]
    assert labels(checkpoint(tmp_path / "final", None)) == ["final"]
    killed = checkpoint(tmp_path / "killed" / "checkpoint-7", None)
    for folder in (killed, tmp_path / "killed", run / "checkpoint-30"):
        with pytest.raises(InputError, match="is incomplete .checkpoint-"):
            labels(folder)


def test_adapters_of_several_runs_have_names_of_their_own() -> None:
    labels = [t.label for t in find_targets("m", ["plain/checkpoint-60", "purified/checkpoint-60", "merged"])]
    assert labels == ["plain-checkpoint-60", "purified-checkpoint-60", "merged"]


def test_settings_come_from_a_file_as_from_the_command_line(flags: list[str], tmp_path: Path) -> None:
    values = dict(zip(flags[1::2], flags[2::2], strict=True))
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        f"model_name_or_path: {values['--model_name_or_path']}\nbenchmarks: [{values['--benchmarks']}]\n"
        "num_generations: 3\ntop_p: 1\nchat_template_kwargs: {a: [1]}\ntext_prompts: true\ntemperature: 1e-1\n"
    )
    given = ["--top_p", "1", "--text_prompts", "--chat_template_kwargs", '{"a": [1]}', "--temperature", "0.1"]
    expected = parse([*flags[1:7], "--num_generations", "3", *given, "--seed", "7"])
    for config in (["--config", str(path)], [f"--config={path}"]):
        assert parse([*config, *flags[5:7], "--seed", "7"]) == expected


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_names_are_refused_with_the_new_ones(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"{old}: 1\n")
    for words in ([f"--{old}", "1"], [f"--{old}=1"], [f"--{old.replace('_', '-')}", "1"], ["--config", str(path)]):
        assert cli.main(["evaluate", *words]) == 2
        assert capsys.readouterr().err == f"error: `{old}` is now called `{new}`.\n"
    assert new in {field.name for field in dataclasses.fields(EvaluateArguments)}


def test_completions_longer_than_the_context_are_refused(
    flags: list[str], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags[flags.index("--max_completion_length") + 1] = "2048"
    assert cli.main(flags) == 2
    error = capsys.readouterr().err
    assert "`max_completion_length` (2048) is too large: the context is 2048 tokens" in error
    room = int(re.findall(r"Set it to (\d+) or less", error)[0])
    tokenizer = TransformersBackend(str(model_dir), "float32", 1).tokenizer
    prompts = Prompter(tokenizer, parse(flags[1:]))
    assert room == 2048 - max(len(prompts.ids(problem)) for problem in load_benchmark(flags[4]).problems)
    assert not (tmp_path / "out" / model_dir.name / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 8192),
        ({"rope_type": "default"}, 2048),
    ],
)
def test_the_context_counts_stretched_positions(
    rope: dict[str, Any], context: int, make_model_dir: Callable[..., Path]
) -> None:
    folder = make_model_dir(rope_parameters={"rope_theta": 10000.0, **rope})
    assert TransformersBackend(str(folder), "float32", 1).context == context


@pytest.mark.parametrize(
    ("flags_", "message"),
    [
        (
            "--model_name_or_path m --benchmarks x.jsonl --temperature nan",
            "`temperature` must be a number at least 0",
        ),
        (
            "--model_name_or_path m --benchmarks x.jsonl --temperature inf",
            "`temperature` must be a number at least 0",
        ),
        (
            "--model_name_or_path m --benchmarks x.jsonl --top_p nan",
            "`top_p` must be a number above 0 and at most 1",
        ),
        ("--model_name_or_path m --benchmarks x.jsonl --top_k -1", "`top_k` must be an integer at least 0, got -1"),
        (
            "--vllm_gpu_memory_utilization 40",
            "`vllm_gpu_memory_utilization` must be a number above 0 and",
        ),
        ("--chat_template_kwargs {a", "`chat_template_kwargs` must be a mapping, or one as JSON"),
        ("--backend sglang", "`backend` must be one of 'auto', 'vllm', 'transformers', got 'sglang'"),
        (
            "--model_name_or_path m --benchmarks x.jsonl --max_completion 8",
            "There is no option `max_completion`. Did you mean `max_completion_length`?",
        ),
        ("--benchmarks aime24", "`model_name_or_path` is missing"),
        ("--model_name_or_path m", "`benchmarks` names none"),
        (
            "--model_name_or_path m --benchmarks x.jsonl --num_generations 0",
            "`num_generations` must be an integer at least 1",
        ),
        ("--model_name_or_path m --benchmarks x.jsonl --prompt_template hello", "must hold {problem}"),
        ("--model_name_or_path m --benchmarks x.jsonl --checkpoints /nowhere", "holds neither a model"),
    ],
)
def test_bad_arguments_are_one_line(flags_: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", *flags_.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_extra_is_named(flags: list[str], monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    find = __import__("importlib.util", fromlist=["util"]).find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "math_verify" else find(name))
    assert cli.main(flags) == 2
    assert 'pip install "purified-opsd-trl[eval]"' in capsys.readouterr().err
