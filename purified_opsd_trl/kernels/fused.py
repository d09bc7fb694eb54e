"""
The fused token loss: chunks of tokens through projection, row transform and the products of the gradient.

A chunk of n tokens keeps its whole rows `[n, V]` for the few buffers it needs, so that nothing is projected twice:
three products form the logits (student, base, and the difference of teacher and reference-only states), one takes the
gradient back to the hidden states, and a trainable head adds one. The per-token weights are known here, so that the
backward pass has only a scalar left to multiply.

Shapes: N tokens, n tokens of one chunk, V vocabulary entries, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..head import LN2, LOG2E, LMHead, add_to_weight, back_to_hidden, operand_dtype, project
from ..targets import DENSE_TARGETS, DenseTarget
from .rows import RowStats, divergence_rows, sampled_token, score
from .settings import LossSettings


TargetLogits = Callable[[Tensor, Tensor, Tensor], Tensor]

# A mask of -inf in custom target logits would turn 0 * inf into NaN; this is as good and finite.
_LOWEST = -1e30


@dataclass
class FusedLoss:
    """Loss, per-token results and, where asked for, the gradients (of the loss divided by `grad_unit`)."""

    loss: Tensor
    stats: RowStats
    at_label: dict[str, Tensor] = field(default_factory=dict)
    grad_unit: Tensor | None = None
    grads: list[Tensor | None] = field(default_factory=lambda: [None, None, None])


def buffers_per_token(states: int, dense: bool, capped: bool, cast: bool) -> float:
    """
    How many fp32 rows `[V]` a token needs at once.

    Args:
        states (`int`):
            Frozen states that are projected, each to logits of its own; the student's come on top.
        dense (`bool`):
            Whether a custom target or the sampled-token loss needs room for dense intermediates.
        capped (`bool`):
            Whether softcapping's derivative is kept for the gradient.
        cast (`bool`):
            Whether the gradient is rounded to half precision for its matrix products, into a buffer of its own.
    """
    return 1 + states + 2 * dense + capped + 0.5 * cast


@torch.no_grad()
def fused_loss(
    hidden: Tensor,
    student: LMHead,
    states: dict[str, Tensor],
    frozen: LMHead,
    weights: Tensor,
    settings: LossSettings,
    needs: tuple[bool, bool, bool],
    labels: Tensor | None = None,
    target_logits: TargetLogits | None = None,
    used_vocab: int | None = None,
) -> FusedLoss:
    """
    Loss and gradients of one batch of tokens.

    Args:
        hidden (`torch.Tensor` of shape `[N, H]`):
            The student's last hidden states.
        student, frozen ([`LMHead`]):
            The two heads, gathered, with their temperature.
        states (`dict[str, torch.Tensor]`):
            Frozen hidden states `[N, H]` by name, in the order of projection: `base` and `delta`; or `teacher`, with
            `base` where its metric is wanted; or `base`, `teacher` and `reference_only`.
        weights (`torch.Tensor` of shape `[N]`):
            Weight of each token in the loss.
        settings ([`LossSettings`]):
            Settings.
        needs (`tuple[bool, bool, bool]`):
            Whether the gradients of the hidden states, of the head's weight and of its bias are needed.
        labels (`torch.Tensor` of shape `[N]`, *optional*):
            Sampled tokens; given, the loss is the sampled-token loss.
        target_logits (`Callable`, *optional*):
            Custom target.
        used_vocab (`int`, *optional*):
            Ids that the tokenizer has; with it, the target's mass on the other rows of the head is measured.

    Returns:
        [`FusedLoss`]
    """
    operand = operand_dtype(hidden)  # asks for autocast's dtype, so before autocast is left
    with torch.autocast(hidden.device.type, enabled=False):
        arguments = (hidden, student, states, frozen, weights, settings, needs, labels, target_logits, used_vocab)
        return _Pass(*arguments, operand).run()


class _Pass:
    """Buffers and accumulators of one call of `fused_loss`, whose arguments it takes."""

    def __init__(
        self,
        hidden: Tensor,
        student: LMHead,
        states: dict[str, Tensor],
        frozen: LMHead,
        weights: Tensor,
        settings: LossSettings,
        needs: tuple[bool, bool, bool],
        labels: Tensor | None,
        target_logits: TargetLogits | None,
        used_vocab: int | None,
        operand: torch.dtype,
    ):
        self.hidden, self.states, self.loss_weights, self.settings = hidden, states, weights, settings
        self.labels, self.target_logits, self.used, self.operand = labels, target_logits, used_vocab, operand
        self.dense = DENSE_TARGETS.get(settings.target) if target_logits is None else None
        self.head_dtype = student.weight.dtype
        self.student = student.cast(operand)
        shared = student.same_weight(frozen)
        self.frozen = replace(frozen, weight=self.student.weight) if shared else frozen.cast(operand)
        self.needs_grad = any(needs)
        self.transform = row_transform(hidden.device)
        self.dtype = torch.float64 if operand == torch.float64 else torch.float32
        self.vocab = student.weight.shape[0]
        self._allocate_chunk()
        self._allocate_results()
        shapes = hidden.shape, student.weight.shape, student.weight.shape[:1]
        self.grads = [self._empty(*s).zero_() if need else None for s, need in zip(shapes, needs, strict=True)]
        top = weights.abs().max() if len(hidden) else weights.new_ones(())
        self.unit = top.clamp(min=torch.finfo(torch.float32).tiny)
        self.weights = weights.to(self.dtype) / self.unit
        if self.dense is not None and self.dense.weights is not None:
            self.loss_weights = weights.clone()  # written chunk by chunk
        self.mean_row = self.frozen.weight.mean(0, dtype=self.dtype) if "delta" in states else None

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.hidden.device, dtype=dtype or self.dtype)

    def _allocate_chunk(self) -> None:
        """Chooses the chunk and allocates the rows `[chunk, V]` that every chunk reuses."""
        capped = self.needs_grad and self.student.softcap is not None
        cast = self.needs_grad and self.operand != self.dtype
        self.chunk = self.settings.loss_chunk_size or 0
        if not self.chunk:
            dense = any(x is not None for x in (self.target_logits, self.labels, self.dense))
            rows = buffers_per_token(len(self.states), dense, capped, cast)
            self.chunk = max(1, int(self.settings.loss_memory_budget * 2**20 / (4 * rows * self.vocab)))
        n = min(self.chunk, max(len(self.hidden), 1))
        self.buffer = self._empty((1 + len(self.states)) * n, self.vocab)
        self.cap_buffer = self._empty(n, self.vocab) if capped else None
        self.grad_buffer = self._empty(n, self.vocab, dtype=self.operand) if cast else None

    def _allocate_results(self) -> None:
        count, states = len(self.hidden), self.states
        purified = "delta" in states or ("reference_only" in states and self.target_logits is None)
        self.stats = RowStats(
            per_token=self._empty(count),
            student_entropy=self._empty(count),
            target_entropy=self._empty(count),
            kl_target_student=self._empty(count),
            kl_target_base=self._empty(count) if "base" in states else None,
            clip_saturation=self._empty(count) if purified and self.settings.pmi_clip is not None else None,
            unused_vocab_mass=self._empty(count) if self.used is not None else None,
        )
        # Every name from the start: processes add these up, also one that has no token
        noted = ("student", "target", *(n for n in ("teacher", "reference_only") if n in states))
        self.at_label = {name: [self._empty(0)] for name in noted if self.labels is not None}

    def run(self) -> FusedLoss:
        count = len(self.hidden)
        for start in range(0, count, self.chunk):
            self._chunk(start, min(start + self.chunk, count))
        grad_hidden, grad_weight, grad_bias = self.grads
        if grad_hidden is not None:
            grad_hidden.mul_(self.weights.unsqueeze(-1))
        if grad_weight is not None and self.head_dtype == torch.bfloat16:
            grad_weight = grad_weight.bfloat16()  # half the memory until the backward, with the range of fp32
        return FusedLoss(
            loss=(self.loss_weights * self.stats.per_token).sum().to(torch.float32),
            stats=self.stats,
            at_label={name: torch.cat(parts) for name, parts in self.at_label.items()},
            grad_unit=self.unit,
            grads=[grad_hidden, grad_weight, grad_bias],
        )

    def _chunk(self, start: int, end: int) -> None:
        student, logits = self._project(start, end)
        stats = self.stats.rows(start, end)
        cap = None
        if self.student.softcap is not None:
            if self.cap_buffer is not None:
                cap = self.cap_buffer[: end - start].copy_(student)
            self.student.uncapped(student)

        target, delta, shift = self._target(logits, stats, start, end)
        grad = None
        if self.needs_grad:
            grad = student if self.grad_buffer is None else self.grad_buffer[: end - start]
        if self.labels is None:
            self.transform(student, target, delta, shift, self.settings, stats, grad, self.used)
            scale = self.settings.grad_scale
        else:
            # The forward KL without a gradient forms target and metrics, and leaves both softmaxes as they are
            self.transform(student, target, delta, shift, replace(self.settings, beta=0.0), stats, None, self.used)
            labels = self.labels[start:end]
            log_p, log_q = sampled_token(student, target, labels, stats, grad)
            self._note(student=log_p, target=log_q)
            scale = 1.0
        if grad is not None:
            if cap is not None:
                grad.mul_(cap.square_().neg_().add_(1.0))
            self._accumulate(grad, scale * self.student.slope, start, end)

    def _project(self, start: int, end: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the chunk; consecutive products with one weight and factor become one."""
        n = end - start
        names = ["student", *self.states]
        hidden = [self.hidden, *self.states.values()]
        rows = [h[start:end].to(self.operand) for h in hidden]
        heads = [self.student, *(self.frozen for _ in self.states)]
        logits = self.buffer[: len(names) * n].view(len(names), n, self.vocab)
        if self.student.same_weight(self.frozen) and self.student.alpha == self.frozen.alpha:
            groups = [(0, len(names))]
        else:
            groups = [(0, 1), (1, len(names))]
        for first, last in groups:
            stacked = torch.cat(rows[first:last]) if last - first > 1 else rows[first]
            project(stacked, heads[first].weight, heads[first].alpha, logits[first:last].view(-1, self.vocab))
        for name, head, part in zip(names, heads, logits, strict=True):
            head.finish(part, bias=name != "delta")
            if name != "student":
                head.uncapped(part)
        return logits[0], dict(zip(names[1:], logits[1:], strict=True))

    def _target(
        self, logits: dict[str, Tensor], stats: RowStats, start: int, end: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Arguments `target`, `delta` and `shift` of the row transform."""
        if "delta" in logits:
            assert self.mean_row is not None
            mean = self.states["delta"][start:end].to(self.dtype) @ self.mean_row
            return logits["base"], logits["delta"], mean * self.frozen.alpha
        if self.dense is not None:
            return self._dense_target(self.dense, logits, stats, start, end), None, None
        teacher, reference_only, base = (logits.get(name) for name in ("teacher", "reference_only", "base"))
        assert teacher is not None
        if self.labels is not None:
            labels = self.labels[start:end]
            self._note(teacher=score(teacher, labels))
            if reference_only is not None:
                self._note(reference_only=score(reference_only, labels))
        if self.target_logits is not None:
            assert reference_only is not None and base is not None
            target = self.target_logits(teacher.mul_(LN2), reference_only.mul_(LN2), base.mul_(LN2))
            target = _checked(target, base).clamp(min=_LOWEST)
            self._kl_base(target, base, stats)
            return target.mul_(LOG2E), None, None
        if reference_only is None or base is None:  # plain self-distillation
            if base is not None:
                self._kl_base(teacher * LN2, base * LN2, stats)
            return teacher, None, None
        if self.settings.pmi_center:
            delta = teacher.sub_(reference_only)
            return base, delta, delta.mean(-1)
        norms = [torch.logsumexp(x * LN2, -1) * LOG2E for x in (teacher, reference_only)]
        return base, teacher.sub_(reference_only), norms[0] - norms[1]

    def _dense_target(
        self, dense: DenseTarget, logits: dict[str, Tensor], stats: RowStats, start: int, end: int
    ) -> Tensor:
        """Base-2 logits `[n, V]` of a dense target, whose weights go into the loss."""
        if self.labels is not None:
            named = {name: score(logits[name], self.labels[start:end]) for name in logits if name in self.at_label}
            self._note(**named)
        arguments: dict[str, Any] = {name: x.mul_(LN2) for name, x in logits.items()}
        arguments |= {name: getattr(self.settings, name) for name in dense.options}
        target = dense.logits(**arguments)
        if dense.weights is not None:
            factor = dense.weights(**arguments)
            self.weights[start:end] *= factor
            self.loss_weights[start:end] *= factor.to(self.loss_weights.dtype)
        if "base" in logits:
            self._kl_base(target, logits["base"], stats)
        return target.mul_(LOG2E)

    def _kl_base(self, target: Tensor, base: Tensor, stats: RowStats) -> None:
        """`KL(target || base)` where the row transform does not see the base; natural logits `[n, V]`."""
        assert stats.kl_target_base is not None
        log_q = torch.log_softmax(target, -1)
        stats.kl_target_base.copy_((log_q.exp() * (log_q - torch.log_softmax(base, -1))).sum(-1))

    def _note(self, **log_probs: Tensor) -> None:
        for name, values in log_probs.items():
            self.at_label[name].append(values)

    def _accumulate(self, grad: Tensor, alpha: float, start: int, end: int) -> None:
        weight = self.student.weight
        grad_hidden, grad_weight, grad_bias = self.grads
        if grad_hidden is not None:
            back_to_hidden(grad, weight, alpha, grad_hidden[start:end])
        weights = self.weights[start:end]
        if grad_weight is not None:
            hidden = self.hidden[start:end].to(self.dtype) * weights.unsqueeze(-1)
            add_to_weight(grad, hidden.to(grad.dtype), alpha, grad_weight)
        if grad_bias is not None:
            grad_bias.addmv_(grad.to(self.dtype).t(), weights, alpha=alpha)


class AttachGradient(torch.autograd.Function):
    """The identity on a loss whose gradients are already known; the backward multiplies them by one scalar."""

    @staticmethod
    def forward(ctx, loss, grad_unit, grads, *inputs):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(grad_unit, *(g for g in grads if g is not None))
        ctx.present = [g is not None for g in grads]
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        grad_unit, *saved = ctx.saved_tensors
        scale = grad_loss * grad_unit
        grads = iter(saved)
        pairs = zip(ctx.present, ctx.dtypes, strict=True)
        return None, None, None, *((next(grads) * scale).to(dtype) if present else None for present, dtype in pairs)


def row_transform(device: torch.device) -> Callable[..., None]:
    """`divergence_rows` for this device: the Triton twin on CUDA where Triton is installed, else the torch one."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from .triton_rows import divergence_rows as triton_divergence_rows

        return triton_divergence_rows
    return divergence_rows


def _checked(target: Tensor, base: Tensor) -> Tensor:
    if target.shape != base.shape:
        raise ValueError(
            f"target_logits must return a tensor of shape {tuple(base.shape)}, like its arguments, not "
            f"{tuple(target.shape)}."
        )
    return target.to(base.dtype)
