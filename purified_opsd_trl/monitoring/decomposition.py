"""
How much of the teacher's signal is the reference: the statistics of Eq. 4, and the monitor that takes them.

```text
scoring -> DecompositionMonitor.sample     chooses tokens and keeps their frozen states
loss    -> DecompositionMonitor.measure    adds the student's state at the same tokens
```

Every process runs the same collectives: whether a step is measured depends on its number alone.

Shapes: `[..., V]` is any number of leading dimensions and the vocabulary last; `B` rows, `C` longest completion, `K`
most tokens of a row that are measured, `H` hidden size.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..head import LMHead, gathered
from ..markers import TOKEN_CLASSES, TokenClassifier
from ..purification import Decomposition, decompose
from ..scores import TeacherScores
from .metrics import clock


if TYPE_CHECKING:
    from accelerate import Accelerator


class DecompositionStats(NamedTuple):
    """
    Cosines and norm ratios of `Delta_total = Delta_ref + Delta_it` over the vocabulary, one value a token.

    The first three weight every vocabulary entry alike, as the paper does; the near-zero tail of the distributions
    dominates them. The `mass_*` three use the inner product `<a, b> = sum_v pi_theta(v) a(v) b(v)`: what the student
    might really say. A cosine with a zero vector, and a ratio to one, are 0.

    Attributes:
        cos_total_ref, mass_cos_total_ref (`torch.Tensor` of shape `[...]`):
            cos(Delta_total, Delta_ref): near 1, the signal is what the reference alone induces.
        cos_total_it, mass_cos_total_it (`torch.Tensor` of shape `[...]`):
            cos(Delta_total, Delta_it).
        norm_ratio_ref, mass_norm_ratio_ref (`torch.Tensor` of shape `[...]`):
            |Delta_ref| / |Delta_total|: above 1, the reference-induced part outweighs the whole signal.
    """

    cos_total_ref: torch.Tensor
    cos_total_it: torch.Tensor
    norm_ratio_ref: torch.Tensor
    mass_cos_total_ref: torch.Tensor
    mass_cos_total_it: torch.Tensor
    mass_norm_ratio_ref: torch.Tensor


STATISTICS = DecompositionStats._fields


def decomposition_stats(
    student: torch.Tensor, teacher: torch.Tensor, reference_only: torch.Tensor
) -> tuple[DecompositionStats, Decomposition]:
    """
    Statistics of the decomposition, and the log-ratios they are taken of.

    Args:
        student (`torch.Tensor` of shape `[..., V]`):
            Student logits, after temperature.
        teacher (`torch.Tensor` of shape `[..., V]`):
            Logits of the privileged teacher (question and reference in context).
        reference_only (`torch.Tensor` of shape `[..., V]`):
            Logits of the reference-only probe (reference in context, no question).

    Returns:
        `tuple`: [`DecompositionStats`] and [`Decomposition`].
    """
    parts = decompose(student, teacher, reference_only)
    plain = _stats(*parts)
    # sqrt(p) on both factors is p on their product
    root = torch.softmax(student.to(parts.total.dtype), dim=-1).sqrt_()
    mass = _stats(*(root * part for part in parts))
    return DecompositionStats(*plain, *mass), parts


def _stats(total: torch.Tensor, ref: torch.Tensor, it: torch.Tensor) -> tuple[torch.Tensor, ...]:
    norm_total, norm_ref, norm_it = (torch.linalg.vector_norm(x, dim=-1) for x in (total, ref, it))
    return (
        _ratio(torch.linalg.vecdot(total, ref), norm_total * norm_ref),
        _ratio(torch.linalg.vecdot(total, it), norm_total * norm_it),
        _ratio(norm_ref, norm_total),
    )


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    positive = denominator > 0
    return torch.where(positive, numerator / denominator.where(positive, torch.ones_like(denominator)), 0.0)


THIRDS = ("first_third", "middle_third", "last_third")
_GROUPS = ("", *(f"{name}/" for name in (*THIRDS, *TOKEN_CLASSES)))
DECOMPOSITION_METRICS = tuple(f"purification/{group}{name}" for group in _GROUPS for name in STATISTICS)

# Tensors `[chunk, V]` alive at once while the statistics are formed: logits, log-ratios, weights, temporaries
_BUFFERS = 10


class DecompositionMonitor(TrainerCallback):
    """
    Decomposes the teacher's signal (Eq. 4) on a sample of the tokens of every n-th step.

    The sample is uniform over all tokens of the step that carry loss, on all processes, without replacement and seeded
    by the step: a resumed run looks at the tokens that the uninterrupted one looks at. Statistics are exact over the
    full vocabulary and are computed chunk by chunk.

    Args:
        every (`int`):
            Steps between two looks; the first is before the first update. 0 switches the monitor off.
        max_tokens (`int`):
            Most tokens looked at in a step, over all processes.
        classifier ([`TokenClassifier`]):
            Sorts tokens into classes.
        temperature (`float`):
            Sampling temperature.
        memory_budget (`int`):
            Scratch memory in bytes, from which the chunk size follows.
        seed (`int`):
            Seed of the sample.
    """

    def __init__(
        self,
        every: int,
        max_tokens: int,
        classifier: TokenClassifier,
        temperature: float = 1.0,
        memory_budget: int = 512 * 2**20,
        seed: int = 0,
    ):
        self.every = every
        self.max_tokens = max_tokens
        self.classifier = classifier
        self.temperature = temperature
        self.memory_budget = memory_budget
        self.seed = seed
        self.step = 0
        self.due = False
        self.tokens: list[dict[str, Any]] = []  # this process's tokens of the last look, for the per-token table
        self._sums: torch.Tensor | None = None
        self._seconds = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step
        self.due = self.every > 0 and self.step % self.every == 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.due = False

    def sample(
        self, scores: TeacherScores, completion_ids: torch.Tensor, loss_mask: torch.Tensor, process: int, total: int
    ) -> dict[str, torch.Tensor]:
        """
        Chooses the tokens to look at and keeps their frozen states.

        Args:
            scores ([`TeacherScores`]):
                Hidden states of the contexts `"teacher"` and `"reference_only"`.
            completion_ids (`torch.Tensor` of shape `[B, C]`):
                Completion ids.
            loss_mask (`torch.Tensor` of shape `[B, C]`):
                1 at tokens that carry loss.
            process (`int`):
                Index of this process.
            total (`int`):
                Tokens that carry loss on all processes.

        Returns:
            `dict[str, torch.Tensor]`: batch-first tensors that travel with the rows to the loss; empty when this step
            is not looked at. `decomposition_positions` `[B, K]` (-1 for none), `decomposition_groups` `[B, K, 2]`
            (third and class), `decomposition_teacher` and `decomposition_reference_only` `[B, K, H]`.
        """
        if not self.due:
            return {}
        self.tokens.clear()
        generator = torch.Generator().manual_seed(hash((self.seed, self.step, process)) % 2**63)
        valid = loss_mask.bool().cpu()
        rows, columns = valid.nonzero(as_tuple=True)
        share = min(1.0, self.max_tokens / max(total, 1))
        chosen = torch.randperm(len(rows), generator=generator)[: round(share * len(rows))].sort().values
        rows, columns = rows[chosen], columns[chosen]
        width = max(1, int(torch.bincount(rows, minlength=1).max())) if len(rows) else 1
        positions = torch.full((len(valid), width), -1)
        groups = torch.zeros(len(valid), width, 2, dtype=torch.long)
        lengths = scores.completion_mask.sum(dim=1).tolist()
        for row in rows.unique().tolist():
            columns_of_row = columns[rows == row]
            count = len(columns_of_row)
            classes = torch.tensor(self.classifier.classify(completion_ids[row, : lengths[row]].tolist()))
            positions[row, :count] = columns_of_row
            groups[row, :count, 0] = (len(THIRDS) * columns_of_row).div(lengths[row], rounding_mode="floor")
            groups[row, :count, 1] = classes[columns_of_row]
        device = completion_ids.device
        kept = {
            f"decomposition_{context}": _rows_at(scores.hidden[context], positions).to(device)
            for context in ("teacher", "reference_only")
        }
        return {"decomposition_positions": positions.to(device), "decomposition_groups": groups.to(device), **kept}

    @torch.no_grad()
    def measure(
        self, student_hidden: torch.Tensor, student_head: LMHead, frozen_head: LMHead, inputs: Mapping[str, Any]
    ) -> None:
        """
        Adds one micro-batch to the sums of the step. Gathers sharded heads, so all processes must call it.

        Args:
            student_hidden (`torch.Tensor` of shape `[B, C, H]`):
                The student's last hidden states at the completion.
            student_head ([`LMHead`]):
                The student's head.
            frozen_head ([`LMHead`]):
                The frozen model's head.
            inputs (`Mapping[str, Any]`):
                The micro-batch, with what `sample` returned.
        """
        if "decomposition_positions" not in inputs:
            return
        started = clock(student_hidden.device)
        device = student_head.weight.device  # `device_map` may have put hidden states and inputs elsewhere
        positions = inputs["decomposition_positions"].to(device)
        present = positions >= 0
        student = _rows_at(student_hidden.detach().to(device), positions)[present]
        teacher, reference_only = (
            inputs[f"decomposition_{context}"].to(device)[present] for context in ("teacher", "reference_only")
        )
        groups = inputs["decomposition_groups"].to(device)[present]
        labels = inputs["completion_ids"].to(device).gather(1, positions.clamp(min=0))[present]
        sums = torch.zeros(len(_GROUPS), len(STATISTICS) + 1, dtype=torch.float64)
        with gathered(student_head, frozen_head):
            heads = (replace(head, temperature=self.temperature).full() for head in (student_head, frozen_head))
            trained, frozen = heads
            size = max(1, self.memory_budget // (4 * _BUFFERS * trained.weight.shape[0]))
            for start in range(0, len(labels), size):
                chunk = slice(start, start + size)
                stats, parts = decomposition_stats(
                    trained.logits(student[chunk]),
                    frozen.logits(teacher[chunk]),
                    frozen.logits(reference_only[chunk]),
                )
                sums += _grouped(torch.stack(stats, dim=-1), groups[chunk]).cpu()
                at_label = [part.gather(-1, labels[chunk].unsqueeze(-1)).squeeze(-1) for part in parts]
                self._remember(labels[chunk], groups[chunk], torch.stack(at_label, dim=-1))
        self._sums = sums if self._sums is None else self._sums + sums
        self._seconds = clock(device) - started

    def _remember(self, labels: torch.Tensor, groups: torch.Tensor, deltas: torch.Tensor) -> None:
        pieces = self.classifier.pieces(labels.tolist())
        for piece, (third, kind), (total, ref, it) in zip(pieces, groups.tolist(), deltas.tolist(), strict=True):
            self.tokens.append(
                {
                    "step": self.step,
                    "token": piece,
                    "class": TOKEN_CLASSES[kind],
                    "third": THIRDS[third],
                    "delta_total": total,
                    "delta_ref": ref,
                    "delta_it": it,
                }
            )

    def collect(self, accelerator: "Accelerator") -> dict[str, tuple[float, float]]:
        """
        Sums over all processes since the last call.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                Reduces over the processes.

        Returns:
            `dict[str, tuple[float, float]]`: sum and number of tokens by metric name; empty when nothing was measured.
            `timing/decomposition_seconds` is this process's time for the micro-batch.
        """
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums.float().to(accelerator.device), "sum").cpu()
        self._sums = None
        values, counts = sums[:, :-1].flatten().tolist(), sums[:, -1:].expand(-1, len(STATISTICS)).flatten().tolist()
        metrics = dict(zip(DECOMPOSITION_METRICS, zip(values, counts, strict=True), strict=True))
        return {**metrics, "timing/decomposition_seconds": (self._seconds, 1.0)}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if getattr(args, "log_completions", False) and state.is_world_process_zero and self.tokens:
            _log_table(self.tokens, args, state.global_step)
            self.tokens.clear()


def _rows_at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`[B, C, H]` at `[B, K]` -> `[B, K, H]`; an absent position takes the first column."""
    index = positions.clamp(min=0).to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device).unsqueeze(1), index]


def _grouped(stats: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sums `[n, S]` over all tokens, each third and each class; the last column counts. `[G, S + 1]`, fp64."""
    stats = torch.cat([stats, torch.ones_like(stats[:, :1])], dim=1).double()
    members = [torch.ones_like(groups[:, 0], dtype=torch.bool)]
    members += [groups[:, 0] == i for i in range(len(THIRDS))]
    members += [groups[:, 1] == i for i in range(len(TOKEN_CLASSES))]
    return torch.stack(members).double() @ stats


def _log_table(tokens: list[dict[str, Any]], args: TrainingArguments, step: int) -> None:
    import pandas as pd

    frame = pd.DataFrame(tokens)
    folder = os.path.join(args.output_dir or ".", "completions")
    os.makedirs(folder, exist_ok=True)
    frame.to_parquet(os.path.join(folder, f"tokens_{step:05d}.parquet"))
    backends: list[Any] = []
    if "wandb" in (args.report_to or ()):
        import wandb

        backends += [wandb] if wandb.run is not None else []
    if "trackio" in (args.report_to or ()):
        import trackio

        backends.append(trackio)
    for backend in backends:
        backend.log({"token_decomposition": backend.Table(dataframe=frame)})
