"""
The part of the trainer that trains: the student's forward, the token loss, and the stop before a NaN is stepped.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer

from .collator import PurificationCollator
from .config import PurifiedOPSDConfig
from .head import LMHead
from .kernels.settings import LossSettings
from .loss import FrozenStates, required_states, token_loss
from .monitoring.decomposition import DecompositionMonitor
from .monitoring.metrics import TokenMeans, clock, loss_sums, reduce_loss_sums
from .offload import HostCopies
from .parts import Part, loss_mask, row_lengths, student_states
from .purification import purified_target_logits
from .scoring import TeacherScoringCallback
from .targets import DENSE_TARGETS


class DistillingTrainer(Trainer):
    """Mixin of the trainer: from scored completions to the loss of one part of a micro-batch."""

    args: PurifiedOPSDConfig
    model: Any
    scoring_callback: TeacherScoringCallback
    purification_collator: PurificationCollator
    decomposition_monitor: DecompositionMonitor
    _tokenizer: Any  # TRL's
    _metrics: dict[str, Any]  # TRL's
    pad_to_multiple_of: Any  # TRL's
    stop_not_finite: Any  # `ReliableTrainer`'s

    def set_up_loss(self) -> None:
        """Fixes what the loss needs; called once, when the model is there."""
        self.loss_settings = self.args.loss_settings
        # A subclass with a target of its own gets full logits, chunk by chunk; the fused algebra does not cover it
        custom = type(self).target_logits is not DistillingTrainer.target_logits
        self._custom_target = self.target_logits if custom else None
        self.target_name = f"{type(self).__qualname__}.target_logits" if custom else self.args.target
        self._states = required_states(self.loss_settings, LMHead.from_model(self.model).linear, custom)
        ids = len(self._tokenizer)
        self._used_vocab = ids if ids < self.model.config.get_text_config().vocab_size else None
        self.host_copies = HostCopies(self.accelerator.device)
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._bad_rows = torch.empty(0, dtype=torch.long)  # of the micro-batch, whose loss is not finite
        self._token_means = {"train": TokenMeans(), "eval": TokenMeans()}

    def target_logits(self, teacher: torch.Tensor, reference_only: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """
        Target of the distillation for one chunk of tokens. Override it to distill towards another target.

        An override is called with dense logits (fp32, after temperature, without gradient) chunk by chunk, in place of
        the fused path; memory stays bounded.

        Args:
            teacher (`torch.Tensor` of shape `[N, V]`):
                Logits with question and reference in context.
            reference_only (`torch.Tensor` of shape `[N, V]`):
                Logits with the reference alone in context.
            base (`torch.Tensor` of shape `[N, V]`):
                Logits with the question alone in context.

        Returns:
            `torch.Tensor` of shape `[N, V]`: unnormalized log-probabilities.
        """
        if self.args.target == "teacher":
            return teacher
        if self.args.target in DENSE_TARGETS:
            raise NotImplementedError(f"`target: {self.args.target}` is a function in `purified_opsd_trl.targets`.")
        return purified_target_logits(
            teacher,
            reference_only,
            base,
            pmi_beta=self.args.pmi_beta,
            pmi_clip=self.args.pmi_clip,
            pmi_center=self.args.pmi_center,
        )

    def part_loss(
        self, model: torch.nn.Module, part: Part, num_items_in_batch: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """
        Loss of one part of a micro-batch, in one forward of the student.

        Args:
            model (`torch.nn.Module`):
                The student as it was wrapped.
            part ([`Part`]):
                Rows.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Tokens to divide by, in evaluation. `None`: those of the part.

        Returns:
            `torch.Tensor` and `dict[str, float]`: the loss; tokens, padded tokens and tokens with loss of the part on
            all processes, and their mean seconds in the loss ([`COSTS`]).
        """
        loss: Any = super().compute_loss(model, part, False, num_items_in_batch)
        # After the wrapped forward, where a collective cannot get between those of FSDP or DeepSpeed
        mode = "train" if self.model.training else "eval"
        sums, costs = reduce_loss_sums(self._loss_sums, self.accelerator)
        if sums.pop("not_finite")[0] and mode == "train":  # before the backward pass, in which DeepSpeed updates
            self.stop_not_finite(f"the loss of {self._not_finite_rows(part)} is NaN or infinite")
        self._token_means[mode].add(sums)
        self._token_means[mode].add(self.decomposition_monitor.collect(self.accelerator))
        return loss, costs

    def _not_finite_rows(self, part: Part) -> str:
        """Names the first of `_bad_rows` by its prompt."""
        if not len(self._bad_rows):
            return "rows of other processes"
        row = int(self._bad_rows[0])
        prompt = part["prompt_ids"][row][part["prompt_mask"][row].bool()]
        text = " ".join(self._tokenizer.decode(prompt, skip_special_tokens=True).split())
        count = self._bad_rows.unique().numel()
        return f"row {part.rows[row]} of the batch (one of {count}; its prompt ends with {text[-80:]!r})"

    def _present_settings(self) -> LossSettings:
        """Settings of the loss at this step, by which the weight of `target: interpolated` may change."""
        end, settings = self.args.interpolation_weight_end, self.loss_settings
        if end is None:
            return settings
        share = min(1.0, self.state.global_step / max(1, self.state.max_steps - 1))
        weight = settings.interpolation_weight * (1 - share) + end * share
        return replace(settings, interpolation_weight=weight)

    def _frozen_states(self, inputs: dict[str, Any], written: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
        """Begins to bring the states `[N, H]` of the tokens with loss to the device."""
        stored_on = next((value.device for name, value in inputs.items() if name.endswith("_hidden")), written.device)
        picked = vars(FrozenStates.of_tokens(inputs, written.bool().to(stored_on)))
        return {name: self.host_copies.to_device(states) for name, states in picked.items() if states is not None}

    def _compute_loss(
        self,
        unwrapped_student: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        written = loss_mask(inputs)
        packed = isinstance(inputs, Part) and inputs.packed
        # TRL enters the backbone directly, past the autocast that accelerate puts around `forward`
        with self.accelerator.autocast():
            arriving = self._frozen_states(inputs, written)  # those in host memory, while the student runs
            student_hidden, padded = student_states(
                unwrapped_student,
                inputs,
                packed,
                self.pad_to_multiple_of,
                self.purification_collator.alone_beyond,
            )
            student_head = LMHead.from_model(unwrapped_student)
            device = student_head.weight.device
            valid = written.to(device).bool()
            num_tokens = valid.sum()
            frozen_head = self.scoring_callback.frozen_head(unwrapped_student)
            if "decomposition_positions" in inputs:
                by_row = student_hidden.new_zeros(*written.shape, student_hidden.shape[-1])
                by_row[written.bool().to(by_row.device)] = student_hidden.detach()
                self.decomposition_monitor.measure(by_row, student_head, frozen_head, inputs)
            normalizer = num_tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            weights = (1.0 / torch.as_tensor(normalizer, dtype=torch.float32, device=device)).expand(int(num_tokens))
            frozen_states = FrozenStates(**{name: states().to(device) for name, states in arriving.items()})
            started = clock(device)
            result = token_loss(
                student_hidden.to(device),
                student_head,
                frozen_states,
                frozen_head,
                weights,
                self._present_settings(),
                labels=inputs["completion_ids"].to(device)[valid],
                target_logits=self._custom_target,
                used_vocab=self._used_vocab,
            )
        self._loss_sums = loss_sums(result, num_tokens, clock(device) - started)
        counts = {"student_tokens": sum(row_lengths(inputs)), "student_padded": padded}
        self._loss_sums |= {name: torch.tensor(count, device=device) for name, count in counts.items()}
        bad = ~result.per_token.isfinite()  # [N]
        bad |= ~(bad.any() | result.loss.detach().isfinite())  # a sum of finite losses may overflow
        self._loss_sums["not_finite"] = bad.sum()
        self._bad_rows = valid.nonzero()[:, 0][bad]
        return result.loss, result.student_entropy.sum(), num_tokens
