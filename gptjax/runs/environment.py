"""Where a run was trained: `environment.json`, a list with one entry for each start and resume.

An entry says what was typed, which code and packages ran, and on what. It holds neither the whole
environment nor changes of the code, for a run's folder is handed on. What is unknown is null.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptjax import __version__
from gptjax.errors import UserError
from gptjax.runs import files

Entry = dict[str, Any]

NAME = "environment.json"
PACKAGES = "jax jaxlib flax optax orbax-checkpoint numpy".split()
# Variables that change what is computed, or say which job it was.
VARIABLES = re.compile(
    r"(JAX|XLA|NCCL)_.*|LIBTPU_INIT_ARGS|CUDA_VISIBLE_DEVICES|NVIDIA_TF32_OVERRIDE|SLURM_JOB_ID"
)
SECRET = re.compile(r"(.*[-_.])?(api-?key|key|token|secret|password|passwd|auth)", re.IGNORECASE)
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password@
HIDDEN = "***"
GIT_TIMEOUT = 10  # seconds


def describe(recipe: str | None, devices: Entry, parameters: int, start: int) -> Entry:
    """The entry of this process.

    Args:
        recipe: path of the config file that parts of the run come from, if any.
        devices: of the run: their "kind" and "count", and the "processes" that have them.
        parameters: of the model.
        start: step that the run starts or continues from.
    """
    found = {package: _version(package) for package in PACKAGES}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": start,
        "command": without_secrets(sys.argv),
        "code": {"gptjax": __version__, **_own_code()},
        "recipe": recipe and {"path": recipe, "sha256": _sha256(recipe), **_git(Path(recipe))},
        "versions": {"python": platform.python_version(), **found},
        "devices": devices,
        "parameters": parameters,
        "host": platform.node(),
        "platform": platform.platform(),
        "variables": {
            name: IN_ADDRESS.sub(HIDDEN, value)
            for name, value in sorted(os.environ.items())
            if VARIABLES.fullmatch(name) and not SECRET.fullmatch(name)
        },
    }


def append(directory: Path, entry: Entry) -> str | None:
    """Add an entry to the run's list. A damaged list is set aside and a new one begun.

    Returns:
        What was wrong with the list, if anything.

    Raises:
        UserError: the disk takes no more.
    """
    path, problem = directory / NAME, None
    try:
        entries = read(directory)
    except UserError as error:
        aside = path.with_name(f"{NAME}.damaged-{time.time_ns()}")
        with files.writing(aside):
            path.rename(aside)
        entries, problem = [], f"{error}; it is kept as {aside.name}"
    files.write_atomically(path, json.dumps([*entries, entry], indent=1) + "\n")
    return problem


def read(directory: Path) -> list[Entry]:
    """The entries of a run, oldest first; none if it has no list, as runs of 0.1.

    Raises:
        UserError: the list cannot be read, or is none.
    """
    if not (directory / NAME).exists():
        return []
    return files.read_file(directory / NAME, _entries)


def without_secrets(words: list[str]) -> list[str]:
    """A command line without the values of flags that are named like a secret (`--api-key`), and
    without the user's part of addresses."""
    shown, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = word.startswith("-") and SECRET.fullmatch(name.lstrip("-")) is not None
        if hide and not word.startswith("-"):
            word = HIDDEN
        elif secret and equals:
            word = f"{name}={HIDDEN}"
        hide = secret and not equals
        shown.append(IN_ADDRESS.sub(HIDDEN, word))
    return shown


def _entries(text: str) -> list[Entry]:
    entries = json.loads(text)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("not a list of objects")
    return entries


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(path: str) -> str | None:
    try:
        return hashlib.sha256(files.read_bytes(Path(path))).hexdigest()
    except OSError:
        return None


@functools.cache
def _own_code() -> Entry:
    """The commit of the installed package; once, for it was imported once."""
    found = _git(Path(__file__).resolve().parents[1] / "__init__.py")
    if found["commit"] is None:  # installed by pip from a repository, without its checkout
        try:
            origin = importlib.metadata.distribution("gptjax").read_text("direct_url.json")
            found["commit"] = json.loads(origin or "{}")["vcs_info"]["commit_id"]
        except (importlib.metadata.PackageNotFoundError, KeyError, TypeError, ValueError):
            pass
    return found


def _git(file: Path) -> Entry:
    """The commit of the checkout that has this file; whether the checkout's files are as committed
    and none is new in the file's folder; if they are not, a hash of the changes to those that git
    knows."""
    nothing = {"commit": None, "clean": None, "changes": None}
    folder = str(file.resolve().parent)
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    quiet["GIT_OPTIONAL_LOCKS"] = "0"  # look, write nothing

    def git(*words: str) -> bytes:
        command = ["git", "-c", "core.fsmonitor=false", "-C", folder, *words]
        done = subprocess.run(
            command, env=quiet, timeout=GIT_TIMEOUT, check=True, capture_output=True
        )
        return done.stdout

    try:
        # A virtual environment may lie in another project's checkout, which is not the code's.
        git("ls-files", "--error-unmatch", "--", file.resolve().name)
        commit = git("rev-parse", "HEAD").decode().strip()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/")
        new = git("ls-files", "--others", "--exclude-standard", "--", ".")
        changes = git("diff", "HEAD", "--no-ext-diff", "--no-textconv") if changed else None
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return nothing
    digest = None if changes is None else hashlib.sha256(changes).hexdigest()
    return {"commit": commit, "clean": not (changed or new), "changes": digest}
