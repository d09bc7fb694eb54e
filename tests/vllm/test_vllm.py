"""Real vLLM on a CPU, in an environment of its own (`make test-vllm`); each run is a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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


def run(*command: str) -> None:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def train(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains in a process, once for equal arguments; returns its figures."""
    results: dict[str, dict[str, Any]] = {}

    def get(lora: bool, resume: str | None = None, break_sync: bool = False, sleep: bool = False) -> dict[str, Any]:
        plan = {"lora": lora, "resume": resume, "break_sync": break_sync, "sleep": sleep}
        key = json.dumps(plan)
        if key not in results:
            folder = tmp_path_factory.mktemp("vllm")
            (folder / "plan.json").write_text(
                json.dumps({**plan, "model": str(model_dir), "output": str(folder / "run")})
            )
            run("-m", "tests.vllm.worker", str(folder / "plan.json"))
            results[key] = {**json.loads((folder / "figures.json").read_text()), "run": str(folder / "run")}
        return results[key]

    return get


either = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


@either
def test_greedy_rollouts_are_those_of_transformers_after_every_sync(train: Train, lora: bool) -> None:
    rollouts = train(lora)["rollouts"]
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert rollout["vllm"] == rollout["transformers"]


@either
def test_stale_weights_would_be_noticed(train: Train, lora: bool) -> None:
    rollouts = train(lora, break_sync=True)["rollouts"]
    assert rollouts[0]["vllm"] == rollouts[0]["transformers"]
    assert all(rollout["vllm"] != rollout["transformers"] for rollout in rollouts[1:])


@either
def test_a_resumed_run_equals_an_uninterrupted_one(train: Train, lora: bool) -> None:
    straight = train(lora)
    resumed = train(lora, resume=f"{straight['run']}/checkpoint-2")
    assert resumed["rollouts"] == straight["rollouts"][2:]
    assert resumed["losses"][-2:] == straight["losses"][-2:]
    assert resumed["weights"] == straight["weights"]


def test_syncing_an_adapter_leaves_the_base_as_it_is(train: Train) -> None:
    assert train(True)["base_moved"] == []


def test_room_for_the_longest_prompt_and_completion(train: Train) -> None:
    figures = train(True)
    assert figures["max_model_len"] == figures["longest_prompt"] + 12


def test_scores_while_vllm_sleeps(train: Train) -> None:
    calls = train(True, sleep=True)["calls"]
    step = ["wake weights", "wake kv_cache", "generate", "sleep", "score", "loss"]
    assert calls == step * 4


def test_the_command_evaluates_with_vllm(model_dir: Path, tmp_path: Path) -> None:
    problems = [{"problem": f"what is {i} + 1?", "answer": str(i + 1)} for i in range(3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, problems)))
    samples = {}
    for backend in ("vllm", "transformers"):
        output = tmp_path / backend
        run(
            *["-m", "purified_opsd_trl.cli", "evaluate", "--model", str(model_dir), "--backend", backend],
            *["--benchmarks", str(tmp_path / "sums.jsonl"), "--num_samples", "2", "--temperature", "0"],
            *["--max_new_tokens", "12", "--dtype", "float32", "--output_dir", str(output)],
        )
        (file,) = output.rglob("*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples[backend] = {(r["problem_id"], r["sample"]): r["completion"] for r in rows if "sample" in r}
    assert len(samples["vllm"]) == 6
    assert samples["vllm"] == samples["transformers"]


def test_the_server_writes_what_transformers_writes(model_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.generation.vllm_client import VLLMClient

    from .worker import NEW_TOKENS, greedy

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["trl", "vllm-serve", "--model", str(model_dir), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce_eager", "true", "--max_model_len", "128"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = tmp_path / "server.txt"
    with open(log, "wb") as stream:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=stream, stderr=stream)
    try:
        client = VLLMClient(base_url=f"http://127.0.0.1:{port}", connection_timeout=LIMIT)
        prompts = [[65, 66, 67, 68], [97, 98, 99]]
        found = client.generate(prompts, n=1, temperature=0.0, max_tokens=NEW_TOKENS)["completion_ids"]
    except Exception as error:
        pytest.fail(f"{error}\n{log.read_text()[-4000:]}")
    finally:
        server.terminate()
        deadline = time.monotonic() + 30
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        server.kill()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    assert found == [greedy(model, prompt) for prompt in prompts]
