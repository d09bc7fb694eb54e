r"""
Row -> three prompts -> exact strings and token ids, under the chat templates of five model families.

Token ids are written out: a byte is its own id, `b"user"` is `[117, 115, 101, 114]`, special tokens start at 256 (see
`SPECIAL_TOKENS` in conftest.py).
"""

import pytest
from datasets import Dataset
from jinja2 import TemplateError

from purified_opsd_trl import InputError, PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.config import DEFAULT_REFERENCE_PROMPT_TEMPLATE, DEFAULT_TEACHER_PROMPT_TEMPLATE
from purified_opsd_trl.contexts import Contexts, build_contexts, content_text, fill_template, reference_text


QUESTION = r"What is \frac{1}{2} of {reference}?"  # braces and a placeholder's name are data here
REFERENCE = r"Half of it: \boxed{\frac{1}{2}} of {question}."
FILLED_TEACHER = r"Q: What is \frac{1}{2} of {reference}? R: Half of it: \boxed{\frac{1}{2}} of {question}. \boxed{}"
FILLED_REFERENCE = r"R: Half of it: \boxed{\frac{1}{2}} of {question}. \boxed{}"

USER = {"role": "user", "content": QUESTION}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi."}]


def contexts_of(prompt, reference=REFERENCE, **columns) -> Contexts:
    return build_contexts(
        {"prompt": prompt, "solution": reference, **columns},
        reference_column="solution",
        teacher_prompt_template=r"Q: {question} R: {reference} \boxed{}",
        reference_prompt_template=r"R: {reference} \boxed{}",
    )


def render(tokenizer, messages, **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)


# --- rendering ----------------------------------------------------------------------------------------------------

