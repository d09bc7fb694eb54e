"""Two processes under each backend against one process on the same data, and against themselves after a resume."""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from purified_opsd_trl.checkpoints import last_complete_checkpoint

from .jobs import PROBE, Job, job_name, run
from .worlds import BACKENDS, STARTUP, WATCHDOG, World


CELLS = tuple(itertools.product(("base", "live", "ema"), (True, False)))
# What every run of the suite covers: each backend, each teacher, and each of LoRA and full fine-tuning
DIAGONAL = {
    "ddp": (("ema", False),),
    "zero1": (("live", True),),
    "zero2": (("base", False),),
    "zero3": (("ema", True), ("base", False)),
    "fsdp2": (("ema", False), ("base", True)),
}
SHARDED = ("zero3", "fsdp2")
MIDDLE = "checkpoint-6"  # of the second of three epochs of four steps


def parity(kind: str, lora: bool) -> Job:
    return Job(job_name(kind, lora), kind, lora, stages=("evaluate", "save"))


def skewed(kind: str, lora: bool) -> Job:
    return Job(f"{job_name(kind, lora)}-skewed", kind, lora, data="skewed")


def in_parts(kind: str, lora: bool, micro_batches: int) -> Job:
    name = f"{job_name(kind, lora)}-parts-{micro_batches}"
    return Job(name, kind, lora, data="skewed", stages=("evaluate",), parts=micro_batches)


def straight(kind: str, lora: bool) -> Job:
    return Job(f"{job_name(kind, lora)}-straight", kind, lora, data="epochs", stages=("checkpoints", "sample"))


def resumed(kind: str, lora: bool) -> Job:
    name, checkpoint = job_name(kind, lora), f"{straight(kind, lora).name}/run/{MIDDLE}"
    return Job(f"{name}-resumed", kind, lora, data="epochs", stages=("checkpoints", "sample"), resume=checkpoint)


def cases(marked: bool) -> list[Any]:
    """(backend, cells of its world, cell): the diagonal, and behind a marker each backend with all cells."""
    selected = {backend: CELLS for backend in BACKENDS} if marked else DIAGONAL
    marks = [pytest.mark.distributed] if marked else []
    return [
        pytest.param(backend, cells, cell, marks=marks, id=f"{backend}-{job_name(*cell)}")
        for backend, cells in selected.items()
        for cell in cells
    ]


every_cell = pytest.mark.parametrize(("backend", "cells", "cell"), cases(marked=False) + cases(marked=True))
Together = Callable[[str, tuple[Job, ...]], World]
Alone = Callable[[Job], dict[str, Any]]


def world_of(together: Together, backend: str, cells: tuple[tuple[str, bool], ...]) -> World:
    jobs = [parity(*cell) for cell in cells] + [job(*cells[0]) for job in (skewed, straight, resumed)]
    jobs += [in_parts(*cells[0], micro_batches) for micro_batches in (1, 2)]
    return together(backend, tuple(jobs))


