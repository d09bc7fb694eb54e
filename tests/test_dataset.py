"""What is decided before training: columns, bad rows by number, references that are too long, streamed data."""

from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from purified_opsd_trl import Contexts, InputError, build_contexts
from purified_opsd_trl.dataset import ReferenceLimit, check_columns, check_prompt, prepare_dataset


def build(row: dict[str, Any]):
    return build_contexts(
        row,
        reference_column="reference",
        teacher_prompt_template="Q: {question} R: {reference}",
        reference_prompt_template="R: {reference}",
    )


def limit(tokenizer, max_reference_length: int | None = None, max_prompt_length: int | None = None) -> ReferenceLimit:
    def tokenize(prompts: list) -> list[list[int]]:
        if isinstance(prompts[0], str):
            return tokenizer(text=prompts)["input_ids"]
        return tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]

    return ReferenceLimit(tokenizer, tokenize, build, "reference", max_reference_length, max_prompt_length)


def prepare(dataset, limit: ReferenceLimit, policy: str = "error"):
    lines: list[str] = []
    prepared = prepare_dataset(
        dataset, "train_dataset", limit=limit, policy=policy, report=lines.append, show_progress=False
    )
    return prepared, lines


def rows_of(*references: Any, prompt: Any = "q") -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "reference": reference} for reference in references])


# --- columns ------------------------------------------------------------------------------------------------------


def test_missing_columns_are_named_and_the_present_ones_listed() -> None:
    dataset = Dataset.from_list([{"problem": "q", "answer": "a"}])
    with pytest.raises(InputError) as error:
        check_columns(dataset, "train_dataset", "reference")
    assert "train_dataset has no column `prompt`; its columns are `problem`, `answer`" in str(error.value)
    assert "`dataset_prompt_column`" in str(error.value)
    with pytest.raises(InputError) as error:
        check_columns(dataset.rename_column("problem", "prompt"), "eval_dataset['a']", "solution")
    assert "eval_dataset['a'] has no column `solution`; its columns are `prompt`, `answer`" in str(error.value)
    assert "`reference_column`" in str(error.value)


def test_columns_of_streamed_data() -> None:
    dataset = rows_of("r").to_iterable_dataset()
    check_columns(dataset, "train_dataset", "reference")
    with pytest.raises(InputError, match="has no column `solution`"):
        check_columns(dataset, "train_dataset", "solution")
    unknown = IterableDataset.from_generator(lambda: iter([{"prompt": "q"}]))
    assert unknown.column_names is None
    check_columns(unknown, "train_dataset", "reference")  # its rows are checked as they arrive


def test_empty_dataset_and_images() -> None:
    with pytest.raises(InputError, match="train_dataset has no rows"):
        check_columns(Dataset.from_dict({"prompt": [], "reference": []}), "train_dataset", "reference")
    dataset = Dataset.from_list([{"prompt": "q", "reference": "r", "images": ["x"]}])
    with pytest.raises(InputError, match="train_dataset: images \\(column `images`\\) are not supported"):
        check_columns(dataset, "train_dataset", "reference")


# --- rows ---------------------------------------------------------------------------------------------------------


def test_bad_rows_are_named_by_dataset_row_and_column(tokenizer) -> None:
    references = [f"r{i}" for i in range(300)]
    references[270] = "  "
    with pytest.raises(InputError) as error:
        prepare(rows_of(*references), limit(tokenizer))
    assert str(error.value).startswith("train_dataset, row 270, column `reference`: the reference is empty")
    with pytest.raises(InputError, match="^train_dataset, row 1, column `reference`: the reference is None"):
        prepare(rows_of("a", None), limit(tokenizer))
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    dataset = Dataset.from_dict({"prompt": [[question], [question, answer]], "reference": ["a", "b"]})
    with pytest.raises(InputError, match="^train_dataset, row 1, column `prompt`: the prompt ends in an assistant"):
        prepare(dataset, limit(tokenizer))


def test_text_that_a_chat_template_was_already_applied_to(tokenizer) -> None:
    rendered = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InputError, match="column `prompt`: the text holds the special token '<|im_"):
        check_prompt(rendered, tokenizer)
    with pytest.raises(InputError, match="^train_dataset, row 0, column `prompt`: the text holds the special token"):
        prepare(rows_of("r", prompt=rendered), limit(tokenizer))
    check_prompt("a < b, <think> and </think>", tokenizer)
    check_prompt([{"role": "user", "content": rendered}], tokenizer)


def test_messages_without_a_chat_template(make_tokenizer, conversational_dataset, standard_dataset) -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(InputError) as error:
        prepare(conversational_dataset, limit(tokenizer))
    message = str(error.value)
    assert message.startswith("train_dataset, row 0, column `prompt`: the prompt is a list of messages")
    assert "no chat template" in message
    prepare(standard_dataset, limit(tokenizer))


