"""
The self-teacher: one frozen model scores each completion under three contexts.

Shapes: `B` rows of the generation batch, `C` longest completion, `H` hidden size, `V` vocabulary.

Scoring runs once a generation batch, right after the rollout, without gradient and in evaluation mode. Only the last
hidden states are kept; the loss projects them chunk by chunk.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import DynamicCache, TrainerCallback
from trl.trainer.utils import use_adapter

from .loss import LMHead, gathered_heads
from .self_teacher import EMATeacher, check_combination, load_frozen_copy


if TYPE_CHECKING:
    from .collator import ScoringBatch
    from .trainer import PurifiedOPSDTrainer


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringStats:
    """
    Cost of one scoring pass on this process.

    Attributes:
        tokens (`int`):
            Tokens run through the model, prompts included, all contexts; a shared prefix counts once.
        padded_tokens (`int`):
            The same with padding.
        forwards (`int`):
            Forward passes of the frozen model.
        seconds (`float`):
            Wall-clock time in seconds.
    """

    tokens: int
    padded_tokens: int
    forwards: int
    seconds: float


@dataclass(frozen=True)
class TeacherScores:
    """
    Hidden states of the frozen model under each context, aligned to the completion tokens.

    Attributes:
        hidden (`dict[str, torch.Tensor]`):
            Last hidden states `[B, C, H]` by context (`"base"`, `"teacher"`, `"reference_only"`): position t holds the
            state from which token t of the completion is predicted. Zero at padding.
        completion_mask (`torch.Tensor` of shape `[B, C]`):
            True at completion tokens.
        head ([`LMHead`]):
            The frozen model's output projection.
        temperature (`float`):
            Sampling temperature that divides the logits.
        stats ([`ScoringStats`]):
            What the pass cost.
    """

    hidden: dict[str, torch.Tensor]
    completion_mask: torch.Tensor
    head: LMHead
    temperature: float
    stats: ScoringStats

    def log_probs(self, token_ids: torch.Tensor, context: str) -> torch.Tensor:
        """
        Log-probabilities of any tokens under one context.

        Args:
            token_ids (`torch.Tensor` of shape `[B, C]` or `[B, C, K]`):
                Token ids: one, or K alternatives, at each position.
            context (`str`):
                `"base"`, `"teacher"` or `"reference_only"`.

        Returns:
            `torch.Tensor` of the shape of `token_ids`: nats, fp32; 0 at padding.
        """
        hidden = self.hidden[context]
        ids = token_ids if token_ids.dim() == 3 else token_ids.unsqueeze(-1)
        result = torch.zeros(ids.shape, dtype=torch.float32, device=hidden.device)
        with torch.no_grad(), gathered_heads(self.head):
            for row, mask in enumerate(self.completion_mask):
                logits = self.head.logits(hidden[row, mask]) / self.temperature
                result[row, mask] = torch.log_softmax(logits, dim=-1).gather(-1, ids[row, mask].to(logits.device))
        return result.view(token_ids.shape)

    def contrast(self, token_ids: torch.Tensor, context: str, without: str) -> torch.Tensor:
        """
        Log-ratio of any tokens between two contexts.

        `contrast(ids, "teacher", "base")` is what the reference adds to the question; `contrast(ids, "teacher",
        "reference_only")` is what the question adds to the reference (Delta_it, Eq. 4).

        Args:
            token_ids (`torch.Tensor` of shape `[B, C]` or `[B, C, K]`):
                Token ids.
            context (`str`):
                Context in the numerator.
            without (`str`):
                Context in the denominator.

        Returns:
            `torch.Tensor` of the shape of `token_ids`: nats; 0 at padding.
        """
        return self.log_probs(token_ids, context) - self.log_probs(token_ids, without)


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
        self.trainer: PurifiedOPSDTrainer | None = None
        self.teacher_model: torch.nn.Module | None = None
        self.ema: EMATeacher | None = None
        self._told_why_not = False

    def attach(self, trainer: "PurifiedOPSDTrainer", model_path: str | None) -> None:
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
        if args.teacher_model_kind != "live" and (not is_peft or args.teacher_model_name_or_path is not None):
            self.teacher_model = load_frozen_copy(trainer, model_path)
        if args.teacher_model_kind == "ema":
            self.ema = EMATeacher(trainer, self.teacher_model)
            trainer.add_callback(self.ema)

    def save_state(self, checkpoint: str) -> None:
        """
        Writes what the self-teacher has learnt to a checkpoint. Every process calls it.

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
        assert self.trainer is not None
        trainer = self.trainer
        if self.teacher_model is not None:
            yield self.teacher_model, trainer.accelerator.unwrap_model(self.teacher_model)
            return
        wrapped = trainer.model_wrapped
        unwrapped = trainer.accelerator.unwrap_model(wrapped)
        was_training = unwrapped.training
        unwrapped.eval()  # dropout off; gradient checkpointing off
        try:
            if trainer.args.teacher_model_kind == "base":
                with use_adapter(unwrapped, None):
                    yield wrapped, unwrapped
            elif self.ema is not None:
                with self.ema.in_place_of(unwrapped):
                    yield wrapped, unwrapped
            else:
                yield wrapped, unwrapped
        finally:
            unwrapped.train(was_training)

    def frozen_head(self, student: Any) -> LMHead:
        """
        The frozen model's output projection, read where the loss uses it (sharding may have moved it since scoring).

        Args:
            student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The unwrapped student.

        Returns:
            [`LMHead`]
        """
        assert self.trainer is not None
        if self.teacher_model is not None:
            return LMHead.from_model(self.trainer.accelerator.unwrap_model(self.teacher_model))
        is_copied = hasattr(student.get_output_embeddings(), "original_module")  # a head in PEFT's `modules_to_save`
        if is_copied and self.trainer.args.teacher_model_kind == "base":
            with use_adapter(student, None):
                return LMHead.from_model(student)
        return LMHead.from_model(student)

    def score(self, prompt_ids: dict[str, list[list[int]]], completion_ids: list[list[int]]) -> TeacherScores:
        """
        Scores every completion under every context given.

        Args:
            prompt_ids (`dict[str, list[list[int]]]`):
                Prompt ids of the B rows, by context (`"base"`, `"teacher"`, `"reference_only"`).
            completion_ids (`list[list[int]]`):
                Completion ids of the B rows.

        Returns:
            [`TeacherScores`]

        Raises:
            `FloatingPointError`: if a score is NaN or infinite, on any process. The message names step, row and
                context. Checkpoints already written are untouched.
        """
        assert self.trainer is not None
        started = time.perf_counter()
        accelerator = self.trainer.accelerator
        device = torch.device("cpu") if self.trainer.args.offload_scores else accelerator.device
        lengths = torch.tensor([len(ids) for ids in completion_ids], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(1)
        hidden: dict[str, torch.Tensor] = {}
        finite: list[torch.Tensor] = []
        with self.frozen_model() as (wrapped, unwrapped), torch.no_grad(), accelerator.autocast():
            head = LMHead.from_model(unwrapped)
            batches = self._agreed_batches(prompt_ids, completion_ids, unwrapped)
            for batch in batches:
                states = self._forward(wrapped, unwrapped, batch)
                finite.append(_scatter(states, batch, hidden, mask))
        self._check_finite(batches, finite)
        stats = ScoringStats(
            tokens=sum(int(mask.sum()) for batch in batches for mask in batch.masks),
            padded_tokens=sum(mask.numel() for batch in batches for mask in batch.masks),
            forwards=sum(batch.forwards for batch in batches),
            seconds=time.perf_counter() - started,
        )
        return TeacherScores(hidden, mask, head, self.trainer.temperature, stats)

    def _agreed_batches(
        self, prompt_ids: dict[str, list[list[int]]], completion_ids: list[list[int]], model: Any
    ) -> list["ScoringBatch"]:
        assert self.trainer is not None
        collator, accelerator = self.trainer.purification_collator, self.trainer.accelerator
        share = self.trainer.args.share_reference_prefix
        why_not = unshareable(model) if share else None
        if why_not is not None and not self._told_why_not and collator.shared_prefixes(prompt_ids):
            logger.warning(
                f"Teacher and reference-only prompts are scored apart, although they begin alike: {why_not}."
            )
            self._told_why_not = True
        share = share and why_not is None
        batches = collator.scoring_batches(prompt_ids, completion_ids, share_prefixes=share)
        if accelerator.num_processes > 1:
            # Sharded parameters are gathered by all processes together: one forward more on one of them would hang
            own = sum(batch.forwards for batch in batches)
            most = int(accelerator.gather(torch.tensor([own], device=accelerator.device)).max())
            if own < most:
                batches = collator.scoring_batches(prompt_ids, completion_ids, num_forwards=most, share_prefixes=share)
        return batches

    def _forward(self, wrapped: torch.nn.Module, unwrapped: Any, batch: "ScoringBatch") -> torch.Tensor:
        """Hidden states `[b, n, H]` that predict the last n columns of the batch, all completions among them."""
        assert self.trainer is not None
        device = self.trainer.accelerator.device
        input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        redirect = self.trainer._forward_redirection
        if batch.prefix_ids is None or batch.prefix_mask is None:
            get_states = self.trainer._get_last_hidden_state
            return redirect(wrapped, unwrapped, get_states, unwrapped, input_ids, mask, max(batch.completion_lengths))

        cache = DynamicCache(config=unwrapped.config)  # of the prefixes, then of sequences that continue them

        def continued(ids: torch.Tensor, mask: torch.Tensor, first: int) -> torch.Tensor:
            model = unwrapped.base_model.model if is_peft_model(unwrapped) else unwrapped
            outputs = model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            return outputs.last_hidden_state[:, first - 1 : -1]

        # Each forward enters the wrapper on its own, as those without a prefix do; the cache never passes through it
        prefix_ids, prefix_mask = batch.prefix_ids.to(device), batch.prefix_mask.to(device)
        redirect(wrapped, unwrapped, continued, prefix_ids, prefix_mask, prefix_ids.shape[1])
        prefix_of = torch.tensor(batch.prefix_of, device=device)
        cache.reorder_cache(prefix_of)  # type: ignore[arg-type]  # integers are all it needs
        mask = torch.cat([prefix_mask[prefix_of], mask], dim=1)
        return redirect(wrapped, unwrapped, continued, input_ids, mask, min(batch.completion_starts))

    def _check_finite(self, batches: list["ScoringBatch"], finite: list[torch.Tensor]) -> None:
        assert self.trainer is not None
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
    states: torch.Tensor, batch: "ScoringBatch", hidden: dict[str, torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """Copies each sequence's completion states to its row; returns per sequence whether all of them are finite."""
    finite = []
    sequences = zip(batch.contexts, batch.rows, batch.completion_starts, batch.completion_lengths, strict=True)
    for i, (context, row, start, length) in enumerate(sequences):
        if context not in hidden:
            hidden[context] = torch.zeros(*mask.shape, states.shape[-1], dtype=states.dtype, device=mask.device)
        first = states.shape[1] - batch.input_ids.shape[1] + start  # the last state predicts the last column
        completion = states[i, first : first + length]
        hidden[context][row, :length] = completion.to(mask.device)
        finite.append(torch.isfinite(completion).all())
    return torch.stack(finite)


def unshareable(model: Any) -> str | None:
    """
    Why a model cannot continue one prefix in two ways and score exactly what separate forwards score.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model.

    Returns:
        `str`, *optional*: the reason; `None` if it can.
    """
    config = model.config.get_text_config()
    if config is not model.config:
        return f"{model.config.model_type} is more than a language model"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        return f"the rotary embedding of {config.model_type} depends on the length of the whole sequence"
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - {"full_attention", "sliding_attention"} or getattr(model, "_is_stateful", False):
        return f"{config.model_type} has other layers than those of full and of sliding-window attention"
    return None
