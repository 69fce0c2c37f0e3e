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
from gptjax.runs.files import check_regular
from gptjax.text import corpora, sniff

OPENWEBTEXT = "openwebtext"  # what GPT-2's presets are meant for
LINES = (".jsonl", ".ndjson")  # each line is a JSON object
IN_FOLDERS = (".txt", ".text", ".md", *LINES)  # optionally compressed: .gz, .zst
SYNTAX = (".json", ".csv", ".tsv", ".ipynb", ".html", ".htm", ".xml", ".rtf")
BLOCK = 2**20  # bytes read at a time
LONGEST_LINE = 2**28  # characters in one JSONL line
BOMB_RATIO, BOMB_FROM = 200, 2**26  # text compresses less than 100-fold; checked from 64 MB on
HEAD = 2**7  # bytes of each file that are looked at first
SAMPLE = 2**15  # bytes on either side of an error, or at the start, used to guess the encoding
SWAPPED = "\ufffe"  # the byte order mark with its bytes swapped


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
        head: its first bytes, as stored; of a corpus none.
    """

    name: str
    open: Callable[[], IO[bytes]]
    size: int
    stamp: tuple[str | int, ...]
    head: bytes = b""


def find(text: str, notice: Callable[[str], None]) -> list[Source]:
    """Find the files that `--data.text` names.

    Args:
        text: a corpus, a file, a folder (all files below it that end in IN_FOLDERS) or a glob.
        notice: called with one line about the files of a folder that are skipped, and one about
            files whose syntax would be trained on.

    Raises:
        UserError: no such text.
    """
    if text in corpora.names():
        corpus = corpora.describe(text)
        read = lambda: io.BytesIO(corpora.read_bytes(text))
        return [Source(text, read, corpus.bytes, ("sha256", corpus.sha256))]
    found = [_file(path) for path in _paths(text, notice)]
    raw = [source for source in found if _has_syntax(source)]
    if raw:
        more = f" and {len(raw) - 1} more" if len(raw) > 1 else ""
        notice(
            f"{raw[0].name}{more}: read as plain text, syntax and names of fields included; to "
            f'train on the texts alone, write them to a .jsonl file, {{"text": ...}} on each line'
        )
    return found


def _paths(text: str, notice: Callable[[str], None]) -> list[Path]:
    """The paths of the files that `--data.text` names."""
    path = Path(text)
    if text == OPENWEBTEXT and not path.exists():
        raise UserError(
            "this config trains on OpenWebText, which gptjax does not fetch; prepare it with "
            "nanoGPT's data/openwebtext/prepare.py and give the folder of train.bin and val.bin as "
            "--data.text FOLDER, or a text of your own as --data.text FILE"
        )
    if os.path.isdir(text):  # unlike Path's, false for any name that cannot be one
        everything = (
            Path(folder, name)
            for folder, _, names in os.walk(path, onerror=_unreadable)
            for name in names
        )
        files = sorted(p for p in everything if not _hidden(p.relative_to(path)))
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
        return found
    if glob.has_magic(text) and not os.path.exists(text):
        matches = (Path(match) for match in glob.glob(text, recursive=True))
        found = sorted(match for match in matches if not match.is_dir())
        if not found:
            raise UserError(f"no file matches {text}; check the pattern, and quote it in the shell")
        return found
    return [path]


def read(sources: list[Source], encoding: str, field: str) -> Iterator[Piece]:
    """Stream the documents of all files, in order, each as one or more pieces.

    Empty documents are skipped.

    Args:
        sources: see `find`.
        encoding: encoding of the files. A byte order mark is dropped; newlines are kept.
        field: JSONL field that contains the text.

    Raises:
        UserError: a file that cannot be read, is corrupt, no text, or has another encoding; a
            lone surrogate; or a JSONL line without that field.
    """
    for source in sources:
        is_jsonl = _plain_name(Path(source.name)).suffix.lower() in LINES
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
        stat = check_regular(path)
        with path.open("rb") as file:  # permissions are checked before other files are read
            head = file.read(HEAD)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"text not found: {path}; give a file, a folder, a glob, or one of the corpora "
            f"({', '.join(corpora.names())})"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from None
    stamp = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return Source(str(path), lambda: path.open("rb"), stat.st_size, stamp, head)


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from None


def _has_syntax(source: Source) -> bool:
    """Whether a file holds more than its texts: by its name, or as JSON by its first bytes."""
    suffix = _plain_name(Path(source.name)).suffix.lower()
    return suffix in SYNTAX or (suffix not in LINES and sniff.is_json(source.head))


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
    read, line, first = 0, 1, True
    with closing(_unpacked(source)) as unpacked:  # close the file now, not when garbage-collected
        for raw in chain(unpacked, [b""]):
            if not read and (what := sniff.container(raw)):
                raise UserError(f"{source.name} is {what}")
            waiting = decoder.getstate()[0]
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                at = read - len(waiting) + error.start
                near = (waiting + raw)[max(0, error.start - SAMPLE - at % 4) :][: 2 * SAMPLE]
                ends = "it ends inside a character; complete it, or set another --data.encoding"
                raise UserError(
                    f"text is not {encoding.upper()}: {source.name}, byte offset {at}; "
                    f"{sniff.advice(near) if raw else ends}"
                ) from None
            except UnicodeError as error:  # such as UTF-16 without a byte order mark
                raise UserError(
                    f"text is not {encoding.upper()}: {source.name}: {error}; {sniff.advice(raw)}"
                ) from None
            read += len(raw)
            if text and first:
                if sniff.has_many_controls(text[:SAMPLE]) or text[0] == SWAPPED:
                    raise UserError(
                        f"{source.name} is not text in {encoding.upper()}: it has NULs or other "
                        f"control characters all over; {sniff.advice(raw[:SAMPLE])}"
                    )
                if sniff.is_of_another(raw[:SAMPLE], encoding):
                    raise UserError(
                        f"text is not {encoding.upper()}: {source.name}, though it can be decoded "
                        f"so; {sniff.advice(raw[:SAMPLE])}"
                    )
                text, first = text.removeprefix("\ufeff"), False
            _check_scalars(text, line, source)
            line += text.count("\n")
            yield text


def _check_scalars(text: str, line: int, source: Source) -> None:
    """Refuse lone surrogates: halves of characters, which only escapes can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        line += text.count("\n", 0, error.start)
        raise UserError(
            f"line {line} of {source.name} has {text[error.start]!r}, a lone surrogate, which "
            f"UTF-8 cannot encode; remove it, or write both halves of the character"
        ) from None


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
                text = _field(f"line {number} of {source.name}", line, field)
                _check_scalars(text.replace("\n", " "), number, source)
                yield text
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
