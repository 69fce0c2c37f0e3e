"""Read and write what transformers' files say of conversations: chat template, stop tokens."""

import json
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.generation.chat import ChatFormat
from gptjax.runs.files import read_file
from gptjax.text.subwords import HFTokenizer
from gptjax.text.tokenizers import Tokenizer

TEMPLATE, ABOUT = "chat_template.jinja", "tokenizer_config.json"
GENERATION = "generation_config.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read(folder: Path, tokenizer: Tokenizer | None) -> ChatFormat | None:
    """What a model folder says of conversations; None: nothing.

    The template is that of chat_template.jinja, or else of tokenizer_config.json; a text ends with
    the eos_token_id of generation_config.json or config.json, or with the tokenizer's eos_token,
    and begins with its bos_token or their bos_token_id.

    Raises:
        UserError: a file that is damaged, or a template that is no text.
    """
    about = _object(folder / ABOUT)
    names = {}
    for role, value in (_object(folder / "special_tokens_map.json") | about).items():
        value = value.get("content") if isinstance(value, dict) else value
        if role in ROLES and isinstance(value, str):
            names[role] = value
    template = about.get("chat_template")
    if (folder / TEMPLATE).exists():
        template = read_file(folder / TEMPLATE, str)
    elif isinstance(template, list):  # several by name
        named = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / ABOUT}: chat_template is not text")
    stop, V = [], tokenizer.vocab_size if tokenizer else 0
    is_id = lambda x: type(x) is int and 0 <= x < V
    for values in (_object(folder / GENERATION), _object(folder / "config.json")):
        ids, bos = values.get("eos_token_id"), values.get("bos_token_id")
        stop += ids if isinstance(ids, list) else [ids]
        if isinstance(tokenizer, HFTokenizer) and type(bos) is int and is_id(bos):
            names.setdefault("bos_token", tokenizer.piece(bos))
    if isinstance(tokenizer, HFTokenizer) and "eos_token" in names:
        stop.append(tokenizer.token_id(names["eos_token"]))
    stop = tuple(dict.fromkeys(filter(is_id, stop)))
    return ChatFormat(template, names, stop) if template is not None or stop else None


def write(form: ChatFormat, files: dict[str, bytes]) -> dict[str, bytes]:
    """Add the chat template and the stop tokens to a model's files, by name."""
    about = json.loads(files.get(ABOUT, b"{}")) | dict(form.special_tokens)
    added = {ABOUT: json.dumps(about, indent=2).encode()}
    if form.template is not None:
        added[TEMPLATE] = form.template.encode()
    if form.stop_tokens:
        added[GENERATION] = json.dumps({"eos_token_id": list(form.stop_tokens)}, indent=2).encode()
    return files | added


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    values = read_file(path, json.loads) if path.exists() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: expected a JSON object")
    return values
