"""
The lab from pre-training to table and figure. Runs that have a result already are skipped.

    python -m recipes.lab.grid           one base model, OPSD and purified; results and figure in outputs/lab
    python -m recipes.lab.grid --full    every run of recipes/lab/results.jsonl
"""

import argparse
from dataclasses import replace
from pathlib import Path

from purified_opsd_trl.targets import DENSE_TARGETS
from recipes.lab.figure import LAGS, RESULTS, SLOW, SWEEP, draw, draw_settings, load, table
from recipes.lab.pretrain import pretrain
from recipes.lab.run import Run, distil, save


BOTH = [Run(target="teacher"), Run(target="purified")]


def both(**settings: object) -> list[Run]:
    """OPSD and purified at a setting."""
    return [replace(run, **settings) for run in BOTH]  # type: ignore[arg-type]


def full() -> list[Run]:
    """Every run, the most important first."""
    seeds = range(3)
    runs = [
        run
        for repeat in range(2)
        for seed in seeds
        for world in ("style", "repair")
        for run in both(world=world, seed=seed, repeat=repeat)
    ]
    runs += [run for seed in seeds for run in both(world="repair", rich=True, seed=seed)]
    runs += [
        Run(target=target, world=world, seed=seed)
        for target in DENSE_TARGETS
        for seed in seeds
        for world in ("style", "repair")
    ]
    runs += [run for seed in seeds for lag in (0, 4, 16) for run in both(lag=lag, seed=seed, **SLOW)]
    runs += [run for seed in seeds for run in both(rich=True, seed=seed)]
    for change in ({"pmi_clip": 2.0}, {"pmi_beta": 0.5}, {"pmi_beta": 2.0}):
        runs += [replace(BOTH[1], seed=seed, **change) for seed in seeds]
    runs += [run for teacher in ("live", "ema") for seed in seeds for run in both(teacher=teacher, seed=seed)]
    return runs


def main(is_full: bool, part: int, parts: int) -> None:
    """
    Runs what is missing, prints the table and draws the figure.

    Args:
        is_full (`bool`):
            Every run, or one pair of runs.
        part, parts (`int`):
            Every `parts`-th run, starting at number `part`, so that several processes can share the grid.
    """
    folder = Path("outputs/lab")
    path = RESULTS if is_full else folder / "results.jsonl"
    runs = full() if is_full else BOTH
    done = {Run(**result["run"]).name for result in load(path)}
    for number, run in enumerate(runs):
        if number % parts == part and run.name not in done:
            print(f"{run.name} ({number + 1} of {len(runs)})", flush=True)
            save(distil(run, pretrain(run.world, run.seed)), path)
    results = load(path)
    print(table(results))
    draw(results, Path("docs/img/lab.png") if is_full else folder / "lab.png")
    if is_full:
        draw_settings(results, SWEEP, Path("docs/img/lab_settings.png"))
        draw_settings(results, LAGS, Path("docs/img/lab_lag.png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every run, which takes hours")
    parser.add_argument("--part", type=int, default=0, help="share of the runs that this process does")
    parser.add_argument("--parts", type=int, default=1, help="number of shares")
    options = parser.parse_args()
    main(options.full, options.part, options.parts)
