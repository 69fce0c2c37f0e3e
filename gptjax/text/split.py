"""Survey a text and split it into training and validation parts."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.text.sources import Piece

TRAIN, VAL, LEFT_OUT = range(3)


class Survey(NamedTuple):
    """Statistics from one pass over a text.

    Attributes:
        characters: length of the text.
        alphabet: its distinct characters, sorted.
        lengths: (D,) characters in each document.
        names: (D,) uint64 hash of each document's first piece, to detect near-copies.
        marks: character offsets of the byte offsets that were asked for.
    """

    characters: int
    alphabet: str
    lengths: np.ndarray
    names: np.ndarray
    marks: tuple[int, ...]


class Split(NamedTuple):
    """Assignment of a text to training and validation, by document or by position.

    Attributes:
        sides: (D,) TRAIN or VAL for each document; None: split by position.
        bounds: if by position, the character offsets where VAL and LEFT_OUT start.
        description: a phrase for the console.
    """

    sides: np.ndarray | None
    bounds: tuple[int, ...]
    description: str


class Part(NamedTuple):
    """A piece of text on one side of the split; `last` marks the end of a document or side."""

    side: int
    text: str
    last: bool


def survey(
    pieces: Iterable[Piece],
    byte_marks: tuple[int, ...] = (),
    done: Callable[[int], None] = lambda characters: None,
) -> Survey:
    """Collect the statistics of a text in one pass.

    Args:
        pieces: the text.
        byte_marks: ascending UTF-8 byte offsets to convert to character offsets.
        done: called with the number of characters read so far.
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
    """Hold out the end of a single document, or whole documents if there are several.

    Held-out documents are chosen by a hash of their first piece, so their order does not matter
    and documents that start alike stay on one side.

    Args:
        found: statistics of the text.
        val_fraction: approximate fraction of the characters to hold out.
        val_limit: most characters to hold out; None: no limit.

    Raises:
        UserError: all documents start alike.

    Source: by position: lecture, "train/val split": train on the first 90 %, validate on the rest.
    """
    n = found.characters
    if found.marks:  # a corpus with a standard split
        return Split(None, found.marks, "the standard split of this corpus")
    if len(found.lengths) < 2:
        n_train = training_part(n, val_fraction, val_limit)
        held_out = f"by position (validation: the last {n - n_train:,} characters)"
        return Split(None, (n_train, n), held_out)
    target = min(val_fraction * n, val_limit or n)
    order = np.argsort(found.names, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(found.names[order])) + 1)
    sizes = [int(found.lengths[group].sum()) for group in groups]
    if len(groups) < 2:
        raise UserError(
            f"all {len(order)} documents start alike, so none can be held out; join them into one "
            f"file, or add other documents"
        )
    sides = np.full(len(order), TRAIN)
    held = 0
    for group, size in zip(groups, sizes, strict=True):
        if held + size <= target:
            sides[group] = VAL
            held += size
    if target and not held:  # every document is larger than the target
        sides[groups[int(np.argmin(sizes))]] = VAL
    count = int((sides == VAL).sum())
    return Split(sides, (), f"by document (validation: {count:,} of {len(order):,} documents)")


def training_part(n: int, val_fraction: float, val_limit: int | None) -> int:
    """The number of n characters (or tokens) to train on; the rest is held out."""
    n_train = int((1 - val_fraction) * n)
    return n_train if val_limit is None else max(n_train, n - val_limit)


def parts(pieces: Iterable[Piece], how: Split) -> Iterator[Part]:
    """Tag the pieces of a text with their side of the split; drop those that are LEFT_OUT."""
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
            left = how.bounds[side] - at
            text, rest = rest[:left], rest[left:]
            at += len(text)
            full = at == how.bounds[side]
            if text:
                yield Part(side, text, full)
            side += full
