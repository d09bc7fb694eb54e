"""
Training jobs that run alike on one process and on many: `run(job, ...)` builds a trainer, trains, and returns figures.

Imported by the tests (one process) and by `worker.py` (each of several processes).
"""

import contextlib
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.config import REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE

from ..vision import build_processor, build_vlm, image_rows


GLOBAL_BATCH = 4  # rows of an optimizer step, however many processes share them
PROBE = torch.tensor([[65, 66, 67, 97, 98, 99, 100, 101], [72, 73, 74, 75, 76, 77, 78, 79]])  # ids of two sequences


@dataclass(frozen=True)
class Job:
    """
    One run.

    Args:
        name (`str`): folder of its output.
        kind (`str`): `teacher_model_kind`.
        lora (`bool`): whether an adapter is trained.
        data (`str`): `"even"`, one epoch of 16 rows; `"epochs"`, three of them; `"skewed"`, one epoch of 18 rows
            that are 40 times as long on the first process; or `"images"`, 16 rows of which some have an image, and a
            vision-language model.
        stages (`tuple`): what else to do: `"evaluate"`, `"save"` (and reload), `"sample"` (rollouts at random instead
            of greedily), `"checkpoints"` (after every second step), `"die_in_step"` and `"die_in_write"` (the process
            kills itself in its third step, or while it writes its second checkpoint), `"stop_in_step"` (it sends
            itself SIGTERM in its third step), `"nan_in_step"` (the first row of the others' third step scores NaN).
        resume (`str` or `bool`, *optional*): checkpoint to resume from, below the folder of all jobs; `True` finds it.
        output (`str`, *optional*): name of the job whose folder is trained in.
        server (`str`, *optional*): address of a server that writes the rollouts; the learning rate is then such that
            each step changes what it writes.
        ahead (`int`): `rollouts_ahead`.
        parts (`int`, *optional*): micro-batches of a process per step, each packed, in parts of 80 tokens: two of the
            long rows are two parts. One process pads and takes all rows of the step at once.
    """

    name: str
    kind: str = "base"
    lora: bool = True
    data: str = "even"
    stages: tuple[str, ...] = ()
    resume: str | bool | None = None
    output: str | None = None
    server: str | None = None
    ahead: int = 0
    parts: int | None = None


def job_name(kind: str, lora: bool) -> str:
    """`ema-lora` and the like."""
    return f"{kind}-{'lora' if lora else 'full'}"


def rows(data: str) -> Dataset:
    """Additions; in the skewed set the first two of any four rows are long, and two rows are left over."""

    def row(i: int) -> dict[str, Any]:
        long = data == "skewed" and i % GLOBAL_BATCH < GLOBAL_BATCH // 2
        question = f"{'WHAT IS' if long else 'what is'} {i} + {i + 7}?"
        solution = f"{i} + {i + 7} = {2 * i + 7}. " * (40 if long else 1 + i % 3)
        return {"prompt": [{"role": "user", "content": question}], "reference": solution}

    if data == "images":
        seen = [{"images": [row.pop("image")], **row} for row in image_rows(16)]
        return Dataset.from_list([{**row, "images": None} if i % 3 == 1 else row for i, row in enumerate(seen)])
    return Dataset.from_list([row(i) for i in range(18 if data == "skewed" else 16)])


