"""References that are too long: found before training, and refused, dropped or cut."""

import pytest

from purified_opsd_trl import Contexts, InputError

from .dataset_cases import build, left_out, reader_of, rows_of


def references_of(tokenizer, rows, **limits) -> list[str]:
    """The references as the reference-only prompt holds them after truncation."""
    contexts = reader_of(tokenizer, truncate=True, **limits).contexts(rows, "rows")
    prompts = [c.reference_only for c in contexts]
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [text.removeprefix("R: ") for text in texts]


def excess(tokenizer, rows, **limits) -> list[int]:
    return [fault.excess if fault else 0 for fault in reader_of(tokenizer, **limits).faults(rows)]


def test_rows_that_fit_come_back_untouched(prepare, conversational_dataset, standard_dataset) -> None:
    for dataset in (conversational_dataset, standard_dataset):
        for policy in ("error", "drop", "truncate"):
            prepared, lines = prepare(dataset, policy, max_reference_length=500, max_prompt_length=2000)
            assert prepared.to_list() == dataset.to_list() and lines == []


def test_excess_counts_tokens_beyond_either_limit(tokenizer) -> None:
    rows = [{"prompt": "abc", "reference": "12345"}, {"prompt": "abcdefgh", "reference": "1"}]
    assert excess(tokenizer, rows) == [0, 0]
    assert excess(tokenizer, rows, max_reference_length=5) == [0, 0]
    assert excess(tokenizer, rows, max_reference_length=3) == [2, 0]
    # "Q: abc R: 12345" is 15 tokens, "Q: abcdefgh R: 1" 16
    assert excess(tokenizer, rows, max_prompt_length=15) == [0, 1]
    assert excess(tokenizer, rows, max_reference_length=1, max_prompt_length=13) == [4, 3]
    # "<|im_start|>user\n" + 15 + "<|im_end|>\n<|im_start|>assistant\n" = 6 + 15 + 13
    chat = [{"prompt": [{"role": "user", "content": "abc"}], "reference": "12345"}]
    assert excess(tokenizer, chat, max_prompt_length=34) == [0]
    assert excess(tokenizer, chat, max_prompt_length=33) == [1]


def test_the_reference_only_prompt_counts_too(tokenizer) -> None:
    def long_probe(row):
        return Contexts(row["prompt"], row["reference"], "x" * 9)

    rows = [{"prompt": "q", "reference": "r"}]
    assert excess(tokenizer, rows, max_prompt_length=5, build=long_probe) == [4]


def test_error_policy_counts_the_rows_and_names_the_worst(prepare) -> None:
    with pytest.raises(InputError) as error:
        prepare(rows_of("12345", "1", "1234567"), max_reference_length=4)
    message = str(error.value)
    assert message.startswith("train_dataset: 2 of 3 rows have a reference that is too long (row 2 by 3 tokens)")
    assert "overlong_reference" in message


def test_drop_policy(prepare, tmp_path) -> None:
    prepared, lines = prepare(rows_of("12345", "1", "1234567", "1234"), "drop", max_reference_length=4)
    assert prepared["reference"][:] == ["1", "1234"]
    assert lines == ["train_dataset: dropped 2 of 4 rows whose reference is too long."]
    assert [(row["row"], row["reason"]) for row in left_out(tmp_path)] == [
        (0, "column `reference`: the reference is too long by 1 tokens"),
        (2, "column `reference`: the reference is too long by 3 tokens"),
    ]
    with pytest.raises(InputError, match="train_dataset has 0 usable rows"):
        prepare(rows_of("12345", "123456"), "drop", max_reference_length=4)


def test_overlong_rows_are_found_by_number_in_a_long_dataset(prepare) -> None:
    references = [str(i) for i in range(600)]
    references[10] = references[270] = references[599] = "too long"
    prepared, lines = prepare(rows_of(*references), "drop", max_reference_length=4)
    assert prepared["reference"][:] == [reference for reference in references if reference != "too long"]
    assert lines == ["train_dataset: dropped 3 of 600 rows whose reference is too long."]


def test_truncate_policy_keeps_the_first_tokens_and_the_question(prepare, tokenizer) -> None:
    dataset = rows_of("12345", "1", "1234567", "1234", prompt="a long question that is never cut")
    prepared, lines = prepare(dataset, "truncate", max_reference_length=4)
    assert lines == ["train_dataset: the reference of 2 of 4 rows is too long and will be truncated."]
    assert prepared is dataset  # rows are shortened when they are used
    assert references_of(tokenizer, list(prepared), max_reference_length=4) == ["1234", "1", "1234", "1234"]
    contexts = reader_of(tokenizer, 4, truncate=True).contexts(list(prepared), "rows")
    assert contexts[0].base == "a long question that is never cut"
    assert contexts[0].teacher == "Q: a long question that is never cut R: 1234"


def test_truncate_policy_by_the_length_of_the_teachers_prompt(tokenizer) -> None:
    rows = list(rows_of("12345", "12", prompt=[{"role": "user", "content": "abc"}]))
    assert references_of(tokenizer, rows, max_prompt_length=32) == ["123", "12"]


def test_truncated_messages_stay_messages(tokenizer) -> None:
    seen = []

    def recording(row):
        seen.append(row["reference"])
        return build(row)

    turns = [{"role": "assistant", "content": "12345"}, {"role": "assistant", "content": "678"}]
    rows = [{"prompt": "q", "reference": turns}]  # "12345\n\n678" is 10 tokens
    for most, text in ((9, "12345\n\n67"), (4, "1234")):
        contexts = reader_of(tokenizer, most, truncate=True, build=recording).contexts(rows, "rows")
        assert contexts[0].reference_only == f"R: {text}"
        assert seen[-1] == [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("keep", range(1, 11))
def test_truncated_text_is_a_prefix_of_the_original(tokenizer, keep) -> None:
    # é, € and 😀 are two, three and four tokens: a cut inside one must not leave a replacement character
    reference = "aé€😀b"
    (shorter,) = references_of(tokenizer, [{"prompt": "q", "reference": reference}], max_reference_length=keep)
    assert reference.startswith(shorter) and 0 < len(shorter)
    assert len(shorter.encode()) <= keep


def test_no_room_for_any_reference(prepare, tokenizer, tmp_path) -> None:
    dataset = rows_of("12345", prompt="abc")  # "Q: abc R: " alone is 10 tokens
    with pytest.raises(InputError, match="^train_dataset, row 0, column `reference`: the question leaves no room"):
        prepare(dataset, "truncate", max_prompt_length=10)
    assert references_of(tokenizer, list(dataset), max_prompt_length=11) == ["1"]
    with pytest.raises(InputError, match="train_dataset, row 0.*leaves no room"):
        prepare(rows_of("   12345"), "truncate", max_reference_length=2)  # blank text is no reference
