"""
`report.html`: what a run did, in one file in its output directory, written when training ends.
"""

import importlib.metadata
import json
import logging
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .page import line_chart, page, table


logger = logging.getLogger(__name__)

SAMPLES = 3  # completions kept from the first and from the last step
_PACKAGES = (
    "purified_opsd_trl",
    "trl",
    "transformers",
    "torch",
    "accelerate",
    "peft",
    "datasets",
    "vllm",
    "deepspeed",
)

# Chart -> what to look for, and the logged metrics it draws
_CHARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Loss": ("", ("loss", "eval_loss")),
    "Signal against the reference": (
        "cos_total_ref near 1: the teacher's signal is what the reference alone induces.",
        ("purification/cos_total_ref", "purification/mass_cos_total_ref"),
    ),
    "Signal against the transferable part": (
        "",
        ("purification/cos_total_it", "purification/mass_cos_total_it"),
    ),
    "Size of the reference-induced part": (
        "Above 1 it outweighs the whole signal.",
        ("purification/norm_ratio_ref", "purification/mass_norm_ratio_ref"),
    ),
    "mass_cos_total_ref by position": (
        "",
        tuple(f"purification/{third}_third/mass_cos_total_ref" for third in ("first", "middle", "last")),
    ),
    "mass_cos_total_ref by token class": (
        "",
        tuple(f"purification/{kind}/mass_cos_total_ref" for kind in ("epistemic", "digits", "other")),
    ),
    "Epistemic markers a 1,000 tokens": ("A fall is collapse, a rise of one marker alone degeneration.", ()),
    "Completion length (tokens)": (
        "",
        ("completions/mean_length", "completions/mean_terminated_length", "completions/max_length"),
    ),
    "Shares of completions": (
        "clipped_ratio: cut at the length limit. answer_rate: states an answer.",
        ("completions/clipped_ratio", "completions/answer_rate"),
    ),
    "Repetition": (
        "Share of distinct n-grams; a fall is a loop.",
        ("completions/distinct_2", "completions/distinct_4"),
    ),
    "Entropy (nats)": ("", ("entropy", "purification/target_entropy")),
    "Divergence of the target (nats)": ("", ("purification/kl_target_student", "purification/kl_target_base")),
}


class ReportCallback(TrainerCallback, ExportableState):
    """
    Keeps a few completions of the first and of the last step, and writes `report.html` when training ends.

    The file holds the curves of everything logged, the completions, the configuration and the versions. It opens
    without a network. The first completions are part of the checkpoint.
    """

    def __init__(self) -> None:
        self.early: list[dict[str, Any]] = []
        self.late: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"early": self.early, "late": self.late}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks: Any = state.stateful_callbacks or {}  # a dict by now; the annotation is that of the constructor
        saved = callbacks.get(type(self).__name__)
        if isinstance(saved, dict):
            self.early, self.late = saved["attributes"]["early"], saved["attributes"]["late"]

    def observe(self, step: int, prompts: Sequence[Any], texts: Sequence[str]) -> None:
        """
        Remembers the first completions of a generation batch.

        Args:
            step (`int`):
                Steps done so far.
            prompts (`Sequence[str or list[dict]]`):
                Prompts of the rows.
            texts (`Sequence[str]`):
                Their completions.
        """
        self.late = [
            {"step": step, "prompt": _last_turn(prompt), "completion": text}
            for prompt, text in zip(prompts[:SAMPLES], texts[:SAMPLES], strict=True)
        ]
        self.early = self.early or self.late

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not args.output_dir:
            return
        try:
            os.makedirs(args.output_dir, exist_ok=True)
            text = render(state.log_history, args, self.early, self.late, state.global_step)
            Path(args.output_dir, "report.html").write_text(text, encoding="utf-8")
        except Exception as error:  # whatever it is: the trained weights are not saved yet
            logger.warning("The training report could not be written: %r. Training itself is not affected.", error)


def render(
    history: Sequence[dict[str, Any]],
    args: TrainingArguments,
    early: Sequence[dict[str, Any]],
    late: Sequence[dict[str, Any]],
    steps: int,
) -> str:
    """
    The report as HTML.

    Args:
        history (`Sequence[dict]`):
            The trainer's log history.
        args ([`~transformers.TrainingArguments`]):
            The run's configuration.
        early, late (`Sequence[dict]`):
            Completions with `step`, `prompt` and `completion`.
        steps (`int`):
            Steps done.

    Returns:
        `str`
    """
    charts = "".join(
        line_chart(title, _series(history, metrics or _marker_metrics(history)), description=description)
        for title, (description, metrics) in _CHARTS.items()
    )
    body = (
        f'<h2>Curves</h2><div class="charts">{charts}</div>'
        f"<h2>Completions</h2>{_samples(early, late)}"
        f"<h2>Configuration</h2>{_configuration(args)}<h2>Versions</h2>{_versions()}"
    )
    return page(f"Training report: {Path(args.output_dir or '.').name}", f"{steps} steps", body)


def _marker_metrics(history: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    names = {key: None for entry in history for key in entry if key.startswith("epistemic/")}
    return tuple(name for name in names if name not in ("epistemic/total_per_1k", "epistemic/paper_per_1k"))


def _series(history: Sequence[dict[str, Any]], metrics: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    return {
        name.split("/", 1)[-1].removesuffix("_per_1k"): [
            (entry["step"], entry[name])
            for entry in history
            if isinstance(entry.get(name), int | float) and math.isfinite(entry[name])
        ]
        for name in metrics
    }


def _samples(early: Sequence[dict[str, Any]], late: Sequence[dict[str, Any]]) -> str:
    from html import escape

    def column(title: str, samples: Sequence[dict[str, Any]]) -> str:
        items = "".join(
            f"<h4>{escape(_shortened(sample['prompt'], 200))}</h4>"
            f'<pre tabindex="0">{escape(_shortened(sample["completion"], 4000))}</pre>'
            for sample in samples
        )
        step = f" (after {samples[0]['step']} steps)" if samples else ""
        return f"<section><h3>{title}{step}</h3>{items}</section>"

    return f'<div class="pair">{column("Early", early)}{column("Late", late)}</div>'


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + f" … ({len(text) - length} characters more)"


def _last_turn(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _configuration(args: TrainingArguments) -> str:
    values = args.to_dict()  # masks tokens
    fields = args.__dataclass_fields__
    changed = [(k, _text(v)) for k, v in values.items() if k in fields and v != _default(fields[k])]
    everything = [(k, _text(v)) for k, v in values.items()]
    return (
        table(changed, ("setting", "value"), "Settings other than their default")
        + "<details><summary>All settings</summary>"
        + table(everything, ("setting", "value"), "All settings")
        + "</details>"
    )


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _versions() -> str:
    rows = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return table(rows, ("package", "version"), "Versions")
