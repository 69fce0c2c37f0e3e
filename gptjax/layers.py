"""The parts that networks are made of: linear layers, norms, non-linearities, positions, n-grams.

Letters as in `model.py`. Norms and positions are computed in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer

from gptjax.config import ModelConfig

INIT_STD = 0.02  # GPT-2


class Linear(nn.Module):
    """`x @ kernel + bias` over the last axes of x, as one matmul of a flattened x.

    Flattening (B, T) spares the CPU backend slow transposes in the weight gradient, and a kernel
    that keeps its head axes can be sharded along them.

    Args:
        features: shape of the output's last axes.
        contract: how many of x's last axes are summed over.
        std: of the normal init; None: PyTorch's uniform(+-1/sqrt(fan in)).
    """

    features: tuple[int, ...]
    contract: int = 1
    bias: bool = True
    std: float | None = INIT_STD
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lead, inner = x.shape[: -self.contract], x.shape[-self.contract :]
        if self.std is None:
            kernel_init = bias_init = torch_uniform(math.prod(inner))
        else:
            kernel_init, bias_init = nn.initializers.normal(self.std), nn.initializers.zeros
        kernel = self.param("kernel", kernel_init, (*inner, *self.features)).astype(self.dtype)
        x = x.astype(self.dtype).reshape(-1, *inner)
        y = jnp.tensordot(x, kernel, self.contract)
        if self.bias:
            y = y + self.param("bias", bias_init, self.features).astype(self.dtype)[None]
        return y.reshape(*lead, *self.features)


def torch_uniform(fan_in: int) -> Initializer:
    """PyTorch's default for a linear layer's weight and bias: uniform within +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def init_stds(config: ModelConfig) -> tuple[float | None, float | None]:
    """Init of a linear layer and of one that ends on the residual stream; None: PyTorch's.

    Source: GPT-2 paper, section 2.3 ("scale the weights of residual layers ... by 1/sqrt(N)").
    """
    if config.init == "torch":
        return None, None
    if config.init == "zero":
        return INIT_STD, 0.0
    return INIT_STD, INIT_STD / math.sqrt(2 * config.n_layer)


def activate(config: ModelConfig, x: jax.Array) -> jax.Array:
    """The config's non-linearity: value by value; swiglu takes (..., 2, F) and gives (..., F).

    Source: So et al. 2021 (squared ReLU), Shazeer 2020 (SwiGLU).
    """
    match config.activation:
        case "gelu":
            return nn.gelu(x, approximate=True)
        case "gelu_erf":
            return nn.gelu(x, approximate=False)
        case "relu":
            return nn.relu(x)
        case "relu2":
            return jnp.square(nn.relu(x))
        case "swiglu":
            return nn.silu(x[..., 0, :]) * x[..., 1, :]


def norm(config: ModelConfig, name: str) -> Callable[[jax.Array], jax.Array]:
    """GPT-2's layer norm or Llama's RMS norm, in float32; or nothing, if the config says so."""
    if config.norm == "none":
        return lambda x: x
    settings: Any = {"epsilon": config.norm_eps, "dtype": jnp.float32, "name": name}
    if config.norm == "rms":
        return nn.RMSNorm(**settings)
    return nn.LayerNorm(use_bias=config.bias, **settings)


def rms(x: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square along the last axis (Zhang and Sennrich 2019), unscaled."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rotate(x: jax.Array, start: jax.Array | int, base: float) -> jax.Array:
    """Turn pairs of (B, T, H, D) by angles that grow with the position, from `start` on; what a
    query and a key have in common then depends on their distance alone.

    Source: Su et al. 2021 (RoPE); halves are paired as in GPT-NeoX and Llama.
    """
    T, half = x.shape[1], x.shape[3] // 2
    rates = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (start + jnp.arange(T))[:, None].astype(jnp.float32) * rates[None, :]  # (T, D / 2)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def look_back(
    config: ModelConfig, vocab_size: int, read: jax.Array, start: jax.Array | int, T: int
) -> jax.Array:
    """What stands before each of T positions from `start` on in the (B, S) ids `read`, embedded:
    (B, T, C), a table for each distance, 1 .. ngram - 1, one for pairs of a token and the one
    before it, and one for what is recalled; nothing where nothing stood. The tables are those of
    the module that calls.

    Source: token shift as in RWKV (Peng et al. 2023), on the embeddings alone; tables of hashed
    n-grams, Roy et al. 2022 (N-Grammer); n-gram heads, Akyürek et al. 2024.
    """
    c, V = config, vocab_size
    normal = nn.initializers.normal(INIT_STD)
    x: Any = 0.0
    if c.ngram > 1:
        table = nn.Embed(V * (c.ngram - 1), c.n_embd, embedding_init=normal, name="wse")
        for n in range(1, c.ngram):
            ids, seen = back(read, start, T, n)
            x += jnp.where(seen, table(ids + V * (n - 1)), 0.0)
    if c.pair_rows is not None:
        (last, _), (ids, seen) = back(read, start, T, 0), back(read, start, T, 1)
        number = V * ids.astype(jnp.uint32) + last.astype(jnp.uint32)
        zeros = nn.initializers.zeros  # a pair that was never seen says nothing
        table = nn.Embed(c.pair_rows, c.n_embd, embedding_init=zeros, name="wbe")
        x += jnp.where(seen, table((number % c.pair_rows).astype(jnp.int32)), 0.0)
    if c.recall is not None:
        ids, found = recall(read, start, T, c.recall)
        x += jnp.where(found, nn.Embed(V, c.n_embd, embedding_init=normal, name="wre")(ids), 0.0)
    return x


def back(read: jax.Array, start: jax.Array | int, T: int, n: int) -> tuple[jax.Array, jax.Array]:
    """What stands n places before each of T positions from `start` on in the (B, S) ids `read`:
    (B, T) ids, and (1, T, 1) bool, whether there are any."""
    at = start + jnp.arange(T) - n
    return jnp.take(read, jnp.maximum(at, 0), axis=1), (at >= 0)[None, :, None]


def recall(read: jax.Array, start: jax.Array | int, T: int, n: int) -> tuple[jax.Array, jax.Array]:
    """What followed the last n tokens when they stood in the context the last time before.

    Args:
        read: (B, S) int32 ids; of those after a position, it sees none.
        start: the first of the positions that ask.
        T: how many they are.
        n: tokens that must be the same.

    Returns:
        (B, T) ids, and (B, T, 1) bool, whether there are any.
    """
    asks, places = start + jnp.arange(T), jnp.arange(read.shape[1])
    same: Any = (places >= n - 1)[None, None] & (places[None] < asks[:, None])[None]
    for i in range(n):
        mine, _ = back(read, start, T, i)
        same &= mine[:, :, None] == jnp.roll(read, i, axis=1)[:, None]  # (B, T, S)
    last = jnp.where(same, places[None, None], -1).max(axis=2)
    return jnp.take_along_axis(read, last + 1, axis=1), (last >= 0)[:, :, None]
