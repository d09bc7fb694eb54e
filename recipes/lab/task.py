"""
The lab's task: chains of modular arithmetic, their worked solutions, and counts of what a response did.

```text
question     <q> 4 A +1 B -2 C +3 D *2 </q>          start value, then four labeled operations modulo 7
reference    <r> 5 </r>                              the answer, or with `rich` the sorted values before it as well
response     4 A 5 ; 5 B 4 wait 5 B 3 ; ... ans 5    value, label, result; `wait` tries the same step again
```

Each word is one token, so responses can be counted without parsing English.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


LABELS = "ABCD"
TEACHER_TEMPLATE = "{question} <r> {reference} </r>"
REFERENCE_TEMPLATE = "<r> {reference} </r>"


@dataclass(frozen=True)
class Problem:
    """
    A start value and one operation per label, modulo `modulus`.

    Attributes:
        modulus (`int`):
            A prime, so that every multiplication by a non-zero operand can be undone and answers are uniform.
        start (`int`):
            First value.
        operations (`tuple[str, ...]`):
            Words like `+3`, `-2`, `*5`, in the order of the labels.
    """

    modulus: int
    start: int
    operations: tuple[str, ...]

    def apply(self, label: str, value: int) -> int:
        """The correct result of a labeled operation on any value."""
        operation = self.operations[LABELS.index(label)]
        operand = int(operation[1:])
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[operation[0]]
        return result % self.modulus

    @property
    def values(self) -> list[int]:
        """The correct value after each operation; the last one is the answer."""
        values = [self.start]
        for label, _ in zip(LABELS, self.operations, strict=False):
            values.append(self.apply(label, values[-1]))
        return values[1:]

    @property
    def question(self) -> str:
        """The prompt of the student."""
        steps = " ".join(f"{label} {operation}" for label, operation in zip(LABELS, self.operations, strict=False))
        return f"<q> {self.start} {steps} </q>"

    def contradicts(self, label: str, result: int, rich: bool) -> bool:
        """Whether the reference alone, without arithmetic, shows that a result is wrong."""
        if rich and label != LABELS[-1]:
            return result not in self.values[:-1]
        return label == LABELS[-1] and result != self.values[-1]

    def reference(self, rich: bool) -> str:
        """The answer, after the sorted values before it if `rich`."""
        *before, answer = self.values
        return " ".join([*map(str, sorted(before)), ";", str(answer)]) if rich else str(answer)


@dataclass(frozen=True)
class Habits:
    """
    How a response is written in one context; probabilities.

    Attributes:
        wrong (`float`):
            A result is wrong: any other value, uniformly.
        wait_right (`float`):
            A correct result is followed by `wait` and another try.
        wait_wrong (`float`):
            A wrong result is followed by `wait` and another try.
        jump (`float`):
            The response goes straight to the answer before a step.
        slips (`bool`):
            Whether a wrong result is the unchanged value instead, as if the operation were forgotten.
    """

    wrong: float
    wait_right: float
    wait_wrong: float
    jump: float = 0.0
    slips: bool = False


def sample_problem(rng: random.Random, modulus: int, held_out: bool = False) -> Problem:
    """
    Draws a problem uniformly from one of two disjoint sets.

    Args:
        rng (`random.Random`):
            Source of randomness.
        modulus (`int`):
            A prime.
        held_out (`bool`, *optional*, defaults to `False`):
            Whether to draw from the eighth of all problems that no training sees.

    Returns:
        [`Problem`]
    """
    while True:
        operations = tuple(rng.choice("+-*") + str(rng.randrange(1, modulus)) for _ in LABELS)
        problem = Problem(modulus, rng.randrange(modulus), operations)
        if (zlib.crc32(problem.question.encode()) % 8 == 0) == held_out:
            return problem


def write_response(
    problem: Problem, habits: Habits, rng: random.Random, copies: bool = False, consults: bool | None = None
) -> str:
    """
    A response with the given habits. Errors carry on into later steps.

    Args:
        problem ([`Problem`]):
            The problem.
        habits ([`Habits`]):
            Habits of the writer.
        rng (`random.Random`):
            Source of randomness.
        copies (`bool`, *optional*, defaults to `False`):
            Whether the response ends in the reference's answer, whatever the steps gave.
        consults (`bool`, *optional*):
            Whether wrong results that contradict the reference are corrected before they are written: `True` for a
            rich reference, `False` for an answer, `None` without one.

    Returns:
        `str`: words, without the end-of-sequence token.
    """
    words: list[str] = []
    value = problem.start
    for label, _ in zip(LABELS, problem.operations, strict=True):
        if rng.random() < habits.jump:
            break
        while True:
            right = problem.apply(label, value)
            result = right
            if rng.random() < habits.wrong:
                result = value if habits.slips else (right + rng.randrange(1, problem.modulus)) % problem.modulus
            wrong = result != right
            if wrong and consults is not None and problem.contradicts(label, result, rich=consults):
                wrong, result = False, right
            words += [str(value), label, str(result)]
            if rng.random() >= (habits.wait_wrong if wrong else habits.wait_right):
                break
            words.append("wait")
        words.append(";")
        value = result
    answer = problem.values[-1] if copies else value
    return " ".join([*words, "ans", str(answer)])


@dataclass
class Counts:
    """
    Counts over a set of responses; `+` adds them.

    Attributes:
        responses, correct (`int`):
            Responses, and those that end in the right answer.
        waits, jumps (`int`):
            Occurrences of `wait`, and responses that answer before all steps are done.
        right, right_waits (`int`):
            Results that follow from the value before them, and those of them with a `wait` right after.
        wrong, wrong_waits, repaired (`int`):
            Results that do not, those with a `wait`, and those of the latter whose next try is right.
        tokens (`int`):
            Length of the responses in tokens, with the end-of-sequence token.
    """

    responses: int = 0
    correct: int = 0
    waits: int = 0
    jumps: int = 0
    right: int = 0
    right_waits: int = 0
    wrong: int = 0
    wrong_waits: int = 0
    repaired: int = 0
    tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def rates(self) -> dict[str, float | None]:
        """Accuracy, waits and tokens per response, and conditional rates; `None` where the condition never held."""

        def share(part: int, whole: int) -> float | None:
            return part / whole if whole else None

        return {
            "accuracy": self.correct / self.responses,
            "waits": self.waits / self.responses,
            "jumps": self.jumps / self.responses,
            "error_rate": share(self.wrong, self.right + self.wrong),
            "wait_given_right": share(self.right_waits, self.right),
            "wait_given_wrong": share(self.wrong_waits, self.wrong),
            "repaired_given_wait": share(self.repaired, self.wrong_waits),
            "tokens": self.tokens / self.responses,
        }


def count(problem: Problem, response: str) -> Counts:
    """
    Counts what a response did.

    Args:
        problem ([`Problem`]):
            The problem that it answers.
        response (`str`):
            Words, with or without the end-of-sequence token.

    Returns:
        [`Counts`]: of this one response.
    """
    words = response.split()
    counts = Counts(responses=1, waits=words.count("wait"), tokens=len(words))
    words = [word for word in words if word != "<eos>"]
    counts.correct = int(words[-2:] == ["ans", str(problem.values[-1])])
    tries = []  # (is right, index of the word after it)
    labels_done = set()
    for i in range(1, len(words) - 1):
        value, label, result = words[i - 1 : i + 2]
        if label in LABELS and value.isdecimal() and result.isdecimal():
            tries.append((problem.apply(label, int(value)) == int(result), i + 2))
            labels_done.add(label)
    counts.jumps = int("ans" in words and len(labels_done) < len(LABELS))
    for n, (right, after) in enumerate(tries):
        waits = words[after : after + 1] == ["wait"]
        counts.right, counts.right_waits = counts.right + right, counts.right_waits + (right and waits)
        counts.wrong, counts.wrong_waits = counts.wrong + (not right), counts.wrong_waits + (not right and waits)
        counts.repaired += not right and waits and n + 1 < len(tries) and tries[n + 1][0]
    return counts


def build_tokenizer(modulus: int) -> PreTrainedTokenizerFast:
    """One token per word; `<pad>` is 0 and `<eos>` is 1."""
    words = ["<pad>", "<eos>", "<q>", "</q>", "<r>", "</r>", ";", "wait", "ans", *LABELS, *map(str, range(modulus))]
    words += [sign + str(operand) for sign in "+-*" for operand in range(1, modulus)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=128
    )


def words_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """Words of a completion up to its end-of-sequence token."""
    words = tokenizer.convert_ids_to_tokens(list(ids))
    return " ".join(words[: words.index("<eos>") + 1] if "<eos>" in words else words)
