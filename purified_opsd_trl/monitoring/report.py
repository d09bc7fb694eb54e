"""`report.html`: what a run did, in one file in its output directory, written when training ends."""

import html
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..env import run_versions
from ..targets import DENSE_TARGETS
from .decomposition import share_in_words
from .page import facts, line_chart, number, origin_facts, page, table, template
from .timeline import timeline


logger = logging.getLogger(__name__)

SAMPLES = 3  # completions shown of the first and of the last steps
_REMEMBERED = 16  # problems of the first step, in case one of them returns
_LONGEST = 4000  # characters kept of a completion
_SECRETS = frozenset({"hub_token", "push_to_hub_token", "token", "use_auth_token", "api_key", "password"})
# Not the user's settings, or filled in by the config
_DERIVED = frozenset({"output_dir", "run_name", "accelerator_config", "debug", "pad_to_multiple_of"})
# Zero stands for "no such completion" in these
_ABSENT_AT_ZERO = frozenset({"completions/mean_terminated_length"})

_COS = "purification/mass_cos_total_ref"
_SIZE = "purification/mass_norm_ratio_ref"
_KL = "purification/kl_target_student"
_MARKERS, _LENGTH = "epistemic/total_per_1k", "completions/mean_length"


class ReportCallback(TrainerCallback, ExportableState):
    """
    Keeps some completions of the first and of the last step, and writes `report.html` when training ends.

    The first completions are part of the checkpoint. If their problems return, the report shows the latest completions
    of the same problems.
    """

    def __init__(self) -> None:
        self.early: list[dict[str, Any]] = []
        self.late: list[dict[str, Any]] = []
        self.again: dict[str, dict[str, Any]] = {}  # latest completions of the problems in `early`
        self.dataset: str | None = None  # its name, where the training script knows it
        self.started = time.time()
        self.rollouts: deque[tuple[int, Any]] = deque(maxlen=8)  # of the last steps, where servers write them

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"args": {}, "attributes": {"early": self.early, "late": self.late, "again": self.again}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.time()
        callbacks: Any = state.stateful_callbacks or {}  # a dict by now; the annotation is that of the constructor
        saved = callbacks.get(type(self).__name__)
        if isinstance(saved, dict):
            for name, value in saved["attributes"].items():
                setattr(self, name, value)

    def observe(self, step: int, prompts: Sequence[Any], texts: Sequence[str], rollout: Any = None) -> None:
        """Remembers completions of a generation batch, `step` steps after the start, and when a server wrote it."""
        if rollout is not None:
            self.rollouts.append((step + 1, rollout))
        samples: dict[str, dict[str, Any]] = {
            (text := _last_turn(prompt)): {"step": step, "prompt": text, "completion": _shortened(completion)}
            for prompt, completion in zip(reversed(prompts), reversed(texts), strict=True)
        }
        batch = [*reversed(samples.values())]
        self.late = batch[:SAMPLES]
        self.early = self.early or batch[:_REMEMBERED]
        before = [sample["prompt"] for sample in self.early if sample["step"] < step]
        self.again |= {prompt: samples[prompt] for prompt in before if prompt in samples}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ended = time.perf_counter()
        if not state.is_world_process_zero or not args.output_dir:
            return
        try:
            os.makedirs(args.output_dir, exist_ok=True)
            about = {
                **_model_facts(kwargs.get("model")),
                "Dataset": _dataset_fact(self.dataset, kwargs.get("train_dataloader")),
                "Target": _target(args),
                **origin_facts(self.started, time.time() - self.started, run_versions()),
            }
            pairs = [(s, self.again[s["prompt"]]) for s in self.early if s["prompt"] in self.again][:SAMPLES]
            early, late = zip(*pairs, strict=True) if pairs else (self.early[:SAMPLES], self.late)
            picture = timeline(list(self.rollouts), ended)
            text = render(state.log_history, args, about, early, late, state.global_step, picture)
            Path(args.output_dir, "report.html").write_text(text, encoding="utf-8")
        except Exception as error:  # of any kind: the trained weights are not saved yet
            logger.warning("The training report could not be written: %r. Training itself is not affected.", error)


def render(
    history: Sequence[dict[str, Any]],
    args: TrainingArguments,
    about: Mapping[str, str],
    early: Sequence[dict[str, Any]],
    late: Sequence[dict[str, Any]],
    steps: int,
    picture: str = "",
) -> str:
    """HTML from the trainer's log, completions (`step`, `prompt`, `completion`) of two steps, and one more figure."""
    charts = "".join(  # a chart that names no metrics draws all markers
        line_chart(c["title"], _series(history, c["metrics"] or _marker_names(history)), description=c["text"])
        for c in json.loads(template("report.json"))
    )
    answers = "".join(
        f"<li><strong>{question}</strong> {html.escape(text)}</li>" for question, text in _answers(history)
    )
    body = (
        f'<ul class="answers">{answers}</ul>{facts(about)}'
        f'<h2>Curves</h2><div class="charts">{charts}{picture}</div>'
        f"<h2>Completions</h2>{_samples(early, late)}<h2>Settings</h2>{_settings(args)}"
    )
    return page(f"Training report: {Path(args.output_dir or '.').name}", f"{steps} steps", body)


