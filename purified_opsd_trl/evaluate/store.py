"""
Samples on disk: one JSON line each, appended and synced as soon as it exists.

An evaluation that was killed continues where it stopped: what was written is read back and not drawn again; half a
last line is cut off. One process at a time writes into a folder.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InputError


Key = tuple[str, str, int]  # benchmark, problem id, number of the sample

_FIELDS = ("benchmark", "problem_id", "sample", "answer", "correct", "tokens", "truncated", "markers")


class SampleStore:
    """
    The samples of one model, in `samples.jsonl` beside the `settings.json` that they depend on.

    Raises an [`InputError`] if another process is writing into the folder, or it holds samples that were drawn with
    other settings, or a damaged file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / "samples.jsonl"
        self.records: dict[Key, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise InputError(f"`output_dir`: {folder} cannot be written: {error.strerror}.") from None
        try:
            self._lock()
            _check_settings(folder / "settings.json", settings)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        """Keeps other processes out until the file is closed, which the end of this process does as well."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another evaluation is writing into {self.path.parent}. Wait for its end, or choose another "
                "`output_dir`."
            ) from None

    def _read(self) -> None:
        """Fills `records`, and cuts off what follows the last complete line."""
        self._file.seek(0)
        data = self._file.read()
        complete = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                if missing := [field for field in _FIELDS if field not in record]:
                    raise KeyError(*missing)
                self.records[_key(record)] = record
            except (ValueError, TypeError, KeyError):
                raise InputError(
                    f"{self.path}, line {number}, is not a sample. Restore the file, or remove that line."
                ) from None
        self._file.truncate(complete)

    def check_problems(self, hashes: Mapping[tuple[str, str], str]) -> None:
        """
        Refuses samples that were drawn for other problems, or graded by other answers.

        `hashes` holds `Problem.sha256` by benchmark and id. Samples of problems that are not asked for are left alone.
        """
        for (benchmark, problem, _), record in self.records.items():
            key = (benchmark, problem)
            if key in hashes and record.get("problem_sha256") != hashes[key]:
                raise InputError(
                    f"{self.path} holds samples of another problem {problem!r} of `{benchmark}`: its text or its "
                    "answer is not the one they were drawn for. Choose another `output_dir`, or remove that file."
                )

    def append(self, record: dict[str, Any]) -> None:
        """Writes one sample, down to the disk."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[_key(record)] = record

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file completely or not at all, so that a kill leaves no half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The object in a file; an [`InputError`] that ends in `advice` if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is damaged or is no JSON ({error}). {advice}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds no object. {advice}")
    return content


def _key(record: dict[str, Any]) -> Key:
    return record["benchmark"], record["problem_id"], record["sample"]


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path, "Restore it, or choose another `output_dir`.")
    if "max_new_tokens" in before:  # as it was once called
        before["max_completion_length"] = before.pop("max_new_tokens")
    changed = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
    if changed:

        def shown(values: dict[str, Any], key: str) -> str:
            return repr(values[key]) if key in values else "not recorded"

        named = ", ".join(f"`{key}` ({shown(before, key)} then, {shown(settings, key)} now)" for key in changed[:3])
        raise InputError(
            f"{path.parent} holds samples drawn with other settings: {named}. Choose another `output_dir`, or "
            "remove that folder."
        )
