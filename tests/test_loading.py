"""Datasets by name: columns that swap names, formats decided per row, files that cannot be read, no request sent."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from trl import DatasetMixtureConfig

from purified_opsd_trl import InputError, PurifiedOPSDConfig
from purified_opsd_trl.loading import PurifiedOPSDScriptArguments, load_splits, map_columns


CHAT = [{"role": "user", "content": "q"}]


def load(path: Any, streaming: bool = False, **fields: Any) -> Dataset | IterableDataset:
    script_args = PurifiedOPSDScriptArguments(dataset_name=str(path), dataset_streaming=streaming, **fields)
    return map_columns(load_splits(script_args, DatasetMixtureConfig())["train"], script_args)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture(params=[False, True], ids=["map", "stream"])
def streaming(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# --- columns ------------------------------------------------------------------------------------------------------


def test_a_reference_column_called_prompt_is_not_the_question(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "data.jsonl", {"problem": "1+1?", "prompt": "It is 2."})
    fields = {"dataset_prompt_column": "problem", "dataset_reference_column": "prompt"}
    (row,) = load(path, streaming, **fields)
    assert row == {"prompt": [{"role": "user", "content": "1+1?"}], "reference": "It is 2."}
    assert PurifiedOPSDScriptArguments(**fields).mapped_reference_column == "reference"
    assert PurifiedOPSDScriptArguments(dataset_reference_column="answer").mapped_reference_column == "answer"
    both = write(tmp_path / "both.jsonl", {"problem": "1+1?", "prompt": "It is 2.", "reference": "2"})
    with pytest.raises(InputError, match="The column `prompt` is the reference, but there is a column `reference`"):
        load(both, streaming, **fields)


def test_one_column_cannot_be_both(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "1+1?"})
    with pytest.raises(InputError, match="both name `text`"):
        load(path, dataset_prompt_column="text", dataset_reference_column="text")
    with pytest.raises(InputError, match="`reference_column` cannot be `prompt`"):
        PurifiedOPSDConfig(str(tmp_path), reference_column="prompt", bf16=False)


# --- format per row -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [["q", CHAT], [CHAT, "q"], [None, "q", CHAT], [None, CHAT, "q"]])
def test_text_and_messages_in_one_file(tmp_path: Path, streaming: bool, prompts: list[Any]) -> None:
    path = write(tmp_path / "data.jsonl", *({"prompt": prompt, "reference": "r"} for prompt in prompts))
    rows = list(load(path, streaming))
    assert [row["prompt"] for row in rows] == [prompt and CHAT for prompt in prompts]


def test_a_first_prompt_of_none_leaves_no_text_untemplated(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "data.jsonl", *({"prompt": prompt, "reference": "r"} for prompt in (None, "q", "q")))
    assert [row["prompt"] for row in load(path, streaming)] == [None, CHAT, CHAT]


def test_a_later_row_without_a_prompt_has_none(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "q", "reference": "r"}, {"reference": "r"})
    assert [row["prompt"] for row in load(path, streaming)] == [CHAT, None]


def test_a_system_prompt_without_effect_on_a_stream_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "q", "reference": "r"}, {"prompt": CHAT, "reference": "r"})
    rows = iter(load(path, streaming=True, system_prompt="s"))
    assert next(rows)["prompt"][0] == {"role": "system", "content": "s"}
    with pytest.raises(InputError, match="`system_prompt` is for text prompts"):
        next(rows)


# --- files that cannot be read ------------------------------------------------------------------------------------

GOOD = json.dumps({"prompt": "q", "reference": "r"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "q", ', "line 3: this is not valid JSON (Expecting property name"),
        (b'{"prompt": "q"', "line 3: this is not valid JSON"),
        ('{"prompt": "caf\u00e9"}'.encode("latin-1"), "line 3: byte 16 is not UTF-8"),
        (b'{"prompt": "q", "prompt": "p", "reference": "r"}', "line 3: the key 'prompt' occurs twice"),
        (b'{"prompt": "a\\ud800", "reference": "r"}', "line 3: the text holds half a surrogate pair"),
        (b"[1, 2]", "line 3: a line must be a JSON object, got list"),
    ],
    ids=["bad", "truncated", "latin-1", "duplicate key", "surrogate", "no object"],
)
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
def test_a_bad_line_is_named(tmp_path: Path, streaming: bool, line: bytes, message: str, in_folder: bool) -> None:
    path = tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(f"{GOOD}\n\n".encode() + line + b"\n")
    with pytest.raises(InputError) as error:
        list(load(path.parent if in_folder else path, streaming))
    assert f"{path}, {message}" in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("data.parquet", b"PAR1", r"data\.parquet cannot be read: .*[Pp]arquet"),
        (
            "data.json",
            b'[{"prompt": "q",\n "reference": }]',
            r"data\.json: this is not valid JSON \(.*, line 2, column",
        ),
        ("data.jsonl", b"", "(has no rows|cannot be read)"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, streaming: bool, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        list(load(tmp_path / name, streaming))
    assert len(str(error.value).splitlines()) == 1


def test_columns_that_change_their_type_far_into_a_file(tmp_path: Path) -> None:
    text, chat = ({"prompt": prompt, "reference": "r" * 20_000} for prompt in ("q", CHAT))  # 10 MB decide the types
    path = write(tmp_path / "text.jsonl", *[text] * 600, chat)
    for streaming in (False, True):
        rows = load(path, streaming)
        assert [row["prompt"] for row in rows] == [CHAT] * 601
        path = write(tmp_path / "chat.jsonl", *[chat] * 600, text)
        assert [row["prompt"] for row in load(path, streaming)] == [CHAT] * 601
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", *[text] * 600, chat)
    with pytest.raises(InputError, match="A prompt is the JSON text of messages"):
        load(folder)


# --- nothing leaves the machine -----------------------------------------------------------------------------------

WATCHED = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("network", event, args[-2:], flush=True)
sys.addaudithook(hook)
from trl import DatasetMixtureConfig
from purified_opsd_trl.loading import PurifiedOPSDScriptArguments, load_splits
if "--watch-the-watcher" in sys.argv:
    import datasets
    datasets.load_dataset("json", data_files=sys.argv[1])
else:
    for streaming in (False, True):
        for name in sys.argv[1:]:
            args = PurifiedOPSDScriptArguments(dataset_name=name, dataset_streaming=streaming)
            load_splits(args, DatasetMixtureConfig())
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": sys.argv[1]}])
    load_splits(PurifiedOPSDScriptArguments(), mixture)
print("loaded")
"""


def test_local_data_opens_no_connection(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder / "train.jsonl", {"prompt": "q", "reference": "r"})
    Dataset.from_list([{"prompt": "q", "reference": "r"}]).to_parquet(tmp_path / "data.parquet")
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    environment["HTTPS_PROXY"] = environment["https_proxy"] = "http://127.0.0.1:9"  # refused at once

    def run(*args: str) -> str:
        command = [sys.executable, "-c", WATCHED, *args]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout

    assert run(str(path), str(tmp_path / "data.parquet"), str(folder)).splitlines() == ["loaded"]
    assert "network" in run(str(path), "--watch-the-watcher")  # what the library would send, the hook sees
