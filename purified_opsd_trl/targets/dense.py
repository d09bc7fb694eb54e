"""What a target on dense logits consists of."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseTarget:
    """
    A target that is computed from dense logits of one chunk of tokens.

    Args:
        states (`tuple[str, ...]`):
            Contexts that it needs, of `"base"`, `"teacher"`, `"reference_only"` and `"wrong"`: each one is scored and
            projected.
        options (`tuple[str, ...]`):
            Fields of the config that both functions get as keyword arguments.
        logits (`Callable[..., torch.Tensor]`):
            Natural logits `[n, V]` of each of `states`, as keyword arguments, to the target's unnormalized
            log-probabilities `[n, V]`.
        weights (`Callable[..., torch.Tensor]`, *optional*):
            The same arguments to the factor `[n]` of each token's loss. `None` for 1.
    """

    states: tuple[str, ...]
    options: tuple[str, ...]
    logits: Callable[..., Tensor]
    weights: Callable[..., Tensor] | None = None
