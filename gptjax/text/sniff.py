"""What a file is, as far as its first bytes tell. It is told to the user, and never acted on."""

import codecs
import re
from collections.abc import Iterator

from gptjax.errors import UserError, optional_import
from gptjax.text.tokenizers import INCOMPLETE

# First bytes of files that are no text in any encoding, though latin-1 decodes them all.
MAGIC = {
    b"\x1f\x8b\x08": "compressed by gzip; name it .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; name it .zst",
    b"\xfd7zXZ\0": "compressed by xz; decompress it, or compress it as .gz or .zst",
    b"BZh91AY&SY": "compressed by bzip2; decompress it, or compress it as .gz or .zst",
    b"PK\3\4": "a zip archive (or .docx, .epub); take its text out of it",
    b"%PDF-": "a PDF; take its text out of it, for example with pdftotext",
    b"PAR1\x15": "a Parquet file; write its texts to a .jsonl file",
}
TAR = slice(257, 262), b"ustar"
MARKS = {  # those of UTF-32 first: the mark of UTF-16-LE begins it
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8",
}
# Control characters that no text has; without tab, line ends, form feed, backspace and escape.
CONTROLS = re.compile(r"[\0-\x07\x0e-\x1a\x1c-\x1f\x7f]")
MANY = 0.05  # share of them from which on something is not text, or was decoded wrongly
WIDE_ENOUGH = 8  # characters of several bytes that are not UTF-8 by chance
JSON_START = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)*(\{\s*"[^"\n]*"\s*:|(?<=\[)\s*")')


def container(raw: bytes) -> str | None:
    """What a file is that holds no plain text, and what to do, by its first 512 bytes; None: none
    of these."""
    if raw[TAR[0]] == TAR[1]:
        return "a tar archive; unpack it, and give its folder"
    return next((what for magic, what in MAGIC.items() if raw.startswith(magic)), None)


def is_json(raw: bytes) -> bool:
    """Whether the first bytes of a file look like JSON objects, or a list of them or of strings."""
    return JSON_START.match(raw) is not None


def has_many_controls(text: str) -> bool:
    """Whether MANY of the characters are controls, as in UTF-16 read as UTF-8."""
    return len(CONTROLS.findall(text)) > MANY * len(text)


def is_of_another(raw: bytes, encoding: str) -> bool:
    """Whether bytes are clearly not in an encoding in which they may decode: as latin-1 decodes
    UTF-8, and each byte order of UTF-16 the other."""
    name = codecs.lookup(encoding).name
    if name in ("utf-16-le", "utf-16-be"):
        swapped = {"utf-16-le": "utf-16-be", "utf-16-be": "utf-16-le"}[name]
        return b"\0" in raw and encoding_of(raw) == swapped
    if name in ("utf-8", "utf-8-sig") or raw.isascii():
        return False
    return sum(not c.isascii() for c in _decoded(raw, "utf-8")) >= WIDE_ENOUGH


def encoding_of(raw: bytes) -> str | None:
    """The probable encoding of bytes that begin or go on at a multiple of four; None: unknown."""
    for mark, name in MARKS.items():
        if raw.startswith(mark):
            return name
    names = ("utf-8", "utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
    decoded = {name: text for name in names if (text := _decoded(raw, name))}
    for name in ("utf-8", "utf-32-le", "utf-32-be"):
        if name in decoded:
            return name
    if b"\0" in raw:
        # A script takes few blocks of 256 characters: fewer than with the bytes swapped.
        blocks = {name: len({ord(c) >> 8 for c in text}) for name, text in decoded.items()}
        name = min(blocks, key=lambda name: blocks[name], default="")
        fewer = all(4 * blocks[name] <= 3 * n for other, n in blocks.items() if other != name)
        return name if name and fewer and 2 * blocks[name] < len(decoded[name]) else None
    try:
        best = optional_import("charset_normalizer").from_bytes(raw).best()
    except UserError:
        return None
    return best and best.encoding


def advice(raw: bytes) -> str:
    """What to do about bytes that did not decode, or not to text."""
    name = encoding_of(raw)
    if name == "utf-8":
        return "it is UTF-8; leave --data.encoding out"
    if name:
        return f"it is probably {name}; set --data.encoding {name}"
    if b"\0" in raw:
        return "it looks like a binary file"
    return "set its encoding, for example --data.encoding latin-1"


def _decoded(raw: bytes, encoding: str) -> str:
    """The text of bytes that may end inside a character; empty where it is none."""
    try:
        text = codecs.getincrementaldecoder(encoding)("strict").decode(raw)
    except UnicodeError:
        return ""
    return "" if has_many_controls(text) or "\0" in text else text


def remarks(alphabet: str) -> Iterator[str]:
    """What is odd about a text with these characters, and what to do."""
    if odd := CONTROLS.findall(alphabet):
        shown = ", ".join(f"U+{ord(c):04X}" for c in odd[:5]) + ", ..." * (len(odd) > 5)
        yield f"has control characters ({shown}); the model learns them: remove what is not meant"
    if INCOMPLETE in alphabet:
        yield (
            "has U+FFFD, which stands for what an earlier program could not decode; if it is not "
            "meant, decode the original again"
        )
