"""
What rollouts from old weights do: every divergence, plain and purified, at lags of 0, 1, 4 and 16 updates.

    python -m recipes.lab.staleness [--seeds 3]      runs what is missing, prints the tables

Each result is a line of recipes/lab/staleness.jsonl. A run evaluates at its end alone.
"""

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.lab.figure import NAMES, load, spread
from recipes.lab.pretrain import pretrain
from recipes.lab.run import Run, distil, save


RESULTS = Path(__file__).parent / "staleness.jsonl"
LAGS = (0, 1, 4, 16)
DIVERGENCES = {0.5: "Jensen-Shannon", 0.0: "forward KL", 1.0: "reverse KL"}
RATES = (1e-3, 3e-4, 3e-3)
TARGETS = ("teacher", "purified")


def grid(seed: int) -> list[Run]:
    """The runs on one base model: all divergences at the lab's learning rate, then Jensen-Shannon at two others."""
    cells = [(RATES[0], beta, lag) for beta in DIVERGENCES for lag in LAGS]
    cells += [(rate, 0.5, lag) for rate in RATES[1:] for lag in (0, 16)]
    return [
        Run(target=target, seed=seed, beta=beta, lag=lag, learning_rate=rate, eval_every=60)
        for rate, beta, lag in cells
        for target in TARGETS
    ]


def table(results: list[dict[str, Any]]) -> str:
    """A row per rate, divergence and lag; what a lag changes is the mean over bases of differences from lag 0."""
    header = ["learning rate", "divergence", "lag", "distance, nats"]
    header += [f"{NAMES[target]}: {what}" for target in TARGETS for what in ("accuracy", "change", "waits")]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for rate in RATES:
        for beta, divergence in DIVERGENCES.items():
            for lag in LAGS:
                cells, distances = [], []
                for target in TARGETS:
                    found = _select(results, rate, beta, lag, target)
                    start = _select(results, rate, beta, 0, target)
                    both = found.keys() & start.keys()
                    changes = [_end(found[s], "accuracy") - _end(start[s], "accuracy") for s in both]
                    distances += [found[s]["distance"] for s in found if "distance" in found[s]]
                    cells += [spread([_end(found[s], "accuracy") for s in found]), _signed(changes) if lag else ""]
                    cells += [spread([_end(found[s], "waits") for s in found])]
                if any(cell not in ("-", "") for cell in cells):
                    mean = f"{statistics.fmean(distances):.4f}" if distances else "0"
                    lines.append(f"| {rate:g} | {divergence} | {lag} | {mean} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _select(results: Iterable[dict[str, Any]], rate: float, beta: float, lag: int, target: str) -> dict[int, Any]:
    """Results by the seed of the base model."""
    wanted = {"learning_rate": rate, "beta": beta, "lag": lag, "target": target}
    return {r["run"]["seed"]: r for r in results if wanted.items() <= r["run"].items()}


def _end(result: dict[str, Any], key: str) -> float:
    return result["curve"][-1]["sampled"][key]


def _signed(values: list[float]) -> str:
    spread_of = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.3f}{spread_of}" if values else "-"


def main(seeds: int) -> None:
    """Runs what is missing, the grid of one base model after the other."""
    done = {Run(**result["run"]).name for result in load(RESULTS)}
    for seed in range(seeds):
        for run in grid(seed):
            if run.name not in done:
                print(run.name, flush=True)
                save(distil(run, pretrain(run.world, run.seed)), RESULTS)
    print(table(load(RESULTS)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="base models")
    main(parser.parse_args().seeds)
