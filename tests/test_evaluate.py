"""`purified-opsd evaluate`: metrics by hand and by another method, samples that survive a kill, the command."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from purified_opsd_trl import InputError, cli
from purified_opsd_trl.evaluate.answers import final_text, grade
from purified_opsd_trl.evaluate.arguments import EvaluateArguments
from purified_opsd_trl.evaluate.backends import Request, Sampling, TransformersBackend
from purified_opsd_trl.evaluate.benchmarks import PRESETS, load_benchmark, load_benchmarks
from purified_opsd_trl.evaluate.compare import compare, load_results, markdown
from purified_opsd_trl.evaluate.metrics import average, bootstrap_interval, majority, mean_of_means, pass_at_k
from purified_opsd_trl.evaluate.paper import paper_rows
from purified_opsd_trl.evaluate.run import Prompter
from purified_opsd_trl.evaluate.store import SampleStore
from purified_opsd_trl.evaluate.summary import summarize
from purified_opsd_trl.evaluate.targets import find_targets


math_verify = pytest.importorskip("math_verify", reason="the extra `eval` is not installed")


# Metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 5), (5, 5, 1), (6, 1, 4), (4, 3, 2)])
def test_pass_at_k_is_the_mean_over_all_choices(n: int, c: int, k: int) -> None:
    outcomes = [True] * c + [False] * (n - c)
    choices = list(itertools.combinations(outcomes, k))
    expected = Fraction(sum(any(choice) for choice in choices), len(choices))
    assert pass_at_k(n, c, k) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 1.0),
        (["4", "5", "5"], [True, False, False], 0.0),
        (["4", "5"], [True, False], 0.5),
        (["4", "5", "6"], [True, False, False], 1 / 3),
        (["1/2", "0.5", "5", "5"], [True, True, False, False], 0.5),  # one answer in two spellings
        ([None, None, "4"], [False, False, True], 1.0),  # who has no answer does not vote
        ([None, None], [False, False], 0.0),
    ],
)
def test_majority(answers: list[str | None], correct: list[bool], expected: float) -> None:
    assert majority(answers, correct) == pytest.approx(expected)


def test_average_is_the_share_correct() -> None:
    assert average([True, False, False, True]) == 0.5


def test_the_interval_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = np.random.default_rng(3).beta(0.5, 0.5, size=30)
    ours = bootstrap_interval([values.tolist()], resamples=50_000)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=0.95,
        n_resamples=50_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert ours != pytest.approx(bootstrap_interval([values.tolist()], level=0.5), abs=0.02)


def test_the_interval_of_an_average_is_stratified() -> None:
    # Two benchmarks without spread of their own: nothing varies, however far they are apart
    assert bootstrap_interval([[0.0] * 5, [1.0] * 7]) == (0.5, 0.5)
    assert mean_of_means([[0.0] * 5, [1.0] * 7]) == 0.5
    values = [np.random.default_rng(i).random(40).tolist() for i in range(2)]
    low, high = bootstrap_interval(values, resamples=50_000)
    error = np.sqrt(sum(np.var(v) / len(v) for v in values)) / 2
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.03)


def record(problem: str, sample: int, **fields: Any) -> dict[str, Any]:
    return {
        "benchmark": "b",
        "problem_id": problem,
        "sample": sample,
        "answer": "1",
        "correct": True,
        "tokens": 100,
        "truncated": False,
        "markers": {"wait": 0},
        **fields,
    }


def test_the_summary_equals_the_computation_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"id": "x", "problem": "p", "answer": "1"}\n{"id": "y", "problem": "p", "answer": "2"}\n')
    records = [
        record("x", 0, tokens=100, markers={"wait": 3}),
        record("x", 1, tokens=300),
        record("y", 0, correct=False, answer=None, tokens=500, truncated=True, markers={"wait": 1}),
        record("y", 1, tokens=100),
        record("y", 2, tokens=9999),  # a sample more than asked for
    ]
    summary = summarize(records, [load_benchmark(str(path))], 2, ["wait"], seed=0)
    b = summary["benchmarks"]["b"]
    assert b["avg@2"]["mean"] == 0.75 and b["pass@1"]["mean"] == 0.75 and b["pass@2"]["mean"] == 1.0
    assert b["maj@2"]["mean"] == 1.0
    assert b["avg@2"]["interval_95"] == [0.5, 1.0]
    assert b["truncation_rate"] == 0.25 and b["answer_rate"] == 0.75
    assert b["tokens"]["mean"] == 250 and b["tokens"]["mean_wrong"] == 500 and b["samples"] == 4
    assert b["markers_per_1k"] == {"total": 4.0, "wait": 4.0} and b["marker_counts"] == {"wait": 4}
    assert b["per_problem"]["avg@2"] == {"x": 1.0, "y": 0.5}
    assert summary["average"]["avg@2"]["mean"] == 0.75


# Answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("so the answer is \\boxed{204}.", "204", True),
        ("\\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{\\dfrac{\\sqrt{2}}{2}}", "\\frac{1}{\\sqrt{2}}", True),
        ("\\boxed{25}", "025", True),
        ("\\boxed{26}", "025", False),
        ("<think>\\boxed{25}</think> It is \\boxed{26}.", "25", False),
        ("<think>It could be \\boxed{25}", "25", False),
        ("", "25", False),
    ],
)
def test_grades(completion: str, answer: str, correct: bool) -> None:
    assert grade(completion, answer).correct is correct


def test_numbers_in_open_thinking_are_no_answer() -> None:
    assert final_text("7 or 8", thinking_open=True) == ""
    assert final_text("7 or 8</think>9", thinking_open=True) == "9"
    assert grade("perhaps 25", "25", thinking_open=True).answer is None


# Benchmarks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "p"}\n', "row 0: the field `answer` is missing.*`problem`"),
        ('{"problem": " ", "answer": "1"}\n', "row 0: the field `problem` is missing or empty"),
        ('{"problem": "p", "answer": "1"}\n{oops\n', "line 2: not JSON"),
        ('{"id": 1, "problem": "p", "answer": "1"}\n' * 2, "holds the id '1' twice"),
        ("", "holds no problems"),
    ],
)
def test_bad_benchmarks_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_benchmark(str(path))


def test_unknown_benchmarks_name_the_presets() -> None:
    with pytest.raises(InputError, match="no preset `aime26`. Presets are aime24, aime25, hmmt25"):
        load_benchmark("aime26")
    assert all(preset.license for preset in PRESETS.values())


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    rows = [{"problem": f"a{end}b", "answer": "1"} for end in ("\u2028", "\u2029", "\x85", "\x0b", "\n", "\r\n")]
    path = tmp_path / "b.jsonl"
    for newline in ("\n", "\r\n"):
        text = newline.join(json.dumps(row, ensure_ascii=False) for row in rows) + newline
        path.write_text(text, encoding="utf-8", newline="")
        assert [p.problem for p in load_benchmark(str(path)).problems] == [row["problem"] for row in rows]
    with SampleStore(tmp_path, {}) as store:
        for number, row in enumerate(rows):
            store.append(record("x", number, completion=row["problem"]))
        drawn = store.records
    assert SampleStore(tmp_path, {}).records == drawn


def test_two_benchmarks_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a/b.jsonl", "c/b.jsonl", "aime24.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"problem": "p", "answer": "1"}\n')
    files = [str(tmp_path / name) for name in ("a/b.jsonl", "c/b.jsonl", "aime24.jsonl")]
    for names in (files[:2], ["aime24", files[2]], [files[0], files[0]]):
        with pytest.raises(InputError, match=f"`{names[0]}` and `{names[1]}` are both called `(b|aime24)`.*Rename"):
            load_benchmarks(names)
    assert [b.name for b in load_benchmarks(files[1:])] == ["b", "aime24"]


# The store ---------------------------------------------------------------------------------------------------------


def test_half_a_line_is_cut_and_the_rest_is_kept(tmp_path: Path) -> None:
    with SampleStore(tmp_path, {"seed": 0}) as store:
        for sample in range(3):
            store.append(record("é", sample))
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"benchmark": "b", "probl')
    with SampleStore(tmp_path, {"seed": 0}) as store:
        assert set(store.records) == {("b", "é", i) for i in range(3)}
        store.append(record("é", 3))
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["sample"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_every_sample_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    with SampleStore(tmp_path, {}) as store:
        for sample in range(3):
            store.append(record("x", sample))
            assert len(sizes) == sample + 1 and sizes[-1] == (tmp_path / "samples.jsonl").stat().st_size > 0


def test_samples_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    SampleStore(tmp_path, {"temperature": 0.6}).__exit__(None, None, None)
    with pytest.raises(InputError, match=r"other settings: `temperature` \(0.6 then, 1.0 now\)"):
        SampleStore(tmp_path, {"temperature": 1.0})
    with pytest.raises(InputError, match=r"`backend` \(not recorded then, 'vllm' now\)"):
        SampleStore(tmp_path, {"temperature": 0.6, "backend": "vllm"})


# The command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def problems(tmp_path: Path) -> str:
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def flags(model_dir: Path, problems: str, tmp_path: Path) -> Iterator[list[str]]:
    yield (
        f"evaluate --model_name_or_path {model_dir} --benchmarks {problems} --output_dir {tmp_path / 'out'} --num_generations 3 "
        "--max_completion_length 12 --batch_size 4 --backend transformers --dtype float32"
    ).split()


def read_samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]


def test_the_command_writes_samples_and_results(
    flags: list[str], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_greedy_samples_are_what_the_model_generates(model_dir: Path, tokenizer: Any, make_model: Any) -> None:
    backend = TransformersBackend(str(model_dir), "float32", batch_size=3)
    prompts = ["a", "some longer prompt", "bb"]
    requests = [Request(("b", str(i), 0), list(p.encode()), seed=0) for i, p in enumerate(prompts)]
    drawn = {c.key[1]: c for c in backend.generate(requests, Sampling(0.0, 1.0, 0, 10))}
    model = make_model()
    for i, prompt in enumerate(prompts):
        ids = list(prompt.encode())
        expected: list[int] = []
        while len(expected) < 10 and not (expected and expected[-1] == tokenizer.eos_token_id):
            expected.append(model(torch.tensor([ids + expected])).logits[0, -1].argmax().item())
        ended = expected[-1] == tokenizer.eos_token_id
        assert drawn[str(i)].ids == (expected[:-1] if ended else expected)
        assert drawn[str(i)].truncated is not ended


@pytest.fixture
def penalised(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    """A model whose generation config has penalties and filters, and two end tokens."""
    model = make_model()
    model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=2, do_sample=True, min_p=0.9, suppress_tokens=list(range(200))
    )
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 97]
    model.save_pretrained(tmp_path / "penalised")
    tokenizer.save_pretrained(tmp_path / "penalised")
    return tmp_path / "penalised"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_models_own_generation_config_changes_no_sample(
    temperature: float,
    with_adapter: bool,
    penalised: Path,
    make_model_dir: Callable[..., Path],
    make_adapter: Callable[..., str],
) -> None:
    requests = [Request(("b", str(i), 0), list(p.encode()), seed=i) for i, p in enumerate(("one", "two words"))]
    adapter = make_adapter("new tokens", "qwen3") if with_adapter else None
    drawn = []
    for folder in (penalised, make_model_dir(eos_token_id=[260, 97])):
        backend = TransformersBackend(str(folder), "float32", 2)
        backend.load(adapter)
        drawn.append(list(backend.generate(requests, Sampling(temperature, 1.0, 0, 40))))
    assert drawn[0] == drawn[1]
    assert any(len(set(completion.ids)) < len(completion.ids) for completion in drawn[0])


def test_every_end_token_ends_a_completion(penalised: Path) -> None:
    backend = TransformersBackend(str(penalised), "float32", 1)
    (long,) = backend.generate([Request(("b", "0", 0), list(b"one"), 0)], Sampling(0.0, 1.0, 0, 40))
    for end in (long.ids[3], [260, long.ids[3]]):
        backend.model.generation_config.eos_token_id = end
        (short,) = backend.generate([Request(("b", "0", 0), list(b"one"), 0)], Sampling(0.0, 1.0, 0, 40))
        assert short.ids == long.ids[: long.ids.index(long.ids[3])] and not short.truncated


ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head and embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [97, 98]},
    "on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "PiSSA": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
}


@pytest.fixture
def make_adapter(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Factory of folders of adapters whose every part was moved."""

    def make(kind: str, architecture: str, **kwargs: Any) -> str:
        model = get_peft_model(make_model(architecture, **kwargs), LoraConfig(r=2, **ADAPTERS[kind]))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or (kind == "on the embeddings" and "embed_tokens.base_layer" in name):
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
        model.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return make


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(("architecture", "tied"), [("qwen3", True), ("phi", False)])
def test_an_adapter_leaves_nothing_in_the_base(
    kind: str,
    architecture: str,
    tied: bool,
    make_model_dir: Callable[..., Path],
    make_adapter: Callable[..., str],
) -> None:
    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([[97, 98, 99, 100]])).logits

    folders = [make_adapter(name, architecture, tied=tied) for name in (kind, "head")]
    backend, fresh = (TransformersBackend(str(make_model_dir(architecture, tied=tied)), "float32", 1) for _ in "ab")
    before = {name: weight.clone() for name, weight in backend.model.named_parameters()}
    plain = logits(backend.model)
    for folder in (*folders, folders[0]):
        backend.load(folder)
        alone = PeftModel.from_pretrained(copy.deepcopy(fresh.model), folder).eval()
        assert torch.equal(logits(backend.model), logits(alone)) and not torch.equal(logits(alone), plain)
    backend.load(None)
    after = dict(backend.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert (backend.model.get_input_embeddings().weight is backend.model.get_output_embeddings().weight) is tied
    assert torch.equal(logits(backend.model), plain)


def test_several_checkpoints_in_one_call(flags: list[str], make_model: Callable[..., Any], tmp_path: Path) -> None:
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
    assert [t.label for t in find_targets("m", checkpoints=[str(run)])] == [
        "m",
        "run-checkpoint-5",
        "run-checkpoint-10",
    ]


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


KILLED = """
import os, sys, time
from purified_opsd_trl import cli
from purified_opsd_trl.evaluate.backends import TransformersBackend
generate = TransformersBackend.generate
def slow(self, *args):
    for completion in generate(self, *args):
        yield completion
        time.sleep(0.2)
TransformersBackend.generate = slow
cli.main(sys.argv[1:])
"""


def test_a_kill_in_the_middle_loses_and_repeats_nothing(flags: list[str], model_dir: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
    )
    path = tmp_path / "out" / model_dir.name / "samples.jsonl"
    deadline = time.monotonic() + 400  # a busy machine takes minutes to import torch
    while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert 5 <= whole.count(b"\n") < 12
    assert cli.main(flags) == 0
    after = path.read_bytes()
    assert after.startswith(whole)
    keys = [(s["problem_id"], s["sample"]) for s in read_samples(path.parent)]
    assert len(keys) == len(set(keys)) == 12


def test_thinking_mode_reaches_the_template(make_tokenizer: Any) -> None:
    problem = load_benchmark_from("What is 1 + 1?")
    tokenizer = make_tokenizer("qwen3")
    texts = {}
    for mode in ("on", "off"):
        args = EvaluateArguments(model_name_or_path="m", benchmarks=["b"], thinking=mode)
        texts[mode] = Prompter(tokenizer, args).text(problem)
    assert texts["off"].endswith("<think>\n\n</think>\n\n") and not texts["on"].endswith("</think>\n\n")


def load_benchmark_from(text: str) -> Any:
    from purified_opsd_trl.evaluate.benchmarks import Problem

    return Problem("0", text, "2")


def test_a_base_model_needs_the_flag_for_plain_text(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(InputError, match="has no chat template.*set `text_prompts`"):
        Prompter(tokenizer, EvaluateArguments(model_name_or_path="m", benchmarks=["b"]))
    plain = Prompter(tokenizer, EvaluateArguments(model_name_or_path="m", benchmarks=["b"], text_prompts=True))
    assert plain.text(load_benchmark_from("x")).startswith("x\n\nPlease")


# Comparison --------------------------------------------------------------------------------------------------------


def results(label: str, values: list[float], **settings: Any) -> dict[str, Any]:
    """Results of one benchmark, as `results.json` holds them."""
    return {
        "label": label,
        "num_samples": 4,
        "settings": {"model": "org/Qwen3-8B", "adapter": None, "temperature": 0.6, **settings},
        "benchmarks": {
            "aime24": {
                "per_problem": {"avg@4": {str(i): value for i, value in enumerate(values)}},
                "tokens": {"mean": 100.0},
                "truncation_rate": 0.0,
                "answer_rate": 1.0,
                "markers_per_1k": {"total": 3.0},
            }
        },
    }


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    before = rng.choice([0.0, 1.0], size=30).tolist()
    after = [value + 0.1 for value in before]
    row = compare([results("base", before), results("new", after)])["table"]["aime24"]["new"]
    assert row["difference"] == pytest.approx(10.0)
    assert row["difference_interval_95"] == pytest.approx([10.0, 10.0])  # every problem moved alike
    low, high = row["interval_95"]
    assert high - low > 20  # while the means themselves are this uncertain


def test_the_table_shows_the_paper_where_the_model_matches() -> None:
    text = markdown(compare([results("base", [0.5, 1.0]), results("new", [1.0, 1.0], temperature=1.0)]))
    assert "| *paper: purified, DASD-10K* | 79.4 |" in text
    assert "| new | 100.0 [100.0, 100.0]<br>+25.0 [+0.0, +50.0] |" in text
    assert "Different settings: `temperature` (base: 0.6, new: 1.0)" in text
    retrained = compare([results("base", [0.5, 1.0]), results("new", [1.0, 1.0], adapter="a", adapter_weights="b")])
    assert retrained["settings_that_differ"] == {}
    assert paper_rows("SmolLM2", ["aime24"]) == {}
    assert paper_rows("Qwen/Qwen3-4B", ["aime24", "aime25", "hmmt25"])["purified, DASD-10K"]["average"] == 63.7
    assert paper_rows("Qwen/Qwen3-4B", ["mine"]) == {}


def test_compare_writes_table_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    for name, values in (("a", [0.5, 0.25]), ("b", [1.0, 0.5])):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(name, values)))
    out = tmp_path / "cmp"
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["evaluate", "--compare", *files, "--output_dir", str(out)]) == 0
    assert json.loads((out / "comparison.json").read_text())["table"]["aime24"]["b"]["difference"] == 37.5
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    for name, values in (("a", [0.5, 0.25]), ("b", [1.0])):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(name, values)))
    with pytest.raises(InputError, match="not evaluated on the same problems"):
        load_results([str(tmp_path / "a.json"), str(tmp_path / "b.json")])


