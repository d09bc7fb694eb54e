"""
The self-check before the first step: does this model, as it is set up here, compute what the loss assumes?

```text
head        logits of the output head = logits of the model             else an error
later       a state does not depend on the tokens after it              else an error
together    a padded row in a batch = the row by itself                 else rows run one by one, with a warning
policy      the disabled adapter, or the frozen copy = the student      else a warning
base        the loss towards the base itself = 0                        else an error
gradient    first and last trained layer get one in the first step      else an error
```
"""

import math
import re
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerState
from transformers.utils import logging

from .backbone import backbone, context_length, last_hidden_states, longest_alike, run_rows_apart, without_dropout
from .collator import PurificationCollator
from .config import PurifiedOPSDConfig
from .deviations import LONG, coarsest_dtype, deviations, is_half, states_alone, tolerance, typical
from .errors import InputError
from .head import LMHead
from .kernels.settings import LossSettings
from .loss import FrozenStates, token_loss
from .scoring import TeacherScoringCallback


logger = logging.get_logger(__name__)

# Nats that a student may be from itself, by whether its dtype has fewer than 16 bits of precision. bf16 shifts logits
# by some hundredths, and the divergence grows with the square of that; without positions from the mask GPT-2 has 0.07
_SELF_DIVERGENCE = {False: 1e-4, True: 0.02}


