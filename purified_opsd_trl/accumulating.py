"""
The part of the trainer that spends tokens: micro-batches cut into parts by a token budget, packing, throughput.

```text
micro-batch -> row lengths -> parts, as many on every process -> loss and backward of each -> tokens per second
```
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.utils import logging

from .backbone import packing_is_exact, runs_rows_apart, why_not_packable, without_dropout
from .distilling import DistillingTrainer
from .monitoring.metrics import clock, training_metrics
from .packing import Packing, arrange
from .parts import Part, loss_mask, row_lengths, take_part, with_more_forwards


logger = logging.get_logger(__name__)


class AccumulatingTrainer(DistillingTrainer):
    """Mixin of the trainer: a micro-batch in as many forwards of the student as its tokens need."""

    eos_token_ids: list[int]  # TRL's
    run_inside: Any  # `PurifiedOPSDTrainer`'s
    _in_step = False  # elsewhere `compute_loss` must not run backward

    # Packing ---------------------------------------------------------------------------------------------------------

    def set_up_loss(self) -> None:
        super().set_up_loss()
        self._packing: dict[tuple[str, ...], Packing | None] = {}  # by setting, kind of model and attention

    def packing(self, wrapped: torch.nn.Module, model: Any) -> Packing | None:
        """When a model packs; `None` where it pads. It may run the model, so every process calls it at one point."""
        key = self.args.padding_free, model.config.model_type, str(model.config._attn_implementation)
        if key not in self._packing:
            self._packing[key] = self._find_packing(wrapped, model)
        return self._packing[key]

    def _find_packing(self, wrapped: torch.nn.Module, model: Any) -> Packing | None:
        mode = self.args.padding_free
        if mode == "false":
            return None
        reason = why_not_packable(model)
        if reason is None:
            with without_dropout(model), torch.no_grad(), self.accelerator.autocast():
                exact = self.run_inside(wrapped, model, packing_is_exact, model, self.accelerator.device)
            if not exact:
                reason = f"{model.config.model_type} lets the tokens of one sequence see those of another"
        if reason is not None:
            logger.warning_once(f"Sequences are padded, not packed: {reason}.")
            return None
        return Packing.of_model(model.config, by_cost=mode == "auto")

    def agree_on(self, own: int) -> int:
        """The largest number of all processes."""
        if self.accelerator.num_processes == 1:
            return own
        return int(self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).max())

    # Parts -----------------------------------------------------------------------------------------------------------

    def _parts(self, model: torch.nn.Module, inputs: dict[str, Any]) -> list[Part]:
        """Cuts a micro-batch into parts, the longest rows first, as many on every process."""
        student, budget = self.accelerator.unwrap_model(model), self.args.train_token_budget
        packing, alone_beyond = self.packing(model, student), self.purification_collator.alone_beyond
        lengths, apart = row_lengths(inputs), runs_rows_apart(student)
        forwards = arrange(lengths, 1 if apart else len(lengths), budget, packing, alone_beyond)
        missing = 0
        by_cost = packing is not None and packing.by_cost
        if apart or by_cost or budget is not None or alone_beyond is not None:  # elsewhere each process has one part
            forwards, missing = with_more_forwards(forwards, self.agree_on(len(forwards)) - len(forwards))
        parts = [take_part(inputs, forward) for forward in forwards]
        return parts + [take_part(inputs, forwards[-1], counts=False)] * missing

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, Part):  # of a micro-batch that has been prepared
            return inputs
        started = time.perf_counter()
        inputs = super()._prepare_inputs(inputs)
        self._preparing = time.perf_counter() - started
        return inputs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if isinstance(inputs, Part):
            loss, costs = self.part_loss(model, inputs, num_items_in_batch)
            self._costs.append(costs)
            return loss
        mode = "train" if self.model.training else "eval"
        if mode == "eval":  # in training TRL divides by the tokens of the global batch
            num_items_in_batch = loss_mask(inputs).sum().clamp(min=1)
        *first, last = self._parts(model, inputs)
        self._costs: list[dict[str, float]] = []
        done: list[torch.Tensor] = []
        for part in first:
            if self._in_step:  # forward and backward, so that its activations are gone before the next
                with self._without_update(model):
                    done.append(Trainer.training_step(self, model, part, num_items_in_batch))
            else:
                done.append(self.compute_loss(model, part, num_items_in_batch=num_items_in_batch))
        loss = self.compute_loss(model, last, num_items_in_batch=num_items_in_batch)
        loss = loss + sum(done)
        self._log_parts(mode)
        return (loss, None) if return_outputs else loss

    @contextmanager
    def _without_update(self, model: Any) -> Iterator[None]:
        """A part before the last: DDP sums its gradients later, DeepSpeed neither sums nor steps."""
        accelerator = self.accelerator
        last = accelerator.sync_gradients
        accelerator.gradient_state._set_sync_gradients(False)
        # Sharded gradients (FSDP2) are reduced part by part: kept whole, they would take the memory that parts save
        unsynced = accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        try:
            if unsynced:
                with accelerator.no_sync(model):
                    yield
            else:
                yield
        finally:
            accelerator.gradient_state._set_sync_gradients(last)

    # Logs ------------------------------------------------------------------------------------------------------------

    def _log_parts(self, mode: str) -> None:
        """Puts the metrics that TRL and the loss give per part together to those of the micro-batch."""
        metrics, costs = self._metrics[mode], self._costs
        tokens = [cost["tokens"] for cost in costs]
        parts = [metrics["entropy"].pop() for _ in costs][::-1]
        entropy = sum(value * count for value, count in zip(parts, tokens, strict=True)) / max(sum(tokens), 1)
        metrics["entropy"].append(entropy)
        metrics["timing/loss_seconds"].append(sum(cost["seconds"] for cost in costs))
        ran, padded = (sum(cost[name] for cost in costs) for name in ("student_tokens", "student_padded"))
        self._token_means[mode].add({"training/padding_ratio": (padded, ran)})
        self._ran = ran

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        started, self._in_step = time.perf_counter(), True
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._in_step = False
        seconds = clock(self.accelerator.device) - started - self._preparing
        rows = self.args.per_device_train_batch_size * self.accelerator.num_processes
        config = self.model.config.get_text_config()
        self._token_means["train"].add(training_metrics(self._ran, rows, seconds, config, self.accelerator))
        return loss

    # Truncated completions -------------------------------------------------------------------------------------------

    def mask_truncated(self, output: dict[str, Any]) -> None:
        """Takes the loss off completions of a generation batch that ran into the limit."""
        mask = output["completion_mask"]
        last = output["completion_ids"].gather(1, (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0))
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device)
        output["tool_mask"] = output.get("tool_mask", torch.ones_like(mask)) * torch.isin(last, ends).to(mask.dtype)
        output["num_items_in_batch"] = self.accelerator.gather(loss_mask(output).sum()).sum()
