"""What a run needs, by its settings: processes, memory and time, estimated by the arithmetic of `estimate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers.utils import logging
from trl import ModelConfig

from .config import PurifiedOPSDConfig
from .errors import InputError
from .estimate import Machine, Model, Step, simulate
from .head import softcap
from .loss import required_states
from .memory import Kept, fitting, memory


logger = logging.get_logger(__name__)

_SAMPLE = 256  # rows whose prompts are measured


@dataclass(frozen=True)
class Layout:
    """
    The processes of a run.

    Attributes:
        gpus (`int`):
            Number of processes, each with one GPU.
        stage (`int`):
            ZeRO stage. 0 shards nothing, FSDP2 counts as 3.
        deepspeed (`bool`):
            Whether DeepSpeed shards.
    """

    gpus: int = 1
    stage: int = 0
    deepspeed: bool = False

    @classmethod
    def of_launcher(cls, arguments: list[str]) -> "Layout":
        """Reads options of `accelerate launch` and the file that they name."""
        options = launch_command_parser().parse_args([*arguments, "-m", "purified_opsd_trl.train"])
        file = yaml.safe_load(Path(options.config_file).read_text(encoding="utf-8")) if options.config_file else {}
        kind = file.get("distributed_type")
        gpus = options.num_processes or file.get("num_processes") or max(1, torch.accelerator.device_count())
        if options.use_deepspeed or kind == "DEEPSPEED":
            return cls(gpus, int(options.zero_stage or file.get("deepspeed_config", {}).get("zero_stage", 2)), True)
        return cls(gpus, 3 if options.use_fsdp or kind == "FSDP" else 0)

    @classmethod
    def of_accelerator(cls, accelerator: Any) -> "Layout":
        """The processes of a run that has begun."""
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:
            return cls(accelerator.num_processes, int(plugin.zero_stage), True)
        return cls(accelerator.num_processes, 3 if getattr(accelerator.state, "fsdp_plugin", None) is not None else 0)

    def __str__(self) -> str:
        sharding = f"ZeRO-{self.stage}" if self.deepspeed else "FSDP2" if self.stage else "nothing sharded"
        return f"{self.gpus} process{'es' * (self.gpus > 1)}, {sharding}"


@dataclass(frozen=True)
class Plan:
    """
    A run before it starts.

    Attributes:
        args ([`PurifiedOPSDConfig`]):
            Its settings.
        layout ([`Layout`]):
            Its processes.
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the model.
        weights, trainable (`int`):
            Weights of the model without adapter, and those that are trained.
        weight_bytes (`float`):
            Bytes per weight of the model.
    """

    args: PurifiedOPSDConfig
    layout: Layout
    config: Any
    weights: int
    trainable: int
    weight_bytes: float

    def memory(self, tokens: list[int], available: int | None = None) -> str:
        """
        Peak memory per GPU in words.

        Args:
            tokens (`list[int]`):
                Longest prompt of the student and of the teacher.
            available (`int`, *optional*):
                Bytes of a GPU. `None` takes those of this machine's; without a GPU nothing is compared.

        Returns:
            `str`

        Raises:
            `InputError`: if it exceeds `available`. The message says which settings would fit.
        """
        args = self.args
        counted = self.model(), self._step(tokens), self._machine(), self._kept(), args.loss_memory_budget
        parts = memory(*counted)
        share = args.vllm_gpu_memory_utilization if args.use_vllm and args.vllm_mode == "colocate" else 0.0
        needed = sum(parts.values())
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        text = f"about {needed / 1e9:.1f} GB per GPU" + f" ({listed})" * bool(listed)
        if share:
            text += f", beside {share:.0%} of the GPU for vLLM"
        if available is None and torch.cuda.is_available():
            available = torch.cuda.get_device_properties(0).total_memory
        if available is None:
            return f"{text}; there is no GPU here to compare with"
        room = available * (1 - share * (not args.vllm_enable_sleep_mode))
        if needed > room:
            changes = fitting(*counted, room)
            lower = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in (changes or {}).items())
            raise InputError(
                f"needs {text}, but the GPU has {available / 1e9:.1f} GB. "
                + (f"Set {lower}." if lower else "Shard with `--accelerate_config`, or lower `max_completion_length`.")
            )
        return f"{text}, of {available / 1e9:.1f} GB"

    def _kept(self) -> Kept:
        full, kind = self.trainable == self.weights, self.args.teacher_model_kind
        return Kept(
            weights=self.weights,
            trainable=self.trainable,
            weight_bytes=self.weight_bytes,
            stage=self.layout.stage,
            deepspeed=self.layout.deepspeed,
            frozen_copy=full and kind != "live",
            average=kind == "ema",
        )

    def time(self, tokens: list[int], rows: int) -> str:
        """
        Time of training and evaluation in words.

        Args:
            tokens (`list[int]`):
                Mean prompt of the student and of the teacher.
            rows (`int`):
                Rows of the dataset.

        Returns:
            `str`
        """
        step = self._step(tokens)
        costs = simulate(self.model(), step, self._machine())
        epochs = self.args.num_train_epochs * rows / step.rows
        steps = self.args.max_steps if self.args.max_steps > 0 else round(epochs)
        seconds = sum(cost.seconds for cost in costs)
        phases = ", ".join(f"{cost.name} {cost.seconds:.2g}" for cost in costs)
        return (
            f"about {steps * seconds / 3600:.2g} hours on H100 GPUs: {steps:,} steps of {seconds:.2g} s ({phases}). "
            "Evaluation on AIME24, AIME25 and HMMT25 adds about 1.5 hours per model at 3,000 tokens per second"
        )

    def model(self) -> Model:
        """Dimensions of the model."""
        try:
            return Model.of_config(self.config)
        except AttributeError as error:
            raise InputError(
                f"no estimate for {self.config.model_type}: its configuration is of another kind ({error})."
            ) from None

    def _scores_difference(self) -> bool:
        linear = softcap(self.config.get_text_config()) is None
        return "delta" in required_states(self.args.loss_settings, linear, custom_target=False)

    def _machine(self) -> Machine:
        half = self.args.bf16 or self.args.fp16 or self.weight_bytes <= 2
        return Machine(gpus=self.layout.gpus, bytes_per_weight=2 if half else 4, sharded=self.layout.stage == 3)

    def _step(self, tokens: list[int]) -> Step:
        args, per_device = self.args, self.args.per_device_train_batch_size
        return Step(
            rows=per_device * args.gradient_accumulation_steps * self.layout.gpus,
            question=tokens[0],
            reference=max(0, tokens[1] - tokens[0]),
            completion=args.max_completion_length,
            target=args.target,
            difference=self._scores_difference(),
            lora=self.trainable < self.weights,
            checkpointing=args.gradient_checkpointing,
            trainable_head=self.trainable == self.weights,
            micro_batch=per_device,
            scoring_batch=args.scoring_batch_size or per_device,
            scoring_tokens=args.scoring_token_budget or 0,
            train_tokens=args.train_token_budget or 0,
            offload=args.offload_scores,
            vllm=args.use_vllm,
        )


def weight_bytes(model_args: ModelConfig, config: Any) -> float:
    """Bytes per weight of a model that is loaded as `model_args` say."""
    if model_args.load_in_4bit or model_args.load_in_8bit:
        return 0.5 if model_args.load_in_4bit else 1.0
    name = str(config.dtype if model_args.dtype == "auto" else model_args.dtype)
    return 2.0 if name.removeprefix("torch.") in ("bfloat16", "float16") else 4.0


def warn_if_too_large(trainer: Any, available: int | None = None) -> None:
    """
    Warns before training if the estimate exceeds what a GPU has. It measures the prompts of some rows.

    Args:
        trainer ([`PurifiedOPSDTrainer`]):
            The trainer, before its model is sharded.
        available (`int`, *optional*):
            Bytes of a GPU. `None` takes those of this machine's; without a GPU nothing is estimated.
    """
    if available is None and torch.cuda.is_available():
        available = torch.cuda.get_device_properties(0).total_memory
    dataset, model = trainer.train_dataset, trainer.model
    if available is None or not isinstance(dataset, Dataset) or not trainer.accelerator.is_main_process:
        return
    sample = [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // _SAMPLE))][:_SAMPLE]
    contexts = trainer.reader.contexts(sample, "train_dataset")
    prompts = [c.base for c in contexts], [c.teacher for c in contexts]
    texts = [[trainer.reader.text(prompt) for prompt in own] for own in prompts]
    longest = [max(map(len, trainer.reader.tokenizer(own, add_special_tokens=False)["input_ids"])) for own in texts]
    sizes = [(getattr(p, "ds_numel", p.numel()), p) for p in model.parameters()]  # ZeRO-3 holds shards
    trained = sum(count for count, p in sizes if p.requires_grad)
    base = [(count, p.element_size()) for count, p in sizes if not (p.requires_grad and is_peft_model(model))]
    weights = sum(count for count, _ in base)
    per_weight = sum(count * size for count, size in base) / weights
    plan = Plan(trainer.args, Layout.of_accelerator(trainer.accelerator), model.config, weights, trained, per_weight)
    try:
        plan.model()
    except InputError:  # of another kind
        return
    try:
        plan.memory(longest, available)
    except InputError as error:
        logger.warning(f"By estimate this run {error}")
