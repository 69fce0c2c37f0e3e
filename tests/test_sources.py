"""Tests of the texts on disk: every way to pack one reads the same, every damage has its line."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.text import corpora, sources
from gptjax.text.sources import Piece

TEXT = "a\r\nb\rc\n\u00e9\u2028 \U0001f600 e\u0301\n" * 9


@pytest.fixture
def told() -> list[str]:
    return []


def documents(name: Path | str, encoding: str = "utf-8", field: str = "text") -> list[str]:
    """The documents that a name stands for, whole."""
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
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_however_it_is_packed_and_read(tmp_path, monkeypatch, packed: str, block: int):
    """Newlines stay as they are, and no cut falls into a character."""
    monkeypatch.setattr(sources, "BLOCK", block)
    path = tmp_path / f"own.txt{packed}"
    raw = TEXT.encode()
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd}[packed](raw))
    assert documents(path) == [TEXT]
    assert sources.read_text(str(path)) == TEXT


def test_frames_one_after_the_other(tmp_path):
    path = tmp_path / "own.zst"
    path.write_bytes(zstd(b"one ") + zstd(b"") + zstd(b"two"))
    assert documents(path) == ["one two"]
    path = tmp_path / "own.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert documents(path) == ["one two"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbfab\xef\xbb\xbf")
    assert documents(path) == ["ab\ufeff"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1", "cp1252"])
def test_another_encoding_is_read_if_it_is_named(tmp_path, encoding: str):
    path = tmp_path / "own.txt"
    path.write_bytes("na\u00efve caf\u00e9\n".encode(encoding))
    assert documents(path, encoding) == ["na\u00efve caf\u00e9\n"]


@pytest.mark.parametrize(
    ("raw", "offset", "advice"),
    [
        (
            "Le caf\u00e9 na\u00eff est ferm\u00e9.".encode("utf-16"),
            0,
            "it begins like UTF-16: give --data.encoding utf-16",
        ),
        (b"\x7fELF\x02\x00\x00\xff\xfe", 7, "it looks like a binary file"),
    ],
)
def test_what_is_not_utf8(tmp_path, raw: bytes, offset: int, advice: str):
    path = tmp_path / "own.txt"
    path.write_bytes(raw)
    assert message(path) == f"text is not UTF-8: {path}, byte offset {offset}; {advice}"


FRENCH = (
    "Les \u00e9l\u00e8ves de l'\u00e9cole ont \u00e9t\u00e9 tr\u00e8s \u00e9tonn\u00e9s : "
    "le ma\u00eetre n'est pas venu, "
    "et la classe a d\u00fb \u00eatre ferm\u00e9e jusqu'\u00e0 No\u00ebl. "
)


@pytest.mark.parametrize("block", [5, 2**20])
def test_the_encoding_is_guessed_for_the_message_only(tmp_path, monkeypatch, block: int):
    pytest.importorskip("charset_normalizer", reason="needs the extra text")
    monkeypatch.setattr(sources, "BLOCK", block)
    path = tmp_path / "own.txt"
    path.write_bytes(b"plain, " * 9 + FRENCH.encode("latin-1"))
    error = message(path)
    start = f"text is not UTF-8: {path}, byte offset 67; "
    assert error.startswith(start)
    if block > 5:  # enough to tell by
        guess = error.removeprefix(start + "it is probably ").partition(":")[0]
        assert FRENCH.encode("latin-1").decode(guess) == FRENCH
        assert error == f"{start}it is probably {guess}: give --data.encoding {guess}"


def test_without_the_library_that_guesses(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    path = tmp_path / "own.txt"
    path.write_bytes(b"caf\xe9")
    assert message(path) == (
        f"text is not UTF-8: {path}, byte offset 3; name its encoding, e.g. --data.encoding latin-1"
    )


def test_a_text_that_ends_in_a_character(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("caf\u00e9".encode()[:-1])
    assert message(path).startswith(f"text is not UTF-8: {path}, byte offset 3; ")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_or_damaged(tmp_path, packed: str):
    raw = {".gz": gzip.compress, ".zst": zstd}[packed](TEXT.encode())
    path = tmp_path / f"own.txt{packed}"
    for damaged in (raw[:-5], raw[:12], b"plain text"):
        path.write_bytes(damaged)
        error = message(path)
        assert error.startswith(f"{path} is damaged or was cut short (")
        assert error.endswith("); get it again")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_bomb(tmp_path, monkeypatch, packed: str):
    monkeypatch.setattr(sources, "BOMB_FROM", 2**20)
    path = tmp_path / f"own.txt{packed}"
    path.write_bytes({".gz": gzip.compress, ".zst": zstd}[packed](b"\0" * 2**22))
    assert message(path) == (
        f"{path} unpacks to over 200 times its size, which no text does; if it is meant so, "
        f"unpack it yourself"
    )


def test_without_zstandard(tmp_path, monkeypatch):
    path = tmp_path / "own.txt.zst"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert message(path) == (
        "this needs the package zstandard: pip install 'gptjax[text]', or from a checkout pip "
        "install -e '.[text]'"
    )


# Folders, globs, names


def test_a_folder(tmp_path, told):
    for name in ("b.txt", "a.md", "sub/c.txt.gz", "sub/.hidden.txt", ".git/d.txt", "e.png", "f"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        raw = path.stem.encode()
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    (tmp_path / "empty.txt").touch()
    assert documents(tmp_path) == ["a", "b", "c.txt"]
    sources.find(str(tmp_path), told.append)
    assert told == [f"{tmp_path}: 2 other files left out (.png, f)"]
    assert documents(f"{tmp_path}/**/[bc]*") == ["b", "c.txt"]
    assert documents(tmp_path / "*.png") == ["e"]


@pytest.mark.parametrize(
    ("names", "found"), [(["x.py", "y.py", "z.json"], ".json, .py"), ([], "nothing")]
)
def test_a_folder_without_text(tmp_path, names: list[str], found: str):
    for name in names:
        (tmp_path / name).touch()
    assert message(tmp_path) == (
        f"no text in the folder {tmp_path}: looked for .txt, .text, .md, .jsonl, .ndjson (.gz or "
        f".zst too), found {found}; name other files with a glob, such as '{tmp_path}/**/*.py'"
    )


def test_a_glob_without_files(tmp_path):
    assert message(f"{tmp_path}/*.txt") == (
        f"no file matches {tmp_path}/*.txt; mind the quotes around a glob"
    )


def test_a_name_that_only_looks_like_a_glob(tmp_path):
    path = tmp_path / "act [1].txt"
    path.write_text("x")
    assert documents(path) == ["x"]


@pytest.mark.parametrize("name", ["absent", "own.txt/x", "../texts/tiny_shakespeare", "./enwik8"])
def test_a_missing_file(tmp_path, monkeypatch, name: str):
    """Nor does a name lead out of the folder of the corpora."""
    (tmp_path / "own.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert message(name) == (
        f"text not found: {Path(name)} is neither a file, a folder, a glob nor one of the corpora "
        f"({', '.join(corpora.names())})"
    )


def test_an_unreadable_path(tmp_path):
    path = tmp_path / ("x" * 300)
    assert message(path) == f"text cannot be read: {path}: File name too long"


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
    """Each line is a document; what else ends lines elsewhere does not here."""
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
            "has no text in a field 'text' (it has: 'content', 'id'); name it with --data.field",
        ),
        (
            '{"text": 1}',
            "has no text in a field 'text' (it has: 'text'); name it with --data.field",
        ),
        ("[]", "has no text in a field 'text' (it has: list); name it with --data.field"),
    ],
)
def test_a_line_without_text(tmp_path, line: str, reason: str):
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{"text": "x"}}\n\n{line}\n')
    assert message(path) == f"line 3 of {path} {reason}"


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 10)
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "x"}\n' + "x" * 11)
    assert message(path) == f"line 2 of {path} has over 10 characters; is it JSONL?"


def test_pieces_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 4)
    path = tmp_path / "own.txt"
    path.write_text("0123456789")
    found = list(sources.read(sources.find(str(path), print), "utf-8", "text"))
    assert found == [Piece("0123", False), Piece("4567", False), Piece("89", True)]
