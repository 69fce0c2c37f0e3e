"""The text of each token of a reply, and its place in the reply's text."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from gptjax.generation.requests import Token
from gptjax.text.tokenizers import INCOMPLETE, Tokenizer


class Shown(NamedTuple):
    """A token as clients see it."""

    text: str
    """Alone; U+FFFD for bytes that are only a part of a character."""
    logprob: float
    alternatives: tuple[tuple[str, float], ...]
    """Text and log-probability of the most likely tokens."""
    offset: int
    """Where what it adds to the reply's text begins, in characters."""


class TokenTexts:
    """Texts of single tokens, as they are within a text: with the space before a word."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # A SentencePiece model leaves out the space before the first token, so each is decoded
        # after another one.
        self._before = tokenizer.encode("a", "skip")[-1:].tolist()
        self._skip = len(tokenizer.decode(self._before)) if self._before else 0
        self._of = lru_cache(maxsize=2**16)(self._decode)

    def show(self, tokens: Sequence[Token], offset: int) -> list[Shown]:
        """The tokens of a piece of a reply's text, which begins at `offset`."""
        shown = []
        for token in tokens:
            others = tuple((self._of(id_), logprob) for id_, logprob in token.alternatives)
            shown.append(Shown(self._of(token.id), token.logprob, others, offset))
            offset += len(token.text)
        return shown

    def join(self, ids: list[int]) -> str:
        """The text of several tokens."""
        return self._tokenizer.decode(ids)

    def _decode(self, id_: int) -> str:
        return self._tokenizer.decode([*self._before, id_])[self._skip :]


def utf8(text: str) -> list[int] | None:
    """The bytes of a token's text; None where it is only a part of a character."""
    return None if INCOMPLETE in text else list(text.encode("utf-8", "surrogatepass"))
