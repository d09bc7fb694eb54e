"""Starts several processes for a plan of jobs, with a watchdog."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ..conftest import free_port
from .jobs import Job


ROOT = Path(__file__).parents[2]
WATCHDOG = 120  # seconds that a job may take
STARTUP = 120  # seconds that the imports may take on a busy machine
BACKENDS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
EXPECTED_TYPE = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def need(backend: str) -> None:
    """Skips the test where the backend's package is not installed."""
    if backend.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (`pip install -e '.[deepspeed]'`)")


def environment(backend: str, folder: Path) -> dict[str, str]:
    """Environment variables that `accelerate launch` would set for the backend, on the CPU."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    if backend.startswith("zero"):
        return {
            **env,
            "DS_ACCELERATOR": "cpu",
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(write_deepspeed_config(backend, folder)),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(backend == "zero3").lower(),
        }
    env["ACCELERATE_USE_CPU"] = "true"
    if backend == "fsdp2":
        env |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        }
    return env


def write_deepspeed_config(backend: str, folder: Path) -> Path:
    """DeepSpeed's configuration; under ZeRO-3 even the smallest parameter is partitioned."""
    zero = {
        "stage": int(backend[-1]),
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "gradient_accumulation_steps")
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(auto, "auto")}))
    return file


class World:
    """
    Two processes that run a plan.

    Args:
        backend (`str`): one of `BACKENDS`.
        jobs (`list[Job]`): what to run, in this order.
        model_dir (`Path`): folder of the model.
        folder (`Path`): where jobs write.
    """

    def __init__(self, backend: str, jobs: list[Job], model_dir: Path, folder: Path, num_processes: int = 2):
        need(backend)
        self.backend, self.jobs, self.folder, self.num_processes = backend, jobs, folder, num_processes
        folder.mkdir(parents=True, exist_ok=True)
        plan = {
            "backend": backend,
            "jobs": [asdict(job) for job in jobs],
            "model_dir": str(model_dir),
            "folder": str(folder),
            "num_processes": num_processes,
            "deepspeed": backend.startswith("zero"),
        }
        (folder / "plan.json").write_text(json.dumps(plan))
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> "World":
        """Starts the processes; each writes to a log of its own."""
        port = free_port()
        for rank in range(self.num_processes):
            env = environment(self.backend, self.folder) | {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.num_processes)},
                **{"LOCAL_WORLD_SIZE": str(self.num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            }
            command = [sys.executable, "-m", "tests.distributed.worker", str(self.folder / "plan.json")]
            with open(self.folder / f"log_{rank}.txt", "ab") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
                )
        return self

    def wait(self) -> "World":
        """Waits for all; one that fails, or jobs that take longer than the watchdog allows, fail the test."""
        seconds = STARTUP + WATCHDOG * len(self.jobs)
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in self.processes):
            failed = any(p.poll() not in (None, 0) for p in self.processes)
            if failed or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"{'a process failed' if failed else f'hung for {seconds} s'}\n{self.logs()}")
            time.sleep(0.1)
        if any(p.returncode for p in self.processes):
            pytest.fail(f"a process failed\n{self.logs()}")
        return self

    def wait_for_death(self) -> "World":
        """Waits until a process has killed itself, then kills the others, which wait for it."""
        deadline = time.monotonic() + STARTUP + WATCHDOG
        while not any(p.poll() == -signal.SIGKILL for p in self.processes):
            if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
                self.kill()
                pytest.fail(f"no process killed itself\n{self.logs()}")
            time.sleep(0.1)
        self.kill()
        return self

    def kill(self) -> None:
        """SIGKILL, as a scheduler's or the kernel's out-of-memory killer would."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def logs(self, size: int = 4000) -> str:
        """Ends of the processes' logs."""
        return "\n".join(
            f"--- process {r}\n{(self.folder / f'log_{r}.txt').read_text(errors='replace')[-size:]}"
            for r in range(self.num_processes)
        )

    def figures(self, name: str) -> list[dict[str, Any]]:
        """Figures of a job, one a process, after checking that it really ran as told."""
        result = [
            json.loads((self.folder / name / f"figures_{r}.json").read_text()) for r in range(self.num_processes)
        ]
        for figures in result:
            assert figures["num_processes"] == self.num_processes
            assert EXPECTED_TYPE[self.backend] in figures["backend"]
        return result