def build(job: Job, model_dir: str, folder: Path, num_processes: int, deepspeed: bool) -> PurifiedOPSDTrainer:
    """The job's trainer: fp32, greedy rollouts, the same global batch whatever the number of processes."""
    skewed = job.data == "skewed"
    set_seed(0)  # the adapter's initial weights
    fields = {
        "output_dir": str((folder.parent / job.output if job.output else folder) / "run"),
        "report_to": "none",
        "use_cpu": not deepspeed,  # together with it, accelerate would ignore DeepSpeed, which reads DS_ACCELERATOR
        "ddp_backend": "gloo" if deepspeed else None,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "save_strategy": "steps" if "checkpoints" in job.stages else "no",
        "save_steps": 2,
        "logging_steps": 1,
        "max_steps": 4 if job.data == "even" else -1,
        "num_train_epochs": 3 if job.data == "epochs" else 1,
        "shuffle_dataset": not skewed,
        "scoring_token_budget": 600 if skewed else None,  # not as many scoring batches on both processes
        "per_device_train_batch_size": GLOBAL_BATCH // num_processes,
        "per_device_eval_batch_size": 1,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "seed": 0,
        "generation_kwargs": None if "sample" in job.stages else {"do_sample": False},
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"},
        "teacher_model_kind": job.kind,
        "teacher_update_rate": 0.3,
    }
    if job.parts is not None:
        rows_of_step = GLOBAL_BATCH * job.parts
        if num_processes == 1:
            fields |= {"padding_free": False, "per_device_train_batch_size": rows_of_step}
        else:
            fields |= {"padding_free": True, "train_token_budget": 80, "gradient_accumulation_steps": job.parts}
    if skewed:  # the long references share a prefix that takes a forward of its own, the short ones do not
        fields["teacher_prompt_template"] = REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE
    if job.server:
        fields |= {"use_vllm": True, "vllm_mode": "server", "vllm_adapter_sync": True, "rollouts_ahead": job.ahead}
        fields |= {"vllm_server_base_url": job.server, "learning_rate": 2e-2}
        fields |= {"generation_kwargs": {"temperature": 0.0}, "vllm_server_timeout": 5.0}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model: Any = model_dir
    if job.data == "images":
        model, fields["model_init_kwargs"] = build_vlm("qwen3_vl"), None
    trainer = PurifiedOPSDTrainer(
        model=model,
        processing_class=build_processor("qwen3_vl") if job.data == "images" else None,
        args=PurifiedOPSDConfig(**fields),
        train_dataset=rows(job.data),
        eval_dataset=rows("even").select(range(5)),  # five rows: the last evaluation batch is uneven on two processes
        peft_config=lora if job.lora else None,
    )
    if skewed or job.data == "images":
        ragged_rollout(trainer)
    main = trainer.accelerator.is_main_process
    if "die_in_step" in job.stages and main:
        at_step(trainer, "_compute_loss", 2, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if "die_in_write" in job.stages and main:  # after weights and optimizer state, before the rest
        at_step(trainer, "_save_rng_state", 4, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if "stop_in_step" in job.stages and main:
        at_step(trainer, "_compute_loss", 2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    if "nan_in_step" in job.stages and not main:
        at_step(trainer, "_parts", 2, lambda _, inputs: inputs["base_hidden"][0].fill_(math.nan))
    return trainer


def ragged_rollout(trainer: PurifiedOPSDTrainer) -> None:
    """Completions of 8 tokens for long rows, which the first of two processes gets, and of 1 token for the others."""

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        return [[97 + (sum(ids) + i) % 26 for i in range(8 if ord("W") in ids else 1)] for ids in prompt_ids]

    trainer._generate_single_turn = generate  # type: ignore[method-assign]


def at_step(trainer: PurifiedOPSDTrainer, method: str, step: int, action: Callable[..., Any]) -> None:
    """Calls an action, with the arguments of a method, before the method at a step."""
    original = getattr(trainer, method)

    def with_action(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step:
            action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(trainer, method, with_action)


def run(job: Job, model_dir: str, folder: Path, num_processes: int, deepspeed: bool = False) -> dict[str, Any]:
    """
    Trains; returns the figures of this process.

    Args:
        job ([`Job`]): what to run.
        model_dir (`str`): folder of the model.
        folder (`Path`): where to write.
        num_processes (`int`): processes there must be.
        deepspeed (`bool`, *optional*): whether DeepSpeed is configured in the environment.
    """
    trainer = build(job, model_dir, folder, num_processes, deepspeed)
    assert trainer.accelerator.num_processes == num_processes
    checkpoint = str(folder.parent / job.resume) if isinstance(job.resume, str) else job.resume
    trainer.train(resume_from_checkpoint=checkpoint)
    history = trainer.state.log_history
    figures = {
        "backend": str(trainer.accelerator.distributed_type),
        "num_processes": trainer.accelerator.num_processes,
        "steps": trainer.state.global_step,
        "logs": [entry for entry in history if "loss" in entry],
        **sharding(trainer),
        **fingerprint(trainer),
    }
    if "evaluate" in job.stages:
        figures["eval"] = trainer.evaluate()
    if "save" in job.stages:
        trainer.save_model(str(folder / "saved"))
        trainer.model_wrapped.eval()
        with torch.no_grad():
            figures["logits"] = trainer.model_wrapped(input_ids=PROBE).logits.flatten().tolist()
    return figures


def _local(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter


def _numbers(model: Any) -> list[int]:
    """Elements held by this process, and elements of the whole model."""
    parameters = list(model.parameters())
    whole = [getattr(p, "ds_numel", p.numel()) for p in parameters]
    return [sum(_local(p).numel() for p in parameters), sum(whole)]


def sharding(trainer: PurifiedOPSDTrainer) -> dict[str, Any]:
    """Elements of student and frozen copy on this process, and whether the optimizer holds frozen weights."""
    student = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    reshard(student)
    result: dict[str, Any] = {"student_elements": _numbers(student)}
    teacher = trainer.scoring_callback.teacher_model
    if teacher is not None:
        reshard(teacher)
        result["teacher_elements"] = _numbers(teacher)
        result["teacher_trains"] = any(p.requires_grad for p in teacher.parameters())
        result["teacher_has_optimizer"] = bool(getattr(getattr(teacher, "optimizer", None), "param_groups", None))
        optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        result["teacher_is_optimized"] = any(id(p) in optimized for p in teacher.parameters())
    return result


def reshard(model: Any) -> None:
    """FSDP2 keeps the last layers gathered after a forward without gradient."""
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.reshard()


def fingerprint(trainer: PurifiedOPSDTrainer) -> dict[str, Any]:
    """Weighted sums in fp64 of this process's weights, optimizer state and averaged teacher; random numbers."""

    def total(tensors: Any) -> list[float]:
        tensors = [t.detach().double().flatten() for t in tensors if torch.is_tensor(t) and t.numel()]
        weights = [torch.linspace(1, 2, t.numel(), dtype=torch.float64) for t in tensors]
        return [float((t * w).sum()) for t, w in zip(tensors, weights, strict=True)]

    student = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    reshard(student)
    ema = trainer.scoring_callback.ema
    optimizer = trainer.optimizer
    with contextlib.suppress(AttributeError):
        optimizer = optimizer.optimizer  # accelerate's wrapper, DeepSpeed's wrapper
        optimizer = optimizer.optimizer
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    state = [value.to_local() if hasattr(value, "to_local") else value for value in state]
    return {
        "weights": total(_local(p) for p in student.parameters()),
        "optimizer_state": total(state),
        "ema": total(ema.averages.values()) if ema is not None else [],
        "rng": torch.get_rng_state().tolist()[:64],
        "lr": trainer.lr_scheduler.get_last_lr(),
    }
