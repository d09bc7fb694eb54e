"""`purified-opsd bench`: what it times is the same computation, what it counts is right, what it writes is whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from purified_opsd_trl.bench import loss as bench_loss
from purified_opsd_trl.bench import main, measure
from purified_opsd_trl.bench import scoring as bench_scoring
from purified_opsd_trl.bench.measure import Contender, Measurement, PeakMemory, alternate
from purified_opsd_trl.cli import main as cli
from purified_opsd_trl.errors import InputError


CPU = torch.device("cpu")
TINY = ["--tokens", "7", "--hidden", "8", "--vocab", "50"]


def workload(*flags: str) -> bench_loss.Workload:
    parser = bench_loss.make_parser()
    parser.set_defaults(**bench_loss.PRESETS["cpu"])
    return bench_loss.make_workload(parser.parse_args([*TINY, *flags]), CPU)


class ProductCounter(TorchDispatchMode):
    """Multiply-adds of the matrix products of a run, however they are spelled."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["frozen", "trainable"])
@pytest.mark.parametrize("beta", ["0.0", "0.5", "1.0"])
def test_products_are_counted_right(head: str, beta: str) -> None:
    work = workload("--head", head, "--beta", beta)
    for contender in bench_loss.make_contenders(work, compiled=False):
        with ProductCounter() as counter:
            contender.run()
        assert counter.flops == contender.flops, contender.name


@pytest.mark.parametrize("head", ["frozen", "trainable"])
def test_contenders_compute_the_same(head: str) -> None:
    work = workload("--head", head, "--beta", "0.3")
    gradients: dict[str, list[torch.Tensor]] = {}
    for contender in bench_loss.make_contenders(work, compiled=False)[:-1]:
        assert contender.prepare is not None
        contender.prepare()
        contender.run()
        leaves = [work.student, work.student_weight] if work.trainable else [work.student]
        gradients[contender.name] = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
        assert len(gradients[contender.name]) == len(leaves)
    for one, other in (
        ("ours purified", "naive purified"),
        ("ours plain", "TRL plain"),
        ("ours plain", "Liger plain"),
    ):
        for a, b in zip(gradients[one], gradients[other], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradients["ours plain"][0], gradients["ours purified"][0], rtol=1e-2)


def test_loss_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "loss"
    assert main(["loss", *TINY, "--repetitions", "2", "--beta", "0.3", "--output", str(output)]) == 0
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["settings"] == {
        **{"tokens": 7, "hidden": 8, "vocab": 50, "dtype": "float32", "head": "frozen", "beta": 0.3},
        **{"logit_std": 3.0, "chunk_size": None, "memory_budget": 512},
    }
    assert report["environment"]["versions"]["torch"] == torch.__version__
    names = ["ours purified", "ours plain", "naive purified", "TRL plain", "Liger plain", "matrix products alone"]
    assert list(report["contenders"]) == names
    for result in report["contenders"].values():
        assert result["error"] is None and len(result["seconds"]) == len(result["cpu_seconds"]) == 2
        low, high = result["seconds_quartiles"]
        assert 0 < low <= result["seconds_median"] <= high
    table = output.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert table.strip() in capsys.readouterr().out


def test_presets_give_way_to_flags(tmp_path: Path) -> None:
    common = ["--repetitions", "1", "--contenders", "ours plain", "--output", str(tmp_path / "x")]
    assert main(["loss", "--preset", "gpu", "--device", "cpu", "--dtype", "float32", *TINY, *common]) == 0
    settings = json.loads((tmp_path / "x.json").read_text())["settings"]
    assert (settings["tokens"], settings["hidden"], settings["vocab"]) == (7, 8, 50)
    assert bench_loss.PRESETS["gpu"] == {
        **{"tokens": 8192, "hidden": 4096, "vocab": 151936, "dtype": "bfloat16", "device": "cuda"}
    }


def test_naive_formula_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_loss, "_available_memory", lambda: 1000.0)
    assert main(["loss", *TINY, "--repetitions", "1", "--output", str(tmp_path / "x")]) == 0
    contenders = json.loads((tmp_path / "x.json").read_text())["contenders"]
    assert contenders["naive purified"]["error"].startswith("does not fit")
    assert contenders["ours purified"]["error"] is None
    assert "| naive purified | does not fit" in (tmp_path / "x.md").read_text()


# A whole step --------------------------------------------------------------------------------------------------------


def test_step_report(tmp_path: Path) -> None:
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "vocab": 1100, "rows": 2, "prompt": 5, "reference": 7}
    flags = [part for name, value in {**sizes, "completion": 6}.items() for part in (f"--{name}", str(value))]
    output = tmp_path / "step"
    assert main(["step", *flags, "--repetitions", "1", "--generation", "--output", str(output)]) == 0
    report = json.loads(output.with_suffix(".json").read_text())
    contenders = report["contenders"]
    assert list(contenders) == ["ours purified", "ours plain", "TRL SDFT plain"]
    assert all(result["error"] is None and result["seconds"][0] > 0 for result in contenders.values())
    # two more frozen forwards and one more projection; the plain steps owe the same, but for a padded position
    assert 1.2 < contenders["ours purified"]["flops"] / contenders["ours plain"]["flops"] < 1.7
    assert 0.9 < contenders["ours plain"]["flops"] / contenders["TRL SDFT plain"]["flops"] < 1.1
    assert report["generation"]["seconds"] > 0
    assert "Sampling the completions" in output.with_suffix(".md").read_text()


# Scoring -------------------------------------------------------------------------------------------------------------

SCORING = ["--layers", "1", "--hidden", "32", "--heads", "2", "--rows", "2", "--prompt", "5", "--completion", "6"]


