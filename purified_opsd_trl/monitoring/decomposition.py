"""
How much of the teacher's signal the reference alone induces: the statistics of Eq. 4, and the monitor of them.

```text
scoring -> DecompositionMonitor.sample     chooses tokens and keeps their frozen states
loss    -> DecompositionMonitor.measure    adds the student's state at the same tokens
```

Every process runs the same collectives: whether a step is measured depends on its number alone.

Shapes: `[..., V]` is any number of leading dimensions and the vocabulary last; `B` rows, `C` longest completion, `K`
most measured tokens of a row, `H` hidden size.
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
    Cosines and norms of `Delta_total = Delta_ref + Delta_it` over the vocabulary, one value per token, `[...]` each.

    The plain statistics weight every vocabulary entry equally, as the paper does; the near-zero tail of the
    distributions dominates them. The `mass_*` statistics use the inner product `<a, b> = sum_v pi_theta(v) a(v) b(v)`,
    which weights what the student may actually say. A cosine with a zero vector, and a ratio to one, are 0.

    `norm_ratio_ref` is |Delta_ref| / |Delta_total| at one token. Its mean over tokens is unusable on real data: where
    teacher and student agree, the denominator is close to zero. See `RATIOS` and `MEDIANS`.
    """

    cos_total_ref: torch.Tensor
    cos_total_it: torch.Tensor
    norm_ratio_ref: torch.Tensor
    norm_total: torch.Tensor
    norm_ref: torch.Tensor
    mass_cos_total_ref: torch.Tensor
    mass_cos_total_it: torch.Tensor
    mass_norm_ratio_ref: torch.Tensor
    mass_norm_total: torch.Tensor
    mass_norm_ref: torch.Tensor


STATISTICS = DecompositionStats._fields
# What is reported of the tokens of a group: sum of the first statistic over sum of the second; None counts the tokens
RATIOS: dict[str, tuple[str, str | None]] = {
    "cos_total_ref": ("cos_total_ref", None),
    "cos_total_it": ("cos_total_it", None),
    "norm_ratio_ref": ("norm_ref", "norm_total"),
    "paper_norm_ratio_ref": ("norm_ratio_ref", None),
    "mass_cos_total_ref": ("mass_cos_total_ref", None),
    "mass_cos_total_it": ("mass_cos_total_it", None),
    "mass_norm_ratio_ref": ("mass_norm_ref", "mass_norm_total"),
}
MEDIANS = {"median_norm_ratio_ref": "norm_ratio_ref", "mass_median_norm_ratio_ref": "mass_norm_ratio_ref"}
SUMMARIES = (*RATIOS, *MEDIANS)
_PLAIN_NAMES = {
    "cos_total_ref": "cos(total, ref)",
    "cos_total_it": "cos(total, it)",
    "norm_ratio_ref": "|ref| / |total|",
    "median_norm_ratio_ref": "median of |ref| / |total|",
}
NAMES = {  # for people
    **_PLAIN_NAMES,
    **{f"mass_{name}": f"{text}, weighted" for name, text in _PLAIN_NAMES.items()},
    "paper_norm_ratio_ref": "mean of |ref| / |total| (the paper's)",
}


