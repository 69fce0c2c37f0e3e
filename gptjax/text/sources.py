"""Texts on disk: files, folders and globs, plain or compressed, read piece by piece.

A file is a document; of a JSONL file every line is one. Nothing is held but the piece in hand, so
a text may be larger than memory.
"""

import codecs
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple

from gptjax.errors import UserError, optional_import
from gptjax.text import corpora

IN_FOLDERS = (".txt", ".text", ".md", ".jsonl", ".ndjson")  # with .gz or .zst or without
BLOCK = 2**20  # bytes read at a time
LONGEST_LINE = 2**28  # characters of one JSONL line
BOMB_RATIO, BOMB_FROM = 200, 2**26  # a text unpacks to under 100 times its size; checked from 64 MB
SAMPLE = 2**15  # bytes on either side of an error that an encoding is guessed from


class Piece(NamedTuple):
    """A part of a document, in order; `last` ends it."""

    text: str
    last: bool


@dataclass(frozen=True)
class Source:
    """A file with texts: its name, how to open it, its size, and what changes when it changes."""

    name: str
    open: Callable[[], IO[bytes]]
    size: int
    stamp: tuple[str | int, ...]


def find(text: str, notice: Callable[[str], None]) -> list[Source]:
    """The files that `--data.text` names.

    Args:
        text: a corpus of data/, a file, a folder (all of IN_FOLDERS below it) or a glob.
        notice: told in one line what a folder holds besides.

    Raises:
        UserError: there is none.
    """
    if text in corpora.names():
        corpus = corpora.describe(text)
        read = lambda: io.BytesIO(corpora.read_bytes(text))
        return [Source(text, read, corpus.bytes, ("sha256", corpus.sha256))]
    path = Path(text)
    if os.path.isdir(text):  # unlike Path's, false for any name that cannot be one
        files = sorted(
            p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))
        )
        found = [p for p in files if _plain_name(p).suffix.lower() in IN_FOLDERS]
        if not found:
            kinds = _kinds(files) or "nothing"
            raise UserError(
                f"no text in the folder {text}: looked for {', '.join(IN_FOLDERS)} (.gz or .zst "
                f"too), found {kinds}; name other files with a glob, such as '{path}/**/*.py'"
            )
        if len(found) < len(files):
            kinds = ", ".join(
                sorted({p.suffix or p.name for p in files if p not in set(found)})[:5]
            )
            notice(f"{text}: {len(files) - len(found)} other files left out ({kinds})")
        return [_file(p) for p in found]
    if glob.has_magic(text) and not os.path.exists(text):
        matches = (Path(match) for match in glob.glob(text, recursive=True))
        found = sorted(match for match in matches if match.is_file())
        if not found:
            raise UserError(f"no file matches {text}; mind the quotes around a glob")
        return [_file(p) for p in found]
    return [_file(path)]


def read(sources: list[Source], encoding: str, field: str) -> Iterator[Piece]:
    """The documents of all files, in order, each of one piece or more; empty ones are left out.

    Args:
        sources: see `find`.
        encoding: of the files; UTF-8's byte order mark is dropped, newlines stay as they are.
        field: of each JSONL line, that holds its text.

    Raises:
        UserError: a file that cannot be read, is damaged, is in another encoding, or a line
            without that field.
    """
    for source in sources:
        is_jsonl = _plain_name(Path(source.name)).suffix.lower() in (".jsonl", ".ndjson")
        with closing(_decoded(source, encoding)) as blocks:
            if is_jsonl:
                for document in _lines(source, blocks, field):
                    yield from _pieces(iter((document,)))
            else:
                yield from _pieces(blocks)


def read_text(text: str) -> str:
    """All that `text` names in one string, UTF-8: for texts that are small.

    Raises:
        UserError: there is none, it is empty, or it cannot be read.
    """
    whole = "".join(piece.text for piece in read(find(text, lambda line: None), "utf-8", "text"))
    if not whole:
        raise UserError(f"text is empty: {text}")
    return whole


def _file(path: Path) -> Source:
    try:
        with path.open("rb"):
            pass  # only to see that it can be read
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"text not found: {path} is neither a file, a folder, a glob nor one of the corpora "
            f"({', '.join(corpora.names())})"
        ) from None
    except OSError as error:
        raise UserError(f"text cannot be read: {path}: {error.strerror}") from None
    stamp = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    return Source(str(path), lambda: path.open("rb"), stat.st_size, stamp)