def test_scoring_report(tmp_path: Path) -> None:
    output = tmp_path / "scoring"
    flags = [*SCORING, "--references", "20", "300", "--repetitions", "1", "--output", str(output)]
    assert main(["scoring", *flags]) == 0
    report = json.loads(output.with_suffix(".json").read_text())
    assert list(report["references"]) == ["20", "300"] and report["settings"]["references"] == [20, 300]
    for contenders in report["references"].values():
        assert list(contenders) == ["separate", "shared prefix", "prefix kept"]
        assert all(result["error"] is None and result["seconds"][0] > 0 for result in contenders.values())
    assert "| 300 | shared prefix |" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize("same", [False, True], ids=["own", "same"])
def test_scoring_contenders_run_what_they_say(tmp_path: Path, same: bool) -> None:
    parser = bench_scoring.make_parser()
    parser.set_defaults(**bench_scoring.PRESETS["cpu"])
    # four rows: batches of two pairs, so that rows with the same reference run it once in each of two batches
    args = parser.parse_args([*SCORING, "--rows", "4", "--references", "300", *(["--same-reference"] * same)])
    trainer = bench_scoring.make_trainer(args, CPU, tmp_path)
    scoring_pass = bench_scoring.ScoringPass(trainer, args, 300)
    # base 5 + 6; teacher and reference-only end in 16 tokens and 6; what is run after what was seen
    whole, branches = [(0, 300 + 5 + 22), (0, 300 + 22)] * 4, [(300, 5 + 22), (300, 22)] * 4
    prefixes = [(0, 300)] * (2 if same else 4)
    runs = {"separate": whole, "shared prefix": prefixes + branches, "prefix kept": branches}
    for contender in scoring_pass.contenders():
        if contender.prepare is not None:
            contender.prepare()
        with ProductCounter() as counter:
            contender.run()
        sequences = [*runs[contender.name], *[(0, 11)] * 4]
        pairs = sum(before + i + 1 for before, count in sequences for i in range(count))  # (query, key) of attention
        # less than 2 %: the reference-only probe's shorter branch is padded
        assert contender.flops == pytest.approx(counter.flops + 4 * 32 * pairs, rel=0.02), contender.name
    scores = [scoring_pass.run(share) for share in (False, True)]
    for context, states in scores[0].hidden.items():
        torch.testing.assert_close(scores[1].hidden[context], states, rtol=1e-4, atol=1e-5)
    assert [score.stats.tokens for score in scores] == [4 * (11 + 327 + 322), 300 * len(prefixes) + 4 * (11 + 27 + 22)]


# Measuring -----------------------------------------------------------------------------------------------------------


def test_contenders_alternate_after_a_warm_up() -> None:
    calls: list[str] = []
    results = alternate([Contender(name, lambda n=name: calls.append(n)) for name in "ab"], 2, CPU)
    assert calls == ["a", "b"] * 3
    assert [len(result.seconds) for result in results.values()] == [2, 2]


def test_a_contender_that_cannot_run_is_named() -> None:
    def fail(error: Exception) -> None:
        raise error

    contenders = [
        Contender("memory", lambda: fail(torch.OutOfMemoryError())),
        Contender("import", lambda: fail(ImportError("no such\nthing"))),
        Contender("fine", lambda: None),
    ]
    results = alternate(contenders, 1, CPU)
    assert [result.error for result in results.values()] == ["out of memory", "no such", None]


def test_own_clock_and_preparation() -> None:
    prepared: list[int] = []
    contender = Contender("a", lambda: (1.5, 2.5), prepare=lambda: prepared.append(1))
    result = alternate([contender], 3, CPU)["a"]
    assert result.seconds == [1.5] * 3 and result.cpu_seconds == [2.5] * 3 and len(prepared) == 4


def test_median_and_quartiles() -> None:
    result = Measurement(seconds=[1.0, 2.0, 3.0, 4.0, 9.0])
    assert result.median("seconds") == 3.0 and result.spread("seconds") == (2.0, 4.0)
    assert Measurement(seconds=[1.0]).spread("seconds") == (1.0, 1.0)
    assert measure.show_time(result, "seconds") == "3000 [2000, 4000]"
    assert measure.show_ratio(result, Measurement(seconds=[2.0]), "seconds") == "1.50"
    assert measure.show_ratio(result, None, "seconds") == "-"


@pytest.mark.skipif(not measure._reset_peak(), reason="no high-water mark of resident memory here")
def test_peak_memory_of_the_process() -> None:
    torch.ones(256 * 2**20, dtype=torch.uint8)  # an earlier peak, which is not the context's
    with PeakMemory(CPU) as memory:
        torch.ones(64 * 2**20, dtype=torch.uint8)  # freed before the context ends
    # Linux counts resident pages per processor and adds them up in batches, which grow with the number of processors
    assert memory.bytes is not None and 32 <= memory.bytes / 2**20 <= 128


def test_peak_memory_where_the_platform_cannot_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_CLEAR_PEAK", tmp_path / "missing" / "clear_refs")
    with PeakMemory(CPU) as memory:
        pass
    assert memory.bytes is None
    assert measure.show_bytes(memory.bytes) == "-"


# The command line ----------------------------------------------------------------------------------------------------


def test_unknown_contender() -> None:
    with pytest.raises(InputError, match="'thiers'; there are: ours purified, ours plain"):
        main(["loss", *TINY, "--contenders", "thiers"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", "loss", *TINY, "--device", "cuda"]) == 2
    assert "finds no CUDA device; use --device cpu" in capsys.readouterr().err


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["speed"])
    assert status.value.code == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["loss", "scoring", "step"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main([name, "--help"])
    assert status.value.code == 0
    assert "--repetitions" in capsys.readouterr().out
