"""Whose output directory it is: what may not differ when a run goes on, its checkpoints, a lock."""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from datasets import IterableDataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .config import PurifiedOPSDConfig
from .dataset import AnyDataset
from .errors import InputError


RUN_STATE_NAME = "run_state.json"  # in a checkpoint: its run, its position in the data, its files
MANIFEST_NAME = "_run.json"  # in the output directory; names that begin with "_" are not pushed to the hub
LOCK_NAME = "_run.lock"

# Steps, learning rate, batch size and what is logged may change when a run goes on; what is learned may not
_IDENTITY_FIELDS = (
    *("target", "loss_type", "beta", "temperature", "pmi_beta", "pmi_clip", "pmi_center", "kl_clip"),
    *(
        "interpolation_weight",
        "interpolation_weight_end",
        "contrastive_alpha",
        "contrastive_floor",
        "contrastive_tau",
        "reference_source",
    ),
    *(
        "teacher_model_kind",
        "reference_column",
        "wrong_reference_column",
        "teacher_prompt_template",
        "reference_prompt_template",
    ),
)
_SAMPLED_ROWS = 64  # hashed of a dataset, at even distances


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there in full or not at all."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; `None` if there is no file, or anything else in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """
    Returns the checkpoints in a folder, complete or not.

    Args:
        output_dir (`str` or `Path`):
            Folder that holds `checkpoint-<step>` folders; it need not exist. Other names, such as `checkpoint-best`,
            are left out.

    Returns:
        `list[Path]`: by step.
    """
    found = {step_of(folder): folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return [found[step] for step in sorted(step for step in found if step >= 0) if found[step].is_dir()]


def step_of(checkpoint: str | Path) -> int:
    """Step in a checkpoint's name; -1 for other names."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", Path(checkpoint).name)
    return int(match[1]) if match else -1


