"""Errors that a user can fix: their one type, and the one place where they become one line."""

import os
import sys


DEBUG_VARIABLE = "PURIFIED_OPSD_DEBUG"  # set by `--debug`; the processes of a launched run inherit it
# Raised by libraries for what they were given or cannot reach, by the name of their package
_THIRD_PARTY = ("huggingface_hub", "wandb", "requests", "httpx")


class InputError(ValueError):
    """
    Raised when a setting, a dataset row or a model cannot be used as given.

    The message names the row, the column or the key, says what was expected and how to fix it. The command line prints
    it as one line and exits with status 2; in Python it is an ordinary `ValueError`.
    """


def exit_status(error: Exception) -> int:
    """
    Prints an error that a user can fix as one line; `--debug` keeps the traceback.

    Such errors are [`InputError`], a missing dependency (`ImportError`), files and connections (`OSError`), and what
    the hub's client and wandb raise. Every other error is a fault of the program and is raised again.

    Args:
        error (`Exception`):
            What a command raised.

    Returns:
        `int`: 2, the exit status of the command.
    """
    expected = isinstance(error, InputError | ImportError | OSError)
    expected = expected or type(error).__module__.split(".")[0] in _THIRD_PARTY
    if not expected or os.environ.get(DEBUG_VARIABLE):
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


def one_line(error: Exception) -> str:
    """Message of an error on one line; a file's error begins with the file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__
