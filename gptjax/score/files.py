"""Files of scored tokens, one a line: `.csv` and `.jsonl`."""

import csv
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gptjax.errors import UserError
from gptjax.runs.files import writing
from gptjax.score.cells import Cell, name
from gptjax.text.tokenizers import Tokenizer

COLUMNS = "run document position id text logprob rank alternatives".split()
Row = dict[str, Any]


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A file to write, which replaces `path` at the end, if all went well.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give a file in it")
    with writing(path):
        temporary.unlink(missing_ok=True)  # left by a killed process, or a planted link
        file = temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="")
    try:
        with file:
            yield file
            with writing(path):
                file.flush()
        with writing(path):
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def writer(file: IO[str], suffix: str) -> Callable[[Row], None]:
    """A function that writes a row.

    Args:
        file: to write to.
        suffix: `.csv` or `.jsonl`.
    """
    if suffix == ".jsonl":
        return lambda row: print(json.dumps(row, allow_nan=False), file=file)
    table = csv.writer(file, lineterminator="\n")
    table.writerow(COLUMNS)
    lists = lambda x: (json.dumps(x) if x else "") if isinstance(x, list) else x
    return lambda row: table.writerow([lists(row[name]) for name in COLUMNS])


def rows(run: str, tokenizer: Tokenizer, cell: Cell) -> Iterator[Row]:
    """The rows of a cell's tokens. Where several share a character, the last one has the text.

    Args:
        run: its name.
        tokenizer: of the run.
        cell: from `cells.cells`.
    """
    for token in cell.tokens:
        yield {
            "run": run,
            "document": token.stream + 1,
            "position": token.place,
            "id": token.id,
            "text": cell.text if token is cell.tokens[-1] else "",
            "logprob": number(token.logprob),
            "rank": token.rank or None,
            "alternatives": [
                {"id": id_, "text": name(tokenizer, id_), "logprob": number(logprob)}
                for id_, logprob in token.alternatives
                if token.rank
            ],
        }


def number(x: float) -> float | None:
    """A number for JSON, which has none that is not finite."""
    return round(x, 7) if math.isfinite(x) else None
