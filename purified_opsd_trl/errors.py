"""Errors that a user can fix: their one type, and the one place where they become one line."""

import json
import os
import sys
import time
from pathlib import Path


DEBUG_VARIABLE = "PURIFIED_OPSD_DEBUG"  # set by `--debug`; the processes of a launched run inherit it
LAUNCHED_VARIABLE = "PURIFIED_OPSD_LAUNCHED"  # set by the launcher for the processes whose errors it prints
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

    Such errors are [`InputError`], a missing dependency (`ImportError`), files and connections (`OSError`), what the
    hub's client and wandb raise, and the `FloatingPointError` of an update that would not be finite. Every other error
    is a fault of the program and is raised again. Of several processes that `purified-opsd train` launched, none
    prints: the launcher prints the line of the one that failed first.

    Args:
        error (`Exception`):
            What a command raised.

    Returns:
        `int`: exit status of the command: 2, or 1 for the `FloatingPointError`.
    """
    expected = isinstance(error, InputError | ImportError | OSError | FloatingPointError)
    expected = expected or type(error).__module__.split(".")[0] in _THIRD_PARTY
    if not expected or os.environ.get(DEBUG_VARIABLE):
        raise error
    line, file = f"error: {one_line(error)}", os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and LAUNCHED_VARIABLE in os.environ:
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
    else:
        print(line, file=sys.stderr)
    return 1 if isinstance(error, FloatingPointError) else 2


def one_line(error: Exception) -> str:
    """Message of an error on one line; a file's error begins with the file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__
