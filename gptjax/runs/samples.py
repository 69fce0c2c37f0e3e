"""Read and append `samples.jsonl`: what the model wrote at each evaluation."""

import json
import os
from pathlib import Path
from typing import Any

from gptjax.runs import files

NAME = "samples.jsonl"


def append(directory: Path, step: int, text: str) -> None:
    """Append the sample of a step to a run's file, flushed to disk before this returns.

    Raises:
        UserError: the disk is full or not writable.
    """
    path = directory / NAME
    with files.writing(path), path.open("ab") as file:
        file.write(json.dumps({"step": step, "text": text}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> dict[int, str]:
    """The texts of a run's samples by step; malformed lines are left out.

    Empty for a run of a version that kept none, or a file that cannot be read.
    """
    try:
        lines = (directory / NAME).read_bytes().splitlines()
    except OSError:
        return {}
    found = (_sample(line) for line in lines)
    return dict(sample for sample in found if sample is not None)


def rewind(directory: Path, step: int) -> None:
    """Drop the samples after `step`, which a resumed run will write again.

    Raises:
        UserError: the disk is full or not writable; the file is unchanged.
    """
    path = directory / NAME
    if path.exists():
        kept = {s: text for s, text in read(directory).items() if s <= step}
        lines = (json.dumps({"step": s, "text": text}) + "\n" for s, text in kept.items())
        files.write_atomically(path, "".join(lines))


def _sample(line: bytes) -> tuple[int, str] | None:
    try:
        value: Any = json.loads(line)
        step, text = value["step"], value["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (step, text) if type(step) is int and isinstance(text, str) else None
