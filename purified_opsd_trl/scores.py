"""What scoring hands on: hidden states of the frozen model under each context, and what they cost."""

from dataclasses import dataclass, replace

import torch

from .head import LMHead, gathered


@dataclass(frozen=True)
class ScoringStats:
    """
    Cost of one scoring pass on this process.

    Attributes:
        tokens (`int`):
            Tokens run through the model, prompts included, all contexts; a shared prefix counts once.
        padded_tokens (`int`):
            The same with padding.
        forwards (`int`):
            Forward passes of the frozen model.
        seconds (`float`):
            Wall-clock time in seconds.
    """

    tokens: int
    padded_tokens: int
    forwards: int
    seconds: float


@dataclass(frozen=True)
class TeacherScores:
    """
    Hidden states of the frozen model under each context, aligned to the completion tokens.

    Attributes:
        hidden (`dict[str, torch.Tensor]`):
            Last hidden states `[B, C, H]` by context (`"base"`, `"teacher"`, `"reference_only"`): position t holds the
            state from which token t of the completion is predicted. Zero at padding.
        completion_mask (`torch.Tensor` of shape `[B, C]`):
            True at completion tokens.
        head ([`LMHead`]):
            The frozen model's output head.
        temperature (`float`):
            Sampling temperature that divides the logits.
        stats ([`ScoringStats`]):
            Cost of the pass.
    """

    hidden: dict[str, torch.Tensor]
    completion_mask: torch.Tensor
    head: LMHead
    temperature: float
    stats: ScoringStats

    def log_probs(self, token_ids: torch.Tensor, context: str) -> torch.Tensor:
        """
        Log-probabilities of any tokens under one context.

        Args:
            token_ids (`torch.Tensor` of shape `[B, C]` or `[B, C, K]`):
                Token ids: one, or K alternatives, at each position.
            context (`str`):
                `"base"`, `"teacher"` or `"reference_only"`.

        Returns:
            `torch.Tensor` of the shape of `token_ids`: nats, fp32; 0 at padding.
        """
        hidden = self.hidden[context]
        ids = token_ids if token_ids.dim() == 3 else token_ids.unsqueeze(-1)
        result = torch.zeros(ids.shape, dtype=torch.float32, device=hidden.device)
        head = replace(self.head, temperature=self.temperature)
        with gathered(head):
            for row, mask in enumerate(self.completion_mask):
                log_probs = torch.log_softmax(head.logits(hidden[row, mask]), dim=-1)
                result[row, mask] = log_probs.gather(-1, ids[row, mask].to(log_probs.device)).to(result)
        return result.view(token_ids.shape)

    def contrast(self, token_ids: torch.Tensor, context: str, without: str) -> torch.Tensor:
        """
        Log-ratio of any tokens between two contexts.

        `contrast(ids, "teacher", "base")` is what the reference adds to the question; `contrast(ids, "teacher",
        "reference_only")` is what the question adds to the reference (Delta_it, Eq. 4).

        Args:
            token_ids (`torch.Tensor` of shape `[B, C]` or `[B, C, K]`):
                Token ids.
            context (`str`):
                Context in the numerator.
            without (`str`):
                Context in the denominator.

        Returns:
            `torch.Tensor` of the shape of `token_ids`: nats; 0 at padding.
        """
        return self.log_probs(token_ids, context) - self.log_probs(token_ids, without)