class CheckedTrainer(Trainer):
    """Mixin of the trainer: the self-check, before the first generation and in the first step."""

    args: PurifiedOPSDConfig
    model: Any
    accelerator: Accelerator
    state: TrainerState
    is_deepspeed_enabled: bool
    scoring_callback: TeacherScoringCallback
    purification_collator: PurificationCollator
    loss_settings: LossSettings
    run_inside: Any  # the trainer's
    _tokenizer: Any  # TRL's
    _is_checked = False
    _gradients: "LayerGradients | None" = None

    def check_model(self) -> None:
        """
        Checks the student and the frozen model, once. Every process calls it.

        Raises:
            [`InputError`]: if the loss would not be what it says. The message says what to change.
        """
        if self._is_checked:
            return
        self._is_checked = True
        if not self.args.self_check:
            return
        length = min(n for n in (LONG, longest_alike(self.model), context_length(self.model)) if n is not None)
        # Drawn, since in repetitive text tokens that should not attend to each other could do so unnoticed
        added = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        known = torch.tensor([i for i in range(self._tokenizer.vocab_size) if i not in added])
        drawn = torch.randint(len(known), (length,), generator=torch.Generator().manual_seed(0))
        ids: list[int] = known[drawn].tolist()
        student = self.accelerator.unwrap_model(self.model_wrapped)
        with torch.no_grad(), self.accelerator.autocast(), without_dropout(student):
            self._check_states(self.model_wrapped, student, ids, "the student")
            if type(self.scoring_callback).score is TeacherScoringCallback.score:  # else it may hold no model
                with self.scoring_callback.frozen_model() as (wrapped, frozen):
                    if frozen is not student:
                        self._check_states(wrapped, frozen, ids, "the frozen model")
            if self.state.global_step == 0 and self._scores_itself():
                self._check_policy(student, ids)
        if self.model.training:
            self._gradients = LayerGradients(student)

    def _scores_itself(self) -> bool:
        """Whether what scores is, at the first step, what is trained."""
        plain = type(self.scoring_callback) is TeacherScoringCallback
        return plain and self.args.teacher_model_name_or_path is None

    def _largest(self, *values: float) -> list[float]:
        """Elementwise maximum over all processes, so that all come to the same verdict."""
        own = torch.tensor([values], dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.gather(own).nan_to_num(nan=math.inf).amax(0).tolist()

    def _check_states(self, wrapped: torch.nn.Module, model: Any, ids: list[int], who: str) -> None:
        pad = self.purification_collator.pad_token_id
        found = self.run_inside(wrapped, model, deviations, model, ids, pad, self.accelerator.device)
        head, later, together, rounding = self._largest(*vars(found).values())
        config = model.config.get_text_config()
        dtype = coarsest_dtype(model)
        most = tolerance(dtype, getattr(config, "num_hidden_layers", None) or 1, rounding)
        where = f"Self-check of {who} ({config.model_type}, {dtype}, relative deviation; up to {most:.1g} is rounding)"
        if head > most:
            raise InputError(
                f"{where}: the output head on the last hidden states is {head:.2g} from the model's own logits. The "
                "model transforms states before its output embeddings, or logits after them, in a way that the loss "
                "does not know, so its gradient would be wrong. Use another architecture."
            )
        if later > most:
            raise InputError(
                f"{where}: the states of a row change by {later:.2g} when tokens are added after it. As it "
                "is set up here, the model is not causal, so a completion cannot be scored in one forward. Try "
                "`attn_implementation: eager`, or use a causal language model."
            )
        if together > most:
            run_rows_apart(model)
            self.purification_collator.max_sequences = 1
            logger.warning(
                f"{where}: a padded row in a batch is {together:.2g} from the row by itself. Every row is therefore "
                "scored and trained on by itself, which is exact and slower. Another `attn_implementation` may avoid "
                "it. Rollouts by `generate` are padded as well: with `per_device_train_batch_size: 1` and "
                "`gradient_accumulation_steps: 1`, or `use_vllm: true`, they are not."
            )

    def _check_policy(self, student: Any, ids: list[int]) -> None:
        """Compares the frozen model with the unmoved student, by states and through the loss."""
        row = torch.tensor([ids], device=self.accelerator.device)
        half = is_half(coarsest_dtype(student))
        own = self.run_inside(self.model_wrapped, student, states_alone, student, row)
        with self.scoring_callback.frozen_model() as (wrapped, frozen):
            theirs = self.run_inside(wrapped, frozen, states_alone, frozen, row)
        layers = getattr(student.config.get_text_config(), "num_hidden_layers", None) or 1
        most = tolerance(coarsest_dtype(student), layers, 0.0)
        (policy,) = self._largest(typical(own, theirs, half))
        if policy > most:
            adapter = is_peft_model(student) and self.args.teacher_model_kind == "base"
            logger.warning(
                f"Self-check: teacher, probe and base are not the policy that training starts from: its states are "
                f"{policy:.2g} from theirs (up to {most:.1g} is rounding). "
                + (
                    "The adapter already changes the model; to distill from it, merge it and train a new one."
                    if adapter
                    else "Were weights missing from the checkpoint and drawn anew for the frozen copy? Then pass the "
                    "model as an instance."
                )
            )
            return
        (loss,) = self._largest(self._loss_towards_itself(student, ids))
        if not abs(loss) <= _SELF_DIVERGENCE[half]:
            raise InputError(
                f"Self-check: the unmoved student has a loss of {loss:.2g} nats per token towards itself, not "
                f"0 (up to {_SELF_DIVERGENCE[half]:.1g} is rounding): scoring and training do not see the same model. "
                "Try `scoring_batch_size: 1`, `share_reference_prefix: false` or another `attn_implementation`."
            )

    def _loss_towards_itself(self, student: Any, ids: list[int]) -> float:
        """Mean `KL(frozen || student)` in nats of two completions, scored and trained on as in a step."""
        split = max(1, len(ids) // 2)
        prompts = [ids[:split], ids[split // 2 : split] or ids[:1]]
        completions = [ids[split:], ids[split : split + max(1, split // 2)]]
        scores = self.scoring_callback.score({"teacher": prompts}, completions)
        width, device = max(map(len, prompts)), self.accelerator.device
        rows = torch.full((2, width + max(map(len, completions))), self.purification_collator.pad_token_id)
        mask = torch.zeros_like(rows)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            start, end = width - len(prompt), width + len(completion)
            rows[i, start:end], mask[i, start:end] = torch.tensor(prompt + completion), 1
        settings = replace(self.loss_settings, target="teacher", loss_type="divergence", beta=0.0, kl_clip=None)
        valid = mask[:, width:].bool().to(device)

        def loss(ids: torch.Tensor, mask: torch.Tensor) -> float:
            states = last_hidden_states(student, ids, mask, ids.shape[1] - width).to(device)[valid]
            frozen = FrozenStates.of_tokens({"teacher_hidden": scores.hidden["teacher"]}, valid)
            weights = torch.full((len(states),), 1 / len(states), device=device)
            heads = LMHead.from_model(student), self.scoring_callback.frozen_head(student)
            return float(token_loss(states, heads[0], frozen, heads[1], weights, settings).loss)

        return self.run_inside(self.model_wrapped, student, loss, rows.to(device), mask.to(device))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._gradients is not None and self._largest(abs(float(loss)))[0] > 0:
            self._check_gradients(self._gradients)
            self._gradients = None
        return loss

    def _check_gradients(self, gradients: "LayerGradients") -> None:
        names, sums = zip(*sorted(gradients.take().items()), strict=True) if gradients.layers else ((), ())
        missing = missing_layers(dict(zip(names, self._largest(*sums), strict=True)))
        sharded = self.is_deepspeed_enabled or any(isinstance(p, DTensor) for p in self.model.parameters())
        if len(missing) == len(names) and sharded:
            return  # DeepSpeed and FSDP2 may keep the gradients where hooks do not see them
        if missing:
            raise InputError(
                f"Self-check: no gradient reaches {', '.join(missing)}, although the loss is not zero. Something "
                "between there and the loss is detached. Try `gradient_checkpointing: false`, or "
                "`gradient_checkpointing_kwargs: {use_reentrant: false}`."
            )


_LAYER = re.compile(r"(.*?)\.(\d+)\.")


class LayerGradients:
    """
    Sums `|gradient|` of each trained layer from now on.

    Args:
        model (`torch.nn.Module`):
            Model, sharded or not; its layers are numbered in the names of the parameters.
    """

    def __init__(self, model: torch.nn.Module):
        self.layers: dict[str, list[torch.Tensor]] = {}
        self._sharded: list[tuple[str, Any]] = []  # FSDP2 writes their gradients past the hooks
        self._hooks = []
        text = getattr(backbone(model), "language_model", model)  # layers of a vision tower may have no part in it
        read = {id(parameter) for parameter in text.parameters()}
        for name, parameter in model.named_parameters():
            match = _LAYER.match(name)
            if match is None or not parameter.requires_grad or id(parameter) not in read:
                continue
            layer = f"{match[1]}.{match[2]}"
            sums = self.layers.setdefault(layer, [])
            if isinstance(parameter, DTensor):
                self._sharded.append((layer, parameter))
            else:
                self._hooks.append(parameter.register_hook(lambda grad, sums=sums: sums.append(_size(grad))))

    def take(self) -> dict[str, float]:
        """The sums by layer; stops adding them up."""
        for hook in self._hooks:
            hook.remove()
        for layer, parameter in self._sharded:
            if parameter.grad is not None:
                self.layers[layer].append(_size(parameter.grad.to_local()))
        return {layer: float(sum(sums)) for layer, sums in self.layers.items()}


def _size(grad: torch.Tensor) -> torch.Tensor:
    return grad.detach().abs().sum(dtype=torch.float32)


def missing_layers(sums: dict[str, float]) -> list[str]:
    """
    Of each stack of layers the first and the last one, where they have no gradient and another one of the stack has.

    Args:
        sums (`dict[str, float]`):
            Sum of `|gradient|` by `"<stack>.<number>"`. A stack without any gradient, such as the vision tower under
            text, counts only where no other has one.

    Returns:
        `list[str]`: names.
    """
    stacks: dict[str, list[tuple[int, float]]] = {}
    for name, total in sums.items():
        stack, _, number = name.rpartition(".")
        stacks.setdefault(stack, []).append((int(number), total))
    reached = {stack: layers for stack, layers in stacks.items() if any(total for _, total in layers)}
    ends = [(stack, end) for stack, layers in (reached or stacks).items() for end in {min(layers), max(layers)}]
    return sorted(f"{stack}.{number}" for stack, (number, total) in ends if not total)
