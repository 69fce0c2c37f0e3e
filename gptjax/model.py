"""The networks: tokens to logits, with or without a KV cache.

    B  batch      T  positions asked about    S  positions looked at (keys and values)
    C  n_embd     H  heads    D  head size    G  heads of keys and values (H, or fewer)
    L  layers     F  width of the MLP         V  vocabulary

Flax Linen, pure `init`/`apply`. Every model has one contract, so that the train step, the
sampler and your own module fit together:

    model.config                                         # a ModelConfig: at least block_size counts
    logits, cache = model.apply({"params": params}, tokens, cache=None, train=False)
    cache = model.init_cache(batch)                      # None: the model has no use for one

The GPT comes apart as `features`, (B, T, C), and `head`, logits of them, so that a loss need not
hold all logits at once.

Parameter names are GPT-2's (`wte wpe h/{ln_1, attn/{c_attn, c_proj}, ln_2, mlp/{c_fc, c_proj}}
ln_f`); the leaves below `h` have a leading L axis, for the blocks are one scanned module. Options
of the modern family (rotary positions, RMS norm, SwiGLU, grouped queries) are fields of the config.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.attention import (
    Attend,
    add_to,
    attention,
    causal_attention,
    causal_mask,
    window_attention,
)
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.layers import INIT_STD, Linear, activate, init_stds, look_back, norm, rms, rotate

UNROLL_UP_TO = 12  # layers; on CPU an unrolled stack is faster, a deep one compiles slowly


class KVCache(NamedTuple):
    """Of the `length` positions read so far: k, v are (L, B, G, S, D), as attention reads them."""

    k: jax.Array
    v: jax.Array
    length: jax.Array  # () int32
    tokens: Any = None  # (B, S) int32, of models that look at n-grams


class CausalSelfAttention(nn.Module):
    """Heads of attention side by side, and the projection that mixes what they found.

    `causal=False` deletes the triangular mask (an encoder); `context` gives keys and values
    another source than the queries (cross-attention, which is never masked); `project=False`
    leaves what the heads found side by side, as the lecture's first heads do.
    """

    config: ModelConfig
    train: bool = False
    causal: bool = True
    project: bool = True
    attend: Attend | None = None  # a faster kernel (`kernels.py`), where its work is the same

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # (B, T, C)
        cache: tuple[jax.Array, jax.Array] | None = None,  # k, v: (B, G, S, D)
        start: jax.Array | int = 0,  # position of x's first token
        context: jax.Array | None = None,  # (B, S, C)
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config
        H, G, D = c.n_head, c.n_kv_head or c.n_head, c.head_size
        std, residual_std = init_stds(c)
        linear = {"dtype": c.dtype, "std": std, "bias": c.bias and c.qkv_bias}
        if context is None and G == H:
            qkv = Linear((3, H, D), name="c_attn", **linear)(x)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        else:
            q = Linear((H, D), name="c_q", **linear)(x)
            kv = Linear((2, G, D), name="c_kv", **linear)(x if context is None else context)
            k, v = kv[:, :, 0], kv[:, :, 1]
        if c.qk_norm:
            q, k = rms(q, c.norm_eps), rms(k, c.norm_eps)
        if c.position == "rotary" and context is None:
            q, k = rotate(q, start, c.rope_base), rotate(k, start, c.rope_base)
        if cache is not None:
            cache = add_to(cache[0], k, start), add_to(cache[1], v, start)
            k, v = cache[0].swapaxes(1, 2), cache[1].swapaxes(1, 2)
        share = c.dropped_attention
        masked = self.causal and context is None
        if masked and cache is None and not share:
            windowed = None if c.window is None else partial(window_attention, window=c.window)
            y = (self.attend or windowed or causal_attention)(q, k, v)
        else:
            mask = causal_mask(x.shape[1], k.shape[1], start, c.window) if masked else None
            drop = nn.Dropout(share, deterministic=not self.train)
            y = attention(q, k, v, mask, drop if share else None)
        if not self.project:
            return y.reshape(x.shape), cache
        y = Linear(
            (c.n_embd,), contract=2, bias=c.bias, std=residual_std, dtype=c.dtype, name="c_proj"
        )(y)
        return nn.Dropout(c.dropout, deterministic=not self.train)(y), cache


class MLP(nn.Module):
    """Each position thinks on its own about what attention brought it."""

    config: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        std, residual_std = init_stds(c)
        F = c.n_inner or 4 * c.n_embd
        features = (2, F) if c.activation == "swiglu" else (F,)
        x = Linear(features, bias=c.bias, std=std, dtype=c.dtype, name="c_fc")(x)
        x = activate(c, x)
        x = Linear((c.n_embd,), bias=c.bias, std=residual_std, dtype=c.dtype, name="c_proj")(x)
        return nn.Dropout(c.dropout, deterministic=not self.train)(x)


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream (pre-norm)."""

    config: ModelConfig
    train: bool = False
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: tuple[jax.Array, jax.Array] | None, start: jax.Array | int
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config
        attn = CausalSelfAttention(c, train=self.train, attend=self.attend, name="attn")
        y, cache = attn(norm(c, "ln_1")(x), cache, start)
        x = x + y
        x = x + MLP(c, train=self.train, name="mlp")(norm(c, "ln_2")(x))
        return x, cache