# template, its kwargs -> what stands before and after the text of a single user turn
FRAMES = [
    ("chatml", {}, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("chatml_no_system", {}, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("qwen3", {}, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("qwen3", {"enable_thinking": True}, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    (
        "qwen3",
        {"enable_thinking": False},
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    ("deepseek_r1_distill", {}, "<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜><think>\n"),
    (
        "llama3",
        {},
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    ("gemma", {}, "<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
]


@pytest.mark.parametrize(("template", "kwargs", "before", "after"), FRAMES)
def test_single_turn_under_every_template(make_tokenizer, template, kwargs, before, after) -> None:
    tokenizer = make_tokenizer(template)
    contexts = contexts_of([USER])
    assert render(tokenizer, contexts.base, **kwargs) == before + QUESTION + after
    assert render(tokenizer, contexts.teacher, **kwargs) == before + FILLED_TEACHER + after
    assert render(tokenizer, contexts.reference_only, **kwargs) == before + FILLED_REFERENCE + after


# Prompt: a system turn, an earlier exchange, the question. {} is where the last user turn's text goes.
MULTI_TURN = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\nHi.<|im_end|>\n"
        "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n",
    ),
    "deepseek_r1_distill": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello.<｜Assistant｜>\n\nHi.<｜end▁of▁sentence｜>"
        "<｜User｜>%s<｜Assistant｜><think>\n",
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>%s<｜Assistant｜><think>\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nhm\n</think>\n\nHi.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.mark.parametrize("template", MULTI_TURN)
def test_system_turns_stay_and_only_the_question_goes(make_tokenizer, template) -> None:
    tokenizer = make_tokenizer(template)
    contexts = contexts_of([SYSTEM, *EARLIER, USER])
    full, without_question = MULTI_TURN[template]
    assert render(tokenizer, contexts.base) == full % QUESTION
    assert render(tokenizer, contexts.teacher) == full % FILLED_TEACHER
    assert render(tokenizer, contexts.reference_only) == without_question % FILLED_REFERENCE


def test_gemma_multi_turn_alternates_in_every_context(make_tokenizer) -> None:
    tokenizer = make_tokenizer("gemma")
    contexts = contexts_of([*EARLIER, USER])
    before = "<bos><start_of_turn>user\n"
    exchange = "Hello.<end_of_turn>\n<start_of_turn>model\n<think>\nhm\n</think>\n\nHi.<end_of_turn>\n"
    after = "<end_of_turn>\n<start_of_turn>model\n"
    assert render(tokenizer, contexts.base) == before + exchange + "<start_of_turn>user\n" + QUESTION + after
    assert render(tokenizer, contexts.teacher) == before + exchange + "<start_of_turn>user\n" + FILLED_TEACHER + after
    assert render(tokenizer, contexts.reference_only) == before + FILLED_REFERENCE + after


@pytest.mark.parametrize("template", ["gemma", "chatml_no_system"])
def test_system_turn_is_never_dropped_for_a_template_without_one(make_tokenizer, template) -> None:
    contexts = contexts_of([SYSTEM, USER])
    for messages in (contexts.base, contexts.teacher, contexts.reference_only):
        with pytest.raises(TemplateError):
            render(make_tokenizer(template), messages)


def test_token_ids_of_the_three_contexts(make_tokenizer) -> None:
    contexts = contexts_of([{"role": "user", "content": "1+1?"}], "2")

    def ids(template: str, messages: list, **kwargs) -> list[int]:
        tokenizer = make_tokenizer(template, add_bos=template == "llama3")  # text gets a BOS of its own, chats do not
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kwargs)["input_ids"]

    start, end, think, no_think = 259, 260, 272, 273
    tail = [end, *b"\n", start, *b"assistant\n"]
    assert ids("qwen3", contexts.base) == [start, *b"user\n1+1?", *tail]
    assert ids("qwen3", contexts.teacher) == [start, *b"user\nQ: 1+1? R: 2 \\boxed{}", *tail]
    assert ids("qwen3", contexts.reference_only) == [start, *b"user\nR: 2 \\boxed{}", *tail]
    thinking_off = [*tail, think, *b"\n\n", no_think, *b"\n\n"]
    assert ids("qwen3", contexts.base, enable_thinking=False) == [start, *b"user\n1+1?", *thinking_off]
    assert ids("deepseek_r1_distill", contexts.reference_only) == [268, 269, *b"R: 2 \\boxed{}", 270, think, *b"\n"]
    header = [262, *b"user", 263, *b"\n\n"]
    assert ids("llama3", contexts.base) == [261, *header, *b"1+1?", 264, 262, *b"assistant", 263, *b"\n\n"]
    assert ids("gemma", contexts.base) == [265, 266, *b"user\n1+1?", 267, *b"\n", 266, *b"model\n"]


@pytest.mark.parametrize("template", ["chatml", "qwen3", "llama3", "deepseek_r1_distill", "gemma"])
def test_no_reference_text_in_the_students_ids(make_tokenizer, template) -> None:
    # the reference is spelt with letters that occur nowhere else, so one stray token is enough to fail
    tokenizer = make_tokenizer(template)
    system = [] if template == "gemma" else [{"role": "system", "content": "be brief"}]
    contexts = contexts_of([*system, {"role": "user", "content": "what is it"}], "XYZ ZYX")
    student, teacher, reference_only = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for messages in (contexts.base, contexts.teacher, contexts.reference_only)
    )
    assert not set(b"XYZ").intersection(student)
    assert set(b"XYZ") <= set(teacher) and set(b"XYZ") <= set(reference_only)
    question = bytes(i for i in reference_only if i < 256)
    assert b"what is it" not in question and b"what is it" in bytes(i for i in teacher if i < 256)


# --- building -----------------------------------------------------------------------------------------------------


def test_text_prompts_become_the_filled_templates() -> None:
    contexts = contexts_of(QUESTION)
    assert contexts == Contexts(base=QUESTION, teacher=FILLED_TEACHER, reference_only=FILLED_REFERENCE)


def test_question_is_the_rows_prompt_and_the_row_is_not_changed() -> None:
    prompt = [dict(SYSTEM), *(dict(turn) for turn in EARLIER), dict(USER)]
    contexts = contexts_of(prompt)
    assert contexts.base == [SYSTEM, *EARLIER, USER]
    contexts.teacher[0]["content"] = contexts.reference_only[0]["content"] = "changed"
    assert prompt == [SYSTEM, *EARLIER, USER]


def test_the_last_user_turn_is_the_question_also_before_tool_turns() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tool = {"role": "tool", "name": "f", "content": "4"}
    contexts = contexts_of([*EARLIER, USER, call, tool])
    assert contexts.base == [*EARLIER, USER, call, tool]
    assert contexts.teacher == [*EARLIER, {"role": "user", "content": FILLED_TEACHER}, call, tool]
    assert contexts.reference_only == [{"role": "user", "content": FILLED_REFERENCE}]


def test_developer_turns_count_as_system_turns() -> None:
    developer = {"role": "developer", "content": "Be brief."}
    assert contexts_of([developer, USER]).reference_only[0] == developer


def test_references_as_messages() -> None:
    messages = [{"role": "assistant", "content": "First half."}, {"role": "assistant", "content": "Second half."}]
    contexts = contexts_of("q", messages)
    assert contexts.teacher == "Q: q R: First half.\n\nSecond half. \\boxed{}"
    assert contexts.reference_only == "R: First half.\n\nSecond half. \\boxed{}"
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": " two."}]}]
    assert contexts_of("q", parts).reference_only == "R: One two. \\boxed{}"
    assert reference_text([{"role": "assistant", "content": None}, messages[0]], "solution") == "First half."


@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_list_of_parts_content_is_text_in_every_context(make_tokenizer, template) -> None:
    # templates written for text render a list as Python source (ChatML, Llama-3) or as nothing at all (Qwen3)
    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    prompt = [{"role": "system", "content": parts("Be brief.")}, {"role": "user", "content": parts("1+1", "?")}]
    contexts = contexts_of(prompt, "2")
    tokenizer = make_tokenizer(template)
    system = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, contexts.teacher) == system + "Q: 1+1? R: 2 \\boxed{}" + tail
    assert render(tokenizer, contexts.reference_only) == system + "R: 2 \\boxed{}" + tail
    assert render(tokenizer, contexts.base) == system + "1+1?" + tail


def test_fill_template_fills_once_and_leaves_other_braces() -> None:
    template = r"{question}|{reference}|{question}|{other}|{}|\boxed{x}|{{reference}}"
    filled = fill_template(template, question="{reference}", reference=r"\1 {question}")
    assert filled == r"{reference}|\1 {question}|{reference}|{other}|{}|\boxed{x}|{\1 {question}}"


def test_default_templates_differ_by_the_question_alone() -> None:
    for text in (DEFAULT_TEACHER_PROMPT_TEMPLATE, DEFAULT_REFERENCE_PROMPT_TEMPLATE):
        assert text.count("{reference}") == 1
    assert DEFAULT_TEACHER_PROMPT_TEMPLATE == "{question}\n\n" + DEFAULT_REFERENCE_PROMPT_TEMPLATE


def test_every_row_of_the_fixture_data(conversational_dataset, standard_dataset, tokenizer) -> None:
    for row in [*conversational_dataset, *standard_dataset]:
        contexts = build_contexts(
            row,
            reference_column="reference",
            teacher_prompt_template=DEFAULT_TEACHER_PROMPT_TEMPLATE,
            reference_prompt_template=DEFAULT_REFERENCE_PROMPT_TEMPLATE,
        )
        is_text = isinstance(row["prompt"], str)
        question = row["prompt"] if is_text else row["prompt"][-1]["content"]
        student, teacher, reference_only = (
            context if is_text else render(tokenizer, context)
            for context in (contexts.base, contexts.teacher, contexts.reference_only)
        )
        assert question in student and row["reference"] not in student
        assert question in teacher and row["reference"] in teacher
        assert question not in reference_only and row["reference"] in reference_only
        assert contexts.base == row["prompt"]


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (None, "column `solution`: the reference is None"),
        ("", "column `solution`: the reference is empty"),
        (" \n\t", "column `solution`: the reference is empty"),
        ([], "column `solution`: the reference is empty"),
        ([{"role": "assistant", "content": ""}], "column `solution`: the reference is empty"),
        (42, "column `solution`: a reference must be a string or a list of messages, got int"),
        (float("nan"), "column `solution`: a reference must be a string or a list of messages, got float"),
        (["text"], "column `solution`: a reference must be a string or a list of messages, got list"),
        (
            [{"role": "assistant", "content": [{"type": "image"}]}],
            "column `solution`: only text can be distilled, but a message holds parts of type image",
        ),
    ],
)
def test_bad_reference(reference, message) -> None:
    with pytest.raises(InputError) as error:
        contexts_of([USER], reference)
    assert message in str(error.value)


def test_missing_reference_column_lists_the_columns() -> None:
    with pytest.raises(InputError) as error:
        build_contexts(
            {"prompt": "q", "answer": "7"},
            reference_column="solution",
            teacher_prompt_template="{question}{reference}",
            reference_prompt_template="{reference}",
        )
    message = str(error.value)
    assert "no column `solution`" in message and "`prompt`, `answer`" in message and "reference_column" in message


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "column `prompt`: a prompt must be a string or a list of messages with `role` and `content`, got None"),
        (7, "column `prompt`: a prompt must be a string or a list of messages with `role` and `content`, got int"),
        (
            ["q"],
            "column `prompt`: a prompt must be a string or a list of messages with `role` and `content`, got list",
        ),
        ([{"from": "human", "value": "q"}], "column `prompt`: a prompt must be a string or a list of messages"),
        ([{"role": "user"}], "column `prompt`: a prompt must be a string or a list of messages"),
        ("", "column `prompt`: the prompt is empty"),
        (" \n", "column `prompt`: the prompt is empty"),
        ([], "column `prompt`: the prompt has no user turn (roles: none)"),
        ([SYSTEM], "column `prompt`: the prompt has no user turn (roles: system)"),
        ([USER, EARLIER[1]], "column `prompt`: the prompt ends in an assistant turn"),
        ([{"role": "user", "content": " "}], "column `prompt`: the last user turn is empty"),
        ([{"role": "user", "content": None}], "column `prompt`: the last user turn is empty"),
        ([{"role": "user", "content": 7}], "column `prompt`: message content must be a string or a list of parts"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "audio"}]}],
            "column `prompt`: only text and images can be distilled, but a message holds parts of type audio",
        ),
        ([{"role": "user", "content": ["q"]}], "column `prompt`: message content must be a string or a list of parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "column `prompt`: a part of type text must hold a string"),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            "column `prompt`: a part of type text must hold a string",
        ),
    ],
)
def test_bad_prompt(prompt, message) -> None:
    with pytest.raises(InputError) as error:
        contexts_of(prompt)
    assert message in str(error.value)


