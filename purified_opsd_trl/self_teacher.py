"""
Weights of the self-teacher: where they come from, how they are sharded, how they follow the student.

| | LoRA | full fine-tuning |
|---|---|---|
| `base` | the student under the disabled adapter | a frozen copy, sharded like the student |
| `live` | the student | the student |
| `ema` | averaged adapter weights, in the student's place while it scores | a frozen copy that follows the student |
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from trl.models import prepare_deepspeed
from trl.trainer.utils import create_model_from_path

from .collator import ScoringBatch
from .config import PurifiedOPSDConfig
from .errors import InputError
from .multimodal import Fields
from .offload import HostCopies
from .packing import Packing


logger = logging.getLogger(__name__)

# LoRA initializations that also change the base weights: with the adapter disabled they are not the initial policy
INITS_THAT_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class StudentTrainer(Protocol):
    """What the self-teacher may touch of the trainer that it scores for."""

    args: PurifiedOPSDConfig
    accelerator: Accelerator
    model: Any
    model_wrapped: Any
    state: TrainerState
    temperature: float
    is_deepspeed_enabled: bool
    host_copies: HostCopies

    def add_callback(self, callback: TrainerCallback) -> None:
        """Adds a callback to the trainer's."""

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

    def packing(self, wrapped: torch.nn.Module, model: Any) -> Packing | None:
        """When a model packs; `None` where it pads."""

    def run_inside(self, wrapped: torch.nn.Module, unwrapped: Any, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function inside the forward of a wrapped model, where sharded parameters are gathered."""


# Loading and sharding ------------------------------------------------------------------------------------------------


def load_frozen_copy(trainer: StudentTrainer, model_path: str | None) -> Any:
    """
    Loads a second model that scores: `teacher_model_name_or_path`, else what the student was loaded from.

    Returns what DeepSpeed or FSDP made of it, sharded like the student and without optimizer state.
    """
    teacher = _load(trainer, model_path)
    student_vocab = trainer.model.config.get_text_config().vocab_size
    teacher_vocab = teacher.config.get_text_config().vocab_size
    if student_vocab != teacher_vocab:
        raise InputError(
            f"The student has a vocabulary of {student_vocab} tokens but the teacher has {teacher_vocab}. The "
            "divergence needs one vocabulary: take a teacher of the same family, or the student's own weights by "
            "leaving `teacher_model_name_or_path` unset."
        )
    teacher.requires_grad_(False)
    teacher.eval()
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(teacher, trainer.accelerator)
    if trainer.accelerator.is_fsdp2:
        return _shard_with_fsdp2(teacher, trainer.accelerator)
    return trainer.accelerator.prepare_model(teacher, evaluation_mode=True)


def _load(trainer: StudentTrainer, model_path: str | None) -> PreTrainedModel:
    args = trainer.args
    if args.teacher_model_name_or_path is not None:
        model_path = args.teacher_model_name_or_path
        kwargs: dict[str, Any] = {**(args.teacher_model_init_kwargs or {})}  # type: ignore[dict-item]
        if args.teacher_model_revision is not None:
            kwargs.setdefault("revision", args.teacher_model_revision)
    else:
        kwargs = {**(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    if model_path is None:
        if any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()):
            raise InputError(
                "Under ZeRO-3 a frozen copy cannot be taken from a model instance, whose weights are sharded. "
                "Pass the model id or path instead of the instance, or set `teacher_model_name_or_path`."
            )
        return copy.deepcopy(trainer.model)
    if trainer.accelerator.num_processes > 1 or trainer.is_deepspeed_enabled:
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(model_path, **kwargs)


def _shard_with_fsdp2(teacher: PreTrainedModel, accelerator: Accelerator) -> Any:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = accelerator.state.fsdp_plugin
    # Preparing a model stores its layer classes in the plugin; the student, prepared later, must find its own
    before = (plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap)
    try:
        return fsdp2_prepare_model(accelerator, teacher)
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = before


# Combinations that cannot work ---------------------------------------------------------------------------------------


def check_arguments(args: PurifiedOPSDConfig, teacher_model: Any) -> None:
    """Refuses arguments of TRL's trainer that a self-teacher cannot honor."""
    if not isinstance(args, PurifiedOPSDConfig):
        raise InputError(f"`args` must be a PurifiedOPSDConfig, got {type(args).__name__}.")
    if teacher_model is not None:
        raise InputError(
            "The model is its own teacher, so `teacher_model` is not taken. To score with other weights, set "
            "`teacher_model_name_or_path` in the config, or pass a `scoring_callback` that overrides `frozen_model`."
        )
    if args.teacher_model_name_or_path is None:
        for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
            if getattr(args, name) is not None:
                raise InputError(
                    f"`{name}` has no effect without `teacher_model_name_or_path`. The self-teacher is loaded like "
                    "the student: set `model_init_kwargs`, or name the teacher."
                )
    if dict(args.generation_kwargs or {}).get("num_return_sequences", 1) != 1:  # type: ignore[arg-type]  # parsed by now
        raise InputError(
            "`generation_kwargs`: one completion is sampled per prompt, so `num_return_sequences` must be 1. Repeat "
            "rows of the dataset to sample several."
        )


def check_combination(trainer: StudentTrainer, is_peft: bool) -> None:
    """Refuses what cannot work, before anything is sharded, and names the nearest combination that works."""
    state, kind = trainer.accelerator.state, trainer.args.teacher_model_kind
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise InputError(
            "FSDP version 1 flattens the parameters of a layer into one, so neither the output head nor a frozen "
            "copy can be read separately. Set `fsdp_version: 2`, as recipes/accelerate_configs/fsdp2.yaml does."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise InputError(
            "Context and sequence parallelism split a sequence between processes, but scoring needs complete "
            "sequences. Use ZeRO-3 or FSDP2 with `gradient_checkpointing` and a smaller `scoring_token_budget`."
        )
    if kind == "base" and is_peft and trainer.args.teacher_model_name_or_path is None:
        _check_adapter_can_be_disabled(trainer.model)
    if kind == "ema":
        _check_ema(trainer, is_peft)


def _check_ema(trainer: StudentTrainer, is_peft: bool) -> None:
    head = trainer.model.get_output_embeddings()
    if is_peft and any(parameter.requires_grad for parameter in head.parameters()):
        raise InputError(
            "`teacher_model_kind: ema` averages what the adapter trains, but here the output head is trained "
            "too (`modules_to_save`), and the loss needs the student's and the averaged head at once. Take the head "
            "out of `modules_to_save`, or set `teacher_model_kind: base`."
        )
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return
    zero = plugin.deepspeed_config["zero_optimization"]
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise InputError(
            "`teacher_model_kind: ema` updates the weights in memory, but `offload_param` puts them on NVMe. Set its "
            "`device` to `cpu`, or `teacher_model_kind: base`."
        )
    if zero.get("zero_hpz_partition_size", 1) > 1 or zero.get("zero_quantized_weights", False):
        raise InputError(
            "`teacher_model_kind: ema` updates the shards of ZeRO-3, but ZeRO++ (`zero_hpz_partition_size`, "
            "`zero_quantized_weights`) keeps a second copy of them. Remove these keys, or set `teacher_model_kind: "
            "base`."
        )


def _check_adapter_can_be_disabled(model: Any) -> None:
    """Refuses adapters under which a disabled adapter is not the initial policy; warns where it may not be."""
    for name, config in model.peft_config.items():
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(INITS_THAT_MOVE_THE_BASE):
            raise InputError(
                f"`init_lora_weights={init!r}` of adapter `{name}` changes the base weights, so the model under the "
                "disabled adapter is not the initial policy. Use the default initialization, or set "
                "`teacher_model_name_or_path` to the original model."
            )
        if getattr(config, "bias", "none") != "none":
            raise InputError(
                f"`bias={config.bias!r}` of adapter `{name}` trains biases of the base model, which disabling the "
                "adapter does not restore. Set `bias` to 'none', or `teacher_model_name_or_path` to the original "
                "model."
            )
    trained = any(p.any() for n, p in model.named_parameters() if "lora_B" in n and p.numel() and not p.is_meta)
    if trained:
        logger.warning(
            "The model already holds a trained adapter. `teacher_model_kind: base` takes the weights under the "
            "disabled adapter, not the model as passed. To anchor on the model as passed, merge its adapter first."
        )


# Exponential moving average ------------------------------------------------------------------------------------------


class EMATeacher(TrainerCallback):
    """
    Exponential moving average of the weights that the student trains.

    ```text
    average <- average + teacher_update_rate * (student - average)     every `teacher_sync_steps` optimizer steps
    ```

    It starts at the initial policy. Each process averages its own shard of each parameter, so that nothing is
    gathered. The average is kept in fp32: in bf16 a small step times the update rate would round to zero.

    Args:
        trainer ([`StudentTrainer`]):
            The trainer.
        teacher (`torch.nn.Module`, *optional*):
            Frozen copy that holds the averaged weights; `None` if they take the student's place for scoring.
    """

    def __init__(self, trainer: StudentTrainer, teacher: Any | None):
        self.trainer = trainer
        self.teacher = teacher
        self.averages: dict[str, torch.Tensor] = {}  # local shards by parameter name, fp32

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts at the initial policy, unless training is resumed."""
        if not self.averages:
            self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Follows the student."""
        if state.global_step % args.teacher_sync_steps != 0:
            return
        with torch.no_grad():
            for name, student in _shards(self._student()).items():
                if name in self.averages:
                    self.averages[name].lerp_(student.float(), args.teacher_update_rate)
        self._publish()

    @contextmanager
    def in_place_of(self, student: Any) -> Iterator[None]:
        """Puts the averaged weights into the unwrapped student, and its own back, bit for bit, on leaving."""
        shards = _shards(student)
        own = {name: shards[name].clone() for name in self.averages}
        _write(self.averages, shards)
        try:
            yield
        finally:
            _write(own, _shards(student))  # drops what was gathered from the averages in between

    def save(self, checkpoint: str) -> None:
        """Writes the averages: one file per process where weights are sharded, one file elsewhere."""
        if self._is_sharded() or self.trainer.args.should_save:
            save_file({name: shard.cpu() for name, shard in self.averages.items()}, self._file(checkpoint))

    def load(self, checkpoint: str) -> None:
        """Restores the averages; refuses those of another kind of teacher or another number of processes."""
        file = self._file(checkpoint)
        if not file.is_file():
            raise InputError(
                f"{checkpoint} holds no {file.name}: it was written with another `teacher_model_kind`, or with "
                "another number of processes or kind of sharding. Resume with the settings it was written with."
            )
        self._start()
        saved = load_file(file)
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in self.averages.items()}:
            raise InputError(
                f"{file} holds other weights or shards than these settings train; resume with those of it."
            )
        _write(saved, self.averages)
        self._publish()

    def _start(self) -> None:
        model = self._student() if self.teacher is None else self.trainer.accelerator.unwrap_model(self.teacher)
        trained = {_plain(name) for name, p in self._student().named_parameters() if p.requires_grad}
        self.averages = {n: shard.float().clone() for n, shard in _shards(model).items() if n in trained}

    def _publish(self) -> None:
        if self.teacher is not None:
            _write(self.averages, _shards(self.trainer.accelerator.unwrap_model(self.teacher)))

    def _student(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)

    def _is_sharded(self) -> bool:
        return any(hasattr(p, "ds_tensor") or isinstance(p, DTensor) for p in self._student().parameters())

    def _file(self, checkpoint: str) -> Path:
        accelerator = self.trainer.accelerator
        part = f"_{accelerator.process_index}_of_{accelerator.num_processes}" if self._is_sharded() else ""
        return Path(checkpoint) / f"ema_teacher{part}.safetensors"


def _shards(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """This process's part of each parameter, as views; gathered copies, which would not follow, are dropped first."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters: dict[str, Any] = {_plain(name): parameter for name, parameter in model.named_parameters()}
    gathered = [p for p in parameters.values() if hasattr(p, "ds_status") and p.ds_status.name == "AVAILABLE"]
    if gathered:
        gathered[0].partition(gathered)
    return {name: _shard(parameter) for name, parameter in parameters.items()}


def _shard(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor.data
    local: Any = parameter.detach()
    return local.to_local() if isinstance(local, DTensor) else local


def _plain(name: str) -> str:
    """Name of a parameter without what activation checkpointing by FSDP adds."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _write(values: dict[str, torch.Tensor], shards: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            shards[name].copy_(value)
