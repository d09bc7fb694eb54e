"""
The token loss: divergence between the student and its target over the full vocabulary, without the full logits.

    student hidden [N, H] ─┐
    base hidden    [N, H] ─┼─> chunks of tokens ─> loss, gradient, metrics      (`purified_opsd_trl.kernels`)
    delta hidden   [N, H] ─┘

Two identities make the purified target cheap (docs/kernels.md): centering removes the normalizers of teacher and
reference-only probe, and a linear head turns the difference of their logits into one projection of the difference of
their hidden states.

Shapes: N valid completion tokens, V vocabulary entries, H hidden units. Divergences and entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .errors import InputError
from .head import LMHead, gathered
from .kernels.fused import AttachGradient, fused_loss
from .kernels.settings import LossSettings
from .targets import DENSE_TARGETS


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
        wrong (`torch.Tensor` of shape `[N, H]`, *optional*):
            Question and a wrong reference in context.
    """

    base: Tensor | None = None
    delta: Tensor | None = None
    teacher: Tensor | None = None
    reference_only: Tensor | None = None
    wrong: Tensor | None = None

    @classmethod
    def of_tokens(cls, inputs: Mapping[str, Tensor], valid: Tensor) -> FrozenStates:
        """
        Picks the states of the tokens that carry loss.

        Args:
            inputs (`Mapping[str, torch.Tensor]`):
                Micro-batch with `"<state>_hidden"` of shape `[B, <= C, H]`: without the padding of
                `pad_to_multiple_of`.
            valid (`torch.Tensor` of shape `[B, C]`):
                True at the N tokens.

        Returns:
            [`FrozenStates`]: on the device of `valid`.
        """
        states = {}
        for field in fields(cls):
            hidden = inputs.get(f"{field.name}_hidden")
            if hidden is not None:
                kept = valid[:, : hidden.shape[1]]
                states[field.name] = hidden[kept.to(hidden.device)].to(valid.device)
        return cls(**states)


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
            Share of the vocabulary whose `|centered Delta_it|` exceeds the clip; `None` without a clip.
        unused_vocab_mass (`torch.Tensor`, *optional*):
            The target's probability of ids beyond `used_vocab`; `None` without it.
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
    unused_vocab_mass: Tensor | None = None
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
    if settings.target in DENSE_TARGETS:
        return DENSE_TARGETS[settings.target].states
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
    used_vocab: int | None = None,
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
        used_vocab (`int`, *optional*):
            Ids that the tokenizer has, fewer than the rows of the heads. The target's mass on the other rows is
            measured; with `settings.mask_unused_vocab` all distributions are taken over the first `used_vocab` rows.

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

    with gathered(student_head, frozen_head):
        masked = used_vocab if settings.mask_unused_vocab else None
        student, frozen = _heads(student_head, frozen_head, settings.temperature, masked)
        inputs = (student_hidden, student.weight, student.bias)
        grad = torch.is_grad_enabled()
        hidden, weight, bias = (grad and x is not None and x.requires_grad for x in inputs)
        result = fused_loss(
            student_hidden.detach(),
            student,
            present,
            frozen,
            weights.detach().to(student_hidden.device),
            settings,
            needs=(hidden, weight, bias),
            labels=labels if settings.loss_type == "sampled_token" else None,
            target_logits=target_logits,
            used_vocab=used_vocab if masked is None else None,
        )
        loss = result.loss
        if hidden or weight or bias:
            loss = AttachGradient.apply(loss, result.grad_unit, result.grads, *inputs)
    return TokenLoss(loss=loss, **vars(result.stats), **_advantages(result.at_label))


def _heads(student_head: LMHead, frozen_head: LMHead, temperature: float, rows: int | None) -> tuple[LMHead, LMHead]:
    """Both heads complete, with the temperature, and of their first `rows` rows; one where they are the same."""
    shared = student_head.same_head(frozen_head)  # gathered once under FSDP2
    student = replace(student_head, temperature=temperature).full()
    frozen = student if shared else replace(frozen_head, temperature=temperature).full()
    if student.weight.shape[0] != frozen.weight.shape[0]:
        raise InputError(
            f"The student's head has {student.weight.shape[0]} vocabulary entries, the frozen head "
            f"{frozen.weight.shape[0]}; both models need one tokenizer and one vocabulary size."
        )
    if rows is None:
        return student, frozen
    student = student.first_rows(rows)
    return student, student if shared else frozen.first_rows(rows)


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


def _advantages(at: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eq. 4 at the sampled token, from log-probabilities `[N]` by distribution: `total = ref + it`."""
    if "student" not in at:
        return {}
    parts = {"advantage": at["target"] - at["student"]}
    if "teacher" in at:
        parts["advantage_total"] = at["teacher"] - at["student"]
    if "reference_only" in at:
        parts["advantage_ref"] = at["reference_only"] - at["student"]
        parts["advantage_it"] = at["teacher"] - at["reference_only"]
    return parts
