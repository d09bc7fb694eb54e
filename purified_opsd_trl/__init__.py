"""Purified on-policy self-distillation for TRL (arXiv 2607.02234)."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .extras import quiet_start


if TYPE_CHECKING:
    from .collator import PurificationCollator, ScoringBatch
    from .config import PurifiedOPSDConfig
    from .contexts import Contexts, build_contexts
    from .head import LMHead
    from .purification import Decomposition, center, decompose, divergence, purified_target_logits, soft_clip
    from .scores import ScoringStats, TeacherScores
    from .scoring import TeacherScoringCallback
    from .trainer import PurifiedOPSDTrainer


__all__ = [
    "Contexts",
    "Decomposition",
    "InputError",
    "LMHead",
    "PurificationCollator",
    "PurifiedOPSDConfig",
    "PurifiedOPSDTrainer",
    "ScoringBatch",
    "ScoringStats",
    "TeacherScores",
    "TeacherScoringCallback",
    "build_contexts",
    "center",
    "decompose",
    "divergence",
    "purified_target_logits",
    "soft_clip",
]

# Imported on first use: `purified-opsd --help` must not wait for torch
_MODULES = {
    "collator": ("PurificationCollator", "ScoringBatch"),
    "config": ("PurifiedOPSDConfig",),
    "contexts": ("Contexts", "build_contexts"),
    "head": ("LMHead",),
    "purification": ("Decomposition", "center", "decompose", "divergence", "purified_target_logits", "soft_clip"),
    "scores": ("ScoringStats", "TeacherScores"),
    "scoring": ("TeacherScoringCallback",),
    "trainer": ("PurifiedOPSDTrainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


quiet_start()
