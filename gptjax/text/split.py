"""Survey a text and split it into training and validation parts."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.text.sources import Piece

TRAIN, VAL, LEFT_OUT = range(3)
NEAR = 0.9  # the share of what is to be held out that whole documents must come to


class Survey(NamedTuple):
    """Statistics from one pass over a text.

    Attributes:
        characters: length of the text.
        n_bytes: its length in UTF-8.
        alphabet: its distinct characters, sorted.
        lengths: (D,) characters in each document.
        names: (D,) uint64 hash of each document's first piece, to detect near-copies.
        marks: character offsets of the byte offsets that were asked for.
    """

    characters: int
    n_bytes: int
    alphabet: str
    lengths: np.ndarray
    names: np.ndarray
    marks: tuple[int, ...]


class Split(NamedTuple):
    """Assignment of a text to training and validation, by document or by position.

    Attributes:
        cuts: (D,) characters of each document that train, the rest of which validates; None: split
            by position.
        bounds: if by position, the character offsets where VAL and LEFT_OUT start.
        description: a phrase for the console.
    """

    cuts: np.ndarray | None
    bounds: tuple[int, ...]
    description: str


class Part(NamedTuple):
    """A piece of text on one side of the split; `last` marks the end of a document, or of its part
    on that side: what follows there is another text. `first`, once the pieces are regrouped to be
    encoded, marks its beginning."""

    side: int
    text: str
    last: bool
    first: bool = False


def survey(
    pieces: Iterable[Piece],
    byte_marks: tuple[int, ...] = (),
    done: Callable[[int], None] = lambda n_bytes: None,
) -> Survey:
    """Collect the statistics of a text in one pass.

    Args:
        pieces: the text.
        byte_marks: ascending UTF-8 byte offsets to convert to character offsets.
        done: called with the number of bytes, in UTF-8, read so far.
    """
    seen = np.zeros(0x110000, bool)
    lengths: list[int] = []
    names: list[int] = []
    marks: list[int] = []
    characters = n_bytes = length = 0
    for piece in pieces:
        raw = piece.text.encode("utf-8")
        if not length:
            names.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest()))
        seen[np.frombuffer(piece.text.encode("utf-32-le"), "<u4")] = True
        while len(marks) < len(byte_marks) and byte_marks[len(marks)] <= n_bytes + len(raw):
            marks.append(characters + len(raw[: byte_marks[len(marks)] - n_bytes].decode()))
        n_bytes += len(raw)
        characters += len(piece.text)
        length += len(piece.text)
        done(n_bytes)
        if piece.last:
            lengths.append(length)
            length = 0
    alphabet = "".join(map(chr, np.flatnonzero(seen)))
    hashes = np.array(names, np.uint64)
    return Survey(characters, n_bytes, alphabet, np.array(lengths), hashes, tuple(marks))


def split(found: Survey, val_fraction: float, val_limit: int | None) -> Split:
    """Hold out the end of a single document, or whole documents if there are several.

    Held-out documents are chosen by a hash of their first piece, so their order does not matter
    and documents that start alike stay on one side. Where whole documents come to less than NEAR
    of what is wanted, the end of one more is held out: of the longest (and, if each has copies, of
    those too, from the same place on).

    Args:
        found: statistics of the text.
        val_fraction: fraction of the characters to hold out.
        val_limit: most characters to hold out; None: no limit.

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
    cuts = found.lengths.copy()
    held, training = 0, []
    for group in groups:
        size = int(found.lengths[group].sum())
        if held + size <= target:
            cuts[group] = 0
            held += size
        else:
            training.append(group)
    whole = int((cuts == 0).sum())
    held_out = [f"{whole:,} of {len(order):,} documents"] * bool(whole)
    if held < NEAR * target:
        # One without copies, if there is one: many short copies would make a poor validation.
        length = lambda group: int(found.lengths[group].max())
        group = max(training, key=lambda group: (len(group) == 1, length(group)))
        cuts[group] = _cut(found.lengths[group], math.ceil(target - held))
        ends = int((found.lengths - cuts)[group].sum())
        held += ends
        of = f"{len(group):,} " + ("more" if whole else f"of {len(order):,} documents")
        held_out.append(f"{ends:,} characters at the end of {of}")
    held_out.append(f"{held / n:.2%} of the text")
    return Split(cuts, (), f"by document (validation: {', '.join(held_out)})")


def undivided(found: Survey, side: int) -> Split:
    """Put all documents on one side, TRAIN or VAL."""
    cuts = found.lengths if side == TRAIN else np.zeros_like(found.lengths)
    return Split(cuts, (), whole(side))


def whole(side: int) -> str:
    """A phrase about a text that is all on one side."""
    return "all of the text trains" if side == TRAIN else "all of the validation text validates"


def _cut(lengths: np.ndarray, wanted: int) -> np.ndarray:
    """(D,) where to cut documents of these lengths, all at the same place, so that at least
    `wanted` characters lie behind it."""
    low, high = 0, int(lengths.max())  # enough, too little
    while high - low > 1:
        middle = (low + high) // 2
        enough = int(np.maximum(lengths - middle, 0).sum()) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return np.minimum(lengths, low)


def training_part(n: int, val_fraction: float, val_limit: int | None) -> int:
    """The number of n characters (or tokens) to train on; the rest is held out."""
    n_train = int((1 - val_fraction) * n)
    return n_train if val_limit is None else max(n_train, n - val_limit)


def parts(pieces: Iterable[Piece], how: Split) -> Iterator[Part]:
    """Tag the pieces of a text with their side of the split; drop those that are LEFT_OUT.

    Raises:
        UserError: more documents than were surveyed.
    """
    if how.cuts is not None:
        document = at = 0
        for piece in pieces:
            if document == len(how.cuts):
                raise UserError("the text changed while it was read; start again")
            left = max(0, int(how.cuts[document]) - at)
            at += len(piece.text)
            train, val = piece.text[:left], piece.text[left:]
            if train:
                yield Part(TRAIN, train, piece.last or at >= how.cuts[document])
            if val:
                yield Part(VAL, val, piece.last)
            if piece.last:
                document, at = document + 1, 0
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
