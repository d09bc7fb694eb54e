"""
`purified-opsd bench gpu`: everything that only a GPU can show, in one report.

Each command runs in a process of its own, so that one that fails leaves the others alone. The preset `toy` runs the
same parts on a CPU at sizes that show nothing; its benchmarks run in this process, whose imports cost more than they.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from xml.etree import ElementTree

import torch

from ..arguments import check_types
from ..env import environment
from ..errors import InputError
from . import main, measure
from .measure import option
from .step import CONTENDERS, Bench, StepArguments


PARTS = {
    "tests": "Tests that need a GPU",
    "train": "A training run in bf16",
    "loss": "The loss",
    "step": "Optimization steps of the paper's batch and lengths",
    "long": "LoRA of rank 16 at 16,384 tokens",
}
_TESTS = "tests/test_gpu.py"
_DEMO = Path(".cache/smollm2-135m-instruct"), Path(".cache/gsm_symbolic")
_NOTES = {
    "train": "The demo's model, if `make demo` has put it into .cache; else random weights.",
    "step": "MFU: model FLOPs, without recomputation, by the rate of a large matrix product in the same process.",
    "long": "A public trainer (prime-rl) reports 13,300 (0.6B) and 6,200 (4B) tokens per second for one model and one "
    "context on an H100. A purified step makes four passes, so a quarter of that compares with ours.",
}
_PUBLIC_SPEED = {"Qwen3-0.6B": 13_300, "Qwen3-4B": 6_200, "toy": 13_300}  # tokens per second; toy: for its report
_TOY_STEP = (
    "--num_hidden_layers 1 --hidden_size 32 --intermediate_size 96 --num_attention_heads 2 --num_key_value_heads 1 "
    "--head_dim 16 --vocab_size 1100 --per_device_train_batch_size 2 --prompt_length 5 --reference_length 7 "
    "--completion_length 6 --repetitions 1"
)


@dataclass
class GpuArguments:
    """Run everything that only a GPU can show, and write one report."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"h100": {}, "toy": {}}

    preset: Literal["h100", "toy"] = option("h100", "toy: the same parts on a CPU, at sizes that show nothing.")
    output_dir: str = option("outputs/gpu", "Folder of REPORT.md, report.json and the logs.")
    parts: list[str] = option(list(PARTS), f"Only these: {', '.join(PARTS)}.")
    time_limit: float = option(20.0, "Minutes after which nothing is started and what runs is stopped.")

    def __post_init__(self) -> None:
        check_types(self)
        for part in self.parts:
            if part not in PARTS:
                raise InputError(f"`parts`: there is no part {part!r}; there are: {', '.join(PARTS)}.")
        if self.preset == "h100" and not torch.cuda.is_available():
            raise InputError(f"`preset: h100`: torch {torch.__version__} finds no CUDA device; use --preset toy.")


@dataclass
class Command:
    """One command, and what came of it."""

    part: str
    name: str
    argv: list[str]  # after `python -m`
    read: Callable[[Path], measure.Table]  # the table of its results
    status: str = "not run"
    seconds: float = 0.0
    table: measure.Table = field(default_factory=list)

    @property
    def text(self) -> str:
        return shlex.join(["python", "-m", *self.argv])


