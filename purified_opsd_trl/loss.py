"""
The token loss: divergence between the student and its target over the full vocabulary, without the full logits.

    student hidden [N, H] ─┐
    base hidden    [N, H] ─┼─> chunks of tokens ─> loss, gradient, metrics      (`purified_opsd_trl.kernels`)
    delta hidden   [N, H] ─┘

Two identities make the purified target cheap (docs/kernels.md): centring removes the normalisers of teacher and
reference-only probe, and a linear head turns the difference of their logits into one projection of the difference of
their hidden states.

Shapes: N valid completion tokens, V vocabulary entries, H hidden units. Divergences and entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .errors import InputError
from .kernels import AttachGradient, Problem, Projector, RowSettings, Solution, solve


@dataclass(frozen=True)
class LMHead:
    """
    A language-model head: `logits = softcap * tanh(z / softcap)` with `z = (h W^T + b) * logit_scale`, or `z` itself.

    Args:
        weight (`torch.Tensor` of shape `[V, H]`):
            Weight; a parameter, a plain tensor or a `DTensor` (FSDP2). May be tied to the input embeddings.
        bias (`torch.Tensor` of shape `[V]`, *optional*):
            Bias.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the logits (Cohere, Granite, Falcon-H1 and others).
        softcap (`float`, *optional*):
            Final softcapping (Gemma).
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def linear(self) -> bool:
        """Whether a difference of logits is the projection of a difference of hidden states."""
        return self.softcap is None

    @classmethod
    def from_model(cls, model: torch.nn.Module) -> LMHead:
        """
        Reads the head of a causal language model, PEFT-wrapped or not, as its configuration describes it.

        Args:
            model (`torch.nn.Module`):
                Unwrapped model with `get_output_embeddings()` and a Transformers configuration.

        Returns:
            [`LMHead`]

        Raises:
            [`InputError`]: if the head is missing, is itself adapted by LoRA, or is quantised.
        """
        module = model.get_output_embeddings()  # type: ignore[operator]
        if module is None:
            raise InputError(f"{type(model).__name__} has no output embeddings; a causal language model is needed.")
        if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
            raise InputError("The output head carries an adapter of its own; remove 'lm_head' from `target_modules`.")
        weight = module.weight
        if not weight.is_floating_point():
            raise InputError(
                f"The output head is stored as {weight.dtype}; exclude it from quantisation (`llm_int8_skip_modules`)."
            )
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        return cls(weight, getattr(module, "bias", None), _logit_scale(config), _softcap(config))

    def logits(self, hidden: Tensor) -> Tensor:
        """
        Dense logits, for reading off a few rows; the loss never calls this.

        Args:
            hidden (`torch.Tensor` of shape `[..., H]`):
                Last hidden states.

        Returns:
            `torch.Tensor` of shape `[..., V]`: fp32 (fp64 for fp64 states), before any temperature.
        """
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight, bias = _full(self.weight), _full(self.bias)
        logits = hidden.to(weight.device, dtype) @ weight.to(dtype).t()
        if bias is not None:
            logits = logits + bias.to(dtype)
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class FrozenStates:
    """
    Last hidden states of the frozen model at the N tokens; [`required_states`] says which of them a setting needs.

    Args:
        base (`torch.Tensor` of shape `[N, H]`, *optional*):
            Question in context.
        delta (`torch.Tensor` of shape `[N, H]`, *optional*):
            `teacher - reference_only`, subtracted in fp32.
        teacher (`torch.Tensor` of shape `[N, H]`, *optional*):
            Question and reference in context.
        reference_only (`torch.Tensor` of shape `[N, H]`, *optional*):
            Reference in context, no question.
    """

    base: Tensor | None = None
    delta: Tensor | None = None
    teacher: Tensor | None = None
    reference_only: Tensor | None = None


