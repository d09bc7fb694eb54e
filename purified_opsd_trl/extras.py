"""Optional dependencies: an error that names the extra to install, and silence about those that nobody asked for."""

import importlib.util
import logging


# Logger -> beginning of a line that concerns nobody: a kernel that is not part of bitsandbytes' own requirements, and
# defaults of `accelerate launch` that are right for a machine without a file of its own
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "accelerate.commands.launch": "The following values were not passed to `accelerate launch`",
}


def quiet_start() -> None:
    """Drops two log lines of other packages (`_NOISE`); everything else that they log stays."""
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NOISE[record.name])


def require_extra(extra: str, wanted_by: str, module: str | None = None) -> None:
    """
    Checks that an optional dependency is installed.

    Args:
        extra (`str`):
            Name of the extra: `"peft"`, `"vllm"`, `"deepspeed"`, `"quantization"`, `"wandb"`, `"eval"` or `"plot"`.
        wanted_by (`str`):
            The setting that needs it, for the message.
        module (`str`, *optional*):
            Module that it brings. `None`: the extra's own name.

    Raises:
        `ImportError`: if it is not installed.
    """
    module = module or extra
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"{wanted_by} needs `{module.replace('_', '-')}`, which is not installed. Install it with "
            f'`pip install "purified-opsd-trl[{extra}]"`.'
        )
