"""`purified-opsd env`: what a bug report needs, and the versions that every report of a run names."""

import argparse
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path


PACKAGES = (
    "purified_opsd_trl",
    "trl",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "deepspeed",
    "vllm",
    "bitsandbytes",
    "triton",
    "liger-kernel",
    "math-verify",
)
# By name, never by prefix: a bug report is public, and VLLM_API_KEY would match
VARIABLES = (
    "ACCELERATE_CONFIG_FILE",
    "ATEN_CPU_CAPABILITY",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "HF_HUB_OFFLINE",
    "HIP_VISIBLE_DEVICES",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TORCHDYNAMO_DISABLE",
    "TRITON_INTERPRET",
)


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """
    Versions of the packages that are installed.

    Args:
        names (`Sequence[str]`, *optional*, defaults to `PACKAGES`):
            Names of distributions.

    Returns:
        `dict[str, str]`: version by name, in the order of `names`; a package that is not installed is left out.
    """
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """
    Commit that this package runs from.

    Returns:
        `str`, *optional*: abbreviated hash, with `-dirty` after it if tracked files were changed. `None` outside a
        checkout of this project: an environment inside another repository is not one.
    """
    package = Path(__file__).resolve().parent
    top = _output("git", "-C", str(package), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.parent:
        return None
    return _output("git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def run_versions() -> dict[str, str]:
    """
    Versions that a report of a run names, with the commit of a checkout.

    Returns:
        `dict[str, str]`: version by name.
    """
    own = {"commit": revision} if (revision := commit()) is not None else {}
    return {"python": platform.python_version(), **versions(), **own}


def environment() -> dict[str, str]:
    """
    Everything that `purified-opsd env` prints. Imports torch.

    Returns:
        `dict[str, str]`: text by name: platform, Python, versions with the commit of a checkout, packages that are not
        installed, CPU, accelerators (memory in GiB), accelerate's default file, and the variables of `VARIABLES` that
        are set.
    """
    import torch

    installed = versions()
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    build = ", ".join(f"{name} {version}" for name, version in builds.items() if version) or "no CUDA"
    installed["torch"] = f"{torch.__version__} ({build})"
    if (revision := commit()) is not None:
        own = installed.get("purified_opsd_trl", "not installed")
        installed["purified_opsd_trl"] = f"{own} (commit {revision})"
    return {
        "platform": platform.platform(),
        "Python": platform.python_version(),
        **{name: installed.get(name, "not installed") for name in PACKAGES},
        "CPU": f"{_cpu()}, {os.cpu_count()} logical cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads in torch",
        **accelerators(),
        "accelerate's default file": _accelerate_defaults(),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def main(argv: Sequence[str]) -> int:
    """
    Prints [`environment`] as a Markdown list.

    Args:
        argv (`Sequence[str]`):
            The command line; it takes no flags but `--help`.

    Returns:
        `int`: exit status.
    """
    argparse.ArgumentParser(prog="purified-opsd env", description="Print what a bug report needs.").parse_args(argv)
    print("\n".join(f"- {name}: {text}" for name, text in environment().items()))
    return 0


def _output(*command: str) -> str | None:
    """What a command prints; `None` if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    """Model of the processor; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def accelerators() -> dict[str, str]:
    """Describes each device, memory included; one entry says so if there is none. Imports torch."""
    import torch

    if not torch.accelerator.is_available():
        return {"accelerators": "none"}
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    if kind.type != "cuda":
        return {"accelerators": f"{torch.accelerator.device_count()} x {kind.type}"}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    rows = {}
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        rows[f"accelerator {i}"] = (
            f"{device.name}, {device.total_memory / 2**30:.1f} GiB, compute capability {device.major}.{device.minor}, "
            f"driver {driver or 'unknown'}"
        )
    return rows


def _accelerate_defaults() -> str:
    """What `accelerate launch` reads when no file is named, on one line."""
    from accelerate.commands.config import default_config_file

    path = Path(default_config_file)
    if not path.is_file():
        return "none"
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return "; ".join(line for line in lines if line)