@dataclass(frozen=True)
class LossSettings:
    """
    Settings of the loss.

    Args:
        target (`str`, *optional*, defaults to `"purified"`):
            `"purified"`, or `"teacher"` for plain on-policy self-distillation.
        loss_type (`str`, *optional*, defaults to `"divergence"`):
            `"divergence"` over the full vocabulary, or `"sampled_token"`: `-A log pi_theta(y)` with the advantage
            `A = log P_target(y) - log pi_theta(y)` held constant.
        beta (`float`, *optional*, defaults to `0.5`):
            0: forward `KL(target || student)`. 1: reverse `KL(student || target)`. Between: `beta KL(target || m) +
            (1 - beta) KL(student || m)` with `m = (1 - beta) student + beta target`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides all logits.
        pmi_beta (`float`, *optional*, defaults to `1.0`):
            Larger keeps the target closer to the base.
        pmi_clip (`float`, *optional*, defaults to `10.0`):
            Bound `c` of the soft clip, nats. `None` for no clip.
        pmi_center (`bool`, *optional*, defaults to `True`):
            Whether `Delta_it` is centred over the vocabulary.
        kl_clip (`float`, *optional*):
            Upper bound of the contribution of one vocabulary entry to a token's divergence, nats.
        chunk_size (`int`, *optional*):
            Tokens whose logits exist at once. `None` chooses it from `memory_budget`.
        memory_budget (`int`, *optional*, defaults to `536870912`):
            Bytes of scratch memory.

    Raises:
        [`InputError`]: for a value outside its range.
    """

    target: str = "purified"
    loss_type: str = "divergence"
    beta: float = 0.5
    temperature: float = 1.0
    pmi_beta: float = 1.0
    pmi_clip: float | None = 10.0
    pmi_center: bool = True
    kl_clip: float | None = None
    chunk_size: int | None = None
    memory_budget: int = 512 * 2**20

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise InputError(f"{name}={getattr(self, name)!r}: expected {expected}.")

        check("target", self.target in ("purified", "teacher"), "'purified' or 'teacher'")
        check("loss_type", self.loss_type in ("divergence", "sampled_token"), "'divergence' or 'sampled_token'")
        check("beta", 0.0 <= self.beta <= 1.0, "a number from 0 to 1")
        for name in ("temperature", "pmi_beta", "memory_budget"):
            check(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("pmi_clip", "kl_clip", "chunk_size"):
            check(name, getattr(self, name) is None or 0 < getattr(self, name) < math.inf, "a positive number or None")
        if self.loss_type == "sampled_token" and self.kl_clip is not None:
            raise InputError("kl_clip bounds a divergence; it has no meaning with loss_type='sampled_token'.")


@dataclass(frozen=True)
class TokenLoss:
    """
    Loss and per-token results. Only `loss` carries a gradient; the rest is detached fp32 `[N]`, in nats.

    Attributes:
        loss (`torch.Tensor`):
            Scalar, `sum_n weights[n] * per_token[n]`.
        per_token (`torch.Tensor`):
            Divergence, or the token loss of `"sampled_token"`.
        student_entropy, target_entropy (`torch.Tensor`):
            Entropy of either distribution.
        kl_target_student (`torch.Tensor`):
            `KL(target || student)`, whatever `beta` is.
        kl_target_base (`torch.Tensor`, *optional*):
            `KL(target || base)`; `None` without base states.
        clip_saturation (`torch.Tensor`, *optional*):
            Share of the vocabulary whose `|centred Delta_it|` exceeds the clip; `None` without a clip.
        advantage, advantage_total, advantage_ref, advantage_it (`torch.Tensor`, *optional*):
            For `"sampled_token"`, at the sampled token: the advantage towards the target, and the three log-ratios of
            Eq. 4 (the last two where the reference-only probe was scored).
    """

    loss: Tensor
    per_token: Tensor
    student_entropy: Tensor
    target_entropy: Tensor
    kl_target_student: Tensor
    kl_target_base: Tensor | None = None
    clip_saturation: Tensor | None = None
    advantage: Tensor | None = None
    advantage_total: Tensor | None = None
    advantage_ref: Tensor | None = None
    advantage_it: Tensor | None = None


def required_states(settings: LossSettings, head_is_linear: bool, custom_target: bool) -> tuple[str, ...]:
    """
    Which fields of [`FrozenStates`] the loss needs.

    Args:
        settings ([`LossSettings`]):
            Settings of the loss.
        head_is_linear (`bool`):
            [`LMHead.linear`] of the frozen head.
        custom_target (`bool`):
            Whether `target_logits` is given.

    Returns:
        `tuple[str, ...]`: names, in the order of projection.
    """
    if custom_target:
        return ("base", "teacher", "reference_only")
    if settings.target == "teacher":
        return ("teacher",)
    if head_is_linear and settings.pmi_center and settings.loss_type == "divergence":
        return ("base", "delta")
    return ("base", "teacher", "reference_only")


def token_loss(
    student_hidden: Tensor,
    student_head: LMHead,
    states: FrozenStates,
    frozen_head: LMHead,
    weights: Tensor,
    settings: LossSettings,
    *,
    labels: Tensor | None = None,
    target_logits: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> TokenLoss:
    """
    Weighted token loss with its gradient formed in the forward pass.

    The gradient flows to `student_hidden` and to the weight and bias of `student_head` where they require one, never
    to anything frozen. Under ZeRO-3 call it inside the wrapped model's forward; both heads are gathered once.

    Args:
        student_hidden (`torch.Tensor` of shape `[N, H]`):
            The student's last hidden states at the valid tokens; N may be 0.
        student_head ([`LMHead`]):
            The student's head.
        states ([`FrozenStates`]):
            The frozen model's hidden states at the same tokens.
        frozen_head ([`LMHead`]):
            The frozen model's head, the same vocabulary; its width may differ from the student's.
        weights (`torch.Tensor` of shape `[N]`):
            Weight of each token, e.g. one over the global number of tokens.
        settings ([`LossSettings`]):
            Settings.
        labels (`torch.Tensor` of shape `[N]`, *optional*):
            Sampled token ids, for `loss_type="sampled_token"`.
        target_logits (`Callable`, *optional*):
            `(teacher, reference_only, base) -> target`, fp32 logits `[n, V]` of one chunk after temperature; replaces
            the target.

    Returns:
        [`TokenLoss`]

    Raises:
        [`InputError`]: if states, labels or vocabularies do not fit together.
    """
    names = required_states(settings, frozen_head.linear, target_logits is not None)
    if settings.target == "teacher" and target_logits is None and states.base is not None:
        names = ("base", "teacher")  # for the metric
    present = _checked_states(states, names, student_hidden.shape[0])
    if settings.loss_type == "sampled_token" and labels is None:
        raise InputError("loss_type='sampled_token' needs `labels`, the sampled token ids.")

    with gathered_heads(student_head, frozen_head):
        student = _projector(student_head, settings.temperature)
        frozen = student if _shared(student_head, frozen_head) else _projector(frozen_head, settings.temperature)
        if student.weight.shape[0] != frozen.weight.shape[0]:
            raise InputError(
                f"The student's head has {student.weight.shape[0]} vocabulary entries, the frozen head "
                f"{frozen.weight.shape[0]}; both models need one tokenizer and one vocabulary size."
            )
        inputs = (student_hidden, student.weight, student.bias)
        grad = torch.is_grad_enabled()
        needs = tuple(grad and x is not None and x.requires_grad for x in inputs)
        problem = Problem(
            states=present,
            student=student,
            frozen=frozen,
            weights=weights.detach().to(student_hidden.device),
            rows=RowSettings(settings.beta, settings.pmi_beta, settings.pmi_clip, settings.kl_clip),
            chunk_size=settings.chunk_size,
            memory_budget=settings.memory_budget,
            center=settings.pmi_center,
            labels=labels if settings.loss_type == "sampled_token" else None,
            target_logits=target_logits,
        )
        solution = solve(student_hidden.detach(), problem, needs)  # type: ignore[arg-type]
        loss = solution.loss
        if any(needs):
            loss = AttachGradient.apply(loss, solution.grad_unit, solution.grads, *inputs)
    return TokenLoss(loss=loss, **vars(solution.stats), **_advantages(solution))


def _checked_states(states: FrozenStates, names: tuple[str, ...], count: int) -> dict[str, Tensor]:
    present: dict[str, Tensor] = {}
    for name in names:
        state = getattr(states, name)
        if state is None:
            raise InputError(f"These settings need the frozen states {names}, but `{name}` is missing.")
        if state.shape[0] != count:
            raise InputError(f"`{name}` has {state.shape[0]} tokens, the student's hidden states have {count}.")
        present[name] = state.detach()
    return present


def _advantages(solution: Solution) -> dict[str, Tensor]:
    """Eq. 4 at the sampled token: `total = ref + it`."""
    at = solution.at_label
    if "student" not in at:
        return {}
    parts = {"advantage": at["target"] - at["student"]}
    if "teacher" in at:
        parts["advantage_total"] = at["teacher"] - at["student"]
    if "reference_only" in at:
        parts["advantage_ref"] = at["reference_only"] - at["student"]
        parts["advantage_it"] = at["teacher"] - at["reference_only"]
    return parts


def gathered_heads(*heads: LMHead) -> Any:
    """Gathers heads that ZeRO-3 has partitioned, all at once; a head it does not manage is left alone."""
    tensors = [x for head in heads for x in (head.weight, head.bias)]
    return maybe_gather_lm_head_ctx(*(x for x in tensors if hasattr(x, "ds_status")))  # type: ignore[arg-type]


def _full(x: Any) -> Any:
    """The whole tensor of a sharded `DTensor`; the gradient finds its way back to the shards."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _projector(head: LMHead, temperature: float) -> Projector:
    return Projector(_full(head.weight), _full(head.bias), head.logit_scale, head.softcap, temperature)


def _shared(one: LMHead, two: LMHead) -> bool:
    same_tensors = one.weight is two.weight and one.bias is two.bias
    return same_tensors and (one.logit_scale, one.softcap) == (two.logit_scale, two.softcap)


def _logit_scale(config: Any) -> float:
    """Multiplier of the logits, under the names that model families give it; `logits_scaling` divides but for one."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    for name in ("logits_scaling", "logits_mup_width_multiplier"):
        if getattr(config, name, None) is not None:
            scaling = float(getattr(config, name))
            return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return 1.0


def _softcap(config: Any) -> float | None:
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return None
