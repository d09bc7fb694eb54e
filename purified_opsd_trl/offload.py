"""Copies of frozen states to host memory and back that run beside the computation, where there is a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor


class HostCopies:
    """
    Copies between a device and host memory, on a CUDA stream of their own; elsewhere plain copies.

    Args:
        device (`torch.device`):
            The device that computes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros in host memory: page-locked where there is a GPU, else a copy would wait."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self._stream is not None)

    def to_host(self, states: Tensor, out: Tensor) -> None:
        """Begins to copy states of the device to `out`, which may be read after [`~HostCopies.wait`]."""
        if self._stream is None or states.device != self._stream.device:
            out.copy_(states)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # the states are computed by then
        with torch.cuda.stream(self._stream):
            out.copy_(states, non_blocking=True)
        states.record_stream(self._stream)  # their memory is not given away before they are copied

    def wait(self) -> None:
        """Waits until everything begun has been copied."""
        if self._stream is not None:
            self._stream.synchronize()

    def to_device(self, states: Tensor) -> Callable[[], Tensor]:
        """
        Begins to copy states of the host to the device.

        Args:
            states (`torch.Tensor`):
                In host memory, not to be changed before the copy is read. States that are on the device are handed
                through.

        Returns:
            `Callable[[], torch.Tensor]`: gives the copy. What the current stream does after the call may read it.
        """
        stream = self._stream
        if stream is None or states.is_cuda:
            return lambda: states
        with torch.cuda.stream(stream):
            # `pin_memory` copies on the host; that buffer is not used again before the event of this copy has passed
            copy = states.pin_memory().to(self.device, non_blocking=True)
            arrived = stream.record_event()

        def get() -> Tensor:
            torch.cuda.current_stream(self.device).wait_event(arrived)
            copy.record_stream(torch.cuda.current_stream(self.device))  # it was allocated for the other stream
            return copy

        return get
