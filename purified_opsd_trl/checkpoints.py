"""
Checkpoints that are either complete or recognized as incomplete, of one run, from which training goes on exactly.

A job may be killed while it writes. `trainer_state.json` is therefore written last, once every process has written its
part, and `run_state.json` before it with the size of every file.
"""

import base64
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import IterableDataset
from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import InputError, one_line
from .run_identity import RUN_STATE_NAME, RunFolder, checkpoint_folders, read_json, run_identity, write_json
from .shutdown import GracefulStop


if TYPE_CHECKING:
    from .scoring import TeacherScoringCallback


def is_complete(checkpoint: str | Path, to_resume: bool = True) -> bool:
    """
    Returns whether a checkpoint was written to its end, and all of it is still there.

    Args:
        checkpoint (`str` or `Path`):
            Folder of the checkpoint.
        to_resume (`bool`, *optional*, defaults to `True`):
            Whether optimizer, scheduler and random states must be there too, or the weights alone.

    Returns:
        `bool`: `trainer_state.json` holds a step, every safetensors file has the length that its header says, and
        every file that `run_state.json` lists has the size that it had.
    """
    return not damage(checkpoint, to_resume)


def damage(checkpoint: str | Path, to_resume: bool = True) -> str:
    """The first thing of a checkpoint that is missing or damaged, in words; empty if it [`is_complete`]."""
    folder = Path(checkpoint)
    if not isinstance((read_json(folder / TRAINER_STATE_NAME) or {}).get("global_step"), int):
        return f"{TRAINER_STATE_NAME} is missing or damaged"
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"{file.relative_to(folder)} is damaged"
    if not to_resume or not (folder / RUN_STATE_NAME).exists():
        return ""  # without a run state: another trainer wrote it
    files, found = (read_json(folder / RUN_STATE_NAME) or {}).get("files"), _sizes(folder)
    if not isinstance(files, dict):
        return f"{RUN_STATE_NAME} is damaged"
    for name, size in files.items():
        if found.get(name) != size:
            return f"{name} has {found[name]} bytes instead of {size}" if name in found else f"{name} is missing"
    return ""


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file that is written before the two states."""
    late = (RUN_STATE_NAME, TRAINER_STATE_NAME)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in late]
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def last_complete_checkpoint(output_dir: str | Path) -> tuple[str | None, list[str]]:
    """
    Returns the newest complete checkpoint.

    Args:
        output_dir (`str` or `Path`):
            Folder that holds `checkpoint-<step>` folders; it need not exist.

    Returns:
        `tuple[str | None, list[str]]`: path of the checkpoint (`None` if there is none), and the names of the newer,
        incomplete ones that were passed over, newest first.
    """
    incomplete: list[str] = []
    for folder in reversed(checkpoint_folders(output_dir)):
        if is_complete(folder):
            return str(folder), incomplete
        incomplete.append(folder.name)
    return None, incomplete


def find_checkpoint(output_dir: str | Path) -> str:
    """
    Returns the checkpoint to resume from, announced in one line.

    Args:
        output_dir (`str` or `Path`):
            Folder that holds the checkpoints.

    Returns:
        `str`: path of the newest complete checkpoint.

    Raises:
        `InputError`: if there is none.
    """
    checkpoint, incomplete = last_complete_checkpoint(output_dir)
    skipped = f"incomplete or damaged: {', '.join(incomplete)}" if incomplete else ""
    if checkpoint is None:
        found = f"no complete checkpoint ({skipped})" if incomplete else "no checkpoint"
        raise InputError(
            f"`resume_from_checkpoint: true`, but {output_dir} holds {found}. Remove the key to start anew."
        )
    PartialState().print(f"Resuming from {checkpoint}{f' (passing over {skipped})' if skipped else ''}")
    return checkpoint


def check_named_checkpoint(checkpoint: str) -> None:
    """Raises an [`InputError`] unless the checkpoint that a user named is complete: no other one is taken instead."""
    if not Path(checkpoint).is_dir():
        raise InputError(f"`resume_from_checkpoint`: there is no folder {checkpoint}.")
    if found := damage(checkpoint):
        raise InputError(
            f"`resume_from_checkpoint`: {checkpoint} is incomplete or damaged: {found}. Name an earlier checkpoint, "
            "or set `true` to take the newest complete one."
        )


class ReliableTrainer(Trainer):
    """
    Mixin of the trainer: what it saves is complete and of one run, and training goes on from it as if never stopped.

    It also stops before an update that is not finite, and after the running step when it receives a signal.
    """

    args: Any
    model: Any
    scoring_callback: "TeacherScoringCallback"
    target_name: str  # of the target, for the run's identity
    _run_folder: RunFolder | None = None
    _train_sampler: Any = None
    _epoch = 0  # number of the epoch that runs, from 0
    _batches = 0  # micro-batches of it that were trained on
    _generator_state: str | None = None  # of the sampler, before it drew this epoch's order

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        folder = self._get_output_dir(trial)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_checkpoint(folder)
        elif resume_from_checkpoint:
            check_named_checkpoint(resume_from_checkpoint)
        stop = GracefulStop(self.accelerator)
        self.add_callback(stop)
        try:
            with self._owned(folder, resume_from_checkpoint or None), stop.installed():
                self._check_portions(resume_from_checkpoint or None)
                output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
                self.accelerator.wait_for_everyone()
        finally:
            self.remove_callback(stop)
        if stop.stopped_by is not None:
            self.accelerator.print(
                f"Stopped by {stop.stopped_by.name} after step {self.state.global_step}; "
                f"{folder}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step} is complete. To go on, run the same "
                "command with `--resume_from_checkpoint true`."
            )
            raise SystemExit(0)
        return output

    # Identity --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _owned(self, path: str, checkpoint: str | None) -> Iterator[None]:
        """Locks the output directory for this run. The main process decides, all processes raise the same error."""
        identity = run_identity(self.args, self.model, self.train_dataset, self.target_name)
        run = RunFolder(path, identity)
        if self._run_folder is not None:
            run.run_id = self._run_folder.run_id  # a second call trains on in its own folder
        outcome: list[str | None] = [None, None]
        if self.accelerator.is_main_process:
            try:
                run.lock()
                complete = [folder for folder in checkpoint_folders(path) if is_complete(folder)]
                said = run.start(complete) if checkpoint is None else run.resume(checkpoint, complete)
                if said:
                    print(said)
                run.write_manifest([folder for folder in complete if run.owns(folder)])
            except (InputError, OSError) as error:
                outcome[0] = str(error)
            outcome[1] = run.run_id
        try:
            error_text, run_id = broadcast_object_list(outcome) if self.accelerator.num_processes > 1 else outcome
            if error_text is not None:
                raise InputError(error_text)
            run.run_id, self._run_folder = str(run_id), run
            yield
        finally:
            run.unlock()

    # Position in the data --------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # transformers calls it by keyword
        self._epoch = kwargs["epoch"]
        self._batches = kwargs["steps_trained_in_current_epoch"] if self._epoch == kwargs["epochs_trained"] else 0
        generator = getattr(self._train_sampler, "generator", None)
        if generator is not None:
            self._generator_state = base64.b64encode(generator.get_state().numpy().tobytes()).decode()
        super()._run_epoch(**kwargs)

    def _position(self) -> dict[str, Any]:
        """Where in the data a checkpoint was written, and in which parts the data was read."""
        steps = self.args.gradient_accumulation_steps
        return {
            "epoch": self._epoch,
            "steps": self._batches // steps,
            "generator": self._generator_state,
            "num_processes": self.args.world_size,
            "rows_per_step": self.args.per_device_train_batch_size * self.args.world_size * steps,
        }

    def _check_portions(self, checkpoint: str | None) -> None:
        """Refuses to go on with other processes or rows per step, before DeepSpeed does in its own words."""
        state = read_json(Path(checkpoint) / RUN_STATE_NAME) if checkpoint is not None else None
        if state is None or self.args.ignore_data_skip:
            return
        position, here = state["position"], self._position()
        for name, noun in (("num_processes", "processes"), ("rows_per_step", "rows per step")):
            if position[name] != here[name]:
                raise InputError(
                    f"`resume_from_checkpoint`: {checkpoint} was written with {position[name]} {noun}, this run has "
                    f"{here[name]}: some rows would be trained on twice and others never. Use as many as before, or "
                    "set `ignore_data_skip: true` to begin an epoch anew."
                )

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or self.args.ignore_data_skip:
            return epochs, batches
        state = read_json(Path(resume_from_checkpoint) / RUN_STATE_NAME)
        position: dict[str, Any] = state["position"] if state else {"epoch": 0, "generator": None}
        if isinstance(self.train_dataset, IterableDataset):  # transformers counts epochs of `max_steps`
            if state:
                return position["epoch"], position["steps"] * self.args.gradient_accumulation_steps
            return epochs, batches
        generator = getattr(self._train_sampler, "generator", None)
        if generator is not None:
            if position["generator"] is not None:
                saved = bytearray(base64.b64decode(position["generator"]))
                generator.set_state(torch.frombuffer(saved, dtype=torch.uint8))
            for _ in range(epochs - position["epoch"]):  # the orders of the epochs in between
                torch.randperm(len(self._train_sampler.data_source), generator=generator)
        return epochs, batches

    # Finite updates --------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._batches += 1
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called before the optimizer steps; under DeepSpeed after it, but before anything is saved. The norm is that
        # of all processes, so all of them raise. With fp16 the loss scaler skips such a step instead.
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and self.accelerator.mixed_precision != "fp16" and not math.isfinite(float(norm)):
            self.stop_not_finite(f"the gradient norm is {float(norm)}")
        return norm

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]  # TRL's
        except RuntimeError as error:  # torch cannot sample from NaN; on a GPU an assertion of the device says so
            if not any(words in str(error) for words in ("probability tensor contains", "device-side assert")):
                raise
            reason = f"the student's probabilities are NaN or infinite in the rollout ({one_line(error)[:80]})"
            raise FloatingPointError(self._stopped(self.state.global_step + 1, reason)) from error

    def stop_not_finite(self, what: str) -> None:
        """Raises the `FloatingPointError` that ends training before an update. Every process calls it."""
        said = gather_object([what]) if self.accelerator.num_processes > 1 else [what]
        known = [text for text in said if "other processes" not in text]
        raise FloatingPointError(self._stopped(self.state.global_step + 1, known[0] if known else what))

    def _stopped(self, step: int, what: str, before: str = "the update") -> str:
        return (
            f"Step {step}: {what}. Training stops before {before}; checkpoints in {self.args.output_dir} are kept. "
            "Check the learning rate, the model's dtype (fp16 overflows easily: use bf16), a custom target, and "
            "whether the weights are finite."
        )

    def _check_weights(self) -> None:
        """Stops before weights are saved that a finite gradient, but a step too large, has made infinite."""
        trained = (p for p in self.model.parameters() if p.requires_grad)
        local = (getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p) for p in trained)
        bad = torch.tensor([sum(not t.detach().isfinite().all() for t in local)], device=self.accelerator.device)
        if self.accelerator.gather(bad).any():
            reason = "the update made weights NaN or infinite"
            raise FloatingPointError(self._stopped(self.state.global_step, reason, "they are saved"))

    # Saving and loading ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights()
        # A folder left by a killed run must not look complete while it is written anew, nor add files of its own
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            if folder.exists() and not is_complete(folder):
                shutil.rmtree(folder)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            (folder / RUN_STATE_NAME).unlink(missing_ok=True)
            if self.args.save_only_model:
                folder.mkdir(parents=True, exist_ok=True)
                self._write_run_state(folder)
        self.accelerator.wait_for_everyone()
        # A checkpoint written without one of these (by another trainer) left no entry for it, and saving wants one
        states: Any = self.state.stateful_callbacks  # a dict, whatever its annotation says
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, {})
        with self._no_rotation() as limit:
            super()._save_checkpoint(model, trial)
        if self.args.should_save and self._run_folder is not None:
            self._run_folder.saved(folder, limit, self.state.best_model_checkpoint)

    def _finalize_training(self, *args: Any) -> Any:
        with self._no_rotation():
            return super()._finalize_training(*args)

    @contextmanager
    def _no_rotation(self) -> Iterator[int | None]:
        """Keeps transformers from deleting checkpoints: it counts those of other runs, and sorts by time."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.scoring_callback.save_state(output_dir)
        # The main process goes on to write `trainer_state.json` and to delete older checkpoints, but not before
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._write_run_state(Path(output_dir))

    def _write_run_state(self, folder: Path) -> None:
        run = self._run_folder
        owner = {"run_id": run.run_id, "identity": run.identity} if run is not None else {}
        write_json(folder / RUN_STATE_NAME, {**owner, "position": self._position(), "files": _sizes(folder)})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.scoring_callback.load_state(checkpoint)
