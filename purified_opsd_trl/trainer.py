"""
`PurifiedOPSDTrainer`: wires the stages together and inherits everything else from TRL.

```text
row -> contexts -> (TRL rollout) -> collator -> scoring -> loss -> metrics
```
"""

import textwrap
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import DistillationTrainer
from trl.trainer.utils import get_config_model_id

from .accumulating import AccumulatingTrainer
from .backbone import longest_alike
from .checkpoints import ReliableTrainer
from .collator import PurificationCollator, ScoringBatch, unpad
from .config import PurifiedOPSDConfig
from .contexts import Contexts
from .dataset import AnyDataset, check_columns
from .extras import require_extra
from .markers import MarkerCounter, TokenClassifier
from .model_card import DescribingTrainer
from .monitoring.console import console_callbacks
from .monitoring.decomposition import DecompositionMonitor
from .monitoring.epistemic import EpistemicMonitor
from .monitoring.metrics import generation_metrics, scoring_metrics, warn_of_unused_vocab
from .monitoring.report import ReportCallback
from .multimodal import Fields
from .packing import Packing
from .parts import loss_mask
from .plan import warn_if_too_large
from .reading import as_datasets, named_datasets
from .references import with_other_references
from .rollout.colocated import merge_without_drift, reserve_vllm_length
from .rollout.colocated_adapter import engine_with_lora, send_adapters
from .rollout.served import ServedTrainer, sends_to_servers, without_trls_client
from .run_identity import check_output_dir
from .scores import TeacherScores
from .scoring import TeacherScoringCallback
from .self_check import CheckedTrainer
from .self_teacher import check_arguments
from .vision import VisionTrainer


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class PurifiedOPSDTrainer(
    ReliableTrainer,
    VisionTrainer,
    ServedTrainer,
    CheckedTrainer,
    AccumulatingTrainer,
    DescribingTrainer,
    DistillationTrainer,
):
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

    `args.target="teacher"` distills `pi_T` itself: plain OPSD, the baseline, by the same code path.

    Made to be overridden: [`~PurifiedOPSDTrainer.build_contexts`], [`~PurifiedOPSDTrainer.target_logits`], and the
    methods of a [`TeacherScoringCallback`] passed as `scoring_callback`.

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
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`] or list of `dict`):
            Dataset with the columns `"prompt"` and `args.reference_column`, each text or messages; images are in
            `"image"` or `"images"`, or in the messages.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Dataset(s) to evaluate on, with the same columns.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer, or processor of a vision-language model. If `None`, it is loaded from the model's name.
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
        teacher_model (`None`, *optional*):
            Refused: the model is its own teacher.
    """

    args: PurifiedOPSDConfig
    model: Any  # a PreTrainedModel or PeftModel; transformers' annotation admits None

    _tag_names = ["trl", "purified-opsd"]
    _name = "Purified OPSD"
    _paper = {
        "title": "Purified OPSD: On-Policy Self-Distillation Without Losing How to Think",
        "id": "2607.02234",
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
        teacher_model: None = None,
    ):
        args = _default_args(model) if args is None else args
        check_arguments(args, teacher_model)
        train_dataset, eval_dataset = as_datasets(train_dataset, eval_dataset)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_columns(dataset, name, args.reference_column)  # before the model is loaded
        train_dataset = with_other_references(train_dataset, args, "train_dataset")
        eval_dataset = with_other_references(eval_dataset, args, "eval_dataset")
        check_output_dir(str(args.output_dir))
        if args.use_vllm and not sends_to_servers(args):
            require_extra("vllm", "`use_vllm`")

        self.args = args  # `build_contexts` reads it
        named = named_datasets(train_dataset, eval_dataset)
        reserve_vllm_length(args, model, processing_class, named, self.build_contexts, tools)
        self.scoring_callback = scoring_callback or TeacherScoringCallback()
        with without_trls_client(args), engine_with_lora(args, model, peft_config):
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
        if self._is_vlm:
            self._tokenizer.padding_side = "left"  # TRL pads prompts on the left, but types of tokens on this side
        if args.use_vllm and not sends_to_servers(args) and is_peft_model(self.model):
            (send_adapters if args.vllm_adapter_sync else merge_without_drift)(self.vllm_generation)
        self.purification_collator = purification_collator or self._default_collator()
        self.set_up_loss()
        self._add_monitors()
        self.read_datasets()
        self.scoring_callback.attach(self, model if isinstance(model, str) else None)
        self.purification_collator.alone_beyond = self._longest_alike()
        warn_if_too_large(self)
        self.connect_servers()

    def _default_collator(self) -> PurificationCollator:
        return PurificationCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            max_sequences=self.args.scoring_batch_size or self.args.per_device_train_batch_size,
            max_tokens=self.args.scoring_token_budget,
            pad_to_multiple_of=self.pad_to_multiple_of,  # "auto" is resolved by the config
        )

    def _longest_alike(self) -> int | None:
        """The shortest `longest_alike` of the models that run."""
        models = [self.accelerator.unwrap_model(m) for m in (self.model, self.scoring_callback.teacher_model) if m]
        return min((limit for limit in map(longest_alike, models) if limit is not None), default=None)

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
        ids = unpad(output["completion_ids"], loss_mask(output))
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        # Looked up, as a resumed run may hold other instances than the ones that were added
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EpistemicMonitor):
                self._token_means[mode].add(callback.observe(texts, ids, self.accelerator, mode == "train"))
            elif isinstance(callback, ReportCallback) and mode == "train":
                prompts = [row["prompt"] for row in rows]
                callback.observe(self.state.global_step, prompts, texts, self.last_rollout)

    # Rollout and scoring ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        contexts = self.reader.contexts(inputs, f"step {self.state.global_step}, generation batch")
        self.check_model()
        inputs = [self.rollout_row(row, context.base) for row, context in zip(inputs, contexts, strict=True)]
        if mode == "train":
            self._buffered_inputs = None  # those of the last step: nothing reads them any more
        started = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        seconds = time.perf_counter() - started
        self._metrics[mode]["timing/generation_seconds"].append(seconds)
        self._token_means[mode].add(generation_metrics(loss_mask(output), seconds, self.accelerator))
        self._observe(inputs, output, mode)
        if self.args.mask_truncated_completions:
            self.mask_truncated(output)

        scores = self._score(contexts, output)
        dtype = torch.get_autocast_dtype(self.accelerator.device.type) if self.accelerator.native_amp else None
        output.update(self.purification_collator.training_tensors(scores.hidden, self._states, dtype))
        if self.decomposition_monitor.due:
            output.update(
                self.decomposition_monitor.sample(
                    scores,
                    output["completion_ids"],
                    loss_mask(output),
                    process=self.accelerator.process_index,
                    total=int(output["num_items_in_batch"]),
                )
            )
        for name, value in scoring_metrics(scores.stats, self.accelerator).items():
            self._metrics[mode][name].append(value)
        return output

    def _score(self, contexts: list[Contexts], output: dict[str, Any]) -> TeacherScores:
        prompts = {"teacher": [c.teacher for c in contexts]}
        if "base" in self._states:
            prompts["base"] = [c.base for c in contexts]
        if "wrong" in self._states:
            prompts["wrong"] = [c.wrong for c in contexts if c.wrong is not None]
        if {"reference_only", "delta"} & {*self._states} or self.decomposition_monitor.due:
            prompts["reference_only"] = [c.reference_only for c in contexts]
        completion_ids = unpad(output["completion_ids"], output["completion_mask"])
        prompt_ids, fields = self.encode_contexts(prompts, completion_ids, output)
        if "base" in prompts:
            prompt_ids["base"] = unpad(output["prompt_ids"], output["prompt_mask"])  # the very ids the student saw
        if fields is None:
            return self.scoring_callback.score(prompt_ids, completion_ids)
        return self.scoring_callback.score(prompt_ids, completion_ids, fields)

    def scoring_batches(
        self,
        prompt_ids: dict[str, list[list[int]]],
        completion_ids: list[list[int]],
        share_prefixes: bool = False,
        packing: Packing | None = None,
        chunk: bool = False,
        fields: dict[str, list[Fields]] | None = None,
    ) -> list[ScoringBatch]:
        """Arranges sequences for scoring, in the same number of forwards on every process."""
        own = {} if fields is None else {"fields": fields}  # a collator that knows no images keeps working
        return self.purification_collator.scoring_batches(
            prompt_ids, completion_ids, share_prefixes, self.agree_on, packing=packing, chunk=chunk, **own
        )

    def run_inside(self, wrapped: torch.nn.Module, unwrapped: Any, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function inside the forward of what DDP, FSDP or DeepSpeed made of a model."""
        # In a tuple, since ZeRO-3 takes apart what a forward returns and cannot do that to a number
        return self._forward_redirection(wrapped, unwrapped, lambda *own: (function(*own),), *args)[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        means = self._token_means[mode].flush()
        self._metrics[mode].update({name: [mean] for name, mean in means.items()})
        warn_of_unused_vocab(means)
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        """No network call that the user did not ask for: TRL's usage ping is not sent."""


def _default_args(model: Any) -> PurifiedOPSDConfig:
    """The configuration of a trainer that was given none."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return PurifiedOPSDConfig(f"{name.split('/')[-1]}-Purified-OPSD")
