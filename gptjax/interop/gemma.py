"""Gemma 2 and 3, the text models: a `GPT` whose layers differ.

Beside what a Llama has: a norm after attention and after the MLP too; a GELU gate; embeddings times
sqrt(C); scores with a scale of their own, capped in Gemma 2; and local layers, which see a window
and in Gemma 3 rotate faster, between layers that see everything. A norm's scale is the whole
factor, 1 more than in Gemma's own files. Letters as in `model.py`.

Source: Gemma 2 (2024), Gemma 3 (2025), their technical reports.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax import model
from gptjax.attention import attention_scores, causal_mask
from gptjax.config import ModelConfig
from gptjax.errors import UserError, above_zero, positive
from gptjax.layers import Linear, activate, norm, residual_std, rotary_rates, soft_cap
from gptjax.model import GPT, CausalSelfAttention, KVCache


@dataclass(frozen=True)
class GemmaConfig:
    """What a Gemma has that a `ModelConfig` does not say.

    Attributes:
        local: of each layer, whether it sees only a window.
        window: of the local layers, in tokens; None: no layer is local.
        local_rope_base: base of the local layers' rotary frequencies, which have no stretch; None:
            they rotate as the others do.
        query_scale: scores are divided by its root, and not by that of the head size.
        attn_softcap: squashes scores smoothly into +-attn_softcap; None: no cap.

    Raises:
        UserError: a value out of range.
    """

    local: tuple[bool, ...]
    window: int | None
    local_rope_base: float | None
    query_scale: int
    attn_softcap: float | None

    def __post_init__(self) -> None:
        positive("window", self.window)
        positive("query_scale", self.query_scale)
        for name in ("local_rope_base", "attn_softcap"):
            if (value := getattr(self, name)) is not None:
                above_zero(name, value)
        if any(self.local) and self.window is None:
            raise UserError("window=None is not the size of a window, and there are local layers")


class Attention(CausalSelfAttention):
    """Attention of one layer; `window` is () int32, how far it sees."""

    gemma: Any = None
    window: Any = None

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | int) -> jax.Array:
        """See `CausalSelfAttention.attend`."""
        ratio = math.sqrt(self.config.head_size / self.gemma.query_scale)
        scores = soft_cap(attention_scores(q, k) * ratio, self.gemma.attn_softcap)
        mask = causal_mask(q.shape[1], k.shape[1], start, self.window)
        return self.read(jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1), v)


class MLP(nn.Module):
    """The config's activation as a gate: activation(x A) * (x B), then a projection."""

    config: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        F, std = c.n_inner or 4 * c.n_embd, residual_std(c)
        x = Linear((2, F), bias=c.bias, dtype=c.dtype, name="c_fc")(x)
        x = activate(c, x[..., 0, :]) * x[..., 1, :]
        x = Linear((c.n_embd,), bias=c.bias, std=std, dtype=c.dtype, name="c_proj")(x)
        return nn.Dropout(c.dropout, deterministic=not self.train)(x)


class Block(model.Block):
    """A block with norms before and after its two parts."""

    gemma: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None = None,
        start: jax.Array | int = 0,
        *layer: jax.Array,  # its rotary rates and its window
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c, (rates, window) = self.config, layer
        attn: Any = Attention(c, self.train, gemma=self.gemma, window=window, name="attn")
        y, cache = attn(norm(c, "ln_1")(x), cache, start, rates)
        x = x + norm(c, "ln_1_post")(y).astype(x.dtype)
        y = MLP(c, self.train, name="mlp")(norm(c, "ln_2")(x))
        return x + norm(c, "ln_2_post")(y).astype(x.dtype), cache


class Gemma(GPT):
    """The model, of the contract in `model.py`.

    Args:
        config, vocab_size: as for a `GPT`; `activation` is that of the gate, `rope_base` and
            `rope_scaling` are those of the layers that see everything.
        gemma: the rest.

    Raises:
        UserError: other parts than these, an attention kernel by name, or flags of fewer or more
            layers than there are.
    """

    block: type[nn.Module] = Block
    attention: type[nn.Module] = Attention
    gemma: Any = None

    def setup(self) -> None:
        super().setup()
        c, g = self.config, self.gemma
        if not isinstance(g, GemmaConfig):
            raise UserError("a Gemma takes a GemmaConfig; give gemma=GemmaConfig(...)")
        if (self.block, self.attention) != (Block, Attention):
            raise UserError("a Gemma has a block and an attention of its own; leave them out")
        if len(g.local) != c.n_layer:
            raise UserError(f"a Gemma of {c.n_layer} layers has {len(g.local)} flags of local ones")
        if c.attention in ("cudnn", "splash"):
            raise UserError(
                f"model.attention={c.attention} has no capped or partly local scores, as a Gemma "
                f"has; give plain or auto"
            )

    def embed(self, tokens: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """(B, T, C) embeddings of tokens, scaled, in the compute dtype; the cache as it was."""
        dtype = self.config.dtype
        return self.wte(tokens).astype(dtype) * jnp.asarray(self.config.n_embd**0.5, dtype), cache

    def blocks(
        self, x: jax.Array, cache: KVCache | None, train: bool
    ) -> tuple[jax.Array, KVCache | None]:
        """See `GPT.blocks`."""
        c, g = self.config, self.gemma
        local = jnp.asarray(g.local)
        rates = [rotary_rates(c)] * 2
        if g.local_rope_base is not None:
            rates[1] = rotary_rates(replace(c, rope_base=g.local_rope_base, rope_scaling=None))
        windows = jnp.where(local, g.window or c.block_size, c.block_size)
        rates = jnp.where(local[:, None], rates[1][None], rates[0][None])
        return self.stack(x, cache, train, rates, windows, gemma=g)
