"""Every knob of purified self-distillation, in one validated dataclass."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from trl import DistillationConfig

from .errors import InputError
from .kernels.settings import LossSettings
from .markers import DEFAULT_MARKERS


_INSTRUCTION = "Use the worked solution to understand the problem, then solve the problem yourself, step by step."

DEFAULT_TEACHER_PROMPT_TEMPLATE = "{question}\n\nWorked solution of this problem:\n{reference}\n\n" + _INSTRUCTION
DEFAULT_REFERENCE_PROMPT_TEMPLATE = "Worked solution of this problem:\n{reference}\n\n" + _INSTRUCTION
# The teacher's template for long references: with the default of the reference-only probe the two prompts begin alike
# up to the end of the reference, which is then run once (`share_reference_prefix`)
REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE = (
    "Worked solution of this problem:\n{reference}\n\nThe problem:\n{question}\n\n" + _INSTRUCTION
)

_PLACEHOLDER = re.compile(r"\{(question|reference)\}")


def _choice(help_text: str, choices: tuple[str, ...]) -> dict[str, Any]:
    return {"help": help_text, "choices": list(choices)}


@dataclass
class PurifiedOPSDConfig(DistillationConfig):
    r"""
    Configuration class for the [`PurifiedOPSDTrainer`].

    Extends [`~trl.DistillationConfig`] (generation, vLLM, tools, logging, everything of
    [`~transformers.TrainingArguments`]) with the parameters of purified on-policy self-distillation (arXiv
    2607.02234).

    Parameters:
        > Parameters that control the contexts

        reference_column (`str`, *optional*, defaults to `"reference"`):
            Name of the dataset column that holds the worked solution (a string or a list of messages).
        teacher_prompt_template (`str`, *optional*):
            User turn of the privileged teacher. Must hold `{question}` and `{reference}`; any other brace is literal.
        reference_prompt_template (`str`, *optional*):
            User turn of the reference-only probe. Must hold `{reference}` and no `{question}`. The default is the
            teacher's template without the question, so that the two contexts differ by the question alone.
        teacher_chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of the chat template for the teacher and the reference-only probe, e.g.
            `{"enable_thinking": false}`. `None` takes the student's `chat_template_kwargs`, so that thinking is on or
            off in all contexts alike.
        max_reference_length (`int`, *optional*):
            Longest reference, in tokens. `None` sets no limit of its own. Whatever the value, a row is also overlong
            if its teacher prompt plus `max_completion_length` does not fit the model's context.
        overlong_reference (`str`, *optional*, defaults to `"error"`):
            What happens to rows whose reference is too long: `"error"` stops before training and says how many there
            are, `"drop"` leaves these rows out, `"truncate"` keeps the first tokens of the reference. The number of
            rows touched is printed. The question is never cut.
        invalid_rows (`str`, *optional*, defaults to `"error"`):
            What happens to rows that cannot be used (no reference, an unknown role, a special token in the text):
            `"error"` stops before training, counts them and names the first ten with the reason; `"drop"` leaves them
            out and writes them to `invalid_rows.jsonl` in `output_dir`, as it does with dropped overlong rows. In a
            stream rows are judged as they arrive.

        > Parameters that control the self-teacher

        teacher_model_kind (`str`, *optional*, defaults to `"base"`):
            Weights of the teacher, the reference-only probe and the anchor. `"base"`: the initial policy (LoRA: the
            model under the disabled adapter; full fine-tuning: a frozen copy). `"live"`: the student itself, without
            gradient. `"ema"`: an exponential moving average of the student that starts at the initial policy.
        teacher_update_rate (`float`, *optional*, defaults to `0.05`):
            With `"ema"`: share of the difference to the student by which the teacher moves at each update. `1.0`
            copies the student.
        teacher_sync_steps (`int`, *optional*, defaults to `1`):
            With `"ema"`: optimizer steps between updates of the teacher.
        scoring_batch_size (`int`, *optional*):
            Most sequences a scoring forward may hold, counted over all contexts. `None` takes
            `per_device_train_batch_size`.
        scoring_token_budget (`int`, *optional*):
            Most tokens, padding included, a scoring forward may hold. `None` sets no limit. A single sequence longer
            than the budget is scored alone.
        share_reference_prefix (`bool`, *optional*, defaults to `True`):
            Whether tokens with which the teacher's and the reference-only prompt of a row both begin are run once.
            Worth it for long references that stand before the question (`REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE`);
            prompts that differ from the start, and models that cannot continue one prefix in two ways, are scored
            apart. Keys and values of these tokens are held for the scoring forward.
        offload_scores (`bool`, *optional*, defaults to `False`):
            Whether to keep the teacher's hidden states in host memory between scoring and loss. Worth it when
            `generation batch * completion length * hidden size * 2` values do not fit the device.

        > Parameters that control the target

        target (`str`, *optional*, defaults to `"purified"`):
            `"purified"` distils the pointwise-mutual-information target anchored on the base (Eq. 5-8). `"teacher"`
            distils the privileged teacher itself: plain OPSD, the paper's baseline, by the same code path.
        pmi_beta (`float`, *optional*, defaults to `1.0`):
            Strength of the anchor: the target is `softmax(log P_0 + delta / pmi_beta)`. Larger means closer to the
            base. The paper's ablation holds gains for 0.5, 1 and 2.
        pmi_clip (`float`, *optional*, defaults to `10.0`):
            Bound c of the soft clip `c * tanh(delta / c)`, in nats. `0` switches the clip off. The paper's ablation
            holds gains for 5, 10 and 20.
        pmi_center (`bool`, *optional*, defaults to `True`):
            Whether to subtract the vocabulary mean of the log-ratio before the clip. `False` costs one projection
            more, since the log-normalisers no longer cancel.

        > Parameters that control the loss

        loss_type (`str`, *optional*, defaults to `"divergence"`):
            `"divergence"`: generalised Jensen-Shannon divergence over the full vocabulary, interpolated by `beta`.
            `"sampled_token"`: policy-gradient style, with the advantage `log P_target(y) - log pi_theta(y)` of each
            sampled token y; `beta` has no effect, `kl_clip` is refused.
        kl_clip (`float`, *optional*):
            Upper bound, in nats, of what one vocabulary entry may contribute to a token's divergence (a stabiliser
            of plain OPSD). `None` switches it off. An entry at the bound has no derivative of its own.
        mask_unused_vocab (`bool`, *optional*, defaults to `False`):
            Whether rows of the output head beyond the tokenizer's vocabulary (Qwen models have some 270) are left out
            of all four distributions. The paper keeps them; `purification/unused_vocab_mass` logs what the target
            puts there.
        loss_chunk_size (`int`, *optional*):
            Tokens whose logits exist at once. `None` chooses it from `loss_memory_budget`.
        loss_memory_budget (`int`, *optional*, defaults to `512`):
            Scratch memory of the loss in MiB, from which the chunk size is chosen.

        > Parameters that control the monitors

        decomposition_steps (`int`, *optional*, defaults to `10`):
            Steps between two looks at the decomposition of the teacher's signal (Eq. 4); the first look is before the
            first update. `0` switches it off. At such a step plain OPSD scores the reference-only context as well.
        decomposition_max_tokens (`int`, *optional*, defaults to `1024`):
            Most tokens looked at in such a step, over all processes; a seeded sample of the step's tokens.
        epistemic_markers (`list[str]`, *optional*):
            Words or phrases counted on the rollouts. The default is wait, maybe, perhaps, check (the paper's four),
            hmm, actually and alternatively. Whole words in any case; see `docs/monitors.md`.
        epistemic_guard (`str`, *optional*, defaults to `"warn"`):
            What happens when a marker's rate leaves the band around its baseline, which is measured on the rollouts
            before the first update: `"warn"`, `"stop"` (saves a checkpoint and ends training), or `"ignore"`.
        epistemic_band (`float`, *optional*, defaults to `2.0`):
            A rate may fall to baseline / band and rise to baseline * band, beyond the noise of counting.
        epistemic_window (`int`, *optional*, defaults to `10`):
            Steps over which the present rate is taken.

    > [!NOTE]
    > These parameters have default values different from [`~trl.DistillationConfig`]:
    > - `beta`: Defaults to `0.5` (Jensen-Shannon, as in the paper) instead of `1.0`.
    > - `learning_rate`: Defaults to `5e-6` (the paper's) instead of `1e-6`.
    > - `max_completion_length`: Defaults to `1024` (the paper's) instead of `512`.
    > - `vllm_server_host`: Defaults to `"127.0.0.1"` instead of `"0.0.0.0"`.
    """

    _VALID_DICT_FIELDS = DistillationConfig._VALID_DICT_FIELDS + ["teacher_chat_template_kwargs"]

    # Parameters whose default values are overridden from DistillationConfig
    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    max_completion_length: int = field(
        default=1024, metadata={"help": "Maximum number of tokens to generate per completion."}
    )
    beta: float = field(
        default=0.5,
        metadata={
            "help": "Interpolation coefficient of the divergence: 0.0 = forward KL(target || student), 0.5 = JSD, "
            "1.0 = reverse KL(student || target)."
        },
    )
    vllm_server_host: str = field(default="127.0.0.1", metadata={"help": "Host of the student vLLM server."})

    # Parameters that control the contexts
    reference_column: str = field(
        default="reference", metadata={"help": "Dataset column that holds the worked solution (string or messages)."}
    )
    teacher_prompt_template: str = field(
        default=DEFAULT_TEACHER_PROMPT_TEMPLATE,
        metadata={"help": "User turn of the privileged teacher, with {question} and {reference}."},
    )
    reference_prompt_template: str = field(
        default=DEFAULT_REFERENCE_PROMPT_TEMPLATE,
        metadata={"help": "User turn of the reference-only probe, with {reference} and without {question}."},
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Chat template kwargs for teacher and reference-only probe. None: the student's."},
    )
    max_reference_length: int | None = field(
        default=None, metadata={"help": "Longest reference in tokens. None: only the model's context limits it."}
    )
    overlong_reference: str = field(
        default="error",
        metadata=_choice("What to do with rows whose reference is too long.", ("error", "drop", "truncate")),
    )
    invalid_rows: str = field(
        default="error",
        metadata=_choice("What to do with rows that cannot be used.", ("error", "drop")),
    )

    # Parameters that control the self-teacher
    teacher_model_kind: str = field(
        default="base",
        metadata=_choice(
            "Weights of teacher, probe and anchor: the initial policy, the live student, or its moving average.",
            ("base", "live", "ema"),
        ),
    )
    teacher_update_rate: float = field(
        default=0.05,
        metadata={"help": "ema: share of the difference to the student by which the teacher moves at each update."},
    )
    teacher_sync_steps: int = field(
        default=1, metadata={"help": "ema: optimizer steps between updates of the teacher."}
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={"help": "Most sequences in a scoring forward. None: per_device_train_batch_size."},
    )
    scoring_token_budget: int | None = field(
        default=None, metadata={"help": "Most tokens, padding included, in a scoring forward. None: no limit."}
    )
    share_reference_prefix: bool = field(
        default=True,
        metadata={"help": "Run tokens that begin both the teacher's and the reference-only prompt of a row once."},
    )
    offload_scores: bool = field(
        default=False, metadata={"help": "Keep the teacher's hidden states in host memory until the loss."}
    )

    # Parameters that control the target
    target: str = field(
        default="purified",
        metadata=_choice("Distil the purified target, or the privileged teacher (OPSD).", ("purified", "teacher")),
    )
    pmi_beta: float = field(
        default=1.0, metadata={"help": "Strength of the base anchor; larger is closer to the base."}
    )
    pmi_clip: float | None = field(
        default=10.0, metadata={"help": "Bound of the soft clip of the log-ratio, in nats. 0 switches it off."}
    )
    pmi_center: bool = field(
        default=True, metadata={"help": "Subtract the vocabulary mean of the log-ratio before the clip."}
    )

    # Parameters that control the loss
    loss_type: str = field(
        default="divergence",
        metadata=_choice(
            "Full-vocabulary divergence, or advantage of the sampled token.", ("divergence", "sampled_token")
        ),
    )
    kl_clip: float | None = field(
        default=None,
        metadata={"help": "Upper bound, in nats, of one vocabulary entry's contribution to the divergence."},
    )
    mask_unused_vocab: bool = field(
        default=False,
        metadata={"help": "Leave rows of the head beyond the tokenizer's vocabulary out of all distributions."},
    )
    loss_chunk_size: int | None = field(
        default=None, metadata={"help": "Tokens whose logits exist at once. None: from loss_memory_budget."}
    )
    loss_memory_budget: int = field(default=512, metadata={"help": "Scratch memory of the loss in MiB."})

    # Parameters that control the monitors
    decomposition_steps: int = field(
        default=10, metadata={"help": "Steps between two decompositions of the teacher's signal. 0 switches it off."}
    )
    decomposition_max_tokens: int = field(
        default=1024, metadata={"help": "Most tokens decomposed in such a step, over all processes."}
    )
    epistemic_markers: list[str] = field(
        default_factory=lambda: list(DEFAULT_MARKERS),
        metadata={"help": "Words or phrases counted on the rollouts: whole words, in any case."},
    )
    epistemic_guard: str = field(
        default="warn",
        metadata=_choice("What to do when a marker's rate leaves its band.", ("warn", "stop", "ignore")),
    )
    epistemic_band: float = field(
        default=2.0, metadata={"help": "Factor by which a marker's rate may fall or rise from its baseline."}
    )
    epistemic_window: int = field(
        default=10, metadata={"help": "Steps over which the present rate of a marker is taken."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pmi_clip == 0.0:
            self.pmi_clip = None  # YAML and the command line cannot say `None` for a float
        self._check_choices()
        self._check_templates()
        self._check_numbers()
        self.loss_settings  # noqa: B018  # validates its fields

    @property
    def loss_settings(self) -> LossSettings:
        """The fields that the loss reads, validated, as it reads them."""
        return LossSettings(**{field.name: getattr(self, field.name) for field in fields(LossSettings)})

    def _check_choices(self) -> None:
        # argparse checks `choices` on the command line only; Python and YAML values arrive here unchecked
        for name in ("overlong_reference", "invalid_rows", "teacher_model_kind", "epistemic_guard"):
            choices, value = self.__dataclass_fields__[name].metadata["choices"], getattr(self, name)
            if value not in choices:
                raise InputError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")

    def _check_templates(self) -> None:
        if self.reference_column == "prompt":
            raise InputError(
                "`reference_column` cannot be `prompt`, which holds the question. Rename the columns, or on the "
                "command line name them with `dataset_prompt_column` and `dataset_reference_column`."
            )
        expected = {
            "teacher_prompt_template": {"question", "reference"},
            "reference_prompt_template": {"reference"},
        }
        for name, placeholders in expected.items():
            found = set(_PLACEHOLDER.findall(getattr(self, name)))
            if found != placeholders:
                wanted = " and ".join(f"{{{p}}}" for p in sorted(placeholders))
                got = " and ".join(f"{{{p}}}" for p in sorted(found)) or "none"
                raise InputError(f"`{name}` must hold the placeholders {wanted} and no other, but it holds {got}.")

    def _check_numbers(self) -> None:
        if self.max_completion_length is None:
            raise InputError(
                "`max_completion_length` must be set: the references are checked against the room it leaves."
            )
        for name in (
            "max_reference_length",
            "scoring_batch_size",
            "scoring_token_budget",
            "max_completion_length",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"`{name}` must be positive, got {value}.")
        for name in ("decomposition_max_tokens", "epistemic_window"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.decomposition_steps < 0:
            raise InputError(f"`decomposition_steps` must not be negative (0 is off), got {self.decomposition_steps}.")
        if not self.epistemic_band > 1.0:
            raise InputError(f"`epistemic_band` is a factor above 1, got {self.epistemic_band}.")
        if not self.epistemic_markers or not all(marker.strip() for marker in self.epistemic_markers):
            raise InputError("`epistemic_markers` must list at least one word, and no empty ones.")
        if not 0.0 < self.teacher_update_rate <= 1.0:
            raise InputError(
                f"`teacher_update_rate` must be above 0 and at most 1, got {self.teacher_update_rate}. For a teacher "
                "that never moves set `teacher_model_kind: base`."
            )
        if self.teacher_sync_steps < 1:
            raise InputError(f"`teacher_sync_steps` must be at least 1, got {self.teacher_sync_steps}.")
        if self.teacher_model_kind != "base" and self.teacher_model_name_or_path is not None:
            raise InputError(
                f"`teacher_model_kind: {self.teacher_model_kind}` makes the student its own teacher and cannot be "
                "combined with `teacher_model_name_or_path`. Remove one of the two keys."
            )
