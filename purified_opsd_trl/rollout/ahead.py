"""
Rollouts before their step: which batches come, which version writes them, what has been written.

With `k` batches ahead, batch t (trained in optimizer step t, from 0) is requested when the trainer begins step t - k,
from the adapter of that moment. Its staleness, counted in optimizer steps, is k, and less only for the first k batches
of a run. Nothing is dropped.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from .servers import in_background


Prompts = list[list[list[int]]]  # per process: its rows' token ids


def version_of(batch: int, ahead: int, first: int) -> int:
    """
    Returns the adapter version that writes a batch.

    Args:
        batch (`int`):
            Number of the optimizer step that trains on the batch, from 0.
        ahead (`int`):
            `rollouts_ahead`.
        first (`int`):
            Oldest version there is: 0, or in a resumed run the oldest one of the checkpoint.

    Returns:
        `int`: number of optimizer steps that the adapter has taken.
    """
    return max(batch - ahead, first)


def coming_batches(
    sampler: Any, dataset: Any, batch_size: int, repeats: int, processes: int, process: int, skip: int, first: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """
    Yields the rows of one process, batch after batch, in the order in which training reads them, without end.

    Args:
        sampler (`Sampler`):
            TRL's sampler in the state in which the epoch begins. It lives on over the epochs.
        dataset ([`~datasets.Dataset`]):
            Training data.
        batch_size (`int`):
            Rows of a generation batch on one process.
        repeats (`int`):
            How often in a row the sampler names each batch (`gradient_accumulation_steps`).
        processes (`int`):
            Number of processes.
        process (`int`):
            Number of this process.
        skip (`int`):
            Batches of this epoch that were trained on before.
        first (`int`):
            Number of the first batch.

    Returns:
        `Iterator[tuple[int, list[dict[str, Any]]]]`: number and rows.
    """
    batches: Any = BatchSampler(sampler, batch_size, drop_last=False)
    if processes > 1:
        batches = BatchSamplerShard(batches, num_processes=processes, process_index=process)
    while True:
        for position, rows in enumerate(batches):
            if position % repeats == 0 and position >= skip * repeats:
                yield first, [dataset[row] for row in rows]
                first += 1
        skip = 0


def copied_state(sampler: Any, of: Any) -> Any:
    """A sampler whose generator is in the state of another's."""
    generator: torch.Generator | None = getattr(of, "generator", None)
    if generator is not None:
        sampler.generator.set_state(generator.get_state())
    return sampler


@dataclass
class Rollout:
    """
    Completions of a batch.

    Attributes:
        version (`int`):
            Version of the adapter that wrote them.
        completions (`Prompts`):
            Token ids, by process and row.
        asked, answered (`float`):
            When it was requested and written (`time.perf_counter` of the main process).
        awaited, taken (`float`):
            When the trainer began to wait for it, and had it.
        idle (`float`):
            Seconds for which nothing was requested, before this batch was.
        in_flight (`int`):
            Other batches that were being written when this one was taken.
    """

    version: int
    completions: Prompts
    asked: float
    answered: float
    awaited: float
    taken: float
    idle: float
    in_flight: int

    def metrics(self, step: int) -> dict[str, float]:
        """Figures for the log."""
        tokens = sum(len(ids) for rows in self.completions for ids in rows)
        return {
            "rollout/staleness": step - self.version,
            "rollout/wait_seconds": self.taken - self.awaited,
            "rollout/idle_seconds": self.idle,
            "rollout/in_flight": self.in_flight,
            "rollout/tokens_per_second": tokens / max(self.answered - self.asked, 1e-9),
        }


@dataclass
class _Request:
    version: int
    sizes: list[int]  # rows per process
    idle: float
    asked: float
    answer: "Future[tuple[list[list[int]], float]]"


class RolloutQueue:
    """
    Batches that were requested and not yet taken. Used on the main process.

    Args:
        complete (`Callable[[list[list[int]], int], list[list[int]]]`):
            Writes completions of prompts with a version; called in a thread.
    """

    def __init__(self, complete: Callable[[list[list[int]], int], list[list[int]]]):
        self._complete = complete
        self._requests: dict[int, _Request] = {}
        self._last_answer = time.perf_counter()

    def ask(self, batch: int, version: int, prompts: Prompts) -> None:
        """Requests a batch and returns at once."""
        rows = [ids for own in prompts for ids in own]
        asked = time.perf_counter()

        def answer() -> tuple[list[list[int]], float]:
            completions = self._complete(rows, version)
            self._last_answer = time.perf_counter()
            return completions, self._last_answer

        idle = 0.0 if self.writing() else asked - self._last_answer
        self._requests[batch] = _Request(version, list(map(len, prompts)), idle, asked, in_background(answer))

    def writing(self) -> int:
        """Number of requested batches that are not written yet."""
        return sum(not request.answer.done() for request in self._requests.values())

    def take(self, batch: int) -> Rollout:
        """Waits for a batch; raises what its request raised."""
        request = self._requests.pop(batch)
        awaited = time.perf_counter()
        completions, answered = request.answer.result()
        taken = time.perf_counter()
        own, start = [], 0
        for size in request.sizes:
            own.append(completions[start : start + size])
            start += size
        times = request.asked, answered, awaited, taken
        return Rollout(request.version, own, *times, request.idle, self.writing())
