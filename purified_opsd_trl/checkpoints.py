"""
Checkpoints that are either whole or recognised as incomplete, and that hold the self-teacher.

A job may be killed while it writes. `trainer_state.json` is therefore written last: once every process has written its
part. A checkpoint folder without it (or with half of it) is incomplete and is passed over when training resumes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import InputError


if TYPE_CHECKING:
    from .scoring import TeacherScoringCallback


def is_whole(checkpoint: str | Path) -> bool:
    """
    Whether a checkpoint was written to its end.

    Args:
        checkpoint (`str` or `Path`):
            Folder of the checkpoint.

    Returns:
        `bool`
    """
    try:
        state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "global_step" in state


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """
    The checkpoints in a folder, whole or not.

    Args:
        output_dir (`str` or `Path`):
            Folder that holds `checkpoint-<step>` folders; it need not exist. Other names, such as `checkpoint-best`,
            are left out.

    Returns:
        `list[Path]`: by step.
    """
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and number.isdecimal():
            steps[int(number)] = folder
    return [steps[step] for step in sorted(steps)]


def last_whole_checkpoint(output_dir: str | Path) -> tuple[str | None, list[str]]:
    """
    The newest checkpoint that was written to its end.

    Args:
        output_dir (`str` or `Path`):
            Folder that holds `checkpoint-<step>` folders; it need not exist.

    Returns:
        `tuple[str | None, list[str]]`: path of the checkpoint (`None` if there is none), and the names of the newer,
        incomplete ones that were passed over, newest first.
    """
    incomplete: list[str] = []
    for folder in reversed(checkpoint_folders(output_dir)):
        if is_whole(folder):
            return str(folder), incomplete
        incomplete.append(folder.name)
    return None, incomplete


def find_checkpoint(output_dir: str | Path) -> str:
    """
    The checkpoint to resume from, announced in one line.

    Args:
        output_dir (`str` or `Path`):
            Folder that holds the checkpoints.

    Returns:
        `str`: path of the newest whole checkpoint.

    Raises:
        `InputError`: if there is none.
    """
    checkpoint, incomplete = last_whole_checkpoint(output_dir)
    skipped = f"incomplete: {', '.join(incomplete)}, killed while it was written" if incomplete else ""
    if checkpoint is None:
        found = f"no whole checkpoint ({skipped})" if incomplete else "no checkpoint"
        raise InputError(
            f"`resume_from_checkpoint: true`, but {output_dir} holds {found}. Remove the key to start anew."
        )
    PartialState().print(f"Resuming from {checkpoint}{f' (passing over {skipped})' if skipped else ''}")
    return checkpoint


class WholeCheckpoints(Trainer):
    """Mixin of the trainer: saves and restores the self-teacher, and marks a checkpoint as whole at the very end."""

    scoring_callback: "TeacherScoringCallback"

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_checkpoint(self.args.output_dir or "")
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # A folder left by an earlier run must not look whole while it is written anew
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        # A checkpoint written without one of these (by another trainer) left no entry for it, and saving wants one
        states: Any = self.state.stateful_callbacks  # a dict, whatever its annotation says
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, {})
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.scoring_callback.save_state(output_dir)
        # The main process goes on to write `trainer_state.json` and to delete older checkpoints, but not before
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.scoring_callback.load_state(checkpoint)
