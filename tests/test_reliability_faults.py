"""Kills, signals, full disks and second processes, in real processes: what is lost, and that a run goes on exactly."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from datasets import Dataset
from transformers import TrainerCallback

from purified_opsd_trl.checkpoints import is_complete, last_complete_checkpoint

from .distributed.jobs import Job
from .distributed.worlds import World
from .reliability_cases import KINDS, ROOT, ROWS, build_trainer, outcome


SECONDS = 240  # that a process may take on a busy machine
processes = multiprocessing.get_context("forkserver")  # each child starts with everything imported
processes.set_forkserver_preload([__name__])


class AtStep(TrainerCallback):
    """Does something in the middle of a step, counted from 1."""

    def __init__(self, step: int, action: Callable[[], object]):
        self.step, self.action = step, action

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            self.action()


def no_more_room() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


ACTIONS: dict[str, Callable[[], object]] = {
    "full": no_more_room,
    "hang": lambda: [time.sleep(1) for _ in range(SECONDS)],
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


def train(kind: str, model_dir: Path, run: Path, fault: tuple[int, str] | None = None) -> None:
    """Trains to the end, from the last complete checkpoint if there is one; writes what came out of it."""
    log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    trainer = build_trainer(model_dir, run, save_total_limit=2, **KINDS[kind])
    if fault is not None:
        trainer.add_callback(AtStep(fault[0], ACTIONS[fault[1]]))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(run)[0] is not None)
    weights, averages, losses = outcome(trainer)
    digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in [*weights, *averages])).hexdigest()
    Path(f"{run}.json").write_text(json.dumps([digest, losses]))


def start(*args: Any) -> ForkServerProcess:
    process = processes.Process(target=train, args=args)
    process.start()
    return process


def finish(*args: Any) -> Any:
    """Result of a run that is not disturbed."""
    process = start(*args)
    process.join(SECONDS)
    assert process.exitcode == 0, Path(f"{args[2]}.log").read_text()[-3000:]
    return json.loads(Path(f"{args[2]}.json").read_text())


@contextlib.contextmanager
def ended(process: ForkServerProcess) -> Iterator[ForkServerProcess]:
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("kind", "kills"), [("ema", 2), *(pytest.param(kind, 6, marks=pytest.mark.faults) for kind in KINDS)]
)
def test_killed_at_random_points(
    model_dir: Path, tmp_path: Path, record_property: Callable[[str, object], None], kind: str, kills: int
) -> None:
    record_property("tries", kills)
    straight = tmp_path / "straight"
    begin = time.monotonic()
    expected = finish(kind, model_dir, straight)
    duration = time.monotonic() - begin
    points = random.Random(kind)
    steps = [0]
    for _ in range(kills):
        with ended(start(kind, model_dir, tmp_path / "run")) as process:
            process.join(points.uniform(0.3, 1.0) * duration * 2 / kills)
            assert process.exitcode in (None, 0)
        last, incomplete = last_complete_checkpoint(tmp_path / "run")
        steps.append(int(Path(last).name.split("-")[1]) if last else 0)
        assert steps[-1] >= steps[-2] and len(incomplete) <= 1
    assert finish(kind, model_dir, tmp_path / "run") == expected
    print(f"{kind}: killed after steps {steps[1:]}")


def test_a_signal_in_a_step_saves_it_and_a_full_disk_keeps_the_one_before(model_dir: Path, tmp_path: Path) -> None:
    expected = finish("full", model_dir, tmp_path / "straight")
    run, log = tmp_path / "run", tmp_path / "run.log"
    process = start("full", model_dir, run, (2, "term"))
    process.join(SECONDS)
    assert process.exitcode == 0 and last_complete_checkpoint(run) == (str(run / "checkpoint-2"), [])
    assert f"Stopped by SIGTERM after step 2; {run}/checkpoint-2 is complete. To go on" in log.read_text()
    process = start("full", model_dir, run, (5, "full"))
    process.join(SECONDS)
    assert process.exitcode == 1 and last_complete_checkpoint(run) == (str(run / "checkpoint-4"), ["checkpoint-5"])
    assert finish("full", model_dir, run) == expected
    assert log.read_text().count("(passing over incomplete or damaged: checkpoint-5)") == 1


@pytest.mark.faults
def test_a_second_signal_stops_at_once(model_dir: Path, tmp_path: Path) -> None:
    with ended(start("full", model_dir, tmp_path / "run", (3, "hang"))) as process:
        wait_for(lambda: is_complete(tmp_path / "run" / "checkpoint-2"), "no checkpoint")
        time.sleep(2)
        for _ in range(2):  # a scheduler and its launcher
            os.kill(process.pid, signal.SIGTERM)
        process.join(2.5)
        assert process.exitcode is None
        os.kill(process.pid, signal.SIGTERM)
        process.join(10)
        assert process.exitcode == -signal.SIGTERM
    assert last_complete_checkpoint(tmp_path / "run") == (str(tmp_path / "run" / "checkpoint-2"), [])


@pytest.mark.faults
def test_a_second_process_is_turned_away(model_dir: Path, tmp_path: Path) -> None:
    expected = finish("full", model_dir, tmp_path / "straight")
    first = start("full", model_dir, tmp_path / "run")
    with ended(first):
        wait_for(lambda: last_complete_checkpoint(tmp_path / "run")[0], "no checkpoint")
        second = start("full", model_dir, tmp_path / "run")
        second.join(SECONDS)
        assert second.exitcode == 1
        assert f"process {first.pid} on " in (tmp_path / "run.log").read_text()
        first.join(SECONDS)
        assert first.exitcode == 0
    assert json.loads((tmp_path / "run.json").read_text()) == expected


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.faults
def test_a_full_and_a_read_only_file_system(model_dir: Path, tmp_path: Path, mounted: Path) -> None:
    expected = finish("full", model_dir, tmp_path / "straight")
    process = start("full", model_dir, mounted / "run")
    process.join(SECONDS)
    last, incomplete = last_complete_checkpoint(mounted / "run")
    assert process.exitcode == 1 and last is not None and incomplete
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    command = [sys.executable, "-c", READ_ONLY, str(model_dir), str(mounted / "run")]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "InputError: `output_dir`: cannot write to" in refused.stderr.splitlines()[-1]
    subprocess.run(["mount", "-o", "remount,rw,size=100m", mounted], check=True)
    assert finish("full", model_dir, mounted / "run") == expected


READ_ONLY = "import sys; from tests.reliability_cases import *; build_trainer(*map(Path, sys.argv[1:])).train(True)"


class Usage(TrainerCallback):
    """Memory in MB, open files, and processor seconds per step since the last note, every 100 steps."""

    def __init__(self) -> None:
        self.noted: list[list[float]] = []
        self.since = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % 100 == 0:
            process, now = psutil.Process(), time.process_time()
            self.noted.append([process.memory_info().rss / 2**20, process.num_fds(), (now - self.since) / 100])
            self.since = now


def train_long(model_dir: Path, run: Path, steps: int) -> None:
    usage = Usage()
    fields = {"save_steps": 100, "save_total_limit": 2, "logging_steps": 10, "gradient_accumulation_steps": 1}
    trainer = build_trainer(model_dir, run, max_steps=steps, **fields)
    trainer.add_callback(usage)
    trainer.train()
    Path(f"{run}.json").write_text(json.dumps(usage.noted))


@pytest.mark.faults
def test_a_long_run_stays_flat(model_dir: Path, tmp_path: Path) -> None:
    process = processes.Process(target=train_long, args=(model_dir, tmp_path / "run", 2000))
    process.start()
    process.join()
    memory, files, seconds = zip(*json.loads((tmp_path / "run.json").read_text()), strict=True)
    slope = statistics.linear_regression(range(len(memory) - 5), memory[5:]).slope
    size = (tmp_path / "run" / "checkpoint-2000" / "trainer_state.json").stat().st_size
    first, last = statistics.median(seconds[5:10]), statistics.median(seconds[-5:])
    print(f"memory {memory[5]:.0f} to {memory[-1]:.0f} MB, {slope:+.2f} MB per 100 steps; {files[-1]:.0f} open files")
    print(f"{1000 * first:.0f} to {1000 * last:.0f} ms of processor time per step")
    assert slope < 1.0 and files[-1] <= files[1]
    assert last < 1.2 * first  # shared processors vary by some percent
    assert size < 2_000 * 2000 / 10  # bytes per logged step


# The command line ----------------------------------------------------------------------------------------------------


def command(model_dir: Path, folder: Path, *further: str) -> list[str]:
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "reference": row["reference"]} for row in ROWS]
    Dataset.from_list(rows).to_json(folder / "data.jsonl")
    recipe = {
        **{"model_name_or_path": str(model_dir), "dataset_name": str(folder / "data.jsonl"), "dtype": "float32"},
        **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False},
        **{"max_completion_length": 8, "per_device_train_batch_size": 2, "save_strategy": "no", "max_steps": 4000},
        **{"output_dir": str(folder / "run"), "logging_steps": 1, "dataloader_pin_memory": False},
        **{"num_processes": 1, "mixed_precision": "no", "lr_scheduler_type": "constant"},
        "log_style": "dict",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [
        *(sys.executable, "-m", "purified_opsd_trl.cli", "train", "--config", str(folder / "recipe.yaml")),
        *further,
    ]


def heed_signals() -> None:
    """Undoes what nohup, or a shell that starts the tests in the background, has set to be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.mark.parametrize(
    ("name", "number"),
    [("SIGTERM", 1), *(pytest.param(n, p, marks=pytest.mark.faults) for n in ("SIGINT", "SIGHUP") for p in (1, 2))],
)
def test_a_signal_to_the_command_reaches_every_process(
    model_dir: Path, tmp_path: Path, name: str, number: int
) -> None:
    two = ["--accelerate_config", str(ROOT / "recipes" / "accelerate_configs" / "cpu.yaml")]
    further = two if number == 2 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log.txt", "wb") as log:
        parent = subprocess.Popen(
            command(model_dir, tmp_path, *further),
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=heed_signals,
        )
    text = lambda: (tmp_path / "log.txt").read_text(errors="replace")  # noqa: E731
    started: list[psutil.Process] = []
    try:
        wait_for(lambda: "'loss':" in text() or parent.poll() is not None, "no step")
        started = psutil.Process(parent.pid).children(recursive=True)
        assert sum("purified_opsd_trl.train" in process.cmdline() for process in started) >= number
        parent.send_signal(signal.Signals[name])
        assert parent.wait(60) == 0, text()[-3000:]
        assert not [process for process in started if process.is_running()]
        last, incomplete = last_complete_checkpoint(tmp_path / "run")
        assert last is not None and not incomplete
        step = Path(last).name.removeprefix("checkpoint-")
        assert text().count(f"Stopped by {name} after step {step};") == 1 and "Traceback" not in text()
        assert not (tmp_path / "run" / "model.safetensors").exists()  # as after an end
    finally:
        for process in [*started, parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        parent.wait()


def test_an_error_of_two_processes_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    two = ["--accelerate_config", str(ROOT / "recipes" / "accelerate_configs" / "cpu.yaml")]
    words = command(model_dir, tmp_path, *two)
    with open(tmp_path / "data.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": [{"role": "user", "content": "what is 1 + 8?"}], "reference": None}) + "\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS)
    said = [line for line in (result.stdout + result.stderr).splitlines() if "error" in line.lower()]
    assert result.returncode == 2 and len(said) == 1, result.stdout + result.stderr
    assert said[0].startswith("error: ") and "`reference`" in said[0] and "line 17" in said[0]
    assert "Traceback" not in result.stdout + result.stderr


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_the_others_end_when_a_process_dies(model_dir: Path, tmp_path: Path) -> None:
    job = Job("killed", "base", False, stages=("checkpoints", "sample", "die_in_step"))
    world = World("ddp", [job], model_dir, tmp_path).start()
    try:
        assert world.processes[0].wait(SECONDS) == -signal.SIGKILL
        assert world.processes[1].wait(60) not in (0, None)
    finally:
        world.kill()
    assert last_complete_checkpoint(tmp_path / "killed" / "run")[0] == str(
        tmp_path / "killed" / "run" / "checkpoint-2"
    )