def _answers(history: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The three questions that a reader has, each with its answer in numbers."""
    learned = thinking = signal = "Not measured in this run."
    if (kl := _ends(history, _KL)) is not None:
        learned = f"KL(target || student) {_change(*kl)} nats per token."
    if (markers := _ends(history, _MARKERS)) is not None and (length := _ends(history, _LENGTH)) is not None:
        wrote = f"Epistemic markers {_change(*markers)} per 1,000 tokens" if any(markers) else "It wrote no markers"
        thinking = f"{wrote}; the mean completion length {_change(*length)} tokens."
    if measured := [entry for entry in history if _finite(entry.get(_COS)) and _finite(entry.get(_SIZE))]:
        last = measured[-1]
        signal = (
            f"At step {last['step']} the teacher's signal pointed {share_in_words(last[_COS])} along what the "
            f"reference alone induces: weighted cos(total, ref) = {last[_COS]:.2f}. That part was {last[_SIZE]:.2f} "
            "times as large as the signal."
        )
    questions = ("Did it learn?", "Did it keep thinking?", "Where does the signal come from?")
    return list(zip(questions, (learned, thinking, signal), strict=True))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _ends(history: Sequence[dict[str, Any]], metric: str) -> tuple[float, float] | None:
    """Means over the first and the last fifth of the logged values."""
    values = [entry[metric] for entry in history if _finite(entry.get(metric))]
    count = max(1, len(values) // 5)
    return (sum(values[:count]) / count, sum(values[-count:]) / count) if values else None


def _change(before: float, after: float) -> str:
    if abs(after - before) <= 0.05 * abs(before):
        return f"stayed at {number(after)}"
    return f"{'fell' if after < before else 'rose'} from {number(before)} to {number(after)}"


def _marker_names(history: Sequence[dict[str, Any]]) -> dict[str, str]:
    names = {
        key: key[len("epistemic/") : -len("_per_1k")] for entry in history for key in entry if "epistemic/" in key
    }
    return {key: name for key, name in names.items() if name not in ("total", "paper") and not key.startswith("eval_")}


def _series(
    history: Sequence[dict[str, Any]], names: Mapping[str, str]
) -> dict[str, list[tuple[float, float | None]]]:
    def value(entry: dict[str, Any], metric: str) -> float | None:
        found = entry[metric]
        return found if _finite(found) and not (found == 0 and metric in _ABSENT_AT_ZERO) else None

    return {
        name: [(entry["step"], value(entry, metric)) for entry in history if metric in entry]
        for metric, name in names.items()
    }


def _samples(early: Sequence[dict[str, Any]], late: Sequence[dict[str, Any]]) -> str:
    same = [sample["prompt"] for sample in early] == [sample["prompt"] for sample in late]
    note = "The same problems." if same else "Different problems: none of the first returned in a later step."

    def column(title: str, samples: Sequence[dict[str, Any]]) -> str:
        items = "".join(
            f"<h4>{html.escape(_shortened(sample['prompt'], 200))}</h4>"
            f'<pre tabindex="0">{html.escape(sample["completion"])}</pre>'
            for sample in samples
        )
        step = f" (after {samples[0]['step']} steps)" if samples else ""
        return f"<section><h3>{title}{step}</h3>{items}</section>"

    return f'<p>{note}</p><div class="pair">{column("Early", early)}{column("Late", late)}</div>'


def _shortened(text: str, length: int = _LONGEST) -> str:
    return text if len(text) <= length else text[:length] + f" … ({len(text) - length} characters more)"


def _last_turn(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _model_facts(model: Any) -> dict[str, str]:
    adapters = getattr(model, "peft_config", {}).values()
    return {
        "Model": str(getattr(getattr(model, "config", None), "_name_or_path", "")),
        "Adapter": ", ".join(
            f"{getattr(a.peft_type, 'value', a.peft_type).replace('LORA', 'LoRA')}, rank {getattr(a, 'r', '?')}"
            for a in adapters
        )
        or "none (all weights are trained)",
    }


def _dataset_fact(name: str | None, dataloader: Any) -> str:
    dataset: Any = getattr(dataloader, "dataset", None)
    name = name or getattr(getattr(dataset, "info", None), "dataset_name", None) or "in memory"
    return f"{name}, {len(dataset):,} rows" if hasattr(dataset, "__len__") else f"{name}, streamed"


def _target(args: Any) -> str:
    if args.target == "teacher":
        return "teacher (plain on-policy self-distillation)"
    if args.target in DENSE_TARGETS:
        return ", ".join(
            (args.target, *(f"{name} {getattr(args, name)}" for name in DENSE_TARGETS[args.target].options))
        )
    return f"{args.target}, pmi_beta {args.pmi_beta}, pmi_clip {args.pmi_clip}"


def _settings(args: TrainingArguments) -> str:
    values = {key: _public(value) for key, value in args.to_dict().items() if key not in _SECRETS}
    fields = args.__dataclass_fields__
    changed = [(k, _text(v)) for k, v in values.items() if k in fields.keys() - _DERIVED and v != _default(fields[k])]
    return (
        table(changed, ("setting", "value"), "Settings other than their default")
        + "<details><summary>All settings</summary>"
        + table([(k, _text(v)) for k, v in values.items()], ("setting", "value"), "All settings")
        + "</details>"
    )


def _public(value: Any) -> Any:
    """Nested settings without credentials."""
    return {k: _public(v) for k, v in value.items() if k not in _SECRETS} if isinstance(value, dict) else value


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
