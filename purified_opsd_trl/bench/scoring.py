"""
`purified-opsd bench scoring`: one scoring pass with the reference before the question, its prefix run twice or once.

The prompts are token ids: teacher = reference, question, ending; reference-only = reference, ending; base = question.
`prefix kept` starts from keys and values of the reference that are already there, copied once: the most that keeping
them from one epoch to the next, or from one row to another with the same reference, could gain.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from ..extras import require_extra
from .measure import (
    CLOCKS,
    Contender,
    Measurement,
    add_common_arguments,
    alternate,
    as_json,
    environment,
    markdown_table,
    parse,
    select,
    show_bytes,
    show_ratio,
    show_time,
    write_report,
)
from .step import Bench


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        **{"layers": 1, "hidden": 256, "heads": 4, "dtype": "float32", "device": "cpu"},
        **{"rows": 1, "prompt": 128, "completion": 512, "references": [512, 4096, 16384]},
    },
    "gpu": {
        **{"layers": 36, "hidden": 4096, "heads": 32, "dtype": "bfloat16", "device": "cuda"},
        **{"rows": 4, "prompt": 256, "completion": 1024, "references": [512, 4096, 16384]},
    },
}
_ENDING = 16  # tokens of the instruction that follows in both prompts
_VOCAB = 1024  # scoring projects nothing
_CONTENDERS = ("separate", "shared prefix", "prefix kept")


class ScoringPass:
    """One scoring pass over rows whose reference has `reference` tokens."""

    def __init__(self, trainer: Any, args: argparse.Namespace, reference: int):
        self.trainer, self.args, self.reference = trainer, args, reference
        generator = torch.Generator().manual_seed(args.seed)

        def ids(count: int) -> list[list[int]]:
            return torch.randint(8, _VOCAB, (args.rows, count), generator=generator).tolist()

        self.references, questions, endings = ids(reference), ids(args.prompt), ids(_ENDING)
        if args.same_reference:
            self.references = self.references[:1] * args.rows
        rows = list(zip(self.references, questions, endings, strict=True))
        self.prompts = {
            "base": questions,
            "teacher": [r + q + e for r, q, e in rows],
            "reference_only": [r + e for r, _, e in rows],
        }
        self.completions = ids(args.completion)
        self.kept: DynamicCache | None = None

    def flops(self, name: str) -> float:
        """Operations of the layers' linear maps and of attention, by the sequences that `name` runs."""
        completion, args = self.args.completion, self.args
        lengths = {context: len(ids[0]) + completion for context, ids in self.prompts.items()}
        branches = [lengths[context] for context in ("teacher", "reference_only")]
        if name == "separate":
            runs = [(0, length, args.rows) for length in branches]  # tokens seen before, tokens run, how often
        else:
            runs = [(self.reference, length - self.reference, args.rows) for length in branches]
        if name == "shared prefix":
            batches = math.ceil(
                args.rows / max(1, args.rows // 2)
            )  # a batch holds as many sequences as there are rows
            runs.append((0, self.reference, batches if args.same_reference else args.rows))

        def cost(before: int, count: int) -> float:
            return 2.0 * (4 + 3 * 3) * args.hidden**2 * count + 4.0 * args.hidden * count * (before + count / 2)

        runs.append((0, lengths["base"], args.rows))
        return args.layers * sum(times * cost(before, count) for before, count, times in runs)

    def run(self, share: bool) -> Any:
        """Scores everything by the trainer's own callback."""
        self.trainer.args.share_reference_prefix = share
        return self.trainer.scoring_callback.score(self.prompts, self.completions)

    def keep(self) -> None:
        """Forms the keys and values of the references."""
        self.kept = None
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.kept = DynamicCache(config=model.config)
        self._backbone(torch.tensor(self.references), self.kept)

    def run_kept(self) -> None:
        """What is left to do where keys and values of the references are already there."""
        assert self.kept is not None
        self.trainer.scoring_callback.score({"base": self.prompts["base"]}, self.completions)
        for context in ("teacher", "reference_only"):
            rows = zip(self.prompts[context], self.completions, strict=True)
            rest = [prompt[self.reference :] + completion for prompt, completion in rows]
            self._backbone(torch.tensor(rest), copy.deepcopy(self.kept))

    def _backbone(self, ids: torch.Tensor, cache: DynamicCache) -> None:
        with self.trainer.scoring_callback.frozen_model() as (_, model), torch.no_grad():
            ids = ids.to(self.trainer.accelerator.device)
            model.base_model.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)

    def contenders(self) -> list[Contender]:
        """The three ways to score."""

        def once(share: bool) -> Any:
            return lambda: self.run(share) and None

        runs = (once(False), once(True), self.run_kept)
        prepares = (None, None, self.keep)
        return [
            Contender(name, run, self.flops(name), prepare)
            for name, run, prepare in zip(_CONTENDERS, runs, prepares, strict=True)
        ]


