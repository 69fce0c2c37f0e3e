"""Atomic writes, validated reads, and sealed folders (checksums for every file).

A folder is sealed by a `sha256.json` that lists every file in it:

    {"format": 1, "files": {"params/d/0": "9f86d081...", ...}}

Who reads a sealed folder holds it meanwhile (`held`), so that nobody removes it (`remove`). The
locks are the kernel's: nothing is written, and a process that dies lets go.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where what is open cannot be renamed
    fcntl = None

MANIFEST = "sha256.json"
FORMAT = 1  # format of a sealed folder; raise it when an old version would misread a new one
MAX_JSON = 64 * 2**20  # bytes; a larger JSON file is refused unread


class Damaged(UserError):
    """A file is missing, corrupt, or not what was written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a one-line error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free disk space or fix permissions, then try "
            f"again"
        ) from None


def write_atomically(path: Path, content: str | BinaryIO) -> None:
    """Replace a file atomically: after a crash it has either its old or its new content.

    Raises:
        UserError: no disk space or no permission; the old file is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.unlink(missing_ok=True)  # left by a killed process, or a planted link
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
    """Flush a folder's entries (new and renamed files) to disk, as fsync does for file contents."""
    if os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: Path) -> bytes:
    """The content of a small file; a device, a pipe or a large file is not opened.

    Raises:
        OSError: it is one of these, or cannot be read; `strerror` says why.
    """
    if check_regular(path).st_size > MAX_JSON:
        raise OSError(errno.EFBIG, f"it is larger than {MAX_JSON} bytes")
    return path.read_bytes()


def check_regular(path: Path) -> os.stat_result:
    """The status of a regular file, which can be read twice and ends.

    Raises:
        OSError: there is none, or it is a folder, a device or a pipe; `strerror` says why.
    """
    try:
        status = path.stat()
    except ValueError:
        raise OSError(errno.EINVAL, "there is a NUL in its name") from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe; give a regular file")
    return status


def read_file(path: Path, parse: Callable[[str], Any]) -> Any:
    """Read a small UTF-8 text file and apply `parse` to its content.

    Raises:
        UserError: it is missing, or not to be read.
        Damaged: it is no file of that size (see `read_bytes`), not UTF-8, or `parse` raised a
            ValueError.
    """
    try:
        return parse(read_bytes(path).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except OSError as error:
        raise Damaged(f"{path} is damaged: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # a UserError is a ValueError
        raise Damaged(f"{path} is damaged: {error}") from None


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, with a checksum that `read_sealed` checks."""
    sha256 = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    write_atomically(path, json.dumps({"values": values, "sha256": sha256}))


def read_sealed(path: Path) -> dict[str, Any]:
    """The values that `write_sealed` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it was changed, or is something else.
    """
    try:
        found = json.loads(read_bytes(path).decode("utf-8"))
        values, sha256 = found["values"], found["sha256"]
    except (KeyError, TypeError, RecursionError):
        raise ValueError("not a file with a checksum") from None
    if sha256 != hashlib.sha256(json.dumps(values).encode()).hexdigest():
        raise ValueError("does not match its checksum")
    return values


def unique_json(text: str) -> Any:
    """Parse JSON in which no object has a key twice, of which `json.loads` takes the last.

    Raises:
        ValueError: not JSON, or names the key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the key {twice!r} is there twice")
        return values

    return json.loads(text, object_pairs_hook=unique)


def numbered(folder: Path) -> list[int]:
    """The numbers among the names of the subfolders of `folder`, ascending."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,9}", name))


def refuse_links(folder: Path) -> None:
    """Refuse symbolic links and special files, so that reads and writes stay inside the folder.

    Raises:
        UserError: names the first one found.
    """
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue  # a training process deletes old checkpoints meanwhile
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(
                    f"{path} is a link or a special file; a run folder must contain its files "
                    f"itself (the folder as a whole may be a link)"
                )


def seal(folder: Path) -> None:
    """Write the checksums of every file below `folder`, after flushing all of them to disk."""
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in _files(folder)}
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
    write_atomically(
        folder / MANIFEST, json.dumps({"format": FORMAT, "files": digests}, indent=0) + "\n"
    )


def locks(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed, or share it with others that do; False if
    another process has it.

    True also where there are no locks: on Windows, and on some network file systems.
    """
    with suppress(OSError):
        if fcntl:
            try:
                how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a sealed folder, so that `remove` leaves it; whether it is there.

    Where the file system has no locks it may go all the same: who cannot read it looks again
    whether it is there.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = stack.enter_context((folder / MANIFEST).open("rb")).fileno()
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield folder.is_dir()


def remove(folder: Path) -> None:
    """Remove a sealed folder, unless somebody holds it.

    Raises:
        OSError: no permission.
    """
    dropped = folder.with_suffix(".dropped")
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context((folder / MANIFEST).open("rb")).fileno()
            if not locks(descriptor):
                return
        except FileNotFoundError:
            pass  # of a time without checksums
        folder.rename(dropped)  # killed here, no half of it has a name
    shutil.rmtree(dropped)


def check_seal(folder: Path) -> None:
    """Verify a sealed folder against its checksums.

    Raises:
        UserError: a newer format, or no permission to read a file.
        Damaged: names the first file that is missing, changed or unexpected.
    """
    if not (folder / MANIFEST).exists():
        raise Damaged(f"{MANIFEST} is missing")
    try:
        written, wanted = read_file(folder / MANIFEST, _manifest)
    except Damaged:
        raise Damaged(f"{MANIFEST} is not a list of checksums") from None
    if written != FORMAT:
        raise UserError(f"format {written} is newer than format {FORMAT} of this gptjax")
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise Damaged(f"{name} is missing")
        if name not in wanted:
            raise Damaged(f"{name} is not listed in {MANIFEST}")
        try:
            if name.endswith(".json") and found[name].stat().st_size > MAX_JSON:
                raise Damaged(f"{name} is larger than {MAX_JSON} bytes")  # before it is hashed
            digest = _digest(found[name], sync=False)
        except PermissionError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None
        if digest != wanted[name]:
            raise Damaged(f"{name} does not match its checksum")


def sealed_copies(parent: Path, name: str) -> Iterator[tuple[Path, str]]:
    """The copies of file `name` in the sealed, numbered folders of `parent` that match their
    checksum, as (path, text); largest number first."""
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
    """Parse format and checksums; the oldest files contain only the checksums."""
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
    """The sha256 of a file; `sync` flushes it to disk first."""
    with path.open("rb") as file:
        if sync and os.name != "nt":  # Windows flushes only files open for writing
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
