"""
`purified-opsd bench loss`: forward and backward of the loss on random states, beside other implementations.

Shapes: N tokens, H hidden units, V vocabulary entries. Every contender starts from last hidden states `[N, H]` and
ends with the gradient of the student's, and of the head's weight where the head is trainable.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..head import LMHead
from ..kernels.settings import LossSettings
from ..loss import FrozenStates, token_loss
from ..purification import divergence, purified_target_logits
from . import measure
from .measure import Contender, option


# Rows [V] of fp32 that the dense formula holds at its worst, per token; measured, and only used to make it fit.
_NAIVE_ROWS = 14


@dataclass
class LossArguments(measure.BenchArguments):
    """Time forward and backward of the loss: this package, the dense formula, TRL's kernel, Liger's."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {},
        "gpu": {"tokens": 8192, "hidden_size": 4096, "vocab_size": 151936, "dtype": "bfloat16", "device": "cuda"},
    }

    tokens: int = option(512, "N")
    hidden_size: int = option(512, "H")
    vocab_size: int = option(32768, "V")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Dtype of states and heads.")
    head: Literal["frozen", "trainable"] = option("frozen", "As in LoRA, or as in full fine-tuning.")
    beta: float = option(0.5, "Interpolation of the divergence.")
    logit_std: float = option(3.0, "Standard deviation of the logits.")
    loss_chunk_size: int | None = option(None, "Tokens of one chunk. None: from the memory budget.")
    loss_memory_budget: int = option(512, "Scratch memory of the loss in MiB.")
    torch_compile: bool = option(False, "Also compile the dense formula, and Liger's loss.")


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


def make_workload(args: LossArguments, device: torch.device) -> Workload:
    """Random states: the student near the base, teacher and reference-only state a little further away."""
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator(device).manual_seed(args.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    states = (args.tokens, args.hidden_size)
    base = normal(*states)
    student, teacher, probe = (base + normal(*states, scale=s) for s in (0.2, 0.3, 0.3))
    scale = args.logit_std / math.sqrt(args.hidden_size)
    weight = normal(args.vocab_size, args.hidden_size, scale=scale).to(dtype)
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
        settings=LossSettings(
            beta=args.beta, loss_chunk_size=args.loss_chunk_size, loss_memory_budget=args.loss_memory_budget
        ),
    )


def make_contenders(work: Workload, compiled: bool) -> list[Contender]:
    """All contenders, with the matrix products that each of them owes."""
    mixed = 0.0 < work.settings.beta < 1.0
    head, count = int(work.trainable), len(work.student)

    def contender(name: str, loss: Callable[[], Tensor], products: int) -> Contender:
        return Contender(name, lambda: loss().backward(), products * work.product, work.clear)

    def naive(name: str, function: Callable[..., Tensor]) -> Contender:
        tokens = naive_tokens(work)

        def run() -> None:
            nonlocal tokens
            while True:
                made.share = tokens / count or 1.0
                made.flops = (5 + head) * work.product * made.share
                with contextlib.suppress(torch.OutOfMemoryError):
                    return _naive(work, tokens, function).backward()
                tokens //= 2
                work.clear()

        made = Contender(name, run, prepare=work.clear)
        return made

    contenders = [
        contender("ours purified", lambda: _ours(work, "purified"), 4 + head),
        contender("ours plain", lambda: _ours(work, "teacher"), 3 + head),
        naive("naive purified", _naive_loss),
        # logits of both models for the statistics, again for the mixture, again for the gradient, then its product
        contender("TRL plain", lambda: _trl(work), (7 if mixed else 5) + head),
        contender("Liger plain", lambda: _liger(work, compiled), 4),  # forms the head's gradient in any case
    ]
    if compiled:
        contenders.insert(3, naive("naive purified, compiled", torch.compile(_naive_loss)))
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


def naive_tokens(work: Workload) -> int:
    """Tokens for which the dense formula fits into the free memory: all of them, or N halved until it does."""
    tokens, free = len(work.student), available_memory(work.student.device)
    while tokens and _NAIVE_ROWS * 4 * tokens * work.student_weight.shape[0] > free:
        tokens //= 2
    return tokens


def _naive(work: Workload, tokens: int, function: Callable[..., Tensor]) -> Tensor:
    if not tokens:
        raise RuntimeError("does not fit into the free memory, not even for one token")
    frozen = (work.teacher[:tokens], work.reference_only[:tokens], work.base[:tokens])
    per_token = function(work.student[:tokens], work.student_weight, frozen, work.frozen_weight, work.settings.beta)
    return (per_token * work.weights[:tokens]).sum()


def available_memory(device: torch.device) -> float:
    """Free memory of a device in bytes; infinite where the platform does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))


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

    share = tokens / len(work.student)
    return Contender("matrix products alone", run, 4.0 * hidden.numel() * len(weight), share=share)


def table(results: dict[str, Contender], clock: str) -> measure.Table:
    """Time, its ratio to TRL's kernel and to the dense formula, memory, share of the matmul rate."""
    unit = "ms" if clock == "seconds" else "CPU ms"
    header = [f"forward + backward, {unit} [quartiles]", "/ TRL plain", "/ naive", "peak GiB", "GFLOP", "matmul rate"]
    products, *others = (results.get(name) for name in ("matrix products alone", "TRL plain", "naive purified"))

    def rate(one: Contender) -> float:
        return (one.flops or 0.0) / one.median(clock)

    def figures(one: Contender) -> list[str]:
        time = measure.show_time(one, clock)
        if one.share != 1.0:
            time += f", {one.share:.2g} of the tokens"
        ratios = [measure.show_ratio(one, other, clock) for other in others]
        share = f"{rate(one) / rate(products):.0%}" if products is not None and products.seconds else "-"
        return [time, *ratios, measure.show_bytes(one.peak_bytes), f"{(one.flops or 0.0) / 1e9:.1f}", share]

    return measure.tabulate(header, results.values(), figures)


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    args = measure.parse(LossArguments, argv)
    device = args.prepare()
    contenders = {c.name: c for c in make_contenders(make_workload(args, device), args.torch_compile)}
    chosen = [contenders[name] for name in measure.select(contenders, args.contenders)]
    results = measure.alternate(chosen, args.repetitions, device)
    report = {"benchmark": "loss", "contenders": {name: result.as_json() for name, result in results.items()}}
    measure.write_report(args, report, "Forward and backward of the loss", table(results, measure.CLOCKS[args.clock]))
    return 0
