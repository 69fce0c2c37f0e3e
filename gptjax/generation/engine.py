"""Requests in, pieces of their replies out: a batch of slots with text at both ends."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from gptjax.generation.decoding import CHUNK
from gptjax.generation.requests import Piece, Reply, Request
from gptjax.generation.slots import Slots, Stream
from gptjax.text.tokenizers import Tokenizer

SLOTS = 32  # requests served at once, at most, where nothing else is asked for


class Engine:
    """Serves requests as they come, in a batch of fixed size; one thread owns it.

    Args:
        model: any module of the contract in `model.py`.
        params: its parameters.
        tokenizer: of the text.
        slots: how many requests are served at once; memory and time of a step grow with it.
    """

    def __init__(self, model: nn.Module, params: Any, tokenizer: Tokenizer, slots: int):
        self._slots = Slots(model, params, slots, tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._next = 0
        self._running: dict[int, tuple[int, Reply]] = {}  # request -> its slot and reply
        self._seconds = 0.0  # that a token took lately

    @property
    def free(self) -> int:
        """Slots without a request."""
        return self._slots.free

    def warm_up(self) -> None:
        """Compile what serving needs."""
        _key(np.uint32(0), np.uint32(0))
        self._slots.warm_up()

    def add(self, request: Request) -> int:
        """Begin to serve a request; a number for it.

        Raises:
            ValueError: no slot is free.
        """
        key = _key(np.uint32(request.seed), np.uint32(request.sample))
        stream = Stream(
            request.prompt,
            key,
            request.max_new_tokens,
            request.sampling,
            request.stop_tokens,
            request.alternatives > 0,
        )
        slot = self._slots.add(stream)
        self._next += 1
        self._running[self._next] = slot, Reply(request, self._tokenizer)
        return self._next

    def cancel(self, number: int) -> None:
        """Stop serving a request; nothing if its reply has ended."""
        if number in self._running:
            self._slots.remove(self._running.pop(number)[0])

    def step(self, seconds: float | None = None) -> dict[int, Piece]:
        """The next piece of every reply; the pieces with a `finish` are the last of theirs.

        Args:
            seconds: to draw as many tokens as take about this long; None: CHUNK.
        """
        if not self._running:
            return {}
        n = CHUNK
        if seconds is not None:
            n = max(1, min(CHUNK, int(seconds / self._seconds))) if self._seconds else 1
        start = time.perf_counter()
        new = self._slots.step(n)
        count = max(len(drawn.tokens) for drawn in new.values())
        self._seconds = (time.perf_counter() - start) / count
        pieces = {}
        for number, (slot, reply) in list(self._running.items()):
            piece = pieces[number] = reply.add(new[slot])
            if piece.finish is not None:
                del self._running[number]
                if not new[slot].ended:
                    self._slots.remove(slot)
        return pieces

    def stream(self, requests: Sequence[Request]) -> Iterator[dict[int, Piece]]:
        """Serve all of the requests, while nothing else runs: at each step the new piece of each
        one, by its index."""
        waiting, index = list(enumerate(requests))[::-1], {}
        first: float | None = 0.0  # one token, so that something is shown at once
        while waiting or self._running:
            while waiting and self.free:
                i, request = waiting.pop()
                index[self.add(request)] = i
            yield {index[number]: piece for number, piece in self.step(first).items()}
            first = None


@jax.jit
def _key(seed: Any, sample: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), sample)
