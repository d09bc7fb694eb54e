"""Arguments of `purified-opsd diagnose`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from ..arguments import (
    CommandParser,
    PositiveFloat,
    PositiveInt,
    Range,
    as_mapping,
    check_markers,
    check_types,
    option,
)
from ..config import DEFAULT_REFERENCE_PROMPT_TEMPLATE, DEFAULT_TEACHER_PROMPT_TEMPLATE
from ..errors import InputError
from ..kernels.settings import LossSettings
from ..markers import DEFAULT_MARKERS


SOURCES = ("own", "other", "none")  # of references, as `reference_source` in training names them

RENAMED = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "prompt_column": "dataset_prompt_column",
    "reference_column": "dataset_reference_column",
    "markers": "epistemic_markers",
    "max_new_tokens": "max_completion_length",
}


@dataclass
class DiagnoseArguments:
    """What to diagnose, and how. Each option's help text describes it; an invalid value raises an [`InputError`]."""

    model_name_or_path: str = option("Model id or path: the frozen base, and the student unless others are named.")
    dataset_name: str = option("File (json, jsonl, parquet), folder or hub id.")
    adapter: list[str] = option("Adapters on the model, each a student.", default_factory=list)
    checkpoints: list[str] = option("Run directories (all their checkpoints) or checkpoints.", default_factory=list)
    dataset_config: str | None = option("Configuration of a hub dataset.", default=None)
    dataset_split: str = option("Split of the dataset.", default="train")
    dataset_prompt_column: str = option("Column that holds the problem.", default="prompt")
    dataset_reference_column: str = option("Column that holds the worked solution.", default="reference")
    system_prompt: str | None = option("System turn put before text prompts.", default=None)
    text_prompts: bool = option("Leave text prompts as text, without chat template.", default=False)
    teacher_prompt_template: str = option("As in training.", default=DEFAULT_TEACHER_PROMPT_TEMPLATE)
    reference_prompt_template: str = option("As in training.", default=DEFAULT_REFERENCE_PROMPT_TEMPLATE)
    chat_template_kwargs: dict[str, Any] | str | None = option("Chat template arguments, as JSON.", default=None)
    target: str = option("Target whose signal is measured, as in training.", default="purified")
    reference_source: list[str] = option(
        "References under which the signal is measured: own, then the controls other and none. Default: all that the "
        "dataset offers.",
        default_factory=list,
    )
    pmi_beta: PositiveFloat = option("As in training.", default=1.0)
    pmi_clip: Annotated[float, Range(0)] | None = option("As in training; 0 switches it off.", default=10.0)
    pmi_center: bool = option("As in training.", default=True)
    interpolation_weight: Annotated[float, Range(0, 1)] = option("As in training.", default=0.5)
    contrastive_alpha: Annotated[float, Range(0)] = option("As in training.", default=0.5)
    contrastive_floor: float = option("As in training.", default=-10.0)
    contrastive_tau: Annotated[float, Range(0)] = option("As in training.", default=1.0)
    num_samples: PositiveInt = option("Problems, drawn at random. The paper uses 100.", default=100)
    num_pages: Annotated[int, Range(0)] = option("Samples on the per-token page.", default=8)
    alternatives: PositiveInt = option("Likely tokens shown of each distribution.", default=5)
    max_completion_length: PositiveInt = option("Longest completion, in tokens.", default=1024)
    temperature: PositiveFloat = option(
        "Sampling temperature; it also divides all logits, as in training.", default=1.0
    )
    batch_size: PositiveInt = option("Completions drawn at once.", default=8)
    dtype: str = option("Dtype of the weights.", default="auto")
    seed: int = option("Seed of the choice of problems and of the completions.", default=0)
    epistemic_markers: list[str] = option("Words to count.", default_factory=lambda: list(DEFAULT_MARKERS))
    output_dir: str = option("Folder to write to.", default="diagnosis")

    def __post_init__(self) -> None:
        self.chat_template_kwargs = as_mapping("chat_template_kwargs", self.chat_template_kwargs)
        check_types(self)
        check_markers(self.epistemic_markers)
        self.settings  # noqa: B018  # validates its fields
        sources = self.reference_source
        if sources and (sources[0] != "own" or sorted(sources) != sorted(set(sources) & set(SOURCES))):
            raise InputError(
                f"`reference_source` must begin with own, which the controls are compared with, followed by other or "
                f"none or both, got {', '.join(sources)}."
            )
        if self.target == "contrastive" and (sources or ["own"]) != ["own"]:
            raise InputError(
                "`target: contrastive` compares the row's own reference with a wrong one and takes no control. Set "
                "`reference_source: [own]`."
            )

    @property
    def settings(self) -> LossSettings:
        """What the target reads, validated."""
        return LossSettings(
            target=self.target,
            temperature=self.temperature,
            pmi_beta=self.pmi_beta,
            pmi_clip=self.pmi_clip or None,
            pmi_center=self.pmi_center,
            interpolation_weight=self.interpolation_weight,
            contrastive_alpha=self.contrastive_alpha,
            contrastive_floor=self.contrastive_floor,
            contrastive_tau=self.contrastive_tau,
        )

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of the chat template."""
        given: Any = self.chat_template_kwargs or {}
        return given


def make_parser(prog: str = "purified-opsd diagnose") -> CommandParser:
    """Parser of the command line."""
    description = "Measure what a plain teacher's signal consists of, for a model or along the checkpoints of a run."
    return CommandParser([DiagnoseArguments], prog=prog, description=description, renamed=RENAMED)


def parse(argv: Sequence[str]) -> DiagnoseArguments:
    """Arguments of a command line."""
    (args,) = make_parser().parse(argv)
    return args
