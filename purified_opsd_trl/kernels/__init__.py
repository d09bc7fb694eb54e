"""Fused kernels of the token loss; `purified_opsd_trl.loss` is their public face."""

from .fused import AttachGradient, Problem, Solution, TargetLogits, solve
from .projection import Projector
from .rows import RowSettings, RowStats


__all__ = [
    "AttachGradient",
    "Problem",
    "Projector",
    "RowSettings",
    "RowStats",
    "Solution",
    "TargetLogits",
    "solve",
]
