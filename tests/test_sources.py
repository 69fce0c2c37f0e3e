"""Tests of streaming text from disk: formats, encodings, and one-line errors on corruption."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.presets import PRESETS
from gptjax.text import corpora, sources
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1", "cp1252"])
def test_other_encodings(tmp_path, encoding: str):
    path = tmp_path / "own.txt"
    path.write_bytes("na\u00efve caf\u00e9\n".encode(encoding))
    assert documents(path, encoding) == ["na\u00efve caf\u00e9\n"]


@pytest.mark.parametrize(
    ("raw", "offset", "advice"),
    [
        (
            "Le caf\u00e9 na\u00eff est ferm\u00e9.".encode("utf-16"),
            0,
            "--data.encoding utf-16",
        ),
        (b"\x7fELF\x02\x00\x00\xff\xfe", 7, "binary file"),
    ],
)
def test_text_that_is_not_utf8(tmp_path, raw: bytes, offset: int, advice: str):
    path = tmp_path / "own.txt"
    path.write_bytes(raw)
    error = message(path)
    assert error.startswith(f"text is not UTF-8: {path}, byte offset {offset}; ")
    assert error.endswith(advice)


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
    assert message(path).startswith(f"text is not UTF-8: {path}, byte offset 3; ")


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
    path.write_bytes({".gz": gzip.compress, ".zst": zstd}[suffix](b"\0" * 2**22))
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
