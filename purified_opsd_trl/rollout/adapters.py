"""Versions of the student's LoRA adapter: gathered, written as files, loaded on the servers for as long as needed."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from trl.distributed import DistributedBackend

from ..errors import InputError
from .servers import ServerPool


WEIGHTS_NAME = "adapter_model.safetensors"
NO_ADAPTER = "`vllm_adapter_sync` sends LoRA adapters, but all weights are trained. Set `use_peft: true`."
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that `--max-lora-rank` admits


def check_servable(model: Any) -> None:
    """
    Checks that a model trains matrices of LoRA alone, which is what vLLM can load.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student.

    Raises:
        [`InputError`]: naming what else it trains.
    """
    if not hasattr(model, "peft_config"):
        raise InputError(NO_ADAPTER)
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_A." not in name and ".lora_B." not in name
    ]
    if others:
        raise InputError(
            "`vllm_adapter_sync`: vLLM loads the matrices A and B of LoRA and nothing else, but the adapter also "
            f"trains {others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}. Leave out DoRA, biases "
            "and `modules_to_save`, or set `vllm_adapter_sync: false`."
        )


def admitted_rank(config: Any) -> int:
    """The least `max_lora_rank` of vLLM that holds an adapter of this [`~peft.LoraConfig`]."""
    rank = max([config.r, *config.rank_pattern.values()])
    return next((admitted for admitted in _RANKS if admitted >= rank), rank)


def adapter_weights(model: Any, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """
    Returns the trained adapter as PEFT names it in files, on the CPU. Every process calls it.

    Args:
        model ([`~peft.PeftModel`]):
            Student; its parameters may be sharded (ZeRO-3, FSDP2).
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator on whose device shards are gathered.

    Returns:
        `dict[str, torch.Tensor]`
    """
    from peft import get_peft_model_state_dict

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {}
    sharded = [parameter for parameter in trained.values() if hasattr(parameter, "ds_id")]
    with DistributedBackend(accelerator).gather_params(sharded), torch.no_grad():
        for name, parameter in trained.items():
            weight: Any = parameter.detach()
            if isinstance(weight, DTensor):
                weight = weight.to(accelerator.device).full_tensor()  # type: ignore[attr-defined]
            weights[name] = weight.to("cpu", copy=True).contiguous()
    return get_peft_model_state_dict(
        model, state_dict=weights, adapter_name=model.active_adapter, save_embedding_layers=False
    )


class AdapterWindow:
    """
    The versions of an adapter that the servers hold: the newest one, and those that requests may still name.

    Used on the main process. Each version has a name of its own, with the run and the session in it: a server keeps
    the cache of a name, and it may have been serving before a resumed run comes back.

    Args:
        pool ([`ServerPool`]):
            Servers.
        folder (`Path`):
            Folder of the files, which the servers read too.
        run (`str`):
            Name of the run. What an earlier session of it left behind is removed.
        session (`str`):
            Name of this session of the run.
        config ([`~peft.LoraConfig`]):
            Configuration of the adapter.
    """

    def __init__(self, pool: ServerPool, folder: Path, run: str, session: str, config: Any):
        self.pool = pool
        self.folder = folder.resolve()
        self.prefix = f"{run}-{session}-v"
        self.config = config
        self.versions: list[int] = []  # loaded
        self._unloaded: list[int] = []  # whose files are still there
        pool.unload_left(f"{run}-")
        for old in self.folder.glob(f"{run}-*"):
            shutil.rmtree(old, ignore_errors=True)

    def name(self, version: int) -> str:
        """Name of a version on the servers."""
        return f"{self.prefix}{version}"

    def path(self, version: int) -> Path:
        """Folder of a version."""
        return self.folder / self.name(version)

    def publish(self, version: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes a version and loads it on the servers."""
        path = self.path(version)
        path.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), path / WEIGHTS_NAME)
        self.config.save_pretrained(str(path))
        self._load(version)

    def restore(self, version: int, source: Path) -> None:
        """Loads a version that [`keep`] put into a checkpoint."""
        shutil.copytree(source / str(version), self.path(version))
        self._load(version)

    def _load(self, version: int) -> None:
        self.pool.load(self.name(version), self.path(version))
        self.versions.append(version)

    def keep(self, versions: range, target: Path) -> None:
        """Puts the files of versions into a checkpoint, as hard links where the file system has them."""

        def link(source: str, to: str) -> None:
            try:
                os.link(source, to)
            except OSError:
                shutil.copy2(source, to)

        for version in versions:
            if version in self.versions:
                shutil.copytree(self.path(version), target / str(version), copy_function=link)

    def forget(self, before: int) -> None:
        """Unloads versions before one; their files go the next time, as vLLM may still open them."""
        for version in self._unloaded:
            shutil.rmtree(self.path(version), ignore_errors=True)
        self._unloaded = [version for version in self.versions if version < before]
        self.versions = [version for version in self.versions if version >= before]
        for version in self._unloaded:
            self.pool.unload(self.name(version))

    def close(self) -> None:
        """Unloads all versions and removes their files."""
        for version in self.versions:
            self.pool.unload(self.name(version))
        for version in [*self._unloaded, *self.versions]:
            shutil.rmtree(self.path(version), ignore_errors=True)
        self.versions, self._unloaded = [], []


def start_command(model: Any, ahead: int, max_model_length: int | None, url: str) -> str:
    """The command line of a server for a student."""
    host, _, port = url.split("//")[-1].partition(":")
    length = f" --max-model-len {max_model_length}" if max_model_length else ""
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {model.config._name_or_path} --host {host} "
        f"--port {port.split('/')[0] or 80} --enable-lora --max-loras {ahead + 1} "
        f"--max-lora-rank {admitted_rank(model.peft_config[model.active_adapter])}{length}"
    )
