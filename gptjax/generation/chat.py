"""Chat templates: a conversation as the token ids that a model was trained on.

Ids are those of transformers' `apply_chat_template(messages, add_generation_prompt=True,
sanitize_control_tokens=True)`: special tokens that the template writes become their ids, while
those in a message are read as plain text, so that nobody can forge a turn by typing "<|im_end|>".
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.errors import UserError, optional_import
from gptjax.text import special_tokens, stream
from gptjax.text.subwords import HFTokenizer
from gptjax.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from gptjax.runs.loaded import LoadedRun

RENDER = Path(__file__).with_name("render_chat.py")
LONGEST_WAIT = 60  # seconds of the clock, of which the process itself may compute five
MARKS = range(0xF0000, 0xFFFFE)  # private characters, of which two go around a forged token


@dataclass(frozen=True)
class ChatFormat:
    """What a model's files say of conversations, kept in a run's `chat.json`.

    Args:
        template: in Jinja; None: the model has none.
        special_tokens: that the template names: {"bos_token": "<s>"}.
        stop_tokens: ids that end an answer or a text.
    """

    template: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    stop_tokens: tuple[int, ...] = ()

    def to_json(self) -> str:
        """The text of `chat.json`."""
        values = {
            "template": self.template,
            "special_tokens": dict(self.special_tokens),
            "stop_tokens": list(self.stop_tokens),
        }
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ChatFormat":
        """Read it back.

        Raises:
            UserError: it is something else.
        """
        try:
            values = json.loads(text)
            template, names, stop = (
                values[key] for key in ("template", "special_tokens", "stop_tokens")
            )
            fine = (
                (template is None or isinstance(template, str))
                and all(isinstance(x, str) for pair in names.items() for x in pair)
                and all(type(x) is int and x >= 0 for x in stop)
            )
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            fine = False
        if not fine:
            raise UserError(
                'a run\'s chat.json is damaged: expected {"template": text or null, '
                '"special_tokens": names and texts, "stop_tokens": ids}'
            )
        return cls(template, names, tuple(stop))


@dataclass(frozen=True)
class ChatTemplate:
    """A model's way to write a conversation.

    Args:
        source: the template, in Jinja.
        special_tokens: see `ChatFormat`.
        tokenizer: of the model.

    Raises:
        UserError: a tokenizer without special tokens that a template can write.
    """

    source: str
    special_tokens: Mapping[str, str]
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, HFTokenizer):
            raise UserError(
                "a chat template needs a tokenizer.json, and this run's tokenizer is another one; "
                "import the model from a folder that has that file"
            )

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation, and the beginning of the answer, as text.

        Args:
            messages: {"role": "system", "user" or "assistant", "content": text} in order.

        Raises:
            UserError: not such messages, ones that the template refuses, a template that fails or
                takes too much, or no package minijinja.
        """
        return self._render(_checked(messages))

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The (N,) int32 ids of a conversation, after which the answer begins.

        Args:
            messages: see `render`.

        Raises:
            UserError: see `render`; characters that the tokenizer lacks; no token at all.
        """
        messages = _checked(messages)
        for message in messages:
            self.tokenizer.encode(message["content"])  # refuses what it lacks
        taken = set(self.source).union(*(x for message in messages for x in message.values()))
        free = (mark for mark in map(chr, MARKS) if mark not in taken)
        if (start := next(free, None)) is None or (end := next(free, None)) is None:
            raise UserError("the messages hold every private character of Unicode; leave some out")
        control = re.compile("|".join(map(re.escape, self._control_tokens)) or "(?!)")
        marked = [
            {key: control.sub(rf"{start}\g<0>{end}", value) for key, value in message.items()}
            for message in messages
        ]
        text = self._render(marked)
        # Text, then by turns a control token that stood in a message (None for a lone mark), text.
        pieces = re.split(f"{start}({control.pattern}){end}|[{start}{end}]", text)
        ids, newline = _ids(self._whole, pieces[0]), _ids(self._whole, "\n")
        for i, piece in enumerate(pieces[1:], start=1):
            library = self._plain if i % 2 else self._whole
            part = _ids_within(library, piece or "", newline)
            if i % 2 and self._whole.token_to_id(piece or "") in part:
                raise UserError(
                    f"{piece!r} in a message cannot be told from the token of that name; leave it "
                    f"out"
                )
            ids += part
        if not ids:
            raise UserError("the chat template makes no token of these messages; give others")
        return np.array(ids, np.int32)

    @cached_property
    def _values(self) -> dict[str, Any]:
        assert isinstance(self.tokenizer, HFTokenizer)
        return json.loads(self.tokenizer.source) | {"padding": None, "truncation": None}

    @cached_property
    def _whole(self) -> Any:
        """The tokenizer that reads the names of special tokens as these tokens."""
        return optional_import("tokenizers").Tokenizer.from_str(json.dumps(self._values))

    @cached_property
    def _plain(self) -> Any:
        """The tokenizer that has no special or added token."""
        bare = {**self._values, "added_tokens": [], "post_processor": None}
        return optional_import("tokenizers").Tokenizer.from_str(json.dumps(bare))

    @cached_property
    def _control_tokens(self) -> list[str]:
        """Names of the tokens that only the template may write, longest first."""
        added = self._values.get("added_tokens") or []
        names = {
            token["content"]
            for token in added
            if token["special"]
            or (token["content"] in self.source and not token["content"].isspace())
        }
        return sorted(names, key=lambda name: (-len(name), name))

    def _render(self, messages: list[dict[str, str]]) -> str:
        optional_import("minijinja", "chat")
        values = {"messages": messages, "tools": None, "documents": None}
        values |= {"add_generation_prompt": True, **self.special_tokens}
        request = json.dumps({"template": self.source, "values": values}).encode()
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(RENDER)],
                input=request,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=LONGEST_WAIT,
            )
            answer = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError):  # killed, or too long an answer
            raise UserError(
                "the model's chat template was stopped: it takes more time or memory than a "
                "template should; use the model without it"
            ) from None
        if "error" in answer:
            raise UserError(f"the model's chat template refuses the messages: {answer['error']}")
        return answer["text"]


def template_of(run: "LoadedRun") -> ChatTemplate | None:
    """A run's chat template; None: its model is not one to chat with.

    Raises:
        UserError: a damaged `chat.json`, or a tokenizer without special tokens.
    """
    form = _format(run)
    if form is None or form.template is None:
        return None
    return ChatTemplate(form.template, form.special_tokens, run.tokenizer)


def stop_tokens(run: "LoadedRun") -> tuple[int, ...]:
    """Ids that end a text or an answer: the tokenizer's end of text, and the model's own.

    Raises:
        UserError: a damaged `chat.json`.
    """
    form, end = _format(run), run.tokenizer.end_of_text
    own = () if form is None else form.stop_tokens
    return tuple(dict.fromkeys([*own, *(() if end is None else (end,))]))


def first_tokens(run: "LoadedRun") -> np.ndarray:
    """The (N,) ids after which a text without a prompt begins: the model's BOS where its files
    name one, as in transformers, or else those of `text.stream.first_tokens`.

    Raises:
        UserError: a damaged `chat.json`.
    """
    form, before = _format(run), special_tokens.of(run.tokenizer)[0]
    if form and not len(before) and isinstance(run.tokenizer, HFTokenizer):
        if (bos := run.tokenizer.token_id(form.special_tokens.get("bos_token", ""))) is not None:
            return np.array([bos], np.int32)
    return stream.first_tokens(run.tokenizer)


def _format(run: "LoadedRun") -> ChatFormat | None:
    return None if run.chat is None else ChatFormat.from_json(run.chat)


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The messages without what is None, as transformers reads them.

    Raises:
        UserError: none, or one that is not text.
    """
    if not messages:
        raise UserError("a conversation needs at least one message")
    checked = []
    for i, message in enumerate(messages, start=1):
        found = {key: value for key, value in message.items() if value is not None}
        wrong = [key for key, value in found.items() if not isinstance(value, str)]
        if wrong or not {"role", "content"} <= found.keys():
            what = f"{wrong[0]} that is not text" if wrong else "no role or no content"
            raise UserError(
                f"message {i} has {what}; expected role (system, user or assistant) and content, "
                f"both text"
            )
        checked.append(found)
    return checked


def _ids(library: Any, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


def _ids_within(library: Any, text: str, newline: list[int]) -> list[int]:
    """Ids of a text that does not begin the conversation: read after a newline, or tokenizers of
    SentencePiece's kind would put a space before it."""
    ids = _ids(library, "\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else _ids(library, text)
