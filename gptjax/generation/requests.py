"""What is asked of a model, and its reply as it comes: text, tokens, and why it ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from gptjax import sampling
from gptjax.errors import UserError
from gptjax.generation.decoding import ALTERNATIVES
from gptjax.generation.slots import NewTokens
from gptjax.sampling import Sampling
from gptjax.text.stream import StreamDecoder
from gptjax.text.tokenizers import Tokenizer

PLAIN = Sampling()
Finish = Literal["stop", "length"]  # a stop string or token; max_new_tokens


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how.

    Args:
        prompt: (N,) int32 ids, N >= 1; only the last block_size are read.
        max_new_tokens: where the reply ends at the latest.
        sampling: how tokens are drawn.
        seed: of its random numbers: the same request gives the same reply in any batch.
        sample: which one, of several of the same prompt and seed.
        stop: strings that end the reply; they and what follows are left out.
        stop_tokens: ids that end the reply, such as that of the end of a text; left out.
        alternatives: how many of the most likely tokens to report at each place, up to 20.
    """

    prompt: np.ndarray
    max_new_tokens: int = 500
    sampling: Sampling = PLAIN
    seed: int = 1337
    sample: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    alternatives: int = 0


class Token(NamedTuple):
    """A drawn token.

    Args:
        id: in the vocabulary.
        text: what it adds to the reply; empty while it only begins a character.
        logprob: natural logarithm of its probability by the model itself: at temperature 1, without
            cuts, penalties and biases.
        alternatives: (id, logprob) of the most likely tokens, most likely first.
    """

    id: int
    text: str
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """What is new of a reply: text that never splits a character nor shows a part of a stop string,
    the tokens that end in it, and why the reply ended (None: it has not)."""

    text: str
    tokens: tuple[Token, ...]
    finish: Finish | None


@dataclass(frozen=True)
class Completion:
    """A whole reply."""

    text: str
    tokens: tuple[Token, ...]
    finish: Finish

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "Completion":
        """All pieces of a reply as one."""
        finish = pieces[-1].finish
        assert finish is not None, "the last piece says why the reply ended"
        text = "".join(piece.text for piece in pieces)
        return cls(text, tuple(token for piece in pieces for token in piece.tokens), finish)


def check(request: Request) -> None:
    """Refuse a request that cannot be served.

    Raises:
        UserError: no prompt, or a setting that is out of its range.
    """
    sampling.check(request.sampling)
    V = request.sampling.vocab_size or sampling.ALL
    ranges = {
        "max_new_tokens": (1, sampling.ALL, request.max_new_tokens),
        "seed": (0, 2**32 - 1, request.seed),
        "sample": (0, 2**32 - 1, request.sample),
        "alternatives": (0, ALTERNATIVES, request.alternatives),
    }
    for name, (low, high, value) in ranges.items():
        if not low <= value <= high:
            raise UserError(f"{name} {value} is out of range; give {low} to {high}")
    if not len(request.prompt):
        raise UserError("the prompt has no tokens; give one or more")
    ids = [*request.prompt.tolist(), *request.stop_tokens, *(request.sampling.logit_bias or {})]
    if strange := [id_ for id_ in ids if not 0 <= id_ < V]:
        raise UserError(f"there is no token {strange[0]}; the vocabulary has 0 to {V - 1}")
    if "" in request.stop:
        raise UserError("a stop string is empty; give one or more characters")


class Reply:
    """Turns a request's new tokens into pieces."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self._request = request
        self._decoder = StreamDecoder(tokenizer, request.prompt)
        self._text = ""  # not returned yet, for a stop string may have begun in it
        self._tokens: list[tuple[int, Token]] = []  # those of it, and where in it each ends

    def add(self, new: NewTokens) -> Piece:
        """The next piece. If it has a `finish`, the reply has ended, whatever `new` says."""
        request, stopped = self._request, False
        for i, token in enumerate(new.tokens.tolist()):
            if stopped := token in request.stop_tokens:
                break
            text = self._decoder.add(np.array([token]))
            found: tuple[tuple[int, float], ...] = ()
            if new.ids is not None and new.id_logprobs is not None:
                several = slice(request.alternatives)
                pairs = zip(new.ids[i, several], new.id_logprobs[i, several], strict=True)
                found = tuple((int(id_), float(logprob)) for id_, logprob in pairs)
            self._text += text
            made = Token(token, text, float(new.logprobs[i]), found)
            self._tokens.append((len(self._text), made))
            if (at := self._first_stop()) is not None:
                return self._cut(at, "stop")
        if new.ended:
            self._text += self._decoder.end()
            if (at := self._first_stop()) is not None:
                return self._cut(at, "stop")
            return self._cut(len(self._text), "stop" if stopped else "length")
        return self._cut(len(self._text) - self._begun(), None)

    def _first_stop(self) -> int | None:
        """Where the first stop string begins in the text held back."""
        places = [at for stop in self._request.stop if (at := self._text.find(stop)) >= 0]
        return min(places, default=None)

    def _begun(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        text = self._text
        sizes = (n for s in self._request.stop for n in range(1, len(s)) if text.endswith(s[:n]))
        return max(sizes, default=0)

    def _cut(self, at: int, finish: Finish | None) -> Piece:
        """Return the text before `at`; what begins there or later is dropped at the end."""
        text, self._text = self._text[:at], self._text[at:]
        # A token without text begins a character, and is returned or dropped with it.
        n = len(self._tokens) if finish and not self._text else 0
        for i, (end, token) in enumerate(self._tokens):
            reached = end - len(token.text) < at if finish else end <= at
            if token.text and reached:
                n = max(n, i + 1)
        tokens = tuple(token for _, token in self._tokens[:n])
        self._tokens = [(end - at, token) for end, token in self._tokens[n:]]
        return Piece(text, tokens, finish)
