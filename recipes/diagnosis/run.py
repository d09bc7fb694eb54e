"""
The signal of a small model under its own, another and no reference, a few problems per call.

    python recipes/smollm2_cpu/build_data.py
    python -m recipes.diagnosis.run --model .cache/smollm2-135m-instruct --first 0    # --first 10, and so on
    python -m recipes.diagnosis.run --model .cache/gemma-3-270m --text --first 0      # a model without a chat template
    python -m recipes.diagnosis.figure                                                # results.jsonl and the figure
"""

import argparse
import json
from pathlib import Path

from purified_opsd_trl.diagnose import diagnose
from purified_opsd_trl.diagnose.arguments import parse


PROBLEMS = Path(".cache/gsm_symbolic/train.jsonl")
OUTPUT = Path("outputs/diagnosis")
# A base model continues text. The question comes last, so that every context ends where the solution begins
TEXT = "Worked solution:\n{reference}\n\nThe same problem, solved step by step in other words.\n\n"
TEXT_OPTIONS = {
    "text_prompts": "true",
    "teacher_prompt_template": TEXT + "{question}",
    "reference_prompt_template": TEXT + "Solution:",
}


def write_part(first: int, count: int, text: bool, path: Path) -> None:
    """Writes `count` problems from number `first` on, as text prompts where asked."""
    rows = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()]
    rows = rows[first : first + count]
    for row in rows if text else ():
        row["prompt"] = f"Problem: {row['prompt'][-1]['content']}\nSolution:"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run(model: str, first: int, count: int, text: bool, target: str, sources: list[str], length: int) -> None:
    """Diagnoses some problems, unless their result is there already."""
    folder = OUTPUT / Path(model).name / target / str(first)
    if (folder / "diagnosis.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_part(first, count, text, folder / "problems.jsonl")
    settings = {
        "model_name_or_path": model,
        "dataset_name": str(folder / "problems.jsonl"),
        "dtype": "float32",
        "target": target,
        "max_completion_length": str(length),
        "batch_size": str(count),
        "seed": str(first),
        "output_dir": str(folder),
        **(TEXT_OPTIONS if text else {}),
    }
    flags = [text for key, value in settings.items() for text in (f"--{key}", value)]
    diagnose(parse([*flags, "--reference_source", *sources]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem")
    parser.add_argument("--count", type=int, default=10, help="number of problems")
    parser.add_argument("--text", action="store_true", help="text prompts, for a model without a chat template")
    parser.add_argument("--target", default="purified")
    parser.add_argument("--sources", nargs="+", default=["own", "other", "none"])
    parser.add_argument("--length", type=int, default=96, help="longest completion in tokens")
    options = parser.parse_args()
    run(**vars(options))
