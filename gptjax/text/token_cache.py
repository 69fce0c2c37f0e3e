"""Texts to ids, a piece at a time on all cores; and the files that keep the ids of long ones.

FOLDER/train.bin, val.bin  ids, uint16 or uint32, as nanoGPT's
       tokens.json         how many, of how many bytes of text, their checksums: written last
       tokenizer.json      what made them
       progress.json       only while they are being made: what is on disk already
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import platformdirs

from gptjax.errors import UserError
from gptjax.runs.files import write_atomically
from gptjax.text.split import Part
from gptjax.text.tokenizers import Tokenizer

FORMAT = 1  # raised when the same key would mean other ids
UNIT = 2**16  # characters encoded at a time by one core
LONGEST = 16 * UNIT  # characters without a place to cut, such as of base64
PER_CORE = 2**20  # characters handed to the tokenizer at once, for each core
SAVE_EVERY = 5.0  # seconds after which a kill loses no more
NAMES = "train", "val"
DESCRIPTION = "told"  # key of `Tokens.description` in tokens.json, as FORMAT 1 has it
CUT = re.compile(r"[^\W\d_](?=[ \n\t\r])")  # a letter before a space


class Batch(NamedTuple):
    """The ids of some pieces, for each side, and what they were made from."""

    ids: tuple[np.ndarray, np.ndarray]
    n_bytes: tuple[int, int]
    characters: int


class Tokens(NamedTuple):
    """The ids of a text: train, val are (N,) arrays, perhaps on disk; n_bytes of their text, and
    the characters of both (None: not known); description: how it was split."""

    train: np.ndarray
    val: np.ndarray
    n_bytes: tuple[int, int]
    characters: int | None
    description: str


def dtype_of(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type of a token file that holds the ids."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode(
    parts: Iterable[Part], tokenizer: Tokenizer, separate: bool, skip: int = 0
) -> Iterator[Batch]:
    """Ids of the parts of a text, in order; the same ids however the text comes in pieces.

    Args:
        parts: from `splits.parts`.
        tokenizer: one that is not cuttable gets each document whole.
        separate: put its end of text after each document.
        skip: characters at the start that were encoded before, a sum of `Batch.characters`.

    Raises:
        UserError: something that the tokenizer lacks.
    """
    end = np.array([tokenizer.end_of_text] if separate else [], np.int32)
    dtype = dtype_of(tokenizer.vocab_size)
    at = skip
    for group in _groups(units(parts, tokenizer.cuttable), skip):
        try:
            found = tokenizer.encode_batch([unit.text for unit in group])
        except UserError as error:
            raise UserError(f"after {at:,} characters: {error}" if at else str(error)) from None
        ids: tuple[list[np.ndarray], ...] = [], []
        n_bytes = [0, 0]
        for unit, row in zip(group, found, strict=True):
            ids[unit.side].extend([row, end] if unit.last else [row])
            n_bytes[unit.side] += len(unit.text.encode("utf-8", "surrogatepass"))
        train, val = (np.concatenate([end[:0], *rows]).astype(dtype) for rows in ids)
        characters = sum(len(unit.text) for unit in group)
        at += characters
        yield Batch((train, val), (n_bytes[0], n_bytes[1]), characters)


def in_memory(batches: Iterable[Batch], tokenizer: Tokenizer, description: str) -> Tokens:
    """All batches together."""
    batches, dtype = list(batches), dtype_of(tokenizer.vocab_size)
    train, val = (
        np.concatenate([np.zeros(0, dtype), *(batch.ids[side] for batch in batches)])
        for side in (0, 1)
    )
    n_bytes = tuple(sum(batch.n_bytes[side] for batch in batches) for side in (0, 1))
    characters = sum(batch.characters for batch in batches)
    return Tokens(train, val, (n_bytes[0], n_bytes[1]), characters, description)


def folder(*key: Any) -> Path:
    """Where the tokens of that key are kept, in the user's cache folder."""
    text = json.dumps([FORMAT, *key])
    return platformdirs.user_cache_path("gptjax") / "tokens" / _sha(text.encode())[:32]


def keep(
    path: Path,
    encode_from: Callable[[int], Iterator[Batch]],
    tokenizer: Tokenizer,
    description: str,
    done: Callable[[int], None],
) -> Tokens:
    """Write the ids to a folder as they come; what a stopped process wrote is gone on from.

    Args:
        path: of the folder.
        encode_from: the batches after so many characters.
        tokenizer: theirs.
        description: see `Tokens`.
        done: told how many characters are encoded, now and then.

    Raises:
        UserError: the folder cannot be written, or what `encode_from` raises.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path / ".lock"):
            return load(path) or _write(path, encode_from, tokenizer, description, done)
    except OSError as error:
        raise UserError(
            f"cannot keep tokens in {path}: {error.strerror}; make room there, or set "
            f"XDG_CACHE_HOME to another folder"
        ) from None


def load(path: Path) -> Tokens | None:
    """The ids kept in a folder, mapped; None if they are not there whole and undamaged."""
    try:
        about = json.loads((path / "tokens.json").read_text(encoding="utf-8"))
        arrays = []
        for name, count, sha256 in zip(NAMES, about["tokens"], about["sha256"], strict=True):
            with (path / f"{name}.bin").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return None
            arrays.append(mapped(path / f"{name}.bin", about["dtype"], count))
        n_bytes = about["bytes"][0], about["bytes"][1]
        return Tokens(arrays[0], arrays[1], n_bytes, about["characters"], about[DESCRIPTION])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mapped(path: Path, dtype: Any, count: int) -> np.ndarray:
    """`count` ids of a file, read when they are used; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


