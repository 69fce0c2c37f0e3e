"""Tokenizers: text to ids and back, streaming decode, and their JSON in a run's folder."""

import base64
import binascii
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from gptjax.errors import UserError
from gptjax.text.subwords import END_OF_TEXT as END_OF_TEXT
from gptjax.text.subwords import HFTokenizer, SentencePieceTokenizer, Unknown, join, scalars

REPLACEMENTS = "\N{REPLACEMENT CHARACTER}? \n"  # the first of these that the vocabulary has
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # decoded from bytes that are not UTF-8, or not yet


class UnknownCharacters(UserError):
    """Characters that the vocabulary lacks.

    Attributes:
        found: which, without the advice, which is that for a prompt.
    """

    def __init__(self, found: str):
        self.found = found
        super().__init__(f"{found}; remove them, or choose replace or skip")


class Tokenizer(Protocol):
    """The interface of a tokenizer; your own may implement it.

    Text is encoded literally: the characters of "<|endoftext|>" in it never become the special
    token.
    """

    @property
    def vocab_size(self) -> int:
        """Vocabulary size; ids are in [0, vocab_size)."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """Id of the end-of-text token, which `encode` never returns; None: it has none."""
        ...

    @property
    def cuttable(self) -> bool:
        """Whether text may be cut between a letter and a space without changing its ids."""
        ...

    def encode(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """The (N,) int32 ids of `text`; `unknown` says what to do with characters it lacks."""
        ...

    def encode_batch(self, texts: list[str], unknown: Unknown = "error") -> list[np.ndarray]:
        """The ids of each text, as from `encode`."""
        ...

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of (N,) ids, with END_OF_TEXT where documents end."""
        ...

    def count_bytes(self, ids: np.ndarray) -> int:
        """Number of UTF-8 bytes in the text of (N,) ids; end-of-text tokens count as 0."""
        ...

    def to_json(self) -> str:
        """Serialise it, for a run's `tokenizer.json`; see `from_json`."""
        ...


@dataclass(frozen=True)
class CharTokenizer:
    """Char-level: the id of a character is its index in the sorted set of the corpus's characters.

    Args:
        vocabulary: the characters, sorted, without repeats.
        end_of_text: len(vocabulary), the id after them; None: no end-of-text token.

    Source: lecture, "tokenization".
    """

    vocabulary: str
    end_of_text: int | None = None

    cuttable = True

    @classmethod
    def fit(cls, text: str) -> "CharTokenizer":
        """Make the vocabulary from the characters of `text`."""
        return cls("".join(map(chr, np.unique(_code_points(text)))))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary) + (self.end_of_text is not None)

    @cached_property
    def _codes(self) -> np.ndarray:
        return _code_points(self.vocabulary)

    @cached_property
    def _places(self) -> np.ndarray:
        """Lookup table from code point to id, -1 if unknown; faster than a search."""
        places = np.full(0x110000, -1, np.int32)
        places[self._codes] = np.arange(len(self._codes))
        return places

    def encode(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """Encode `text`.

        Args:
            text: any text.
            unknown: what to do with characters that the vocabulary lacks: raise an error that
                lists them, replace each (by the first of U+FFFD, "?", space and newline that is
                in the vocabulary), or skip them.

        Returns:
            (N,) int32 ids in [0, vocab_size).

        Raises:
            UserError: unknown characters, with their positions.
        """
        ids = self._places[_code_points(text)]
        known = ids >= 0
        if not known.all():
            if unknown == "error":
                raise UnknownCharacters(self._describe(text, np.flatnonzero(~known)))
            if unknown == "skip":
                ids = ids[known]
            else:
                ids[~known] = self._replacement()
        return ids

    def encode_batch(self, texts: list[str], unknown: Unknown = "error") -> list[np.ndarray]:
        """See `Tokenizer`."""
        if unknown != "error":
            return [self.encode(text, unknown) for text in texts]
        # All at once, so that an error counts the unknown characters of all texts.
        places = np.cumsum([len(text) for text in texts])[:-1]
        return np.split(self.encode("".join(texts)), places)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of (N,) ids, the exact inverse of `encode`."""
        return join(np.asarray(ids, np.int64), self.end_of_text, self._decode)

    def _decode(self, ids: np.ndarray) -> str:
        codes = self._codes[ids].astype("<u4")
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def count_bytes(self, ids: np.ndarray) -> int:
        """See `Tokenizer`."""
        lengths = [len(c.encode("utf-8", "surrogatepass")) for c in self.vocabulary]
        return int(np.array([*lengths, 0])[ids].sum())  # 0 for the end-of-text token

    def to_json(self) -> str:
        """Serialise it, for a run's `tokenizer.json`; see `from_json`."""
        # A list, not one string: JSON would join two lone surrogates into one character.
        values: dict[str, Any] = {"type": "char", "vocabulary": list(self.vocabulary)}
        if self.end_of_text is not None:
            values["end_of_text"] = self.end_of_text
        return json.dumps(values) + "\n"

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
            f"{len(positions)} unknown characters ({shown}{more}), not in the tokenizer's "
            f"vocabulary of {self.vocab_size}"
        )


