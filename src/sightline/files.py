"""Writing files so that nobody ever reads half of one, and a full disk ends in one clear sentence."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from sightline.errors import InputError

FULL = {errno.ENOSPC, errno.EDQUOT}


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file beside its place and moves it there: a reader sees the old content or the new one, each whole.

    Raises:
        InputError: if it cannot be written; the old content is then still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise cannot_write(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """`write_whole` of an indented JSON document."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The document in a JSON file.

    Raises:
        InputError: if the file cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def cannot_write(path: Path, error: OSError) -> InputError:
    """What to tell whoever wanted `path` to be written."""
    if error.errno in FULL:
        return InputError(
            f"the disk is full: {path} could not be written; what was written before is whole, so free some space and "
            "give the same command again"
        )
    return InputError(f"cannot write {path}: {error.strerror or error}")
