"""What the console shows while training runs: one aligned line per logging step, below a header."""

import logging
import textwrap
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


WIDTH = 120  # of lines that are not rows of the table
_HEADER_EVERY = 20  # rows
# Heading, width, metric and format of each column; seconds and tokens per second are computed here
_COLUMNS = (
    ("loss", 9, "loss", ".4g"),
    ("KL to target", 12, "purification/kl_target_student", ".4g"),
    ("entropy", 8, "entropy", ".3f"),
    ("length", 7, "completions/mean_length", ".1f"),
    ("markers/1k", 10, "epistemic/total_per_1k", ".1f"),
    ("grad norm", 9, "grad_norm", ".3g"),
    ("s/step", 8, "seconds", ".3g"),
    ("tokens/s", 8, "tokens_per_second", ",.0f"),
)


class ConsoleTable(TrainerCallback):
    """
    Prints a row of the most important metrics per logging step or evaluation, above the progress bar if there is one.

    Losses, divergences and entropies are in nats, lengths in tokens, markers per 1,000 tokens. `s/step` is the time of
    an optimizer step; `tokens/s` counts the tokens of prompts and completions of all processes.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._last = (0, 0.0)  # step and tokens of the row before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rows, self._last = 0, (state.global_step, float(state.num_input_tokens_seen))
        if state.is_world_process_zero:
            processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
            self._print(f"Training for {state.max_steps} steps, {processes} on {args.device.type}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            self._print(_summary(state.global_step, logs))
        elif "loss" in logs:
            self._row(f"{state.global_step}/{state.max_steps}", {**logs, **self._speed(state.global_step, logs)})
        elif (loss := next((key for key in logs if key.endswith("_loss")), None)) is not None:
            metrics = {key.removeprefix("eval_"): value for key, value in logs.items()}
            self._row(loss.removesuffix("_loss"), {**metrics, "loss": logs[loss]})
        else:
            self._print(textwrap.fill(", ".join(f"{key} {_text(value, '.4g')}" for key, value in logs.items()), WIDTH))

    def _speed(self, step: int, logs: Mapping[str, Any]) -> dict[str, float]:
        """Seconds per step and tokens per second since the row before; without waiting, saving and evaluating."""
        seconds, tokens = logs.get("step_time"), logs.get("num_tokens")
        speed = {} if seconds is None else {"seconds": seconds}
        if tokens is None:
            return speed
        (last_step, last_tokens), self._last = self._last, (step, tokens)
        if seconds and step > last_step:
            speed["tokens_per_second"] = (tokens - last_tokens) / (seconds * (step - last_step))
        return speed

    def _row(self, label: str, metrics: Mapping[str, Any]) -> None:
        if self._rows % _HEADER_EVERY == 0:
            self._print(" ".join(["step".rjust(12), *(heading.rjust(width) for heading, width, _, _ in _COLUMNS)]))
        self._rows += 1
        cells = [_text(metrics.get(metric), form).rjust(width) for _, width, metric, form in _COLUMNS]
        self._print(" ".join([label[:12].rjust(12), *cells]))

    def _print(self, text: str) -> None:
        tqdm.write(text)  # moves a progress bar out of the way


class ConsoleBar(ProgressCallback):
    """transformers' progress bar without its print of the metrics; log lines and warnings do not break into it."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self._redirect = logging_redirect_tqdm([logging.root, logging.getLogger("transformers")])
            self._redirect.__enter__()
            logging.captureWarnings(True)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the metrics to [`ConsoleTable`]."""

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            logging.captureWarnings(False)
            self._redirect.__exit__(None, None, None)


def console_callbacks(trainer: Any) -> None:
    """Gives a trainer the table in place of transformers' print of all metrics; a notebook keeps its own table."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ConsoleBar())
        trainer.add_callback(ConsoleTable())
    elif trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(ConsoleTable())


def _text(value: Any, form: str) -> str:
    """A number in its format, `-` for none, anything else as it is."""
    if value is None:
        return "-"
    return format(value, form) if isinstance(value, int | float) else str(value)


def _summary(step: int, logs: Mapping[str, Any]) -> str:
    minutes, seconds = divmod(round(logs["train_runtime"]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{step} steps in {hours}:{minutes:02}:{seconds:02}, mean loss {_text(logs.get('train_loss'), '.4g')}"
