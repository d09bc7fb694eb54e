"""Purified on-policy self-distillation for TRL (arXiv 2607.02234)."""

from .collator import PurificationCollator, ScoringBatch
from .config import PurifiedOPSDConfig
from .contexts import Contexts, build_contexts
from .errors import InputError
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
