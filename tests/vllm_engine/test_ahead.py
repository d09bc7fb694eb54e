"""Rollouts ahead with a real `vllm serve`: versions, resuming after a kill, a server that is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import free_port
from .test_vllm import ENVIRONMENT, LIMIT, ROOT, wait_for


pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm", reason="vLLM is not installed (`make test-vllm` sets it up)")


class Server:
    """A `vllm serve` in a process group of its own, so that a kill ends its engine too."""

    def __init__(self, model: Path, log: Path, *arguments: str, port: int | None = None):
        self.port, self.log = port or free_port(), log
        command = [sys.executable, "-m", "tests.vllm_engine.cpu", "adapters", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "128", "--gpu-memory-utilization", "0.3", *arguments]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())}
        with open(log, "wb") as stream:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        wait_for(self.process, self.port, self.log)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


LORA = ("--enable-lora", "--max-loras", "4", "--max-lora-rank", "16")


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(model_dir, tmp_path_factory.mktemp("server") / "log.txt", *LORA)
    try:
        started.wait()
        yield started
    finally:
        started.kill()


Train = Callable[..., dict[str, Any]]


def start(folder: Path, **plan: Any) -> subprocess.Popen[str]:
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.vllm_engine.ahead_worker", str(folder / "plan.json")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="module")
def train(server: Server, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Figures of a run in a process of its own, once for each plan."""
    results: dict[str, dict[str, Any]] = {}

    def get(**plan: Any) -> dict[str, Any]:
        key = json.dumps(plan, sort_keys=True)
        if key not in results:
            folder = tmp_path_factory.mktemp("run")
            settings = {"model": str(model_dir), "output": str(folder / "run"), "servers": [server.url], **plan}
            process = start(folder, **settings)
            output = process.communicate(timeout=LIMIT)[0]
            assert process.returncode == 0, output[-5000:]
            results[key] = {**json.loads((folder / "figures.json").read_text()), "output": str(folder / "run")}
        return results[key]

    return get


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_vllm_writes_what_transformers_writes_with_exactly_that_version(train: Train, ahead: int) -> None:
    rollouts = train(ahead=ahead)["rollouts"]
    assert [rollout["staleness"] for rollout in rollouts] == [min(step, ahead) for step in range(6)]
    for step, rollout in enumerate(rollouts):
        assert rollout["vllm"] == rollout["transformers"][str(max(step - ahead, 0))], step
    # The versions before and after write something else: a mix-up would have been seen
    others = [
        (step, version)
        for step, rollout in enumerate(rollouts)
        for version in (max(step - ahead, 0) - 1, max(step - ahead, 0) + 1)
        if rollout["transformers"].get(str(version), rollout["vllm"]) != rollout["vllm"]
    ]
    assert len(others) >= 5


def test_a_mix_up_of_versions_would_be_noticed(train: Train) -> None:
    rollouts = train(ahead=1, mix_up=True)["rollouts"]
    wrong = [step for step, r in enumerate(rollouts) if r["vllm"] != r["transformers"][str(max(step - 1, 0))]]
    assert len(wrong) >= 3


def test_without_batches_ahead_it_is_the_rollout_of_transformers(train: Train) -> None:
    served, own = train(ahead=0), train(ahead=0, servers=[])
    assert [r["vllm"] for r in served["rollouts"]] == [r["vllm"] for r in own["rollouts"]]
    assert served["losses"] == pytest.approx(own["losses"], rel=1e-6)


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    train: Train, server: Server, model_dir: Path, tmp_path: Path, ahead: int
) -> None:
    straight = train(ahead=ahead)
    settings = {"model": str(model_dir), "output": str(tmp_path / "run"), "servers": [server.url], "ahead": ahead}
    killed = start(tmp_path, **settings, kill_in_step=4)
    assert killed.communicate(timeout=LIMIT)[0] is not None and killed.returncode == -signal.SIGKILL
    resumed = start(tmp_path, **settings, resume=str(tmp_path / "run" / "checkpoint-3"))
    output = resumed.communicate(timeout=LIMIT)[0]
    assert resumed.returncode == 0, output[-5000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [r["vllm"] for r in figures["rollouts"]] == [r["vllm"] for r in straight["rollouts"]][3:]
    assert [r["staleness"] for r in figures["rollouts"]] == [ahead] * 3
    assert figures["losses"][-3:] == straight["losses"][-3:]
    assert figures["weights"] == straight["weights"]


def test_a_killed_server_stops_the_run_with_a_checkpoint_and_a_new_one_lets_it_go_on(
    train: Train, model_dir: Path, tmp_path: Path
) -> None:
    straight = train(ahead=1)
    second = Server(model_dir, tmp_path / "second.txt", *LORA)
    settings = {"model": str(model_dir), "output": str(tmp_path / "run"), "servers": [second.url], "ahead": 1}
    try:
        second.wait()
        run = start(tmp_path, **settings, wait_in_step=3)
        deadline = time.monotonic() + LIMIT
        while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
            assert run.poll() is None, run.communicate()[0][-5000:]
            time.sleep(0.1)
        second.kill()
        (tmp_path / "go").touch()
        output = run.communicate(timeout=LIMIT)[0]
    finally:
        second.kill()
    assert run.returncode == 1 and f"No vLLM server answers: {second.url}" in output
    step = max(int(folder.name.split("-")[1]) for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert step in (3, 4)  # batch 4 was requested before the kill or after it
    figures = train(ahead=1, output=str(tmp_path / "run"), resume=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert [r["vllm"] for r in figures["rollouts"]] == [r["vllm"] for r in straight["rollouts"]][step:]
    assert figures["losses"][step - 6 :] == straight["losses"][step - 6 :]


def test_servers_started_otherwise(model_dir: Path, tmp_path: Path, make_model_dir: Callable[..., Path]) -> None:
    """Without LoRA, with too small a rank, of another model: one message each, before the first step."""
    servers = {
        "without": Server(model_dir, tmp_path / "without.txt"),
        "other": Server(make_model_dir(seed=1), tmp_path / "other.txt", *LORA[:-1], "8"),
    }
    expected = {
        ("without", 4): "cannot load the adapter",
        ("other", 16): "LoRA rank 16 is greater than max_lora_rank 8",
        ("other", 4): "is not the model in training",
    }
    try:
        for started in servers.values():
            started.wait()
        for (name, rank), message in expected.items():
            folder = tmp_path / f"{name}-{rank}"
            folder.mkdir()
            settings = {"model": str(model_dir), "output": str(folder / "run"), "servers": [servers[name].url]}
            process = start(folder, **settings, ahead=1, rank=rank)
            output = process.communicate(timeout=LIMIT)[0]
            assert process.returncode == 1 and message in output, output[-3000:]
    finally:
        for started in servers.values():
            started.kill()
