"""The lecture's steps from the bigram table to the GPT, one idea each.

The letters are those of `model.py`. First the trick: an average of the past, four ways, of which
the fourth is attention. Then three small models of the contract in `model.py`; between the same
embeddings and logits as the GPT's they have, in place of its blocks,

    Averaging     the mean of what came before
    Attention     a mean with weights of its own for each position, by one head or several
    FeedForward   the same, then each position alone

and last the best bigram table there is, which needs no training.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.attention import attention, causal_mask
from gptjax.errors import UserError
from gptjax.layers import Linear, activate, init_stds
from gptjax.model import GPT, CausalSelfAttention, KVCache

# ---------------------------------------------------------------------------------------------
# The trick: the same average of the past, four ways


def average_by_loops(x: jax.Array) -> jax.Array:
    """What is wanted: position t gets the mean of positions 0..t.

    Args:
        x: (B, T, C).

    Returns:
        (B, T, C).
    """
    B, T, _ = x.shape
    rows = [[x[b, : t + 1].mean(axis=0) for t in range(T)] for b in range(B)]
    return jnp.stack([jnp.stack(row) for row in rows])


def average_by_matrix(x: jax.Array) -> jax.Array:
    """The same as one matmul, (T, T) @ (B, T, C); see `average_by_loops`."""
    return averaging_matrix(x.shape[1]) @ x


def average_by_softmax(x: jax.Array) -> jax.Array:
    """The same, the matrix being a softmax of scores that are all zero; see `average_by_loops`.

    Scores need not be zero: that is the way out of the plain average.
    """
    T = x.shape[1]
    return masked_softmax(jnp.zeros((T, T))) @ x


def one_head(x: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """One head of self-attention: the scores come from the data.

    With a `query` of zeros all scores are zero, and with the identity as `value` it is the
    average of the past once more.

    Args:
        x: (B, T, C).
        query: (C, D), what a position looks for.
        key: (C, D), what it has to offer.
        value: (C, D), what it tells.

    Returns:
        (B, T, D).
    """
    T = x.shape[1]
    q, k, v = ((x @ weight)[:, :, None] for weight in (query, key, value))  # (B, T, H = 1, D)
    return attention(q, k, v, causal_mask(T, T))[:, :, 0]


def averaging_matrix(T: int) -> jax.Array:
    """(T, T): a lower triangle of ones, each row divided by its sum."""
    ones = jnp.tril(jnp.ones((T, T)))
    return ones / ones.sum(axis=1, keepdims=True)


def masked_softmax(scores: jax.Array) -> jax.Array:
    """(T, T) scores to weights; what lies above the diagonal, in the future, gets none."""
    T = scores.shape[0]
    return jax.nn.softmax(jnp.where(causal_mask(T, T)[0, 0], scores, -jnp.inf), axis=-1)


# ---------------------------------------------------------------------------------------------
# The models


class Averaging(GPT):
    """Each position gets the mean of the embeddings so far: it hears the past, but not in order."""

    def blocks(
        self, x: jax.Array, cache: KVCache | None, train: bool
    ) -> tuple[jax.Array, KVCache | None]:
        return average_by_softmax(x).astype(x.dtype), None

    @nn.nowrap
    def init_cache(self, batch: int) -> None:
        """None: the window is read anew for each token, as the lecture does."""
        return None


class Attention(Averaging):
    """Self-attention alone: one head, or `n_head` of them that share the width."""

    def blocks(
        self, x: jax.Array, cache: KVCache | None, train: bool
    ) -> tuple[jax.Array, KVCache | None]:
        attn = CausalSelfAttention(self.config, train, project=False, name="attn")
        return attn(x)[0], None


class FeedForward(Attention):
    """Attention, then one layer in which each position thinks on its own about what it heard."""

    def blocks(
        self, x: jax.Array, cache: KVCache | None, train: bool
    ) -> tuple[jax.Array, KVCache | None]:
        c = self.config
        x, _ = super().blocks(x, cache, train)
        # Four times as wide, and with a second layer, it becomes only inside the GPT's blocks.
        layer = Linear((c.n_embd,), bias=c.bias, std=init_stds(c)[0], dtype=c.dtype, name="c_fc")
        return activate(c, layer(x)), None


# ---------------------------------------------------------------------------------------------
# The best bigram table


class CountedBigram(NamedTuple):
    """Losses in nats per token."""

    train: float
    """Of the best table for the training split, on that split: training cannot get below."""
    val: float
    """Of that table on the validation split, every pair counted once more than it occurred, for
    one that never did would cost infinitely much."""
    floor: float
    """Of the validation split's own best table: no table does better there."""
    unseen: int
    """Pairs of the validation split, with repeats, that training has never shown."""


def counted_bigram(train: np.ndarray, val: np.ndarray, vocab_size: int) -> CountedBigram:
    """What a bigram table can reach at best, counted and not trained.

    Args:
        train: (N,) ids of the training split.
        val: (M,) ids of the validation split.
        vocab_size: V.

    Raises:
        UserError: a split without a pair.
    """
    for name, split in (("training", train), ("validation", val)):
        if len(split) < 2:
            raise UserError(f"the {name} split has {len(split)} tokens; a pair takes 2 or more")
    seen, wanted = (_count_pairs(split, vocab_size) for split in (train, val))
    return CountedBigram(
        train=_table_loss(seen, seen),
        val=_table_loss(seen + 1, wanted),
        floor=_table_loss(wanted, wanted),
        unseen=int(wanted[seen == 0].sum()),
    )


def _count_pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """(V, V) int64: how often the column's token comes after the row's."""
    pairs = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
    return np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)


def _table_loss(table: np.ndarray, wanted: np.ndarray) -> float:
    """Mean loss over the `wanted` pairs of a table whose rows hold `table`'s counts."""
    occurs = wanted > 0
    rows = np.broadcast_to(table.sum(axis=1, keepdims=True), table.shape)
    nats = np.log(rows[occurs]) - np.log(table[occurs])
    return float((wanted[occurs] * nats).sum() / wanted.sum())