def run_identity(args: PurifiedOPSDConfig, model: Any, dataset: AnyDataset | None, target: str) -> dict[str, Any]:
    """
    Describes what may not differ when a run goes on.

    Args:
        args ([`PurifiedOPSDConfig`]):
            Configuration.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Training data. Up to 64 rows of it are hashed; none of a stream.
        target (`str`):
            Name of the target: `args.target`, or that of the method that replaces it.

    Returns:
        `dict[str, Any]`: values that JSON can hold, by name.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    identity = {name: getattr(args, name) for name in _IDENTITY_FIELDS} | {
        "target": target,
        "model": Path(model.config._name_or_path or "").name,  # it may lie in another folder by now
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "dataset": _describe(dataset, ("prompt", args.reference_column)),
    }
    return json.loads(json.dumps(identity))


def _describe(dataset: AnyDataset | None, columns: tuple[str, ...]) -> str:
    if dataset is None or isinstance(dataset, IterableDataset):
        return "stream" if dataset is not None else "none"
    count = len(dataset)
    rows = [dataset[i * count // _SAMPLED_ROWS] for i in range(_SAMPLED_ROWS)] if count else []
    picked = [[row.get(name) for name in columns] for row in rows]
    digest = hashlib.sha256(json.dumps(picked, default=str).encode()).hexdigest()
    return f"{count} rows, {digest[:12]}"


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What of two identities differs, in words; empty if nothing does."""

    def short(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."

    names = [name for name in ours if theirs.get(name) != ours[name]]
    return ", ".join(f"`{name}` was {short(theirs.get(name))} and is {short(ours[name])}" for name in names)


def check_output_dir(path: str) -> None:
    """Raises an [`InputError`] if nothing can be written to the output directory; makes it if it is not there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        raise InputError(f"`output_dir`: cannot write to {path} ({error.strerror}).") from error


class RunFolder:
    """
    Output directory of a run: one process may train in it, and it knows which checkpoints are its own.

    Used on the main process. The lock is the kernel's: it ends with the process, however that ends.

    Args:
        path (`str`):
            Output directory.
        identity (`dict[str, Any]`):
            [`run_identity`].
    """

    def __init__(self, path: str, identity: dict[str, Any]):
        self.path = Path(path)
        self.identity = identity
        self.run_id = secrets.token_hex(8)
        self._lock: IO[str] | None = None

    def lock(self) -> None:
        """
        Takes the folder.

        Raises:
            [`InputError`]: if another process trains in it, or nothing can be written there.
        """
        check_output_dir(str(self.path))
        lock = open(self.path / LOCK_NAME, "a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise InputError(
                f"`output_dir`: {holder} trains in {self.path}. Name another folder, or end that process first."
            ) from None
        except OSError as error:
            print(f"{self.path} cannot be locked ({error.strerror}): do not start a second run in it.")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def unlock(self) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def start(self, complete: list[Path]) -> str:
        """
        Makes room for a new run: moves the checkpoints of an earlier one to a folder of their own.

        Args:
            complete (`list[Path]`):
                Complete checkpoints in the folder.

        Returns:
            `str`: what was done, in one line; empty if nothing was in the way.
        """
        foreign = [folder for folder in complete if not self.owns(folder)]
        if not foreign:
            return ""
        number = next(i for i in range(1, 10**6) if not (self.path / f"earlier-run-{i}").exists())
        aside = self.path / f"earlier-run-{number}"
        aside.mkdir()
        for folder in foreign:
            os.rename(folder, aside / folder.name)
        names = ", ".join(folder.name for folder in foreign)
        return f"Starting a new run: {names} of an earlier run moved to {aside}."

    def resume(self, checkpoint: str, complete: list[Path]) -> str:
        """
        Goes on with the run of a checkpoint.

        Args:
            checkpoint (`str`):
                Complete checkpoint.
            complete (`list[Path]`):
                Complete checkpoints in the folder.

        Returns:
            `str`: a warning; empty if there is nothing to say.

        Raises:
            [`InputError`]: if the checkpoint is of another run, or one of another run would be overwritten.
        """
        state = read_json(Path(checkpoint) / RUN_STATE_NAME)
        if state is None or "identity" not in state:
            return f"{checkpoint} names no run (another trainer wrote it): its settings cannot be compared."
        differing = difference(state["identity"], self.identity)
        if differing:
            raise InputError(
                f"`resume_from_checkpoint`: {checkpoint} is of another run: {differing}. Restore the settings, or "
                "name another `output_dir` and remove the key to start anew."
            )
        self.run_id = state["run_id"]
        later = [f.name for f in complete if step_of(f) > step_of(checkpoint) and not self.owns(f)]
        if later:
            raise InputError(
                f"`output_dir`: {', '.join(later)} in {self.path} is of another run than {Path(checkpoint).name} and "
                "would be overwritten. Move it, or name another folder."
            )
        return ""

    def owns(self, checkpoint: Path) -> bool:
        """Whether this run wrote a checkpoint."""
        return (read_json(checkpoint / RUN_STATE_NAME) or {}).get("run_id") == self.run_id

    def saved(self, checkpoint: Path, limit: int | None, best: str | None) -> None:
        """
        Lists a new checkpoint, after removing those of this run beyond the limit, the lowest steps first.

        Args:
            checkpoint (`Path`):
                The new checkpoint, complete.
            limit (`int`, *optional*):
                `save_total_limit`.
            best (`str`, *optional*):
                Best checkpoint, which is kept.
        """
        own = [folder for folder in checkpoint_folders(self.path) if self.owns(folder)]
        kept = {checkpoint.name} | ({Path(best).name} if best else set())
        excess = len(own) - max(limit, len(kept)) if limit is not None and limit > 0 else 0
        for folder in [folder for folder in own if folder.name not in kept][: max(excess, 0)]:
            shutil.rmtree(folder, ignore_errors=True)
            own.remove(folder)
        self.write_manifest(own)

    def write_manifest(self, own: list[Path]) -> None:
        """Writes who trains here and which checkpoints are its own."""
        manifest = {"run_id": self.run_id, "identity": self.identity, "checkpoints": [folder.name for folder in own]}
        write_json(self.path / MANIFEST_NAME, manifest)
