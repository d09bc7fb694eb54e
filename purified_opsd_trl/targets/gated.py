"""
Gated purified target: the tilt of a token only as far as the reference-only probe leaves it open.

```text
gate   = 1 - max_v pi_ref(v)                                        [n], from 0 (the probe is certain) to 1
target = softmax(log P_0 + clip(gate * center(log pi_T - log pi_ref)) / beta)      beta = pmi_beta, clip = pmi_clip
```

Where the probe already knows the token, teacher and probe agree on it. What is left of their ratio is noise, which
the purified target follows all the same: in the lab it turns a correct result into an error there. With the gate the
target stays at the base instead. Where the probe is unsure the gate is close to 1, and the target is close to the
purified one. This package's own, from that finding (docs/lab.md); no paper proposes it.
"""

import torch
from torch import Tensor

from ..purification import center, soft_clip
from .dense import DenseTarget


def gated_logits(
    *, base: Tensor, teacher: Tensor, reference_only: Tensor, pmi_beta: float, pmi_clip: float | None
) -> Tensor:
    """Target logits `[n, V]`; arguments are read only."""
    gate = 1.0 - torch.softmax(reference_only, -1).amax(-1, keepdim=True)
    return base + soft_clip(gate * center(teacher - reference_only), pmi_clip) / pmi_beta


GATED = DenseTarget(("base", "teacher", "reference_only"), ("pmi_beta", "pmi_clip"), gated_logits)
