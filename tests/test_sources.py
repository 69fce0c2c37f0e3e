"""Tests of streaming text from disk: formats, encodings, and one-line errors on corruption."""

import bz2
import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.presets import PRESETS
from gptjax.text import choose, corpora, sources, token_cache
from gptjax.text.sources import Piece

TEXT = "a\r\nb\rc\n\u00e9\u2028 \U0001f600 e\u0301\n" * 9


def documents(name: Path | str, encoding: str = "utf-8", field: str = "text") -> list[str]:
    """The documents that a name refers to, each in one string."""
    found, parts = [], []
    for piece in sources.read(sources.find(str(name), [].append), encoding, field):
        assert piece.text
        parts.append(piece.text)
        if piece.last:
            found.append("".join(parts))
            parts = []
    assert not parts
    return found


def message(name: Path | str, encoding: str = "utf-8", field: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        documents(name, encoding, field)
    assert caught.value.__cause__ is None and "\n" not in str(caught.value)
    return str(caught.value)


def zstd(raw: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="needs the extra text")
    return zstandard.ZstdCompressor().compress(raw)


@pytest.mark.parametrize("block", [1, 2, 7, 2**20])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compression_and_block_size_do_not_change_the_text(
    tmp_path, monkeypatch, suffix: str, block: int
):
    """Newlines are kept, and no block boundary splits a character."""
    monkeypatch.setattr(sources, "BLOCK", block)
    path = tmp_path / f"own.txt{suffix}"
    raw = TEXT.encode()
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix](raw))
    assert documents(path) == [TEXT]
    assert sources.read_text(str(path)) == TEXT


def test_concatenated_frames(tmp_path):
    path = tmp_path / "own.zst"
    path.write_bytes(zstd(b"one ") + zstd(b"") + zstd(b"two"))
    assert documents(path) == ["one two"]
    path = tmp_path / "own.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert documents(path) == ["one two"]


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbfab\xef\xbb\xbf")
    assert documents(path) == ["ab\ufeff"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "latin-1", "cp1252"]
)
def test_other_encodings(tmp_path, monkeypatch, encoding: str, mark: str):
    monkeypatch.setattr(sources, "BLOCK", 3)
    path = tmp_path / "own.txt"
    if not mark or encoding in ("utf-16-le", "utf-16-be", "utf-32-le"):  # what does not write one
        path.write_bytes((mark + "na\u00efve caf\u00e9\n").encode(encoding))
        assert documents(path, encoding) == ["na\u00efve caf\u00e9\n"]


HAN = "".join(chr(0x4E00 + i * 7919 % 3000) + "\n" * (i % 20 == 0) for i in range(2000))


@pytest.mark.parametrize(
    ("raw", "offset", "advice"),
    [
        (
            "Le caf\u00e9 na\u00eff est ferm\u00e9.".encode("utf-16"),
            0,
            "--data.encoding utf-16",
        ),
        ("Le caf\u00e9 \u00e9tait ferm\u00e9.".encode("utf-32"), 0, "--data.encoding utf-32"),
        (HAN.encode("utf-16-le"), 8, "--data.encoding utf-16-le"),
        (HAN.encode("utf-16-be"), 9, "--data.encoding utf-16-be"),
        (b"\x7fELF\x02\x00\x00\xff\xfe", 7, "binary file"),
    ],
)
def test_text_that_is_not_utf8(tmp_path, raw: bytes, offset: int, advice: str):
    path = tmp_path / "own.txt"
    path.write_bytes(raw)
    error = message(path)
    assert error.startswith(f"text is not UTF-8: {path}, byte offset {offset}; ")
    assert error.endswith(advice)


