"""
Probabilities of each result of a correct response under the three contexts and two targets, untrained.

    python -m recipes.lab.targets --world repair --seed 0
"""

import argparse
import random
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from purified_opsd_trl import purified_target_logits
from purified_opsd_trl.targets import DENSE_TARGETS
from recipes.lab.pretrain import CLEAN, MODULUS, WORLDS, pretrain
from recipes.lab.run import EVAL_SEED, problems
from recipes.lab.task import LABELS, REFERENCE_TEMPLATE, TEACHER_TEMPLATE, Problem, write_response


DISTRIBUTIONS = ("base", "teacher", "reference only", "target", "gated")
Expectations = dict[str, dict[str, tuple[float, float]]]


@torch.no_grad()
def expectations(base: Path, held_out: list[Problem], pmi_beta: float = 1.0, pmi_clip: float = 10.0) -> Expectations:
    """
    Mean probabilities of the correct result and of the unchanged value, which means that the operation was forgotten.

    Args:
        base (`Path`):
            Folder of the base model.
        held_out (`list[Problem]`):
            Problems. Results where the two are equal are left out.
        pmi_beta, pmi_clip (`float`):
            Settings of the purified target. The reference is the answer only.

    Returns:
        `dict[str, dict[str, tuple[float, float]]]`: correct and forgotten, by label and distribution.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    seen: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for problem in held_out:
        response = write_response(problem, CLEAN, random.Random(0))
        words, ids = response.split(), tokenizer(response)["input_ids"]
        shown = {"question": problem.question, "reference": problem.reference(rich=False)}
        logits = []
        for template in ("{question}", TEACHER_TEMPLATE, REFERENCE_TEMPLATE):
            prompt = tokenizer(template.format(**shown))["input_ids"]
            logits.append(model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1])
        target = purified_target_logits(
            logits[1], logits[2], logits[0], pmi_beta=pmi_beta, pmi_clip=pmi_clip, pmi_center=True
        )
        gated = DENSE_TARGETS["gated"].logits(
            base=logits[0], teacher=logits[1], reference_only=logits[2], pmi_beta=pmi_beta, pmi_clip=pmi_clip
        )
        for at in (i + 1 for i, word in enumerate(words) if word in LABELS):
            right, forgotten = ids[at], ids[at - 2]
            if right != forgotten:
                for name, rows in zip(DISTRIBUTIONS, (*logits, target, gated), strict=True):
                    p = rows[at].softmax(-1)
                    seen[words[at - 1], name].append((p[right].item(), p[forgotten].item()))
    return {
        label: {name: _means(seen[label, name]) for name in DISTRIBUTIONS} for label in LABELS if seen[label, "base"]
    }


def _means(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    right, forgotten = zip(*pairs, strict=True)
    return statistics.fmean(right), statistics.fmean(forgotten)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="repair")
    parser.add_argument("--seed", type=int, default=0, help="of the base model")
    options = parser.parse_args()
    folder = pretrain(options.world, options.seed)
    print("| operation | " + " | ".join(f"{name}: right, forgotten" for name in DISTRIBUTIONS) + " |")
    print("|---" * (1 + len(DISTRIBUTIONS)) + "|")
    for label, found in expectations(folder, problems(EVAL_SEED, 256, MODULUS, held_out=True)).items():
        print(f"| {label} | " + " | ".join(f"{a:.2f}, {b:.2f}" for a, b in found.values()) + " |")
