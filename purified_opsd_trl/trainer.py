"""
`PurifiedOPSDTrainer`: wires the stages together and inherits everything else from TRL.

```text
row -> contexts -> (TRL rollout) -> collator -> scoring -> loss -> metrics
```
"""

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging
from trl import DistillationTrainer
from trl.trainer.utils import get_config_model_id

from .backbone import context_length, last_hidden_states, why_not_shareable
from .checkpoints import WholeCheckpoints
from .collator import PurificationCollator, ScoringBatch
from .config import PurifiedOPSDConfig
from .contexts import Contexts, Prompt, build_contexts
from .dataset import AnyDataset, ReferenceLimit, check_columns, prepare_dataset
from .errors import InputError
from .extras import require_extra
from .head import LMHead
from .loss import FrozenStates, required_states, token_loss
from .markers import MarkerCounter, TokenClassifier
from .monitoring.console import console_callbacks
from .monitoring.decomposition import DecompositionMonitor
from .monitoring.epistemic import EpistemicMonitor
from .monitoring.metrics import TokenMeans, clock, loss_sums, reduce_loss_sums, scoring_metrics
from .monitoring.report import ReportCallback
from .purification import purified_target_logits
from .rollout import merge_without_drift, reserve_vllm_length
from .scores import TeacherScores
from .scoring import TeacherScoringCallback


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = logging.get_logger(__name__)


