"""The lecture's models from the bigram table to the transformer, one idea each.

Letters as in `gptjax/model.py`. First the trick: an average of the past, four ways, of which the
fourth is attention. Then the stages, small models of the contract in `gptjax/model.py`, each the
one before and one thing more:

    Bigram        a table: the row of a token is the logits of the next
    Embedded      token and position embeddings, straight into the head
    Averaging     the mean of the embeddings so far
    Attention     a mean with data-dependent weights, by one head or several
    FeedForward   the same, then a layer in which each position computes on its own
    Residual      both as a block with residual connections, several times
    Transformer   layer norms before attention, before the MLP and at the end

Linear layers start as PyTorch's do, embeddings from N(0, 1). Last comes the best bigram table there
is, which needs no training.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.attention import attention, attention_weights, causal_mask, weighted_values
from gptjax.config import ModelConfig
from gptjax.errors import UserError

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


class Bigram(nn.Module):
    """A (V, V) table: the row of a token is the logits of the next one."""

    config: ModelConfig
    vocab_size: int

    @nn.compact
    def __call__(
        self, tokens: jax.Array, cache: None = None, train: bool = False
    ) -> tuple[jax.Array, None]:
        """(B, T) int32 ids to (B, T, V) float32 logits; T has no limit."""
        normal = nn.initializers.normal(1.0)
        wte = nn.Embed(self.vocab_size, self.vocab_size, embedding_init=normal, name="wte")
        return wte(tokens), None

    @nn.nowrap
    def init_cache(self, batch: int) -> None:
        """None: only the last token is read."""
        return None


class Embedded(nn.Module):
    """Token and position embeddings, `middle`, a linear head. Here the middle does nothing."""

    config: ModelConfig
    vocab_size: int

    @nn.compact
    def __call__(
        self, tokens: jax.Array, cache: None = None, train: bool = False
    ) -> tuple[jax.Array, None]:
        """(B, T) int32 ids to (B, T, V) float32 logits.

        Raises:
            UserError: T is more than block_size.
        """
        c, T = self.config, tokens.shape[1]
        if T > c.block_size:
            raise UserError(f"T={T} tokens exceed model.block_size={c.block_size}; give fewer")
        normal = nn.initializers.normal(1.0)
        x = nn.Embed(self.vocab_size, c.n_embd, embedding_init=normal, name="wte")(tokens)
        x = x + self.param("wpe", normal, (c.block_size, c.n_embd))[None, :T]
        x = self.middle(x, train)
        return TorchLinear(self.vocab_size, name="lm_head")(x), None

    def middle(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, T, C) to (B, T, C)."""
        return x

    @nn.nowrap
    def init_cache(self, batch: int) -> None:
        """None: sampling reads the whole window for each token, as the lecture does."""
        return None


class Averaging(Embedded):
    """Each position gets the mean of the embeddings so far: the past, without its order."""

    def middle(self, x: jax.Array, train: bool) -> jax.Array:
        return average_by_softmax(x)


class Attention(Embedded):
    """Self-attention alone: one head, or `n_head` of them that share the width."""

    def middle(self, x: jax.Array, train: bool) -> jax.Array:
        return MultiHead(self.config, train, project=False, name="attn")(x)


class FeedForward(Attention):
    """Attention, then one layer in which each position computes on what it received."""

    def middle(self, x: jax.Array, train: bool) -> jax.Array:
        x = super().middle(x, train)
        return nn.relu(TorchLinear(self.config.n_embd, name="c_fc")(x))


class Residual(Embedded):
    """Blocks: attention, then an MLP, each added to its input."""

    norms = False

    def middle(self, x: jax.Array, train: bool) -> jax.Array:
        c = self.config
        layer_norm = partial(nn.LayerNorm, epsilon=c.norm_eps)  # 1e-5, as PyTorch's
        norm: Any = layer_norm if self.norms else lambda name: lambda x: x
        for i in range(c.n_layer):
            x = x + MultiHead(c, train, name=f"attn_{i}")(norm(name=f"ln_1_{i}")(x))
            x = x + MLP(c, train, name=f"mlp_{i}")(norm(name=f"ln_2_{i}")(x))
        return norm(name="ln_f")(x)


class Transformer(Residual):
    """Blocks with layer norms (pre-norm): the lecture's last model, scaled up in its last step."""

    norms = True


STAGES = {
    model.__name__: model
    for model in (Bigram, Averaging, Attention, FeedForward, Residual, Transformer)
}


class MultiHead(nn.Module):
    """Heads of attention side by side, and the projection that mixes their outputs.

    `causal=False` deletes the triangular mask, as in an encoder; `project=False` leaves the heads'
    outputs side by side, as the lecture's first heads do.
    """

    config: ModelConfig
    train: bool = False
    causal: bool = True
    project: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Attention of (B, T, C) to itself, or to a (B, S, C) context (cross-attention, which is
        never masked): (B, T, C)."""
        c = self.config
        heads = lambda x, name: TorchLinear(c.n_embd, bias=False, name=name)(x).reshape(
            *x.shape[:2], c.n_head, c.head_size
        )
        source = x if context is None else context
        q, k, v = heads(x, "query"), heads(source, "key"), heads(source, "value")
        mask = causal_mask(x.shape[1], x.shape[1]) if self.causal and context is None else None
        dropout = nn.Dropout(c.dropout, deterministic=not self.train)
        weights = dropout(attention_weights(q, k, mask))
        y = weighted_values(weights, v).reshape(x.shape)
        if not self.project:
            return y
        return dropout(TorchLinear(c.n_embd, name="proj")(y))


class MLP(nn.Module):
    """A layer four times as wide, a ReLU, and the projection back."""

    config: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = nn.relu(TorchLinear(4 * c.n_embd, name="c_fc")(x))
        x = TorchLinear(c.n_embd, name="proj")(x)
        return nn.Dropout(c.dropout, deterministic=not self.train)(x)


class TorchLinear(nn.Module):
    """A linear layer that starts as PyTorch's: uniform within +-1/sqrt(fan in)."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bound = 1 / math.sqrt(x.shape[-1])

        def init(key: jax.Array, shape: Any) -> jax.Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        y = x @ self.param("kernel", init, (x.shape[-1], self.features))
        return y + self.param("bias", init, (self.features,))[None, None] if self.bias else y


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
