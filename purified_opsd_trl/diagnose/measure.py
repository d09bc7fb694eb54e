"""
Measures, without training, what a plain teacher's signal consists of: completions, four distributions a token, Eq. 4.

Shapes: C tokens of a completion, V vocabulary, H hidden units.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..contexts import Contexts
from ..errors import InputError
from ..evaluate.backends import Request, Sampling, TransformersBackend
from ..head import LMHead
from ..markers import TOKEN_CLASSES, MarkerCounter, TokenClassifier, distinct, has_answer
from ..monitoring.decomposition import STATISTICS, decomposition_stats


DISTRIBUTIONS = ("student", "teacher", "reference_only", "base")
POSITIONS = 10  # parts of a completion in the curve along it
_CHUNK = 64  # tokens whose logits `[chunk, V]` exist at once, under four contexts


@dataclass(frozen=True)
class Settings:
    """
    How completions are drawn and looked at.

    Attributes:
        temperature (`float`):
            Sampling temperature; it also divides all logits, as in training.
        max_completion_length (`int`):
            Longest completion in tokens.
        alternatives (`int`):
            Most likely tokens kept of each distribution.
        pages (`int`):
            Samples whose alternatives are kept, for the per-token page.
        seed (`int`):
            Seed of the completions.
        template_kwargs (`dict`):
            Arguments of the chat template.
        markers (`tuple[str, ...]`):
            Epistemic markers.
    """

    temperature: float
    max_completion_length: int
    alternatives: int
    pages: int
    seed: int
    template_kwargs: Mapping[str, Any]
    markers: tuple[str, ...]


class Models:
    """
    The frozen base and, on it or beside it, the student.

    Args:
        base ([`TransformersBackend`]):
            The initial policy: teacher, probe and anchor.
    """

    def __init__(self, base: TransformersBackend):
        self.base = base
        self.student = base
        self.tokenizer: Any = base.tokenizer

    def use(self, student: TransformersBackend | None, adapter: str | None) -> None:
        """
        Takes another model, or an adapter on the base, or neither, as the student.

        Raises:
            `InputError`: for an adapter whose loading changes the base, as it would be measured against itself.
        """
        self.base.load(adapter)
        if changed := self.base.overwritten():
            raise InputError(
                f"`adapter`: {adapter} changes weights of the base itself ({changed[0]}, say), which disabling it "
                "does not undo. Merge it into the model and name the result under `--checkpoints`."
            )
        self.student = student or self.base

    @contextmanager
    def frozen(self) -> Iterator[Any]:
        """The base without its adapter."""
        if hasattr(self.base.model, "disable_adapter"):
            with self.base.model.disable_adapter():
                yield self.base.model.get_base_model()
        else:
            yield self.base.model

    @contextmanager
    def trained(self) -> Iterator[Any]:
        """The student."""
        model = self.student.model
        yield model.get_base_model() if hasattr(model, "get_base_model") else model


def completions(models: Models, contexts: Sequence[Contexts], settings: Settings) -> list[list[int]]:
    """The student's completions of the questions, as ids."""
    requests = [
        Request(("", "", i), _ids(models.tokenizer, context.base, settings), settings.seed + i)
        for i, context in enumerate(contexts)
    ]
    sampling = Sampling(settings.temperature, 1.0, 0, settings.max_completion_length)
    drawn = {c.key[2]: c.ids for c in models.student.generate(requests, sampling)}
    return [drawn[i] for i in range(len(contexts))]


def _ids(tokenizer: Any, prompt: Any, settings: Settings) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, **settings.template_kwargs
    )["input_ids"]


@torch.no_grad()
def _hidden(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Last hidden states `[C, H]` from which the completion's tokens are predicted."""
    ids = torch.tensor([prompt + completion], device=model.device)
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]


