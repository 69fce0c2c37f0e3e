"""Read and write tokenizers in transformers' file formats."""

import json
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.runs.files import read_bytes, read_file
from gptjax.text import special_tokens
from gptjax.text.choose import byte_letters
from gptjax.text.subwords import END_OF_TEXT, HFTokenizer, SentencePieceTokenizer
from gptjax.text.tokenizers import CharTokenizer, Tokenizer

BYTES = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def read(folder: Path) -> Tokenizer | None:
    """Read the tokenizer in a model folder; None if there is none.

    Raises:
        UserError: it cannot be read, or is not supported.
    """
    if (path := folder / "tokenizer.json").exists():
        return read_file(path, _from_text)
    if (path := folder / "tokenizer.model").exists():
        try:
            return special_tokens.sentencepiece(read_bytes(path), folder)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return None


def _from_text(text: str) -> Tokenizer:
    """Parse a `tokenizer.json`; one that `write` made from a CharTokenizer gives it back."""
    values = json.loads(text)
    try:
        letters, ends = list(values["model"]["vocab"]), values["added_tokens"]
        ours = CharTokenizer("".join(letters), ends[0]["id"] if ends else None)
        if letters == sorted(ours.vocabulary) and values == _of_characters(ours):
            return ours
    except (KeyError, TypeError, IndexError):
        pass  # not one of ours
    return special_tokens.hf(text)


def write(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """The tokenizer's files for transformers, which give the same ids for any text ours encodes.

    Raises:
        UserError: its vocabulary has a lone surrogate.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {"tokenizer.model": tokenizer.model, **_bos_and_eos(tokenizer)}
    if isinstance(tokenizer, HFTokenizer):
        values = json.loads(tokenizer.source)
        if special_tokens.hf(tokenizer.source) != tokenizer:  # as in a run trained without them
            named = lambda ids: {tokenizer.piece(i): i for i in ids}
            before, after = named(tokenizer.before), named(tokenizer.after)
            values["post_processor"] = special_tokens.template(before, after)
    elif isinstance(tokenizer, CharTokenizer):
        values = _of_characters(tokenizer)
    else:
        values = _single(tokenizer, byte_letters(), BYTES, BYTES)
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
    }
    if (end := tokenizer.end_of_text) is not None:
        added = values.get("added_tokens") or []
        about["eos_token"] = next(token["content"] for token in added if token["id"] == end)
    if before := special_tokens.of(tokenizer)[0].tolist():
        about["bos_token"] = tokenizer.piece(before[-1])  # pyright: ignore
    try:
        return {
            "tokenizer.json": json.dumps(values, ensure_ascii=False).encode("utf-8"),
            "tokenizer_config.json": json.dumps(about, indent=2).encode("utf-8"),
        }
    except UnicodeEncodeError:
        raise UserError(
            "the tokenizer's vocabulary has a lone surrogate, which transformers cannot represent; "
            "train on a text without it"
        ) from None


def _bos_and_eos(tokenizer: SentencePieceTokenizer) -> dict[str, bytes]:
    """The file that makes transformers add the tokens around a text, if there are any."""
    about: dict[str, Any] = {}
    for name, ids in (("bos", tokenizer.before), ("eos", tokenizer.after)):
        if ids:
            about |= {f"add_{name}_token": True, f"{name}_token": tokenizer.piece(ids[0])}
    return {"tokenizer_config.json": json.dumps(about, indent=2).encode()} if about else {}


def _of_characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    return _single(tokenizer, list(tokenizer.vocabulary), None, {"type": "Fuse"})


def _single(tokenizer: Tokenizer, letters: list[str], cutter: Any, decoder: Any) -> dict[str, Any]:
    """A `tokenizer.json` for single characters: BPE without merges."""
    end = tokenizer.end_of_text
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ends = [] if end is None else [{"id": end, "content": END_OF_TEXT, "special": True, **flags}]
    return {
        "version": "1.0",
        "added_tokens": ends,
        "normalizer": None,
        "pre_tokenizer": cutter,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "vocab": {letter: i for i, letter in enumerate(letters)},
            "merges": [],
        },
    }
