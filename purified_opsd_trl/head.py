"""
The output head of a language model: read from a model, gathered where it is sharded, and its matrix products.

Logits are computed in base 2 inside the loss, that is, multiplied by `log2(e)`: the factor is free in the product, and
`exp2` is cheaper than `exp`. [`LMHead.logits`] returns natural logits.

Products accumulate in fp32 and are never rounded to half precision before they are used: on CUDA through an fp32
output; elsewhere they are computed in fp32, and a half-precision head is converted one block of rows at a time.

Shapes: m rows of hidden states, V vocabulary entries, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .errors import InputError


LN2 = math.log(2.0)
LOG2E = 1.0 / LN2

# Elements of a head converted to fp32 at a time where the product itself cannot take the head's dtype
_CONVERTED = 1 << 22


@dataclass(frozen=True)
class LMHead:
    """
    Output head: `logits = softcap * tanh(z / softcap)` with `z = (h W^T + b) * logit_scale`, or `z` itself.

    Args:
        weight (`torch.Tensor` of shape `[V, H]`):
            Weight; a parameter, a plain tensor or a `DTensor` (FSDP2). May be tied to the input embeddings.
        bias (`torch.Tensor` of shape `[V]`, *optional*):
            Bias.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the logits (Cohere, Granite, Falcon-H1 and others).
        softcap (`float`, *optional*):
            Final softcapping (Gemma).
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; divides the logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def from_model(cls, model: torch.nn.Module, temperature: float = 1.0) -> LMHead:
        """
        Reads the head of a causal language model, PEFT-wrapped or not, as its configuration describes it.

        Args:
            model (`torch.nn.Module`):
                Unwrapped model with `get_output_embeddings()` and a Transformers configuration.
            temperature (`float`, *optional*, defaults to `1.0`):
                Sampling temperature.

        Returns:
            [`LMHead`]

        Raises:
            [`InputError`]: if the head is missing, carries a LoRA adapter, or is quantized.
        """
        module = model.get_output_embeddings()  # type: ignore[operator]
        if module is None:
            raise InputError(f"{type(model).__name__} has no output embeddings; a causal language model is needed.")
        if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
            raise InputError("The output head carries an adapter of its own; remove 'lm_head' from `target_modules`.")
        weight = module.weight
        if not weight.is_floating_point():
            raise InputError(
                f"The output head is stored as {weight.dtype}; exclude it from quantization (`llm_int8_skip_modules`)."
            )
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        return cls(weight, getattr(module, "bias", None), _logit_scale(config), softcap(config), temperature)

    @property
    def linear(self) -> bool:
        """Whether a difference of logits is the projection of a difference of hidden states."""
        return self.softcap is None

    @property
    def alpha(self) -> float:
        """Factor of the matrix product: up to base-2 logits, or up to the argument of `tanh` with softcapping."""
        return self.logit_scale * LOG2E / self.temperature if self.softcap is None else self.logit_scale / self.softcap

    @property
    def slope(self) -> float:
        """Derivative of natural logits by the matrix product, without softcapping's factor `1 - tanh^2`."""
        return self.logit_scale / self.temperature

    def same_weight(self, other: LMHead) -> bool:
        """Whether two heads share their weight, as one parameter or as two views of it."""
        one, two = self.weight, other.weight
        layouts = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (one, two)]
        return one is two or layouts[0] == layouts[1]

    def same_head(self, other: LMHead) -> bool:
        """Whether two heads are one: the same parameters, scale and softcapping."""
        same_tensors = self.weight is other.weight and self.bias is other.bias
        return same_tensors and (self.logit_scale, self.softcap) == (other.logit_scale, other.softcap)

    def full(self) -> LMHead:
        """The head with full tensors in place of `DTensor`s; the gradient finds its way back to the shards."""
        return replace(self, weight=_full(self.weight), bias=_full(self.bias))

    def first_rows(self, count: int) -> LMHead:
        """The head over the first ids of the vocabulary; the gradient finds its way back to the complete weight."""
        return replace(self, weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])

    def cast(self, dtype: torch.dtype) -> LMHead:
        """
        The head with its weight in the operands' half precision, converted once for all chunks.

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
        """Multiplies by the cap what `finish` left as `tanh`, `[m, V]`, in place."""
        if self.softcap is not None:
            product.mul_(self.softcap * LOG2E / self.temperature)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """
        Dense logits of a few tokens, without a copy of the head in another dtype. The loss never calls this.

        Args:
            hidden (`torch.Tensor` of shape `[..., H]`):
                Last hidden states.

        Returns:
            `torch.Tensor` of shape `[..., V]`: natural logits after temperature; fp32 (fp64 for fp64 states).
        """
        head = self.full()
        operands = hidden.flatten(0, -2).to(head.weight.device, operand_dtype(hidden))
        dtype = torch.float64 if operands.dtype == torch.float64 else torch.float32
        with torch.autocast(operands.device.type, enabled=False):
            logits = torch.empty(len(operands), head.weight.shape[0], dtype=dtype, device=operands.device)
            project(operands, head.weight, head.alpha, logits)
            head.finish(logits)
            head.uncapped(logits)
        return logits.div_(LOG2E).view(*hidden.shape[:-1], -1)


def gathered(*heads: LMHead) -> AbstractContextManager[Any]:
    """
    Gathers heads that ZeRO-3 has partitioned, all at once; leaves other heads alone.

    Args:
        heads ([`LMHead`]):
            Heads to gather while the context is entered. Every process must enter it.

    Returns:
        Context manager.
    """
    tensors = [x for head in heads for x in (head.weight, head.bias)]
    return maybe_gather_lm_head_ctx(*(x for x in tensors if hasattr(x, "ds_status")))  # type: ignore[arg-type]


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


def _full(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _logit_scale(config: Any) -> float:
    """Multiplier of the logits, under the names that model families give it; `logits_scaling` mostly divides."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    for name in ("logits_scaling", "logits_mup_width_multiplier"):
        if getattr(config, name, None) is not None:
            scaling = float(getattr(config, name))
            return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return 1.0


def softcap(config: Any) -> float | None:
    """Bound of the final softcapping by a text configuration; `None` without."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return None
