"""Optional dependencies: an error that names the extra to install."""

import importlib.util


def require_extra(extra: str, wanted_by: str) -> None:
    """
    Checks that an optional dependency is installed.

    Args:
        extra (`str`):
            Name of the extra, which is also the name of the package that is imported: `"peft"`, `"vllm"`,
            `"deepspeed"` or `"wandb"`.
        wanted_by (`str`):
            The setting that needs it, for the message.

    Raises:
        `ImportError`: if it is not installed.
    """
    if importlib.util.find_spec(extra) is None:
        raise ImportError(
            f"{wanted_by} needs `{extra}`, which is not installed. Install it with "
            f'`pip install "purified-opsd-trl[{extra}]"`.'
        )
