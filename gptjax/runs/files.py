"""Files of a run: written whole or not at all, read without trust, checked against checksums.

A folder is sealed by a `sha256.json` that lists every file in it:

    {"format": 1, "files": {"params/d/0": "9f86d081...", ...}}
"""

import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.errors import UserError

MANIFEST = "sha256.json"
FORMAT = 1  # of a sealed folder; raised when an old program could misread a new one
MAX_JSON = 64 * 2**20  # bytes of a small text file worth reading


class Damaged(UserError):
    """A file is not what was written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that fails into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room or mend the permissions, then try "
            f"again"
        ) from None


def write_atomically(path: Path, content: str | BinaryIO) -> None:
    """Write so that, whatever happens, the file is the old one or the new one, whole.

    Raises:
        UserError: no room or no permission; the old file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.unlink(missing_ok=True)  # of a process that was killed, or a stranger's link
        try:
            with temporary.open("xb") as file:
                source = io.BytesIO(content.encode()) if isinstance(content, str) else content
                shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a power cut, as fsync does for a file's bytes."""
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of a small text file.

    Raises:
        UserError: it cannot be read; `Damaged`: or not parsed.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError("it is not a file")
        if status.st_size > MAX_JSON:
            raise UserError(f"it has over {MAX_JSON} bytes")
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # a UserError is a ValueError
        raise Damaged(f"{path} is damaged: {error}") from None


def numbered(folder: Path) -> list[int]:
    """The numbers that name folders in `folder`, in order."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,9}", name))


def refuse_links(folder: Path) -> None:
    """Refuse a folder that leads out of itself: what is read and written there must stay there.

    Raises:
        UserError: naming a symbolic link, or something that is neither file nor folder.
    """
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue  # a run that is being trained drops old checkpoints
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(
                    f"{path} is a link or a device; a run's folder must hold its files itself "
                    f"(the folder as a whole may be linked to)"
                )


def seal(folder: Path) -> None:
    """Write the checksums of every file below `folder`, and let all of it survive a power cut."""
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in _files(folder)}
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
    write_atomically(
        folder / MANIFEST, json.dumps({"format": FORMAT, "files": digests}, indent=0) + "\n"
    )


def check_seal(folder: Path) -> None:
    """Compare a sealed folder with its checksums.

    Raises:
        UserError: a newer format, or a file that may not be read; `Damaged`: the first file that
            is missing, changed or strange.
    """
    if not (folder / MANIFEST).exists():
        raise Damaged(f"{MANIFEST} is missing")
    try:
        written, wanted = read_file(folder / MANIFEST, _manifest)
    except Damaged:
        raise Damaged(f"{MANIFEST} cannot be read as checksums") from None
    if written != FORMAT:
        raise UserError(f"format {written}, newer than the format {FORMAT} this gptjax reads")
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise Damaged(f"{name} is missing")
        if name not in wanted:
            raise Damaged(f"{name} is not in {MANIFEST}")
        try:
            digest = _digest(found[name], sync=False)
        except PermissionError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None
        if digest != wanted[name]:
            raise Damaged(f"{name} does not match its checksum")


def sealed_copies(parent: Path, name: str) -> Iterator[tuple[Path, str]]:
    """The file `name` of each sealed folder in `parent` that matches its checksum, with its text;
    the folder with the largest number first."""
    for number in reversed(numbered(parent)):
        folder = parent / str(number)
        try:
            _, wanted = read_file(folder / MANIFEST, _manifest)
            text = read_file(folder / name, str)
        except UserError:
            continue
        if hashlib.sha256(text.encode()).hexdigest() == wanted.get(name):
            yield folder / name, text


def _manifest(text: str) -> tuple[int, dict[str, str]]:
    """Format and checksums; before there was a format, the checksums were all of the file."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("not an object")
    written, files = values.get("format", FORMAT), values.get("files", values)
    if type(written) is not int or (written <= FORMAT and not isinstance(files, dict)):
        raise ValueError("not checksums")
    return written, files


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def _digest(path: Path, sync: bool = True) -> str:
    """The sha256 of a file; `sync`: of what is on the disk, not merely on its way there."""
    with path.open("rb") as file:
        if sync and os.name != "nt":  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
