"""Rollouts from a server with two processes: the adapter is gathered, rows and versions are those of one process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..lora_server import LoraServer
from .jobs import Job
from .worlds import World


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[LoraServer]:
    started = LoraServer(model_dir)
    yield started
    started.close()


@pytest.mark.parametrize(
    "backend",
    ["ddp", *(pytest.param(sharded, marks=pytest.mark.distributed) for sharded in ("zero3", "fsdp2"))],
)
def test_two_processes_train_on_the_rollouts_of_one(
    together: Callable[[str, tuple[Job, ...]], World],
    alone: Callable[[Job], dict[str, Any]],
    server: LoraServer,
    backend: str,
) -> None:
    jobs = tuple(
        Job(f"served-{ahead}", stages=("evaluate", "checkpoints"), server=server.url, ahead=ahead) for ahead in (0, 2)
    )
    resumed = Job("resumed", resume="served-2/run/checkpoint-2", server=server.url, ahead=2)
    world = together(backend, (*jobs, resumed))
    for job in jobs:
        expected, figures = alone(job), world.figures(job.name)
        for one, two in zip(expected["logs"], figures[0]["logs"], strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-5) and two["loss"] > 1e-4
            assert two["rollout/staleness"] == one["rollout/staleness"] == min(one["step"] - 1, job.ahead)
            assert two["num_tokens"] == one["num_tokens"]
        assert figures[0]["eval"]["eval_loss"] == pytest.approx(expected["eval"]["eval_loss"], abs=1e-5)
    straight = [entry["loss"] for entry in world.figures("served-2")[0]["logs"]]
    assert [entry["loss"] for entry in world.figures("resumed")[0]["logs"]][-2:] == pytest.approx(
        straight[2:], abs=1e-7
    )
    current = [entry["loss"] for entry in world.figures("served-0")[0]["logs"]]
    assert straight != pytest.approx(current, abs=1e-4)  # the versions differ enough to tell
