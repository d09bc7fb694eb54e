"""
Monitors of a run: what the teacher's signal consists of, and whether the student still thinks aloud.

Both are callbacks with one method that the trainer calls at the one place where the numbers exist:

```text
rollout  -> EpistemicMonitor.observe                 counts on the completions' text
scoring  -> DecompositionMonitor.sample              tokens to look at, and their frozen states
loss     -> DecompositionMonitor.measure             the student's state at the same tokens
```

Every process runs the same collectives: whether a step is looked at depends on its number alone.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .decomposition import STATISTICS, decomposition_stats, project_logits
from .guard import MarkerSums, RateGuard
from .loss import LMHead, _projector, gathered_heads
from .markers import PAPER_MARKERS, TOKEN_CLASSES, MarkerCounter, TokenClassifier, distinct, has_answer
from .metrics import clock


if TYPE_CHECKING:
    from accelerate import Accelerator

    from .scoring import TeacherScores


logger = logging.getLogger(__name__)

THIRDS = ("first_third", "middle_third", "last_third")
_GROUPS = ("", *(f"{name}/" for name in (*THIRDS, *TOKEN_CLASSES)))
DECOMPOSITION_METRICS = tuple(f"purification/{group}{name}" for group in _GROUPS for name in STATISTICS)

# Tensors `[chunk, V]` alive at once while the statistics are formed: logits, log-ratios, weights, temporaries
_BUFFERS = 10
_NGRAMS = (2, 4)


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
        self, scores: "TeacherScores", completion_ids: torch.Tensor, loss_mask: torch.Tensor, process: int, total: int
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
        with gathered_heads(student_head, frozen_head):
            trained, frozen = (_projector(head, self.temperature) for head in (student_head, frozen_head))
            projectors = (trained, frozen, frozen)
            size = max(1, self.memory_budget // (4 * _BUFFERS * trained.weight.shape[0]))
            for start in range(0, len(labels), size):
                chunk = slice(start, start + size)
                states = (student[chunk], teacher[chunk], reference_only[chunk])
                logits = [project_logits(state, head) for state, head in zip(states, projectors, strict=True)]
                stats, parts = decomposition_stats(*logits)
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


class EpistemicMonitor(TrainerCallback, ExportableState):
    """
    Counts epistemic markers, repetition and answers on the training rollouts, and guards the markers' rates.

    The baseline is measured on the rollouts of the first step, which the model writes before its first update. The
    guard compares the last `window` steps with it ([`RateGuard`]). Baseline, window and alarms are part of the
    checkpoint.

    Args:
        markers (`Sequence[str]`):
            Words or phrases to count.
        guard (`str`, *optional*, defaults to `"warn"`):
            `"warn"` logs a warning when a rate leaves the band, `"stop"` also saves a checkpoint and ends training,
            `"ignore"` does nothing.
        band (`float`, *optional*, defaults to `2.0`):
            A rate may fall to `baseline / band` and rise to `baseline * band`.
        window (`int`, *optional*, defaults to `10`):
            Steps over which the present rate is taken.
    """

    def __init__(self, markers: Sequence[str], guard: str = "warn", band: float = 2.0, window: int = 10):
        self.counter = MarkerCounter(markers)
        self.guard = guard
        self.rates = RateGuard(self.counter.markers, band, window)
        self._observed: MarkerSums | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {
                "markers": list(self.counter.markers),
                "guard": self.guard,
                "band": self.rates.band,
                "window": self.rates.window,
            },
            "attributes": {"saved_rates": self.rates.state()},
        }

    @property
    def saved_rates(self) -> dict[str, Any]:
        """Baseline, window and alarms as a checkpoint holds them; assigning restores them."""
        return self.rates.state()

    @saved_rates.setter
    def saved_rates(self, state: dict[str, Any]) -> None:
        self.rates.load(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # transformers restores callbacks by name only on request; the guard must not lose its baseline by default
        callbacks: Any = state.stateful_callbacks or {}  # a dict by now; the annotation is that of the constructor
        saved = callbacks.get(type(self).__name__)
        if isinstance(saved, dict) and list(self.counter.markers) == saved["args"]["markers"]:
            self.saved_rates = saved["attributes"]["saved_rates"]

    def observe(
        self, texts: Sequence[str], ids: Sequence[Sequence[int]], accelerator: "Accelerator", training: bool
    ) -> dict[str, tuple[float, float]]:
        """
        Counts on the rollouts of one generation batch.

        Args:
            texts (`Sequence[str]`):
                This process's completions, what the student wrote.
            ids (`Sequence[Sequence[int]]`):
                Their token ids.
            accelerator ([`~accelerate.Accelerator`]):
                Sums over all processes.
            training (`bool`):
                Whether these are training rollouts; others do not concern the guard.

        Returns:
            `dict[str, tuple[float, float]]`: total and number (of tokens, of completions) by metric name.
        """
        counts = torch.tensor([list(self.counter.count(text).values()) for text in texts], dtype=torch.float64)
        lengths = torch.tensor([len(row) for row in ids], dtype=torch.float64)
        sums = MarkerSums.of(counts.reshape(len(texts), len(self.counter.markers)), lengths)
        others = torch.tensor(
            [sum(has_answer(text) for text in texts), *(sum(distinct(row, n) for row in ids) for n in _NGRAMS)],
            dtype=torch.float64,
        )
        # fp32, because some accelerators have no fp64; counts below 2**24 are exact
        packed = torch.cat([sums.packed(), others]).float().to(accelerator.device)
        packed = accelerator.reduce(packed, "sum").double().cpu()
        sums = MarkerSums.unpacked(packed[: -len(others)], len(self.counter.markers))
        answered, *distincts = packed[-len(others) :].tolist()
        if training:
            self._observed = sums
        per_marker = dict(zip(self.counter.markers, sums.counts.tolist(), strict=True))
        metrics = {f"epistemic/{name}_per_1k": (1000 * n, sums.tokens) for name, n in per_marker.items()}
        metrics["epistemic/total_per_1k"] = (1000 * sum(per_marker.values()), sums.tokens)
        if set(PAPER_MARKERS) <= per_marker.keys():
            metrics["epistemic/paper_per_1k"] = (1000 * sum(per_marker[name] for name in PAPER_MARKERS), sums.tokens)
        metrics["completions/answer_rate"] = (answered, sums.completions)
        for n, value in zip(_NGRAMS, distincts, strict=True):
            metrics[f"completions/distinct_{n}"] = (value, sums.completions)
        return metrics

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._observed is None:
            return control
        new = self.rates.update(self._observed)
        self._observed = None
        if self.guard == "ignore" or not new:
            return control
        # All processes hold the same sums, so they decide alike
        if state.is_world_process_zero:
            for alarm in new:
                logger.warning("Step %d: %s", state.global_step, alarm)
            if self.guard == "stop":
                logger.warning(
                    "Step %d: `epistemic_guard: stop` ends training here, with a checkpoint.", state.global_step
                )
        if self.guard == "stop":
            control.should_save = True
            control.should_training_stop = True
        return control
