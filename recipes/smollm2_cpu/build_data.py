"""
Build a dataset of grade-school problems with worked solutions, in the columns that the trainer reads.

    python recipes/smollm2_cpu/build_data.py [--size 64] [--test_size 16] [--seed 0] [--output .cache/gsm_symbolic]

To use your own data, write the same JSON lines, one problem per line:

    {"prompt": [{"role": "user", "content": "What is 2 + 2 * 3?"}], "reference": "2 * 3 = 6\n2 + 6 = 8\n#### 8"}

`prompt` is what the student sees. `reference` is the worked solution that only the frozen teacher sees. Other columns
(here `answer`, for evaluation) are ignored.
"""

import argparse
import importlib.util
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# reasoning_gym's __init__ imports a hundred tasks and their dependencies, one of which needs a C compiler. With an
# empty module in its place, the arithmetic tasks can be imported on their own.
spec = importlib.util.find_spec("reasoning_gym")
if spec is None or spec.submodule_search_locations is None:
    sys.exit("reasoning-gym is missing: pip install -e '.[demo]' && pip install --no-deps reasoning-gym==0.1.25")
package = types.ModuleType("reasoning_gym")
package.__path__ = list(spec.submodule_search_locations)
sys.modules["reasoning_gym"] = package

from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import (  # noqa: E402
    GSMSymbolicDataset,
    GSMSymbolicDatasetConfig,
)


# One sum, difference, product or quotient of two plain numbers; no chains, fractions or percentages.
NUMBER = r"(\d++(?:\.\d++)?+)"
EQUATION = re.compile(rf"(?<![\d.*x÷/+(-])(?<![*x÷/+(-] ){NUMBER} ?([-+*/]) ?{NUMBER} ?= ?{NUMBER}(?! ?[%*x÷/+-])")


def is_sound(solution: str, answer: str) -> bool:
    """Whether the solution ends in the answer and its simple equations hold (some templates round 48 / 18 to 2)."""
    text = re.sub(r"[,$£€]", "", solution)
    final = re.search(r"#### (\S+)$", text)
    if final is None or float(final[1]) != float(answer):
        return False
    for left, operator, right, result in EQUATION.findall(text):
        a, b = float(left), float(right)
        exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else float("nan")}[operator]
        if not abs(exact - float(result)) <= 0.01:
            return False
    return True


def problems(seed: int) -> Iterator[dict[str, Any]]:
    """Endless stream of sound, distinct problems."""
    source = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=seed, size=100_000))
    seen: set[str] = set()
    for entry in source:
        question, answer = entry["question"], entry["answer"]
        solution = entry["metadata"]["answer_cot"]
        if question in seen or not is_sound(solution, answer):
            continue
        seen.add(question)
        yield {
            "prompt": [{"role": "user", "content": question}],
            "reference": re.sub(r"####.*", f"#### {answer}", solution),
            "answer": answer,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and test.jsonl.")
    parser.add_argument("--size", type=int, default=64, help="Problems to train on.")
    parser.add_argument("--test_size", type=int, default=16, help="Held-out problems.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the generator.")
    parser.add_argument("--output", type=Path, default=Path(".cache/gsm_symbolic"), help="Folder to write.")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    stream = problems(args.seed)
    for split, size in (("train", args.size), ("test", args.test_size)):
        path = args.output / f"{split}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(size):
                file.write(json.dumps(next(stream), ensure_ascii=False) + "\n")
        print(f"data: wrote {size} problems with worked solutions to {path}")


if __name__ == "__main__":
    main()
