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
from .controls import SIGNAL, signal


DISTRIBUTIONS = ("student", "teacher", "reference_only", "base")
DELTAS = ("delta_total", "delta_ref", "delta_it")
MEASURED = (*STATISTICS, *DELTAS, *SIGNAL)  # per token and source of references
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

    @property
    def is_trained(self) -> bool:
        """Whether the student is another model than the base."""
        return self.student is not self.base or hasattr(self.base.model, "disable_adapter")

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
    if tokenizer.chat_template is None:
        raise InputError(
            "`model_name_or_path`: the tokenizer has no chat template. For a base model set `text_prompts: true`, "
            "with prompts that are text."
        )
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
        self.settings = args.settings
        self.counter = MarkerCounter(args.epistemic_markers)
        self.classifier = TokenClassifier(models.tokenizer, self.counter)

    @torch.no_grad()
    def sample(
        self, contexts: Mapping[str, Contexts], completion: list[int], with_alternatives: bool
    ) -> dict[str, Any]:
        """
        Every number of one completion (`C` ids), in JSON types, with `contexts` by source of references.

        Text, counts, and per token its piece, class, log-probabilities and `MEASURED` under the own reference,
        optionally with the likely tokens of each distribution; `controls` holds `MEASURED` of the other sources.
        """
        states, heads = self._states(contexts, completion)
        labels = torch.tensor(completion, device=states["student"].device)
        measured: dict[str, dict[str, list[Any]]] = {name: {key: [] for key in MEASURED} for name in contexts}
        tokens: dict[str, list[Any]] = {f"logprob_{name}": [] for name in DISTRIBUTIONS}
        alternatives: list[dict[str, Any]] = []
        for start in range(0, len(completion), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            at = labels[chunk].unsqueeze(-1)
            shared = {name: heads[name].logits(states[name][chunk]) for name in ("student", "base")}
            own = None
            for source in contexts:
                seen = {key[1]: state[chunk] for key, state in states.items() if key[0] == source}
                logits = {**shared, **{name: heads["base"].logits(state) for name, state in seen.items()}}
                stats, parts = decomposition_stats(logits["student"], logits["teacher"], logits["reference_only"])
                values, tilts = signal(logits, parts, self.settings, own)
                columns = {**stats._asdict(), **values._asdict(), **dict(_at_label(parts._asdict(), at, "delta_"))}
                for name, column in columns.items():
                    measured[source][name] += _rounded(column)
                if own is None:
                    own = tilts
                    log_probs = {name: torch.log_softmax(logits[name], dim=-1) for name in DISTRIBUTIONS}
                    for name, column in _at_label(log_probs, at, "logprob_"):
                        tokens[name] += _rounded(column)
                    if with_alternatives:
                        alternatives += self._alternatives(log_probs)
        text: str = self.models.tokenizer.decode(completion, skip_special_tokens=True)
        first, *controls = contexts
        return {
            "prompt": _text(contexts[first].base),
            "reference_prompt": _text(contexts[first].reference_only),
            "completion": text,
            "answered": has_answer(text),
            "distinct_2": distinct(completion, 2),
            "markers": self.counter.count(text),
            "pieces": self.classifier.pieces(completion),
            "classes": self.classifier.classify(completion),
            **tokens,
            **measured[first],
            "controls": {
                name: {"reference_prompt": _text(contexts[name].reference_only), **measured[name]} for name in controls
            },
            **({"alternatives": alternatives} if with_alternatives else {}),
        }

    def _states(
        self, contexts: Mapping[str, Contexts], completion: list[int]
    ) -> tuple[dict[Any, torch.Tensor], dict[str, LMHead]]:
        """States `[C, H]` of `"student"`, `"base"` and `(source, context)`, and the heads of the first two."""
        temperature = self.args.temperature
        prompts: dict[Any, Any] = {}
        for source, own in contexts.items():
            prompts["base"] = own.base
            prompts |= {(source, "teacher"): own.teacher, (source, "reference_only"): own.reference_only}
            prompts |= {(source, "wrong"): own.wrong} if own.wrong is not None else {}
        ids = {name: _ids(self.models.tokenizer, prompt, self.args) for name, prompt in prompts.items()}
        with self.models.frozen() as model:
            states = {name: _hidden(model, prompt, completion) for name, prompt in ids.items()}
            heads = {"base": LMHead.from_model(model, temperature)}
        states["student"], heads["student"] = states["base"], heads["base"]
        if self.models.is_trained:
            with self.models.trained() as model:
                states["student"] = _hidden(model, ids["base"], completion)
                heads["student"] = LMHead.from_model(model, temperature)
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

    `groups[name]` holds `tokens`, `SUMMARIES`, and the means of `DELTAS` and `SIGNAL`; `controls` the same by source.
    """
    tokens = sum(len(sample["pieces"]) for sample in samples)
    markers = {name: sum(s["markers"][name] for s in samples) for name in (samples[0]["markers"] if samples else ())}
    controls = samples[0]["controls"] if samples else ()
    return {
        "samples": len(samples),
        "tokens": tokens,
        "mean_length": tokens / max(len(samples), 1),
        "answer_rate": sum(s["answered"] for s in samples) / max(len(samples), 1),
        "distinct_2": sum(s["distinct_2"] for s in samples) / max(len(samples), 1),
        "markers_per_1k": {name: 1000 * count / max(tokens, 1) for name, count in markers.items()},
        **_grouped(samples, samples),
        "controls": {name: _grouped(samples, [sample["controls"][name] for sample in samples]) for name in controls},
    }


def _grouped(samples: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`groups` and `along_completion` of what one source of references measured on the samples."""
    rows = [
        ([values[name][i] for name in MEASURED], i / len(sample["pieces"]), sample["classes"][i])
        for sample, values in zip(samples, measured, strict=True)
        for i in range(len(sample["pieces"]))
    ]

    def over(chosen: list[list[float]]) -> dict[str, Any]:
        if not chosen:
            return {"tokens": 0}
        columns = dict(zip(MEASURED, torch.tensor(chosen, dtype=torch.float64).T, strict=True))
        means = {name: columns[name].mean().item() for name in (*DELTAS, *SIGNAL)}
        return {"tokens": len(chosen), **summaries(columns), **means}

    groups = {"all": over([values for values, _, _ in rows])}
    for third, name in enumerate(THIRDS):
        groups[name] = over([values for values, place, _ in rows if int(len(THIRDS) * place) == third])
    for kind, name in enumerate(TOKEN_CLASSES):
        groups[name] = over([values for values, _, own in rows if own == kind])
    along = [over([values for values, place, _ in rows if int(POSITIONS * place) == p]) for p in range(POSITIONS)]
    return {"groups": groups, "along_completion": along}
