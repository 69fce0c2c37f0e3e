"""Attention: who looks at whom, and what they take from there. Letters as in `model.py`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

QUERY_BLOCKS = 4  # more gain no time on CPU, and compile longer
BLOCKS_FROM = 128  # positions; shorter contexts gain little
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v to y, causal


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, drop: Any = None
) -> jax.Array:
    """Scaled dot-product attention: each query takes the mean of the values it finds relevant.

    Args:
        q: (B, T, H, D) queries.
        k: (B, S, G, D) keys; each serves H / G heads of queries (Ainslie et al. 2023).
        v: (B, S, G, D) values.
        mask: (1, 1, T, S) bool, true where a query may look; None: everywhere.
        drop: dropout for the weights, a function of (B, H, T, S); None: none.

    Returns:
        (B, T, H, D), in v's dtype; the softmax is float32.

    Source: Vaswani et al. 2017, equation 1; lecture, "self-attention".
    """
    if (share := q.shape[2] // k.shape[2]) > 1:
        k, v = jnp.repeat(k, share, axis=2), jnp.repeat(v, share, axis=2)
    scores = jnp.einsum("BTHD,BSHD->BHTS", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("BHTS,BSHD->BTHD", weights.astype(v.dtype), v)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` of (B, T, H, D) queries to the past of as many (B, T, G, D) keys and values. Long
    contexts in blocks of queries: keys after a block's end, 3/8 of all, need not be asked.
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
    """`causal_attention` to the last `window` positions alone. Where it divides T, each block of as
    many queries asks its own keys and those of the block before.

    Source: Beltagy et al. 2020 (Longformer); Jiang et al. 2023 (Mistral 7B).
    """
    T = q.shape[1]
    if T <= window or T % window:
        return attention(q, k, v, causal_mask(T, T, window=window))
    q, k, v = (x.reshape(x.shape[0], -1, window, *x.shape[2:]) for x in (q, k, v))
    first = jnp.arange(T // window)[:, None, None, None, None] == 0
    exists = ~first | (jnp.arange(2 * window) >= window)[None, None, None, None]
    mask = causal_mask(window, 2 * window, window, window)[None] & exists  # of each block

    def with_last(x: jax.Array) -> jax.Array:
        last = jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])[:, :-1]
        return jnp.concatenate([last, x], axis=2)

    y = jax.vmap(attention, (1, 1, 1, 0), 1)(q, with_last(k), with_last(v), mask)
    return y.reshape(y.shape[0], T, *y.shape[3:])


def add_to(cache: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    """(B, G, S, D) keys or values with `new` ones, (B, T, G, D), from position `start` on."""
    new = new.swapaxes(1, 2).astype(cache.dtype)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, start, 2)


def causal_mask(T: int, S: int, start: jax.Array | int = 0, window: int | None = None) -> jax.Array:
    """(1, 1, T, S) bool: query t, at position start + t, sees keys 0..start + t, or the last
    `window` of these."""
    back = start + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
    return ((back >= 0) & (window is None or back < window))[None, None]
