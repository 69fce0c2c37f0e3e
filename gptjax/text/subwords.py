"""Subword tokenizers, through the Hugging Face tokenizers and SentencePiece libraries.

Both come with the extra `text` and are imported only when such a tokenizer is made.
"""

import base64
import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from gptjax.errors import UserError, optional_import

Unknown = Literal["error", "replace", "skip"]
END_OF_TEXT = "<|endoftext|>"  # the end-of-text token, decoded
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # its name in other tokenizers


@dataclass(frozen=True)
class HFTokenizer:
    """A tokenizer in Hugging Face's format: GPT-2's, one trained here, or any other.

    Args:
        source: the text of a `tokenizer.json`.
        before, after: ids that go before and after each text (see `special_tokens.py`).

    Raises:
        UserError: not a valid `tokenizer.json`, a tokenizer that silently drops unknown
            characters, ids outside of the vocabulary, or the library is missing.
    """

    source: str
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        try:
            values = json.loads(self.source)
            object.__setattr__(self, "source", json.dumps(values))  # normalised, for ==
            _ = self._library, values["model"]["type"]
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"not a Hugging Face tokenizer.json: {_line(error)}") from None
        if self._unknown_id is None and not self._takes_any_byte:
            raise UserError(
                "this tokenizer.json silently drops unknown characters: it has neither an unknown "
                "token nor a token for every byte; use another one"
            )
        _check_around(self)

    @cached_property
    def _library(self) -> Any:
        library = optional_import("tokenizers").Tokenizer.from_str(self.source)
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True  # encode "<|endoftext|>" in text as 13 characters
        return library

    @cached_property
    def _values(self) -> dict[str, Any]:
        return json.loads(self.source)

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self._library.get_vocab(with_added_tokens=True)

    @cached_property
    def _unknown_id(self) -> int | None:
        model = self._values["model"]
        if isinstance(model.get("unk_id"), int):  # Unigram
            return model["unk_id"]
        return self._vocabulary.get(model.get("unk_token") or "")

    @cached_property
    def _takes_any_byte(self) -> bool:
        alphabet = optional_import("tokenizers").pre_tokenizers.ByteLevel.alphabet()
        fallback = {f"<0x{byte:02X}>" for byte in range(256)}
        if self._values["model"].get("byte_fallback"):
            return fallback <= self._vocabulary.keys()
        return set(alphabet) <= self._vocabulary.keys()

    @property
    def vocab_size(self) -> int:
        return max(self._vocabulary.values()) + 1

    @property
    def end_of_text(self) -> int | None:
        return self._end_of_text

    @cached_property
    def _end_of_text(self) -> int | None:
        added = {token["content"]: token["id"] for token in self._values.get("added_tokens") or []}
        return next((added[name] for name in END_NAMES if name in added), None)

    def piece(self, id_: int) -> str:
        """A token's name."""
        return self._library.id_to_token(id_)

    def token_id(self, name: str) -> int | None:
        """A token's id by its name; None: there is none of that name."""
        return self._library.token_to_id(name)

    @property
    def cuttable(self) -> bool:
        """Tested on examples: some tokenizers prepend a space, and some merge across words."""
        words = ("word", "Wörter", "文字", "naïve", "x")
        spaces = (" ", "\n", "\n\n", "  \n\t ", "\r\n", "\u00a0")
        return all(
            self._ends_at(len(a), a + space + b)
            and [*self.encode(a), *self.encode(space + b)] == self.encode(a + space + b).tolist()
            for a, b in zip(words, words[1:] + words[:1], strict=True)
            for space in spaces
        )

    def _ends_at(self, place: int, text: str) -> bool:
        """Whether the pre-tokenizer cuts there, so that no token can cross that position."""
        cutter = self._library.pre_tokenizer
        return cutter is not None and any(
            end == place for _, (_, end) in cutter.pre_tokenize_str(text)
        )

    def encode(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """See `Tokenizer`; "replace" gives the tokenizer's own unknown token."""
        return self.encode_batch([text], unknown)[0]

    def encode_batch(self, texts: list[str], unknown: Unknown = "error") -> list[np.ndarray]:
        """See `Tokenizer`; parallel over the cores."""
        texts = [scalars(text, unknown) for text in texts]
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        batch = [np.array(encoding.ids, np.int32) for encoding in encodings]
        if self._unknown_id is None or self._takes_any_byte:
            return batch
        return [known(ids, self._unknown_id, unknown) for ids in batch]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """See `Tokenizer`."""
        decode = lambda part: self._library.decode(part.tolist(), skip_special_tokens=False)
        return join(np.asarray(ids, np.int64), self.end_of_text, decode)

    def count_bytes(self, ids: np.ndarray) -> int:
        """See `Tokenizer`."""
        if (self._values.get("decoder") or {}).get("type") != "ByteLevel":
            return _decoded_bytes(self, ids)
        return int(self._byte_lengths[ids].sum())

    @cached_property
    def _byte_lengths(self) -> np.ndarray:
        """(V,) bytes in each token: byte-level BPE spells a token with one character per byte."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, place in self._vocabulary.items():
            lengths[place] = len(token)
        for token in self._values.get("added_tokens") or []:  # these are spelled literally
            lengths[token["id"]] = len(token["content"].encode("utf-8"))
        lengths[[*self.before, *self.after]] = 0
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0
        return lengths

    def to_json(self) -> str:
        """See `Tokenizer`."""
        return json.dumps({"type": "hf", "tokenizer": self._values, **_around(self)}) + "\n"


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece model. Many of them normalise spaces, so a round trip may not be exact.

    Args:
        model: the bytes of a `.model` file.
        before, after: ids that go before and after each text (see `special_tokens.py`).

    Raises:
        UserError: not a SentencePiece model, ids outside of the vocabulary, or the library is
            missing.
    """

    model: bytes
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        try:
            _ = self._library
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"not a SentencePiece model: {_line(error)}") from None
        _check_around(self)

    @cached_property
    def _library(self) -> Any:
        library = optional_import("sentencepiece").SentencePieceProcessor()
        library.LoadFromSerializedProto(self.model)
        return library

    @property
    def vocab_size(self) -> int:
        return self._library.vocab_size()

    @property
    def end_of_text(self) -> int | None:
        end = self._library.eos_id()
        return end if end >= 0 else None

    @property
    def cuttable(self) -> bool:
        return False  # it prepends a space to each text

    def piece(self, id_: int) -> str:
        """A token's name."""
        return self._library.IdToPiece(id_)

    def special_id(self, name: Literal["bos", "eos"], piece: Any) -> int | None:
        """Id of a piece, or of the model's own BOS or EOS if `piece` is None; None: no such one."""
        library = self._library
        own = {"bos": library.bos_id, "eos": library.eos_id}[name]()
        id_ = own if piece is None else library.PieceToId(str(piece))
        return id_ if id_ >= 0 and piece in (None, library.IdToPiece(id_)) else None

    def encode(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """See `Tokenizer`; "replace" gives the model's own unknown token."""
        return self.encode_batch([text], unknown)[0]

    def encode_batch(self, texts: list[str], unknown: Unknown = "error") -> list[np.ndarray]:
        """See `Tokenizer`; parallel over the cores."""
        texts = [scalars(text, unknown) for text in texts]
        threads = min(len(texts), os.cpu_count() or 1)
        batch = self._library.encode(texts, num_threads=threads) if texts else []
        unknown_id = self._library.unk_id()
        return [known(np.array(ids, np.int32), unknown_id, unknown) for ids in batch]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """See `Tokenizer`."""
        decode = lambda part: self._library.decode(part.tolist())
        return join(np.asarray(ids, np.int64), self.end_of_text, decode)

    def count_bytes(self, ids: np.ndarray) -> int:
        """See `Tokenizer`."""
        return _decoded_bytes(self, ids)

    def to_json(self) -> str:
        """See `Tokenizer`."""
        model = base64.b64encode(self.model).decode("ascii")
        return json.dumps({"type": "sentencepiece", "model": model, **_around(self)}) + "\n"


def _check_around(tokenizer: HFTokenizer | SentencePieceTokenizer) -> None:
    """Check the ids that go around a text, and keep them as tuples.

    Raises:
        UserError: one is not an id of the vocabulary.
    """
    for name in ("before", "after"):
        ids, V = getattr(tokenizer, name), tokenizer.vocab_size
        fine = isinstance(ids, list | tuple) and all(type(i) is int and 0 <= i < V for i in ids)
        if not fine:
            raise UserError(f"tokens {name} each text: expected a list of ids below {V}, not {ids}")
        object.__setattr__(tokenizer, name, tuple(ids))


def _around(tokenizer: HFTokenizer | SentencePieceTokenizer) -> dict[str, list[int]]:
    """The tokens around a text as JSON has them; nothing where there are none, as before 0.2."""
    found = {"before": list(tokenizer.before), "after": list(tokenizer.after)}
    return found if any(found.values()) else {}


def scalars(text: str, unknown: Unknown) -> str:
    """`text` with lone surrogates, which UTF-8 cannot encode, refused, replaced or skipped."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError as error:
        if unknown == "error":
            raise UserError(
                f"character {error.start} is {text[error.start]!r}, a lone surrogate, which UTF-8 "
                f"cannot encode; remove it, or choose replace or skip"
            ) from None
    replacement = "\N{REPLACEMENT CHARACTER}" if unknown == "replace" else ""
    return "".join(replacement if "\ud800" <= c <= "\udfff" else c for c in text)


def known(ids: np.ndarray, unknown_id: int, unknown: Unknown) -> np.ndarray:
    """`ids` with the unknown token refused, kept ("replace") or skipped."""
    found = ids == unknown_id
    if unknown == "replace" or not found.any():
        return ids
    if unknown == "error":
        raise UserError(
            f"{found.sum()} of {len(ids)} tokens are the unknown token (the first at position "
            f"{found.argmax()}); remove the characters that the tokenizer lacks, or choose replace "
            f"or skip"
        )
    return ids[~found]


def join(ids: np.ndarray, end: int | None, decode: Any) -> str:
    """Decode ids, with END_OF_TEXT for each id `end`."""
    if end is None or not len(places := np.flatnonzero(ids == end)):
        return decode(ids)
    parts = np.split(np.delete(ids, places), places - np.arange(len(places)))
    return END_OF_TEXT.join(decode(part) for part in parts)


def _decoded_bytes(tokenizer: HFTokenizer | SentencePieceTokenizer, ids: np.ndarray) -> int:
    """UTF-8 bytes of the decoded text, without tokens that stand for none."""
    end = -1 if tokenizer.end_of_text is None else tokenizer.end_of_text
    ids = np.asarray(ids)
    others = [i for i in (*tokenizer.before, *tokenizer.after) if i != end]
    text = tokenizer.decode(ids[~np.isin(ids, others)])
    return len(text.encode("utf-8")) - int((ids == end).sum()) * len(END_OF_TEXT)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
