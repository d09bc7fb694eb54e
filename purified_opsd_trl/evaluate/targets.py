"""The models that a command line names: a model, adapters on it, checkpoints of runs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints import is_complete
from ..errors import InputError
from ..run_identity import checkpoint_folders


@dataclass(frozen=True)
class Target:
    """One model to evaluate."""

    label: str  # name of its folder
    model: str  # id or path
    adapter: str | None = None  # path of an adapter on it


def find_targets(model: str, adapters: Sequence[str] = (), checkpoints: Sequence[str] = ()) -> list[Target]:
    """
    `model` itself unless adapters on it are given, each adapter, each checkpoint (a model, or an adapter on `model`).

    `checkpoints` are output directories of runs, or single checkpoints. Raises an [`InputError`] if a folder is
    neither a model nor an adapter, is incomplete, or two have one name.
    """
    targets = [] if adapters else [Target(_label(model), model)]
    targets += [Target(_label(path), model, path) for path in adapters]
    for path in (path for folder in checkpoints for path in _complete_checkpoints(Path(folder))):
        if (path / "adapter_config.json").is_file():
            targets.append(Target(_label(path), model, str(path)))
        elif (path / "config.json").is_file():
            targets.append(Target(_label(path), str(path)))
        else:
            raise InputError(
                f"`checkpoints`: {path} holds neither a model (config.json) nor an adapter (adapter_config.json)."
            )
    labels = [target.label for target in targets]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"Two models are called `{twice[0]}`; evaluate them into different `output_dir`s.")
    return targets


def _label(path: str | Path) -> str:
    """The folder's name, behind that of its run for a checkpoint."""
    folder = Path(path).absolute()
    return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def _complete_checkpoints(folder: Path) -> list[Path]:
    """Those of a run, or the one that is named; a folder of another kind is taken as it is."""
    found = checkpoint_folders(folder)
    if not found and folder not in checkpoint_folders(folder.parent):
        return [folder]
    found = found or [folder]
    complete = [path for path in found if is_complete(path, to_resume=False)]
    incomplete = ", ".join(path.name for path in found if path not in complete)
    if not complete:
        raise InputError(
            f"`checkpoints`: {folder} is incomplete ({incomplete} holds no complete `trainer_state.json`, which is "
            "written last). Name another checkpoint; a folder with complete weights may go to `adapter` or "
            "`model_name_or_path`."
        )
    if incomplete:
        print(f"Skipping {incomplete} in {folder}: incomplete")
    return complete


def weights_fingerprint(model: str) -> str | None:
    """
    Tells weights in a local folder from others that were there before; `None` for what is not a local folder.

    It is made of names, sizes and modification times, not of the contents: these are many gigabytes, which would be
    read at every call. So a copy that does not keep modification times counts as other weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    described = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def lora_rank(adapter: str) -> int:
    """Rank in an adapter's config."""
    path = Path(adapter, "adapter_config.json")
    if not path.is_file():
        raise InputError(f"`adapter`: {adapter} holds no adapter_config.json.")
    return int(json.loads(path.read_text(encoding="utf-8")).get("r", 8))
