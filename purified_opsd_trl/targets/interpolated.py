"""
Interpolated target: between the base and the privileged teacher.

```text
target = softmax((1 - w) z_base + w z_teacher)      w = interpolation_weight
```

`z` are logits; on log-probabilities the result is the same, as normalizers cancel. It is the normalized weighted
geometric mean of the two distributions, and the maximizer of `w E_P[log pi_T - log P_0] - KL(P || P_0)`. Weight 0 is
the base, 1 the teacher. Proposed as beta-OPSD in arXiv 2607.28582, implemented from its formula alone. The weight is
constant, or linear in the steps up to `interpolation_weight_end`: the trainer sets it at each step.
"""

from torch import Tensor

from .dense import DenseTarget


def interpolated_logits(*, base: Tensor, teacher: Tensor, interpolation_weight: float) -> Tensor:
    """Target logits `[n, V]`; arguments are read only."""
    return base + interpolation_weight * (teacher - base)


INTERPOLATED = DenseTarget(("base", "teacher"), ("interpolation_weight",), interpolated_logits)
