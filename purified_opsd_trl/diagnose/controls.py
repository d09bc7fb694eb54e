"""
What a target is made of under the row's own reference, another row's, and none, on the same completions.

Shapes: n tokens of one chunk, V vocabulary. Everything is in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from ..contexts import Contexts
from ..errors import InputError
from ..kernels.settings import LossSettings
from ..monitoring.decomposition import cosine, share_in_words
from ..purification import Decomposition, purified_target_logits
from ..references import configured_contexts, with_other_references
from ..targets import DENSE_TARGETS
from .arguments import SOURCES, DiagnoseArguments


class Signal(NamedTuple):
    """
    Size and direction of what a target adds to the base, per token `[n]`.

    The tilt is `log P_target - log P_0` without its mean over the vocabulary; `mass_*` weights the vocabulary, in the
    mean as well, by the student's probability.

    Attributes:
        kl_target_base: `KL(target || base)`, how far the target moves the base.
        norm_it, mass_norm_it: `|Delta_it|`.
        cos_target_ref, mass_cos_target_ref: cosine of `log P_target - log pi_theta` and `Delta_ref`.
        cos_own, mass_cos_own: cosine of the tilt and the tilt under the row's own reference.
        weight: factor of the token's loss; 1 for all targets but `contrastive`.
    """

    kl_target_base: Tensor
    norm_it: Tensor
    mass_norm_it: Tensor
    cos_target_ref: Tensor
    mass_cos_target_ref: Tensor
    cos_own: Tensor
    mass_cos_own: Tensor
    weight: Tensor


SIGNAL = Signal._fields


@dataclass(frozen=True)
class _Seen:
    """The settings of one source of references that decide the contexts."""

    target: str
    reference_source: str
    reference_column: str
    teacher_prompt_template: str
    reference_prompt_template: str
    seed: int
    wrong_reference_column: str | None = None


def with_sources(dataset: Dataset, args: DiagnoseArguments, column: str) -> tuple[Dataset, dict[str, Any]]:
    """
    The dataset with the column of other references where one is needed, and the settings of contexts by source.

    Sources that were not asked for by name are left out, in a printed line, where the dataset cannot provide them.
    """
    asked = args.reference_source
    names = asked or (SOURCES[:1] if args.target == "contrastive" else SOURCES)
    seen = {
        name: _Seen(args.target, name, column, args.teacher_prompt_template, args.reference_prompt_template, args.seed)
        for name in names
    }
    for name, settings in seen.items():
        try:
            dataset = with_other_references(dataset, settings, args.dataset_name)
        except InputError as error:
            if asked or args.target == "contrastive":
                raise
            print(f"The control `{name}` is left out: {error}")
            return dataset, {kept: settings for kept, settings in seen.items() if kept != name}
    return dataset, seen


def contexts_of(row: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Contexts]:
    """The prompts of a row by source."""
    return {name: configured_contexts(row, settings) for name, settings in seen.items()}


def target_log_probs(logits: Mapping[str, Tensor], settings: LossSettings) -> Tensor:
    """Log-probabilities `[n, V]` of the target, from the natural logits of each context."""
    if settings.target == "teacher":
        target = logits["teacher"]
    elif settings.target == "purified":
        target = purified_target_logits(
            logits["teacher"],
            logits["reference_only"],
            logits["base"],
            pmi_beta=settings.pmi_beta,
            pmi_clip=settings.pmi_clip,
            pmi_center=settings.pmi_center,
        )
    else:
        dense = DENSE_TARGETS[settings.target]
        target = dense.logits(**_inputs(logits, settings))
    return torch.log_softmax(target.float(), dim=-1)


def _inputs(logits: Mapping[str, Tensor], settings: LossSettings) -> dict[str, Any]:
    dense = DENSE_TARGETS[settings.target]
    states = {name: logits[name] for name in dense.states}
    return {**states, **{option: getattr(settings, option) for option in dense.options}}


def signal(
    logits: Mapping[str, Tensor], parts: Decomposition, settings: LossSettings, own: tuple[Tensor, Tensor] | None
) -> tuple[Signal, tuple[Tensor, Tensor]]:
    """
    The signal under one source, and its two tilts (plain, weighted) `[n, V]`; `own` are those of the own reference.

    `logits` `[n, V]` are by context after temperature, `parts` their decomposition.
    """
    target = target_log_probs(logits, settings)
    base = torch.log_softmax(logits["base"].float(), dim=-1)
    log_student = torch.log_softmax(logits["student"].float(), dim=-1)
    student = log_student.exp()
    root = student.sqrt()
    change = target - base
    tilts = (
        change - change.mean(dim=-1, keepdim=True),
        root * (change - (student * change).sum(dim=-1, keepdim=True)),
    )
    toward = target - log_student
    dense = DENSE_TARGETS.get(settings.target)
    weight = torch.ones(len(target), device=target.device)
    if dense is not None and dense.weights is not None:
        weight = dense.weights(**_inputs(logits, settings))
    plain, mass = (cosine(tilt, other) for tilt, other in zip(tilts, own or tilts, strict=True))
    values = Signal(
        kl_target_base=(target.exp() * change).sum(dim=-1).clamp_(min=0.0),
        norm_it=torch.linalg.vector_norm(parts.it, dim=-1),
        mass_norm_it=torch.linalg.vector_norm(root * parts.it, dim=-1),
        cos_target_ref=cosine(toward, parts.ref),
        mass_cos_target_ref=cosine(root * toward, root * parts.ref),
        cos_own=plain,
        mass_cos_own=mass,
        weight=weight,
    )
    return values, tilts


ROWS = {
    "kl_target_base": "KL(target || base), nats",
    "norm_it": "|it|",
    "mass_norm_it": "|it|, weighted",
    "cos_target_ref": "cos(target, ref)",
    "mass_cos_target_ref": "cos(target, ref), weighted",
    "cos_own": "cos(tilt, own tilt)",
    "mass_cos_own": "cos(tilt, own tilt), weighted",
    "weight": "weight of a token",
}
_SOURCE_WORDS = {
    "other": "With the reference of another problem",
    "none": "Without a reference, by the instruction of the templates alone,",
}


def by_source(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Means over all tokens by source of references, the own one first."""
    return {
        "own": summary["groups"]["all"],
        **{name: values["groups"]["all"] for name, values in summary["controls"].items()},
    }


