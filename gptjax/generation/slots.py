"""A batch of streams of token ids that come and leave (continuous batching)."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.generation import decoding
from gptjax.generation.decoding import CHUNK, Streams
from gptjax.sampling import Sampling, stacked


def generate(
    model: nn.Module,
    params: Any,
    prompt: np.ndarray,
    key: jax.Array,
    max_new_tokens: int,
    sampling: Sampling,
    num_samples: int = 1,
) -> Iterator[np.ndarray]:
    """Continue a prompt, token by token.

    Args:
        model: any module of the contract in `model.py`.
        params: its parameters.
        prompt: (T,) ids, T >= 1; only the last block_size are read.
        key: sample i's t-th token is drawn with this key folded with i, then t.
        max_new_tokens: of each sample, 1 or more.
        sampling: how tokens are drawn.
        num_samples: B, drawn as one batch.

    Yields:
        (B, n) int32 of new ids, n <= CHUNK, as they are drawn; max_new_tokens in total.
    """
    slots = Slots(model, params, num_samples, sampling.vocab_size)
    for i in range(num_samples):
        slots.add(Stream(prompt, jax.random.fold_in(key, i), max_new_tokens, sampling))
    n = 1  # the first is shown at once
    while slots.busy:
        rows = slots.step(n).values()
        yield np.stack([new.tokens for new in rows])
        n = CHUNK


class Stream(NamedTuple):
    """What a slot is to draw.

    Args:
        prompt: (T,) ids, T >= 1; only the last block_size are read.
        key: its t-th token is drawn with this key folded with t.
        max_new_tokens: 1 or more.
        sampling: how tokens are drawn; of all streams of a batch with the same `vocab_size`.
        stops: ids that end it.
        alternatives: whether to report the most likely tokens at each place.
    """

    prompt: np.ndarray
    key: jax.Array
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stops: tuple[int, ...] = ()
    alternatives: bool = False


class NewTokens(NamedTuple):
    """What one step drew of a stream: (n,) int32 tokens and float32 log-probabilities by the model
    itself, and the (n, ALTERNATIVES) most likely ones with theirs, if any stream asked for them."""

    tokens: np.ndarray
    logprobs: np.ndarray
    ids: np.ndarray | None
    id_logprobs: np.ndarray | None
    ended: bool


@dataclass
class _Slot:
    """A stream in its slot: the ids to prefill next and how many the device would have read by
    now, all ids it has had, and whether it has to prefill."""

    stream: Stream
    key_data: np.ndarray
    ids: list[int]
    seen: set[int]
    drawn: int = 0
    length: int = 0
    waits: bool = True


class Slots:
    """Streams in a batch of fixed size, each as it would be alone.

    Args:
        model: any module of the contract in `model.py`.
        params: its parameters.
        size: B, how many streams are decoded at once.
        vocab_size: ids from here on are padding rows of the table; None: there are none.
    """

    def __init__(self, model: nn.Module, params: Any, size: int, vocab_size: int | None = None):
        self._model, self._params = model, decoding.prepare(model, params)
        self._slots: list[_Slot | None] = [None] * size
        self._table_size = _logits.eval_shape(model, params).shape[-1]  # traced once
        self._idle = Sampling(vocab_size=vocab_size)
        self._state = decoding.blank(model, size, self._table_size)
        device = next(iter(jax.tree.leaves(self._params)[0].devices()))
        self._on_gpu = device.platform == "gpu"
        self._warm = False
        self._streams: Streams | None = None  # as the device gets them; None: to be made

    @property
    def free(self) -> int:
        """Slots without a stream."""
        return self._slots.count(None)

    @property
    def busy(self) -> bool:
        """Whether any slot has a stream."""
        return self.free < len(self._slots)

    def add(self, stream: Stream) -> int:
        """Give a stream to a free slot; the slot's number. It is prefilled by the next `step`.

        Raises:
            ValueError: no slot is free.
        """
        slot = self._slots.index(None)
        ids = np.asarray(stream.prompt, np.int32)[-self._model.config.block_size :].tolist()
        key_data = np.asarray(jax.random.key_data(stream.key))
        self._slots[slot] = _Slot(stream, key_data, ids, set(np.unique(stream.prompt).tolist()))
        self._streams = None
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot, whether its stream has ended or not."""
        self._slots[slot] = None
        self._streams = None

    def step(self, n: int = CHUNK) -> dict[int, NewTokens]:
        """Draw up to n <= CHUNK tokens of each stream, or on a GPU up to CHUNK; 1 or more of each.
        Streams that have ended leave their slots."""
        self._prefill({i: slot for i, slot in self._running().items() if slot.waits})
        running = self._running()
        n = min(n, max(slot.stream.max_new_tokens - slot.drawn for slot in running.values()))
        drawn = self._decode(running, n)
        return {i: self._take(i, slot, drawn[i]) for i, slot in running.items()}

    def warm_up(self) -> None:
        """Compile what a step can need: every width, for one slot or all; the loop for one or all,
        with and without cuts, penalties and biases, and alternatives. Slots are to be free."""
        model, key, text = self._model, jax.random.key(0), np.zeros(1, int)
        self.add(Stream(text, key, 1, self._idle))
        self.step(1)
        row, rows = decoding.take(model, self._state, 0), jax.tree.map(jnp.copy, self._state)
        self._merge(row, [0])
        self._merge(rows, [0])
        self._state = decoding.insert(model, self._state, row, 0)
        # What reads texts is not run: long ones in every slot take their time.
        for width in {decoding.width(model, n) for n in range(1, model.config.block_size + 1)}:
            for texts in {1, len(self._slots)}:
                padded, lengths = np.zeros((texts, width), np.int32), np.ones(texts, np.int32)
                decoding.prefill.lower(model, self._params, padded, lengths).compile()
        for top_k, penalty, alternatives in product((None, 1), (None, 1.0), (False, True)):
            how = replace(self._idle, top_k=top_k, repetition_penalty=penalty)
            for self._warm in (False, True):  # the whole batch, and a lone stream by itself
                at = self.add(Stream(text, key, 1, how, (), alternatives))
                self._decode(self._running(), 1)
                self.remove(at)

    def _running(self) -> dict[int, _Slot]:
        return {i: slot for i, slot in enumerate(self._slots) if slot is not None}

    def _prefill(self, waiting: dict[int, _Slot]) -> None:
        """Read the texts of slots: one at a time, or of all slots at once if most of them wait. A
        text that most slots begin with is read once."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, slot in waiting.items():
            groups[tuple(slot.ids)].append(i)
            slot.length, slot.waits = len(slot.ids), False
        model, size = self._model, len(self._slots)
        for ids in [ids for ids, members in groups.items() if 2 * len(members) > size]:
            self._merge(self._read([ids]), groups.pop(ids))
        if 2 * len(groups) > size > 1:
            texts: list[tuple[int, ...]] = [(0,)] * size
            for ids, members in groups.items():
                for i in members:
                    texts[i] = ids
            self._merge(self._read(texts), [i for members in groups.values() for i in members])
        else:
            for ids, members in groups.items():
                row = self._read([ids])
                for i in members:
                    self._state = decoding.insert(model, self._state, row, i)

    def _read(self, texts: list[tuple[int, ...]]) -> decoding.State:
        lengths = np.array([len(ids) for ids in texts], np.int32)
        padded = np.zeros((len(texts), decoding.width(self._model, lengths.max())), np.int32)
        for row, ids in zip(padded, texts, strict=True):
            row[: len(ids)] = ids
        return decoding.prefill(self._model, self._params, padded, lengths)

    def _merge(self, rows: decoding.State, slots: list[int]) -> None:
        chosen = np.isin(np.arange(len(self._slots)), slots)
        self._state = decoding.merge(self._model, self._state, rows, chosen)

    def _decode(self, running: dict[int, _Slot], n: int) -> dict[int, decoding.Drawn]:
        """What is drawn for each slot. Idle slots are computed too, so a lone stream is decoded by
        itself, once that is compiled."""
        model, state, streams = self._model, self._state, self._settings(running)
        alternatives = any(slot.stream.alternatives for slot in running.values())
        first = min(running)
        lone = self._warm and len(running) == 1 < len(self._slots)
        if lone:
            state = decoding.take(model, state, first)
            streams = jax.tree.map(lambda x: x[first : first + 1], streams)
        state, drawn = decoding.decode(
            model, self._params, state, streams, n, alternatives, fixed=self._on_gpu
        )
        self._state = decoding.insert(model, self._state, state, first) if lone else state
        drawn = jax.device_get(drawn)
        row = lambda i: jax.tree.map(lambda x: x[0 if lone else i], drawn)
        return {i: row(i) for i in running}

    def _settings(self, running: dict[int, _Slot]) -> Streams:
        """The streams as the device gets them, with the counts of now."""
        size, known = len(self._slots), self._streams
        if known is None:
            stops = max((len(slot.stream.stops) for slot in running.values()), default=0)
            keys = np.zeros((size, *next(iter(running.values())).key_data.shape), np.uint32)
            known = Streams(
                keys=keys,
                drawn=np.zeros(size, np.int32),
                left=np.zeros(size, np.int32),
                stops=np.full((size, max(8, -(-stops // 8) * 8)), -1, np.int32),
                sampling=self._idle,
                seen=None,
            )
            samplings = [self._idle] * size
            for i, slot in running.items():
                keys[i] = slot.key_data
                known.stops[i, : len(slot.stream.stops)] = slot.stream.stops
                samplings[i] = slot.stream.sampling
            self._streams = known = known._replace(sampling=stacked(samplings, self._table_size))
        for i, slot in running.items():
            known.drawn[i] = slot.drawn
            known.left[i] = slot.stream.max_new_tokens - slot.drawn
        if known.sampling.repetition_penalty is not None:
            seen = np.zeros((size, self._table_size), bool)
            for i, slot in running.items():
                seen[i, list(slot.seen)] = True
            known = known._replace(seen=seen)
        return known

    def _take(self, i: int, slot: _Slot, drawn: decoding.Drawn) -> NewTokens:
        """What was drawn for slot i."""
        count = int((drawn.tokens >= 0).sum())
        tokens, S = drawn.tokens[:count], self._model.config.block_size
        slot.ids += tokens.tolist()
        slot.seen.update(tokens.tolist())
        slot.drawn += count
        slot.length += count
        ended = slot.drawn >= slot.stream.max_new_tokens or int(tokens[-1]) in slot.stream.stops
        if ended:
            self.remove(i)
        elif slot.length > S and isinstance(self._state.context, decoding.Window):
            slot.ids, slot.length = slot.ids[-S:], S
        elif slot.length > S:  # the window is full and its positions are fixed: read half again
            slot.ids, slot.waits = slot.ids[-max(1, S // 2) :], True
        ids, id_logprobs = (None if x is None else x[:count] for x in drawn[2:])
        return NewTokens(tokens, drawn.logprobs[:count], ids, id_logprobs, ended)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: nn.Module, params: Any) -> jax.Array:
    return model.apply({"params": params}, np.zeros((1, 1), np.int32))[0]