def test_content_text() -> None:
    assert content_text("a", "prompt") == "a"
    assert content_text(None, "prompt") == ""
    assert content_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "prompt") == "ab"


# --- as the trainer renders them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student_kwargs", "teacher_kwargs", "student_thinks", "teacher_thinks"),
    [
        (None, None, True, True),
        ({"enable_thinking": False}, None, False, False),  # by default the teacher's kwargs are the student's
        ({"enable_thinking": True}, {"enable_thinking": False}, True, False),
        ({"enable_thinking": False}, {"enable_thinking": True}, False, True),
        ({"enable_thinking": False}, {}, False, True),  # an empty mapping is not "the student's"
    ],
)
def test_thinking_of_student_and_teacher(
    make_model, make_tokenizer, arguments, student_kwargs, teacher_kwargs, student_thinks, teacher_thinks
) -> None:
    arguments |= {"chat_template_kwargs": student_kwargs, "teacher_chat_template_kwargs": teacher_kwargs}
    prompt = [{"role": "user", "content": "1+1?"}]
    trainer = PurifiedOPSDTrainer(
        make_model(),
        PurifiedOPSDConfig(**arguments),
        train_dataset=Dataset.from_list([{"prompt": prompt, "reference": "2"}] * 2),
        processing_class=make_tokenizer("qwen3"),
    )
    tail = {True: [260, *b"\n", 259, *b"assistant\n"]}
    tail[False] = [*tail[True], 272, *b"\n\n", 273, *b"\n\n"]
    question = [259, *b"user\n1+1?"]
    for _ in range(2):  # rendering for the teacher leaves the student's kwargs as they were
        assert trainer._tokenize_prompts([prompt])[0] == [[*question, *tail[student_thinks]]]
        assert trainer.tokenize_teacher_prompts([prompt]) == [[*question, *tail[teacher_thinks]]]
