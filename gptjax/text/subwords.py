"""Tokens longer than a character, by the libraries that know them: Hugging Face's, SentencePiece.

Both come with the extra `text` and are imported when a tokenizer of theirs is made, not before.
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
END_OF_TEXT = "<|endoftext|>"  # how the token that ends a document reads when it is decoded
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # what other tokenizers call it


@dataclass(frozen=True)
class HFTokenizer:
    """A tokenizer in Hugging Face's format: GPT-2's, one trained here, or anybody's.

    Args:
        source: the text of a `tokenizer.json`.

    Raises:
        UserError: not such a text, a tokenizer that drops what it does not know without a word,
            or the library is missing.
    """

    source: str

    def __post_init__(self) -> None:
        try:
            values = json.loads(self.source)
            object.__setattr__(self, "source", json.dumps(values))  # equal if they mean the same
            _ = self._library, values["model"]["type"]
        except UserError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"not a tokenizer.json of Hugging Face: {_line(error)}") from None
        if self._unknown_id is None and not self._takes_any_byte:
            raise UserError(
                "this tokenizer.json drops characters that it does not know: it has neither an "
                "unknown token nor a token for each byte; take another"
            )

    @cached_property
    def _library(self) -> Any:
        library = optional_import("tokenizers").Tokenizer.from_str(self.source)
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True  # in a text, <|endoftext|> is thirteen characters
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

    @property
    def cuttable(self) -> bool:
        """Found by trying: some tokenizers put a space first, some join words."""
        words = ("word", "Wörter", "文字", "naïve", "x")
        spaces = (" ", "\n", "\n\n", "  \n\t ", "\r\n", "\u00a0")
        return all(
            self._ends_at(len(a), a + space + b)
            and [*self.encode(a), *self.encode(space + b)] == self.encode(a + space + b).tolist()
            for a, b in zip(words, words[1:] + words[:1], strict=True)
            for space in spaces
        )

    def _ends_at(self, place: int, text: str) -> bool:
        """Whether no token can reach over that place."""
        cutter = self._library.pre_tokenizer
        return cutter is not None and any(
            end == place for _, (_, end) in cutter.pre_tokenize_str(text)
        )

    def encode(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """See `Tokenizer`; "replace" gives the tokenizer's own unknown token."""
        return self.encode_batch([text], unknown)[0]

    def encode_batch(self, texts: list[str], unknown: Unknown = "error") -> list[np.ndarray]:
        """See `Tokenizer`; on all cores."""
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
        """(V,) bytes of each token: in this format a token has one character for each byte."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, place in self._vocabulary.items():
            lengths[place] = len(token)
        for token in self._values.get("added_tokens") or []:  # these are written as they are
            lengths[token["id"]] = len(token["content"].encode("utf-8"))
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0
        return lengths

    def to_json(self) -> str:
        """See `Tokenizer`."""
        return json.dumps({"type": "hf", "tokenizer": self._values}) + "\n"


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece model. Many of them change spaces, so a round trip may not be exact.

    Args:
        model: the bytes of a `.model` file.

    Raises:
        UserError: not such a file, or the library is missing.
    """

    model: bytes

    def __post_init__(self) -> None:
        try:
            _ = self._library
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"not a SentencePiece model: {_line(error)}") from None

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
        return False  # it puts a space before each text

    def encode(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """See `Tokenizer`; "replace" gives the model's own unknown token."""
        return self.encode_batch([text], unknown)[0]

    def encode_batch(self, texts: list[str], unknown: Unknown = "error") -> list[np.ndarray]:
        """See `Tokenizer`; on all cores."""
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
        return json.dumps({"type": "sentencepiece", "model": model}) + "\n"


def scalars(text: str, unknown: Unknown) -> str:
    """`text` without lone surrogates, which UTF-8 cannot hold: refused, replaced or skipped."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError as error:
        if unknown == "error":
            raise UserError(
                f"character {error.start} is {text[error.start]!r}, half of a surrogate pair, "
                f"which no UTF-8 text holds; remove it, or choose replace or skip"
            ) from None
    with_what = "\N{REPLACEMENT CHARACTER}" if unknown == "replace" else ""
    return "".join(with_what if "\ud800" <= c <= "\udfff" else c for c in text)


def known(ids: np.ndarray, unknown_id: int, unknown: Unknown) -> np.ndarray:
    """Ids with the unknown ones refused, kept as they are, or skipped."""
    found = ids == unknown_id
    if unknown == "replace" or not found.any():
        return ids
    if unknown == "error":
        raise UserError(
            f"{found.sum()} of {len(ids)} tokens are unknown to the tokenizer (the first is token "
            f"{found.argmax()}); remove what it does not know, or choose replace or skip"
        )
    return ids[~found]


def join(ids: np.ndarray, end: int | None, decode: Any) -> str:
    """The text of ids, with END_OF_TEXT where documents end."""
    if end is None or not len(places := np.flatnonzero(ids == end)):
        return decode(ids)
    parts = np.split(np.delete(ids, places), places - np.arange(len(places)))
    return END_OF_TEXT.join(decode(part) for part in parts)


def _decoded_bytes(tokenizer: HFTokenizer | SentencePieceTokenizer, ids: np.ndarray) -> int:
    """UTF-8 bytes of the text of ids, without the ends of documents."""
    ends = int((ids == tokenizer.end_of_text).sum()) if tokenizer.end_of_text is not None else 0
    return len(tokenizer.decode(ids).encode("utf-8")) - ends * len(END_OF_TEXT)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