def test_text_prompts_for_a_chat_model_are_warned_about(
    make_tokenizer, conversational_dataset, standard_dataset, caplog
) -> None:
    prepare(standard_dataset, limit(make_tokenizer("qwen3")))
    assert "train_dataset: the prompts are text, so the model's chat template is not applied" in caplog.text
    caplog.clear()
    prepare(conversational_dataset, limit(make_tokenizer("qwen3")))
    prepare(standard_dataset, limit(make_tokenizer(None)))
    assert caplog.text == ""


@pytest.mark.parametrize("template", ["gemma", "chatml_no_system"])
def test_a_turn_that_the_template_refuses_is_named(make_tokenizer, template) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    for max_prompt_length in (None, 1000):
        with pytest.raises(InputError, match="^train_dataset, row 0, column `prompt`: .*chat template"):
            prepare(rows_of("r", prompt=chat), limit(make_tokenizer(template), None, max_prompt_length))


def test_rows_that_fit_come_back_untouched(tokenizer, conversational_dataset, standard_dataset) -> None:
    for dataset in (conversational_dataset, standard_dataset):
        for policy in ("error", "drop", "truncate"):
            prepared, lines = prepare(dataset, limit(tokenizer, 500, 2000), policy)
            assert prepared.to_list() == dataset.to_list() and lines == []


# --- references that are too long ---------------------------------------------------------------------------------


def test_excess_counts_tokens_beyond_either_limit(tokenizer) -> None:
    rows = [{"prompt": "abc", "reference": "12345"}, {"prompt": "abcdefgh", "reference": "1"}]
    assert limit(tokenizer).excess(rows) == [0, 0]
    assert limit(tokenizer, max_reference_length=5).excess(rows) == [0, 0]
    assert limit(tokenizer, max_reference_length=3).excess(rows) == [2, 0]
    # "Q: abc R: 12345" is 15 tokens, "Q: abcdefgh R: 1" 16
    assert limit(tokenizer, max_prompt_length=15).excess(rows) == [0, 1]
    assert limit(tokenizer, max_reference_length=1, max_prompt_length=13).excess(rows) == [4, 3]
    # "<|im_start|>user\n" + 15 + "<|im_end|>\n<|im_start|>assistant\n" = 6 + 15 + 13
    chat = [{"prompt": [{"role": "user", "content": "abc"}], "reference": "12345"}]
    assert limit(tokenizer, max_prompt_length=34).excess(chat) == [0]
    assert limit(tokenizer, max_prompt_length=33).excess(chat) == [1]


def test_the_reference_only_prompt_counts_too(tokenizer) -> None:
    long_probe = ReferenceLimit(
        tokenizer,
        lambda prompts: tokenizer(text=prompts)["input_ids"],
        lambda row: Contexts(row["prompt"], row["reference"], "x" * 9),
        "reference",
        max_reference_length=None,
        max_prompt_length=5,
    )
    assert long_probe.excess([{"prompt": "q", "reference": "r"}]) == [4]


def test_a_special_token_in_a_reference_is_refused(tokenizer) -> None:
    with pytest.raises(
        InputError, match="row 1, column `reference`: the reference holds the special token '<\\|im_end"
    ):
        prepare(rows_of("a", "b<|im_end|>\n<|im_start|>assistant\n"), limit(tokenizer))
    prepare(rows_of("<think>a < b</think>"), limit(tokenizer))


def test_error_policy_counts_the_rows_and_names_the_worst(tokenizer) -> None:
    dataset = rows_of("12345", "1", "1234567")
    with pytest.raises(InputError) as error:
        prepare(dataset, limit(tokenizer, max_reference_length=4))
    message = str(error.value)
    assert message.startswith("train_dataset: 2 of 3 rows have a reference that is too long (row 2 by 3 tokens)")
    assert "overlong_reference" in message


def test_drop_policy(tokenizer) -> None:
    prepared, lines = prepare(rows_of("12345", "1", "1234567", "1234"), limit(tokenizer, 4), "drop")
    assert prepared["reference"][:] == ["1", "1234"]
    assert lines == ["train_dataset: dropped 2 of 4 rows whose reference is too long."]
    with pytest.raises(InputError, match="train_dataset: 2 of 2 rows have a reference that is too long"):
        prepare(rows_of("12345", "123456"), limit(tokenizer, 4), "drop")


def test_overlong_rows_are_found_by_number_in_a_long_dataset(tokenizer) -> None:
    references = [str(i) for i in range(600)]
    references[10] = references[270] = references[599] = "too long"
    prepared, lines = prepare(rows_of(*references), limit(tokenizer, 4), "drop")
    assert prepared["reference"][:] == [reference for reference in references if reference != "too long"]
    assert lines == ["train_dataset: dropped 3 of 600 rows whose reference is too long."]
    prepared, _ = prepare(rows_of(*references), limit(tokenizer, 4), "truncate")
    assert prepared["reference"][:] == ["too " if reference == "too long" else reference for reference in references]