def test_results_on_other_problems_of_the_same_names_are_refused(tmp_path: Path) -> None:
    hashes = {"a": {"aime24": {"0": "x", "1": "y"}}, "b": {"aime24": {"0": "x", "1": "z"}}, "old": None}
    for name, of_problems in hashes.items():
        extra = {"problem_sha256": of_problems} if of_problems else {}
        (tmp_path / f"{name}.json").write_text(json.dumps({**results(name, [0.5, 0.25]), **extra}))
    with pytest.raises(InputError, match="not evaluated on the same problems"):
        load_results([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert len(load_results([str(tmp_path / "a.json"), str(tmp_path / "old.json")])) == 2
    with pytest.raises(InputError, match="at least two results"):
        load_results([str(tmp_path / "a.json")])
    with pytest.raises(InputError, match="no file"):
        load_results([str(tmp_path / "c.json")])


@pytest.mark.parametrize(
    ("flags_", "message"),
    [
        ("--benchmarks aime24", "`model_name_or_path` is missing"),
        ("--model_name_or_path m", "`benchmarks` names none"),
        ("--model_name_or_path m --benchmarks x.jsonl --num_generations 0", "`num_generations` must be at least 1"),
        ("--model_name_or_path m --benchmarks x.jsonl --prompt_template hello", "must hold {problem}"),
        ("--model_name_or_path m --benchmarks x.jsonl --checkpoints /nowhere", "holds neither a model"),
    ],
)
def test_bad_arguments_are_one_line(flags_: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", *flags_.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_named(flags: list[str], monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    find = __import__("importlib.util", fromlist=["util"]).find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "math_verify" else find(name))
    assert cli.main(flags) == 2
    assert 'pip install "purified-opsd-trl[eval]"' in capsys.readouterr().err
