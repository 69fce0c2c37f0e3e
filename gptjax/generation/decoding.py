"""The compiled functions of generation: token ids in, token ids out, for a batch of streams.

Each row of the batch, a slot, has a length, a key and settings of its own, so a stream gives the
same tokens in any batch. `prefill` reads a context, `insert` or `merge` puts it into slots,
`decode` draws tokens one after the other in a device loop and returns to the host once per call.

A model with a KV cache whose window is full stops there, to be prefilled again; one without a
cache reads the last block_size tokens for each token, as the lecture's `generate` does.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.layers import cast
from gptjax.model import GPT, restack, unstack
from gptjax.parallel.sharding import OnMesh
from gptjax.sampling import Sampling, draw

CHUNK = 16  # tokens per return to the host, at most
ALTERNATIVES = 20  # most likely tokens that can be reported at each position


class Window(NamedTuple):
    """The context of a model without a cache: tokens (B, S), of which the first `length` count."""

    tokens: jax.Array
    length: jax.Array  # (B,) int32


class State(NamedTuple):
    """What B slots have read: the cache or `Window`, with a (B,) length, and the logits after it,
    (B, V) float32."""

    context: Any
    logits: jax.Array


class Streams(NamedTuple):
    """What `decode` needs to know of the stream in each slot.

    Args:
        keys: (B, 2) uint32 data of a key: the t-th token is drawn with it folded with t.
        drawn: (B,) int32 tokens drawn so far, t.
        left: (B,) int32 tokens still to draw; 0: the slot is idle.
        stops: (B, K) int32 ids that end it; -1: none.
        sampling: of all, as made by `sampling.stacked`.
        seen: (B, V) bool tokens of its text, or None without a repetition penalty.
    """

    keys: np.ndarray
    drawn: np.ndarray
    left: np.ndarray
    stops: np.ndarray
    sampling: Sampling
    seen: np.ndarray | None


class Drawn(NamedTuple):
    """What a call of `decode` drew: tokens (B, CHUNK), -1 where none; their log-probabilities by
    the model itself, (B, CHUNK); and the most likely tokens at each place with theirs, (B, CHUNK,
    ALTERNATIVES), or None."""

    tokens: Any
    logprobs: Any
    ids: Any
    id_logprobs: Any


@functools.partial(jax.jit, static_argnames="model")
def prepare(model: nn.Module, params: Any) -> Any:
    """Parameters for the functions below: cast to the compute dtype, and layers taken apart, once
    instead of in every call."""
    return unstack(cast(params, model.config.dtype))


@functools.partial(jax.jit, static_argnames=("model", "slots", "table_size"))
def blank(model: nn.Module, slots: int, table_size: int) -> State:
    """The state of idle slots."""
    cache: Any = model.init_cache(slots)
    length = jnp.zeros(slots, jnp.int32)
    if cache is None:
        tokens = jnp.zeros((slots, model.config.block_size), jnp.int32)
        context: Any = Window(tokens, length)
    else:
        context = unstack(cache._replace(length=length))
    return State(context, jnp.zeros((slots, table_size), jnp.float32))


def slot_axes(model: nn.Module) -> State:
    """The axis of each leaf of a `State` that counts slots."""
    one, two = (jax.eval_shape(lambda n=n: blank(model, n, 2)) for n in (1, 2))
    axis = lambda a, b: next(i for i, n in enumerate(a.shape) if n != b.shape[i])
    return jax.tree.map(axis, one, two)


def width(model: nn.Module, length: int) -> int:
    """Places to read a text of this length in: a window, half of one, and so on down to 256: few
    shapes to compile, and a short prompt of a long window is read quickly."""
    S = size = model.config.block_size
    while length <= size // 2 and (size == S or size > 256):
        size //= 2
    return size


@functools.partial(jax.jit, static_argnames="model")
def prefill(model: nn.Module, params: Any, text: jax.Array, length: jax.Array) -> State:
    """Read R texts.

    Args:
        model: of the contract in `model.py`.
        params: prepared.
        text: (R, P) int32 ids, padded on the right.
        length: (R,) int32, how many of each row count.

    Returns:
        The state of R slots.
    """
    variables = {"params": restack(params)}
    cache: Any = model.init_cache(len(text))
    logits: Any
    last = lambda x: jnp.take_along_axis(x, length[:, None, None] - 1, axis=1)
    whole = model.model if isinstance(model, OnMesh) else model
    if isinstance(whole, GPT) and type(whole).__call__ is GPT.__call__:
        x, cache = model.apply(variables, text, cache, method="features")
        logits = model.apply(variables, last(x), method="head")  # of one position, not of all
    else:
        logits, cache = model.apply(variables, text, cache)
        logits = last(logits)
    if cache is None:
        pad = model.config.block_size - text.shape[1]
        context: Any = Window(jnp.pad(text, ((0, 0), (0, pad))), length)
    else:
        # What the padding left in the cache is masked until real tokens overwrite it.
        context = unstack(cache._replace(length=length))
    return State(context, logits[:, 0])


@functools.partial(jax.jit, static_argnames="model")
def take(model: nn.Module, state: State, slot: jax.Array) -> State:
    """The state of the one slot at place `slot` of many."""
    read = jax.lax.dynamic_slice_in_dim
    return jax.tree.map(lambda x, axis: read(x, slot, 1, axis), state, slot_axes(model))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def insert(model: nn.Module, state: State, row: State, slot: jax.Array) -> State:
    """Put the state of one slot at place `slot` of many."""
    write = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda x, y, axis: write(x, y, slot, axis), state, row, slot_axes(model))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def merge(model: nn.Module, state: State, rows: State, chosen: jax.Array) -> State:
    """Put the state of as many slots, or of one for all, where `chosen`, (B,) bool."""

    def leaf(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
        return jnp.where(chosen.reshape([-1 if i == axis else 1 for i in range(x.ndim)]), y, x)

    return jax.tree.map(leaf, state, rows, slot_axes(model))


@functools.partial(
    jax.jit, static_argnames=("model", "alternatives", "fixed"), donate_argnames="state"
)
def decode(
    model: nn.Module,
    params: Any,
    state: State,
    streams: Streams,
    n: jax.Array | int,
    alternatives: bool = False,
    fixed: bool = False,
) -> tuple[State, Drawn]:
    """Draw up to n <= CHUNK tokens of each stream.

    A stream ends with a token of its `stops`, with its last token, or for now with one that finds
    the window full: its slot is prefilled before it is decoded again.

    Args:
        model: of the contract in `model.py`.
        params: prepared.
        state: of the slots; donated.
        streams: in the slots.
        n: the loop ends after so many tokens, or with the last stream.
        alternatives: whether to report the most likely tokens at each place.
        fixed: the loop always takes CHUNK steps in place of n: a host does not have to ask a GPU
            before each token whether it is the last.
    """
    B, (vocab_size, seen) = len(streams.left), (streams.sampling.vocab_size, streams.seen)
    stream_keys = jax.random.wrap_key_data(jnp.asarray(streams.keys))
    full = lambda kind, *more: jnp.full((B, CHUNK, *more), -1, kind)
    drawn = Drawn(full(jnp.int32), full(jnp.float32), None, None)
    if alternatives:
        k = min(ALTERNATIVES, vocab_size or state.logits.shape[1])
        drawn = drawn._replace(ids=full(jnp.int32, k), id_logprobs=full(jnp.float32, k))

    def body(carry: Any) -> Any:
        i, runs, state, drawn, seen = carry
        keys = jax.vmap(jax.random.fold_in)(stream_keys, streams.drawn + i)
        token = draw(state.logits, keys, streams.sampling, seen)
        drawn = _note(drawn, i, runs, token, jax.nn.log_softmax(state.logits[:, :vocab_size]))
        if seen is not None:
            seen = seen | jax.nn.one_hot(token, seen.shape[1], dtype=bool)
        ends = (i + 1 >= streams.left) | (token[:, None] == streams.stops).any(axis=1)
        state, full = _read(model, params, state, token, runs & ~ends)
        return i + 1, runs & ~ends & ~full, state, drawn, seen

    carry = jnp.int32(0), streams.left > 0, state, drawn, seen
    if fixed:
        carry = jax.lax.fori_loop(0, CHUNK, lambda _, carry: body(carry), carry)
    else:
        carry = jax.lax.while_loop(lambda c: (c[0] < n) & c[1].any(), body, carry)
    return carry[2], carry[3]


def _read(
    model: nn.Module, params: Any, state: State, token: jax.Array, runs: jax.Array
) -> tuple[State, jax.Array]:
    """Read a (B,) token in the slots that run; the state, and which slots had no space for it."""
    S, variables = model.config.block_size, {"params": restack(params)}
    context: Any = restack(state.context)
    length = context.length
    full, at = length >= S, jnp.minimum(length, S - 1)  # a full slot's last place is given up
    if isinstance(context, Window):
        tokens = jnp.where(full[:, None], jnp.roll(context.tokens, -1, axis=1), context.tokens)
        tokens = jnp.where(jnp.arange(S)[None] == at[:, None], token[:, None], tokens)
        logits: Any = model.apply(variables, tokens)[0]
        logits = jnp.take_along_axis(logits, at[:, None, None], axis=1)
        window = Window(tokens, jnp.where(runs, at + 1, length))
        return State(window, logits[:, 0]), jnp.zeros_like(full)
    # One position for all is cheaper than one of each.
    position = at[0] if len(at) == 1 else at
    logits, read = model.apply(variables, token[:, None], context._replace(length=position))
    new: Any = read
    new = new._replace(length=jnp.where(runs & ~full, at + 1, length))
    return State(unstack(new), logits[:, 0]), full


def _note(
    drawn: Drawn, i: jax.Array, runs: jax.Array, token: jax.Array, logprobs: jax.Array
) -> Drawn:
    """Write down the i-th (B,) tokens of the slots that run, from their (B, V) logprobs."""
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    drawn = drawn._replace(
        tokens=drawn.tokens.at[:, i].set(jnp.where(runs, token, -1)),
        logprobs=drawn.logprobs.at[:, i].set(chosen),
    )
    if drawn.ids is None:
        return drawn
    values, ids = jax.lax.top_k(logprobs, drawn.ids.shape[2])
    return drawn._replace(
        ids=drawn.ids.at[:, i].set(ids), id_logprobs=drawn.id_logprobs.at[:, i].set(values)
    )
