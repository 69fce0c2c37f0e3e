"""A GPT that also embeds the tokens before each position: n-grams, pairs, and an n-gram head.

A subclass of `gptjax.GPT` with three options of its own. It adds to the embedding of a position,
before the first block, and leaves the rest of the model alone. Letters as in `gptjax/model.py`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax import GPT
from gptjax.errors import UserError, positive
from gptjax.layers import INIT_STD


class NGramCache(NamedTuple):
    """The KV cache of a GPT, and the token ids of the `length` positions read so far."""

    k: jax.Array
    v: jax.Array
    length: jax.Array  # () int32, or (B,)
    tokens: jax.Array  # (B, S) int32


class NGramGPT(GPT):
    """A GPT whose embedding of a position also looks up the tokens before it.

    Args:
        ngram: add embeddings of the previous ngram - 1 tokens, one table for each distance
            (parameter `wse`); 1: none.
        pair_rows: rows of a hashed bigram table, for a token and the one before it (`wbe`): pairs
            whose number is the same modulo this share a row; None: no such table.
        recall: n of an n-gram head: embed the token that followed the latest earlier occurrence of
            the last n tokens in the context (`wre`); None: no such head.

    Raises:
        UserError: one of these is below 1.

    Source: token shift as in RWKV (Peng et al. 2023), on the embeddings alone; tables of hashed
    n-grams, Roy et al. 2022 (N-Grammer); n-gram heads, Akyürek et al. 2024.
    """

    ngram: int = 1
    pair_rows: int | None = None
    recall: int | None = None

    def setup(self) -> None:
        super().setup()
        V, C, normal = self.vocab_size, self.config.n_embd, nn.initializers.normal(INIT_STD)
        for name in ("ngram", "pair_rows", "recall"):
            positive(name, 1 if getattr(self, name) is None else getattr(self, name))
        for name in ("ngram", "recall"):  # each is a loop, unrolled
            if (getattr(self, name) or 1) > self.config.block_size:
                raise UserError(
                    f"{name}={getattr(self, name)} reaches back beyond model.block_size="
                    f"{self.config.block_size}; give at most that"
                )
        if self.ngram > 1:
            self.wse = nn.Embed(V * (self.ngram - 1), C, embedding_init=normal)
        if self.pair_rows is not None:  # at 0, so that a pair never seen adds nothing
            self.wbe = nn.Embed(self.pair_rows, C, embedding_init=nn.initializers.zeros)
        if self.recall is not None:
            self.wre = nn.Embed(V, C, embedding_init=normal)

    def embed(self, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """(B, T, C) float32 embeddings; the cache with these tokens in it."""
        x, cache = super().embed(tokens, cache)
        start, read = 0, tokens
        if cache is not None:
            start, write = cache.length, jax.lax.dynamic_update_slice_in_dim
            if jnp.ndim(start):
                rows = jax.vmap(lambda read, new, start: write(read, new, start, 0))
                read = rows(cache.tokens, tokens, start)
            else:
                read = write(cache.tokens, tokens, start, 1)
            cache = cache._replace(tokens=read)
        return x + self.look_back(read, start, tokens.shape[1]), cache

    def look_back(self, read: jax.Array, start: jax.Array | int, T: int) -> jax.Array:
        """What the three options add to T positions from `start` on, given the (B, S) ids read so
        far: (B, T, C), 0 where there is no earlier token."""
        V, x = self.vocab_size, jnp.zeros(())
        for n in range(1, self.ngram):
            ids, exists = shifted(read, start, T, n)
            x = x + jnp.where(exists, self.wse(ids + V * (n - 1)), 0.0)
        if self.pair_rows is not None:
            (last, _), (ids, exists) = shifted(read, start, T, 0), shifted(read, start, T, 1)
            number = V * ids.astype(jnp.uint32) + last.astype(jnp.uint32)
            row = (number % self.pair_rows).astype(jnp.int32)
            x = x + jnp.where(exists, self.wbe(row), 0.0)
        if self.recall is not None:
            ids, exists = recalled(read, start, T, self.recall)
            x = x + jnp.where(exists, self.wre(ids), 0.0)
        return x

    @nn.nowrap
    def init_cache(self, batch: int) -> Any:
        tokens = jnp.zeros((batch, self.config.block_size), jnp.int32)
        return NGramCache(*super().init_cache(batch), tokens)


def shifted(read: jax.Array, start: jax.Array | int, T: int, n: int) -> tuple[jax.Array, jax.Array]:
    """The tokens n places before each of T positions from `start` on in the (B, S) ids `read`:
    (B, T) ids, and (1 or B, T, 1) bool, whether there is such a place."""
    at = positions(start, T) - n
    there = jnp.broadcast_to(jnp.maximum(at, 0), (len(read), T))
    return jnp.take_along_axis(read, there, axis=1), (at >= 0)[:, :, None]


def positions(start: jax.Array | int, T: int) -> jax.Array:
    """(1, T) positions from `start` on, or (B, T) where each row has a start of its own."""
    return jnp.reshape(jnp.asarray(start), (-1, 1)) + jnp.arange(T)[None]


def recalled(
    read: jax.Array, start: jax.Array | int, T: int, n: int
) -> tuple[jax.Array, jax.Array]:
    """The token that followed the latest earlier occurrence of the last n tokens.

    Args:
        read: (B, S) int32 ids; a position uses none after it.
        start: the first of the positions, or (B,) of each row.
        T: how many positions.
        n: tokens that must match.

    Returns:
        (B, T) ids, and (B, T, 1) bool, whether there is such an occurrence.
    """
    queries, places = positions(start, T), jnp.arange(read.shape[1])
    same: Any = (places >= n - 1)[None, None] & (places[None, None] < queries[:, :, None])
    for i in range(n):
        token, _ = shifted(read, start, T, i)
        same &= token[:, :, None] == jnp.roll(read, i, axis=1)[:, None]  # (B, T, S)
    last = jnp.where(same, places[None, None], -1).max(axis=2)
    return jnp.take_along_axis(read, last + 1, axis=1), (last >= 0)[:, :, None]
