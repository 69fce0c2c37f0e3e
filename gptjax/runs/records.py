"""Read and append `metrics.jsonl`: one JSON object per step, in order, validated as untrusted."""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.runs import files

Record = dict[str, Any]  # "step": int; floats by name; "skipped": reason, if it was skipped

MAX_LINE = 2**16  # bytes
MAX_STEP = 2**31 - 1


def append(path: Path, records: list[Record]) -> None:
    """Append one line per record, flushed to disk before this returns.

    Raises:
        UserError: the disk is full or not writable.
    """
    if records:
        with files.writing(path), path.open("ab") as file:
            file.write(_lines(records))
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must never be newer than the metrics on disk


def scan(path: Path) -> Iterator[tuple[Record | None, bytes, str | None]]:
    """Yield for each line: its record if valid, its bytes, and its problem if there is one.

    A truncated last line is normal after a kill and not a problem; a missing file is one.

    Raises:
        UserError: the file exists but cannot be read.
    """
    due = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
                try:
                    record = as_record(json.loads(line))
                    if record["step"] < due:
                        raise ValueError(f"step {record['step']}, expected {due}")
                except (ValueError, RecursionError) as error:
                    wrong = f"{path} is damaged: line {number}: {_short(error)}"
                    yield None, line, wrong if line.endswith(b"\n") else None
                    continue
                late = record["step"] > due
                wrong = f"step {record['step']}, expected {due}"
                yield record, line, f"{path} is damaged: line {number}: {wrong}" if late else None
                due = record["step"] + 1
    except FileNotFoundError:
        yield None, b"", f"{path} is missing"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read(path: Path) -> tuple[list[Record], str | None]:
    """All valid records, and the first problem if there is one.

    Raises:
        UserError: the file exists but cannot be read.
    """
    found, damage = [], None
    for record, _, wrong in scan(path):
        damage = damage or wrong
        if record is not None:
            found.append(record)
    return found, damage


def digest_json(path: Path) -> str:
    """Size and sha256 of a file, as JSON, to detect later corruption; lines may be appended."""
    size = path.stat().st_size if path.exists() else 0
    return json.dumps({"bytes": size, "sha256": _digest(path, size)})


def has_changed(path: Path, digest: str) -> bool:
    """Whether the bytes that were in the file when `digest_json` was taken have changed."""
    try:
        values = json.loads(digest)
        return _digest(path, values["bytes"]) != values["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return True  # not a digest


def _digest(path: Path, size: int) -> str:
    """The sha256 of the first `size` bytes of a file, read in blocks."""
    digest = hashlib.sha256()
    if path.exists():
        with path.open("rb") as file:
            while size > 0 and (piece := file.read(min(size, 2**20))):
                digest.update(piece)
                size -= len(piece)
    return digest.hexdigest()


def rewind(path: Path, step: int, damaged: bool) -> tuple[list[Record], str | None]:
    """Drop the records after `step`; a damaged file is first copied to `*.damaged-TIME`.

    Args:
        path: the metrics file.
        step: step of the last record to keep.
        damaged: whether the file is known to be damaged, even if every line is valid.

    Returns:
        The last remaining record that was not skipped with the skipped ones after it; and the
        problem with the file, if there was one.

    Raises:
        UserError: the disk is full or not writable; the file is unchanged.
    """
    damage: str | None = None
    last: list[Record] = []
    lost = damaged
    with files.writing(path), tempfile.TemporaryFile(dir=path.parent) as kept:
        for record, line, wrong in scan(path):
            damage = damage or wrong
            lost |= record is None and wrong is not None and line != b""
            if record is not None and record["step"] <= step:
                last = [*last, record] if "skipped" in record else [record]
                kept.write(line if line.endswith(b"\n") else line + b"\n")
        if damaged and damage is None:
            damage = f"{path} is damaged: it does not match its checksum"
        if lost and path.exists():
            aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
            with files.writing(aside):
                shutil.copyfile(path, aside)
            damage = f"{damage}; the original is kept as {aside.name}"
        kept.seek(0)
        files.write_atomically(path, kept)
    return last, damage


def as_record(value: Any) -> Record:
    """Validate a parsed JSON value as a record.

    Raises:
        ValueError: not an object with an integer step, numbers by name, and optionally a string
            "skipped".
    """
    if not isinstance(value, dict):
        raise ValueError("not an object")
    step = value.get("step")
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise ValueError("no step")
    for name, x in value.items():
        number = type(x) is float or (type(x) is int and abs(x) < 2**53)
        words = name == "skipped" and isinstance(x, str)
        if not (number or words or x is None):
            raise ValueError(f"{name[:40]!r} is not a number")
    return value


def _lines(records: list[Record]) -> bytes:
    """Serialise records as strict JSON lines; non-finite numbers become null."""
    strict = [
        {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in record.items()
        }
        for record in records
    ]
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in strict).encode()


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]
