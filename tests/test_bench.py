"""`purified-opsd bench`: it times the same computation, its counts are right, its reports are complete."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from purified_opsd_trl.bench import gpu, main, measure
from purified_opsd_trl.bench import loss as bench_loss
from purified_opsd_trl.bench import scoring as bench_scoring
from purified_opsd_trl.bench import step as bench_step
from purified_opsd_trl.bench.measure import Contender, PeakMemory, alternate
from purified_opsd_trl.cli import main as cli
from purified_opsd_trl.errors import InputError


CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TINY = ["--tokens", "7", "--hidden_size", "8", "--vocab_size", "50"]


def workload(*flags: str) -> bench_loss.Workload:
    return bench_loss.make_workload(measure.parse(bench_loss.LossArguments, [*TINY, *flags]), CPU)


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
    output = tmp_path / "deep"
    assert main(["loss", *TINY, "--repetitions", "2", "--beta", "0.3", "--output_dir", str(output)]) == 0
    report = json.loads((output / "loss.json").read_text())
    settings = {"tokens": 7, "hidden_size": 8, "vocab_size": 50, "dtype": "float32", "head": "frozen", "beta": 0.3}
    assert settings.items() <= report["settings"].items()
    assert report["environment"]["torch"].startswith(torch.__version__)
    names = ["ours purified", "ours plain", "naive purified", "TRL plain", "Liger plain", "matrix products alone"]
    assert list(report["contenders"]) == names
    for result in report["contenders"].values():
        assert result["error"] is None and len(result["seconds"]) == len(result["cpu_seconds"]) == 2
        low, high = result["seconds_quartiles"]
        assert 0 < low <= result["seconds_median"] <= high
    table = (output / "loss.md").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert table.strip() in capsys.readouterr().out


def test_options_take_precedence_over_a_preset_and_over_a_file(tmp_path: Path) -> None:
    assert bench_loss.LossArguments.PRESETS["gpu"] == {
        **{"tokens": 8192, "hidden_size": 4096, "vocab_size": 151936, "dtype": "bfloat16", "device": "cuda"}
    }
    (tmp_path / "x.yaml").write_text("preset: gpu\nvocab_size: 60\nhidden_size: 9\n")
    args = measure.parse(bench_loss.LossArguments, ["--config", str(tmp_path / "x.yaml"), "--hidden_size", "8"])
    assert (args.tokens, args.vocab_size, args.hidden_size, args.dtype) == (8192, 60, 8, "bfloat16")


def test_naive_formula_runs_on_as_many_tokens_as_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = 14 * 4 * 50  # bytes per token
    for free, share in ((needed * 7, 1.0), (needed * 7 - 1, 3 / 7), (needed - 1, None)):
        monkeypatch.setattr(bench_loss, "available_memory", lambda _, free=free: float(free))
        assert main(["loss", *TINY, "--repetitions", "1", "--output_dir", str(tmp_path)]) == 0
        contenders = json.loads((tmp_path / "loss.json").read_text())["contenders"]
        naive, ours = contenders["naive purified"], contenders["ours purified"]
        assert ours["error"] is None
        if share is None:
            assert naive["error"].startswith("does not fit")
            assert "| naive purified | does not fit" in (tmp_path / "loss.md").read_text()
            continue
        assert naive["share"] == pytest.approx(share) and naive["error"] is None
        assert naive["flops"] == pytest.approx(share * 5 / 4 * ours["flops"])  # five products against four
        ratio = ours["seconds"][0] / (naive["seconds"][0] / share)
        row = next(row for row in (tmp_path / "loss.md").read_text().splitlines() if "| ours purified |" in row)
        assert float(row.split("|")[4]) == pytest.approx(ratio, abs=0.006)


def test_naive_formula_that_runs_out_of_memory_takes_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    work, real, seen = workload(), bench_loss._naive, []

    def small_memory(work: bench_loss.Workload, tokens: int, function: Any) -> torch.Tensor:
        seen.append(tokens)
        if tokens > 1:
            raise torch.OutOfMemoryError
        return real(work, tokens, function)

    monkeypatch.setattr(bench_loss, "_naive", small_memory)
    naive = next(one for one in bench_loss.make_contenders(work, compiled=False) if one.name == "naive purified")
    alternate([naive], 2, CPU)
    assert seen == [7, 3, 1, 1, 1] and naive.error is None and len(naive.seconds) == 2
    assert (naive.share, naive.flops) == (1 / 7, 5 * work.product / 7)


# A complete step -----------------------------------------------------------------------------------------------------

MODEL = ["--num_hidden_layers", "1", "--hidden_size", "32", "--intermediate_size", "96", "--head_dim", "16"]
MODEL += ["--num_attention_heads", "2", "--num_key_value_heads", "1", "--vocab_size", "1100"]
LENGTHS = ["--prompt_length", "5", "--reference_length", "7", "--completion_length", "6"]


def test_step_report(tmp_path: Path) -> None:
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    flags = [*MODEL, *LENGTHS, *batch, "--gradient_checkpointing", "true", "--repetitions", "1"]
    assert main(["step", *flags, "--generation", "true", "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "step.json").read_text())
    contenders = report["contenders"]
    assert list(contenders) == ["ours purified", "ours plain", "TRL SDFT plain"]
    assert all(result["error"] is None and result["seconds"][0] > 0 for result in contenders.values())
    for name in ("ours purified", "ours plain"):
        parts = contenders[name]
        assert 0 < parts["scoring"] and 0 < parts["loss"] and parts["scoring"] + parts["loss"] < parts["seconds"][-1]
    assert report["generation"]["seconds"] > 0
    header, ours, *_, sampling = report["table"]
    row = dict(zip(header, ours, strict=True))
    seconds = contenders["ours purified"]["seconds"][0]
    assert float(row["student tokens/s"]) == pytest.approx(4 * (5 + 6) / seconds, abs=0.51)
    rate = contenders["ours purified"]["flops"] / seconds / report["matrix_rate"]
    assert float(row["MFU"].rstrip("%")) == pytest.approx(100 * rate, abs=0.06)
    assert sampling[0] == "sampling with transformers"


@pytest.mark.parametrize("name", list(bench_step.CONTENDERS))
def test_flops_of_a_step(tmp_path: Path, name: str) -> None:
    args = measure.parse(bench_step.StepArguments, [*MODEL, *LENGTHS, "--lora_r", "1", "--completion_length", "30"])
    contender = bench_step.Bench(args, CPU, tmp_path).contender(name)
    with FlopCounterMode(display=False) as counter:
        contender.run()
    # What the counter sees beyond the model: adapters (rank 1), and padding of the shorter contexts
    assert contender.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_lengths_are_spread_alike_for_all(tmp_path: Path) -> None:
    ragged = ["--lengths", "lognormal", "--completion_length", "64", "--per_device_train_batch_size", "16"]
    args = measure.parse(bench_step.StepArguments, [*MODEL, *LENGTHS, *ragged])
    lengths = args.completion_lengths()
    assert lengths == args.completion_lengths() and len(set(lengths)) > 8
    assert lengths[0] == max(lengths) == 64 and 4 <= min(lengths) < 16
    bench = bench_step.Bench(args, CPU, tmp_path)
    assert [len(one) for one in bench.completions] == lengths
    ratios = {}
    for name in ("ours purified", "ours padded"):
        trainer = bench.ours({**bench_step.CONTENDERS, **bench_step.PADDED}[name])
        trainer.train()
        logged = trainer.state.log_history[-1]
        ratios[name] = logged["training/padding_ratio"], logged["scoring/padding_ratio"]
    assert all(packed < 0.8 * padded for packed, padded in zip(*ratios.values(), strict=True))


def test_micro_batches_are_halved_until_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = bench_step.Bench.ours, []

    def needs_memory(self: bench_step.Bench, target: str) -> Any:
        sizes.append((self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps))
        if sizes[-1][0] > 1:
            raise torch.OutOfMemoryError
        return real(self, target)

    monkeypatch.setattr(bench_step.Bench, "ours", needs_memory)
    args = measure.parse(bench_step.StepArguments, [*MODEL, *LENGTHS])
    contender = bench_step.Bench(args, CPU, tmp_path).contender("ours plain")
    assert sizes == [(4, 1), (2, 2), (1, 4)]
    assert contender.flops == args.step_flops(purified=False) and contender.run() is not None
    monkeypatch.setattr(bench_step.Bench, "ours", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    lost = bench_step.Bench(args, CPU, tmp_path).contender("ours plain")
    assert alternate([lost], 1, CPU)["ours plain"].error == "out of memory"


# Scoring -------------------------------------------------------------------------------------------------------------

SCORING = [*MODEL, "--prompt_length", "5", "--completion_length", "6"]


def test_scoring_report(tmp_path: Path) -> None:
    flags = [*SCORING, "--per_device_train_batch_size", "2", "--reference_lengths", "20", "300"]
    assert main(["scoring", *flags, "--repetitions", "1", "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "scoring.json").read_text())
    assert list(report["references"]) == ["20", "300"] and report["settings"]["reference_lengths"] == [20, 300]
    for contenders in report["references"].values():
        assert list(contenders) == ["separate", "shared prefix"]
        assert all(result["error"] is None and result["seconds"][0] > 0 for result in contenders.values())
    assert "| 300 | shared prefix |" in (tmp_path / "scoring.md").read_text()


@pytest.mark.parametrize("same", [False, True], ids=["own", "same"])
def test_scoring_contenders_run_what_they_say(tmp_path: Path, same: bool) -> None:
    # four rows: batches of two pairs, so that rows with the same reference run it once in each of two batches
    flags = ["--per_device_train_batch_size", "4", *(["--same_reference", "true"] * same)]
    args = measure.parse(bench_scoring.ScoringArguments, [*SCORING, *flags])
    trainer = bench_scoring.make_trainer(args, CPU, tmp_path)
    scoring_pass = bench_scoring.ScoringPass(trainer, args, 300)
    # base 5 + 6; teacher and reference-only end in 16 tokens and 6; what is run after what was seen
    apart, branches = [(0, 300 + 5 + 22), (0, 300 + 22)] * 4, [(300, 5 + 22), (300, 22)] * 4
    prefixes = [(0, 300)] * (2 if same else 4)
    runs = {"separate": apart, "shared prefix": prefixes + branches}
    for contender in map(scoring_pass.contender, runs):
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


# Everything that only a GPU can show ---------------------------------------------------------------------------------


def test_gpu_report_of_the_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["gpu", "--preset", "toy", "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    parts = ["tests", "train", "loss", "loss", "step", "long"]
    assert [command["part"] for command in report["commands"]] == parts
    assert all(command["status"] == "ok" and len(command["table"]) > 1 for command in report["commands"])
    assert report["environment"]["torch"].startswith(torch.__version__)
    text = (tmp_path / "REPORT.md").read_text()
    for row in ("1 | pytest | pytest | 1 | 0 | 0 | 0", "2 | random weights | step 2", "3 | frozen head | TRL plain"):
        assert f"| {row} |" in text
    assert text.count("python -m ") == len(parts)
    *_, ours, public = report["commands"][-1]["table"]
    speed = report["commands"][-1]["table"][0].index("student tokens/s")
    assert ours[0] == "ours purified" and float(ours[speed]) > 0 and public[speed] == "3325"


def test_gpu_continues_past_a_failing_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no tests here: pytest's process fails
    assert main(["gpu", "--preset", "toy", "--output_dir", "out", "--parts", "tests", "loss"]) == 1
    status = [command["status"] for command in json.loads(Path("out/report.json").read_text())["commands"]]
    assert status == ["failed: exit status 4, see tests-pytest.log", "ok", "ok"]
    assert "tests, pytest: failed" in capsys.readouterr().out
    assert main(["gpu", "--preset", "toy", "--output_dir", "late", "--parts", "loss", "--time_limit", "0"]) == 1
    assert "not started, the time limit is over" in Path("late/REPORT.md").read_text()


def test_gpu_names_our_contender_that_failed(tmp_path: Path) -> None:
    def error_of(**errors: str | None) -> str | None:
        contenders = {name.replace("_", " "): {"error": error} for name, error in errors.items()}
        (tmp_path / "x.json").write_text(json.dumps({"contenders": contenders, "table": [["contender"]]}))
        command = gpu.Command("loss", "x", ["json.tool", "--help"], lambda out: gpu.bench_table(out / "x.json"))
        gpu.execute(command, tmp_path, float("inf"), in_process=False)
        return command.status

    assert error_of(ours_plain=None, TRL_plain="out of memory") == "ok"  # a finding, not a failure
    assert error_of(ours_plain="out of memory") == "failed: RuntimeError: ours plain: out of memory"


def test_gpu_commands_of_an_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They parse, and there is a row for each of what the paper's batch is measured on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = gpu.commands(gpu.GpuArguments(output_dir=str(tmp_path)))
    assert len({command.text for command in made}) == len(made) == 2 + 2 + 4 * 3 + 2
    for command in made:
        if command.argv[0] == "purified_opsd_trl.cli":
            kind = {"loss": bench_loss.LossArguments, "step": bench_step.StepArguments}[command.argv[2]]
            args = measure.parse(kind, command.argv[3:])
            assert args.device == "cuda" and args.dtype == "bfloat16"
            if isinstance(args, bench_step.StepArguments):
                tokens = args.prompt_length + args.completion_length
                assert (args.rows, tokens, args.lora_r) == (
                    (32, 1280, 64) if command.part == "step" else (1, 16384, 16)
                )


def test_gpu_refuses_what_it_cannot_run() -> None:
    with pytest.raises(InputError, match="there is no part 'all'; there are: tests, train, loss, step, long"):
        main(["gpu", "--preset", "toy", "--parts", "all"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="finds no CUDA device; use --preset toy"):
            main(["gpu"])


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
    result, one, two = (Contender("a", lambda: None, seconds=s) for s in ([1.0, 2.0, 3.0, 4.0, 9.0], [1.0], [2.0]))
    assert result.median("seconds") == 3.0 and result.spread("seconds") == (2.0, 4.0)
    assert one.spread("seconds") == (1.0, 1.0)
    assert measure.show_time(result, "seconds") == "3000 [2000, 4000]"
    assert measure.show_ratio(result, two, "seconds") == "1.50"
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss", "--output", "x"], "`output` is now called `output_dir`"),
        (["loss", "--hidden=8"], "`hidden` is now called `hidden_size`"),
        (["step", "--lora-rank", "8"], "`lora_rank` is now called `lora_r`"),
        (["step", "--rows", "8"], "`rows` is now called `per_device_train_batch_size`"),
        (["scoring", "--references", "8"], "`references` is now called `reference_lengths`"),
        (["loss", "--preset", "tpu"], "`preset` must be one of cpu, gpu, got 'tpu'"),
        (["step", "--prompt_length", "0"], "`prompt_length` must be at least 1, got 0"),
        (["loss", "--tokns", "8"], "There is no option `tokns`. Did you mean `tokens`?"),
    ],
)
def test_names_and_values_that_cannot_be_used(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        main(words)
    assert message in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", "loss", *TINY, "--device", "cuda"]) == 2
    assert "finds no CUDA device; use --device cpu" in capsys.readouterr().err


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["speed"])
    assert status.value.code == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "option"), [*((n, "--repetitions") for n in ("loss", "scoring", "step")), ("gpu", "--parts")]
)
def test_help(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main([name, "--help"])
    assert status.value.code == 0
    assert option in capsys.readouterr().out
