"""
Any row, prompt template and chat template: training gets contexts whose token ids are those that a second way of
building them gives, or the user gets one line.

`HYPOTHESIS_PROFILE=nightly` draws other cases every time, and twelve times as many.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any

import jinja2
import pytest
from datasets import IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import DatasetMixtureConfig

from purified_opsd_trl import InputError, PurifiedOPSDConfig, PurifiedOPSDTrainer, TeacherScoringCallback
from purified_opsd_trl.collator import unpad
from purified_opsd_trl.config_checks import check_templates
from purified_opsd_trl.dataset import FirstStepGuard, as_dataset, check_columns
from purified_opsd_trl.loading import PurifiedOPSDScriptArguments, load_splits, map_columns
from purified_opsd_trl.scores import TeacherScores

from .conftest import ADDED_TOKENS, FIXTURES, SPECIAL_TOKENS, TEMPLATES, build_model, build_tokenizer


settings.register_profile("quick", max_examples=50, derandomize=True)
settings.register_profile("nightly", max_examples=600, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
cases = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))

ASKED, SOLVED = "\u2602", "\u2603"  # stand in every question, in every reference, and nowhere else
Row = dict[str, Any]
Filled = Callable[[str, str], str]  # question, reference -> a filled template

# Rows that can be used -----------------------------------------------------------------------------------------------

SIGNS = ASKED + SOLVED
PIECES = st.sampled_from(["{question}", "{reference}", "{{", "}", "\\boxed{1}", "<think>", "</think>", "\n", " "])
characters = st.text(st.characters(codec="utf-8", exclude_characters="<" + SIGNS), max_size=4)
text = st.lists(PIECES | characters, max_size=5).map("".join)
questions = st.tuples(text, text).map(ASKED.join)
references = st.tuples(text, text).map(SOLVED.join)


def parts(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[Row]]:
    """The same as a list of parts, the last of which holds the sign."""
    return st.tuples(text, texts).map(lambda pair: [{"type": "text", "text": part} for part in pair])


def turn(role: str, contents: st.SearchStrategy[Any]) -> st.SearchStrategy[Row]:
    return contents.map(lambda content: {"role": role, "content": content})


exchange = st.tuples(turn("user", text), turn("assistant", text)).map(list)
messages = st.tuples(
    st.lists(turn("system", text), max_size=1),
    st.lists(exchange, max_size=2).map(lambda pairs: sum(pairs, [])),
    turn("user", questions | parts(questions)).map(lambda message: [message]),
).map(lambda lists: sum(lists, []))
row = st.fixed_dictionaries(
    {
        "prompt": questions | messages,
        "reference": references | st.lists(turn("assistant", references | parts(references)), min_size=1, max_size=2),
    }
)

# Anything else -------------------------------------------------------------------------------------------------------

scalar = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.binary(max_size=3)
odd_text = text | st.text(st.characters(), max_size=4) | st.sampled_from(["", " ", "\ud800", *SPECIAL_TOKENS])
odd_content = odd_text | scalar | st.lists(st.fixed_dictionaries({"type": odd_text, "text": odd_text}), max_size=2)
odd_content |= st.just([{"type": "image", "image": "x.png"}])
odd_message = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "name", "thinking"]), odd_content, max_size=4
) | st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | scalar, "content": odd_content},
    optional={"tool_calls": st.just([{"function": {"name": "f", "arguments": {"x": 1}}}]) | scalar},
)
anything = odd_content | st.lists(odd_message, max_size=3) | messages | st.dictionaries(odd_text, scalar, max_size=2)
odd_row = st.fixed_dictionaries({"prompt": anything | questions, "reference": anything | references}) | (
    st.dictionaries(st.sampled_from(["prompt", "reference", "image", "images", "x"]), anything, max_size=4)
)


# Templates -----------------------------------------------------------------------------------------------------------


def filled_with(*needed: str) -> st.SearchStrategy[tuple[str, Filled]]:
    """A prompt template with these placeholders, and the function that fills it by joining its pieces."""
    literal = st.text(st.characters(codec="utf-8", exclude_characters="<{}" + SIGNS), max_size=4)
    pieces = st.tuples(
        *[st.just(None).map(lambda _, name=name: name) for name in needed], literal, literal, st.just("{}")
    ).flatmap(st.permutations)

    def build(chosen: list[str]) -> tuple[str, Filled]:
        template = "".join(f"{{{piece}}}" if piece in needed else piece for piece in chosen)
        return template, lambda question, reference: "".join(
            {"question": question, "reference": reference}.get(piece, piece) if piece in needed else piece
            for piece in chosen
        )

    return pieces.map(build)


prompt_templates = st.fixed_dictionaries(
    {"teacher": filled_with("question", "reference"), "reference": filled_with("reference")}
)
# Chat templates put together from what real ones do, and from what can fail
CONTENTS = st.sampled_from(
    ["turn.content", "turn['content'] | trim", "turn.content.strip()", "turn.content + ''", "turn.content | tojson"]
    + ["turn.content.split('</think>')[-1]", "(turn.content | length) / 0", "turn.missing.content", "undefined()"]
    + ["turn.content | int", "turn.content.split('?')[7]", "turn.content.encode('ascii')", "turn.content | nofilter"]
)
GUARDS = st.sampled_from(
    ["", "{% if turn.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}", "{% if %}", "{{ 1 / 0 }}"]
    + ["{% if messages[0].role == 'user' and loop.index0 % 2 %}{{ raise_exception('a\\nb') }}{% endif %}"]
)
chat_templates = st.builds(
    lambda bos, guard, content: (
        f"{'{{ bos_token }}' if bos else ''}{{% for turn in messages %}}{guard}<|im_start|>{{{{ turn.role }}}}\n"
        f"{{{{ {content} }}}}<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n"
        "{% endif %}"
    ),
    st.booleans(),
    GUARDS,
    CONTENTS,
)
families = st.sampled_from(sorted(TEMPLATES)).map(
    lambda name: (FIXTURES / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
)

# The trainer, and the second way -------------------------------------------------------------------------------------

Templates = dict[str, tuple[str, Filled]]
VOCABULARY = {token: 256 + i for i, token in enumerate([*SPECIAL_TOKENS, *ADDED_TOKENS])}


class Recording(TeacherScoringCallback):
    """Keeps what it was asked to score."""

    asked: tuple[dict[str, list[list[int]]], list[list[int]]]

    def score(self, prompt_ids: dict[str, list[list[int]]], completion_ids: list[list[int]]) -> TeacherScores:
        self.asked = prompt_ids, completion_ids
        return super().score(prompt_ids, completion_ids)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> PurifiedOPSDTrainer:
    arguments = {
        **{"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_completion_length": 2},
        **{"gradient_checkpointing": False, "per_device_train_batch_size": 1, "decomposition_steps": 0},
    }
    return PurifiedOPSDTrainer(
        build_model(max_position_embeddings=4096),
        PurifiedOPSDConfig(str(tmp_path_factory.mktemp("run")), **arguments),
        [{"prompt": "q", "reference": "r"}],
        processing_class=build_tokenizer(),
        scoring_callback=Recording(),
    )


def read(
    trainer: PurifiedOPSDTrainer, rows: list[Row], templates: Templates, chat_template: str | None, stream: bool
) -> list[Row]:
    """The rows that the trainer keeps, after all of its checks."""
    names = {f"{name}_prompt_template": template for name, (template, _) in templates.items()}
    for name, template in names.items():
        setattr(trainer.args, name, template)
    check_templates(trainer.args)
    trainer._tokenizer.chat_template = chat_template
    data: Any = as_dataset(rows, "train_dataset")
    if stream:
        data = IterableDataset.from_generator(lambda: iter(rows))
    check_columns(data, "train_dataset", "reference")
    trainer.train_dataset = data
    trainer.read_datasets()
    trainer.remove_callback(FirstStepGuard)
    return list(trainer.train_dataset)


def assert_scored_as_written(
    trainer: PurifiedOPSDTrainer, rows: list[Row], templates: Templates, chat_template: str | None
) -> None:
    """Rolls out, scores, and compares every id that was scored with those of the second way."""
    trainer._generate_and_score_completions(rows)
    prompt_ids, completion_ids = trainer.scoring_callback.asked
    for i, row in enumerate(rows):
        expected = written(row, templates)
        for context, prompt in expected.items():
            assert prompt_ids[context][i] == encoded(prompt, chat_template), context
        assert not contains(prompt_ids["base"][i], SOLVED) and not contains(prompt_ids["reference_only"][i], ASKED)
    seen = set()
    for batch in trainer.scoring_batches(prompt_ids, completion_ids, share_prefixes=True):
        for i, key in enumerate(zip(batch.contexts, batch.rows, strict=True)):
            prefix = unpad(batch.prefix_ids, batch.prefix_mask)[batch.prefix_of[i]] if batch.prefix_of else []
            ids = prefix + batch.input_ids[i][batch.attention_mask[i].bool()].tolist()
            completion = completion_ids[key[1]]  # the same for every context
            assert ids == prompt_ids[key[0]][key[1]] + completion and completion
            seen.add(key)
    assert seen == {(context, i) for context in prompt_ids for i in range(len(rows))}


def contains(ids: list[int], sign: str) -> bool:
    return sign.encode() in bytes(i if i < 256 else 0 for i in ids)


def written(row: Row, templates: Templates) -> dict[str, str | list[Row]]:
    """The three prompts, from the pieces that the templates were made of."""

    def content(value: Any) -> Any:
        return "".join(part["text"] for part in value) if isinstance(value, list) else value

    reference = row["reference"]
    if isinstance(reference, list):
        reference = "\n\n".join(text for message in reference if (text := content(message["content"])))
    probe = templates["reference"][1]("", reference)
    if isinstance(row["prompt"], str):
        return {
            "base": row["prompt"],
            "teacher": templates["teacher"][1](row["prompt"], reference),
            "reference_only": probe,
        }
    turns = [{**message, "content": content(message.get("content"))} for message in row["prompt"]]
    last = [i for i, message in enumerate(turns) if message["role"] == "user"][-1]
    asked = {"role": "user", "content": templates["teacher"][1](turns[last]["content"], reference)}
    system = [message for message in turns if message["role"] in ("system", "developer")]
    return {
        "base": turns,
        "teacher": [*turns[:last], asked, *turns[last + 1 :]],
        "reference_only": [*system, {"role": "user", "content": probe}],
    }


def encoded(prompt: str | list[Row], chat_template: str | None) -> list[int]:
    """Ids of a prompt, by jinja and the bytes of the text alone."""
    if not isinstance(prompt, str):
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        tokenizer = build_tokenizer()
        names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "raise_exception": None}
        template = environment.from_string(str(chat_template))
        prompt = template.render(messages=prompt, add_generation_prompt=True, **names)
    pieces = re.split(f"({'|'.join(map(re.escape, VOCABULARY))})", prompt)
    return [i for piece in pieces for i in ([VOCABULARY[piece]] if piece in VOCABULARY else piece.encode())]


def assert_one_line(error: pytest.ExceptionInfo[InputError] | InputError) -> None:
    message = str(error)
    assert message.strip() and len(message.splitlines()) == 1, message


# The properties ------------------------------------------------------------------------------------------------------


def alike(rows: list[Row]) -> list[Row]:
    """The rows whose prompt is of the kind of the first."""
    return [row for row in rows if isinstance(row["prompt"], str) == isinstance(rows[0]["prompt"], str)]


@cases
@given(rows=st.lists(row, min_size=1, max_size=3).map(alike), templates=prompt_templates, family=families)
def test_usable_rows_are_scored_as_written(trainer, rows, templates, family) -> None:
    try:
        kept = read(trainer, rows, templates, family, stream=False)
    except InputError as error:  # Gemma's template knows no system turn, and so on
        assert_one_line(error)
        assert "the model's chat template refuses these messages" in str(error)
        assert any(message["role"] == "system" for row in rows for message in row["prompt"])
    else:
        assert len(kept) == len(rows)
        assert_scored_as_written(trainer, kept, templates, family)


@cases
@given(
    rows=st.lists(odd_row | row, min_size=1, max_size=3),
    templates=prompt_templates,
    family=families | st.none(),
    invalid=st.sampled_from(["error", "drop"]),
    stream=st.booleans(),
)
def test_other_rows_are_scored_as_written_or_one_line(trainer, rows, templates, family, invalid, stream) -> None:
    trainer.args.invalid_rows = invalid
    try:
        kept = read(trainer, rows, templates, family, stream)
    except InputError as error:
        assert_one_line(error)
        assert "train_dataset" in str(error)
    else:
        if kept:  # a stream may end without any
            assert_scored_as_written(trainer, kept, templates, family)
    finally:
        trainer.args.invalid_rows = "error"


@cases
@given(rows=st.lists(row, min_size=1, max_size=2).map(alike), templates=prompt_templates, chat_template=chat_templates)
def test_any_chat_template_renders_as_jinja_does_or_is_one_line(trainer, rows, templates, chat_template) -> None:
    try:
        kept = read(trainer, rows, templates, chat_template, stream=False)
    except InputError as error:
        assert_one_line(error)
        assert "chat template" in str(error)
    else:
        assert kept == rows or not isinstance(rows[0]["prompt"], str)
        assert_scored_as_written(trainer, kept, templates, chat_template)


lines = st.lists(
    odd_row.map(lambda value: json.dumps(value, default=str).encode())
    | row.map(lambda value: json.dumps(value, ensure_ascii=False).encode())
    | st.binary(max_size=6)
    | st.sampled_from([b"", b"  ", b"[]", b'{"prompt": "q", "prompt": "q"}', b'{"prompt": "q", "reference": "r"']),
    max_size=4,
)


@cases
@given(
    lines=lines,
    stream=st.booleans(),
    options=st.fixed_dictionaries(
        {"text_prompts": st.booleans(), "dataset_prompt_column": st.sampled_from(["prompt", "prompt", "x"])},
        optional={"dataset_reference_column": st.sampled_from(["reference", "prompt"])},
    ),
)
def test_any_file_is_rows_or_one_line(trainer, tmp_path_factory, lines, stream, options) -> None:
    file = tmp_path_factory.mktemp("lines") / "data.jsonl"
    file.write_bytes(b"\n".join(lines))
    arguments = PurifiedOPSDScriptArguments(dataset_name=str(file), dataset_streaming=stream, **options)
    try:
        dataset = map_columns(load_splits(arguments, DatasetMixtureConfig())["train"], arguments)
        rows = list(dataset)
    except InputError as error:
        assert_one_line(error)
    else:
        assert rows and len(rows) == sum(bool(line.strip()) for line in file.read_bytes().split(b"\n"))
        assert len(trainer.reader.faults(rows)) == len(rows)  # a reason per row, no traceback
