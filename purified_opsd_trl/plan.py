"""What a run needs, by its settings: processes, memory and time, estimated by the arithmetic of `estimate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from trl import ModelConfig

from .config import PurifiedOPSDConfig
from .errors import InputError
from .estimate import Machine, Model, Step, simulate
from .memory import Kept, memory


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

    def __str__(self) -> str:
        sharding = f"ZeRO-{self.stage}" if self.deepspeed else "FSDP2" if self.stage else "nothing sharded"
        return f"{self.gpus} process{'es' * (self.gpus > 1)}, {sharding}"


@dataclass(frozen=True)
class Plan:
    """
    A run before it starts.

    Attributes:
        args ([`PurifiedOPSDConfig`]), model_args ([`~trl.ModelConfig`]):
            Its settings.
        layout ([`Layout`]):
            Its processes.
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the model.
        weights, trainable (`int`):
            Weights of the model without adapter, and those that are trained.
    """

    args: PurifiedOPSDConfig
    model_args: ModelConfig
    layout: Layout
    config: Any
    weights: int
    trainable: int

    def memory(self, tokens: list[int]) -> str:
        """
        Peak memory per GPU in words.

        Args:
            tokens (`list[int]`):
                Longest prompt of the student and of the teacher.

        Returns:
            `str`

        Raises:
            `InputError`: if it exceeds what the GPU of this machine has. Without a GPU nothing is compared.
        """
        args, kind = self.args, self.args.teacher_model_kind
        full = self.trainable == self.weights
        kept = Kept(
            weights=self.weights,
            trainable=self.trainable,
            weight_bytes=self._weight_bytes(),
            stage=self.layout.stage,
            deepspeed=self.layout.deepspeed,
            frozen_copy=full and kind != "live",
            average=kind == "ema",
        )
        parts = memory(self._model(), self._step(tokens), self._machine(), kept, args.loss_memory_budget)
        share = args.vllm_gpu_memory_utilization if args.use_vllm and args.vllm_mode == "colocate" else 0.0
        needed = sum(parts.values())
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        text = f"about {needed / 1e9:.1f} GB per GPU" + f" ({listed})" * bool(listed)
        if share:
            text += f", beside {share:.0%} of the GPU for vLLM"
        if not torch.cuda.is_available():
            return f"{text}; there is no GPU here to compare with"
        total = torch.cuda.get_device_properties(0).total_memory
        if needed > total * (1 - share * (not args.vllm_enable_sleep_mode)):
            raise InputError(
                f"{text}, but the GPU has {total / 1e9:.1f} GB. Shard with `--accelerate_config`, or lower "
                "`per_device_train_batch_size` (with more accumulation), `scoring_token_budget` or vLLM's share."
            )
        return f"{text}, of {total / 1e9:.1f} GB"

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
        costs = simulate(self._model(), step, self._machine())
        epochs = self.args.num_train_epochs * rows / step.rows
        steps = self.args.max_steps if self.args.max_steps > 0 else round(epochs)
        seconds = sum(cost.seconds for cost in costs)
        phases = ", ".join(f"{cost.name} {cost.seconds:.2g}" for cost in costs)
        return (
            f"about {steps * seconds / 3600:.2g} hours on H100 GPUs: {steps:,} steps of {seconds:.2g} s ({phases}). "
            "Evaluation on AIME24, AIME25 and HMMT25 adds about 1.5 hours per model at 3,000 tokens per second"
        )

    def _model(self) -> Model:
        try:
            return Model.of_config(self.config)
        except AttributeError as error:
            raise InputError(
                f"no estimate for {self.config.model_type}: its configuration is of another kind ({error})."
            ) from None

    def _weight_bytes(self) -> float:
        if self.model_args.load_in_4bit or self.model_args.load_in_8bit:
            return 0.5 if self.model_args.load_in_4bit else 1.0
        dtype = self.model_args.dtype
        name = str(self.config.dtype if dtype == "auto" else dtype)
        return 2.0 if name.removeprefix("torch.") in ("bfloat16", "float16") else 4.0

    def _machine(self) -> Machine:
        half = self.args.bf16 or self.args.fp16 or self._weight_bytes() <= 2
        return Machine(gpus=self.layout.gpus, bytes_per_weight=2 if half else 4, sharded=self.layout.stage == 3)

    def _step(self, tokens: list[int]) -> Step:
        args, per_device = self.args, self.args.per_device_train_batch_size
        return Step(
            rows=per_device * args.gradient_accumulation_steps * self.layout.gpus,
            question=tokens[0],
            reference=max(0, tokens[1] - tokens[0]),
            completion=args.max_completion_length,
            target=args.target,
            lora=self.trainable < self.weights,
            checkpointing=args.gradient_checkpointing,
            trainable_head=self.trainable == self.weights,
            micro_batch=per_device,
            scoring_batch=args.scoring_batch_size or per_device,
            scoring_tokens=args.scoring_token_budget or 0,
            vllm=args.use_vllm,
        )
