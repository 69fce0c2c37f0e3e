"""Scaled dot-product attention: causal, windowed, biased. Letters as in `model.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

QUERY_BLOCKS = 4  # more save no time on CPU, and compile longer
BLOCKS_FROM = 128  # positions; shorter contexts gain little


@dataclass(frozen=True)
class Kernel:
    """A faster `causal_attention` that gives the same result; `parallel/kernels.py` makes them.

    An attention of your own is no kernel: give `GPT(attention=...)`, which decoding honours too.
    """

    run: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """(B, T, H, D) queries, (B, T, G, D) keys and values to (B, T, H, D)."""
        return self.run(q, k, v)


def attention_weights(
    q: jax.Array, k: jax.Array, mask: jax.Array | None = None, bias: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias): how much each query takes from each key.

    Args:
        q: (B, T, H, D) queries.
        k: (B, S, G, D) keys; each serves H / G query heads (Ainslie et al. 2023).
        mask: (1, 1, T, S) bool, true where a query may look; None: everywhere.
        bias: added to the scores, broadcast to (B, H, T, S), such as ALiBi's; None: nothing.

    Returns:
        (B, H, T, S) float32; rows sum to 1.

    Source: Vaswani et al. 2017, equation 1; lecture, "self-attention".
    """
    scores = attention_scores(q, k)
    if bias is not None:
        scores = scores + jnp.broadcast_to(bias, scores.shape)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def attention_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q k^T / sqrt(D): (B, H, T, S) float32 of (B, T, H, D) queries and (B, S, G, D) keys."""
    if (share := q.shape[2] // k.shape[2]) > 1:
        k = jnp.repeat(k, share, axis=2)
    scores = jnp.einsum("BTHD,BSHD->BHTS", q, k, preferred_element_type=jnp.float32)
    return scores / math.sqrt(q.shape[-1])


def weighted_values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """The (B, T, H, D) weighted sums, by (B, H, T, S) weights, of (B, S, G, D) values."""
    if (share := weights.shape[1] // v.shape[2]) > 1:
        v = jnp.repeat(v, share, axis=2)
    return jnp.einsum("BHTS,BSHD->BTHD", weights.astype(v.dtype), v)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`weighted_values` by `attention_weights`: (B, T, H, D), in v's dtype."""
    return weighted_values(attention_weights(q, k, mask), v)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal `attention` of T queries to T keys and values. Long contexts go block by block of
    queries, which skips 3/8 of the score matrix.
    """
    T = q.shape[1]
    n = QUERY_BLOCKS if T >= BLOCKS_FROM and T % QUERY_BLOCKS == 0 else 1
    size = T // n
    blocks = []
    for end in range(size, T + 1, size):
        start = end - size
        mask = causal_mask(size, end, start)
        blocks.append(attention(q[:, start:end], k[:, :end], v[:, :end], mask))
    return jnp.concatenate(blocks, axis=1)


def window_attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """Causal attention in a sliding window of `window` positions. Where the window divides T, each
    block of that many queries reads its own keys and those of the block before.

    Source: Beltagy et al. 2020 (Longformer); Jiang et al. 2023 (Mistral 7B).
    """
    T = q.shape[1]
    if T <= window or T % window:
        return attention(q, k, v, causal_mask(T, T, window=window))
    q, k, v = (x.reshape(x.shape[0], -1, window, *x.shape[2:]) for x in (q, k, v))
    first = jnp.arange(T // window)[:, None, None, None, None] == 0
    exists = ~first | (jnp.arange(2 * window) >= window)[None, None, None, None]
    mask = causal_mask(window, 2 * window, window, window)[None] & exists  # of each block

    def with_previous(x: jax.Array) -> jax.Array:
        previous = jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])[:, :-1]
        return jnp.concatenate([previous, x], axis=2)

    y = jax.vmap(attention, (1, 1, 1, 0), 1)(q, with_previous(k), with_previous(v), mask)
    return y.reshape(y.shape[0], T, *y.shape[3:])


def causal_mask(T: int, S: int, start: jax.Array | int = 0, window: int | None = None) -> jax.Array:
    """(1, 1, T, S) bool: query t, at position start + t, sees keys 0..start + t, or the last
    `window` of these; (B, 1, T, S) where each row has a start of its own, (B, 1, 1, 1)."""
    start = jnp.reshape(jnp.asarray(start), (-1, 1, 1, 1))
    back = start + jnp.arange(T)[None, None, :, None] - jnp.arange(S)[None, None, None]
    return (back >= 0) & (window is None or back < window)


def extend(cache: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    """(B, G, S, D) keys or values with `new` ones, (B, T, G, D), from position `start` on: one of
    all rows, or (B, 1, 1, 1)."""
    new = new.swapaxes(1, 2).astype(cache.dtype)
    write = jax.lax.dynamic_update_slice_in_dim
    if jnp.ndim(start) == 0:
        return write(cache, new, start, 2)
    rows = jax.vmap(lambda cache, new, start: write(cache, new, start, 1))
    return rows(cache, new, jnp.ravel(jnp.asarray(start)))