SCRIPTS = {
    "English": "Hello, a line of text\n" * 300,
    "Russian": "\u0412\u0441\u0435 \u0441\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u044b\n" * 50,
    "Hindi": "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e\n" * 50,
    "short": "Hi there, you!",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("stored", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf_16_and_32_without_a_mark(tmp_path, stored: str, script: str):
    """They are valid UTF-8 and latin-1, with a NUL or another control at every second place."""
    path = tmp_path / "own.txt"
    path.write_bytes(SCRIPTS[script].encode(stored))
    for encoding in ("utf-8", "latin-1"):
        error = message(path, encoding)
        assert error.startswith(f"{path} is not text in {encoding.upper()}: it has NULs or other")
        assert error.endswith(f"it is probably {stored}; set --data.encoding {stored}")
    error = message(path, stored[:6])  # which needs a mark
    assert error.startswith(f"text is not {stored[:6].upper()}: {path}")
    assert error.endswith(f"it is probably {stored}; set --data.encoding {stored}")
    assert documents(path, stored) == [SCRIPTS[script]]


@pytest.mark.parametrize("script", ["English", "Russian", "Hindi", "Chinese"])
def test_the_wrong_order_of_bytes(tmp_path, script: str):
    path = tmp_path / "own.txt"
    text = SCRIPTS.get(script, HAN)
    for stored, other in (("utf-16-le", "utf-16-be"), ("utf-16-be", "utf-16-le")):
        path.write_bytes(text.encode(stored))
        assert message(path, other).endswith(
            f"it is probably {stored}; set --data.encoding {stored}"
        )
        assert documents(path, stored) == [text]
    path.write_bytes("a text\n".encode("utf-16"))
    other = {"little": "utf-16-be", "big": "utf-16-le"}[sys.byteorder]
    assert message(path, other).endswith("it is probably utf-16; set --data.encoding utf-16")


def test_utf_8_read_as_another(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("na\u00efve caf\u00e9\n" * 9, encoding="utf-8")
    assert message(path, "ascii").endswith("; it is UTF-8; leave --data.encoding out")
    assert message(path, "utf-32").endswith("; it is UTF-8; leave --data.encoding out")
    for encoding in ("latin-1", "cp1252", "gbk"):  # which decode it to other characters
        error = message(path, encoding)
        assert error.startswith(f"text is not {encoding.upper()}: {path}, ")
        assert error.endswith("; it is UTF-8; leave --data.encoding out")
    path.write_bytes(b"caf\xe9 " * 9)
    assert documents(path, "latin-1") == ["caf\u00e9 " * 9]


def test_a_few_control_characters_are_read(tmp_path):
    text = "a page\fanother\x1b[0m\r\n\tand so on and on and on\x00 " * 9
    path = tmp_path / "own.txt"
    path.write_text(text, newline="")
    assert documents(path) == [text]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (gzip.compress(b"text" * 99, mtime=0), "compressed by gzip; name it .gz"),
        (lzma.compress(b"text" * 99), "compressed by xz; decompress it"),
        (bz2.compress(b"text" * 99), "compressed by bzip2; decompress it"),
        (b"(\xb5/\xfd\x04", "compressed by zstd; name it .zst"),
        (b"PK\3\4\x14", "a zip archive"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"PAR1\x15\4", "a Parquet file"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "a tar archive; unpack it"),
    ],
)
def test_files_that_are_no_text(tmp_path, raw: bytes, what: str, encoding: str):
    """Whatever the encoding: latin-1 decodes anything."""
    path = tmp_path / "own.txt"
    path.write_bytes(raw)
    assert message(path, encoding).startswith(f"{path} is {what}")
    packed = tmp_path / "own.txt.gz"
    packed.write_bytes(gzip.compress(raw))
    assert message(packed, encoding).startswith(f"{packed} is {what}")


@pytest.mark.parametrize(
    ("name", "raw", "noticed"),
    [
        ("a.json", b'[{"text": "one"}]', True),
        ("a.json.gz", gzip.compress(b"[]", mtime=0), True),
        ("a.csv", b"id,text\n1,one\n", True),
        ("a.TSV", b"id\ttext\n", True),
        ("a.txt", b'\xef\xbb\xbf[\n  {"text": "one"}]', True),
        ("a.txt", b'{"text": "one"}\n{"text": "two"}\n', True),
        ("a.txt", b'["one", "two"]', True),
        ("a.jsonl", b'{"text": "one"}\n', False),
        ("a.txt", b"[Verse 1]\nla la\n", False),
        ("a.txt", b"{\n}", False),
        ("a.txt", b'"Well," he said', False),
        ("a.md", b"# A title", False),
    ],
)
def test_syntax_is_not_trained_on_without_a_word(tmp_path, name: str, raw: bytes, noticed: bool):
    (tmp_path / name).write_bytes(raw)
    notices: list[str] = []
    sources.find(f"{tmp_path}/*", notices.append)
    assert bool(notices) == noticed
    if noticed:
        assert notices[0].startswith(f"{tmp_path / name}: read as plain text, syntax and names of ")
        (tmp_path / "b.csv").touch()
        sources.find(f"{tmp_path}/*", notices.append)
        assert notices[1].startswith(f"{tmp_path / name} and 1 more: read as plain text")


FRENCH = (
    "Les \u00e9l\u00e8ves de l'\u00e9cole ont \u00e9t\u00e9 tr\u00e8s \u00e9tonn\u00e9s : "
    "le ma\u00eetre n'est pas venu, "
    "et la classe a d\u00fb \u00eatre ferm\u00e9e jusqu'\u00e0 No\u00ebl. "
)


@pytest.mark.parametrize("block", [5, 2**20])
def test_the_encoding_is_guessed_only_for_the_message(tmp_path, monkeypatch, block: int):
    pytest.importorskip("charset_normalizer", reason="needs the extra text")
    monkeypatch.setattr(sources, "BLOCK", block)
    path = tmp_path / "own.txt"
    path.write_bytes(b"plain, " * 9 + FRENCH.encode("latin-1"))
    error = message(path)
    start = f"text is not UTF-8: {path}, byte offset 67; "
    assert error.startswith(start)
    if block > 5:  # enough to tell by
        advice, _, guess = error.rpartition(" --data.encoding ")
        assert FRENCH.encode("latin-1").decode(guess) == FRENCH
        assert guess in advice


def test_without_charset_normalizer(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    path = tmp_path / "own.txt"
    path.write_bytes(b"caf\xe9")
    error = message(path)
    assert error.startswith(f"text is not UTF-8: {path}, byte offset 3; ")
    assert "--data.encoding" in error


def test_a_text_that_ends_inside_a_character(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("caf\u00e9".encode()[:-1])
    ends = "it ends inside a character; complete it, or set another --data.encoding"
    assert message(path) == f"text is not UTF-8: {path}, byte offset 3; {ends}"
    path.write_bytes("caf\u00e9".encode("utf-16")[:-1])
    assert message(path, "utf-16") == f"text is not UTF-16: {path}, byte offset 8; {ends}"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_or_corrupt_archive(tmp_path, suffix: str):
    raw = {".gz": gzip.compress, ".zst": zstd}[suffix](TEXT.encode())
    path = tmp_path / f"own.txt{suffix}"
    for damaged in (raw[:-5], raw[:12], b"plain text"):
        path.write_bytes(damaged)
        error = message(path)
        assert error.startswith(f"{path} is corrupt or truncated (")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_decompression_bomb(tmp_path, monkeypatch, suffix: str):
    monkeypatch.setattr(sources, "BOMB_FROM", 2**20)
    path = tmp_path / f"own.txt{suffix}"
    path.write_bytes({".gz": gzip.compress, ".zst": zstd}[suffix](b"a" * 2**22))
    error = message(path)
    assert error.startswith(f"{path} decompresses to over 200 times its size")
    assert error.endswith("decompress it yourself")


def test_without_zstandard(tmp_path, monkeypatch):
    path = tmp_path / "own.txt.zst"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert message(path) == (
        "this needs the package zstandard: pip install 'gptjax[text]', or from a checkout pip "
        "install -e '.[text]'"
    )


# Folders, globs, names


def test_a_folder(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt.gz", "sub/.hidden.txt", ".git/d.txt", "e.png", "f"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        raw = path.stem.encode()
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    (tmp_path / "empty.txt").touch()
    assert documents(tmp_path) == ["a", "b", "c.txt"]
    notices: list[str] = []
    sources.find(str(tmp_path), notices.append)
    assert notices == [f"{tmp_path}: 2 other files skipped (.png, f)"]
    assert documents(f"{tmp_path}/**/[bc]*") == ["b", "c.txt"]
    assert documents(tmp_path / "*.png") == ["e"]


@pytest.mark.parametrize("name", ["a.txt", "*.txt", "."])
def test_a_pipe_or_broken_link_is_not_passed_over(tmp_path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("text")
    os.mkfifo("a.txt")
    assert message(name).endswith("a.txt: it is a device or a pipe; give a regular file")
    Path("a.txt").unlink()
    os.symlink("absent", "a.txt")
    assert message(name).startswith("text not found: a.txt; ")


@pytest.mark.parametrize(
    ("names", "found"), [(["x.py", "y.py", "z.json"], ".json, .py"), ([], "no files")]
)
def test_a_folder_without_text(tmp_path, names: list[str], found: str):
    for name in names:
        (tmp_path / name).touch()
    error = message(tmp_path)
    assert error.startswith(f"no text in the folder {tmp_path}: expected .txt, .text, .md, .jsonl,")
    assert f"found {found};" in error and error.endswith(f"'{tmp_path}/**/*.py'")


def test_a_glob_without_matches(tmp_path):
    assert message(f"{tmp_path}/*.txt").startswith(f"no file matches {tmp_path}/*.txt; ")


def test_a_file_name_that_looks_like_a_glob(tmp_path):
    path = tmp_path / "act [1].txt"
    path.write_text("x")
    assert documents(path) == ["x"]


@pytest.mark.parametrize("name", ["absent", "own.txt/x", "../texts/tiny_shakespeare", "./enwik8"])
def test_a_missing_file(tmp_path, monkeypatch, name: str):
    """The name of a corpus cannot lead out of the corpora folder either."""
    (tmp_path / "own.txt").touch()
    monkeypatch.chdir(tmp_path)
    error = message(name)
    assert error.startswith(f"text not found: {Path(name)}; ")
    assert error.endswith(f"({', '.join(corpora.names())})")


def test_an_unreadable_path(tmp_path):
    path = tmp_path / ("x" * 300)
    assert message(path) == f"cannot read the text {path}: File name too long"


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "link", "\0", "a\0b.txt", "x/" * 3000])
def test_what_is_no_regular_file(tmp_path, monkeypatch, name: str):
    """Nothing is waited for, and nothing without an end is read."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    error = message(name)
    if "x/" in name:  # the message is cut, but not its end
        assert error.startswith("cannot read the text x/x/x/")
        assert error.endswith("x: File name too long")
    elif "\0" in name:
        assert error.endswith("there is a NUL in its name")
    else:
        start = f"cannot read the text {name}: "
        assert error == f"{start}it is a device or a pipe; give a regular file"
    with pytest.raises(UserError):
        choose.named(name)
    with pytest.raises(UserError):
        token_cache.read_bin(Path(name), 256)


@pytest.mark.parametrize("raw", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, raw: bytes):
    path = tmp_path / "own.txt"
    path.write_bytes(raw)
    with pytest.raises(UserError) as error:
        sources.read_text(str(path))
    assert str(error.value) == f"text is empty: {path}"


# JSONL


@pytest.mark.parametrize("block", [3, 2**20])
def test_json_lines(tmp_path, monkeypatch, block: int):
    """Each line is a document; only a newline ends it, not other line separators."""
    monkeypatch.setattr(sources, "BLOCK", block)
    rows = ["one\ntwo", "\u2028\x0b\x85", "", TEXT]
    lines = [json.dumps({"text": row, "n": 1}, ensure_ascii=False) for row in rows]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join([lines[0], "", *lines[1:]]), encoding="utf-8", newline="")
    assert documents(path) == [row for row in rows if row]
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"content": "x"}\r\n{"content": "y"}\r\n'))
    assert documents(path, field="content") == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "{",
            "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)",
        ),
        (
            '{"content": "x", "id": 1}',
            "has no text field 'text' (found: 'content', 'id'); set --data.field",
        ),
        (
            '{"text": 1}',
            "has no text field 'text' (found: 'text'); set --data.field",
        ),
        ("[]", "has no text field 'text' (found: list); set --data.field"),
    ],
)
def test_a_jsonl_line_without_text(tmp_path, line: str, reason: str):
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{"text": "x"}}\n\n{line}\n')
    assert message(path) == f"line 3 of {path} {reason}"


@pytest.mark.parametrize("block", [3, 2**20])
def test_lone_surrogates(tmp_path, monkeypatch, block: int):
    """They are refused where the text is read, whatever the tokenizer, with file and line."""
    monkeypatch.setattr(sources, "BLOCK", block)
    path = tmp_path / "own.jsonl"
    good = '{"text": "a pair: \\ud83d\\ude00\\n\\n"}\n'
    path.write_text(good * 2 + '{"text": "hi\\n \\ud83d there"}\n' + good)
    assert message(path).startswith(
        f"line 3 of {path} has '\\ud83d', a lone surrogate, which UTF-8"
    )
    path.write_text(good * 2)
    assert documents(path) == ["a pair: \U0001f600\n\n"] * 2
    path = tmp_path / "own.txt"
    path.write_bytes(b"one\ntwo\nth\\udc00ree\n")
    error = message(path, "unicode_escape")
    assert error.startswith(f"line 3 of {path} has '\\udc00', a lone surrogate, which UTF-8")


def test_a_jsonl_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 10)
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "x"}\n' + "x" * 11)
    assert message(path).startswith(f"line 2 of {path} is longer than 10 characters; ")


def test_pieces_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 4)
    path = tmp_path / "own.txt"
    path.write_text("0123456789")
    found = list(sources.read(sources.find(str(path), print), "utf-8", "text"))
    assert found == [Piece("0123", False), Piece("4567", False), Piece("89", True)]


def test_the_gpt2_presets_ask_for_their_text():
    with pytest.raises(UserError, match=r"OpenWebText.*--data\.text FOLDER"):
        sources.find(PRESETS["gpt2"].data.text, print)
