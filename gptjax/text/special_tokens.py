"""The tokens that a tokenizer puts around each text, such as a BOS before it.

`Tokenizer.encode` leaves them out, since it also encodes pieces of a text. A prompt, a text to
score and each document to train on get them, as transformers' `tokenizer(text)` gives them.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError, optional_import
from gptjax.runs.files import read_file
from gptjax.text.subwords import HFTokenizer, SentencePieceTokenizer
from gptjax.text.tokenizers import Tokenizer


def of(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The int32 ids before and after each text; none for a tokenizer without any."""
    before, after = getattr(tokenizer, "before", ()), getattr(tokenizer, "after", ())
    return np.array(before, np.int32), np.array(after, np.int32)


def around(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """(N,) ids of a whole text, with the tokens before and after it."""
    before, after = of(tokenizer)
    return np.concatenate([before, ids, after]) if len(before) or len(after) else ids


def without(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer that puts nothing around a text."""
    if isinstance(tokenizer, HFTokenizer | SentencePieceTokenizer) and any(map(len, of(tokenizer))):
        return replace(tokenizer, before=(), after=())
    return tokenizer


def template(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any] | None:
    """The post-processor of a `tokenizer.json` that puts these tokens, by name, around a text."""
    if not before and not after:
        return None
    special = lambda names: [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*special(before), text, *special(after)],
        "pair": [*special(before), text, other, *special(after)],
        "special_tokens": {
            name: {"id": name, "ids": [id_], "tokens": [name]}
            for name, id_ in {**before, **after}.items()
        },
    }


def hf(source: str) -> HFTokenizer:
    """The tokenizer of a `tokenizer.json`, with the tokens that its post-processor adds.

    Raises:
        UserError: not usable, or a post-processor that does more than add tokens around a text.
    """
    plain = HFTokenizer(source)
    library = optional_import("tokenizers").Tokenizer.from_str(source)
    library.no_padding()
    library.no_truncation()
    made = library.encode("a")
    inside = [i for i, sequence in enumerate(made.sequence_ids) if sequence is not None]
    start, end = (inside[0], inside[-1] + 1) if inside else (len(made.ids),) * 2
    if made.ids[start:end] != plain.encode("a", "replace").tolist():
        raise UserError(
            "the post-processor of this tokenizer.json changes the tokens of a text; expected one "
            "that puts tokens before and after it"
        )
    return HFTokenizer(source, tuple(made.ids[:start]), tuple(made.ids[end:]))


def sentencepiece(model: bytes, folder: Path) -> SentencePieceTokenizer:
    """A SentencePiece model, with the BOS and EOS that the folder's `tokenizer_config.json` asks
    for (add_bos_token, add_eos_token); without that file there are none.

    Args:
        model: the bytes of a `.model` file.
        folder: that it is in.

    Raises:
        UserError: a file that cannot be used, or a BOS or EOS that the model lacks.
    """
    plain, path = SentencePieceTokenizer(model), folder / "tokenizer_config.json"
    settings = read_file(path, json.loads) if path.exists() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged: expected a JSON object")
    around: list[tuple[int, ...]] = []
    for name in ("bos", "eos"):
        if not settings.get(f"add_{name}_token"):
            around.append(())
            continue
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if (found := plain.special_id(name, token)) is None:
            raise UserError(
                f"{path} says add_{name}_token, and the model has no token {token or name}; "
                f"correct {name}_token there, or set add_{name}_token to false"
            )
        around.append((found,))
    return SentencePieceTokenizer(model, *around)