def _kinds(files: list[Path]) -> str:
    """The endings of some of them."""
    return ", ".join(sorted({path.suffix or path.name for path in files})[:5])


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _plain_name(path: Path) -> Path:
    """Without the ending that says how it is packed."""
    return path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path


def _pieces(blocks: Iterator[str]) -> Iterator[Piece]:
    """The blocks of one document, the last one marked."""
    before = ""
    for block in filter(None, blocks):
        if before:
            yield Piece(before, False)
        before = block
    if before:
        yield Piece(before, True)


def _decoded(source: Source, encoding: str) -> Generator[str, None, None]:
    """A file's text, a block at a time."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    strips_mark = codecs.lookup(encoding).name == "utf-8"
    read = 0
    with closing(_unpacked(source)) as unpacked:  # not when it is collected, if one ever fails
        for raw in chain(unpacked, [b""]):
            waiting = decoder.getstate()[0]
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                near = (waiting + raw)[max(0, error.start - SAMPLE) :][: 2 * SAMPLE]
                raise UserError(
                    f"text is not {encoding.upper()}: {source.name}, byte offset "
                    f"{read - len(waiting) + error.start}; {_guess(near)}"
                ) from None
            if strips_mark and text:
                text, strips_mark = text.removeprefix("\ufeff"), False
            read += len(raw)
            yield text


def _unpacked(source: Source) -> Generator[bytes, None, None]:
    """A file's bytes, a block at a time, unpacked if its name ends in .gz or .zst."""
    suffix = Path(source.name).suffix.lower()
    try:
        with source.open() as file:
            if suffix not in (".gz", ".zst"):
                while raw := file.read(BLOCK):
                    yield raw
                return
            size = 0
            for raw in _gunzip(file) if suffix == ".gz" else _unzstd(file):
                size += len(raw)
                if size > BOMB_FROM and size > BOMB_RATIO * source.size:
                    raise UserError(
                        f"{source.name} unpacks to over {BOMB_RATIO} times its size, which no text "
                        f"does; if it is meant so, unpack it yourself"
                    )
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{source.name} is damaged or was cut short ({error}); get it again"
        ) from None
    except OSError as error:
        raise UserError(f"text cannot be read: {source.name}: {error.strerror}") from None


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        while raw := unpacked.read(BLOCK):
            yield raw


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    zstandard = optional_import("zstandard")
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        # Little at a time, for a kilobyte can hold 32 MB. The library's own reader takes a file
        # that was cut for one that ends.
        raw, fresh = file.read(2**10), True
        while raw:
            yield frame.decompress(raw)
            fresh = frame.eof
            raw = frame.unused_data if fresh else b""
            if fresh:
                frame = zstandard.ZstdDecompressor().decompressobj()
            raw = raw or file.read(2**10)
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    if not fresh:
        raise EOFError("its last frame has no end")


def _lines(source: Source, blocks: Iterator[str], field: str) -> Iterator[str]:
    """The texts of a JSONL file's lines. Only "\\n" ends one: JSON may hold other separators."""
    rest, number = "", 0
    for block in chain(blocks, "\n"):
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield _field(f"line {number} of {source.name}", line, field)
        if len(rest) > LONGEST_LINE:
            raise UserError(
                f"line {number + 1} of {source.name} has over {LONGEST_LINE} characters; is it "
                f"JSONL?"
            )


def _field(where: str, line: str, field: str) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get(field), str):
        has = ", ".join(map(repr, values)) if isinstance(values, dict) else type(values).__name__
        raise UserError(
            f"{where} has no text in a field {field!r} (it has: {has}); name it with --data.field"
        )
    return values[field]


def _guess(raw: bytes) -> str:
    """What bytes probably are that are not in the encoding: told, never acted upon."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it begins like UTF-16: give --data.encoding utf-16"
    if b"\0" in raw:
        return "it looks like a binary file"
    advice = "name its encoding, e.g. --data.encoding latin-1"
    try:
        best = optional_import("charset_normalizer").from_bytes(raw).best()
    except UserError:
        return advice
    return (
        f"it is probably {best.encoding}: give --data.encoding {best.encoding}" if best else advice
    )
