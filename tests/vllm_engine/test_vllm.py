"""Real vLLM on a CPU, in an environment of its own (`make test-vllm`); each run is a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import free_port


pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm", reason="vLLM is not installed (`make test-vllm` sets it up)")

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds that a process may take
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
Train = Callable[..., dict[str, Any]]


def run(*commands: list[str]) -> None:
    """Runs Python processes at the same time, and fails with the output of one that fails."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = []
    for command in commands:
        # Each vLLM meets its own workers at a port, by default the same for all
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes))
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-5000:]


@pytest.fixture(scope="module")
def train(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Figures of a run in a process of its own; the two of a kind run at the same time, once."""
    results: dict[str, dict[Any, dict[str, Any]]] = {}

    def get(which: bool | str, kind: str = "straight") -> dict[str, Any]:
        if kind not in results:
            folders = {
                one: tmp_path_factory.mktemp(kind) for one in (ADAPTERS if kind == "adapters" else (True, False))
            }
            for one, folder in folders.items():
                plan = {
                    "model": str(model_dir),
                    "output": str(folder / "run"),
                    "lora": bool(one),
                    "adapters": one in ADAPTERS,
                    "resume": f"{get(one)['output']}/checkpoint-2" if kind == "resumed" else None,
                    "break_sync": kind == "stale" or one == "adapter, stale",
                    "sleep": kind == "sleeping",
                }
                (folder / "plan.json").write_text(json.dumps(plan))
            run(*(["-m", "tests.vllm_engine.worker", str(folder / "plan.json")] for folder in folders.values()))
            results[kind] = {
                one: {**json.loads((folder / "figures.json").read_text()), "output": str(folder / "run")}
                for one, folder in folders.items()
            }
        return results[kind][which]

    return get


ADAPTERS = ("adapter", "adapter, stale")  # sent by itself; only the first time
either = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


@either
def test_greedy_rollouts_are_those_of_transformers_after_every_sync(train: Train, lora: bool) -> None:
    rollouts = train(lora)["rollouts"]
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert rollout["vllm"] == rollout["transformers"]


@either
def test_stale_weights_would_be_noticed(train: Train, lora: bool) -> None:
    rollouts = train(lora, "stale")["rollouts"]
    assert rollouts[0]["vllm"] == rollouts[0]["transformers"]
    assert all(rollout["vllm"] != rollout["transformers"] for rollout in rollouts[1:])


@either
def test_a_resumed_run_equals_an_uninterrupted_one(train: Train, lora: bool) -> None:
    straight = train(lora)
    resumed = train(lora, "resumed")
    assert resumed["rollouts"] == straight["rollouts"][2:]
    assert resumed["losses"][-2:] == straight["losses"][-2:]
    assert resumed["weights"] == straight["weights"]


def test_syncing_an_adapter_leaves_the_base_as_it_is(train: Train) -> None:
    assert train(True)["base_moved"] == []


def test_an_adapter_by_itself_writes_what_transformers_writes(train: Train) -> None:
    figures, stale = train("adapter", "adapters"), train("adapter, stale", "adapters")
    assert len(figures["rollouts"]) == 4 and figures["base_moved"] == []
    for rollout in figures["rollouts"]:
        assert rollout["vllm"] == rollout["transformers"]
    assert figures["losses"] == pytest.approx(train(True)["losses"], rel=1e-4)  # those of merged weights
    assert figures["adapter_files"] == ["4"]  # a version each step, the newest one kept
    assert all(rollout["vllm"] != rollout["transformers"] for rollout in stale["rollouts"][1:])


def test_room_for_the_longest_prompt_and_completion(train: Train) -> None:
    figures = train(True)
    assert figures["max_model_len"] == figures["longest_prompt"] + 12


@either
def test_scores_while_vllm_sleeps(train: Train, lora: bool) -> None:
    calls = train(lora, "sleeping")["calls"]
    step = ["wake weights", "wake kv_cache", "generate", "sleep", "score", "loss"]
    assert calls == ["score", *step * 4]  # the self-check scores first, while vLLM still sleeps


def test_the_command_evaluates_with_vllm(model_dir: Path, tmp_path: Path) -> None:
    problems = [{"problem": f"what is {i} + 1?", "answer": str(i + 1)} for i in range(3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, problems)))
    backends = ("vllm", "transformers")
    command = ["-m", "tests.vllm_engine.cpu", "evaluate", "--model_name_or_path", str(model_dir), "--dtype", "float32"]
    command += ["--benchmarks", str(tmp_path / "sums.jsonl"), "--num_generations", "2", "--temperature", "0"]
    command += ["--max_completion_length", "12"]
    run(*([*command, "--backend", name, "--output_dir", str(tmp_path / name)] for name in backends))
    samples = {}
    for name in backends:
        (file,) = (tmp_path / name).rglob("*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples[name] = {(row["problem_id"], row["sample"]): row["completion"] for row in rows}
    assert len(samples["vllm"]) == 6
    assert samples["vllm"] == samples["transformers"]


def test_seeded_prompts_longer_than_a_step_in_all(model_dir: Path, tmp_path: Path) -> None:
    # 4,096 tokens is the engine's step on a CPU: of three such prompts one would be prefilled in parts
    problems = [{"problem": f"{i} " + "x" * 1500, "answer": str(i)} for i in range(8)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, problems)))
    command = ["-m", "tests.vllm_engine.cpu", "evaluate", "--model_name_or_path", str(model_dir), "--dtype", "float32"]
    command += ["--benchmarks", str(tmp_path / "long.jsonl"), "--num_generations", "2", "--temperature", "1"]
    command += ["--max_completion_length", "12", "--backend", "vllm", "--output_dir", str(tmp_path / "out")]
    run([*command, "--vllm_gpu_memory_utilization", "0.4"])
    (file,) = (tmp_path / "out").rglob("*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 16 and len({sample["completion"] for sample in samples}) > 8


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server answers; fails as soon as its process has ended."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"no answer after {LIMIT} s\n{log.read_text()[-4000:]}")


def test_the_server_writes_what_transformers_writes(model_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.generation.vllm_client import VLLMClient

    from .worker import NEW_TOKENS, greedy

    port = free_port()
    command = [sys.executable, "-m", "tests.vllm_engine.cpu", "serve", "--model", str(model_dir)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce_eager", "true", "--max_model_len", "128"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    log = tmp_path / "server.txt"
    with open(log, "wb") as stream:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    try:
        wait_for(server, port, log)
        client = VLLMClient(base_url=f"http://127.0.0.1:{port}", connection_timeout=30)
        prompts = [[65, 66, 67, 68], [97, 98, 99]]
        found = client.generate(prompts, n=1, temperature=0.0, max_tokens=NEW_TOKENS)["completion_ids"]
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    assert found == [greedy(model, prompt) for prompt in prompts]
