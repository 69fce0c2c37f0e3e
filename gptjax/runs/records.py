"""`metrics.jsonl`: one JSON object for each step, each step once, in order; read without trust."""

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

Record = dict[str, Any]  # "step": int, floats by name, "skipped": why

MAX_LINE = 2**16  # bytes worth reading
MAX_STEP = 2**31 - 1


def append(path: Path, records: list[Record]) -> None:
    """Add one line for each record; they are on the disk when this returns.

    Raises:
        UserError: the disk takes no more.
    """
    if records:
        with files.writing(path), path.open("ab") as file:
            file.write(_lines(records))
            file.flush()
            os.fsync(file.fileno())  # no checkpoint may outlive the lines before it


def scan(path: Path) -> Iterator[tuple[Record | None, bytes, str | None]]:
    """Each line: its record if it is sound, its bytes, and what is wrong with it, if anything.

    A last line without its end is what a killed process leaves, and no damage. A missing file is.

    Raises:
        UserError: there is a file that cannot be read.
    """
    due = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
                try:
                    record = as_record(json.loads(line))
                    if record["step"] < due:
                        raise ValueError(f"of step {record['step']}, expected {due}")
                except (ValueError, RecursionError) as error:
                    wrong = f"{path} is damaged: line {number}: {_short(error)}"
                    yield None, line, wrong if line.endswith(b"\n") else None
                    continue
                late = record["step"] > due
                wrong = f"of step {record['step']}, expected {due}"
                yield record, line, f"{path} is damaged: line {number}: {wrong}" if late else None
                due = record["step"] + 1
    except FileNotFoundError:
        yield None, b"", f"{path} is missing"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read(path: Path) -> tuple[list[Record], str | None]:
    """All records that are sound, and what is wrong first.

    Raises:
        UserError: there is a file that cannot be read.
    """
    found, damage = [], None
    for record, _, wrong in scan(path):
        damage = damage or wrong
        if record is not None:
            found.append(record)
    return found, damage


def fingerprint(path: Path) -> str:
    """JSON that tells the file as it is now from one that is damaged later; lines may be added."""
    size = path.stat().st_size if path.exists() else 0
    return json.dumps({"bytes": size, "sha256": _digest(path, size)})


def has_changed(path: Path, fingerprint: str) -> bool:
    """Whether what was in the file at the time of the fingerprint is there no more."""
    try:
        values = json.loads(fingerprint)
        return _digest(path, values["bytes"]) != values["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return True  # a fingerprint that nobody made


def _digest(path: Path, size: int) -> str:
    """Of the first bytes of a file, which may be longer than memory is large."""
    digest = hashlib.sha256()
    if path.exists():
        with path.open("rb") as file:
            while size > 0 and (piece := file.read(min(size, 2**20))):
                digest.update(piece)
                size -= len(piece)
    return digest.hexdigest()


def rewind(path: Path, step: int, damaged: bool) -> tuple[list[Record], str | None]:
    """Drop what comes after `step`; what is damaged is first kept in a file beside it.

    Args:
        path: of the file.
        step: of the last record to keep.
        damaged: whether it is known to be, however its lines look.

    Returns:
        Of the records that are left, the last and the skipped ones before it, back to one that was
        not; and what is wrong with the file, if anything.

    Raises:
        UserError: the disk takes no more; the file is as it was.
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
            damage = f"{damage}; it is kept as {aside.name}"
        kept.seek(0)
        files.write_atomically(path, kept)
    return last, damage


def as_record(value: Any) -> Record:
    """What JSON gave, if it is a record.

    Raises:
        ValueError: not an object with a step, numbers by name, and perhaps why it was skipped.
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
    """Records as strict JSON, which has no word for what is not finite: null."""
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
