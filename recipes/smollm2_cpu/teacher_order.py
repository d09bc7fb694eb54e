"""
Does the order of question and reference in the teacher's prompt change the teacher?

    python recipes/smollm2_cpu/teacher_order.py [--model_name_or_path .cache/smollm2-135m-instruct]

With the reference first, teacher and reference-only probe share a prefix that is run once. This script compares that
order with the default, question first, on held-out problems: the teacher's own greedy accuracy, KL(teacher || base),
and cos(Delta_total, Delta_ref) on the student's completions, each as a mean with its standard error. The last two are
compared problem by problem as well.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from purified_opsd_trl import build_contexts
from purified_opsd_trl.backbone import last_hidden_states
from purified_opsd_trl.config import (
    DEFAULT_REFERENCE_PROMPT_TEMPLATE,
    DEFAULT_TEACHER_PROMPT_TEMPLATE,
    REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE,
)
from purified_opsd_trl.evaluate.answers import grade
from purified_opsd_trl.evaluate.backends import Request, Sampling, TransformersBackend
from purified_opsd_trl.head import LMHead
from purified_opsd_trl.monitoring.decomposition import decomposition_stats


ORDERS = {
    "question first": DEFAULT_TEACHER_PROMPT_TEMPLATE,
    "reference first": REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE,
}


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a conversation, up to the start of the assistant's turn."""
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def complete(backend: TransformersBackend, prompts: list[list[int]], temperature: float, length: int) -> list[Any]:
    """Completions of the prompts, in order."""
    requests = [Request(("", "", i), ids, 1000 + i) for i, ids in enumerate(prompts)]
    sampling = Sampling(temperature, 1.0, 0, length)
    return sorted(backend.generate(requests, sampling), key=lambda c: c.key[2])


@torch.no_grad()
def signal(backend: TransformersBackend, contexts: dict[str, Any], completion: list[int]) -> dict[str, float]:
    """Mean over the tokens of one completion: KL(teacher || base) in nats, and cos(Delta_total, Delta_ref)."""
    logits, head = {}, LMHead.from_model(backend.model)
    for name, prompt in contexts.items():
        ids = torch.tensor([prompt_ids(backend.tokenizer, prompt) + completion])
        logits[name] = head.logits(last_hidden_states(backend.model, ids, torch.ones_like(ids), len(completion))[0])
    log_teacher, log_base = (torch.log_softmax(logits[name], -1) for name in ("teacher", "base"))
    stats, _ = decomposition_stats(logits["base"], logits["teacher"], logits["reference_only"])
    return {
        "kl_teacher_base": (log_teacher.exp() * (log_teacher - log_base)).sum(-1).mean().item(),
        "cos_total_ref": stats.cos_total_ref.mean().item(),
        "mass_cos_total_ref": stats.mass_cos_total_ref.mean().item(),
    }


def show(values: list[float]) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} +- {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=Path(".cache/gsm_symbolic/test.jsonl"))
    parser.add_argument("--problems", type=int, default=16, help="the first half are scored too")
    parser.add_argument("--max_completion_length", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").split("\n") if line][: args.problems]
    backend = TransformersBackend(args.model_name_or_path, "float32", args.batch_size)
    base = [prompt_ids(backend.tokenizer, row["prompt"]) for row in rows]
    scored = complete(backend, base[: len(rows) // 2], 1.0, args.max_completion_length)
    signals: dict[str, list[dict[str, float]]] = {}
    for order, template in ORDERS.items():
        contexts = [
            build_contexts(
                row,
                reference_column="reference",
                teacher_prompt_template=template,
                reference_prompt_template=DEFAULT_REFERENCE_PROMPT_TEMPLATE,
            )
            for row in rows
        ]
        teacher = [prompt_ids(backend.tokenizer, c.teacher) for c in contexts]
        answers = complete(backend, teacher, 0.0, args.max_completion_length)
        right = [
            float(grade(backend.tokenizer.decode(a.ids), row["answer"]).correct)
            for a, row in zip(answers, rows, strict=True)
        ]
        signals[order] = [
            signal(backend, {"base": c.base, "teacher": c.teacher, "reference_only": c.reference_only}, s.ids)
            for c, s in zip(contexts, scored, strict=False)
        ]
        print(f"{order}: accuracy of the teacher's greedy answers {show(right)} on {len(rows)} problems", flush=True)
    for name in next(iter(signals.values()))[0]:
        first, second = ([s[name] for s in signals[order]] for order in ORDERS)
        print(f"{name}: question first {show(first)}, reference first {show(second)}, ", end="")
        print(f"difference per problem {show([b - a for a, b in zip(first, second, strict=True)])}")


if __name__ == "__main__":
    main()