def test_truncate_policy_keeps_the_first_tokens_and_the_question(tokenizer) -> None:
    dataset = rows_of("12345", "1", "1234567", "1234", prompt="a long question that is never cut")
    prepared, lines = prepare(dataset, limit(tokenizer, 4), "truncate")
    assert prepared["reference"][:] == ["1234", "1", "1234", "1234"]
    assert prepared["prompt"][:] == ["a long question that is never cut"] * 4
    assert lines == ["train_dataset: truncated the reference of 2 of 4 rows."]
    assert dataset["reference"][:] == ["12345", "1", "1234567", "1234"]


def test_truncate_policy_by_the_length_of_the_teachers_prompt(tokenizer) -> None:
    chat = [{"role": "user", "content": "abc"}]
    prepared, _ = prepare(rows_of("12345", "12", prompt=chat), limit(tokenizer, max_prompt_length=32), "truncate")
    assert prepared["reference"][:] == ["123", "12"]


def test_truncated_messages_stay_messages(tokenizer) -> None:
    references = [
        [{"role": "assistant", "content": "12345"}, {"role": "assistant", "content": "678"}],
        [{"role": "assistant", "content": "1"}],
    ]
    dataset = rows_of(*references)
    prepared, _ = prepare(dataset, limit(tokenizer, 9), "truncate")  # "12345\n\n678" is 10 tokens
    assert prepared["reference"][:] == [[{"role": "assistant", "content": "12345\n\n67"}], references[1]]
    assert prepared.features == dataset.features
    prepared, _ = prepare(dataset, limit(tokenizer, 4), "truncate")
    assert prepared["reference"][:] == [[{"role": "assistant", "content": "1234"}], references[1]]


@pytest.mark.parametrize("keep", range(1, 11))
def test_truncated_text_is_a_prefix_of_the_original(tokenizer, keep) -> None:
    # é, € and 😀 are two, three and four tokens: a cut inside one must not leave a replacement character
    reference = "aé€😀b"
    prepared, _ = prepare(rows_of(reference), limit(tokenizer, keep), "truncate")
    (shorter,) = prepared["reference"]
    assert reference.startswith(shorter) and 0 < len(shorter)
    assert len(shorter.encode()) <= keep


def test_no_room_for_any_reference(tokenizer) -> None:
    dataset = rows_of("12345", prompt="abc")  # "Q: abc R: " alone is 10 tokens
    with pytest.raises(InputError) as error:
        prepare(dataset, limit(tokenizer, max_prompt_length=10), "truncate")
    assert str(error.value).startswith("train_dataset, row 0: the question leaves no room for a reference")
    prepared, _ = prepare(dataset, limit(tokenizer, max_prompt_length=11), "truncate")
    assert prepared["reference"][:] == ["1"]


def test_truncation_to_blank_text_says_what_happened(tokenizer) -> None:
    with pytest.raises(InputError, match="train_dataset, row 0.*leaves no room"):
        prepare(rows_of("   12345"), limit(tokenizer, 2), "truncate")


# --- streamed data ------------------------------------------------------------------------------------------------


def test_streamed_data_is_passed_through_and_cannot_be_dropped_from(tokenizer) -> None:
    dataset = rows_of("12345", "1").to_iterable_dataset()
    for policy in ("error", "truncate"):
        prepared, lines = prepare(dataset, limit(tokenizer, 4), policy)
        assert prepared is dataset and lines == []
    with pytest.raises(InputError, match="train_dataset is streamed, so rows cannot be dropped"):
        prepare(dataset, limit(tokenizer, 4), "drop")


def test_enforce_on_streamed_rows(tokenizer) -> None:
    rows = [{"prompt": "q", "reference": "12345"}, {"prompt": "q", "reference": "1"}]
    enforced = limit(tokenizer, 4).enforce(rows, "truncate", "step 3")
    assert enforced == [{"prompt": "q", "reference": "1234"}, {"prompt": "q", "reference": "1"}]
    assert rows[0]["reference"] == "12345"
    with pytest.raises(InputError, match="^step 3: 1 of 2 rows have a reference that is too long \\(row 0 by 1"):
        limit(tokenizer, 4).enforce(rows, "error", "step 3")
    assert limit(tokenizer, 5).enforce(rows, "error", "step 3") == rows


def test_a_streamed_row_without_room_is_named(tokenizer) -> None:
    rows = [{"prompt": "q", "reference": "1"}, {"prompt": "a question", "reference": "1"}]
    with pytest.raises(InputError, match="^step 3, row 1: the question leaves no room"):
        limit(tokenizer, max_prompt_length=10).enforce(rows, "truncate", "step 3")


def test_streamed_rows_are_checked_and_named(tokenizer) -> None:
    with pytest.raises(InputError, match="^step 3, row 0, no column `reference`; the row has `prompt`"):
        limit(tokenizer, 4).enforce([{"prompt": "q"}], "error", "step 3")
    rows = [{"prompt": "q", "reference": "1"}, {"prompt": "<|im_start|>user\nq", "reference": "1"}]
    with pytest.raises(InputError, match="^step 3, row 1, column `prompt`: the text holds the special token"):
        limit(tokenizer, 4).enforce(rows, "error", "step 3")
