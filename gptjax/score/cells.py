"""The text of scored tokens, and the texts of two runs side by side."""

import bisect
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from gptjax.score.score import BIT
from gptjax.score.windows import Scored
from gptjax.text import special_tokens
from gptjax.text.stream import StreamDecoder
from gptjax.text.tokenizers import Tokenizer


class Token(NamedTuple):
    """One scored token: the number of its stream, its place there, and its row of `Scored`."""

    stream: int
    place: int
    id: int
    logprob: float
    rank: int
    alternatives: tuple[tuple[int, float], ...]

    @property
    def bits(self) -> float:
        """The surprise; nan where nothing predicts the token."""
        return -self.logprob / BIT


class Cell(NamedTuple):
    """The next characters of a text, and their tokens: one, or those that share a character.

    Attributes:
        text: at least one character, but for tokens that have none.
        tokens: one or more.
        special: whether it is a token around a text or the end-of-text token; then `text` is its
            name and no part of the text.
        last: whether the stream ends here.
    """

    text: str
    tokens: tuple[Token, ...]
    special: bool
    last: bool

    @property
    def bits(self) -> float:
        """Surprise of all its tokens; nan if nothing predicts one of them."""
        return sum(token.bits for token in self.tokens)


def tokens(scored: Iterable[Scored]) -> Iterator[tuple[Token, bool]]:
    """The tokens of streams one by one, and whether each is the last of its stream."""
    stream = place = 0
    for part in scored:
        columns, n = [x.tolist() for x in part[:5]], len(part.ids)
        for i, (id_, logprob, rank, *others) in enumerate(zip(*columns, strict=True)):
            token = Token(stream, place + i, id_, logprob, rank, tuple(zip(*others, strict=True)))
            yield token, part.last and i == n - 1
        stream, place = (stream + 1, 0) if part.last else (stream, place + n)


def cells(tokenizer: Tokenizer, scored: Iterable[Scored]) -> Iterator[Cell]:
    """The text of streams as cells; joined, those of a stream are its decoded text."""
    special = special_ids(tokenizer)
    start = lambda: StreamDecoder(tokenizer, np.zeros(0, np.int32))
    decoder, waiting = start(), []
    for token, last in tokens(scored):
        if token.id in special:
            if waiting:  # bytes of a character that never came
                yield Cell(decoder.end(), tuple(waiting), False, False)
            yield Cell(name(tokenizer, token.id), (token,), True, last)
            decoder, waiting = start(), []
            continue
        text = decoder.add(np.array([token.id], np.int32))
        waiting.append(token)
        if last:
            text += decoder.end()
        if text or last:
            yield Cell(text, tuple(waiting), False, last)
            waiting = []
        if last:
            decoder = start()


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids of the tokens around a text and of the end-of-text token."""
    ids = {int(i) for side in special_tokens.of(tokenizer) for i in side}
    return ids if tokenizer.end_of_text is None else {*ids, tokenizer.end_of_text}


def name(tokenizer: Tokenizer, id_: int) -> str:
    """A token by itself: its text, or its name in the vocabulary if it has none."""
    piece = getattr(tokenizer, "piece", None)
    if piece is not None and id_ in special_ids(tokenizer):
        return piece(id_)
    return tokenizer.decode([id_])


class Segment(NamedTuple):
    """Characters between two places where tokens of both runs end, and the bits of each run for
    them; `last` as of `Cell`."""

    text: str
    bits: tuple[float, float]
    last: bool

    @property
    def difference(self) -> float:
        """Bits that the second run needs beyond those of the first; nan if either is."""
        return self.bits[1] - self.bits[0]


def align(one: list[Cell], other: list[Cell]) -> list[Segment] | None:
    """Compare the surprise of two runs, whatever their tokenizers, on the smallest parts of the
    text that both have whole tokens for: no token is divided by a guess.

    Args:
        one, other: the cells of one text; either may end before the other.

    Returns:
        The segments, without special tokens; bits are nan where nothing predicts a token. None:
        the tokenizers decode to different texts.
    """
    sides = [_plain(side) for side in (one, other)]
    texts = ["".join(cell.text for cell in side) for side in sides]
    length = min(map(len, texts))
    if texts[0][:length] != texts[1][:length]:
        return None
    ends = [list(accumulate(len(cell.text) for cell in side)) for side in sides]
    segments, start, before = [], 0, [0, 0]
    for end in sorted(set(ends[0]) & set(ends[1])):
        upto = [bisect.bisect_right(side, end) for side in ends]
        bits = [
            float(sum(cell.bits for cell in side[a:b]))
            for side, a, b in zip(sides, before, upto, strict=True)
        ]
        last = any(cell.last for cell in sides[0][before[0] : upto[0]])
        segments.append(Segment(texts[0][start:end], (bits[0], bits[1]), last))
        start, before = end, upto
    return segments


def _plain(cells: list[Cell]) -> list[Cell]:
    """The cells of the text itself; where a stream ends with a special token, it ends before."""
    found: list[Cell] = []
    for cell in cells:
        if not cell.special:
            found.append(cell)
        elif cell.last and found:
            found[-1] = found[-1]._replace(last=True)
    return found
