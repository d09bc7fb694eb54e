"""What the monitors hand to the loggers, and their means over processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import free_port
from tests.trainer_cases import Build


def test_the_per_token_table_is_kept_with_the_completions(build: Build) -> None:  # noqa: F811
    trainer = build(max_steps=1, log_completions=True, decomposition_max_tokens=6)
    trainer.train()
    frame = pd.read_parquet(Path(trainer.args.output_dir, "completions", "tokens_00001.parquet"))
    assert len(frame) == 6
    assert set(frame.columns) == {"step", "token", "class", "third", "delta_total", "delta_ref", "delta_it"}
    assert (frame["delta_total"] - frame["delta_ref"] - frame["delta_it"]).abs().max() < 1e-4


def test_the_per_token_table_reaches_wandb(
    build: Build,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = build(max_steps=1, log_completions=True, decomposition_max_tokens=6, report_to="wandb")
    trainer.train()
    folder = Path(wandb.run.dir)  # a run of an earlier test may have chosen where
    wandb.finish()
    (table,) = folder.rglob("token_decomposition*.json")
    content = json.loads(table.read_text())
    assert len(content["data"]) == 6 and "delta_it" in content["columns"]


def test_trackio_gets_the_numbers_and_the_table(
    build: Build,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    trainer = build(
        max_steps=1, log_completions=True, decomposition_max_tokens=6, report_to="trackio", run_name="one", project="p"
    )
    trainer.train()
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("p", "one")
    logged = trainer.state.log_history[0]
    numbers = {name: value for entry in logs for name, value in entry.items()}
    for name in ("purification/mass_cos_total_ref", "epistemic/total_per_1k"):
        assert numbers[f"train/{name}"] == pytest.approx(logged[name], rel=1e-6)
    assert "token_decomposition" in numbers


WORKER = """
import json, os, sys, torch
from datasets import Dataset
from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer
from tests.trainer_cases import fixed_rollout, move_student
torch.set_num_threads(1)
model, folder, batch = sys.argv[1:]
rows = [{"prompt": f"What is {i} + {i * i}" + " now" * i + "?", "reference": f"It is {i + i * i}."} for i in range(8)]
args = PurifiedOPSDConfig(
    folder, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    save_strategy="no", logging_steps=1, max_steps=2, per_device_train_batch_size=int(batch),
    max_completion_length=8, decomposition_steps=1, shuffle_dataset=False, model_init_kwargs={"dtype": "float32"},
)
trainer = PurifiedOPSDTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows))
assert trainer.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
move_student(trainer)
fixed_rollout(trainer)
trainer.train()
if trainer.accelerator.is_main_process:
    print("LOGS" + json.dumps(trainer.state.log_history))
if trainer.accelerator.num_processes > 1:
    torch.distributed.destroy_process_group()
"""


def logs_of(model_dir: Path, folder: Path, processes: int) -> list[dict[str, Any]]:
    port = free_port()
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    if processes > 1:
        env |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, str(model_dir), str(folder), str(4 // processes)]
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} if processes > 1 else {} for r in range(processes)]
    running = [
        subprocess.Popen(command, env=env | rank, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    outputs = [process.communicate(timeout=400) for process in running]
    assert all(process.returncode == 0 for process in running), outputs[0][1][-3000:]
    return json.loads(outputs[0][0].split("LOGS")[1].splitlines()[0])


@pytest.mark.slow
def test_two_processes_report_the_means_of_one(model_dir: Path, tmp_path: Path) -> None:
    alone, together = (logs_of(model_dir, tmp_path / str(n), n)[0] for n in (1, 2))
    shared = [name for name in alone if name.startswith(("purification/", "epistemic/", "completions/"))]
    assert len(shared) > 40
    for name in shared:
        assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


def test_tensorboard_gets_the_same_numbers(build: Build) -> None:  # noqa: F811
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = build(max_steps=1, report_to="tensorboard")
    trainer.train()
    (events,) = Path(trainer.args.output_dir).rglob("events.out.tfevents.*")
    reader = accumulator.EventAccumulator(str(events))
    reader.Reload()
    logged = trainer.state.log_history[0]
    for name in ("purification/mass_cos_total_ref", "epistemic/total_per_1k", "completions/distinct_2"):
        assert reader.Scalars(f"train/{name}")[0].value == pytest.approx(logged[name], rel=1e-6)
