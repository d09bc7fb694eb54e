"""Every knob of purified self-distillation, in one validated dataclass."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from trl import DistillationConfig

from .arguments import PositiveFloat, PositiveInt, Range, as_mapping, check_type, check_types
from .config_checks import check_combinations, check_servers, check_templates, infer_device
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

# Ranges that the inherited annotations do not state
_INHERITED: dict[str, Any] = {
    "per_device_train_batch_size": PositiveInt,
    "per_device_eval_batch_size": PositiveInt,
    "gradient_accumulation_steps": PositiveInt,
    "learning_rate": Annotated[float, Range(0)],
    "temperature": PositiveFloat,
    "top_p": Annotated[float, Range(0, 1, above=True)],
    "top_k": Annotated[int, Range(0)],
    "repetition_penalty": PositiveFloat,
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PurifiedOPSDConfig(DistillationConfig):
    r"""
    Configuration class for the [`PurifiedOPSDTrainer`].

    Extends [`~trl.DistillationConfig`] (generation, vLLM, tools, logging, everything of
    [`~transformers.TrainingArguments`]) with the parameters of purified on-policy self-distillation (arXiv
    2607.02234).

    Parameters:
        > Parameters that control rollouts from `vllm serve`

        vllm_adapter_sync (`bool`, *optional*, defaults to `False`):
            Whether vLLM gets the LoRA adapter in place of merged weights. A server (`vllm_mode: server`) gets it over
            HTTP and must be started for it, as the error at start says; a colocated vLLM reads it from a file.
        rollouts_ahead (`int`, *optional*, defaults to `0`):
            Batches that the server writes while the trainer trains on earlier ones: the rollouts of a step are of the
            adapter so many optimizer steps before. `0` generates as a step begins. Needs `vllm_adapter_sync`.
        vllm_server_base_url (`list[str]` or `str`, *optional*):
            Address of the server, `http://host:port`. With `vllm_adapter_sync` several addresses divide the rows.
        vllm_adapter_dir (`str`, *optional*):
            Folder of the adapters, at the same path for the servers. `None` takes `_adapters` in `output_dir`.
        vllm_request_timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds that a server may take for a batch before it counts as lost. With `vllm_adapter_sync`.

        > Parameters that control the contexts

        reference_column (`str`, *optional*, defaults to `"reference"`):
            Name of the dataset column that holds the worked solution (a string or a list of messages).
        reference_source (`str`, *optional*, defaults to `"own"`):
            Control experiment: `"own"` reference, the reference of `"other"` rows (drawn with `seed`, never the row's
            own text), or `"none"`, the templates with an empty reference.
        wrong_reference_column (`str`, *optional*):
            Column of a wrong reference for `target: contrastive`. `None` takes the reference of another row.
        teacher_prompt_template (`str`, *optional*):
            User turn of the privileged teacher. Must hold `{question}` and `{reference}`; any other brace is literal.
        reference_prompt_template (`str`, *optional*):
            User turn of the reference-only probe. Must hold `{reference}` and no `{question}`. The default is the
            teacher's template without the question, so that the two contexts differ by the question alone. `{images}`
            stands for the question's images, which the probe does not see otherwise.
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
            than the budget is scored in chunks, whose keys and values are kept until its end; models whose layers
            cannot continue a sequence exactly score it in one forward.
        share_reference_prefix (`bool`, *optional*, defaults to `True`):
            Whether tokens with which the teacher's and the reference-only prompt of a row both begin are run once.
            Worth it for long references that stand before the question (`REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE`);
            prompts that differ from the start, and models that cannot continue one prefix in two ways, are scored
            apart. Keys and values of these tokens are held for the scoring forward.
        offload_scores (`bool`, *optional*, defaults to `False`):
            Whether to keep the teacher's hidden states in host memory between scoring and loss. Worth it when
            `generation batch * completion length * hidden size * 2` values do not fit the device.
        self_check (`bool`, *optional*, defaults to `True`):
            Whether to check before the first step that output head, padding, teacher and gradients are exact for this
            model (docs/models.md).

        > Parameters that control long completions

        padding_free (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether sequences run in one row without padding, in scoring and in the student's passes. `"auto"` packs
            where attention skips the tokens of other sequences (`flash_attention_2`, `flash_attention_3`,
            `flex_attention`), and with `sdpa` and `eager`, which mask them, where the counted FLOPs of the batch say
            that it pays. `True` always packs. Models whose layers mix neighbors across sequences pad, and a warning
            names them. The results are the same, up to rounding.
        train_token_budget (`int`, *optional*):
            Most tokens, padding included, of a forward and backward pass of the student: a micro-batch of
            `per_device_train_batch_size` rows is cut into parts, on every process into as many. `None` runs it at
            once. A longer row has a part of its own. Loss and gradients are the same, up to rounding.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            Whether completions that were cut off at `max_completion_length` carry no loss. The paper trains on them.

        > Parameters that control the target

        target (`str`, *optional*, defaults to `"purified"`):
            `"purified"` distills the pointwise-mutual-information target anchored on the base (Eq. 5-8). `"teacher"`
            distills the privileged teacher itself: plain OPSD, the paper's baseline, by the same code path.
            `"gated"` is `"purified"` without a tilt where the reference-only probe is certain, `"interpolated"`
            distills `softmax((1 - w) z_base + w z_teacher)`, and `"contrastive"` what a correct reference says more
            than a wrong one.
        pmi_beta (`float`, *optional*, defaults to `1.0`):
            Strength of the anchor: the target is `softmax(log P_0 + delta / pmi_beta)`. Larger means closer to the
            base. The paper's ablation holds gains for 0.5, 1 and 2.
        pmi_clip (`float`, *optional*, defaults to `10.0`):
            Bound c of the soft clip `c * tanh(delta / c)`, in nats. `0` switches the clip off. The paper's ablation
            holds gains for 5, 10 and 20.
        pmi_center (`bool`, *optional*, defaults to `True`):
            Whether to subtract the vocabulary mean of the log-ratio before the clip. `False` costs one projection
            more, since the log-normalizers no longer cancel.
        interpolation_weight (`float`, *optional*, defaults to `0.5`):
            `"interpolated"`: weight w of the teacher, from 0 (base) to 1 (plain OPSD).
        interpolation_weight_end (`float`, *optional*):
            `"interpolated"`: weight of the last step, from 0 to 1; between the first and the last step the weight is
            linear in the steps. `None` keeps it constant.
        contrastive_alpha, contrastive_floor, contrastive_tau (`float`, *optional*, default to `0.5`, `-10.0`, `1.0`):
            `"contrastive"`: strength of the contrast; lower bound of the log-probabilities under the wrong reference,
            in nats; KL between the two references, in nats, at which a token has half of its weight.

        > Parameters that control the loss

        loss_type (`str`, *optional*, defaults to `"divergence"`):
            `"divergence"`: generalized Jensen-Shannon divergence over the full vocabulary, interpolated by `beta`.
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

        log_style (`str`, *optional*, defaults to `"table"`):
            What the console shows of a logging step: `"table"` prints one line with the numbers that matter most,
            `"dict"` prints all metrics, as transformers does. The loggers and the report receive all of them.
        decomposition_steps (`int`, *optional*, defaults to `10`):
            Measure the decomposition of the teacher's signal (Eq. 4) every so many steps, first before the first
            update. `0` switches it off. At such a step plain OPSD scores the reference-only context as well.
        decomposition_max_tokens (`int`, *optional*, defaults to `1024`):
            Largest number of tokens measured in such a step, over all processes; a seeded sample of the step's
            tokens.
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
    >
    > `use_cpu` is set where there is no accelerator, and a line says so.

    Raises:
        [`InputError`]: for a value of a wrong type or outside its range, also in Python. The message names the field.
    """

    _VALID_DICT_FIELDS = DistillationConfig._VALID_DICT_FIELDS + ["teacher_chat_template_kwargs"]

    # Parameters whose default values are overridden from DistillationConfig
    learning_rate: float = _option(5e-6, "The initial learning rate for AdamW.")
    max_completion_length: PositiveInt = _option(1024, "Maximum number of tokens to generate per completion.")
    beta: Annotated[float, Range(0, 1)] = _option(
        0.5,
        "Interpolation coefficient of the divergence: 0.0 = forward KL(target || student), 0.5 = JSD, 1.0 = reverse "
        "KL(student || target).",
    )
    vllm_server_host: str = _option("127.0.0.1", "Host of the student vLLM server.")

    # Parameters that control rollouts from `vllm serve`
    vllm_adapter_sync: bool = _option(False, "Give vLLM the LoRA adapter, a server over HTTP, not merged weights.")
    rollouts_ahead: Annotated[int, Range(0)] = _option(
        0, "Batches that the vLLM server writes ahead of their step; the staleness of rollouts in optimizer steps."
    )
    vllm_server_base_url: list[str] | None = _option(  # type: ignore[assignment]  # TRL takes one
        None, "Address of the student vLLM server, or several with vllm_adapter_sync: http://host:port."
    )
    vllm_adapter_dir: str | None = _option(
        None, "Folder of adapters, at the same path for servers. None: _adapters in output_dir."
    )
    vllm_request_timeout: PositiveFloat = _option(
        1800.0, "Seconds that a server may take for a batch, with vllm_adapter_sync."
    )

    # Parameters that control the contexts
    reference_column: str = _option("reference", "Dataset column that holds the worked solution (string or messages).")
    reference_source: Literal["own", "other", "none"] = _option(
        "own", "Control: the row's own reference, that of another row, or none (the templates with an empty one)."
    )
    wrong_reference_column: str | None = _option(
        None, "contrastive: column of a wrong reference. None: the reference of another row."
    )
    teacher_prompt_template: str = _option(
        DEFAULT_TEACHER_PROMPT_TEMPLATE, "User turn of the privileged teacher, with {question} and {reference}."
    )
    reference_prompt_template: str = _option(
        DEFAULT_REFERENCE_PROMPT_TEMPLATE,
        "User turn of the reference-only probe, with {reference} and without {question}.",
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = _option(
        None, "Chat template kwargs for teacher and reference-only probe. None: the student's."
    )
    max_reference_length: PositiveInt | None = _option(
        None, "Longest reference in tokens. None: only the model's context limits it."
    )
    overlong_reference: Literal["error", "drop", "truncate"] = _option(
        "error", "What to do with rows whose reference is too long."
    )
    invalid_rows: Literal["error", "drop"] = _option("error", "What to do with rows that cannot be used.")

    # Parameters that control the self-teacher
    teacher_model_kind: Literal["base", "live", "ema"] = _option(
        "base", "Weights of teacher, probe and anchor: the initial policy, the live student, or its moving average."
    )
    teacher_update_rate: Annotated[float, Range(0, 1, above=True)] = _option(
        0.05, "ema: share of the difference to the student by which the teacher moves at each update."
    )
    teacher_sync_steps: PositiveInt = _option(1, "ema: optimizer steps between updates of the teacher.")
    scoring_batch_size: PositiveInt | None = _option(
        None, "Most sequences in a scoring forward. None: per_device_train_batch_size."
    )
    scoring_token_budget: PositiveInt | None = _option(
        None, "Most tokens, padding included, in a scoring forward. None: no limit."
    )
    share_reference_prefix: bool = _option(
        True, "Run tokens that begin both the teacher's and the reference-only prompt of a row once."
    )
    offload_scores: bool = _option(False, "Keep the teacher's hidden states in host memory until the loss.")
    self_check: bool = _option(
        True, "Check before the first step that padding, head, teacher and gradients are exact for this model."
    )

    # Parameters that control long completions
    padding_free: Literal["auto", "true", "false"] = _option(
        "auto", "Run sequences in one row without padding: where it pays, always, or never."
    )
    train_token_budget: PositiveInt | None = _option(
        None, "Most tokens, padding included, in a pass of the student. None: a micro-batch at once."
    )
    mask_truncated_completions: bool = _option(False, "No loss on completions cut off at max_completion_length.")

    # Parameters that control the target
    target: str = _option(
        "purified", "Distill the `purified` target, the `teacher` (OPSD), or one of docs/targets.md."
    )
    pmi_beta: PositiveFloat = _option(1.0, "Strength of the base anchor; larger is closer to the base.")
    pmi_clip: Annotated[float, Range(0)] | None = _option(
        10.0, "Bound of the soft clip of the log-ratio, in nats. 0 switches it off."
    )
    pmi_center: bool = _option(True, "Subtract the vocabulary mean of the log-ratio before the clip.")

    interpolation_weight: Annotated[float, Range(0, 1)] = _option(
        0.5, "interpolated: weight of the teacher's logits; the rest is the base's."
    )
    interpolation_weight_end: Annotated[float, Range(0, 1)] | None = _option(
        None, "interpolated: weight at the last step, linear in between. None: constant."
    )
    contrastive_alpha: Annotated[float, Range(0)] = _option(0.5, "contrastive: strength; 0 is the teacher.")
    contrastive_floor: float = _option(-10.0, "contrastive: lower bound of log p under the wrong reference, in nats.")
    contrastive_tau: Annotated[float, Range(0)] = _option(
        1.0, "contrastive: KL, in nats, that gives half of the weight."
    )

    # Parameters that control the loss
    loss_type: Literal["divergence", "sampled_token"] = _option(
        "divergence", "Full-vocabulary divergence, or advantage of the sampled token."
    )
    kl_clip: PositiveFloat | None = _option(
        None, "Upper bound, in nats, of one vocabulary entry's contribution to the divergence."
    )
    mask_unused_vocab: bool = _option(
        False, "Leave rows of the head beyond the tokenizer's vocabulary out of all distributions."
    )
    loss_chunk_size: PositiveInt | None = _option(
        None, "Tokens whose logits exist at once. None: from loss_memory_budget."
    )
    loss_memory_budget: PositiveInt = _option(512, "Scratch memory of the loss in MiB.")

    # Parameters that control the monitors
    log_style: Literal["table", "dict"] = _option(
        "table", "Console output per logging step: one aligned line, or all metrics as transformers prints them."
    )
    decomposition_steps: Annotated[int, Range(0)] = _option(
        10, "Decompose the teacher's signal every so many steps. 0 switches it off."
    )
    decomposition_max_tokens: PositiveInt = _option(1024, "Most tokens decomposed in such a step, over all processes.")
    epistemic_markers: list[str] = field(
        default_factory=lambda: list(DEFAULT_MARKERS),
        metadata={"help": "Words or phrases counted on the rollouts: whole words, in any case."},
    )
    epistemic_guard: Literal["warn", "stop", "ignore"] = _option(
        "warn", "What to do when a marker's rate leaves its band."
    )
    epistemic_band: Annotated[float, Range(1, above=True)] = _option(
        2.0, "Factor by which a marker's rate may fall or rise from its baseline."
    )
    epistemic_window: PositiveInt = _option(10, "Steps over which the present rate of a marker is taken.")

    def __post_init__(self) -> None:
        if isinstance(self.padding_free, bool):  # as YAML reads it
            self.padding_free = "true" if self.padding_free else "false"
        if isinstance(self.vllm_server_base_url, str):
            self.vllm_server_base_url = [self.vllm_server_base_url]
        # Before the inherited checks, which convert some values and stumble over others. Skipped are two fields that
        # admit more than their annotation says: an object, and the None of argparse
        check_types(self, skip=("accelerator_config", "debug"), hints=_INHERITED)
        self._check_json()
        check_templates(self)
        check_combinations(self)
        check_servers(self)
        infer_device(self)
        super().__post_init__()
        if self.pmi_clip == 0:
            self.pmi_clip = None
        self.loss_settings  # noqa: B018  # validates its fields

    @property
    def loss_settings(self) -> LossSettings:
        """The fields that the loss reads, validated, as it reads them."""
        return LossSettings(**{field.name: getattr(self, field.name) for field in fields(LossSettings)})

    def _check_json(self) -> None:
        """Mappings may be given as JSON; some of the inherited ones also as the path of a file."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and (value.startswith("{") or name == "teacher_chat_template_kwargs"):
                check_type(name, as_mapping(name, value), dict)
