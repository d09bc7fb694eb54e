"""
`purified-opsd bench scoring`: one scoring pass with the reference before the question, its prefix run twice or once.

The prompts are token ids: teacher = reference, question, ending; reference-only = reference, ending; base = question.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..extras import require_extra
from . import measure
from .measure import Contender, option
from .step import Bench, StepArguments


_ENDING = 16  # tokens of the instruction that follows in both prompts
# `share_reference_prefix` and `padding_free`; the last beside them where lengths differ, or by name
_CONTENDERS = {"separate": (False, "auto"), "shared prefix": (True, "auto"), "padded": (False, "false")}


@dataclass
class ScoringArguments(StepArguments):
    """Time scoring with the reference first: its prefix run twice, or once."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {},
        "gpu": {**StepArguments.PRESETS["gpu"], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    }

    num_hidden_layers: int = option(1, "Decoder layers.")
    vocab_size: int = option(1024, "Vocabulary entries; scoring projects nothing.")
    per_device_train_batch_size: int = option(1, "Rows scored together.")
    prompt_length: int = option(128, "Tokens of a question.")
    completion_length: int = option(512, "Tokens of a completion.")
    reference_lengths: list[int] = option([512, 4096, 16384], "Tokens of a reference, one run each.")
    same_reference: bool = option(False, "All rows carry one reference.")


class ScoringPass:
    """One scoring pass over rows whose reference has `reference` tokens."""

    def __init__(self, trainer: Any, args: ScoringArguments, reference: int):
        self.trainer, self.args, self.reference = trainer, args, reference
        generator = torch.Generator().manual_seed(args.seed)

        def ids(count: int) -> list[list[int]]:
            return torch.randint(8, args.vocab_size, (args.rows, count), generator=generator).tolist()

        references, questions, endings = ids(reference), ids(args.prompt_length), ids(_ENDING)
        if args.same_reference:
            references = references[:1] * args.rows
        rows = list(zip(references, questions, endings, strict=True))
        self.prompts = {
            "base": questions,
            "teacher": [r + q + e for r, q, e in rows],
            "reference_only": [r + e for r, _, e in rows],
        }
        longest = ids(args.completion_length)
        self.lengths = args.completion_lengths()
        self.completions = [one[:length] for one, length in zip(longest, self.lengths, strict=True)]

    def flops(self, share: bool) -> float:
        """Operations of the layers' linear maps and of attention, by the sequences that are run."""
        args, rows = self.args, self.args.rows
        base, *branches = (len(ids[0]) for ids in self.prompts.values())
        total = sum(args.forward_flops(base + own) for own in self.lengths)
        both = [prompt + own for prompt in branches for own in self.lengths]
        if not share:
            return total + sum(args.forward_flops(length) for length in both)
        batches = math.ceil(rows / max(1, rows // 2))  # a batch holds as many sequences as there are rows
        total += (batches if args.same_reference else rows) * args.forward_flops(self.reference)
        return total + sum(args.forward_flops(length - self.reference, self.reference) for length in both)

    def run(self, share: bool, padding_free: str = "auto") -> Any:
        """Scores everything by the trainer's own callback."""
        self.trainer.args.share_reference_prefix, self.trainer.args.padding_free = share, padding_free
        return self.trainer.scoring_callback.score(self.prompts, self.completions)

    def contender(self, name: str) -> Contender:
        """One of the ways to score."""
        share, padding_free = _CONTENDERS[name]
        return Contender(name, lambda: self.run(share, padding_free) and None, self.flops(share))


def make_trainer(args: ScoringArguments, device: torch.device, folder: Path) -> Any:
    """Our trainer with a random model, whose callback scores."""
    return Bench(replace(args, reference_length=1), device, folder).ours("purified")


def table(results: dict[int, dict[str, Contender]], clock: str) -> measure.Table:
    """By length of the reference: time, its ratio to separate forwards, that of the FLOPs, memory."""
    unit = "ms" if clock == "seconds" else "CPU ms"
    header = [f"scoring, {unit} [quartiles]", "/ separate", "FLOP / separate", "peak GiB"]
    rows = [["reference", "contender", *header]]
    for reference, contenders in results.items():
        separate = contenders.get("separate")

        def figures(one: Contender, separate: Contender | None = separate) -> list[str]:
            predicted = "-" if separate is None else f"{(one.flops or 0.0) / (separate.flops or 1.0):.2f}"
            times = measure.show_time(one, clock), measure.show_ratio(one, separate, clock)
            return [*times, predicted, measure.show_bytes(one.peak_bytes)]

        rows += [[str(reference), *row] for row in measure.tabulate(header, contenders.values(), figures)[1:]]
    return rows


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    args = measure.parse(ScoringArguments, argv)
    device = args.prepare()
    require_extra("peft", "`bench scoring`")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, device, Path(folder))
        for reference in args.reference_lengths:
            scoring_pass = ScoringPass(trainer, args, reference)
            names = [name for name in _CONTENDERS if name != "padded" or args.lengths != "equal" or args.contenders]
            contenders = [scoring_pass.contender(name) for name in measure.select(names, args.contenders)]
            results[reference] = measure.alternate(contenders, args.repetitions, device)
    report = {
        "benchmark": "scoring",
        "references": {
            str(reference): {name: result.as_json() for name, result in contenders.items()}
            for reference, contenders in results.items()
        },
    }
    rows = table(results, measure.CLOCKS[args.clock])
    measure.write_report(args, report, "Scoring with the reference first", rows)
    return 0