def table_rows(summary: Mapping[str, Any], target: str) -> list[Sequence[Any]]:
    """One row per statistic of `ROWS`: its name, then its mean under each source."""
    means = by_source(summary)
    return [
        (text, *(values[name] for values in means.values()))
        for name, text in ROWS.items()
        if name != "weight" or (target in DENSE_TARGETS and DENSE_TARGETS[target].weights is not None)
    ]


def _direction(cosine: float) -> str:
    return f"{share_in_words(abs(cosine))} {'along' if cosine >= 0 else 'against'}"


def sentences(summary: Mapping[str, Any], target: str) -> list[str]:
    """What the table says, one sentence per source."""
    means = by_source(summary)
    own = means.pop("own")
    size, cos = own["kl_target_base"], own["mass_cos_target_ref"]
    said = [
        f"With the problem's own reference the target `{target}` moves the base by {size:.3g} nats per token, and "
        f"what it would teach points {_direction(cos)} what the reference alone induces (weighted cosine "
        f"{cos:.2f})."
    ]
    for name, values in means.items():
        moved, cos = values["kl_target_base"], values["mass_cos_own"]
        far = f"{moved / size:.2f} times as far" if size else f"by {moved:.3g} nats per token"
        said.append(
            f"{_SOURCE_WORDS[name]} it moves the base {far}, and its tilt points {_direction(cos)} the tilt "
            f"of the own reference (weighted cosine {cos:.2f})."
        )
    return said
