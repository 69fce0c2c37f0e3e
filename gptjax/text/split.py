"""What a text is made of, and which part of it trains and which validates."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.text.sources import Piece

TRAIN, VAL, LEFT_OUT = range(3)


class Survey(NamedTuple):
    """What reading a text once tells about it."""

    characters: int
    alphabet: str  # sorted
    lengths: np.ndarray  # (D,) characters of each document
    names: np.ndarray  # (D,) uint64, the same for documents that begin with the same piece
    marks: tuple[int, ...]  # characters before each of the byte offsets that were asked for


class Split(NamedTuple):
    """Which documents, or which part of the only one, go to which side."""

    sides: np.ndarray | None  # (D,) of TRAIN, VAL; None: by position
    bounds: tuple[int, ...]  # by position: characters before VAL, and before LEFT_OUT
    description: str  # one phrase, for the console


class Part(NamedTuple):
    """A piece of one side; `last` where its document or its side ends."""

    side: int
    text: str
    last: bool


def survey(
    pieces: Iterable[Piece],
    byte_marks: tuple[int, ...] = (),
    done: Callable[[int], None] = lambda characters: None,
) -> Survey:
    """Read a text once: its size, its characters, its documents.

    Args:
        pieces: of the text.
        byte_marks: offsets to find in characters.
        done: told how many characters are read, now and then.
    """
    seen = np.zeros(0x110000, bool)
    lengths: list[int] = []
    names: list[int] = []
    marks: list[int] = []
    characters = n_bytes = length = 0
    for piece in pieces:
        if not length:
            raw = piece.text.encode("utf-8", "surrogatepass")
            names.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest()))
        seen[np.frombuffer(piece.text.encode("utf-32-le", "surrogatepass"), "<u4")] = True
        if len(marks) < len(byte_marks):
            raw = piece.text.encode("utf-8", "surrogatepass")
            while len(marks) < len(byte_marks) and byte_marks[len(marks)] <= n_bytes + len(raw):
                marks.append(characters + len(raw[: byte_marks[len(marks)] - n_bytes].decode()))
            n_bytes += len(raw)
        characters += len(piece.text)
        length += len(piece.text)
        done(characters)
        if piece.last:
            lengths.append(length)
            length = 0
    alphabet = "".join(map(chr, np.flatnonzero(seen)))
    return Survey(characters, alphabet, np.array(lengths), np.array(names, np.uint64), tuple(marks))


def split(found: Survey, val_fraction: float, val_limit: int | None) -> Split:
    """Hold out the end of a text, or whole documents where there are many.

    The documents held out are drawn by their content, so that their order does not matter, and
    those that begin alike stay on one side.

    Args:
        found: of the text.
        val_fraction: share of the characters held out, about.
        val_limit: most of them; None: no limit.

    Raises:
        UserError: all documents are the same one.

    Source: by position: lecture, "train/val split": the first 90 % trains, the rest validates.
    """
    n = found.characters
    if found.marks:  # a corpus that is always split so
        return Split(None, found.marks, "as is usual with this corpus")
    if len(found.lengths) < 2:
        n_train = training_part(n, val_fraction, val_limit)
        return Split(None, (n_train, n), f"by position, the last {n - n_train:,} characters")
    target = min(val_fraction * n, val_limit or n)
    order = np.argsort(found.names, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(found.names[order])) + 1)
    sizes = [int(found.lengths[group].sum()) for group in groups]
    if len(groups) < 2:
        raise UserError(
            f"all {len(order)} documents begin alike, so none can be held out; give one text, or "
            f"other documents"
        )
    sides = np.full(len(order), TRAIN)
    held = 0
    for group, size in zip(groups, sizes, strict=True):
        if held + size <= target:
            sides[group] = VAL
            held += size
    if target and not held:  # every document is larger than what should be held out
        sides[groups[int(np.argmin(sizes))]] = VAL
    count = int((sides == VAL).sum())
    return Split(
        sides, (), f"by document, {count:,} of {len(order):,} held out, each whole on one side"
    )


def training_part(n: int, val_fraction: float, val_limit: int | None) -> int:
    """How many of n train, the rest being held out."""
    n_train = int((1 - val_fraction) * n)
    return n_train if val_limit is None else max(n_train, n - val_limit)


def parts(pieces: Iterable[Piece], how: Split) -> Iterator[Part]:
    """The pieces of a text with the side that each goes to; LEFT_OUT is left out."""
    if how.sides is not None:
        document = 0
        for piece in pieces:
            yield Part(int(how.sides[document]), piece.text, piece.last)
            document += piece.last
        return
    at, side = 0, TRAIN
    for piece in pieces:
        rest = piece.text
        while rest and side != LEFT_OUT:
            room = how.bounds[side] - at
            text, rest = rest[:room], rest[room:]
            at += len(text)
            full = at == how.bounds[side]
            if text:
                yield Part(side, text, full)
            side += full
