"""
The part of the trainer that trains: the student's forward, the token loss, and the stop before a NaN is stepped.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer

from .backbone import last_hidden_states
from .collator import PurificationCollator
from .config import PurifiedOPSDConfig
from .head import LMHead
from .loss import FrozenStates, required_states, token_loss
from .monitoring.decomposition import DecompositionMonitor
from .monitoring.metrics import TokenMeans, clock, loss_sums, reduce_loss_sums
from .purification import purified_target_logits
from .scoring import TeacherScoringCallback
from .targets import DENSE_TARGETS


class DistillingTrainer(Trainer):
    """Mixin of the trainer: from scored completions to the loss."""

    args: PurifiedOPSDConfig
    model: Any
    scoring_callback: TeacherScoringCallback
    purification_collator: PurificationCollator
    decomposition_monitor: DecompositionMonitor
    _tokenizer: Any  # TRL's
    _metrics: dict[str, Any]  # TRL's
    stop_not_finite: Any  # `ReliableTrainer`'s
    _apart = False  # whether rows of the micro-batch run by themselves

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

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self._apart = self._runs_apart(inputs)
        outputs = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # After the wrapped forward, where a collective cannot get between those of FSDP or DeepSpeed
        mode = "train" if self.model.training else "eval"
        sums, seconds = reduce_loss_sums(self._loss_sums, self.accelerator)
        if sums.pop("not_finite")[0] and mode == "train":  # before the backward pass, in which DeepSpeed updates
            self.stop_not_finite(f"the loss of {self._not_finite_rows(inputs)} is NaN or infinite")
        self._token_means[mode].add(sums)
        self._token_means[mode].add(self.decomposition_monitor.collect(self.accelerator))
        self._metrics[mode]["timing/loss_seconds"].append(seconds)
        return outputs

    def _runs_apart(self, inputs: dict[str, Any]) -> bool:
        """Whether rows of the micro-batch, of any process, are too long to run together (`longest_alike`)."""
        limit = self.purification_collator.alone_beyond
        if limit is None:
            return False
        longest = (inputs["prompt_mask"].sum(-1) + inputs["completion_mask"].sum(-1)).max().view(1)
        return bool(self.accelerator.gather(longest.to(self.accelerator.device)).max() > limit)

    def _not_finite_rows(self, inputs: dict[str, Any]) -> str:
        """Names the first of `_bad_rows` by its prompt."""
        if not len(self._bad_rows):
            return "rows of other processes"
        row = int(self._bad_rows[0])
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        text = " ".join(self._tokenizer.decode(prompt, skip_special_tokens=True).split())
        return (
            f"row {row} of the batch (one of {self._bad_rows.unique().numel()}; its prompt ends with {text[-80:]!r})"
        )

    def _compute_loss(
        self,
        unwrapped_student: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        written = loss_mask(inputs)
        # TRL enters the backbone directly, past the autocast that accelerate puts around `forward`
        with self.accelerator.autocast():
            student_hidden = last_hidden_states(
                unwrapped_student, input_ids, attention_mask, inputs["completion_ids"].size(1), self._apart
            )
            student_head = LMHead.from_model(unwrapped_student)
            device = student_head.weight.device
            valid = written.to(device).bool()
            num_tokens = valid.sum()
            frozen_head = self.scoring_callback.frozen_head(unwrapped_student)
            self.decomposition_monitor.measure(student_hidden, student_head, frozen_head, inputs)
            normalizer = num_tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            weights = (1.0 / torch.as_tensor(normalizer, dtype=torch.float32, device=device)).expand(int(num_tokens))
            student_states, frozen_states = student_hidden.to(device)[valid], FrozenStates.of_tokens(inputs, valid)
            started = clock(device)
            result = token_loss(
                student_states,
                student_head,
                frozen_states,
                frozen_head,
                weights,
                self.loss_settings,
                labels=inputs["completion_ids"].to(device)[valid],
                target_logits=self._custom_target,
                used_vocab=self._used_vocab,
            )
        self._loss_sums = loss_sums(result, num_tokens, clock(device) - started)
        bad = ~(result.per_token * result.loss.detach()).isfinite()  # [N]
        self._loss_sums["not_finite"] = bad.sum()
        self._bad_rows = valid.nonzero()[:, 0][bad]
        return result.loss, result.student_entropy.sum(), num_tokens


def loss_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """`[B, C]`: 1 at the tokens that the student wrote, 0 at padding and tool results."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
