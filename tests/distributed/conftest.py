"""One-process runs to compare with, and runs of two processes, each made once a session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .jobs import Job, run
from .worlds import World


@pytest.fixture(scope="session")
def alone(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], dict[str, Any]]:
    """Figures of a job on one process."""
    figures: dict[Job, dict[str, Any]] = {}

    def get(job: Job) -> dict[str, Any]:
        if job not in figures:
            figures[job] = run(job, str(model_dir), tmp_path_factory.mktemp("alone") / job.name, 1)
        return figures[job]

    return get


@pytest.fixture(scope="session")
def together(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[Job, ...]], World]:
    """Two processes under a backend, after they have run some jobs."""
    worlds: dict[tuple[str, tuple[Job, ...]], World] = {}

    def get(backend: str, jobs: tuple[Job, ...]) -> World:
        if (backend, jobs) not in worlds:
            worlds[backend, jobs] = (
                World(backend, list(jobs), model_dir, tmp_path_factory.mktemp(backend)).start().wait()
            )
        return worlds[backend, jobs]

    return get
