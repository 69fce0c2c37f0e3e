"""Text to ids and back, and the JSON that a run keeps of it."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from gptjax.errors import UserError

Unknown = Literal["error", "replace", "skip"]
REPLACEMENTS = "\N{REPLACEMENT CHARACTER}? \n"  # the first of these that the vocabulary has


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character: its place in the sorted set of the corpus's characters.

    Args:
        vocabulary: the characters, sorted and without repeats.

    Source: lecture, "tokenization".
    """

    vocabulary: str

    @classmethod
    def fit(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is the sorted set of `text`'s characters."""
        return cls("".join(map(chr, np.unique(_code_points(text)))))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @cached_property
    def _codes(self) -> np.ndarray:
        return _code_points(self.vocabulary)

    def encode(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """Ids of the characters of `text`.

        Args:
            text: any text.
            unknown: what to do with characters the vocabulary lacks: raise an error that lists
                them, replace each (by U+FFFD, "?", a space or a newline, whichever the
                vocabulary has first), or skip them.

        Returns:
            (N,) int32 ids in [0, vocab_size).

        Raises:
            UserError: unknown characters, with their positions.
        """
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        known = self._codes[ids] == codes
        if not known.all():
            if unknown == "error":
                raise UserError(self._describe(text, np.flatnonzero(~known)))
            if unknown == "skip":
                ids = ids[known]
            else:
                ids[~known] = self._replacement()
        return ids.astype(np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of (N,) ids; the exact inverse of `encode`."""
        codes = self._codes[np.asarray(ids, np.int64)]
        return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> str:
        """The text of a run's `tokenizer.json`."""
        # One string for each: two lone surrogates in one would be read back as one character.
        return json.dumps({"type": "char", "vocabulary": list(self.vocabulary)}) + "\n"

    def _replacement(self) -> int:
        for character in REPLACEMENTS:
            if character in self.vocabulary:
                return self.vocabulary.index(character)
        raise UserError(
            "cannot replace unknown characters: the vocabulary has none of U+FFFD, '?', space and "
            "newline; skip them instead"
        )

    def _describe(self, text: str, positions: np.ndarray) -> str:
        first: dict[str, int] = {}
        for position in positions.tolist():
            first.setdefault(text[position], position)
            if len(first) > 10:
                break
        shown = ", ".join(f"{c!r} at {p}" for c, p in list(first.items())[:10])
        more = ", ..." if len(first) > 10 else ""
        return (
            f"{len(positions)} unknown characters ({shown}{more}): the tokenizer has "
            f"{self.vocab_size} characters and not these; remove them, or choose replace or skip"
        )


def from_json(text: str) -> CharTokenizer:
    """Read a run's `tokenizer.json`.

    Raises:
        UserError: not JSON, another kind of tokenizer, or an unusable vocabulary.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("type") != "char":
        raise UserError('expected {"type": "char", ...}; this gptjax reads no other tokenizer')
    vocabulary = values.get("vocabulary")
    if not isinstance(vocabulary, list) or not vocabulary:
        raise UserError("the vocabulary must be a list of one character or more")
    if not all(isinstance(c, str) and len(c) == 1 for c in vocabulary):
        raise UserError("the vocabulary must be a list of strings of one character each")
    if vocabulary != sorted(set(vocabulary)):
        raise UserError("the vocabulary must be sorted and without repeats")
    return CharTokenizer("".join(vocabulary))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
