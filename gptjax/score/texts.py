"""The documents that a command names, read from their start as often as they are needed."""

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from gptjax.config import DataConfig
from gptjax.errors import UserError
from gptjax.text import sources
from gptjax.text.sources import Piece

Read = Callable[[], Iterator[Piece]]


def of_string(text: str, separator: str | None = None) -> Read:
    """One text, or the documents that a separator divides it into."""
    read = lambda: iter([Piece(text, True)] if text else [])
    return read if separator is None else lambda: split_at(read(), separator)


def of_files(
    name: str,
    by_line: bool,
    encoding: str,
    field: str,
    separator: str | None,
    notice: Callable[[str], None],
) -> Read:
    """The documents of files.

    Args:
        name: see `sources.find`; "-": standard input.
        by_line: each line is a document, as it always is in JSONL.
        encoding, field: see `sources.read`.
        separator: that divides files into documents; None: none does.
        notice: called with a line about files that are skipped.

    Raises:
        UserError: no such file, or an encoding that Python does not know.
    """
    with _own_flags():
        options = DataConfig(encoding=encoding, field=field)
        found = [_standard_input()] if name == "-" else sources.find(name, notice)

    def read() -> Iterator[Piece]:
        with _own_flags():
            yield from sources.read(found, options.encoding, options.field)

    if by_line and not any(map(_is_jsonl, found)):
        return lambda: lines(read())
    return read if separator is None else lambda: split_at(read(), separator)


@contextmanager
def _own_flags() -> Iterator[None]:
    """Errors about texts name the flags of `train`; here those have no section."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"(--)?\bdata\.(?=encoding|field)", "--", str(error))) from None


def _is_jsonl(source: sources.Source) -> bool:
    """Whether each line of a file is a document already."""
    ends = [f"{end}{packed}" for end in sources.LINES for packed in ("", ".gz", ".zst")]
    return source.name.lower().endswith(tuple(ends))


def _standard_input() -> sources.Source:
    """Standard input as a file, since two runs read it twice."""
    copy = tempfile.NamedTemporaryFile(prefix="gptjax-")
    shutil.copyfileobj(sys.stdin.buffer, copy)
    copy.flush()
    return sources.Source("standard input", lambda: open(copy.name, "rb"), copy.tell(), ())


def split_at(pieces: Iterable[Piece], separator: str) -> Iterator[Piece]:
    """Documents, split again at each separator, which is dropped; what it leaves empty too."""
    rest, begun = "", False
    for piece in pieces:
        *whole, rest = (rest + piece.text).split(separator)
        for text in [*whole, rest] if piece.last else whole:
            if text or begun:
                yield Piece(text, True)
            begun = False
        if piece.last:
            rest = ""
        elif len(rest) > len(separator):  # its end may be the beginning of a separator
            yield Piece(rest[: -len(separator)], False)
            rest, begun = rest[-len(separator) :], True


def lines(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Each line of the documents as one, without its line end; empty ones too."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece.text).split("\n")
        for line in whole:
            yield Piece(line.removesuffix("\r"), True)
        if piece.last and rest:
            yield Piece(rest.removesuffix("\r"), True)
        elif len(rest) > 1:
            yield Piece(rest[:-1], False)
        rest = "" if piece.last else rest[-1:]