def commands(args: GpuArguments) -> list[Command]:
    """All commands of the parts asked for, in order."""
    toy, out = args.preset == "toy", Path(args.output_dir)
    made: list[Command] = []

    def bench(part: str, name: str, words: str, *more: str) -> None:
        folder = out / f"{part}-{name}".replace(" ", "-")
        argv = ["purified_opsd_trl.cli", "bench", *words.split(), *more, "--output_dir", str(folder)]
        speed = _PUBLIC_SPEED[name] / 4 if part == "long" else None
        made.append(Command(part, name, argv, lambda _: bench_table(folder / f"{words.split()[0]}.json", speed)))

    selected = ["-k", "loss_memory and cpu"] if toy else ["-m", "gpu", "tests/test_kernels.py"]
    argv = ["pytest", "-q", _TESTS, *selected, f"--junit-xml={out / 'tests.xml'}"]
    made.append(Command("tests", "pytest", argv, lambda _: _test_table(out / "tests.xml")))
    made.append(_training(toy, out))
    for head in ("frozen", "trainable"):
        sizes = "--tokens 7 --hidden_size 8 --vocab_size 50 --repetitions 1" if toy else "--preset gpu"
        bench("loss", f"{head} head", f"loss {sizes} --head {head}")
    if toy:
        bench("step", "toy", f"step {_TOY_STEP} --gradient_accumulation_steps 2 --gradient_checkpointing true")
        bench("long", "toy", f"step {_TOY_STEP} --completion_length 64", "--contenders", "ours purified")
        return [command for command in made if command.part in args.parts]
    for model in ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B"):
        for contender in CONTENDERS:  # alone, so that its memory is its own
            bench("step", f"{model} {contender}", f"step --preset {model} --repetitions 2 --contenders", contender)
    one_row = "--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --completion_length 16128"
    for model in ("Qwen3-0.6B", "Qwen3-4B"):
        words = f"step --preset {model} --lora_r 16 {one_row} --repetitions 2 --contenders"
        bench("long", model, words, "ours purified")
    return [command for command in made if command.part in args.parts]


def _training(toy: bool, out: Path) -> Command:
    """The demo's model and data where they are on this machine, else random ones."""
    demo = not toy and all(path.exists() for path in _DEMO)
    model, data = _DEMO if demo else (out / "random_model", out / "random_model" / "rows.jsonl")
    settings = {
        **{"model_name_or_path": model, "dataset_name": data, "output_dir": out / "train"},
        **{"dataset_prompt_column": "prompt", "dataset_reference_column": "reference"},
        **{"use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear", "report_to": "none"},
        **{"dtype": "float32" if toy else "bfloat16", "bf16": not toy, "use_cpu": toy, "max_steps": 2 if toy else 20},
        **{"per_device_train_batch_size": 2 if toy else 8, "max_completion_length": 8 if toy else 64},
        **{"learning_rate": 5e-4, "lr_scheduler_type": "constant", "logging_steps": 1, "disable_tqdm": True},
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    name = "SmolLM2-135M-Instruct" if demo else "random weights"

    def read(_: Path) -> measure.Table:
        states = (out / "train").glob("checkpoint-*/trainer_state.json")
        state = max(states, key=lambda path: path.stat().st_mtime)  # an earlier run may have left another
        logs = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        kl = "purification/kl_target_student"
        columns = {"loss": "loss", "KL(target || student)": kl, "scoring, s": "scoring/seconds"}
        rows = [[f"step {entry['step']}", *(f"{entry[key]:.4g}" for key in columns.values())] for entry in logs]
        return [["", *columns], rows[0], rows[-1]]

    return Command("train", name, ["purified_opsd_trl.train", *words], read)


def _write_random_model(folder: Path) -> None:
    sizes = StepArguments(vocab_size=1003, num_hidden_layers=2, prompt_length=16, per_device_train_batch_size=64)
    with contextlib.redirect_stdout(io.StringIO()):
        made = Bench(sizes, torch.device("cpu"), folder)
        made.model().save_pretrained(folder)
    made.tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}"
    made.tokenizer.save_pretrained(folder)
    made.dataset.to_json(folder / "rows.jsonl")


def bench_table(path: Path, public_speed: float | None = None) -> measure.Table:
    """The table of a benchmark, with a public trainer's tokens per second where they are known."""
    report = json.loads(path.read_text())
    for name, one in report["contenders"].items():
        if one["error"] is not None and name.startswith("ours"):
            raise RuntimeError(f"{name}: {one['error']}")
    table: measure.Table = report["table"]
    if public_speed is None:
        return table
    speeds = {"student tokens/s": f"{public_speed:.0f}"}
    return [*table, ["public trainer, a quarter", *(speeds.get(name, "-") for name in table[0][1:])]]


