"""
The signal of a small model under its own, another and no reference, ten problems per call.

    python recipes/smollm2_cpu/build_data.py
    python -m recipes.diagnosis.run --model .cache/smollm2-135m-instruct --part 0     # ... and so on to --part 4
    python -m recipes.diagnosis.run --model .cache/gemma-3-270m --text --part 0       # a model without a chat template
    python -m recipes.diagnosis.figure                                                # results.jsonl and the figure
"""

import argparse
import json
from pathlib import Path

from purified_opsd_trl.diagnose import diagnose
from purified_opsd_trl.diagnose.arguments import parse


PROBLEMS = Path(".cache/gsm_symbolic/train.jsonl")
OUTPUT = Path("outputs/diagnosis")
PART = 10  # problems
# A base model continues text. The question comes last, so that every context ends where the solution begins
TEXT = "Worked solution:\n{reference}\n\nThe same problem, solved step by step in other words.\n\n"
TEXT_OPTIONS = {
    "text_prompts": "true",
    "teacher_prompt_template": TEXT + "{question}",
    "reference_prompt_template": TEXT + "Solution:",
}


def write_part(part: int, text: bool, path: Path) -> None:
    """Writes the problems of one part, as text prompts where asked."""
    rows = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()]
    rows = rows[PART * part : PART * (part + 1)]
    for row in rows if text else ():
        row["prompt"] = f"Problem: {row['prompt'][-1]['content']}\nSolution:"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run(model: str, part: int, text: bool, target: str, sources: list[str], length: int) -> None:
    """Diagnoses one part, unless its result is there already."""
    folder = OUTPUT / Path(model).name / target / str(part)
    if (folder / "diagnosis.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_part(part, text, folder / "problems.jsonl")
    settings = {
        "model_name_or_path": model,
        "dataset_name": str(folder / "problems.jsonl"),
        "dtype": "float32",
        "target": target,
        "max_completion_length": str(length),
        "batch_size": str(PART),
        "seed": str(PART * part),
        "output_dir": str(folder),
        **(TEXT_OPTIONS if text else {}),
    }
    flags = [text for key, value in settings.items() for text in (f"--{key}", value)]
    diagnose(parse([*flags, "--reference_source", *sources]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--part", type=int, default=0, help="which ten problems")
    parser.add_argument("--text", action="store_true", help="text prompts, for a model without a chat template")
    parser.add_argument("--target", default="purified")
    parser.add_argument("--sources", nargs="+", default=["own", "other", "none"])
    parser.add_argument("--length", type=int, default=96, help="longest completion in tokens")
    options = parser.parse_args()
    run(**vars(options))
