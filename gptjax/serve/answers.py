"""Answers in the shapes of OpenAI's completions and chat completions, whole and streamed."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.generation.requests import Piece, Request
from gptjax.serve.schema import Ask
from gptjax.serve.token_texts import Shown, TokenTexts, utf8

Json = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """The parts of an answer in which the two interfaces differ."""

    prefix: str
    """Of the answer's id."""
    whole: str
    """`object` of a whole answer."""
    chunk: str
    """`object` of a chunk of a stream."""
    content: Callable[[str], Json]
    """Text to what holds it in a choice of a whole answer."""
    delta: Callable[[str], Json]
    """The same in a chunk."""
    first: Json | None
    """What holds a choice's first chunk, if that is one of its own."""
    logprobs: Callable[[Sequence[Shown]], Json]


def _completion_logprobs(tokens: Sequence[Shown]) -> Json:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_text(token.alternatives) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _by_text(alternatives: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Most likely first; of two tokens with the same text the likelier one counts."""
    found: dict[str, float] = {}
    for text, logprob in alternatives:
        found.setdefault(text, logprob)
    return found


def _chat_logprobs(tokens: Sequence[Shown]) -> Json:
    one = lambda text, logprob: {"token": text, "logprob": logprob, "bytes": utf8(text)}
    return {
        "content": [
            one(token.text, token.logprob)
            | {"top_logprobs": [one(*other) for other in token.alternatives]}
            for token in tokens
        ],
        "refusal": None,
    }


COMPLETIONS = Shape(
    "cmpl-",
    "text_completion",
    "text_completion",
    content=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    first=None,
    logprobs=_completion_logprobs,
)
CHAT = Shape(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    content=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    delta=lambda text: {"delta": {"content": text} if text else {}},
    first={"delta": {"role": "assistant", "content": "", "refusal": None}},
    logprobs=_chat_logprobs,
)


class Answer:
    """One answer: takes the pieces of its choices, and shows them as chunks or as a whole.

    Args:
        shape: `COMPLETIONS` or `CHAT`.
        ask: what the client asked for.
        requests: those of its choices, in order.
        model: the name that the answer gives.
        texts: of the run's tokenizer.
    """

    def __init__(
        self, shape: Shape, ask: Ask, requests: Sequence[Request], model: str, texts: TokenTexts
    ):
        self._shape, self._ask = shape, ask
        self._common = {
            "id": f"{shape.prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._prompt_tokens = sum(len(request.prompt) for request in requests[:: ask.n])
        self._choices = [_Choice() for _ in requests]
        self._texts = texts
        self._echoed = [p if isinstance(p, str) else texts.join(p) for p in ask.prompts]

    def begin(self) -> Iterator[Json]:
        """The chunks of a stream before all pieces."""
        for i in range(len(self._choices)):
            if self._shape.first is not None:
                yield self._chunk(i, self._shape.first, None, None)
            elif echoed := self._echo(i):
                yield self._chunk(i, self._shape.delta(echoed), None, None)

    def add(self, index: int, piece: Piece) -> Iterator[Json]:
        """The chunks of a choice's next piece; to be used up also where they are not sent."""
        choice = self._choices[index]
        logprobs = None
        if self._ask.logprobs is not None:
            shown = self._texts.show(piece.tokens, choice.offset)
            choice.offset += sum(len(token.text) for token in piece.tokens)
            choice.shown += shown
            logprobs = self._shape.logprobs(shown) if shown else None
        choice.text += piece.text
        choice.tokens += len(piece.tokens)
        choice.finish = piece.finish
        if piece.text or logprobs or piece.finish:
            yield self._chunk(index, self._shape.delta(piece.text), logprobs, piece.finish)

    def end(self) -> Iterator[Json]:
        """The chunks after all pieces: the usage, if it was asked for."""
        if self._ask.usage:
            yield self._of_chunk([]) | {"usage": self._usage()}

    def whole(self) -> Json:
        """The answer, once all pieces were added."""
        choices = [
            {
                "index": i,
                **self._shape.content(self._echo(i) + choice.text),
                "logprobs": None
                if self._ask.logprobs is None
                else self._shape.logprobs(choice.shown),
                "finish_reason": choice.finish,
            }
            for i, choice in enumerate(self._choices)
        ]
        return self._common | {
            "object": self._shape.whole,
            "choices": choices,
            "usage": self._usage(),
        }

    def _echo(self, index: int) -> str:
        return self._echoed[index // self._ask.n] if self._ask.echo else ""

    def _chunk(self, index: int, content: Json, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return self._of_chunk([choice]) | ({"usage": None} if self._ask.usage else {})

    def _of_chunk(self, choices: list[Json]) -> Json:
        return self._common | {"object": self._shape.chunk, "choices": choices}

    def _usage(self) -> Json:
        made = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }


class _Choice:
    """What has come of one choice."""

    def __init__(self):
        self.text, self.tokens = "", 0
        self.finish: str | None = None
        self.shown, self.offset = list[Shown](), 0
