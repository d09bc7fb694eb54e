"""
Measures, without training, what a plain teacher's signal consists of: four distributions per token, Eq. 4.

Shapes: C tokens of a completion, V vocabulary, H hidden units.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..contexts import Contexts
from ..errors import InputError
from ..evaluate.backends import Request, Sampling, TransformersBackend
from ..head import LMHead
from ..markers import TOKEN_CLASSES, MarkerCounter, TokenClassifier, distinct, has_answer
from ..monitoring.decomposition import STATISTICS, THIRDS, decomposition_stats, summaries
from .arguments import DiagnoseArguments


DISTRIBUTIONS = ("student", "teacher", "reference_only", "base")
POSITIONS = 10  # parts of a completion in the curve along it
_CHUNK = 64  # tokens whose logits `[chunk, V]` exist at once, under four contexts


class Models:
    """The frozen base (teacher, probe and anchor) and the student, which may be an adapter on it."""

    def __init__(self, base: TransformersBackend):
        self.base = base
        self.student = base
        self.tokenizer: Any = base.tokenizer

    def use(self, student: TransformersBackend | None, adapter: str | None) -> None:
        """
        Makes another model, an adapter on the base, or the base itself the student.

        Refuses an adapter whose loading changes the base, since the student would be compared with itself.
        """
        self.base.load(adapter)
        if changed := self.base.overwritten():
            raise InputError(
                f"`adapter`: {adapter} changes weights of the base itself ({changed[0]} among them), which disabling "
                "the adapter does not undo. Merge it into the model and pass the result as `checkpoints`."
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


def completions(models: Models, contexts: Sequence[Contexts], args: DiagnoseArguments) -> list[list[int]]:
    """The student's completions of the questions, as ids."""
    requests = [
        Request(("", "", i), _ids(models.tokenizer, context.base, args), args.seed + i)
        for i, context in enumerate(contexts)
    ]
    sampling = Sampling(args.temperature, 1.0, 0, args.max_completion_length)
    drawn = {c.key[2]: c.ids for c in models.student.generate(requests, sampling)}
    return [drawn[i] for i in range(len(contexts))]


def _ids(tokenizer: Any, prompt: Any, args: DiagnoseArguments) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **args.template_kwargs)[
        "input_ids"
    ]


@torch.no_grad()
def _hidden(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Last hidden states `[C, H]` from which the completion's tokens are predicted."""
    ids = torch.tensor([prompt + completion], device=model.device)
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]


class Meter:
    """Measures one completion at a time."""

    def __init__(self, models: Models, args: DiagnoseArguments):
        self.models = models
        self.args = args
        self.counter = MarkerCounter(args.epistemic_markers)
        self.classifier = TokenClassifier(models.tokenizer, self.counter)

    @torch.no_grad()
    def sample(self, contexts: Contexts, completion: list[int], with_alternatives: bool) -> dict[str, Any]:
        """
        Every number of one completion (`C` ids), in JSON types.

        Text, counts, and per token its piece, class, log-ratios and statistics, optionally with the likely tokens of
        each distribution.
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
        temperature = self.args.temperature
        prompts = (contexts.base, contexts.teacher, contexts.reference_only, contexts.base)
        ids = {
            name: _ids(self.models.tokenizer, prompt, self.args)
            for name, prompt in zip(DISTRIBUTIONS, prompts, strict=True)
        }
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
        tops = {name: values.topk(self.args.alternatives) for name, values in log_probs.items()}
        pieces = {name: [self.classifier.pieces(row) for row in top.indices.tolist()] for name, top in tops.items()}
        shares = {name: [_rounded(row.exp()) for row in top.values] for name, top in tops.items()}
        count = len(log_probs["student"])
        return [
            {name: list(zip(pieces[name][i], shares[name][i], strict=True)) for name in tops} for i in range(count)
        ]


def _at_label(values: Mapping[str, torch.Tensor], at: torch.Tensor, prefix: str) -> list[tuple[str, torch.Tensor]]:
    return [(prefix + name, value.gather(-1, at).squeeze(-1)) for name, value in values.items()]


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def summarize(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Statistics over the tokens of all samples: overall, by third, by class, along the completion; and counts on texts.

    `groups[name]` holds `tokens`, `SUMMARIES`, and the mean log-ratios of the sampled token.
    """
    deltas = ("delta_total", "delta_ref", "delta_it")
    rows = [
        ([sample[name][i] for name in (*STATISTICS, *deltas)], i / len(sample["pieces"]), sample["classes"][i])
        for sample in samples
        for i in range(len(sample["pieces"]))
    ]

    def over(chosen: list[list[float]]) -> dict[str, Any]:
        if not chosen:
            return {"tokens": 0}
        columns = dict(zip((*STATISTICS, *deltas), torch.tensor(chosen, dtype=torch.float64).T, strict=True))
        return {"tokens": len(chosen), **summaries(columns), **{name: columns[name].mean().item() for name in deltas}}

    groups = {"all": over([values for values, _, _ in rows])}
    for third, name in enumerate(THIRDS):
        groups[name] = over([values for values, place, _ in rows if int(len(THIRDS) * place) == third])
    for kind, name in enumerate(TOKEN_CLASSES):
        groups[name] = over([values for values, _, own in rows if own == kind])
    along = [over([values for values, place, _ in rows if int(POSITIONS * place) == p]) for p in range(POSITIONS)]
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