def read_bin(path: Path, vocab_size: int) -> np.ndarray:
    """Map a token file of nanoGPT's layout: bare ids, uint16, or uint32 for larger vocabularies.

    Raises:
        UserError: it cannot be read, its size is odd, or an id is not in the vocabulary.
    """
    dtype = np.dtype(dtype_of(vocab_size))
    try:
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise UserError(
                f"{path} has {size} bytes, which is no whole number of {dtype.itemsize}-byte ids; "
                f"it was cut short, or is no token file of this vocabulary"
            )
        ids = mapped(path, dtype, size // dtype.itemsize)
    except OSError as error:
        raise UserError(f"token file cannot be read: {path}: {error.strerror}") from None
    for start in range(0, len(ids), PER_CORE):
        block = ids[start : start + PER_CORE]
        if (largest := int(block.max())) >= vocab_size:
            raise UserError(
                f"{path} has the id {largest} (at {start + int(block.argmax())}), and the "
                f"tokenizer has {vocab_size} tokens; name the one that made them with "
                f"--data.tokenizer"
            )
    return ids


def units(parts: Iterable[Part], cuttable: bool) -> Iterator[Part]:
    """The same text in units that may be encoded one by one: of about UNIT characters, cut between
    a letter and a space, or else whole documents."""
    rest: list[str] = []
    for part in parts:
        rest.append(part.text)
        if not part.last and (not cuttable or sum(map(len, rest)) < 2 * UNIT):
            continue
        text, at = "".join(rest), 0
        while cuttable and (to := _cut(text, at)):
            yield Part(part.side, text[at:to], False)
            at = to
        rest = [text[at:]]
        if part.last:
            yield Part(part.side, rest.pop(), True)


def _cut(text: str, at: int) -> int | None:
    """The first place where a text may be cut, a unit or more after `at`; None: more of it is
    needed. Where there is none for long, any will do: other tokens, but of the same text."""
    found = CUT.search(text, at + UNIT - 1, at + LONGEST)
    if found is None and len(text) > at + LONGEST:
        return at + LONGEST
    return found and found.end()


def _groups(units: Iterable[Part], skip: int) -> Iterator[list[Part]]:
    """Units enough for all cores."""
    group: list[Part] = []
    size, most = 0, PER_CORE * (os.cpu_count() or 1)
    for unit in units:
        if skip > 0:
            skip -= len(unit.text)
            continue
        group.append(unit)
        size += len(unit.text)
        if size >= most:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write(
    path: Path,
    encode_from: Callable[[int], Iterator[Batch]],
    tokenizer: Tokenizer,
    description: str,
    done: Callable[[int], None],
) -> Tokens:
    dtype = np.dtype(dtype_of(tokenizer.vocab_size))
    progress = path / "progress.json"
    write_atomically(path / "tokenizer.json", tokenizer.to_json())
    state: dict[str, Any] = {"characters": 0, "tokens": [0, 0], "bytes": [0, 0]}
    files = [(path / f"{name}.bin").open("ab") for name in NAMES]
    try:
        if progress.exists():
            state = json.loads(progress.read_text(encoding="utf-8"))
        for file, count in zip(files, state["tokens"], strict=True):
            file.truncate(count * dtype.itemsize)
        saved = time.monotonic()
        for batch in encode_from(state["characters"]):
            for side, file in enumerate(files):
                file.write(batch.ids[side].tobytes())
                state["tokens"][side] += len(batch.ids[side])
                state["bytes"][side] += batch.n_bytes[side]
            state["characters"] += batch.characters
            done(state["characters"])
            if time.monotonic() - saved > SAVE_EVERY:
                _sync(files)
                write_atomically(progress, json.dumps(state))
                saved = time.monotonic()
        _sync(files)
    finally:
        for file in files:
            file.close()
    hashes = []
    for name in NAMES:
        with (path / f"{name}.bin").open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    about = json.dumps({**state, "dtype": dtype.name, "sha256": hashes, DESCRIPTION: description})
    write_atomically(path / "tokens.json", about)
    progress.unlink(missing_ok=True)
    tokens = load(path)
    assert tokens is not None
    return tokens


def _sync(files: list[Any]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def _sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