def assert_same_losses(expected: dict[str, Any], figures: list[dict[str, Any]], steps: int = 4) -> None:
    assert expected["steps"] == figures[0]["steps"] == steps
    own = ("entropy",) if steps == 4 else ()  # TRL's is a mean over micro-batches, not over tokens
    for one, two in zip(expected["logs"], figures[0]["logs"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["loss"] > 1e-4  # a loss of zero would agree with anything
        for name in one:
            if name.startswith("purification/") or name in ("num_tokens", "completions/mean_length", *own):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


@every_cell
def test_losses_and_metrics_are_those_of_one_process(
    together: Together, alone: Alone, backend: str, cells: Any, cell: tuple[str, bool]
) -> None:
    figures = world_of(together, backend, cells).figures(job_name(*cell))
    expected = alone(parity(*cell))
    assert_same_losses(expected, figures)
    # five rows, one a forward: the second process repeats a row, which must not count
    assert figures[0]["eval"]["eval_loss"] == pytest.approx(expected["eval"]["eval_loss"], abs=1e-5)


@every_cell
def test_saved_weights_reload(
    together: Together, alone: Alone, model_dir: Path, backend: str, cells: Any, cell: tuple[str, bool]
) -> None:
    world = world_of(together, backend, cells)
    saved = world.folder / job_name(*cell) / "saved"
    if cell[1]:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"), saved)
        assert [folder.name for folder in saved.iterdir() if folder.is_dir()] == []  # no second adapter
    else:
        model = AutoModelForCausalLM.from_pretrained(saved, dtype="float32")
    with torch.no_grad():
        logits = model.eval()(input_ids=PROBE).logits.flatten()
    initial = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")(input_ids=PROBE).logits.flatten()
    assert (logits - initial).abs().max() > 1e-3  # it has learned
    for figures in world.figures(job_name(*cell)):
        torch.testing.assert_close(torch.tensor(figures["logits"]), logits, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(alone(parity(*cell))["logits"]), logits, rtol=0.0, atol=1e-3)


@every_cell
def test_weights_are_sharded_and_frozen_ones_have_no_optimizer_state(
    together: Together, backend: str, cells: Any, cell: tuple[str, bool]
) -> None:
    for figures in world_of(together, backend, cells).figures(job_name(*cell)):
        here, whole = figures["student_elements"]
        # every parameter is split in two, but for one element where its size is odd
        assert here <= 0.51 * whole if backend in SHARDED else here == whole
        assert ("teacher_elements" in figures) == (cell[0] != "live" and not cell[1])
        if "teacher_elements" in figures:
            assert figures["teacher_elements"] == [here, whole]
            assert not figures["teacher_trains"]
            assert not figures["teacher_has_optimizer"]
            assert not figures["teacher_is_optimized"]


@every_cell
def test_rows_of_very_different_length_neither_hang_nor_change_the_loss(
    together: Together, alone: Alone, backend: str, cells: Any, cell: tuple[str, bool]
) -> None:
    if cell != cells[0]:
        pytest.skip("one cell a backend")
    # the second process scores a few short rows where the first scores long ones, and has one token where it has eight
    job = skewed(*cell)
    assert_same_losses(alone(job), world_of(together, backend, cells).figures(job.name))


@every_cell
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_packed_parts_give_the_losses_and_gradients_of_padding(
    together: Together, alone: Alone, backend: str, cells: Any, cell: tuple[str, bool], micro_batches: int
) -> None:
    if cell != cells[0]:
        pytest.skip("one cell a backend")
    # with one micro-batch the first process has two long rows, so two parts, where the second would have one
    job = in_parts(*cell, micro_batches)
    expected, figures = alone(job), world_of(together, backend, cells).figures(job.name)
    assert_same_losses(expected, figures, steps=4 // micro_batches)
    for one, two in zip(expected["logs"], figures[0]["logs"], strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert one["training/padding_ratio"] > two["training/padding_ratio"] == 1.0
    assert figures[0]["eval"]["eval_loss"] == pytest.approx(expected["eval"]["eval_loss"], abs=1e-5)


@pytest.mark.distributed
def test_images_give_the_losses_of_one_process(model_dir: Path, tmp_path: Path) -> None:
    # Under DDP processes may have different numbers of images, and one of them none; sharded ones must not (images.md)
    job = Job("images", data="images")
    figures = World("ddp", [job], model_dir, tmp_path / "ddp").start().wait().figures(job.name)
    assert_same_losses(run(job, str(model_dir), tmp_path / "alone" / job.name, 1), figures)


@pytest.mark.distributed
@pytest.mark.parametrize("backend", SHARDED)
def test_a_head_that_is_the_embedding(make_model_dir: Callable[..., Path], tmp_path: Path, backend: str) -> None:
    # One weight, sharded once, with the gradients of both of its uses
    tied, job = make_model_dir(tied=True), parity("base", False)
    figures = World(backend, [job], tied, tmp_path / backend).start().wait().figures(job.name)
    expected = run(job, str(tied), tmp_path / "alone" / job.name, 1)
    assert_same_losses(expected, figures)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / backend / job.name / "saved", dtype="float32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        logits = model.eval()(input_ids=PROBE).logits.flatten()
    torch.testing.assert_close(torch.tensor(figures[0]["logits"]), logits, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(expected["logits"]), logits, rtol=0.0, atol=1e-3)


STATE = ("weights", "optimizer_state", "ema", "rng", "lr")


def assert_same_state(world: World, one: str, two: str, steps: int = 4) -> None:
    """Bit for bit: as many processes, the same operations on the same shapes, and sums of two, in whatever order."""
    for before, after in zip(world.figures(one), world.figures(two), strict=True):
        for name in STATE:
            assert after[name] == before[name], name
        assert before["weights"] and before["optimizer_state"] and after["steps"] == steps
        assert [e["loss"] for e in after["logs"]] == [e["loss"] for e in before["logs"]]


@pytest.mark.parametrize(("backend", "cells"), [pytest.param(b, c, id=b) for b, c in DIAGONAL.items()])
def test_resuming_in_the_middle_of_the_second_epoch_is_exact(together: Together, backend: str, cells: Any) -> None:
    world = world_of(together, backend, cells)
    assert_same_state(world, straight(*cells[0]).name, resumed(*cells[0]).name, steps=12)


@pytest.mark.parametrize(
    ("backend", "cells"),
    [pytest.param(b, c, id=b, marks=[] if b == "ddp" else [pytest.mark.distributed]) for b, c in DIAGONAL.items()],
)
def test_another_number_of_processes_is_refused(
    together: Together, model_dir: Path, tmp_path: Path, backend: str, cells: Any
) -> None:
    kind, lora = cells[0]
    checkpoint = world_of(together, backend, cells).folder / straight(kind, lora).name / "run" / MIDDLE
    job = Job("fewer", kind, lora, data="epochs", resume=str(checkpoint))
    world = World(backend, [job], model_dir, tmp_path, num_processes=1).start()
    try:
        assert [process.wait(STARTUP + WATCHDOG) for process in world.processes] == [1]
    finally:
        world.kill()
    errors = [line for line in world.logs(size=10**7).splitlines() if "Error: " in line]
    assert len(errors) == 1 and f"{checkpoint} was written with 2 processes, this run has 1" in errors[0], errors


def kill_cases() -> list[Any]:
    """Killed while writing under DDP in every run; everything else behind the marker."""
    result = []
    for backend, death, cell in itertools.product(BACKENDS, ("die_in_write", "die_in_step"), CELLS):
        default = (backend, death, cell) == ("ddp", "die_in_write", ("ema", False))
        if default or cell == ("ema", True) or (death == "die_in_write" and cell in (("ema", False), ("base", False))):
            marks = [] if default else [pytest.mark.distributed]
            result.append(pytest.param(backend, death, cell, marks=marks, id=f"{backend}-{death}-{job_name(*cell)}"))
    return result


@pytest.mark.parametrize(("backend", "death", "cell"), kill_cases())
def test_a_killed_job_goes_on_from_the_last_complete_checkpoint(
    model_dir: Path, tmp_path: Path, backend: str, death: str, cell: tuple[str, bool]
) -> None:
    stages = ("checkpoints", "sample")
    World(backend, [Job("killed", *cell, stages=(*stages, death))], model_dir, tmp_path).start().wait_for_death()
    run = tmp_path / "killed" / "run"
    incomplete = "checkpoint-4" if death == "die_in_write" else None
    assert sorted(folder.name for folder in run.glob("checkpoint-*")) == ["checkpoint-2", *filter(None, [incomplete])]

    jobs = [Job("resumed", *cell, stages=stages, resume=True, output="killed"), Job("straight", *cell, stages=stages)]
    world = World(backend, jobs, model_dir, tmp_path).start().wait()
    log = world.logs(size=10**7)
    assert log.count(f"Resuming from {run / 'checkpoint-2'}") == 1  # one process says so
    assert (f"passing over incomplete or damaged: {incomplete}" in log) == (incomplete is not None)
    assert_same_state(world, "straight", "resumed")
    assert (run / "checkpoint-4" / "trainer_state.json").is_file()


KILLS = 4  # of each backend


@pytest.mark.distributed
@pytest.mark.parametrize(("backend", "cells"), [pytest.param(b, c, id=b) for b, c in DIAGONAL.items()])
def test_two_processes_killed_at_random_points_of_three_epochs(
    model_dir: Path, tmp_path: Path, record_property: Callable[[str, object], None], backend: str, cells: Any
) -> None:
    record_property("tries", KILLS)
    uninterrupted = straight(*cells[0])
    log, run = tmp_path / "log_0.txt", tmp_path / "killed" / "run"
    World(backend, [uninterrupted], model_dir, tmp_path).start().wait()
    points, found = random.Random(backend), []
    for _ in range(KILLS):
        last, incomplete = last_complete_checkpoint(run)
        assert len(incomplete) <= 1
        found.append(Path(last).name if last else "nothing")
        done = log.read_text(errors="replace").count("/12 ")  # steps in the log
        world = World(backend, [replace(uninterrupted, name="killed", resume=last)], model_dir, tmp_path).start()
        wait_for_text(world, log, "/12 ", done + points.randint(1, 3))
        time.sleep(points.uniform(0, 0.5))
        world.kill()
    last, _ = last_complete_checkpoint(run)
    assert last is not None and Path(last).name != "checkpoint-12"
    world = World(backend, [replace(uninterrupted, name="killed", resume=last)], model_dir, tmp_path).start().wait()
    assert_same_state(world, uninterrupted.name, "killed", steps=12)
    print(f"{backend}: resumed from", *found, Path(last).name)


def wait_for_text(world: World, log: Path, text: str, count: int) -> None:
    """Waits until a text is in a log so many times."""
    deadline = time.monotonic() + STARTUP + WATCHDOG
    while log.read_text(errors="replace").count(text) < count:
        if time.monotonic() > deadline or any(p.poll() not in (None, 0) for p in world.processes):
            world.kill()
            pytest.fail(f"no {text!r}\n{world.logs()}")
        time.sleep(0.02)


@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=[] if b == "ddp" else [pytest.mark.distributed]) for b in BACKENDS]
)
def test_a_signal_to_one_process_stops_all_after_one_step(model_dir: Path, tmp_path: Path, backend: str) -> None:
    stages = ("checkpoints", "sample")
    World(
        backend, [Job("stopped", "ema", False, stages=(*stages, "stop_in_step"))], model_dir, tmp_path
    ).start().wait()
    run = tmp_path / "stopped" / "run"
    assert sorted(folder.name for folder in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    jobs = [
        Job("resumed", "ema", False, stages=stages, resume=True, output="stopped"),
        Job("straight", "ema", False, stages=stages),
    ]
    world = World(backend, jobs, model_dir, tmp_path).start().wait()
    log = world.logs(size=10**7)
    assert log.count("Stopped by SIGTERM after step 3;") == 1  # one process says so
    assert log.count(f"Resuming from {run / 'checkpoint-3'}") == 1
    assert_same_state(world, "straight", "resumed")


@pytest.mark.distributed
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_process_whose_loss_is_not_finite_stops_all(model_dir: Path, tmp_path: Path, backend: str) -> None:
    job = Job("stopped", "base", True, stages=("checkpoints", "nan_in_step"))
    world = World(backend, [job], model_dir, tmp_path).start()
    try:
        assert [process.wait(STARTUP + WATCHDOG) for process in world.processes] == [1, 1]
    finally:
        world.kill()
    logs = world.logs(size=10**7)
    assert logs.count("FloatingPointError: Step 3: the loss of row 0 of the batch") == 2  # both name the row of one
    assert [folder.name for folder in (tmp_path / "stopped" / "run").glob("checkpoint-*")] == ["checkpoint-2"]