@dataclass(frozen=True)
class ByteTokenizer:
    """Byte-level: the ids are the bytes of UTF-8, so it encodes any text without training.

    Args:
        end_of_text: 256; None: no end-of-text token.
    """

    end_of_text: int | None = None

    cuttable = True

    @property
    def vocab_size(self) -> int:
        return 256 + (self.end_of_text is not None)

    def encode(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """See `Tokenizer`; only lone surrogates are unknown."""
        return np.frombuffer(scalars(text, unknown).encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str], unknown: Unknown = "error") -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [self.encode(text, unknown) for text in texts]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of (N,) ids, with U+FFFD for bytes that are not valid UTF-8."""
        decode = lambda part: part.astype(np.uint8).tobytes().decode("utf-8", "replace")
        return join(np.asarray(ids, np.int64), self.end_of_text, decode)

    def count_bytes(self, ids: np.ndarray) -> int:
        """See `Tokenizer`."""
        return int((np.asarray(ids) < 256).sum())

    def to_json(self) -> str:
        """See `Tokenizer`."""
        end = {} if self.end_of_text is None else {"end_of_text": self.end_of_text}
        return json.dumps({"type": "byte", **end}) + "\n"


@dataclass(frozen=True)
class IdTokenizer:
    """Ids written as numbers, "12 7 3": for batches that stand for no text.

    Args:
        vocab_size: V; ids are 0 .. V - 1.
    """

    vocab_size: int
    end_of_text: int | None = None
    cuttable: bool = False

    def encode_batch(self, texts: list[str], unknown: Unknown = "error") -> list[np.ndarray]:
        """`encode` each text."""
        return [self.encode(text, unknown) for text in texts]

    def encode(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """Numbers between blanks to (N,) int32 ids.

        Raises:
            UserError: something else than such numbers.
        """
        words = text.split()
        good = [word for word in words if word.isdecimal() and int(word) < self.vocab_size]
        if len(good) < len(words) and unknown != "skip":
            raise UserError(
                f"{text[:40]!r}: expected ids below {self.vocab_size} between blanks, as in 1 2 3"
            )
        return np.array([int(word) for word in good], np.int32)

    def decode(self, ids: Any) -> str:
        """(N,) ids to numbers, each followed by a blank."""
        return "".join(f"{int(i)} " for i in ids)

    def count_bytes(self, ids: Any) -> int:
        """Bytes of the decoded text."""
        return len(self.decode(ids))

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps({"type": "ids", "vocab_size": self.vocab_size})


def from_json(text: str) -> Tokenizer:
    """Make a tokenizer from the text of a run's `tokenizer.json`.

    Raises:
        UserError: not JSON, an unknown type, an unusable vocabulary, or a missing library.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    kind = values.get("type") if isinstance(values, dict) else None
    around = (values.get("before", ()), values.get("after", ())) if kind else ()
    if kind == "hf":
        return HFTokenizer(json.dumps(values.get("tokenizer")), *around)
    if kind == "sentencepiece":
        try:
            model = base64.b64decode(values["model"], validate=True)
            return SentencePieceTokenizer(model, *around)
        except (KeyError, TypeError, binascii.Error):
            raise UserError("the SentencePiece model must be in base64") from None
    if kind == "ids":
        size = values.get("vocab_size")
        if type(size) is not int or not 0 < size < 2**31:
            raise UserError(f"vocab_size must be a number above 0, got {size!r}")
        return IdTokenizer(size)
    if kind == "byte":
        return ByteTokenizer(_end_of_text(values, 256))
    if kind != "char":
        raise UserError(
            'expected {"type": ...} with char, byte, hf or sentencepiece; this gptjax supports no '
            "other tokenizer"
        )
    vocabulary = values.get("vocabulary")
    if not isinstance(vocabulary, list) or not vocabulary:
        raise UserError("the vocabulary must be a list of at least one character")
    if not all(isinstance(c, str) and len(c) == 1 for c in vocabulary):
        raise UserError("each entry of the vocabulary must be a string of one character")
    if vocabulary != sorted(set(vocabulary)):
        raise UserError("the vocabulary must be sorted, without repeats")
    return CharTokenizer("".join(vocabulary), _end_of_text(values, len(vocabulary)))


def _end_of_text(values: dict[str, Any], expected: int) -> int | None:
    end = values.get("end_of_text")
    if end is not None and (type(end) is not int or end != expected):
        raise UserError(f"end_of_text must be {expected}, the id after all others, not {end!r}")
    return end


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