def _test_table(path: Path) -> measure.Table:
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    if count["skipped"] == count["tests"]:
        raise RuntimeError(f"none of {count['tests']} tests ran")
    return [["", *count], ["pytest", *map(str, count.values())]]


def execute(command: Command, out: Path, deadline: float, in_process: bool) -> None:
    """Runs a command, and notes its status and its table. Nothing that it does ends this process."""
    log, began = out / f"{command.part}-{command.name}.log".replace(" ", "-"), time.monotonic()
    if began >= deadline:
        command.status = "failed: not started, the time limit is over"
        return
    try:
        with log.open("w", encoding="utf-8") as file:
            if in_process:
                with contextlib.redirect_stdout(file):
                    main(command.argv[2:])
            else:
                argv, limit = [sys.executable, "-m", *command.argv], deadline - began
                subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=True, env=_environ())
        command.table = command.read(out)
        command.status = "ok"
    except subprocess.TimeoutExpired:
        command.status = "failed: stopped by the time limit"
    except subprocess.CalledProcessError as error:
        command.status = f"failed: exit status {error.returncode}, see {log.name}"
    except Exception as error:  # a benchmark, or a file that it did not write
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        command.status = f"failed: {' '.join(f'{type(error).__name__}: {error}'.split())}"
    command.seconds = time.monotonic() - began


def _environ() -> dict[str, str]:
    """No network, and one GPU: on several the trainer would spread itself."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": device}


def report(done: list[Command], found: dict[str, str]) -> str:
    """The Markdown report: device and versions, status, a table per part, and the command of each row."""
    lines = ["# What a GPU shows", "", *(f"- {name}: {text}" for name, text in found.items()), ""]
    status = [["#", "part", "what", "seconds", "status"]]
    status += [[str(i), c.part, c.name, f"{c.seconds:.0f}", c.status] for i, c in enumerate(done, 1)]
    lines += measure.markdown(status)
    for part in dict.fromkeys(command.part for command in done):
        lines += ["", f"## {PARTS[part]}", "", *([_NOTES[part], ""] if part in _NOTES else [])]
        tables = [(i, c) for i, c in enumerate(done, 1) if c.part == part and c.table]
        for i, command in tables[:1]:
            rows = [[str(i), c.name, *row] for i, c in tables for row in c.table[1:]]
            lines += measure.markdown([["#", "what", *command.table[0]], *rows])
        lines += ["", "```text", *(f"{i}: {c.text}" for i, c in enumerate(done, 1) if c.part == part), "```"]
    return "\n".join(lines) + "\n"


def run(argv: Sequence[str]) -> int:
    """Runs the parts; the exit status is 1 if one of them failed."""
    args = measure.parse(GpuArguments, argv)
    deadline, out = time.monotonic() + 60 * args.time_limit, Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    done, found = commands(args), environment()
    if "train" in args.parts:
        _write_random_model(out / "random_model")
    for i, command in enumerate(done, 1):
        print(f"{i}/{len(done)} {command.part}, {command.name}: {command.text}", flush=True)
        in_process = args.preset == "toy" and command.argv[0] == "purified_opsd_trl.cli"
        execute(command, out, deadline, in_process)
        print(f"    {command.status}, {command.seconds:.0f} s", flush=True)
        results: list[dict[str, Any]] = [
            {name: value for name, value in vars(c).items() if name != "read"} for c in done[:i]
        ]
        (out / "report.json").write_text(json.dumps({"environment": found, "commands": results}, indent=2) + "\n")
        (out / "REPORT.md").write_text(report(done[:i], found), encoding="utf-8")
    failed = [command for command in done if command.status != "ok"]
    print(f"Written to {out / 'REPORT.md'} and {out / 'report.json'}")
    for command in failed:
        print(f"{command.part}, {command.name}: {command.status}")
    return int(bool(failed))
