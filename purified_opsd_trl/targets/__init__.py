"""
Targets beyond `purified` and `teacher`: one file each, and one line in [`DENSE_TARGETS`].

A file holds a [`DenseTarget`]: the contexts that it needs, the settings that it reads, and two functions on dense
logits of one chunk of tokens, so that memory stays bounded.
"""

from .contrastive import CONTRASTIVE
from .dense import DenseTarget
from .gated import GATED
from .interpolated import INTERPOLATED


__all__ = ["DENSE_TARGETS", "DenseTarget"]

DENSE_TARGETS: dict[str, DenseTarget] = {
    "contrastive": CONTRASTIVE,
    "gated": GATED,
    "interpolated": INTERPOLATED,
}