class GPT(nn.Module):
    """The decoder-only transformer: embeddings, L blocks, a last norm, logits."""

    config: ModelConfig
    vocab_size: int
    attend: Attend | None = None  # None: `causal_attention`, which all others must equal

    def setup(self) -> None:
        c = self.config
        # The lecture's PyTorch draws embeddings from N(0, 1).
        self.normal = nn.initializers.normal(1.0 if c.init == "torch" else INIT_STD)
        self.wte = nn.Embed(self.vocab_size, c.n_embd, embedding_init=self.normal)
        if not c.tie_head:
            std = 0.0 if c.init == "zero" else init_stds(c)[0]
            self.lm_head = Linear((self.vocab_size,), bias=c.bias, std=std, dtype=c.dtype)

    def __call__(
        self, tokens: jax.Array, cache: KVCache | None = None, train: bool = False
    ) -> tuple[jax.Array, KVCache | None]:
        """Logits of the token after each of `tokens`.

        Args:
            tokens: (B, T) int32 ids, at positions cache.length .. cache.length + T - 1.
            cache: what came before; None: nothing did, and nothing is kept.
            train: apply dropout (then `apply` needs `rngs={"dropout": key}`).

        Returns:
            (B, T, V) float32 logits, and the cache with these tokens in it.

        Raises:
            UserError: T is more than block_size.
        """
        x, cache = self.features(tokens, cache, train)
        return self.head(x), cache

    @nn.compact
    def features(
        self, tokens: jax.Array, cache: KVCache | None = None, train: bool = False
    ) -> tuple[jax.Array, KVCache | None]:
        """What the head reads logits off: (B, T, C) in the config's dtype, and the cache."""
        c = self.config
        T = tokens.shape[1]
        if T > c.block_size:
            raise UserError(f"T={T} tokens exceed model.block_size={c.block_size}; give fewer")
        x = self.wte(tokens)  # (B, T, C)
        start = 0 if cache is None else cache.length
        if c.position == "learned":
            wpe = self.param("wpe", self.normal, (c.block_size, c.n_embd))
            x = x + jax.lax.dynamic_slice_in_dim(wpe, start, T)[None]
        if c.looks_back:
            read = tokens
            if cache is not None:
                read = jax.lax.dynamic_update_slice_in_dim(cache.tokens, tokens, start, 1)
                cache = cache._replace(tokens=read)
            x = x + look_back(c, self.vocab_size, read, start, T)
        x, cache = self.blocks(x.astype(c.dtype), cache, train)
        return norm(c, "ln_f")(x).astype(c.dtype), cache

    def head(self, x: jax.Array) -> jax.Array:
        """(B, T, V) float32 logits of (B, T, C) features."""
        c = self.config
        if c.tie_head:
            table = self.wte.embedding.astype(c.dtype)
            logits = jnp.tensordot(x.reshape(-1, c.n_embd), table.T, 1).reshape(*x.shape[:2], -1)
        else:
            logits = self.lm_head(x)
        logits = logits.astype(jnp.float32)
        if c.softcap is not None:  # Gemma 2, section 2
            logits = c.softcap * jnp.tanh(logits / c.softcap)
        return logits

    def blocks(
        self, x: jax.Array, cache: KVCache | None, train: bool
    ) -> tuple[jax.Array, KVCache | None]:
        """What stands between embeddings and logits: (B, T, C) to (B, T, C), and the cache."""
        c = self.config
        block = Block
        if c.remat:
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = keep if c.remat_saves == "dots" else None
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.n_layer,
            unroll=c.n_layer if c.n_layer <= UNROLL_UP_TO else 1,
        )(c, train=train, attend=self.attend, name="h")
        kv: Any = None if cache is None else (cache.k, cache.v)
        x, kv = blocks(x, kv, 0 if cache is None else cache.length)
        if cache is not None:
            cache = cache._replace(k=kv[0], v=kv[1], length=cache.length + x.shape[1])
        return x, cache

    @nn.nowrap
    def init_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` streams of up to block_size tokens."""
        c = self.config
        heads = c.n_kv_head or c.n_head
        empty = jnp.zeros((c.n_layer, batch, heads, c.block_size, c.head_size), c.dtype)
        tokens = jnp.zeros((batch, c.block_size), jnp.int32) if c.looks_back else None
        return KVCache(empty, empty, jnp.zeros((), jnp.int32), tokens)


class Bigram(nn.Module):
    """The lecture's first model: a (V, V) table; the row of a token is the logits of the next."""

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
        """None: the last token is all it reads."""
        return None
