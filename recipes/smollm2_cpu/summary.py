"""
Print what the demo learned and where the adapter is.

    python recipes/smollm2_cpu/summary.py [--output_dir outputs/smollm2-demo] [--data .cache/gsm_symbolic/test.jsonl]

Reads the training log, then scores held-out problems with dense logits from the definitions: the student is the model
with its adapter, and every frozen distribution is the same model without it.
"""

import argparse
import itertools
import json
import textwrap
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from purified_opsd_trl import (
    Decomposition,
    build_contexts,
    decompose,
    divergence,
    purified_target_logits,
)
from purified_opsd_trl.train import make_parser


RECIPE = Path(__file__).parent / "config_demo.yaml"
HELD_OUT = 3  # problems, four forward passes each
METRICS = {
    "loss": "loss",
    "entropy": "student entropy",
    "purification/target_entropy": "target entropy",
    "purification/kl_target_student": "KL(target || student)",
    "purification/kl_target_base": "KL(target || base)",
    "purification/clip_saturation": "share of the vocabulary clipped",
    "completions/mean_length": "completion length (tokens)",
    "step_time": "seconds per step",
}


class Scorer:
    """Completions of the trained model, and their dense logits `[C, V]` (completion by vocabulary) under a prompt."""

    def __init__(self, output_dir: Path) -> None:
        self.model = AutoPeftModelForCausalLM.from_pretrained(output_dir).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(output_dir)
        # Templates, clip and temperature of the recipe that the run was started from
        (_, self.config, *_), *_ = make_parser().parse_known(["--config", str(RECIPE)])

    def prompt_ids(self, prompt: Any) -> list[int]:
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]

    def weights(self, frozen: bool) -> AbstractContextManager[None]:
        return self.model.disable_adapter() if frozen else nullcontext()

    @torch.no_grad()
    def complete(self, prompts: list[Any], *, frozen: bool) -> list[list[int]]:
        """Greedy completion ids of each prompt, up to and with the end of the turn."""
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        with self.weights(frozen):
            output = self.model.generate(**batch, max_new_tokens=self.config.max_completion_length, do_sample=False)
        completions = output[:, batch["input_ids"].shape[1] :].tolist()
        end = self.tokenizer.eos_token_id
        return [c[: c.index(end) + 1] if end in c else c for c in completions]

    @torch.no_grad()
    def logits(self, prompt: Any, completion: list[int], *, frozen: bool) -> torch.Tensor:
        ids = torch.tensor([self.prompt_ids(prompt) + completion])
        with self.weights(frozen):
            logits = self.model(input_ids=ids, logits_to_keep=len(completion) + 1).logits[0]
        return logits[:-1] / self.config.temperature  # logits at a position predict the next token


def score(
    scorer: Scorer, row: dict[str, Any], completion: list[int]
) -> tuple[float, float, Decomposition, torch.Tensor]:
    """
    Distance to the purified target before and after training, and what the teacher's signal consists of.

    Returns:
        `tuple`: KL(target || student) before and after (nats per token), the decomposition with the trained student
        `[C, V]`, and the trained student's probabilities `[C, V]`.
    """
    config = scorer.config
    contexts = build_contexts(
        row,
        reference_column=config.reference_column,
        teacher_prompt_template=config.teacher_prompt_template,
        reference_prompt_template=config.reference_prompt_template,
    )
    student = scorer.logits(contexts.base, completion, frozen=False)
    base = scorer.logits(contexts.base, completion, frozen=True)
    teacher = scorer.logits(contexts.teacher, completion, frozen=True)
    reference_only = scorer.logits(contexts.reference_only, completion, frozen=True)
    target = purified_target_logits(
        teacher,
        reference_only,
        base,
        pmi_beta=config.pmi_beta,
        pmi_clip=config.pmi_clip,
        pmi_center=config.pmi_center,
    )
    before, after = (divergence(model, target, beta=0.0).mean().item() for model in (base, student))
    return before, after, decompose(student, teacher, reference_only), student.softmax(dim=-1)


def print_log(output_dir: Path) -> None:
    """First and last step of the newest training log under `output_dir`."""
    states = sorted(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        print(f"No checkpoint under {output_dir}, so there is no training log.")
        return
    steps = [entry for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]
    print(f"Training log ({states[-1]}), in nats per token unless stated otherwise")
    shown = steps[:1] + steps[1:][-1:]
    print(f"  {'':34}" + "".join(f"{'step ' + str(entry['step']):>10}" for entry in shown))
    for key, name in METRICS.items():
        if key in steps[0]:
            print(f"  {name:34}" + "".join(f"{entry[key]:10.4g}" for entry in shown))


def print_decomposition(parts: Decomposition, probabilities: torch.Tensor) -> None:
    """
    Cosines averaged over the tokens, and norm ratios.

    The plain ones are dominated by the tail of the vocabulary, which is never sampled; the others weight each entry by
    the student's probability.
    """
    print(f"  {'':34}{'plain':>10}{'weighted':>10}")
    weighted = Decomposition(*(part * probabilities.sqrt() for part in parts))
    for name in ("ref", "it"):
        cosines = [torch.cosine_similarity(d.total, getattr(d, name), dim=-1).mean() for d in (parts, weighted)]
        print(f"  {f'cos(total, {name})':34}{cosines[0]:10.3f}{cosines[1]:10.3f}")
    norms = [(d.ref.norm(dim=-1), d.total.norm(dim=-1)) for d in (parts, weighted)]
    # Not a mean of ratios: where teacher and student agree, a ratio's denominator is close to zero
    print(f"  {'mean |ref| / mean |total|':34}" + "".join(f"{ref.sum() / total.sum():10.3f}" for ref, total in norms))
    medians = (ref.div(total).quantile(0.5) for ref, total in norms)
    print(f"  {'median of |ref| / |total|':34}" + "".join(f"{median:10.3f}" for median in medians))


def print_text(title: str, text: str) -> None:
    print(f"{title}\n{textwrap.indent(text.strip(), '  | ', lambda line: True)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what the demo learned.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2-demo"))
    parser.add_argument("--data", type=Path, default=Path(".cache/gsm_symbolic/test.jsonl"), help="Held-out problems.")
    args = parser.parse_args()

    print("\n=== What was learned ===")
    print_log(args.output_dir)

    scorer = Scorer(args.output_dir)
    with args.data.open(encoding="utf-8") as lines:  # `splitlines` would also split at separators inside strings
        rows = [json.loads(line) for line in itertools.islice(lines, HELD_OUT)]
    completions = scorer.complete([row["prompt"] for row in rows], frozen=True)
    scores = [score(scorer, row, completion) for row, completion in zip(rows, completions, strict=True)]
    print(f"\n{len(rows)} held-out problems, greedy completions of the base model (nats per token)")
    for name, column in (("KL(target || student) before", 0), ("KL(target || student) after", 1)):
        print(f"  {name:34}{sum(s[column] for s in scores) / len(scores):10.4f}")
    print(f"\nThe teacher's signal on the first of them, {len(completions[0])} tokens: total = ref + it")
    print_decomposition(*scores[0][2:])

    print()
    print_text("Problem", rows[0]["prompt"][-1]["content"])
    print_text("Before (greedy)", scorer.tokenizer.decode(completions[0], skip_special_tokens=True))
    after = scorer.complete([rows[0]["prompt"]], frozen=False)[0]
    print_text("After (greedy)", scorer.tokenizer.decode(after, skip_special_tokens=True))
    print(f"\nAdapter: {args.output_dir}")
    print("A few steps of so small a model show that training works, not that the model reasons better.")


if __name__ == "__main__":
    main()
