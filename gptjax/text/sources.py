"""Stream text from files, folders and globs, plain or compressed.

A file is one document, except that each line of a JSONL file is one. Text is read in blocks of
BLOCK bytes, so it may be larger than memory.
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

OPENWEBTEXT = "openwebtext"  # what GPT-2's presets are meant for
IN_FOLDERS = (".txt", ".text", ".md", ".jsonl", ".ndjson")  # optionally compressed: .gz, .zst
BLOCK = 2**20  # bytes read at a time
LONGEST_LINE = 2**28  # characters in one JSONL line
BOMB_RATIO, BOMB_FROM = 200, 2**26  # text compresses less than 100-fold; checked from 64 MB on
SAMPLE = 2**15  # bytes on either side of an error, used to guess the encoding


class Piece(NamedTuple):
    """The next part of a document; `last` marks its end."""

    text: str
    last: bool


@dataclass(frozen=True)
class Source:
    """A file with text.

    Attributes:
        name: path, or name of a corpus.
        open: opens it for reading, still compressed.
        size: in bytes, as stored.
        stamp: identifies this version of the file: path, size, times of modification and of change
            of state (which no program can set back), or a hash.
    """

    name: str
    open: Callable[[], IO[bytes]]
    size: int
    stamp: tuple[str | int, ...]


def find(text: str, notice: Callable[[str], None]) -> list[Source]:
    """Find the files that `--data.text` names.

    Args:
        text: a corpus, a file, a folder (all files below it that end in IN_FOLDERS) or a glob.
        notice: called with one line about the files of a folder that are skipped.

    Raises:
        UserError: no such text.
    """
    if text in corpora.names():
        corpus = corpora.describe(text)
        read = lambda: io.BytesIO(corpora.read_bytes(text))
        return [Source(text, read, corpus.bytes, ("sha256", corpus.sha256))]
    path = Path(text)
    if text == OPENWEBTEXT and not path.exists():
        raise UserError(
            "this config trains on OpenWebText, which gptjax does not fetch; prepare it with "
            "nanoGPT's data/openwebtext/prepare.py and give the folder of train.bin and val.bin as "
            "--data.text FOLDER, or a text of your own as --data.text FILE"
        )
    if os.path.isdir(text):  # unlike Path's, false for any name that cannot be one
        files = sorted(
            p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))
        )
        found = [p for p in files if _plain_name(p).suffix.lower() in IN_FOLDERS]
        if not found:
            raise UserError(
                f"no text in the folder {text}: expected {', '.join(IN_FOLDERS)} (or .gz, .zst of "
                f"these), found {_suffixes(files) or 'no files'}; select other files with a glob, "
                f"such as '{path}/**/*.py'"
            )
        if len(found) < len(files):
            skipped = sorted(set(files) - set(found))
            notice(f"{text}: {len(skipped)} other files skipped ({_suffixes(skipped)})")
        return [_file(p) for p in found]
    if glob.has_magic(text) and not os.path.exists(text):
        matches = (Path(match) for match in glob.glob(text, recursive=True))
        found = sorted(match for match in matches if match.is_file())
        if not found:
            raise UserError(f"no file matches {text}; check the pattern, and quote it in the shell")
        return [_file(p) for p in found]
    return [_file(path)]


def read(sources: list[Source], encoding: str, field: str) -> Iterator[Piece]:
    """Stream the documents of all files, in order, each as one or more pieces.

    Empty documents are skipped.

    Args:
        sources: see `find`.
        encoding: encoding of the files. A UTF-8 byte order mark is dropped; newlines are kept.
        field: JSONL field that contains the text.

    Raises:
        UserError: a file that cannot be read, is corrupt, or has another encoding; or a JSONL
            line without that field.
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
    """Read a small UTF-8 text whole; `text` as in `find`.

    Raises:
        UserError: no such text, an empty one, or one that cannot be read.
    """
    whole = "".join(piece.text for piece in read(find(text, lambda line: None), "utf-8", "text"))
    if not whole:
        raise UserError(f"text is empty: {text}")
    return whole


def _file(path: Path) -> Source:
    try:
        with path.open("rb"):
            pass  # check permissions now rather than after other files were read
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"text not found: {path}; give a file, a folder, a glob, or one of the corpora "
            f"({', '.join(corpora.names())})"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from None
    stamp = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return Source(str(path), lambda: path.open("rb"), stat.st_size, stamp)


def _suffixes(files: list[Path]) -> str:
    """Up to five of their file name extensions, for a message."""
    return ", ".join(sorted({path.suffix or path.name for path in files})[:5])


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _plain_name(path: Path) -> Path:
    """The path without a .gz or .zst extension."""
    return path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path


def _pieces(blocks: Iterator[str]) -> Iterator[Piece]:
    """The non-empty blocks of one document, the last one marked."""
    before = ""
    for block in filter(None, blocks):
        if before:
            yield Piece(before, False)
        before = block
    if before:
        yield Piece(before, True)


def _decoded(source: Source, encoding: str) -> Generator[str, None, None]:
    """Decode a file, a block at a time."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    strips_mark = codecs.lookup(encoding).name == "utf-8"
    read = 0
    with closing(_unpacked(source)) as unpacked:  # close the file now, not when garbage-collected
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
    """Read a file, a block at a time, decompressing .gz and .zst."""
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
                        f"{source.name} decompresses to over {BOMB_RATIO} times its size, more "
                        f"than any text; if that is intended, decompress it yourself"
                    )
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{source.name} is corrupt or truncated ({error}); download it again"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the text {source.name}: {error.strerror}") from None


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        while raw := unpacked.read(BLOCK):
            yield raw


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    zstandard = optional_import("zstandard")
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        # Small reads, because a kilobyte can decompress to 32 MB. The library's own stream reader
        # does not report a truncated file.
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
        raise EOFError("the last frame is incomplete")


def _lines(source: Source, blocks: Iterator[str], field: str) -> Iterator[str]:
    """The text of each line of a JSONL file. Only "\\n" ends a line: JSON strings may contain
    other line separators."""
    rest, number = "", 0
    for block in chain(blocks, "\n"):
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield _field(f"line {number} of {source.name}", line, field)
        if len(rest) > LONGEST_LINE:
            raise UserError(
                f"line {number + 1} of {source.name} is longer than {LONGEST_LINE} characters; "
                f"check that it is JSONL"
            )


def _field(where: str, line: str, field: str) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get(field), str):
        has = ", ".join(map(repr, values)) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{where} has no text field {field!r} (found: {has}); set --data.field")
    return values[field]


def _guess(raw: bytes) -> str:
    """Advice on the encoding of bytes that failed to decode; only shown, never acted on."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it starts with a UTF-16 byte order mark; set --data.encoding utf-16"
    if b"\0" in raw:
        return "it looks like a binary file"
    advice = "set its encoding, for example --data.encoding latin-1"
    try:
        best = optional_import("charset_normalizer").from_bytes(raw).best()
    except UserError:
        return advice
    return (
        f"it is probably {best.encoding}; set --data.encoding {best.encoding}" if best else advice
    )
