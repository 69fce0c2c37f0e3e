"""The GPT: tokens to logits, with or without a KV cache.

    B  batch      T  query positions          S  key and value positions
    C  n_embd     H  heads    D  head size    G  heads of keys and values (H, or fewer)
    L  layers     F  width of the MLP         V  vocabulary size

Flax Linen, pure `init`/`apply`. Every model has one contract, so that the train step, the
sampler and your own module fit together:

    model.config                                         # a ModelConfig: at least block_size counts
    logits, cache = model.apply({"params": params}, tokens, cache=None, train=False)
    cache = model.init_cache(batch)                      # None: the model has no use for one

A GPT is `head(norm(blocks(embed(tokens))))`; each of these methods, the block and its attention
can be replaced. Parameter names are GPT-2's (`wte wpe h/{ln_1, attn/{c_attn, c_proj}, ln_2,
mlp/{c_fc, c_proj}} ln_f`); the leaves below `h` have a leading L axis, for the blocks are one
scanned module. The modern family (rotary positions, RMS norm, SwiGLU, grouped queries, sliding
windows) is fields of the config.

`apply(..., mutable=["intermediates"], capture_intermediates=True)` returns the activations of
every module, those of the blocks stacked over L; `mutable=["attention"]` returns the (L, B, H, T,
S) attention weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.attention import (
    Kernel,
    attention_weights,
    causal_attention,
    causal_mask,
    extend,
    weighted_values,
    window_attention,
)
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.layers import (
    INIT_STD,
    Linear,
    activate,
    norm,
    residual_std,
    rms,
    rotary_rates,
    rotate,
    row_major,
    soft_cap,
)

Model = nn.Module | Callable[[ModelConfig, int], nn.Module]  # or a function that makes one

UNROLL_UP_TO = 12  # layers; on CPU an unrolled stack is faster, a deep one compiles slowly


class KVCache(NamedTuple):
    """Keys and values of the `length` positions read so far: each (L, B, G, S, D)."""

    k: jax.Array
    v: jax.Array
    length: jax.Array  # () int32; (B,) where rows are at positions of their own


class CausalSelfAttention(nn.Module):
    """Heads of attention side by side, and the projection that mixes their outputs.

    For an attention of your own override `attend`, which serves training, evaluation and cached
    decoding, and give the class to the model: `GPT(config, vocab_size, attention=MyAttention)`.
    """

    config: ModelConfig
    train: bool = False
    kernel: Kernel | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # (B, T, C)
        cache: tuple[jax.Array, jax.Array] | None = None,  # k, v: (B, G, S, D)
        start: jax.Array | int = 0,  # position of x's first token; (B, 1, 1, 1): of each row
        rates: jax.Array | None = None,  # (D / 2,) of this layer's rotation; None: the config's
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config
        H, G, D = c.n_head, c.n_kv_head or c.n_head, c.head_size
        linear = partial(Linear, dtype=c.dtype)
        bias = c.bias if c.attn_bias is None else c.attn_bias
        if G == H:
            qkv = linear((3, H, D), bias=bias, name="c_attn")(x)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        else:
            q = linear((H, D), bias=bias, name="c_q")(x)
            kv = linear((2, G, D), bias=bias, name="c_kv")(x)
            k, v = kv[:, :, 0], kv[:, :, 1]
        if c.qk_norm_scale:
            scaled = partial(nn.RMSNorm, epsilon=c.norm_eps, dtype=jnp.float32)
            q, k = (scaled(name=f"{n}_norm")(x).astype(x.dtype) for n, x in (("q", q), ("k", k)))
        elif c.qk_norm:
            q, k = rms(q, c.norm_eps), rms(k, c.norm_eps)
        if c.position == "rotary":
            rates = rotary_rates(c) if rates is None else rates
            q, k = rotate(q, start, rates), rotate(k, start, rates)
        if cache is None:
            y = self.attend(q, k, v, 0)
        else:
            cache = extend(cache[0], k, start), extend(cache[1], v, start)
            y = self.attend(q, cache[0].swapaxes(1, 2), cache[1].swapaxes(1, 2), start)
        y = linear((c.n_embd,), 2, c.bias, residual_std(c), name="c_proj")(y)
        return nn.Dropout(c.dropout, deterministic=not self.train)(y), cache

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | int) -> jax.Array:
        """What each head reads.

        Args:
            q: (B, T, H, D) queries, of positions start .. start + T - 1.
            k: (B, S, G, D) keys of positions 0 .. S - 1; beyond start + T - 1 they are padding.
            v: (B, S, G, D) values, likewise.
            start: 0 without a cache (then S = T); with one, a traced position, which is (B, 1, 1,
                1) where rows are at positions of their own: to add, compare and broadcast with.

        Returns:
            (B, T, H, D).
        """
        c = self.config
        cached = not isinstance(start, int)
        if cached or c.dropped_attention or self._keeps_weights():
            return self.weigh(q, k, v, start)
        if c.window is not None:
            return window_attention(q, k, v, c.window)
        return (self.kernel or causal_attention)(q, k, v)

    def weigh(
        self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | int, bias: Any = None
    ) -> jax.Array:
        """`attend`, the general way: `read` by all (B, H, T, S) weights, whose scores have a bias
        added that is broadcast to them."""
        mask = causal_mask(q.shape[1], k.shape[1], start, self.config.window)
        return self.read(attention_weights(q, k, mask, bias), v)

    def read(self, weights: jax.Array, v: jax.Array) -> jax.Array:
        """The values by all (B, H, T, S) weights, some of which are dropped while training."""
        if self._keeps_weights():
            self.sow("attention", "weights", weights)
        if p := self.config.dropped_attention:  # else no module: no other's random masks change
            weights = nn.Dropout(p, deterministic=not self.train)(weights)
        return weighted_values(weights, v)

    def _keeps_weights(self) -> bool:
        return self.is_mutable_collection("attention") and not self.is_initializing()


class MLP(nn.Module):
    """Position-wise feed-forward network."""

    config: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        F = c.n_inner or 4 * c.n_embd
        features = (2, F) if c.activation == "swiglu" else (F,)
        x = Linear(features, bias=c.bias, dtype=c.dtype, name="c_fc")(x)
        x = activate(c, x)
        x = Linear((c.n_embd,), bias=c.bias, std=residual_std(c), dtype=c.dtype, name="c_proj")(x)
        return nn.Dropout(c.dropout, deterministic=not self.train)(x)


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream (pre-norm)."""

    config: ModelConfig
    train: bool = False
    attention: type[nn.Module] = CausalSelfAttention
    kernel: Kernel | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None = None,
        start: jax.Array | int = 0,
        *layer: jax.Array,  # of this one, from `GPT.stack`
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config
        attn: Any = self.attention(c, train=self.train, kernel=self.kernel, name="attn")
        y, cache = attn(norm(c, "ln_1")(x), cache, start, *layer)
        x = x + y
        x = x + MLP(c, train=self.train, name="mlp")(norm(c, "ln_2")(x))
        return x, cache


