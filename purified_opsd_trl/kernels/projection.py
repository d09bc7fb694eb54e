"""
Matrix products with a language-model head: logits out of hidden states, gradients back.

Products accumulate in fp32 and are never rounded to a half-precision type before they are used: on GPUs through an
fp32 output, elsewhere by computing in fp32, with a half-precision head converted one block of the vocabulary at a
time.

Shapes: m rows, V vocabulary entries, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rows import LOG2E


# Elements of a head converted to fp32 at a time where the product itself cannot take the head's dtype.
_CONVERTED = 1 << 22


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """
    Dtype of the operands of the matrix products.

    On CUDA the autocast dtype, or that of the hidden states: its products can be written in fp32. Elsewhere fp32, or
    fp64 for fp64 hidden states: a CPU gains nothing from rounding, other accelerators would round the result as well.
    """
    kind = hidden.device.type
    if kind != "cuda":
        return torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


@dataclass(frozen=True)
class Projector:
    """
    One head prepared for a pass: logits in bits, divided by the temperature.

    Args:
        weight (`torch.Tensor` of shape `[V, H]`):
            Full weight, on this device.
        bias (`torch.Tensor` of shape `[V]`, *optional*):
            Full bias.
        scale (`float`):
            Multiplier of the logits before any softcapping.
        softcap (`float`, *optional*):
            Final softcapping.
        temperature (`float`):
            Sampling temperature.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float

    @property
    def alpha(self) -> float:
        """Factor of the matrix product; with softcapping, up to the argument of `tanh`."""
        return self.scale * LOG2E / self.temperature if self.softcap is None else self.scale / self.softcap

    @property
    def slope(self) -> float:
        """Derivative of natural logits by the matrix product, less the factor `1 - tanh^2` of softcapping."""
        return self.scale / self.temperature

    def cast(self, dtype: torch.dtype) -> Projector:
        """
        The same head with a weight in the operands' half precision, converted once for all chunks.

        Under fp32 or fp64 operands a weight of another dtype stays as it is; its blocks are converted at each use.
        """
        half = dtype in (torch.bfloat16, torch.float16)
        return replace(self, weight=self.weight.to(dtype)) if half and self.weight.dtype != dtype else self

    def finish(self, product: Tensor, bias: bool = True) -> None:
        """Turns `alpha * h W^T`, `[m, V]`, into logits in place. A difference of logits carries no bias."""
        if bias and self.bias is not None:
            product.add_(self.bias.to(product.dtype), alpha=self.alpha)
        if self.softcap is not None:
            product.tanh_()

    def uncapped(self, product: Tensor) -> None:
        """Multiplies by the cap what `finish` left as `tanh`, in place."""
        if self.softcap is not None:
            product.mul_(self.softcap * LOG2E / self.temperature)


def project(hidden: Tensor, weight: Tensor, alpha: float, out: Tensor) -> None:
    """`out = alpha * hidden @ weight.T`: `[m, H]` and `[V, H]` to `[m, V]`, fp32 or fp64."""
    if hidden.dtype != out.dtype:  # half precision on CUDA
        torch.addmm(out, hidden, weight.to(hidden.dtype).t(), out_dtype=out.dtype, beta=0, alpha=alpha, out=out)
        return
    for start, end, block in _blocks(weight, out.dtype):
        part = out[:, start:end]
        torch.addmm(part, hidden, block.t(), beta=0, alpha=alpha, out=part)


def back_to_hidden(grad: Tensor, weight: Tensor, alpha: float, out: Tensor) -> None:
    """`out = alpha * grad @ weight`: `[m, V]` and `[V, H]` to `[m, H]`, fp32 or fp64."""
    if grad.dtype != out.dtype:
        torch.addmm(out, grad, weight.to(grad.dtype), out_dtype=out.dtype, beta=0, alpha=alpha, out=out)
        return
    for start, end, block in _blocks(weight, out.dtype):
        torch.addmm(out, grad[:, start:end], block, beta=float(start > 0), alpha=alpha, out=out)


def add_to_weight(grad: Tensor, hidden: Tensor, alpha: float, out: Tensor) -> None:
    """`out += alpha * grad.T @ hidden`: `[m, V]` and `[m, H]` to `[V, H]`, fp32 or fp64."""
    if grad.dtype != out.dtype:
        torch.addmm(out, grad.t(), hidden, out_dtype=out.dtype, alpha=alpha, out=out)
    else:
        torch.addmm(out, grad.t(), hidden, alpha=alpha, out=out)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """The rows of `weight` in `dtype`: as they are, or converted one block at a time."""
    if weight.dtype == dtype:
        yield 0, weight.shape[0], weight
        return
    rows = max(1, _CONVERTED // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        end = min(start + rows, weight.shape[0])
        yield start, end, weight[start:end].to(dtype)