def summaries(columns: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """`SUMMARIES` over some tokens, from each of `STATISTICS` `[n]`; a ratio to zero is 0."""
    ones = torch.ones_like(columns["norm_total"])
    sums: dict[str | None, torch.Tensor] = {name: values.sum() for name, values in columns.items()}
    sums[None] = ones.sum()
    ratios = {name: _ratio(sums[above], sums[below]).item() for name, (above, below) in RATIOS.items()}
    return {**ratios, **{name: columns[of].quantile(0.5).item() for name, of in MEDIANS.items()}}


# Names of the share of the signal that points along the reference, by the least weighted cos(total, ref)
MOSTLY, PARTLY = 0.8, 0.4


def share_in_words(cosine: float) -> str:
    """How much of the signal points along what the reference alone induces, for a sentence."""
    return "mostly" if cosine >= MOSTLY else "partly" if cosine >= PARTLY else "to a small extent"


def decomposition_stats(
    student: torch.Tensor, teacher: torch.Tensor, reference_only: torch.Tensor
) -> tuple[DecompositionStats, Decomposition]:
    """Statistics of the decomposition and the log-ratios, from logits `[..., V]` after temperature."""
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
        norm_total,
        norm_ref,
    )


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    Cosine over the last dimension.

    Args:
        a, b (`torch.Tensor` of shape `[..., V]`):
            Vectors.

    Returns:
        `torch.Tensor` of shape `[...]`: 0 where one of the two is zero.
    """
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return _ratio(torch.linalg.vecdot(a, b), norms)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    positive = denominator > 0
    return torch.where(positive, numerator / denominator.where(positive, torch.ones_like(denominator)), 0.0)


THIRDS = ("first_third", "middle_third", "last_third")
_GROUPS = ("", *(f"{name}/" for name in (*THIRDS, *TOKEN_CLASSES)))
DECOMPOSITION_METRICS = tuple(f"purification/{group}{name}" for group in _GROUPS for name in SUMMARIES)

# Tensors `[chunk, V]` alive at once while the statistics are formed: logits, log-ratios, weights, temporaries
_BUFFERS = 10


class DecompositionMonitor(TrainerCallback):
    """
    Decomposes the teacher's signal (Eq. 4) on a sample of the tokens of every `every`-th step; 0 never measures.

    The sample holds at most `max_tokens` tokens of all processes. It is uniform over the tokens that carry loss,
    without replacement, and seeded by the step, so that a resumed run measures the same tokens. The statistics are
    exact over the full vocabulary and are computed in chunks that fit in `memory_budget` bytes.
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
        self.tokens: list[dict[str, Any]] = []  # this process's tokens of the last measured step, for the table
        self._sums: torch.Tensor | None = None
        self._ratios: list[torch.Tensor] = []  # [n, 4]: third, class and the two ratios per token
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
        Chooses the tokens to measure and keeps their frozen states, as batch-first tensors that travel to the loss.

        `completion_ids` and `loss_mask` are `[B, C]`; `total` counts the tokens that carry loss on all processes.
        Returns `decomposition_positions` `[B, K]` (-1 for none), `decomposition_groups` `[B, K, 2]` (third and class),
        `decomposition_teacher` and `decomposition_reference_only` `[B, K, H]`; nothing if this step is not measured.
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
        Adds one micro-batch, with the student's last hidden states `[B, C, H]` at the completion.

        Gathers sharded heads, so all processes must call it.
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
                ratios = torch.stack([getattr(stats, name) for name in MEDIANS.values()], dim=-1)
                self._ratios.append(torch.cat([groups[chunk], ratios.float()], dim=-1).cpu())
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

    def collect(self, accelerator: "Accelerator") -> dict[str, tuple[float, float] | torch.Tensor]:
        """
        What was measured since the last call on all processes, by metric name; empty when nothing was.

        Numerator and denominator of each mean and ratio; for a median, the values of all tokens.
        `timing/decomposition_seconds` is this process's time for the micro-batch.
        """
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums.float().to(accelerator.device), "sum").cpu()
        # One row of padding, so that no process gathers an empty tensor
        ratios = torch.cat([*self._ratios, torch.full((1, 4), -1.0)])
        padded = accelerator.pad_across_processes(ratios.to(accelerator.device), dim=0, pad_index=-1)
        ratios = accelerator.gather(padded).cpu()
        self._sums, self._ratios = None, []
        columns: dict[str | None, int] = {name: i for i, name in enumerate((*STATISTICS, None))}
        metrics: dict[str, tuple[float, float] | torch.Tensor] = {}
        for i, (group, members) in enumerate(zip(_GROUPS, _members(ratios[:, :2]), strict=True)):
            for name, (above, below) in RATIOS.items():
                pair = sums[i, columns[above]].item(), sums[i, columns[below]].item()
                metrics[f"purification/{group}{name}"] = pair
            for column, name in enumerate(MEDIANS, start=2):
                metrics[f"purification/{group}{name}"] = ratios[members, column]
        return {**metrics, "timing/decomposition_seconds": (self._seconds, 1.0)}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if getattr(args, "log_completions", False) and state.is_world_process_zero and self.tokens:
            _log_table(self.tokens, args, state.global_step)
            self.tokens.clear()


def _rows_at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`[B, C, H]` at `[B, K]` -> `[B, K, H]`; an absent position takes the first column."""
    index = positions.clamp(min=0).to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device).unsqueeze(1), index]


def _members(groups: torch.Tensor) -> torch.Tensor:
    """Which tokens belong to each group, `[G, n]`, by third and class `[n, 2]`; -1 belongs to none."""
    thirds = [groups[:, 0] == i for i in range(len(THIRDS))]
    return torch.stack([groups[:, 0] >= 0, *thirds, *(groups[:, 1] == i for i in range(len(TOKEN_CLASSES)))])


def _grouped(stats: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sums of `[n, S]` over the tokens of each group; the last column counts. `[G, S + 1]`, fp64."""
    stats = torch.cat([stats, torch.ones_like(stats[:, :1])], dim=1).double()
    return _members(groups).double() @ stats


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
