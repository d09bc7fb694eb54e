"""A stopped run goes on exactly, from its own complete checkpoints alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from purified_opsd_trl import InputError
from purified_opsd_trl.checkpoints import is_complete, last_complete_checkpoint
from purified_opsd_trl.run_identity import RunFolder, difference

from .reliability_cases import KINDS, ROOT, ROWS, NaNTarget, Watched, build_trainer, outcome


# Position in the data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_in_the_second_and_third_epoch_goes_on_exactly(
    model_dir: Path, tmp_path: Path, record_property: Callable[[str, object], None], kind: str
) -> None:
    record_property("tries", 3)
    straight = build_trainer(model_dir, tmp_path / "straight", cls=Watched, **{"save_strategy": "no", **KINDS[kind]})
    straight.train()
    assert sorted(straight.seen) == list(range(1, 13))
    if kind == "packed parts":
        assert straight.forwards > 12  # of the student: a step has more than one
    for epoch in range(3):  # every row once per epoch
        rows = [row for step in range(4 * epoch + 1, 4 * epoch + 5) for row in straight.seen[step]]
        assert sorted(rows) == sorted(row["prompt"] for row in ROWS)

    seen: dict[int, list[str]] = {}
    for dies_at in (7, 9, 12, None):  # in the second epoch, between the second and the third, in the third
        trainer = build_trainer(model_dir, tmp_path / "run", cls=Watched, save_total_limit=2, **KINDS[kind])
        trainer.dies_at = dies_at
        if dies_at is not None:
            with pytest.raises(KeyboardInterrupt):
                trainer.train(resume_from_checkpoint=True if seen else None)
        else:
            trainer.train(resume_from_checkpoint=True)
        assert not seen.keys() & trainer.seen.keys()
        seen |= trainer.seen
    assert seen == straight.seen
    for expected, found in zip(outcome(straight)[:2], outcome(trainer)[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert outcome(trainer)[2] == outcome(straight)[2]
    assert [folder.name for folder in sorted((tmp_path / "run").glob("checkpoint-*"))] == [
        "checkpoint-11",
        "checkpoint-12",
    ]


@pytest.mark.parametrize("changed", [{"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 4}])
def test_another_number_of_rows_per_step_is_refused(model_dir: Path, tmp_path: Path, changed: dict[str, int]) -> None:
    build_trainer(model_dir, tmp_path, max_steps=1).train()
    with pytest.raises(InputError, match="was written with 4 rows per step, this run has 8: some rows would be"):
        build_trainer(model_dir, tmp_path, max_steps=2, **changed).train(resume_from_checkpoint=True)


def test_rows_in_other_portions_of_the_same_step_go_on(model_dir: Path, tmp_path: Path) -> None:
    for stream in (False, True):
        steps = {"max_steps": 7, "stream": stream}
        straight = build_trainer(model_dir, tmp_path / f"straight{stream}", cls=Watched, save_strategy="no", **steps)
        straight.train()
        build_trainer(model_dir, tmp_path / f"run{stream}", **{**steps, "max_steps": 6}).train()
        trainer = build_trainer(
            model_dir,
            tmp_path / f"run{stream}",
            cls=Watched,
            **steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
        )
        trainer.train(resume_from_checkpoint=True)
        assert sorted(trainer.seen[7]) == sorted(straight.seen[7])


# Complete checkpoints ------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut short": lambda c: truncate(c / "model.safetensors"),
    "weights overwritten": lambda c: (c / "model.safetensors").write_bytes(
        b"x" * (c / "model.safetensors").stat().st_size
    ),
    "optimizer cut short": lambda c: truncate(c / "optimizer.pt"),
    "no optimizer": lambda c: (c / "optimizer.pt").unlink(),
    "no scheduler": lambda c: (c / "scheduler.pt").unlink(),
    "no random state": lambda c: (c / "rng_state.pth").unlink(),
    "state is a number": lambda c: (c / "trainer_state.json").write_text("7"),
    "state cut short": lambda c: truncate(c / "trainer_state.json"),
    "run state cut short": lambda c: truncate(c / "run_state.json"),
    "no averaged teacher": lambda c: next(c.glob("*ema*")).unlink(),
}

RESUMING_ONLY = {name for name in DAMAGES if name.startswith(("optimizer", "no ", "run state"))}


@pytest.fixture(scope="module")
def trained(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained")
    build_trainer(model_dir, folder, max_steps=2, teacher_model_kind="ema").train()
    return folder


def copy(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "-r", source, target], check=True)
    return target


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(trained: Path, tmp_path: Path, damage: str) -> None:
    run = copy(trained, tmp_path / "run")
    assert last_complete_checkpoint(run) == (str(run / "checkpoint-2"), [])
    DAMAGES[damage](run / "checkpoint-2")
    assert is_complete(run / "checkpoint-2", to_resume=False) == (damage in RESUMING_ONLY)
    assert last_complete_checkpoint(run) == (str(run / "checkpoint-1"), ["checkpoint-2"])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("weights cut short", "model.safetensors is damaged"),
        ("optimizer cut short", r"optimizer.pt has \d+ bytes instead of \d+"),
        ("no scheduler", "scheduler.pt is missing"),
        ("state is a number", "trainer_state.json is missing or damaged"),
        ("run state cut short", "run_state.json is damaged"),
        ("no averaged teacher", "ema_teacher.safetensors is missing"),
    ],
)
def test_a_checkpoint_that_is_named_must_be_complete(
    model_dir: Path, trained: Path, tmp_path: Path, damage: str, named: str
) -> None:
    checkpoint = copy(trained, tmp_path / "run") / "checkpoint-2"
    DAMAGES[damage](checkpoint)
    trainer = build_trainer(model_dir, tmp_path / "run", max_steps=3, teacher_model_kind="ema")
    with pytest.raises(InputError, match=f"`resume_from_checkpoint`: .*-2 is incomplete or damaged: {named}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(InputError, match="there is no folder .*checkpoint-9"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))


def test_training_falls_back_with_one_line(
    model_dir: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(trained, tmp_path / "run")
    truncate(run / "checkpoint-2" / "optimizer.pt")
    (run / "checkpoint-2" / "model-00002-of-00002.safetensors").write_text("of the killed run")
    trainer = build_trainer(model_dir, run, cls=Watched, max_steps=2, teacher_model_kind="ema")
    trainer.train(resume_from_checkpoint=True)
    assert list(trainer.seen) == [2] and is_complete(run / "checkpoint-2")
    assert not (run / "checkpoint-2" / "model-00002-of-00002.safetensors").exists()
    assert capsys.readouterr().out.count("(passing over incomplete or damaged: checkpoint-2)") == 1


# Whose folder it is --------------------------------------------------------------------------------------------------


def test_another_run_is_refused_in_one_line_that_says_what_differs(
    model_dir: Path, trained: Path, tmp_path: Path
) -> None:
    run = copy(trained, tmp_path / "run")
    for changed, named in (
        ({"target": "teacher"}, "`target` was 'purified' and is 'teacher'"),
        ({"pmi_beta": 0.5}, "`pmi_beta` was 1.0 and is 0.5"),
        ({"teacher_model_kind": "live"}, "`teacher_model_kind` was 'ema' and is 'live'"),
        ({"lora": True}, "`trained_parameters` was"),
        ({"rows": ROWS[::-1]}, "`dataset` was '16 rows, "),
        ({"stream": True}, "`dataset` was '16 rows, .* and is 'stream'"),
        ({"cls": NaNTarget}, "`target` was 'purified' and is 'NaNTarget.target_logits'"),
    ):
        fields = {"max_steps": 3, "teacher_model_kind": "ema", **changed}
        for checkpoint in (True, str(run / "checkpoint-1")):
            with pytest.raises(InputError, match=f"checkpoint-[12] is of another run: .*{named}") as error:
                build_trainer(model_dir, run, **fields).train(resume_from_checkpoint=checkpoint)
            assert "\n" not in str(error.value)
    # what may change: steps, learning rate, saving
    build_trainer(model_dir, run, max_steps=3, teacher_model_kind="ema", learning_rate=1e-4).train(
        resume_from_checkpoint=True
    )


def test_a_new_run_moves_earlier_checkpoints_aside(
    model_dir: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(trained, tmp_path / "run")
    before = (run / "checkpoint-2" / "model.safetensors").read_bytes()
    build_trainer(model_dir, run, max_steps=1, save_total_limit=1, target="teacher").train()
    assert [folder.name for folder in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (run / "earlier-run-1" / "checkpoint-2" / "model.safetensors").read_bytes() == before
    assert is_complete(run / "earlier-run-1" / "checkpoint-1")
    assert f"checkpoint-1, checkpoint-2 of an earlier run moved to {run / 'earlier-run-1'}." in capsys.readouterr().out
    manifest = json.loads((run / "_run.json").read_text())
    assert manifest["checkpoints"] == ["checkpoint-1"] and manifest["identity"]["target"] == "teacher"


def test_rotation_goes_by_step_and_keeps_what_is_of_others(model_dir: Path, trained: Path, tmp_path: Path) -> None:
    run = copy(trained, tmp_path / "run")
    os.rename(run / "checkpoint-1", run / "checkpoint-0")  # complete, of no run: another trainer wrote it
    (run / "checkpoint-0" / "run_state.json").unlink()
    future = (run / "checkpoint-2").stat().st_mtime + 10**6
    os.utime(run / "checkpoint-2", (future, future))  # as if the clock had been set back since
    build_trainer(model_dir, run, max_steps=4, save_total_limit=1, teacher_model_kind="ema").train(
        resume_from_checkpoint=True
    )
    assert sorted(folder.name for folder in run.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-4"]


def test_a_later_checkpoint_of_another_run_is_not_overwritten(model_dir: Path, trained: Path, tmp_path: Path) -> None:
    run = copy(trained, tmp_path / "run")
    copy(run / "checkpoint-1", run / "checkpoint-5")
    state = json.loads((run / "checkpoint-5" / "run_state.json").read_text())
    (run / "checkpoint-5" / "run_state.json").write_text(json.dumps({**state, "run_id": "another"}))
    with pytest.raises(InputError, match="checkpoint-5 in .* is of another run than checkpoint-2"):
        build_trainer(model_dir, run, teacher_model_kind="ema").train(resume_from_checkpoint=str(run / "checkpoint-2"))


HOLD = """
import sys, time
from purified_opsd_trl.run_identity import RunFolder
run = RunFolder(sys.argv[1], {})
run.lock()
print("locked", flush=True)
time.sleep(600)
"""


def test_the_lock_is_held_by_a_live_process_only(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on .* trains in"):
            RunFolder(str(tmp_path), {}).lock()
    finally:
        holder.kill()
        holder.wait()
    run = RunFolder(str(tmp_path), {})
    run.lock()  # taken over from the dead process
    with pytest.raises(InputError, match=f"process {os.getpid()} on"):
        RunFolder(str(tmp_path), {}).lock()
    run.unlock()


def test_an_output_directory_that_cannot_be_written_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="`output_dir`: cannot write to .*file/run"):
        build_trainer(model_dir, tmp_path / "file" / "run").train()


def test_long_values_are_cut_in_the_difference() -> None:
    assert difference({"a": "x" * 99, "b": 1}, {"a": "y", "b": 1}) == f"`a` was '{'x' * 56}... and is 'y'"
