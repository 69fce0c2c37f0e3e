"""Encode text in chunks on all cores, and cache the ids of long texts on disk.

FOLDER/train.bin, val.bin  ids, uint16 or uint32, in nanoGPT's layout
       tokens.json         counts of tokens, bytes and characters, checksums; written last
       tokenizer.json      the tokenizer that made them
       progress.json       the same counts and checksums of what is on disk; only while encoding

What is read back is checked: a file that does not match its checksum counts as missing.
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
from gptjax.runs.files import check_regular, read_sealed, write_atomically, write_sealed
from gptjax.text import special_tokens
from gptjax.text.split import Part
from gptjax.text.tokenizers import Tokenizer, UnknownCharacters

FORMAT = 2  # raise it when the same key would give other ids, or other chunks
UNIT = 2**16  # characters in a chunk, which one core encodes at a time
LONGEST = 16 * UNIT  # characters without a place to cut (base64, for example)
BLOCK = 2**20  # bytes of a file hashed at a time
PER_CORE = 2**20  # characters passed to the tokenizer at once, per core
SAVE_EVERY = 5.0  # seconds of work that a kill can lose
NAMES = "train", "val"
CUT = re.compile(r"[^\W\d_](?=[ \n\t\r])")  # a letter before a space


class Batch(NamedTuple):
    """The ids of consecutive chunks, split into (training, validation)."""

    ids: tuple[np.ndarray, np.ndarray]
    n_bytes: tuple[int, int]  # UTF-8 bytes of their text
    characters: int  # in total


class Tokens(NamedTuple):
    """The ids of a text.

    Attributes:
        train, val: (N,) uint16 or uint32, in memory or memory-mapped.
        n_bytes: UTF-8 bytes of the text of each.
        characters: of both together; None: unknown (token files).
        description: how the text was split, a phrase for the console.
    """

    train: np.ndarray
    val: np.ndarray
    n_bytes: tuple[int, int]
    characters: int | None
    description: str


def dtype_of(vocab_size: int) -> type[np.unsignedinteger]:
    """The dtype of a token file: the smaller of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode(
    parts: Iterable[Part], tokenizer: Tokenizer, separate: bool, skip: int = 0
) -> Iterator[Batch]:
    """Encode the parts of a text, in order; how it is cut into parts does not change the ids.

    Args:
        parts: from `split.parts`.
        tokenizer: if it is not cuttable, it gets each document whole.
        separate: append the end-of-text token to each document, after what the tokenizer itself
            puts around a text.
        skip: characters to skip because they were encoded before; a sum of `Batch.characters`.

    Raises:
        UserError: a character that the tokenizer lacks.
    """
    start, end = special_tokens.of(tokenizer)
    if separate and tokenizer.end_of_text not in end[-1:]:
        end = np.array([*end, tokenizer.end_of_text], np.int32)
    dtype = dtype_of(tokenizer.vocab_size)
    at = skip
    for group in _groups(units(parts, tokenizer.cuttable), skip):
        try:
            found = tokenizer.encode_batch([unit.text for unit in group])
        except UnknownCharacters as error:
            before = f"after {at:,} characters: " if at else ""
            raise UnknownCharacters(before + error.found) from None
        except UserError as error:
            raise UserError(f"after {at:,} characters: {error}" if at else str(error)) from None
        ids: tuple[list[np.ndarray], ...] = [], []
        n_bytes = [0, 0]
        for unit, row in zip(group, found, strict=True):
            ids[unit.side].extend([start] * unit.first + [row] + [end] * unit.last)
            n_bytes[unit.side] += len(unit.text.encode("utf-8"))
        train, val = (np.concatenate([end[:0], *rows]).astype(dtype) for rows in ids)
        characters = sum(len(unit.text) for unit in group)
        at += characters
        yield Batch((train, val), (n_bytes[0], n_bytes[1]), characters)


