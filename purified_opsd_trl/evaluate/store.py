"""
Samples on disk: one JSON line each, appended and synced as soon as it exists.

A killed evaluation continues where it stopped: what was written is read back and not produced again; half a last line
is cut off.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InputError


Key = tuple[str, str, int]  # benchmark, problem id, number of the sample


class SampleStore:
    """
    The samples of one model.

    Args:
        folder (`Path`):
            Folder for `samples.jsonl` and `settings.json`; created if need be.
        settings (`dict`):
            What the samples depend on, in JSON types.

    Raises:
        `InputError`: if the folder holds samples that were drawn with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "samples.jsonl"
        _check_settings(folder / "settings.json", settings)
        self.records: dict[Key, dict[str, Any]] = {}
        whole = self._read()
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._file.truncate(whole)
        self._file.seek(whole)

    def _read(self) -> int:
        """Fills `records`; returns the bytes up to the end of the last whole line."""
        if not self.path.exists():
            return 0
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self.records[_key(record)] = record
            except (json.JSONDecodeError, KeyError):
                raise InputError(
                    f"{self.path}, line {number}, is not a sample. Restore the file, or remove that line."
                ) from None
        return whole

    def check_problems(self, hashes: Mapping[tuple[str, str], str]) -> None:
        """
        Refuses to go on with samples of other problems. Samples of problems that are not asked for are left alone.

        Args:
            hashes (`Mapping[tuple[str, str], str]`):
                By benchmark and problem id: hash of problem and answer, as the samples hold it in `problem_sha256`.

        Raises:
            `InputError`: if a sample was drawn for another problem, or graded by another answer.
        """
        for (benchmark, problem, _), record in self.records.items():
            key = (benchmark, problem)
            if key in hashes and record.get("problem_sha256") != hashes[key]:
                raise InputError(
                    f"{self.path} holds samples of another problem {problem!r} of `{benchmark}`: its text or its "
                    "answer is not the one they were drawn for. Choose another `--output_dir`, or remove that file."
                )

    def append(self, record: dict[str, Any]) -> None:
        """
        Writes one sample, down to the disk.

        Args:
            record (`dict`):
                JSON types, with `benchmark`, `problem_id`, `sample` and `problem_sha256`.
        """
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


def _key(record: dict[str, Any]) -> Key:
    return record["benchmark"], record["problem_id"], record["sample"]


def _shown(settings: dict[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "not recorded"


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
        if changed:
            named = ", ".join(
                f"`{key}` ({_shown(before, key)} then, {_shown(settings, key)} now)" for key in changed[:3]
            )
            raise InputError(
                f"{path.parent} holds samples drawn with other settings: {named}. Choose another `--output_dir`, or "
                "remove that folder."
            )
        return
    # Written whole or not at all: a kill must not leave half a file
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
