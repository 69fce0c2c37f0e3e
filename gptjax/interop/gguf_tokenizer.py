"""The tokenizer in a GGUF file's metadata, as a `tokenizer.json` of the tokenizers library.

gpt2   byte-level BPE; `tokenizer.ggml.pre` names how text is cut before it
llama  SentencePiece BPE: the scores of the tokens give the order of the merges
"""

import json
from collections.abc import Mapping
from typing import Any

from gptjax.errors import UserError, optional_import
from gptjax.generation.chat import ChatFormat
from gptjax.text import special_tokens
from gptjax.text.subwords import HFTokenizer

PREFIX = "tokenizer.ggml."
KEYS = {  # that are understood, besides the ids of special tokens; any other key is refused
    *("model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
}
WITHOUT_EFFECT = {  # values of other keys that change nothing
    "add_sep_token": False,
    "remove_extra_whitespaces": False,
    "precompiled_charsmap": [],
}
# transformers' names of special tokens, for chat templates.
ROLES = dict(bos_token="bos", eos_token="eos", unk_token="unknown", pad_token="padding")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
DIGITS = {"type": "Digits", "individual_digits": True}
# How the families cut text into words, in the tokenizers library's syntax; Llama 3 and Qwen 2 are
# the same but for the length of numbers.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cut(pattern: str) -> list[dict[str, Any]]:
    """Pre-tokenizers that cut by a pattern and spell the words in bytes."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**split, "invert": False}, {**BYTE_LEVEL, "use_regex": False}]


LLAMA_3, QWEN_2 = _cut(WORDS % "{1,3}"), _cut(WORDS % "")
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {  # by llama.cpp's name
    "default": [BYTE_LEVEL],  # no name: GPT-2's own, as in transformers, if the tokens bear it out
    "gpt-2": [BYTE_LEVEL],
    "smollm": [DIGITS, BYTE_LEVEL],
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), LLAMA_3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN_2),
    "tekken": _cut(TEKKEN),
}
# Of these, llama.cpp takes a word that is a token for that token, without merging, and adds a BOS
# unless the file says otherwise; so do the tokenizers that they come from.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
COMPOSED = ("qwen2", "deepseek-r1-qwen")  # Qwen's composes characters first (NFC)
GEMMA = ("gemma", "gemma2", "gemma3")  # architectures


def read(values: Mapping[str, Any]) -> HFTokenizer:
    """Build the tokenizer, with the BOS and EOS that it puts around a text.

    Args:
        values: the file's metadata by key.

    Raises:
        UserError: no tokenizer, a kind, pre-tokenizer or key that is not supported, or a part that
            is missing or damaged.
    """
    found = {key.removeprefix(PREFIX): x for key, x in values.items() if key.startswith(PREFIX)}
    kind, pre = found.get("model"), found.get("pre", "default")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and str(pre) not in PRE_TOKENIZERS):
        raise UserError(
            f"the tokenizer {kind!r} with the pre-tokenizer {pre!r} is not supported; expected "
            f"'llama', or 'gpt2' with {' or '.join(map(repr, PRE_TOKENIZERS))}"
        )
    for key, value in found.items():
        if key not in KEYS and not key.endswith(("_token_id", "_token_ids")):
            if key not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[key]:
                raise UserError(f"{PREFIX}{key}={str(value)[:40]} is not supported")
    tokens = _list(found, "tokens", str)
    if kind == "llama" and values.get("general.architecture") in GEMMA:
        # Runs of spaces are stored as such; the text that is looked up has "▁" instead.
        tokens = ["▁" * len(t) if t.strip(" ") == "" else t for t in tokens]
    if repeated := len(tokens) - len(set(tokens)):
        raise UserError(f"{PREFIX}tokens has {repeated} tokens twice; the file is damaged")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    types = _list(found, "token_type", int, len(tokens)) if "token_type" in found else []
    form = _byte_level(pre) if kind == "gpt2" else _sentencepiece(values, found)
    if kind == "gpt2" or "merges" in found:
        merges = _list(found, "merges", str)
    else:
        scores = _list(found, "scores", float, len(tokens))
        if values.get("general.architecture") in GEMMA:  # merged in the order of the tokens
            scores = [float(-i) for i in range(len(tokens))]
        of_text = [not types or types[i] in (NORMAL, USER_DEFINED) for i in range(len(tokens))]
        merges = _merges(tokens, scores, of_text)
    bos = _around(found, "bos", len(tokens), kind == "llama" or pre in WHOLE_WORDS)
    eos = _around(found, "eos", len(tokens), False)
    unknown = _token_id(found, "unknown", len(tokens))
    if unknown is None and UNKNOWN in types:
        unknown = types.index(UNKNOWN)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    form |= {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": type_ == CONTROL, **flags}
            for i, type_ in enumerate(types)
            if type_ in (CONTROL, USER_DEFINED)
        ],
        "post_processor": special_tokens.template(*({tokens[i]: i for i in x} for x in (bos, eos))),
    }
    form["model"] |= {
        "type": "BPE",
        "unk_token": None if unknown is None else tokens[unknown],
        "vocab": vocabulary,
        "merges": merges,
    }
    try:
        tokenizer = HFTokenizer(json.dumps(form), bos, eos)
    except UserError as error:
        raise UserError(f"its tokenizer is not usable: {error}") from None
    if kind == "gpt2" and pre == "default":
        _check_words(tokenizer, [i for i in vocabulary.values() if not types or types[i] == NORMAL])
    return tokenizer


def read_chat(values: Mapping[str, Any]) -> ChatFormat | None:
    """What the file says of conversations; None: nothing.

    Args:
        values: the file's metadata by key, which `read` has accepted.

    Raises:
        UserError: a chat template that is no text.
    """
    found = {key.removeprefix(PREFIX): x for key, x in values.items() if key.startswith(PREFIX)}
    tokens, template = found["tokens"], values.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError("tokenizer.chat_template is not text")
    ids = {role: _token_id(found, key, len(tokens)) for role, key in ROLES.items()}
    names = {role: tokens[id_] for role, id_ in ids.items() if id_ is not None}
    ends = (_token_id(found, key, len(tokens)) for key in ("eos", "eot", "eom"))
    stop = tuple(dict.fromkeys(id_ for id_ in ends if id_ is not None))
    return ChatFormat(template, names, stop) if stop or template is not None else None


def _check_words(tokenizer: HFTokenizer, ids: list[int]) -> None:
    """Check that GPT-2's way to cut text suits a vocabulary whose file does not name one.

    Each of GPT-2's own tokens lies inside a word; of a Llama 3's or a Qwen's many do not, such as
    ".get".

    Raises:
        UserError: it does not.
    """
    cutter = optional_import("tokenizers").pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [
        text for i in ids if "\N{REPLACEMENT CHARACTER}" not in (text := tokenizer.decode([i]))
    ]
    across = [text for text in texts if len(cutter.pre_tokenize_str(text)) > 1]
    if len(across) > len(texts) / 100:
        raise UserError(
            f"it does not name its pre-tokenizer ({PREFIX}pre), and GPT-2's would never make "
            f"{len(across):,} of its tokens, such as {across[0]!r}; convert the model again"
        )


def _byte_level(pre: str) -> dict[str, Any]:
    """The parts of a byte-level `tokenizer.json` around its vocabulary."""
    return {
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "decoder": BYTE_LEVEL,
        "model": {"ignore_merges": pre in WHOLE_WORDS},
    }


def _sentencepiece(values: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The same for SentencePiece: "▁" for a space, and a space before the text, as transformers
    has it (none before a text that begins with one)."""
    gemma = values.get("general.architecture") in GEMMA
    prefix = not gemma and bool(found.get("add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *[strip] * prefix]
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"byte_fallback": True, "fuse_unk": True},
    }


def _merges(tokens: list[str], scores: list[float], of_text: list[bool]) -> list[list[str]]:
    """The merges that scores imply: each way to make a token of two, best score first. Tokens that
    are no text, such as "<s>", are not made."""
    known = set(tokens)
    found = [
        (-score, -at, at - len(token), [token[:at], token[at:]])
        for token, score, made in zip(tokens, scores, of_text, strict=True)
        for at in range(1, len(token))
        if made and token[:at] in known and token[at:] in known
    ]
    return [pair for *_, pair in sorted(found, key=lambda x: x[:3])]


def _around(found: Mapping[str, Any], name: str, vocab_size: int, usual: bool) -> tuple[int, ...]:
    """The BOS or EOS, if it goes around a text; `usual` is what a file without the key means."""
    said, id_ = found.get(f"add_{name}_token"), _token_id(found, name, vocab_size)
    if said and id_ is None:
        raise UserError(
            f"{PREFIX}add_{name}_token is true, and there is no {PREFIX}{name}_token_id"
        )
    return (id_,) if id_ is not None and (usual if said is None else said) else ()


def _token_id(found: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    id_ = found.get(f"{name}_token_id")
    if id_ is not None and (type(id_) is not int or not 0 <= id_ < vocab_size):
        raise UserError(f"{PREFIX}{name}_token_id={id_!r} is not an id below {vocab_size}")
    return id_


def _list(found: Mapping[str, Any], name: str, kind: type, length: int | None = None) -> Any:
    """A list of the metadata, of that type and length.

    Raises:
        UserError: it is missing, or something else.
    """
    value = found.get(name)
    if value is None:
        raise UserError(
            f"it has no {PREFIX}{name}, so its tokenizer cannot be made; convert it again"
        )
    if not isinstance(value, list) or not all(type(x) is kind for x in value):
        raise UserError(f"{PREFIX}{name} is damaged: expected a list of {kind.__name__}")
    if len(value) != length and (length is not None or not value):
        raise UserError(f"{PREFIX}{name} has {len(value)} entries, expected {length or 'some'}")
    return value
