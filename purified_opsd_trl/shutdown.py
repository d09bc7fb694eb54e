"""Signals: the training process saves and ends at the next step, the launcher forwards what it receives."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from .errors import DEBUG_VARIABLE, LAUNCHED_VARIABLE


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_REPEAT_SECONDS = 2.0  # a scheduler and its launcher may both send the first signal


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[signal.Signals, Any]]:
    """Installs a handler of `_SIGNALS`; one that is ignored, as under nohup, stays ignored. Main thread only."""
    previous: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            previous |= {number: signal.signal(number, handler) for number in handled}
        yield previous
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class GracefulStop(TrainerCallback):
    """
    Ends training after the running step, with a checkpoint, once any process has received SIGTERM, SIGINT or SIGHUP.

    All processes agree at the end of every step, so that all stop after the same one. A second signal, more than two
    seconds after the first, has the effect that it had before training.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.stopped_by: signal.Signals | None = None  # agreed on
        self._received = 0
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @contextmanager
    def installed(self) -> Iterator["GracefulStop"]:
        """Handles the signals inside the block."""
        with _handled(self._receive) as self._previous:
            yield self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._received_at = number, time.monotonic()
            if self.accelerator.is_local_main_process:
                name = signal.Signals(number).name
                line = f"{name}: saving a checkpoint after this step. Another signal, in two seconds, stops at once.\n"
                os.write(2, line.encode())
        elif time.monotonic() - self._received_at > _REPEAT_SECONDS:
            signal.signal(number, self._previous[signal.Signals(number)])
            os.kill(os.getpid(), number)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        received = torch.tensor([self._received], device=self.accelerator.device)
        agreed = int(self.accelerator.gather(received).max())
        if agreed and state.global_step < state.max_steps:  # the last step ends training anyway
            self.stopped_by = signal.Signals(agreed)
            control.should_save = control.should_training_stop = True


def _launch(arguments: list[str]) -> None:
    """In a process of its own: outside the terminal's process group, so that every signal arrives once."""
    import torch.distributed.run  # noqa: F401  # its loggers take their level when they are imported
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.setsid()
    if DEBUG_VARIABLE not in os.environ:  # one line says which process failed and why
        os.environ[LAUNCHED_VARIABLE] = "1"
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            name = signal.Signals(-code).name
            print(f"error: training process {rank} was ended by {name}; the others were stopped.", file=sys.stderr)
        elif failure.error_file_data["message"] == failure.message:  # else the process has printed a traceback
            print(failure.message, file=sys.stderr)
    else:
        return
    sys.exit(code if code > 0 else 128 - code)


def launch(arguments: Sequence[str], module: str) -> int:
    """
    Runs `accelerate launch` and forwards SIGTERM, SIGINT and SIGHUP to the training processes, not to the launcher.

    torch's launcher would kill the processes 30 seconds after it was told to stop, in the middle of a checkpoint. A
    second signal kills everything that was started.

    Args:
        arguments (`Sequence[str]`):
            Arguments of `accelerate launch`, `-m` and the module among them.
        module (`str`):
            The module, by which the training processes are recognized.

    Returns:
        `int`: exit status of the launcher; 128 plus the signal if one ended it.
    """
    launcher = multiprocessing.get_context("fork").Process(target=_launch, args=(list(arguments),))
    ranks: list[psutil.Process] = []
    forwarded_at: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if forwarded_at and time.monotonic() - forwarded_at[0] <= _REPEAT_SECONDS:
            return
        tree = _descendants(launcher.pid)
        if not forwarded_at:
            ranks.extend(process for process in _descendants(launcher.pid, False) if _runs(process, module))
        targets = ranks if ranks and not forwarded_at else tree
        for process in targets:
            _send(process, number if targets is ranks else signal.SIGKILL)
        forwarded_at.append(time.monotonic())

    with _handled(forward):
        sys.stdout.flush()
        launcher.start()
        launcher.join()
        psutil.wait_procs(ranks)  # the launcher may have been killed before them
    code = launcher.exitcode or 0
    return 128 - code if code < 0 else code


def _descendants(pid: int | None, recursive: bool = True) -> list[psutil.Process]:
    """Processes below `pid`, itself among them if `recursive`."""
    try:
        root = psutil.Process(pid)
        return ([root] if recursive else []) + root.children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
