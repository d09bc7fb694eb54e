"""What is decided before training: columns, bad rows by number, streamed data."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from purified_opsd_trl import Contexts, InputError, PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.backbone import context_length
from purified_opsd_trl.dataset import as_dataset, check_columns
from purified_opsd_trl.rows import RowReader

from .dataset_cases import build, left_out, reader_of, rows_of


# --- columns and kinds of data ------------------------------------------------------------------------------------


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


def test_an_empty_dataset() -> None:
    with pytest.raises(InputError, match="train_dataset has no rows"):
        check_columns(Dataset.from_dict({"prompt": [], "reference": []}), "train_dataset", "reference")


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> dict[str, str]:
        return {"prompt": f"q{i}", "reference": f"r{i}"}


def test_lists_and_torch_datasets_become_datasets() -> None:
    chat = [{"role": "user", "content": "q"}]
    rows = [{"prompt": chat, "reference": "r"}, {"prompt": "q", "reference": None, "source": "x"}]
    assert as_dataset(rows, "train_dataset").to_list() == [{**rows[0], "source": None}, rows[1]]
    assert as_dataset(Rows(), "train_dataset")[1] == {"prompt": "q1", "reference": "r1"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([1]), "train_dataset must be a `Dataset` or `IterableDataset` .* or a list of rows, got list_iterator"),
        ("data.jsonl", "train_dataset must be .*, got str"),
        ({"prompt": ["q"]}, "train_dataset must be .*, got dict"),
        (["q"], "train_dataset, row 0: a row must map column names to values, got str"),
        (DatasetDict({"train": rows_of("r")}), "train_dataset holds several splits \\(train\\)"),
        ([{"prompt": "\ud800", "reference": "r"}], "train_dataset cannot be converted"),
        ([{"prompt": "q", "reference": b"\xea"}, {"prompt": "q", "reference": 8}], "train_dataset cannot be conv"),
    ],
)
def test_other_kinds_of_data_are_one_line(data, message) -> None:
    with pytest.raises(InputError, match=message) as error:
        as_dataset(data, "train_dataset")
    assert len(str(error.value).splitlines()) == 1


def test_a_list_trains(make_model, tokenizer, arguments) -> None:
    rows = [{"prompt": [{"role": "user", "content": "1+1?"}], "reference": "2"}] * 2
    trainer = PurifiedOPSDTrainer(
        make_model(), PurifiedOPSDConfig(**{**arguments, "max_steps": 1}), rows, processing_class=tokenizer
    )
    trainer.train()
    assert trainer.state.global_step == 1


# --- rows that cannot be used -------------------------------------------------------------------------------------


def test_bad_rows_are_named_by_dataset_row_and_column(prepare) -> None:
    references = [f"r{i}" for i in range(300)]
    references[270] = "  "
    with pytest.raises(InputError) as error:
        prepare(rows_of(*references))
    assert str(error.value).startswith("train_dataset, row 270, column `reference`: the reference is empty")
    with pytest.raises(InputError, match="^train_dataset, row 1, column `reference`: the reference is None"):
        prepare(rows_of("a", None))
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    dataset = Dataset.from_dict({"prompt": [[question], [question, answer]], "reference": ["a", "b"]})
    with pytest.raises(InputError, match="^train_dataset, row 1, column `prompt`: the prompt ends in an assistant"):
        prepare(dataset)


def test_all_bad_rows_are_counted_and_the_first_ten_named(prepare) -> None:
    references = ["r"] * 600
    bad = list(range(5, 600, 50))
    for i in bad:
        references[i] = ""
    with pytest.raises(InputError) as error:
        prepare(rows_of(*references))
    message = str(error.value)
    assert all(f"row {i}, column" in message for i in bad[:10]) and f"row {bad[10]}," not in message
    assert "and 2 more (12 of 600 rows cannot be used; set `invalid_rows: drop`" in message
    assert len(message.splitlines()) == 1


def test_bad_rows_are_dropped_and_written(prepare, tmp_path) -> None:
    dataset = rows_of("a", "", "b", None, "c<|im_end|>")
    for _ in range(2):  # the second run finds its lines in the file
        prepared, lines = prepare(dataset, invalid="drop")
        assert prepared["reference"][:] == ["a", "b"]
        assert lines == ["train_dataset: dropped 3 of 5 rows that cannot be used."]
        rows = left_out(tmp_path)
        assert [row["row"] for row in rows] == [1, 3, 4]
    assert rows[0]["data"] == {"prompt": "q", "reference": ""} and "is empty" in rows[0]["reason"]
    assert "is None" in rows[1]["reason"] and "'<|im_end|>'" in rows[2]["reason"]
    assert {row["dataset"] for row in rows} == {"train_dataset"}


def test_dropping_leaves_a_generation_batch_or_is_refused(prepare) -> None:
    prepared, _ = prepare(rows_of("a", "", "b"), invalid="drop", least=2)
    assert len(prepared) == 2
    with pytest.raises(InputError, match="train_dataset has 2 usable rows, fewer than the 3 of one generation batch"):
        prepare(rows_of("a", "", "b"), invalid="drop", least=3)
    with pytest.raises(InputError, match="has 0 usable rows"):
        prepare(rows_of("", ""), invalid="drop")


def test_fewer_rows_than_a_generation_batch_never_train_zero_steps(make_model, tokenizer, arguments) -> None:
    args = PurifiedOPSDConfig(**{**arguments, "gradient_accumulation_steps": 2})
    with pytest.raises(InputError, match="has 3 usable rows, fewer than the 4 of one generation batch"):
        PurifiedOPSDTrainer(make_model(), args, rows_of("a", "b", "c"), processing_class=tokenizer)
    stream = rows_of("a", "b", "c").to_iterable_dataset()
    trainer = PurifiedOPSDTrainer(make_model(), args, stream, processing_class=tokenizer)
    with pytest.raises(InputError, match="train_dataset ended before the first step"):
        trainer.train()


def test_text_and_messages_in_one_dataset(prepare) -> None:
    chat = [{"role": "user", "content": "q"}]
    rows = [{"prompt": prompt, "reference": "r"} for prompt in (None, chat, "q", chat)]
    prepared, _ = prepare(as_dataset(rows, "x"), invalid="drop")  # the first row that can be used decides
    assert prepared["prompt"][:] == [chat, chat]
    with pytest.raises(InputError, match="row 2, column `prompt`: some prompts are text and some messages"):
        prepare(as_dataset(rows[1:] + rows[2:], "x").select([0, 2, 1]))


def test_a_result_is_kept_for_equal_data_and_settings(prepare, monkeypatch) -> None:
    read = []
    original = RowReader.faults
    monkeypatch.setattr(RowReader, "faults", lambda self, rows: read.append(len(rows)) or original(self, rows))
    for expected in (3, 0):
        read.clear()
        assert prepare(rows_of("a", "kept", "b"), cache="settings")[0]["reference"][:] == ["a", "kept", "b"]
        assert sum(read) == expected
    prepare(rows_of("a", "kept", "c"), cache="settings")
    prepare(rows_of("a", "kept", "b"), cache="other settings")
    assert sum(read) == 6


def test_the_fingerprint_of_a_reader_names_all_its_settings(tokenizer, make_tokenizer) -> None:
    def other_build(row):
        return Contexts("b", "t", "r")

    readers = [
        reader_of(tokenizer),
        reader_of(make_tokenizer("qwen3")),
        reader_of(tokenizer, max_reference_length=3),
        reader_of(tokenizer, max_prompt_length=3),
        reader_of(tokenizer, truncate=True),
        reader_of(tokenizer, build=other_build),
        RowReader(tokenizer, build, "reference", template_kwargs={"enable_thinking": False}),
        RowReader(tokenizer, build, "reference", template_kwargs={"tools": [print]}),
    ]
    assert len({reader.fingerprint() for reader in readers}) == len(readers)
    assert reader_of(make_tokenizer()).fingerprint() == reader_of(tokenizer).fingerprint()


# --- streamed data ------------------------------------------------------------------------------------------------


def test_streamed_rows_are_checked_and_named_by_position(prepare) -> None:
    stream, _ = prepare(rows_of("12345", "1", "").to_iterable_dataset(), max_reference_length=5)
    rows = iter(stream)
    assert [next(rows)["reference"], next(rows)["reference"]] == ["12345", "1"]
    with pytest.raises(InputError, match="^train_dataset, row 2, column `reference`: the reference is empty"):
        next(rows)
    stream, _ = prepare(rows_of("12345").to_iterable_dataset(), max_reference_length=4)
    with pytest.raises(
        InputError, match="^train_dataset: 1 of 1 rows have a reference that is too long \\(row 0 by 1"
    ):
        next(iter(stream))
    unknown = IterableDataset.from_generator(lambda: iter([{"prompt": "q"}]))
    with pytest.raises(InputError, match="^train_dataset, row 0, no column `reference`; the row has `prompt`"):
        next(iter(prepare(unknown)[0]))


def test_rows_of_a_stream_are_dropped_and_written_once(prepare, tmp_path, caplog) -> None:
    references = ["a", "", "12345", "b", None] * 5
    stream, _ = prepare(rows_of(*references).to_iterable_dataset(), "drop", "drop", max_reference_length=4)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # epochs, or a resumed run: the same rows are met again
            assert [row["reference"] for row in stream] == ["a", "b"] * 5
            assert [row["row"] for row in left_out(tmp_path)] == [i for i in range(25) if i % 5 in (1, 2, 4)]
    assert "left out row 1 (1 so far), column `reference`: the reference is empty" in caplog.text
    assert "left out row 16 (10 so far)" in caplog.text and "(11 so far)" not in caplog.text


def test_a_stream_of_images_is_named_by_row(prepare) -> None:
    rows = [{"prompt": [{"role": "user", "content": "q"}], "reference": "r", "image": i} for i in (None, "x.png")]
    with pytest.raises(
        InputError, match="^train_dataset, row 1, column `image` holds images, but the model reads text"
    ):
        list(prepare(IterableDataset.from_generator(lambda: iter(rows)))[0])


def test_a_stream_with_bad_rows_trains_and_resumes(make_model, tokenizer, arguments) -> None:
    references = ["a", "", "b", "c", None, "d", "e", "f", "", "g", "h"]

    def run(steps: int, **options):
        args = PurifiedOPSDConfig(**{**arguments, "max_steps": steps, "invalid_rows": "drop", **options})
        stream = rows_of(*references).to_iterable_dataset()
        return PurifiedOPSDTrainer(make_model(), args, stream, processing_class=tokenizer)

    trainer = run(2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer = run(4)
    trainer.train(resume_from_checkpoint=f"{arguments['output_dir']}/checkpoint-2")
    assert trainer.state.global_step == 4
    assert [row["row"] for row in left_out(Path(arguments["output_dir"]))] == [1, 4, 8]


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 512),
        ({}, None),
    ],
)
def test_the_context_that_a_configuration_allows(fields, length) -> None:
    config = SimpleNamespace(**fields)
    config.get_text_config = lambda: config
    assert context_length(SimpleNamespace(config=config)) == length


def test_a_dataset_passed_to_evaluate_loses_its_bad_rows(make_model, tokenizer, arguments) -> None:
    args = PurifiedOPSDConfig(**arguments, invalid_rows="drop")
    trainer = PurifiedOPSDTrainer(make_model(), args, rows_of("a", "b"), processing_class=tokenizer)
    assert trainer.evaluate([{"prompt": "q", "reference": "r"}, {"prompt": "q", "reference": ""}])["eval_loss"] >= 0
    assert [row["dataset"] for row in left_out(Path(arguments["output_dir"]))] == ["eval_dataset"]


def test_text_prompts_for_a_chat_model_are_warned_about(
    prepare, make_tokenizer, conversational_dataset, standard_dataset, caplog
) -> None:
    text = "train_dataset: the prompts are text, so the model's chat template is not applied"
    prepare(standard_dataset, tokenizer=make_tokenizer("qwen3"))
    assert caplog.text.count(text) == 1
    caplog.clear()
    list(prepare(standard_dataset.to_iterable_dataset(), tokenizer=make_tokenizer("qwen3"))[0])
    assert caplog.text.count(text) == 1
    caplog.clear()
    prepare(conversational_dataset, tokenizer=make_tokenizer("qwen3"))
    prepare(standard_dataset, tokenizer=make_tokenizer(None))
    assert caplog.text == ""
