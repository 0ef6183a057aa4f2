"""The folder of a run: what was measured with which settings, in files that survive a kill at any moment.

- ``run.json``: the settings, the machine, the methods so far, for which of them the identity check has passed, and
  which were refused and why.
- ``answers.jsonl``: one line for each method and item, in the order in which they were answered.
- ``costs.json``: times and memory.

An answer counts once its line ends in a newline. What a kill leaves behind it is cut off when the folder is opened
again, and the answers that are missing are asked for anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sightline.errors import InputError
from sightline.files import cannot_write, read_json, write_json

try:
    import fcntl
except ImportError:  # not on Windows: there two runs at a time are not kept apart
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
DIGESTS = frozenset({"weights", "item_set"})


class RunFolder:
    """A folder that holds a run, or will hold one; `run_file` is another name for run.json where a report of the run
    would make no sense."""

    def __init__(self, path: Path, run_file: str = "run.json") -> None:
        self.path = path
        self.run_file = path / run_file
        self.answers_file = path / "answers.jsonl"
        self.costs_file = path / "costs.json"
        self._descriptor: int | None = None
        self._end = 0

    def info(self) -> dict[str, Any]:
        """What run.json says: settings, machine, methods, identity_checked.

        Raises:
            InputError: if the folder holds no run, a damaged one, or one of another format.
        """
        if not self.run_file.is_file():
            raise InputError(f"{self.path} holds no run: there is no run.json in it")
        info = read_json(self.run_file)
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise InputError(f"{self.run_file} is not in the format of this version of sightline")
        return info

    @contextmanager
    def opened(
        self, settings: Mapping[str, Any], machine: Mapping[str, Any], methods: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        """A context in which this is the folder of a run with these settings, old or new; methods may be added.

        A half-written last line is cut off, and failed items are taken out, so that they are tried again. Where the
        folder is refused, nothing in it is touched.

        Yields:
            What run.json says.

        Raises:
            InputError: if the folder holds a run with other settings (each that differs is named), another process is
                writing to it, or it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file: give a folder for the run")
        try:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.answers_file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
                self._lock()
                info = self._info_for(settings, machine, methods)
                rows, self._end = self._read()
                os.ftruncate(self._descriptor, self._end)
                if any("error" in row for row in rows):
                    self._rewrite([row for row in rows if "error" not in row])
                write_json(self.run_file, info)
            except OSError as error:
                raise cannot_write(self.path, error) from error
            yield info
        finally:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _info_for(
        self, settings: Mapping[str, Any], machine: Mapping[str, Any], methods: Sequence[str]
    ) -> dict[str, Any]:
        if not self.run_file.exists():
            if self.answers_file.stat().st_size:
                raise InputError(f"{self.path} holds answers but no run.json that tells of what: give another folder")
            return {
                "format": FORMAT,
                "settings": dict(settings),
                "machine": dict(machine),
                "methods": list(methods),
                "identity_checked": [],
            }
        info = self.info()
        old = info["settings"]
        # Through JSON and back, as the old settings have gone: a tuple is a list by now, a path a string.
        new = json.loads(json.dumps(dict(settings)))
        differ = [key for key in (*new, *(key for key in old if key not in new)) if old.get(key) != new.get(key)]
        if differ:
            told = ", ".join(_difference(key, old.get(key), new.get(key)) for key in differ)
            raise InputError(f"{self.path} holds a run made with other settings ({told}): give another folder")
        info["methods"] += [method for method in methods if method not in info["methods"]]
        return info

    def update(self, info: Mapping[str, Any]) -> None:
        """Replaces run.json."""
        write_json(self.run_file, dict(info))

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines of answers.jsonl.

        Raises:
            InputError: if a line that is not the last one is no JSON object.
        """
        return self._read()[0]

    def costs(self) -> dict[str, Any] | None:
        """What costs.json says, None if costs have not been measured."""
        return read_json(self.costs_file) if self.costs_file.is_file() else None

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes lines and returns when they are on the disk.

        Raises:
            InputError: if they cannot be written, because the disk is full, say. The file then ends in the last whole
            line.
        """
        assert self._descriptor is not None, "answers are written inside `opened`"
        try:
            for row in rows:
                line = _line(row)
                written = 0
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
                self._end += len(line)
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, self._end)
            raise cannot_write(self.answers_file, error) from error

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The rows, and where the last whole line ends."""
        try:
            content = self.answers_file.read_bytes()
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise InputError(f"cannot read {self.answers_file}: {error.strerror or error}") from error
        rows: list[dict[str, Any]] = []
        end = 0
        lines = content.split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or "method" not in row or "id" not in row:
                    raise ValueError("it is no answer")
            except ValueError as error:
                if number == len(lines):  # a power cut can leave a last line of rubbish
                    break
                raise InputError(f"line {number} of {self.answers_file} is damaged: {error}") from error
            rows.append(row)
            end += len(line) + 1
        return rows, end

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replaces the whole file by these rows, in one step."""
        partial = self.answers_file.with_name(self.answers_file.name + ".partial")
        old = self._descriptor
        self._descriptor = os.open(partial, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o666)
        self._lock()
        self._end = 0
        self.append(rows)
        os.replace(partial, self.answers_file)
        if old is not None:
            os.close(old)

    def _lock(self) -> None:
        if fcntl is None or self._descriptor is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing to {self.path}: wait for it, or give another folder") from None


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _difference(key: str, old: object, new: object) -> str:
    was, now = ("not given" if value is None else json.dumps(value, ensure_ascii=False) for value in (old, new))
    return f"{key}: {was}, now {now}" if len(was) + len(now) < 120 and key not in DIGESTS else f"another {key}"