def make_trainer(args: argparse.Namespace, device: torch.device, folder: Path) -> Any:
    """Our trainer with a random model, whose callback scores."""
    sizes = {"vocab": _VOCAB, "reference": 1, "lora_rank": 1, "gradient_checkpointing": False, "memory_budget": 512}
    return Bench(argparse.Namespace(**vars(args), **sizes), device, folder).ours("purified")


def table(results: dict[int, dict[str, Measurement]], clock: str) -> list[str]:
    """Markdown table by length of the reference: time, its ratio to separate forwards, that of the FLOPs, memory."""
    rows = []
    for reference, contenders in results.items():
        separate = contenders.get("separate")
        for name, result in contenders.items():
            if result.error is not None or not result.seconds:
                rows.append([str(reference), name, result.error or "not run", *["-"] * 3])
                continue
            predicted = "-" if separate is None else f"{(result.flops or 0.0) / (separate.flops or 1.0):.2f}"
            figures = show_time(result, clock), show_ratio(result, separate, clock), predicted
            rows.append([str(reference), name, *figures, show_bytes(result.peak_bytes)])
    unit = "ms" if clock == "seconds" else "CPU ms"
    header = ("reference", "contender", f"scoring, {unit} [quartiles]", "/ separate", "FLOP / separate", "peak MiB")
    return markdown_table(header, rows)


def make_parser() -> argparse.ArgumentParser:
    """Flags of `purified-opsd bench scoring`."""
    parser = argparse.ArgumentParser(
        prog="purified-opsd bench scoring",
        description="Time scoring with the reference first: its prefix run twice, once, or not at all.",
    )
    for name, text in {
        "layers": "decoder layers",
        "hidden": "hidden units",
        "heads": "attention heads",
        "rows": "rows scored together",
        "prompt": "tokens of a question",
        "completion": "tokens of a completion",
    }.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--references", type=int, nargs="+", help="tokens of a reference, one run each")
    parser.add_argument("--same-reference", action="store_true", help="all rows carry one reference")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    add_common_arguments(parser, "scoring", PRESETS)
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    args, device = parse(make_parser(), PRESETS, argv)
    require_extra("peft", "`bench scoring`")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, device, Path(folder))
        for reference in args.references:
            contenders = select(ScoringPass(trainer, args, reference).contenders(), args.contenders)
            results[reference] = alternate(contenders, args.repetitions, device)
    settings = {name: getattr(args, name) for name in (*PRESETS["cpu"], "same_reference") if name != "device"}
    report = {
        "benchmark": "scoring",
        "settings": settings,
        "environment": environment(device),
        "references": {
            str(reference): {name: as_json(result) for name, result in contenders.items()}
            for reference, contenders in results.items()
        },
    }
    write_report(report, "Scoring with the reference first", table(results, CLOCKS[args.clock]), args.output)
    return 0