class PurifiedOPSDTrainer(WholeCheckpoints, DistillationTrainer):
    """
    Trainer for purified on-policy self-distillation (arXiv 2607.02234).

    The student samples a completion from the question alone. The same model, frozen, scores that completion token by
    token under three contexts: question and reference (teacher), reference alone (reference-only probe), question
    alone (base). What the reference alone induces is removed from the teacher's signal; the rest, a pointwise mutual
    information, tilts the base distribution into the target, and the student is trained towards it:

    ```text
    delta  = log pi_T - log pi_ref               centered over the vocabulary, then c * tanh(delta / c)
    target = softmax(log P_0 + delta / pmi_beta)
    loss   = divergence(student, target)         mean over the completion tokens of the global batch
    ```

    `args.target="teacher"` distils `pi_T` itself: plain OPSD, the baseline, by the same code path.

    Three methods are meant to be overridden: [`~PurifiedOPSDTrainer.build_contexts`],
    [`~PurifiedOPSDTrainer.target_logits`], and the methods of a [`TeacherScoringCallback`] passed as
    `scoring_callback`.

    Example:

    ```python
    >>> from purified_opsd_trl import PurifiedOPSDTrainer
    >>> from datasets import load_dataset

    >>> dataset = load_dataset("json", data_files="messages.jsonl", split="train")  # prompt: messages; reference: text
    >>> trainer = PurifiedOPSDTrainer(model="Qwen/Qwen3-0.6B", train_dataset=dataset)
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student, and its own teacher: a model id, a path or an instance.
        args ([`PurifiedOPSDConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with the columns `"prompt"` and `args.reference_column`, each text or messages.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Dataset(s) to evaluate on, with the same columns.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model given by name; with `peft_config` for QLoRA.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model.
        tools (list of `Callable`, *optional*):
            Tools the student may call during the rollout. Tokens of tool results carry no loss.
        scoring_callback ([`TeacherScoringCallback`], *optional*):
            Scores completions with the self-teacher.
        purification_collator ([`PurificationCollator`], *optional*):
            Builds scoring batches and training tensors.
    """

    args: PurifiedOPSDConfig
    model: Any  # a PreTrainedModel or PeftModel; transformers' annotation admits None

    _tag_names = ["trl", "purified-opsd"]
    _name = "Purified OPSD"
    _paper = {
        "title": "Purified OPSD: On-Policy Self-Distillation Without Losing How to Think",
        "id": "2607.02234",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{purifiedopsd2026,
                title        = {{Purified OPSD: On-Policy Self-Distillation Without Losing How to Think}},
                author       = {Zhanming Shen and Jintao Tong and Shaotian Yan and Chen Shen and Hao Chen and
                                Wentao Ye and Xiaomeng Hu and Rui Miao and Haobo Wang and Junbo Zhao and
                                Gang Chen and Jieping Ye},
                year         = 2026,
                eprint       = {arXiv:2607.02234},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: PurifiedOPSDConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable[..., Any]] | None = None,
        scoring_callback: TeacherScoringCallback | None = None,
        purification_collator: PurificationCollator | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PurifiedOPSDConfig(f"{model_name.split('/')[-1]}-Purified-OPSD")
        if not isinstance(args, PurifiedOPSDConfig):
            raise InputError(f"`args` must be a PurifiedOPSDConfig, got {type(args).__name__}.")
        for name, dataset in _named_datasets(train_dataset, eval_dataset):
            check_columns(dataset, name, args.reference_column)  # before the model is loaded
        if args.use_vllm:
            require_extra("vllm", "`use_vllm`")

        self.args = args  # `build_contexts` reads it
        reserve_vllm_length(
            args, model, processing_class, _named_datasets(train_dataset, eval_dataset), self.build_contexts, tools
        )
        self.scoring_callback = scoring_callback or TeacherScoringCallback()
        super().__init__(
            model=model,
            teacher_model=None,  # the model is its own teacher; see `TeacherScoringCallback`
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), self.scoring_callback],
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        if args.use_vllm and is_peft_model(self.model):
            merge_without_drift(self.vllm_generation)
        self.purification_collator = purification_collator or PurificationCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            max_sequences=args.scoring_batch_size or args.per_device_train_batch_size,
            max_tokens=args.scoring_token_budget,
            pad_to_multiple_of=self.pad_to_multiple_of,  # type: ignore[arg-type]  # "auto" is resolved by the config
        )
        self.loss_settings = args.loss_settings
        # A subclass that brings its own target gets full logits, chunk by chunk; the fused algebra is not its own
        self._has_custom_target = type(self).target_logits is not PurifiedOPSDTrainer.target_logits
        head = LMHead.from_model(self.model)
        # What of the frozen states the loss reads, decided once
        self._states = required_states(self.loss_settings, head.linear, self._has_custom_target)
        self._unshareable = why_not_shareable(self.model)
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._token_means = {"train": TokenMeans(), "eval": TokenMeans()}
        self._add_monitors()
        self._prepare_datasets()
        self.scoring_callback.attach(self, model if isinstance(model, str) else None)

    # Data ------------------------------------------------------------------------------------------------------------

    def _prepare_datasets(self) -> None:
        args, context = self.args, context_length(self.model)
        if context is not None and args.max_completion_length >= context:
            raise InputError(
                f"`max_completion_length` ({args.max_completion_length} tokens) leaves no room for a prompt in the "
                f"model's context of {context} tokens. Lower it."
            )
        self._reference_limit = ReferenceLimit(
            tokenizer=self._tokenizer,
            tokenize=self._tokenize_teacher_prompts,
            build_contexts=self.build_contexts,
            reference_column=args.reference_column,
            max_reference_length=args.max_reference_length,
            max_prompt_length=None if context is None else context - args.max_completion_length,
        )

        def prepare(dataset: AnyDataset, name: str) -> AnyDataset:
            return prepare_dataset(
                dataset,
                name,
                limit=self._reference_limit,
                policy=args.overlong_reference,
                report=self.accelerator.print,
                show_progress=self.accelerator.is_local_main_process and not args.disable_tqdm,
            )

        if self.train_dataset is not None:
            self.train_dataset = prepare(self.train_dataset, "train_dataset")
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = {
                key: prepare(dataset, f"eval_dataset[{key!r}]") for key, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = prepare(self.eval_dataset, "eval_dataset")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        self._signature_columns = list(dict.fromkeys([*columns, self.args.reference_column]))  # type: ignore[assignment]

    def build_contexts(self, row: Mapping[str, Any]) -> Contexts:
        """
        Builds the three prompts of one dataset row. Override it to word or arrange them differently.

        Args:
            row (`Mapping[str, Any]`):
                Dataset row with all its columns.

        Returns:
            [`Contexts`]: the student and the base see `question`; `teacher` and `reference_only` are the frozen
            model's alone.

        Raises:
            `InputError`: if the row cannot be used.
        """
        return build_contexts(
            row,
            reference_column=self.args.reference_column,
            teacher_prompt_template=self.args.teacher_prompt_template,
            reference_prompt_template=self.args.reference_prompt_template,
        )

    def _tokenize_teacher_prompts(self, prompts: list[Prompt]) -> list[list[int]]:
        # TRL renders with the student's kwargs; the teacher may have its own (thinking on or off)
        student_kwargs = self.chat_template_kwargs
        if self.args.teacher_chat_template_kwargs is not None:
            self.chat_template_kwargs = self.args.teacher_chat_template_kwargs
        try:
            return self._tokenize_prompts(prompts)[0]
        finally:
            self.chat_template_kwargs = student_kwargs

    # Monitors --------------------------------------------------------------------------------------------------------

    def _add_monitors(self) -> None:
        args = self.args
        self.decomposition_monitor = DecompositionMonitor(
            every=args.decomposition_steps,
            max_tokens=args.decomposition_max_tokens,
            classifier=TokenClassifier(self._tokenizer, MarkerCounter(args.epistemic_markers)),
            temperature=args.temperature,
            memory_budget=args.loss_memory_budget * 2**20,
            seed=args.seed,
        )
        self.add_callback(self.decomposition_monitor)
        self.add_callback(
            EpistemicMonitor(args.epistemic_markers, args.epistemic_guard, args.epistemic_band, args.epistemic_window)
        )
        self.add_callback(ReportCallback())
        if args.log_style == "table":
            console_callbacks(self)

    def _observe(self, rows: list[dict[str, Any]], output: dict[str, Any], mode: str) -> None:
        """Shows the rollouts to the monitors: what the student wrote, without tool results."""
        ids = _unpad(output["completion_ids"], _loss_mask(output))
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        training = mode == "train"
        # Looked up, as a resumed run may hold other instances than the ones that were added
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EpistemicMonitor):
                self._token_means[mode].add(callback.observe(texts, ids, self.accelerator, training))
            elif isinstance(callback, ReportCallback) and training:
                callback.observe(self.state.global_step, [row["prompt"] for row in rows], texts)

    # Rollout and scoring ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        contexts = self._contexts(inputs)
        inputs = [{**row, "prompt": context.question} for row, context in zip(inputs, contexts, strict=True)]
        started = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        self._metrics[mode]["timing/generation_seconds"].append(time.perf_counter() - started)
        self._observe(inputs, output, mode)

        scores = self._score(contexts, output)
        device = self.accelerator.device.type
        dtype = torch.get_autocast_dtype(device) if self.accelerator.native_amp else None
        output.update(self.purification_collator.training_tensors(scores.hidden, self._states, dtype))
        if self.decomposition_monitor.due:
            output.update(
                self.decomposition_monitor.sample(
                    scores,
                    output["completion_ids"],
                    _loss_mask(output),
                    process=self.accelerator.process_index,
                    total=int(output["num_items_in_batch"]),
                )
            )
        for name, value in scoring_metrics(scores.stats, self.accelerator).items():
            self._metrics[mode][name].append(value)
        return output

    def _contexts(self, rows: list[dict[str, Any]]) -> list[Contexts]:
        # Map-style training data was checked before training; a data set passed to `evaluate` may not have been
        if not self.model.training or isinstance(self.train_dataset, IterableDataset):
            where = f"step {self.state.global_step}, generation batch"
            rows = self._reference_limit.enforce(rows, self.args.overlong_reference, where)
        return [self.build_contexts(row) for row in rows]

    def _score(self, contexts: list[Contexts], output: dict[str, Any]) -> TeacherScores:
        prompt_ids = {"teacher": self._tokenize_teacher_prompts([c.teacher for c in contexts])}
        if self.loss_settings.target == "purified" or self._has_custom_target:
            prompt_ids["base"] = _unpad(output["prompt_ids"], output["prompt_mask"])  # the very ids the student saw
        if "base" in prompt_ids or self.decomposition_monitor.due:
            prompt_ids["reference_only"] = self._tokenize_teacher_prompts([c.reference_only for c in contexts])
        completion_ids = _unpad(output["completion_ids"], output["completion_mask"])
        return self.scoring_callback.score(prompt_ids, completion_ids)

    def scoring_batches(
        self, prompt_ids: dict[str, list[list[int]]], completion_ids: list[list[int]]
    ) -> list[ScoringBatch]:
        """
        Arranges the sequences of a generation batch for scoring. Every process must call it.

        Args:
            prompt_ids (`dict[str, list[list[int]]]`):
                Prompt ids of the B rows, by context.
            completion_ids (`list[list[int]]`):
                Completion ids of the B rows.

        Returns:
            `list[ScoringBatch]`: with the same number of forwards on every process.
        """
        return self.purification_collator.scoring_batches(
            prompt_ids, completion_ids, share_prefixes=self._shares_prefixes(prompt_ids), agree=self._most_forwards
        )

    def _shares_prefixes(self, prompt_ids: dict[str, list[list[int]]]) -> bool:
        if self._unshareable is None or not self.args.share_reference_prefix:
            return self.args.share_reference_prefix
        if self.purification_collator.shared_prefixes(prompt_ids):
            logger.warning_once(
                f"Teacher and reference-only prompts begin alike but are scored separately: {self._unshareable}."
            )
        return False

    def _most_forwards(self, own: int) -> int:
        """Largest number of forwards of any process."""
        if self.accelerator.num_processes == 1:
            return own
        return int(self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).max())

    def run_inside(self, wrapped: torch.nn.Module, unwrapped: Any, function: Callable[..., Any], *args: Any) -> Any:
        """
        Calls a function inside the forward of a wrapped model, where DDP, FSDP or DeepSpeed gather its parameters.

        Args:
            wrapped (`torch.nn.Module`):
                What DDP, FSDP or DeepSpeed made of the model, or the model itself.
            unwrapped (`torch.nn.Module`):
                The model.
            function (`Callable`):
                Function to call with `args`.

        Returns:
            What the function returns.
        """
        return self._forward_redirection(wrapped, unwrapped, function, *args)

    # Loss ------------------------------------------------------------------------------------------------------------

    def target_logits(self, teacher: torch.Tensor, reference_only: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """
        Target of the distillation for one chunk of tokens. Override it to distil towards another target.

        An override is called with dense logits (fp32, after temperature, without gradient) chunk by chunk, in place of
        the fused path; memory stays bounded.

        Args:
            teacher (`torch.Tensor` of shape `[N, V]`):
                Logits with question and reference in context.
            reference_only (`torch.Tensor` of shape `[N, V]`):
                Logits with the reference alone in context.
            base (`torch.Tensor` of shape `[N, V]`):
                Logits with the question alone in context.

        Returns:
            `torch.Tensor` of shape `[N, V]`: unnormalised log-probabilities.
        """
        if self.args.target == "teacher":
            return teacher
        return purified_target_logits(
            teacher,
            reference_only,
            base,
            pmi_beta=self.args.pmi_beta,
            pmi_clip=self.args.pmi_clip,
            pmi_center=self.args.pmi_center,
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        outputs = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # After the wrapped forward, where a collective cannot get between those of FSDP or DeepSpeed
        mode = "train" if self.model.training else "eval"
        sums, seconds = reduce_loss_sums(self._loss_sums, self.accelerator)
        self._token_means[mode].add(sums)
        self._token_means[mode].add(self.decomposition_monitor.collect(self.accelerator))
        self._metrics[mode]["timing/loss_seconds"].append(seconds)
        return outputs

    def _compute_loss(
        self,
        unwrapped_student: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        loss_mask = _loss_mask(inputs)
        # TRL enters the backbone directly, past the autocast that accelerate puts around `forward`
        with self.accelerator.autocast():
            student_hidden = last_hidden_states(
                unwrapped_student, input_ids, attention_mask, inputs["completion_ids"].size(1)
            )
            student_head = LMHead.from_model(unwrapped_student)
            device = student_head.weight.device
            valid = loss_mask.to(device).bool()
            num_tokens = valid.sum()
            frozen_head = self.scoring_callback.frozen_head(unwrapped_student)
            self.decomposition_monitor.measure(student_hidden, student_head, frozen_head, inputs)
            normalizer = num_tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            weights = (1.0 / torch.as_tensor(normalizer, dtype=torch.float32, device=device)).expand(int(num_tokens))
            student_states, frozen_states = student_hidden.to(device)[valid], _frozen_states(inputs, valid)
            started = clock(device)
            result = token_loss(
                student_states,
                student_head,
                frozen_states,
                frozen_head,
                weights,
                self.loss_settings,
                labels=inputs["completion_ids"].to(device)[valid],
                target_logits=self.target_logits if self._has_custom_target else None,
            )
        self._loss_sums = loss_sums(result, num_tokens, clock(device) - started)
        return result.loss, result.student_entropy.sum(), num_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].update({name: [mean] for name, mean in self._token_means[mode].flush().items()})
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        """No network call that the user did not ask for: TRL's usage ping is not sent."""


def _named_datasets(
    train_dataset: AnyDataset | None, eval_dataset: AnyDataset | dict[str, AnyDataset] | None
) -> Iterator[tuple[str, AnyDataset]]:
    if train_dataset is not None:
        yield "train_dataset", train_dataset
    if isinstance(eval_dataset, Mapping):
        yield from ((f"eval_dataset[{key!r}]", dataset) for key, dataset in eval_dataset.items())
    elif eval_dataset is not None:
        yield "eval_dataset", eval_dataset


def _unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


def _loss_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """`[B, C]`: 1 at the tokens that the student wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _frozen_states(inputs: dict[str, Any], valid: torch.Tensor) -> FrozenStates:
    """Picks the frozen states of the tokens that carry loss; `valid` is `[B, C]`."""
    states = {}
    for name in ("base", "delta", "teacher", "reference_only"):
        hidden = inputs.get(f"{name}_hidden")  # [B, <= C, H]: scored without the padding of `pad_to_multiple_of`
        if hidden is not None:
            kept = valid[:, : hidden.shape[1]]
            states[name] = hidden[kept.to(hidden.device)].to(valid.device)
    return FrozenStates(**states)