class GPT(nn.Module):
    """The decoder-only transformer: embeddings, L blocks, a last norm, logits.

    Args:
        config: its sizes and options.
        vocab_size: V, rows of the embedding table.
        block: the module to stack, called as `Block` is.
        attention: the module each block attends with, called as `CausalSelfAttention` is.
        kernel: a faster form of plain causal attention, from `parallel/kernels.py`.

    Raises:
        UserError: a kernel that is a function of your own, which decoding would not use.
    """

    config: ModelConfig
    vocab_size: int
    block: type[nn.Module] = Block
    attention: type[nn.Module] = CausalSelfAttention
    kernel: Kernel | None = None

    def setup(self) -> None:
        c = self.config
        if self.kernel is not None and not isinstance(self.kernel, Kernel):
            raise UserError(
                f"GPT(kernel={self.kernel!r}) is not a gptjax.attention.Kernel; for an attention "
                f"of your own give GPT(attention=...), a subclass of CausalSelfAttention"
            )
        normal = nn.initializers.normal(INIT_STD)
        self.wte = nn.Embed(self.vocab_size, c.n_embd, embedding_init=normal)
        if c.position == "learned":
            self.wpe = self.param("wpe", normal, (c.block_size, c.n_embd))
        if not c.tie_head:
            std = 0.0 if c.init == "zero" else INIT_STD
            self.lm_head = Linear((self.vocab_size,), bias=c.bias, std=std, dtype=c.dtype)

    def __call__(
        self, tokens: jax.Array, cache: KVCache | None = None, train: bool = False
    ) -> tuple[jax.Array, KVCache | None]:
        """Logits of the token after each of `tokens`.

        Args:
            tokens: (B, T) int32 ids, at positions cache.length .. cache.length + T - 1.
            cache: keys and values of the tokens before; None: there are none, and none are kept.
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
        """The (B, T, C) input of the head, in the compute dtype, and the cache."""
        c = self.config
        if (T := tokens.shape[1]) > c.block_size:
            raise UserError(f"T={T} tokens exceed model.block_size={c.block_size}; give fewer")
        x, cache = self.embed(tokens, cache)
        x = jax.lax.platform_dependent(x.astype(c.dtype), cuda=row_major, default=lambda x: x)
        x, cache = self.blocks(x, cache, train)
        return norm(c, "ln_f")(x).astype(c.dtype), cache

    def embed(self, tokens: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """(B, T, C) float32 embeddings of tokens and their positions; the cache as it was."""
        x = self.wte(tokens)
        if self.config.position == "learned":
            start, T = 0 if cache is None else cache.length, tokens.shape[1]
            if not isinstance(start, int) and start.ndim:
                return x + self.wpe[start[:, None] + jnp.arange(T)[None]], cache
            x = x + jax.lax.dynamic_slice_in_dim(self.wpe, start, T)[None]
        return x, cache

    def blocks(
        self, x: jax.Array, cache: KVCache | None, train: bool
    ) -> tuple[jax.Array, KVCache | None]:
        """The stack of blocks: (B, T, C) to (B, T, C), and the cache with the new positions."""
        c = self.config
        if c.nope_every is None:
            return self.stack(x, cache, train)
        turns = jnp.arange(1, c.n_layer + 1) % c.nope_every > 0
        return self.stack(x, cache, train, turns[:, None] * rotary_rates(c)[None])

    def stack(
        self, x: jax.Array, cache: KVCache | None, train: bool, *layers: jax.Array, **fields: Any
    ) -> tuple[jax.Array, KVCache | None]:
        """`blocks`, each with further arguments, of (L, ...) arrays, and fields, equal in all."""
        c = self.config
        block: Any = self.block
        if c.remat:
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = keep if c.remat_saves == "dots" else None
            block = nn.remat(block, prevent_cse=False, policy=policy)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0, "attention": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, *(0 for _ in layers)),  # pyright: ignore[reportArgumentType]
            length=c.n_layer,
            unroll=c.n_layer if c.n_layer <= UNROLL_UP_TO else 1,
            # Checked, the block is traced twice; with keys the second trace draws their numbers.
            check_constancy_invariants=self.has_rng("params") or self.has_rng("dropout"),
        )(c, train=train, attention=self.attention, kernel=self.kernel, name="h", **fields)
        kv, start = (None, 0) if cache is None else ((cache.k, cache.v), cache.length)
        if not isinstance(start, int) and start.ndim:
            start = start[:, None, None, None]
        x, kv = blocks(x, kv, start, *layers)
        if cache is not None:
            cache = cache._replace(k=kv[0], v=kv[1], length=cache.length + x.shape[1])
        return x, cache

    def head(self, x: jax.Array) -> jax.Array:
        """(B, T, V) float32 logits of (B, T, C) features."""
        c = self.config
        if c.tie_head:
            table = self.wte.embedding.astype(c.dtype)
            logits = jnp.tensordot(x.reshape(-1, c.n_embd), table.T, 1).reshape(*x.shape[:2], -1)
        else:
            logits = self.lm_head(x)
        return soft_cap(logits.astype(jnp.float32), c.softcap)

    @nn.nowrap
    def init_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` streams of up to block_size tokens."""
        c = self.config
        shape = (c.n_layer, batch, c.n_kv_head or c.n_head, c.block_size, c.head_size)
        empty = jnp.zeros(shape, c.dtype)
        return KVCache(empty, empty, jnp.zeros((), jnp.int32))


def unstack(tree: Any) -> Any:
    """Parameters or a cache of a GPT, its stacks of layers (`h`, `k` and `v`) taken apart to lists.

    A loop that takes layers out of a stack copies them in every iteration. A stack made within the
    iteration, by `restack`, costs nothing: XLA sees each layer of an unrolled model.
    """

    def layers(path: Any, leaf: jax.Array) -> Any:
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        stacked = leaf.ndim and names & {"h", "k", "v"}
        return list(leaf) if stacked and len(leaf) <= UNROLL_UP_TO else leaf

    return jax.tree_util.tree_map_with_path(layers, tree)


def restack(tree: Any) -> Any:
    """Undo `unstack`."""
    is_list = lambda x: isinstance(x, list)
    return jax.tree.map(lambda x: jnp.stack(x) if is_list(x) else x, tree, is_leaf=is_list)
