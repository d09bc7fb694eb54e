"""
`purified-opsd bench loss`: forward and backward of the loss on random states, ours beside the other ways to get it.

Shapes: N tokens, H hidden units, V vocabulary entries. Every contender starts from last hidden states `[N, H]` and
ends with the gradient of the student's, and of the head's weight where the head is trainable.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..head import LMHead
from ..kernels.settings import LossSettings
from ..loss import FrozenStates, token_loss
from ..purification import divergence, purified_target_logits
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


PRESETS = {
    "cpu": {"tokens": 512, "hidden": 512, "vocab": 32768, "dtype": "float32", "device": "cpu"},
    "gpu": {"tokens": 8192, "hidden": 4096, "vocab": 151936, "dtype": "bfloat16", "device": "cuda"},
}

# Rows [V] of fp32 that the dense formula holds at its worst, per token; measured, and only used to refuse it early.
_NAIVE_ROWS = 14


@dataclass(frozen=True)
class Workload:
    """Inputs that all contenders share."""

    student: Tensor  # [N, H], a leaf
    student_weight: Tensor  # [V, H]
    frozen_weight: Tensor  # [V, H]; the student's own where the head is frozen
    base: Tensor  # [N, H]
    teacher: Tensor  # [N, H]
    reference_only: Tensor  # [N, H]
    delta: Tensor  # [N, H]
    weights: Tensor  # [N]
    settings: LossSettings

    @property
    def trainable(self) -> bool:
        return self.student_weight.requires_grad

    @property
    def product(self) -> float:
        """FLOPs of one product of all tokens with the head."""
        return 2.0 * self.student.numel() * self.student_weight.shape[0]

    def clear(self) -> None:
        """Drops the gradients of the run before."""
        self.student.grad = self.student_weight.grad = None


def make_workload(args: argparse.Namespace, device: torch.device) -> Workload:
    """Random states: the student near the base, teacher and reference-only state a little further away."""
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator(device).manual_seed(args.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    base = normal(args.tokens, args.hidden)
    student, teacher, probe = (base + normal(args.tokens, args.hidden, scale=s) for s in (0.2, 0.3, 0.3))
    weight = normal(args.vocab, args.hidden, scale=args.logit_std / math.sqrt(args.hidden)).to(dtype)
    trainable = args.head == "trainable"
    return Workload(
        student=student.to(dtype).requires_grad_(),
        student_weight=weight.requires_grad_(trainable),
        frozen_weight=weight.detach().clone() if trainable else weight,
        base=base.to(dtype),
        teacher=teacher.to(dtype),
        reference_only=probe.to(dtype),
        delta=(teacher - probe).to(dtype),
        weights=torch.full((args.tokens,), 1 / args.tokens, device=device),
        settings=LossSettings(beta=args.beta, loss_chunk_size=args.chunk_size, loss_memory_budget=args.memory_budget),
    )


def make_contenders(work: Workload, compiled: bool) -> list[Contender]:
    """All contenders, with the matrix products that each of them owes."""
    mixed = 0.0 < work.settings.beta < 1.0
    head = int(work.trainable)

    def contender(name: str, loss: Callable[[], Tensor], products: int) -> Contender:
        return Contender(name, lambda: loss().backward(), products * work.product, work.clear)

    contenders = [
        contender("ours purified", lambda: _ours(work, "purified"), 4 + head),
        contender("ours plain", lambda: _ours(work, "teacher"), 3 + head),
        contender("naive purified", lambda: _naive(work), 5 + head),
        # logits of both models for the statistics, again for the mixture, again for the gradient, then its product
        contender("TRL plain", lambda: _trl(work), (7 if mixed else 5) + head),
        contender("Liger plain", lambda: _liger(work, compiled), 4),  # forms the head's gradient in any case
    ]
    if compiled:
        naive = torch.compile(_naive_loss)
        contenders.insert(3, contender("naive purified, compiled", lambda: _naive(work, naive), 5 + head))
    return [*contenders, _matrix_products(work)]


def _ours(work: Workload, target: str) -> Tensor:
    states = (
        FrozenStates(teacher=work.teacher) if target == "teacher" else FrozenStates(base=work.base, delta=work.delta)
    )
    settings = LossSettings(**{**vars(work.settings), "target": target})
    heads = LMHead(work.student_weight), LMHead(work.frozen_weight)
    return token_loss(work.student, heads[0], states, heads[1], work.weights, settings).loss


def _naive_loss(
    student: Tensor, student_weight: Tensor, frozen: Sequence[Tensor], frozen_weight: Tensor, beta: float
) -> Tensor:
    """The definition: four dense logit tensors, four softmaxes, autograd. Returns the divergence per token, `[N]`."""
    with torch.no_grad():
        teacher, reference_only, base = (state @ frozen_weight.T for state in frozen)
        target = purified_target_logits(teacher, reference_only, base, pmi_beta=1.0, pmi_clip=10.0, pmi_center=True)
    return divergence(student @ student_weight.T, target, beta)


def _naive(work: Workload, function: Callable[..., Tensor] = _naive_loss) -> Tensor:
    if work.student.device.type == "cpu":
        needed = _NAIVE_ROWS * 4 * work.student.shape[0] * work.student_weight.shape[0]
        available = _available_memory()
        if needed > available:
            raise RuntimeError(f"does not fit: about {needed / 2**30:.0f} GiB of {available / 2**30:.0f} GiB free")
    frozen = (work.teacher, work.reference_only, work.base)
    per_token = function(work.student, work.student_weight, frozen, work.frozen_weight, work.settings.beta)
    return (per_token * work.weights).sum()


def _available_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _trl(work: Workload) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(
        work.student, work.student_weight, None, work.teacher, work.frozen_weight, None, work.settings.beta
    )
    return (per_token * work.weights).sum()


def _liger(work: Workload, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=work.settings.beta, compiled=compiled
    )
    labels = torch.zeros(len(work.student), dtype=torch.long, device=work.student.device)
    return loss(work.student, work.student_weight, work.teacher, work.frozen_weight, labels)


def _matrix_products(work: Workload) -> Contender:
    """One product to logits and one back, nothing else: the rate that the machine reaches at these sizes."""
    tokens = min(len(work.student), 2048)
    hidden, weight = work.base[:tokens], work.frozen_weight.detach()
    if hidden.device.type == "cpu" and hidden.dtype != torch.float64:
        hidden, weight = hidden.float(), weight.float()  # what the contenders compute in
    logits, back = hidden.new_empty(tokens, len(weight)), torch.empty_like(hidden)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=back)

    return Contender("matrix products alone", run, 4.0 * hidden.numel() * len(weight))


def table(results: dict[str, Measurement], clock: str) -> list[str]:
    """Markdown table: time, its ratio to TRL's kernel and to the naive formula, memory, share of the matmul rate."""
    rate = None
    products = results.get("matrix products alone")
    if products is not None and products.seconds and products.flops:
        rate = products.flops / products.median(clock)
    rows = []
    for name, result in results.items():
        if result.error is not None or not result.seconds:
            rows.append([name, result.error or "not run", *["-"] * 5])
            continue
        share = "-"
        if rate is not None and result.flops is not None:
            share = f"{result.flops / result.median(clock) / rate:.0%}"
        rows.append(
            [
                name,
                show_time(result, clock),
                show_ratio(result, results.get("TRL plain"), clock),
                show_ratio(result, results.get("naive purified"), clock),
                show_bytes(result.peak_bytes),
                f"{(result.flops or 0.0) / 1e9:.1f}",
                share,
            ]
        )
    unit = "ms" if clock == "seconds" else "CPU ms"
    header = (f"forward + backward, {unit} [quartiles]", "/ TRL plain", "/ naive", "peak MiB", "GFLOP", "matmul rate")
    return markdown_table(("contender", *header), rows)


