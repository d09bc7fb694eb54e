"""Optional dependencies: an error that names the extra to install."""

import importlib.util


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
