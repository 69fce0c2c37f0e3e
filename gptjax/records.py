"""`metrics.jsonl`: one JSON object for each step, each step once, in order; read without trust."""

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from gptjax import files
from gptjax.errors import UserError

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


def read(path: Path) -> tuple[list[Record], str | None]:
    """All records that are sound, and what is wrong first.

    A last line without its end is what a killed process leaves, and no damage.

    Raises:
        UserError: there is a file that cannot be read.
    """
    records: list[Record] = []
    damage: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
                due = records[-1]["step"] + 1 if records else 0
                try:
                    record = as_record(json.loads(line))
                    if record["step"] < due:
                        raise ValueError(f"of step {record['step']}, expected {due}")
                except (ValueError, RecursionError) as error:
                    if line.endswith(b"\n"):
                        damage.append(f"line {number}: {_short(error)}")
                    continue
                if record["step"] > due:
                    damage.append(f"line {number}: of step {record['step']}, expected {due}")
                records.append(record)
    except FileNotFoundError:
        return records, f"{path} is missing"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return records, f"{path} is damaged: {damage[0]}" if damage else None


def fingerprint(path: Path) -> str:
    """JSON that tells the file as it is now from one that is damaged later; lines may be added."""
    raw = path.read_bytes() if path.exists() else b""
    return json.dumps({"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})


def has_changed(path: Path, fingerprint: str) -> bool:
    """Whether what was in the file at the time of the fingerprint is there no more."""
    try:
        values = json.loads(fingerprint)
        raw = path.read_bytes()[: values["bytes"]] if path.exists() else b""
        return hashlib.sha256(raw).hexdigest() != values["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return True  # a fingerprint that nobody made


def rewind(path: Path, step: int, damaged: bool) -> tuple[list[Record], str | None]:
    """Drop what comes after `step`; what is damaged is first kept in a file beside it.

    Args:
        path: of the file.
        step: of the last record to keep.
        damaged: whether it is known to be, however its lines look.

    Returns:
        The records that are left, and what is wrong with the file, if anything.

    Raises:
        UserError: the disk takes no more; the file is as it was.
    """
    found, damage = read(path)
    if damaged and not damage:
        damage = f"{path} is damaged: it does not match its checksum"
    if damage and path.exists() and (damaged or path.read_bytes() != _lines(found)):
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        with files.writing(aside):
            shutil.copyfile(path, aside)
        damage += f"; it is kept as {aside.name}"
    kept = [record for record in found if record["step"] <= step]
    files.write_atomically(path, _lines(kept).decode())
    return kept, damage


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