def make_parser() -> argparse.ArgumentParser:
    """Flags of `purified-opsd bench loss`."""
    parser = argparse.ArgumentParser(
        prog="purified-opsd bench loss",
        description="Time forward and backward of the loss: ours, the naive formula, TRL's kernel, Liger's.",
    )
    parser.add_argument("--tokens", type=int, help="N")
    parser.add_argument("--hidden", type=int, help="H")
    parser.add_argument("--vocab", type=int, help="V")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--head", choices=("frozen", "trainable"), default="frozen", help="LoRA, or full fine-tuning")
    parser.add_argument("--beta", type=float, default=0.5, help="interpolation of the divergence")
    parser.add_argument("--logit-std", type=float, default=3.0, help="standard deviation of the logits")
    parser.add_argument("--chunk-size", type=int, help="tokens of one chunk; default: from the memory budget")
    parser.add_argument("--memory-budget", type=int, default=512, help="MiB of scratch memory")
    parser.add_argument("--compile", action="store_true", help="also compile the naive formula, and Liger's loss")
    add_common_arguments(parser, "loss", PRESETS)
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    args, device = parse(make_parser(), PRESETS, argv)
    work = make_workload(args, device)
    results = alternate(select(make_contenders(work, args.compile), args.contenders), args.repetitions, device)
    names = ("tokens", "hidden", "vocab", "dtype", "head", "beta", "logit_std", "chunk_size", "memory_budget")
    report = {
        "benchmark": "loss",
        "settings": {name: getattr(args, name) for name in names},
        "environment": environment(device),
        "contenders": {name: as_json(result) for name, result in results.items()},
    }
    write_report(report, "Forward and backward of the loss", table(results, CLOCKS[args.clock]), args.output)
    return 0
