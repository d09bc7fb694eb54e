"""Samples on disk: what survives, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from purified_opsd_trl import InputError, cli
from purified_opsd_trl.evaluate.benchmarks import load_benchmark
from purified_opsd_trl.evaluate.store import SampleStore


Record = Callable[..., dict[str, Any]]


def test_only_newlines_end_a_line(tmp_path: Path, record: Record) -> None:
    rows = [{"problem": f"a{end}b", "answer": "1"} for end in ("\u2028", "\u2029", "\x85", "\x0b", "\n", "\r\n")]
    path = tmp_path / "b.jsonl"
    for newline in ("\n", "\r\n"):
        text = newline.join(json.dumps(row, ensure_ascii=False) for row in rows) + newline
        path.write_text(text, encoding="utf-8", newline="")
        assert [p.problem for p in load_benchmark(str(path)).problems] == [row["problem"] for row in rows]
    with SampleStore(tmp_path, {}) as store:
        for number, row in enumerate(rows):
            store.append(record("x", number, completion=row["problem"]))
        drawn = store.records
    assert SampleStore(tmp_path, {}).records == drawn


def test_half_a_line_is_cut_and_the_rest_is_kept(tmp_path: Path, record: Record) -> None:
    with SampleStore(tmp_path, {"seed": 0}) as store:
        for sample in range(3):
            store.append(record("é", sample))
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"benchmark": "b", "probl')
    with SampleStore(tmp_path, {"seed": 0}) as store:
        assert set(store.records) == {("b", "é", i) for i in range(3)}
        store.append(record("é", 3))
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["sample"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_every_sample_is_on_the_disk_before_the_next(
    tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    with SampleStore(tmp_path, {}) as store:
        for sample in range(3):
            store.append(record("x", sample))
            assert len(sizes) == sample + 1 and sizes[-1] == (tmp_path / "samples.jsonl").stat().st_size > 0


def test_samples_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    SampleStore(tmp_path, {"temperature": 0.6}).__exit__(None, None, None)
    with pytest.raises(InputError, match=r"other settings: `temperature` \(0.6 then, 1.0 now\)"):
        SampleStore(tmp_path, {"temperature": 1.0})
    with pytest.raises(InputError, match=r"`backend` \(not recorded then, 'vllm' now\)"):
        SampleStore(tmp_path, {"temperature": 0.6, "backend": "vllm"})


def test_one_process_at_a_time_writes_into_a_folder(tmp_path: Path, record: Record) -> None:
    with SampleStore(tmp_path, {}) as store:
        store.append(record("x", 0))
        with pytest.raises(InputError, match="Another evaluation is writing into .*another `output_dir`"):
            SampleStore(tmp_path, {})
        store.append(record("x", 1))
    with SampleStore(tmp_path, {}) as store:
        assert len(store.records) == 2
    with pytest.raises(InputError, match="other settings"):
        SampleStore(tmp_path, {"seed": 1})
    SampleStore(tmp_path, {}).__exit__(None, None, None)  # the refused one left no lock


@pytest.mark.parametrize("damaged", [b'{"seed": 0, "temp', b"", b"[]", b"7", b'{"seed": "\xe9"}'])
def test_damaged_settings_are_named(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "settings.json").write_bytes(damaged)
    with pytest.raises(InputError, match="settings.json is damaged.*another `output_dir`"):
        SampleStore(tmp_path, {"seed": 0})
    assert (tmp_path / "settings.json").read_bytes() == damaged


@pytest.mark.parametrize("damaged", [b'{"benchmark": "b", "probl', b"7", b"[1]", b'{"benchmark": "b"}', b"", b"\xe9"])
def test_a_damaged_line_is_named(tmp_path: Path, record: Record, damaged: bytes) -> None:
    with SampleStore(tmp_path, {}) as store:
        for sample in range(2):
            store.append(record("x", sample))
    first, second, _ = store.path.read_bytes().split(b"\n")
    written = b"\n".join((first, damaged, second, b""))
    store.path.write_bytes(written)
    with pytest.raises(InputError, match="samples.jsonl, line 2, is not a sample"):
        SampleStore(tmp_path, {})
    assert store.path.read_bytes() == written


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="`output_dir`: .*cannot be written: Not a directory"):
        SampleStore(tmp_path / "file" / "model", {})


def test_samples_from_before_a_setting_was_renamed_are_kept(tmp_path: Path, record: Record) -> None:
    with SampleStore(tmp_path, {"max_new_tokens": 8}) as store:
        store.append(record("x", 0))
    with SampleStore(tmp_path, {"max_completion_length": 8}) as store:
        assert len(store.records) == 1
    with pytest.raises(InputError, match=r"`max_completion_length` \(8 then, 9 now\)"):
        SampleStore(tmp_path, {"max_completion_length": 9})


KILLED = """
import os, sys, time
from purified_opsd_trl import cli
from purified_opsd_trl.evaluate.backends import TransformersBackend
generate = TransformersBackend.generate
def slow(self, *args):
    for completion in generate(self, *args):
        yield completion
        time.sleep(0.2)
TransformersBackend.generate = slow
cli.main(sys.argv[1:])
"""


def test_a_kill_in_the_middle_loses_and_repeats_nothing(
    flags: list[str],
    model_dir: Path,
    read_samples: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    path = tmp_path / "out" / model_dir.name / "samples.jsonl"
    deadline = time.monotonic() + 400  # a busy machine takes minutes to import torch
    while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        time.sleep(0.02)
    assert cli.main(flags) == 2  # a second evaluation would write between the lines of the first
    assert "Another evaluation is writing into" in capsys.readouterr().err
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert 5 <= whole.count(b"\n") < 12
    assert cli.main(flags) == 0
    after = path.read_bytes()
    assert after.startswith(whole)
    keys = [(s["problem_id"], s["sample"]) for s in read_samples(path.parent)]
    assert len(keys) == len(set(keys)) == 12
