"""
One distillation run with the package's own trainer, and its evaluation along the way.

    python -m recipes.lab.run --base BASE --target purified --output outputs/lab/results.jsonl
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from purified_opsd_trl import PurifiedOPSDConfig
from recipes.lab.stale import StaleRolloutTrainer
from recipes.lab.task import Counts, Problem, count, sample_problem, words_of


CONFIG = Path(__file__).parent / "config.yaml"
TRAIN_PROBLEMS = 4096
EVAL_SEED = 2**20


@dataclass(frozen=True)
class Run:
    """
    Settings that vary between runs; all others are in `config.yaml`.

    Attributes:
        world (`str`):
            World of the base model: `style` or `repair`.
        seed (`int`):
            Seed of the base model.
        repeat (`int`):
            Seed of the distillation.
        target (`str`):
            `purified`, `teacher` for plain OPSD, or another target.
        rich (`bool`):
            Whether the reference holds the sorted intermediate values as well.
        pmi_beta, pmi_clip (`float`):
            Settings of the purified target.
        beta (`float`):
            TRL's: 0 is the forward KL(target || student), 1 the reverse, 0.5 Jensen-Shannon.
        teacher (`str`):
            `teacher_model_kind`.
        lag (`int`):
            Number of updates by which the sampler lags.
        learning_rate (`float`):
            Constant learning rate of AdamW.
        steps, eval_every (`int`):
            Optimizer steps in all, and between two evaluations.
    """

    world: str = "style"
    seed: int = 0
    repeat: int = 0
    target: str = "purified"
    rich: bool = False
    pmi_beta: float = 1.0
    pmi_clip: float = 10.0
    beta: float = 0.5
    teacher: str = "base"
    lag: int = 0
    learning_rate: float = 1e-3
    steps: int = 60
    eval_every: int = 20

    @property
    def name(self) -> str:
        """What differs from the defaults, as one word."""
        parts = [self.world, self.target, f"s{self.seed}", f"r{self.repeat}"]
        parts += ["rich"] * self.rich
        parts += [f"beta{self.pmi_beta:g}"] * (self.pmi_beta != 1.0) + [f"c{self.pmi_clip:g}"] * (
            self.pmi_clip != 10.0
        )
        parts += [f"jsd{self.beta:g}"] * (self.beta != 0.5)
        parts += [self.teacher] * (self.teacher != "base") + [f"lag{self.lag}"] * (self.lag != 0)
        parts += [f"lr{self.learning_rate:g}"] * (self.learning_rate != 1e-3)
        return "-".join(parts)


def problems(seed: int, number: int, modulus: int, held_out: bool) -> list[Problem]:
    """Draws problems; see `sample_problem`."""
    rng = random.Random(seed)
    return [sample_problem(rng, modulus, held_out) for _ in range(number)]


@torch.no_grad()
def respond(model: Any, tokenizer: Any, prompts: list[str], greedy: bool, max_new_tokens: int = 48) -> list[str]:
    """
    Responses in one batched generation.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Any model of the lab.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Its tokenizer.
        prompts (`list[str]`):
            B prompts.
        greedy (`bool`):
            Whether to take the most likely tokens instead of sampling at temperature 1.
        max_new_tokens (`int`, *optional*, defaults to `48`):
            Longest response in tokens.

    Returns:
        `list[str]`: B responses as words.
    """
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    was_training = model.training
    model.eval()
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=not greedy,
        top_k=0,
        max_new_tokens=max_new_tokens,
    )
    model.train(was_training)
    return [words_of(row, tokenizer) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]


def evaluate(model: Any, tokenizer: Any, held_out: list[Problem], seed: int = 0) -> dict[str, dict[str, float | None]]:
    """Rates at temperature 1 and greedy, of one response per problem. The random state stays as it was."""
    rates = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for decoding in ("sampled", "greedy"):
            responses = respond(model, tokenizer, [p.question for p in held_out], greedy=decoding == "greedy")
            rates[decoding] = sum(map(count, held_out, responses), Counts()).rates()
    return rates


class Evaluation(TrainerCallback):
    """Evaluates before the first update and every `every` steps; `curve` holds the rates by step."""

    def __init__(self, tokenizer: Any, held_out: list[Problem], every: int):
        self.tokenizer, self.held_out, self.every = tokenizer, held_out, every
        self.curve: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._evaluate(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._evaluate(state.global_step, model)

    def _evaluate(self, step: int, model: Any) -> None:
        self.curve.append({"step": step, **evaluate(model, self.tokenizer, self.held_out)})


def distil(run: Run, base: Path, eval_problems: int = 512) -> dict[str, Any]:
    """
    Trains and evaluates.

    Args:
        run ([`Run`]):
            Settings of the run.
        base (`Path`):
            Folder of the base model.
        eval_problems (`int`, *optional*, defaults to `512`):
            Held-out problems per evaluation.

    Returns:
        `dict[str, Any]`: the run, its curve, seconds, and with a lag the mean `distance` of the policies in nats per
        token, see [`StaleRolloutTrainer`].
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    modulus = sum(token.isdecimal() for token in tokenizer.get_vocab())
    rows = problems(run.repeat, TRAIN_PROBLEMS, modulus, held_out=False)
    data = Dataset.from_list([{"prompt": p.question, "reference": p.reference(run.rich)} for p in rows])
    evaluation = Evaluation(tokenizer, problems(EVAL_SEED, eval_problems, modulus, held_out=True), run.eval_every)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **yaml.safe_load(CONFIG.read_text()),
            "target": run.target,
            "pmi_beta": run.pmi_beta,
            "pmi_clip": run.pmi_clip,
            "beta": run.beta,
            "teacher_model_kind": run.teacher,
            "learning_rate": run.learning_rate,
            "max_steps": run.steps,
            "seed": run.repeat,
            "output_dir": folder,
        }
        set_seed(run.repeat)
        trainer = StaleRolloutTrainer(
            lag=run.lag,
            model=model,
            args=PurifiedOPSDConfig(**settings),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[evaluation],
        )
        started = time.perf_counter()
        trainer.train()
    seconds = round(time.perf_counter() - started)
    distances = trainer.distances[run.lag :] if run.lag else []  # from the first rollout by an older policy on
    distance = {"distance": round(statistics.fmean(distances), 6)} if distances else {}
    return {"run": asdict(run), "seconds": seconds, **distance, "curve": evaluation.curve}


def save(result: dict[str, Any], path: Path) -> None:
    """Appends a result to a JSON Lines file, the rates of the curve with four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    curve = json.loads(json.dumps(result["curve"]), parse_float=lambda text: round(float(text), 4))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**result, "curve": curve}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    for field, value in asdict(Run()).items():
        parser.add_argument(f"--{field}", type=type(value), default=value)
    options = vars(parser.parse_args())
    base, output = options.pop("base"), options.pop("output")
    save(distil(Run(**options), base), output)
