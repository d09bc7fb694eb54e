"""
Contrastive target: what a correct reference says more than a wrong one.

```text
target = softmax((1 + a) log p_c - a max(log p_w, f))      a = contrastive_alpha, f = contrastive_floor
weight = KL(p_c || p_w) / (KL(p_c || p_w) + t)             t = contrastive_tau, factor of each token's loss
```

`p_c` is the teacher under the row's own reference, `p_w` under a wrong one, both with the question: what any reference
induces cancels. The floor keeps tokens that both find impossible from being lifted. Proposed as RLCSD in arXiv
2606.11709, implemented from this formula alone, without the reinforcement learning that the paper combines it with.
The value of the floor is this package's choice.
"""

import torch
from torch import Tensor

from .dense import DenseTarget


def contrastive_logits(
    *, teacher: Tensor, wrong: Tensor, contrastive_alpha: float, contrastive_floor: float, contrastive_tau: float
) -> Tensor:
    """Target logits `[n, V]`; arguments are read only."""
    correct, other = torch.log_softmax(teacher, -1), torch.log_softmax(wrong, -1)
    return correct.mul_(1 + contrastive_alpha).sub_(other.clamp_(min=contrastive_floor), alpha=contrastive_alpha)


def contrastive_weights(
    *, teacher: Tensor, wrong: Tensor, contrastive_alpha: float, contrastive_floor: float, contrastive_tau: float
) -> Tensor:
    """Factor `[n]` of each token's loss, from 0 (both references say the same) to below 1."""
    correct = torch.log_softmax(teacher, -1)
    kl = (correct.exp() * (correct - torch.log_softmax(wrong, -1))).sum(-1).clamp_(min=0.0)
    return kl / (kl + contrastive_tau).clamp_(min=torch.finfo(kl.dtype).tiny)


CONTRASTIVE = DenseTarget(
    ("teacher", "wrong"),
    ("contrastive_alpha", "contrastive_floor", "contrastive_tau"),
    contrastive_logits,
    contrastive_weights,
)