class Meter:
    """
    Looks at one completion at a time.

    Args:
        models ([`Models`]):
            Base and student.
        settings ([`Settings`]):
            Settings.
    """

    def __init__(self, models: Models, settings: Settings):
        self.models = models
        self.settings = settings
        self.counter = MarkerCounter(settings.markers)
        self.classifier = TokenClassifier(models.tokenizer, self.counter)

    @torch.no_grad()
    def sample(self, contexts: Contexts, completion: list[int], with_alternatives: bool) -> dict[str, Any]:
        """
        Every number of one completion.

        Args:
            contexts ([`Contexts`]):
                Prompts.
            completion (`list[int]` of length `C`):
                Completion ids.
            with_alternatives (`bool`):
                Whether to keep the likely tokens of each distribution.

        Returns:
            `dict`: text, counts, and per token its piece, class, log-ratios, statistics and alternatives; JSON types.
        """
        states, heads = self._states(contexts, completion)
        labels = torch.tensor(completion, device=states["student"].device)
        tokens: dict[str, list[Any]] = {name: [] for name in ("delta_total", "delta_ref", "delta_it", *STATISTICS)}
        tokens |= {f"logprob_{name}": [] for name in DISTRIBUTIONS}
        alternatives: list[dict[str, Any]] = []
        for start in range(0, len(completion), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            logits = {name: heads[name].logits(state[chunk]) for name, state in states.items()}
            stats, parts = decomposition_stats(logits["student"], logits["teacher"], logits["reference_only"])
            at = labels[chunk].unsqueeze(-1)
            for name, values in (*zip(STATISTICS, stats, strict=True), *_at_label(parts._asdict(), at, "delta_")):
                tokens[name] += _rounded(values)
            log_probs = {name: torch.log_softmax(values, dim=-1) for name, values in logits.items()}
            for name, values in _at_label(log_probs, at, "logprob_"):
                tokens[name] += _rounded(values)
            if with_alternatives:
                alternatives += self._alternatives(log_probs)
        text: str = self.models.tokenizer.decode(completion, skip_special_tokens=True)
        return {
            "prompt": _text(contexts.base),
            "reference_prompt": _text(contexts.reference_only),
            "completion": text,
            "answered": has_answer(text),
            "distinct_2": distinct(completion, 2),
            "markers": self.counter.count(text),
            "pieces": self.classifier.pieces(completion),
            "classes": self.classifier.classify(completion),
            **tokens,
            **({"alternatives": alternatives} if with_alternatives else {}),
        }

    def _states(self, contexts: Contexts, completion: list[int]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        temperature = self.settings.temperature
        prompts = {
            "student": contexts.base,
            "teacher": contexts.teacher,
            "reference_only": contexts.reference_only,
            "base": contexts.base,
        }
        ids = {name: _ids(self.models.tokenizer, prompt, self.settings) for name, prompt in prompts.items()}
        states, heads = {}, {}
        with self.models.trained() as model:
            states["student"] = _hidden(model, ids["student"], completion)
            heads["student"] = LMHead.from_model(model, temperature)
        with self.models.frozen() as model:
            head = LMHead.from_model(model, temperature)
            for name in DISTRIBUTIONS[1:]:
                states[name] = _hidden(model, ids[name], completion)
                heads[name] = head
        return states, heads

    def _alternatives(self, log_probs: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Per token, by distribution: the most likely pieces with their probabilities."""
        tops = {name: values.topk(self.settings.alternatives) for name, values in log_probs.items()}
        count = len(next(iter(log_probs.values())))
        return [
            {
                name: list(
                    zip(self.classifier.pieces(top.indices[i].tolist()), _rounded(top.values[i].exp()), strict=True)
                )
                for name, top in tops.items()
            }
            for i in range(count)
        ]


def _at_label(values: Mapping[str, torch.Tensor], at: torch.Tensor, prefix: str) -> list[tuple[str, torch.Tensor]]:
    return [(prefix + name, value.gather(-1, at).squeeze(-1)) for name, value in values.items()]


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(
        f"{turn['role']}: {turn['content'] if isinstance(turn['content'], str) else turn['content']}"
        for turn in prompt
    )


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Means over the tokens of all samples: overall, by third, by class, along the completion; and counts on the text.

    Args:
        samples (`Sequence[dict]`):
            What [`Meter`] returned.

    Returns:
        `dict`: JSON types. `groups[name]` holds `tokens`, the statistics, and the sampled token's mean log-ratios.
    """
    columns = (*STATISTICS, "delta_total", "delta_ref", "delta_it")
    rows = [
        ([sample[name][i] for name in columns], i / len(sample["pieces"]), TOKEN_CLASSES[sample["classes"][i]])
        for sample in samples
        for i in range(len(sample["pieces"]))
    ]

    def mean(chosen: list[list[float]]) -> dict[str, Any]:
        if not chosen:
            return {"tokens": 0}
        values = torch.tensor(chosen, dtype=torch.float64).mean(dim=0).tolist()
        return {"tokens": len(chosen), **dict(zip(columns, values, strict=True))}

    groups = {"all": mean([values for values, _, _ in rows])}
    for third, name in enumerate(("first third", "middle third", "last third")):
        groups[name] = mean([values for values, place, _ in rows if int(3 * place) == third])
    for name in TOKEN_CLASSES:
        groups[name] = mean([values for values, _, kind in rows if kind == name])
    along = [mean([values for values, place, _ in rows if int(POSITIONS * place) == p]) for p in range(POSITIONS)]
    tokens = max(len(rows), 1)
    markers = {name: sum(s["markers"][name] for s in samples) for name in (samples[0]["markers"] if samples else ())}
    return {
        "samples": len(samples),
        "tokens": len(rows),
        "mean_length": len(rows) / max(len(samples), 1),
        "answer_rate": sum(s["answered"] for s in samples) / max(len(samples), 1),
        "distinct_2": sum(s["distinct_2"] for s in samples) / max(len(samples), 1),
        "markers_per_1k": {name: 1000 * count / tokens for name, count in markers.items()},
        "groups": groups,
        "along_completion": along,
    }