def in_memory(batches: Iterable[Batch], tokenizer: Tokenizer, description: str) -> Tokens:
    """Concatenate all batches."""
    batches, dtype = list(batches), dtype_of(tokenizer.vocab_size)
    train, val = (
        np.concatenate([np.zeros(0, dtype), *(batch.ids[side] for batch in batches)])
        for side in (0, 1)
    )
    n_bytes = tuple(sum(batch.n_bytes[side] for batch in batches) for side in (0, 1))
    characters = sum(batch.characters for batch in batches)
    return Tokens(train, val, (n_bytes[0], n_bytes[1]), characters, description)


def folder(*key: Any) -> Path:
    """The folder for tokens of that key, in the user's cache directory."""
    text = json.dumps([FORMAT, *key])
    return platformdirs.user_cache_path("gptjax") / "tokens" / _sha(text.encode())[:32]


def load_or_encode(
    path: Path,
    encode_from: Callable[[int], Iterator[Batch]],
    tokenizer: Tokenizer,
    description: str,
    done: Callable[[int], None],
) -> Tokens:
    """Load cached ids, or encode the text to files; an interrupted encoding is continued.

    Args:
        path: the cache folder, from `folder`.
        encode_from: yields the batches after that many characters of the text.
        tokenizer: encodes them.
        description: see `Tokens`.
        done: called with the number of characters encoded so far.

    Raises:
        UserError: the folder cannot be written, the disk does not keep what is written to it, or
            `encode_from` raised it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path / ".lock"):
            return load(path) or _write(path, encode_from, tokenizer, description, done)
    except OSError as error:
        raise UserError(
            f"cannot cache tokens in {path}: {error.strerror}; free disk space or fix "
            f"permissions there, or set XDG_CACHE_HOME to another folder"
        ) from None


def load(path: Path) -> Tokens | None:
    """Memory-map the ids cached in a folder; None if they are missing, incomplete or corrupt."""
    try:
        about = read_sealed(path / "tokens.json")
        arrays = []
        for name, count, sha256 in zip(NAMES, about["tokens"], about["sha256"], strict=True):
            with (path / f"{name}.bin").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return None
            arrays.append(memory_map(path / f"{name}.bin", about["dtype"], count))
        n_bytes = about["bytes"][0], about["bytes"][1]
        return Tokens(arrays[0], arrays[1], n_bytes, about["characters"], about["description"])
    except (OSError, ValueError, KeyError):
        return None


def memory_map(path: Path, dtype: Any, count: int) -> np.ndarray:
    """Memory-map `count` ids of a file; an empty file cannot be mapped and gives an empty array."""
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


def read_bin(path: Path, vocab_size: int) -> np.ndarray:
    """Memory-map a token file in nanoGPT's layout: raw uint16 ids (uint32 for large vocabularies).

    Raises:
        UserError: it cannot be read, is truncated, has ids of another size, or one outside the
            vocabulary.
    """
    dtype = np.dtype(dtype_of(vocab_size))
    try:
        size = check_regular(path).st_size
        if size % dtype.itemsize:
            raise UserError(
                f"{path} has {size} bytes, not a multiple of the {dtype.itemsize}-byte ids of this "
                f"vocabulary; it is truncated, or is not a token file"
            )
        ids = memory_map(path, dtype, size // dtype.itemsize)
    except OSError as error:
        raise UserError(f"cannot read the token file {path}: {error.strerror}") from None
    head = ids[:UNIT]
    if head[:3].tobytes() == b"\x93NUMPY":
        raise UserError(f"{path} is numpy's .npy; write its ids with array.tofile instead")
    if len(head) >= 2**8 and head[::2].any() and not head[1::2].any():
        raise UserError(
            f"in {path} every second id is 0, as where ids are wider than the {dtype.itemsize} "
            f"bytes of this vocabulary; write it with array.astype({dtype.name!r}).tofile"
        )
    for start in range(0, len(ids), PER_CORE):
        block = ids[start : start + PER_CORE]
        if (largest := int(block.max())) >= vocab_size:
            raise UserError(
                f"{path} has the id {largest} at position {start + int(block.argmax())}, but the "
                f"tokenizer has {vocab_size} tokens; set --data.tokenizer to the one that made it"
            )
    return ids


def units(parts: Iterable[Part], cuttable: bool) -> Iterator[Part]:
    """Regroup a text into chunks that can be encoded independently: about UNIT characters, cut
    between a letter and a space; whole documents if the tokenizer is not cuttable."""
    rest: list[str] = []
    first = True
    for part in parts:
        rest.append(part.text)
        if not part.last and (not cuttable or sum(map(len, rest)) < 2 * UNIT):
            continue
        text, at = "".join(rest), 0
        while cuttable and (to := _cut(text, at)):
            yield Part(part.side, text[at:to], False, first)
            at, first = to, False
        rest = [text[at:]]
        if part.last:
            yield Part(part.side, rest.pop(), True, first)
            first = True


def _cut(text: str, at: int) -> int | None:
    """The first place to cut, at least UNIT characters after `at`; None: more text is needed.

    After LONGEST characters without one, cut anywhere: the tokens at the cut may differ from
    those of the uncut text, but decode to the same text.
    """
    found = CUT.search(text, at + UNIT - 1, at + LONGEST)
    if found is None and len(text) > at + LONGEST:
        return at + LONGEST
    return found and found.end()


def _groups(units: Iterable[Part], skip: int) -> Iterator[list[Part]]:
    """Collect chunks until there are enough to keep all cores busy."""
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
    state, hashes = _encoded_before(path, dtype)
    files = [(path / f"{name}.bin").open("ab") for name in NAMES]
    try:
        for file, count in zip(files, state["tokens"], strict=True):
            file.truncate(count * dtype.itemsize)
        saved = time.monotonic()
        for batch in encode_from(state["characters"]):
            for side, file in enumerate(files):
                raw = batch.ids[side].tobytes()
                file.write(raw)
                hashes[side].update(raw)
                state["tokens"][side] += len(batch.ids[side])
                state["bytes"][side] += batch.n_bytes[side]
            state["characters"] += batch.characters
            done(state["characters"])
            if time.monotonic() - saved > SAVE_EVERY:
                _sync(files)
                state["sha256"] = [digest.hexdigest() for digest in hashes]
                write_sealed(progress, state)
                saved = time.monotonic()
        _sync(files)
    finally:
        for file in files:
            file.close()
    state["sha256"] = [digest.hexdigest() for digest in hashes]
    about = {**state, "dtype": dtype.name, "description": description}
    write_sealed(path / "tokens.json", about)
    progress.unlink(missing_ok=True)
    tokens = load(path)
    if tokens is None:
        raise UserError(
            f"the tokens in {path} do not read back as they were written; check that disk, or set "
            f"XDG_CACHE_HOME to a folder on another"
        )
    return tokens


def _encoded_before(path: Path, dtype: np.dtype) -> tuple[dict[str, Any], list[Any]]:
    """What an interrupted encoding left: the values of progress.json, and the hash of each file up
    to there. Nothing, if the files are not what it says: then the encoding starts again."""
    try:
        state = read_sealed(path / "progress.json")
        hashes = []
        for name, count, sha256 in zip(NAMES, state["tokens"], state["sha256"], strict=True):
            digest, left = hashlib.sha256(), count * dtype.itemsize
            with (path / f"{name}.bin").open("rb") as file:
                while left and (raw := file.read(min(left, BLOCK))):
                    digest.update(raw)
                    left -= len(raw)
            if left or digest.hexdigest() != sha256:
                raise ValueError(f"{name}.bin does not match its checksum")
            hashes.append(digest)
        return state, hashes
    except (OSError, ValueError, KeyError):
        state = {"characters": 0, "tokens": [0, 0], "bytes": [0, 0]}
        return state, [hashlib.sha256() for _ in NAMES]


def _sync(files: list[Any]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def _sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
