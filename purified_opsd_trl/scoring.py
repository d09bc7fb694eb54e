"""
The self-teacher: one frozen model scores each completion under three contexts.

Shapes: `B` rows of the generation batch, `C` longest completion, `H` hidden size, `V` vocabulary.

Scoring runs once per generation batch, right after the rollout, without gradient and in evaluation mode. Only the last
hidden states are kept; the loss projects them chunk by chunk.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import DynamicCache, TrainerCallback
from transformers.utils import logging
from trl.trainer.utils import use_adapter

from .backbone import (
    backbone,
    keep_trainable_4bit,
    last_hidden_states,
    longest_alike,
    packed_hidden_states,
    position_ids,
    why_not_shareable,
    without_dropout,
)
from .collator import ScoringBatch, shared_prefixes
from .head import LMHead
from .multimodal import Fields
from .offload import HostCopies
from .scores import ScoringStats, TeacherScores
from .self_teacher import EMATeacher, StudentTrainer, check_combination, load_frozen_copy


logger = logging.get_logger(__name__)


class TeacherScoringCallback(TrainerCallback):
    """
    Owns the self-teacher and scores completions with it.

    | `teacher_model_kind` | LoRA | full fine-tuning |
    |---|---|---|
    | `base` | the model under the disabled adapter | a frozen copy |
    | `live` | the student itself | the student itself |
    | `ema` | averaged adapter weights in the student's place | a frozen copy that follows the student |

    Subclass it to score with other weights: override `frozen_model` (which model runs), or `score` (how). It is an
    ordinary [`~transformers.TrainerCallback`]: its events see every step.
    """

    def __init__(self) -> None:
        self.trainer: StudentTrainer  # from `attach` on
        self.teacher_model: torch.nn.Module | None = None
        self.ema: EMATeacher | None = None

    def attach(self, trainer: StudentTrainer, model_path: str | None) -> None:
        """
        Sets the self-teacher up. Called once by the trainer, before its model is wrapped or sharded for training.

        Args:
            trainer ([`PurifiedOPSDTrainer`]):
                The trainer.
            model_path (`str` or `None`):
                Model id or path that the student was loaded from; `None` if it was passed as an instance.

        Raises:
            `InputError`: if the model, the teacher and the way of sharding cannot work together.
        """
        self.trainer = trainer
        args, is_peft = trainer.args, is_peft_model(trainer.model)
        check_combination(trainer, is_peft)
        keep_trainable_4bit(trainer.model)
        if args.teacher_model_kind != "live" and (not is_peft or args.teacher_model_name_or_path is not None):
            self.teacher_model = load_frozen_copy(trainer, model_path)
        if args.teacher_model_kind == "ema":
            self.ema = EMATeacher(trainer, self.teacher_model)
            trainer.add_callback(self.ema)

    def save_state(self, checkpoint: str) -> None:
        """
        Writes what the self-teacher has learned to a checkpoint. Every process calls it.

        Args:
            checkpoint (`str`):
                Folder of the checkpoint.
        """
        if self.ema is not None:
            self.ema.save(checkpoint)

    def load_state(self, checkpoint: str) -> None:
        """
        Restores it. Every process calls it, after the student has been restored.

        Args:
            checkpoint (`str`):
                Folder of the checkpoint.

        Raises:
            `InputError`: if the checkpoint was written with another kind of teacher or of sharding.
        """
        if self.ema is not None:
            self.ema.load(checkpoint)

    @contextmanager
    def frozen_model(self) -> Iterator[tuple[Any, Any]]:
        """
        The model that scores, in evaluation mode, as `(wrapped, unwrapped)`.

        The wrapped one is what DDP, FSDP or DeepSpeed made of it; its forward must be entered so that sharded
        parameters are gathered.
        """
        trainer = self.trainer
        if self.teacher_model is not None:
            yield self.teacher_model, trainer.accelerator.unwrap_model(self.teacher_model)
            return
        wrapped = trainer.model_wrapped
        unwrapped = trainer.accelerator.unwrap_model(wrapped)
        with without_dropout(unwrapped):
            if trainer.args.teacher_model_kind == "base":
                with use_adapter(unwrapped, None):
                    yield wrapped, unwrapped
            elif self.ema is not None:
                with self.ema.in_place_of(unwrapped):
                    yield wrapped, unwrapped
            else:
                yield wrapped, unwrapped

    def frozen_head(self, student: Any) -> LMHead:
        """
        The frozen model's output head, read where the loss uses it (sharding may have moved it since scoring).

        Args:
            student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The unwrapped student.

        Returns:
            [`LMHead`]
        """
        if self.teacher_model is not None:
            return LMHead.from_model(self.trainer.accelerator.unwrap_model(self.teacher_model))
        is_copied = hasattr(student.get_output_embeddings(), "original_module")  # a head in PEFT's `modules_to_save`
        if is_copied and self.trainer.args.teacher_model_kind == "base":
            with use_adapter(student, None):
                return LMHead.from_model(student)
        return LMHead.from_model(student)

    def score(
        self,
        prompt_ids: dict[str, list[list[int]]],
        completion_ids: list[list[int]],
        fields: dict[str, list[Fields]] | None = None,
    ) -> TeacherScores:
        """
        Scores every completion under every context given.

        Args:
            prompt_ids (`dict[str, list[list[int]]]`):
                Prompt ids of the B rows, by context (`"base"`, `"teacher"`, `"reference_only"`).
            completion_ids (`list[list[int]]`):
                Completion ids of the B rows.
            fields (`dict[str, list[dict[str, torch.Tensor]]]`, *optional*):
                Images of the B rows by context, as the model's forward takes them; not given without images.

        Returns:
            [`TeacherScores`]

        Raises:
            `FloatingPointError`: if a score is NaN or infinite, on any process. The message names step, row and
                context. Checkpoints already written are untouched.
        """
        started = time.perf_counter()
        accelerator = self.trainer.accelerator
        copies = self.trainer.host_copies if self.trainer.args.offload_scores else None
        device = accelerator.device if copies is None else torch.device("cpu")
        lengths = torch.tensor([len(ids) for ids in completion_ids], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(1)
        hidden: dict[str, torch.Tensor] = {}
        finite: list[torch.Tensor] = []
        with self.frozen_model() as (wrapped, unwrapped), torch.no_grad(), accelerator.autocast():
            head = LMHead.from_model(unwrapped)
            share_prefixes = self._shares_prefixes(unwrapped, prompt_ids)
            chunk = why_not_shareable(unwrapped) is None
            packing = self.trainer.packing(wrapped, unwrapped)
            batches = self.trainer.scoring_batches(prompt_ids, completion_ids, share_prefixes, packing, chunk, fields)
            for batch in batches:
                states = self._forward(wrapped, unwrapped, batch)
                finite.append(_scatter(states, batch, hidden, mask, copies))
        self._check_finite(batches, finite)
        if copies is not None:
            copies.wait()
        stats = ScoringStats(
            tokens=sum(int(mask.sum()) for batch in batches for mask in batch.masks),
            padded_tokens=sum(mask.numel() for batch in batches for mask in batch.masks),
            forwards=sum(batch.forwards for batch in batches),
            seconds=time.perf_counter() - started,
        )
        return TeacherScores(hidden, mask, head, self.trainer.temperature, stats)

    def _shares_prefixes(self, model: Any, prompt_ids: dict[str, list[list[int]]]) -> bool:
        """Whether prefixes are to be run once; warns where the prompts have some but the model cannot."""
        if not self.trainer.args.share_reference_prefix:
            return False
        reason = why_not_shareable(model)
        if reason is not None and shared_prefixes(prompt_ids):
            logger.warning_once(f"Teacher and reference-only prompts begin alike but are scored separately: {reason}.")
        return reason is None

    def _forward(self, wrapped: torch.nn.Module, unwrapped: Any, batch: ScoringBatch) -> torch.Tensor:
        """Hidden states `[b, n, H]` (packed `[1, n, H]`) that predict the last n columns, completions among them."""
        device, run_inside = self.trainer.accelerator.device, self.trainer.run_inside
        input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        if batch.positions is not None:
            positions = batch.positions.to(device)
            return run_inside(wrapped, unwrapped, packed_hidden_states, unwrapped, input_ids, positions)[:, :-1]
        if batch.forwards == 1:
            count, limit = max(batch.completion_lengths), longest_alike(unwrapped)
            apart = limit is not None and int(batch.attention_mask.sum(-1).max()) > limit  # then the batch is one row
            fields = {name: value.to(device) for name, value in batch.fields.items()}
            arguments = (unwrapped, input_ids, mask, count, apart, fields)
            return run_inside(wrapped, unwrapped, last_hidden_states, *arguments)

        cache = DynamicCache(config=unwrapped.config)  # of what came before

        def continued(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            body = backbone(unwrapped)
            positions = position_ids(body, mask, ids.shape[1])
            outputs = body(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **positions)
            return outputs.last_hidden_state

        # Each forward enters the wrapper on its own, as those without a prefix do; the cache never passes through it
        if batch.prefix_ids is not None and batch.prefix_mask is not None:
            prefix_ids, prefix_mask = batch.prefix_ids.to(device), batch.prefix_mask.to(device)
            run_inside(wrapped, unwrapped, continued, prefix_ids, prefix_mask)
            prefix_of = torch.tensor(batch.prefix_of, device=device)
            cache.reorder_cache(prefix_of)  # type: ignore[arg-type]  # integers are all it needs
            mask = torch.cat([prefix_mask[prefix_of], mask], dim=1)
            return run_inside(wrapped, unwrapped, continued, input_ids, mask)[:, min(batch.completion_starts) - 1 : -1]

        ends = [i * input_ids.shape[1] // batch.chunks for i in range(batch.chunks + 1)]
        first = batch.completion_starts[0] - 1
        states = []
        for start, end in pairwise(ends):
            chunk = run_inside(wrapped, unwrapped, continued, input_ids[:, start:end], mask[:, :end])
            states.append(chunk[:, max(first - start, 0) :].clone())  # not the states of the prompt
        return torch.cat(states, dim=1)[:, :-1]

    def _check_finite(self, batches: Sequence[ScoringBatch], finite: list[torch.Tensor]) -> None:
        accelerator, step = self.trainer.accelerator, self.trainer.state.global_step
        bad = [
            f"row {row} under the {context} context"
            for batch, flags in zip(batches, finite, strict=True)
            for row, context, good in zip(batch.rows, batch.contexts, flags.tolist(), strict=True)
            if not good
        ]
        anywhere = accelerator.gather(torch.tensor([len(bad)], device=accelerator.device)).sum().item()
        if anywhere:
            named = "; ".join(sorted(set(bad))[:4]) or "rows of other processes"
            raise FloatingPointError(
                f"Step {step}: the scores are NaN or infinite for {named} of the generation batch (process "
                f"{accelerator.process_index}). Training stops before the update; checkpoints in "
                f"{self.trainer.args.output_dir} are kept. Check the model's dtype (fp16 overflows easily: use bf16) "
                "and whether the weights are finite."
            )


def _scatter(
    states: torch.Tensor,
    batch: ScoringBatch,
    hidden: dict[str, torch.Tensor],
    mask: torch.Tensor,
    copies: HostCopies | None,
) -> torch.Tensor:
    """Copies each sequence's completion states to its row; returns per sequence whether all of them are finite."""
    finite = []
    sequences = zip(batch.contexts, batch.rows, batch.completion_starts, batch.completion_lengths, strict=True)
    for i, (context, row, start, length) in enumerate(sequences):
        i = i if batch.positions is None else 0
        if context not in hidden:
            shape = (*mask.shape, states.shape[-1])
            zeros = partial(torch.zeros, device=mask.device) if copies is None else copies.zeros
            hidden[context] = zeros(*shape, dtype=states.dtype)
        first = states.shape[1] - batch.input_ids.shape[1] + start  # the last state predicts the last column
        completion = states[i, first : first + length]
        if copies is None:
            hidden[context][row, :length] = completion.to(mask.device)
        else:
            copies.to_host(completion, hidden[context][row, :length])
        finite.append(torch.isfinite(completion).all())
    return torch.stack(finite)
