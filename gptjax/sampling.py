"""Sampling: token ids in, token ids out, without text or files.

Two compiled functions serve a whole session: `prefill` reads a context, `decode` draws tokens one
after the other in a device loop and returns to the host once per chunk. Past block_size a model
with a KV cache prefills the last half of its window again, so its context varies between half a
window and a whole one; a model without a cache reads the last block_size tokens for each token, as
the lecture's `generate` does.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.layers import cast
from gptjax.model import restack, unstack

CHUNK = 16  # tokens per return to the host: what a terminal shows at a time


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature"],  # traced: another temperature compiles nothing
    meta_fields=["top_k", "top_p", "vocab_size"],
)
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    `temperature` 0 is greedy; `top_k` and `top_p` (nucleus, Holtzman et al. 2020) cut the tail;
    `vocab_size` leaves out the padding rows of the embedding table.
    """

    temperature: float | jax.Array = 1.0
    top_k: int | None = None
    top_p: float | None = None
    vocab_size: int | None = None


def draw(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """One token for each row.

    Args:
        logits: (B, V) float32.
        keys: (B,) random keys; rows do not share randomness, so a batch changes no sample.
        sampling: how.

    Returns:
        (B,) int32.
    """
    logits = logits[:, : sampling.vocab_size]
    most_likely = logits.argmax(axis=-1).astype(jnp.int32)
    # With 0 as the largest logit no temperature, however small, overflows it.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / jnp.maximum(sampling.temperature, 1e-30)
    V = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k < V:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(_largest(logits, kth, sampling.top_k), logits, -jnp.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # of more likely tokens
        n = (before < sampling.top_p).sum(axis=-1, keepdims=True)
        nth = jnp.take_along_axis(ordered, n - 1, axis=-1)
        logits = jnp.where(_largest(logits, nth, n), logits, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return jnp.where(sampling.temperature == 0, most_likely, drawn)


def _largest(logits: jax.Array, nth: jax.Array, n: jax.Array | int) -> jax.Array:
    """Mask of the n largest of (B, V) logits, the n-th of which is `nth` (B, 1): by rank, so that
    of equal logits the first ones count."""
    above, equal = logits > nth, logits == nth
    missing = n - above.sum(axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= missing))


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
    S = model.config.block_size
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_samples))
    text = np.tile(np.asarray(prompt, np.int32)[-S:], (num_samples, 1))
    drawn, state = _start(model, params, text, keys, 0, sampling)
    made, new = 1, np.asarray(drawn)[:, None]
    while True:
        yield new
        text = np.concatenate([text, new], axis=1)[:, -S:]
        if made == max_new_tokens:
            return
        space = CHUNK if isinstance(state, Window) else S - int(state.length)
        if space == 0:  # the cache is full and its positions are fixed: prefill half of them again
            drawn, state = _start(model, params, text[:, -max(1, S // 2) :], keys, made, sampling)
            made, new = made + 1, np.asarray(drawn)[:, None]
        else:
            n = min(CHUNK, max_new_tokens - made, space)
            drawn, state, chunk = decode(model, params, drawn, state, keys, made, n, sampling)
            made, new = made + n, np.asarray(chunk)[:, :n]


class Window(NamedTuple):
    """The context of a model without a cache: tokens (B, S), of which the first `length` count."""

    tokens: jax.Array
    length: jax.Array


def _start(
    model: nn.Module,
    params: Any,
    text: np.ndarray,
    keys: jax.Array,
    made: int,
    sampling: Sampling,
) -> tuple[jax.Array, Any]:
    """Read (B, T) ids, padded to a window, half of one, and so on down to 256: few shapes to
    compile, and a short prompt of a long window is read quickly."""
    width, T = model.config.block_size, text.shape[1]
    while T <= width // 2 and (width == model.config.block_size or width > 256):
        width //= 2
    padded = np.pad(text, ((0, 0), (0, width - T)))
    return prefill(model, params, padded, T, keys, made, sampling)


@functools.partial(jax.jit, static_argnames="model")
def prefill(
    model: nn.Module,
    params: Any,
    text: jax.Array,
    length: jax.Array,
    keys: jax.Array,
    made: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, Any]:
    """Take in the first `length` of (B, P) ids; the (B,) token drawn after them, and the state."""
    B, P = text.shape
    cache: Any = model.init_cache(B)
    logits, cache = model.apply({"params": params}, text, cache)
    if cache is None:
        tokens = jnp.pad(text, ((0, 0), (0, model.config.block_size - P)))
        state = Window(tokens, length)
    else:
        # What the padding left in the cache is masked until real tokens overwrite it.
        state = unstack(cache._replace(length=length))
    return _draw_at(logits, length - 1, keys, made, sampling), state


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(
    model: nn.Module,
    params: Any,
    token: jax.Array,
    state: Any,
    keys: jax.Array,
    made: jax.Array,
    n: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, Any, jax.Array]:
    """Draw n <= CHUNK tokens after `token` (B,): the last, the state, and all as (B, CHUNK)."""
    layers = unstack(cast(params, model.config.dtype))

    def body(i: jax.Array, carry: tuple[jax.Array, Any, jax.Array]):
        token, state, drawn = carry
        params, state = restack(layers), restack(state)
        if isinstance(state, Window):
            S = state.tokens.shape[1]
            full = state.length == S
            tokens = jnp.where(full, jnp.roll(state.tokens, -1, axis=1), state.tokens)
            at = jnp.where(full, S - 1, state.length)
            tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], at, 1)
            logits, _ = model.apply({"params": params}, tokens)
            state = Window(tokens, at + 1)
        else:
            logits, state = model.apply({"params": params}, token[:, None], state)
            at = 0
        token = _draw_at(logits, at, keys, made + i, sampling)
        return token, unstack(state), drawn.at[:, i].set(token)

    drawn = jnp.zeros((len(token), CHUNK), jnp.int32)
    return jax.lax.fori_loop(0, n, body, (token, state, drawn))


def _draw_at(
    logits: jax.Array, at: jax.Array | int, keys: jax.Array, t: jax.Array, sampling: Sampling
) -> jax.Array:
    """Draw from position `at` of (B, T, V) logits, with the keys of each sample's t-th token."""
    row = jax.lax.dynamic_index_in_dim(logits, at, axis=1, keepdims=False)
    return draw(row, jax.vmap(jax.random.fold_in, (0, None))(keys, t), sampling)
