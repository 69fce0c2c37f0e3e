"""The parts of a block other than attention: linear layers, norms, activations, rotary positions.

Letters as in `model.py`. Norms and positions are computed in float32.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from gptjax.config import ModelConfig

INIT_STD = 0.02  # GPT-2
MATRICES = "wte", "c_attn", "c_q", "c_kv", "c_proj", "c_fc", "lm_head"  # cast by their layers


class Linear(nn.Module):
    """`x @ kernel + bias` over the last axes of x, as one matmul of a flattened x.

    Flattening (B, T) spares the CPU backend slow transposes in the weight gradient, and a kernel
    that keeps its head axes can be sharded along them.

    Args:
        features: shape of the output's last axes.
        contract: how many of x's last axes are summed over.
        std: of the normal init.
    """

    features: tuple[int, ...]
    contract: int = 1
    bias: bool = True
    std: float = INIT_STD
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lead, inner = x.shape[: -self.contract], x.shape[-self.contract :]
        init = nn.initializers.normal(self.std)
        kernel = self.param("kernel", init, (*inner, *self.features)).astype(self.dtype)
        x = x.astype(self.dtype).reshape(-1, *inner)
        y = jnp.tensordot(x, kernel, self.contract)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            y = y + bias.astype(self.dtype)[None]
        return y.reshape(*lead, *self.features)


def residual_std(config: ModelConfig) -> float:
    """Init of a projection that is added to the residual stream.

    Source: GPT-2 paper, section 2.3 ("scale the weights of residual layers ... by 1/sqrt(N)").
    """
    return 0.0 if config.init == "zero" else INIT_STD / math.sqrt(2 * config.n_layer)


def activate(config: ModelConfig, x: jax.Array) -> jax.Array:
    """The config's activation, elementwise; swiglu takes (..., 2, F) and gives (..., F).

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


def norm(config: ModelConfig, name: str) -> nn.Module:
    """GPT-2's layer norm or Llama's RMS norm, computed in float32."""
    settings: Any = {"epsilon": config.norm_eps, "dtype": jnp.float32, "name": name}
    if config.norm == "rms":
        return nn.RMSNorm(**settings)
    return nn.LayerNorm(use_bias=config.bias, **settings)


def rms(x: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square along the last axis (Zhang and Sennrich 2019), unscaled."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rotary_rates(config: ModelConfig) -> jax.Array:
    """(D / 2,) float32: radians per position that each pair of axes turns.

    Source: Su et al. 2021 (RoPE); Chen et al. 2023 (one factor for all); Llama 3.1's reference code
    (four numbers: slow pairs are slowed down, fast ones are not, those between in proportion).
    """
    half = config.head_size // 2
    rates = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is None:
        return rates
    factor, *bounds = config.rope_scaling
    if not bounds:
        return rates / factor
    low, high, original = bounds
    kept = jnp.clip((original * rates / (2 * math.pi) - low) / (high - low), 0, 1)
    return rates * (kept + (1 - kept) / factor)


def rotate(x: jax.Array, start: jax.Array | int, rates: jax.Array) -> jax.Array:
    """Rotary positions: turn pairs of (B, T, H, D) by (D / 2,) rates times the position, counted
    from `start` (one of all rows, or (B, 1, 1, 1)), so that a query and a key interact by their
    distance alone.

    Source: Su et al. 2021 (RoPE); halves are paired as in GPT-NeoX and Llama.
    """
    start = jnp.reshape(jnp.asarray(start), (-1, 1, 1, 1))
    positions = start + jnp.arange(x.shape[1])[None, :, None, None]
    angles = positions.astype(jnp.float32) * rates[None, None, None]  # (1 or B, T, 1, D / 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """x squashed smoothly into +-cap; None: x.

    Source: Gemma 2's report, section 2.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def row_major(x: jax.Array) -> jax.Array:
    """(B, T, C) that stays in this order: with learned positions XLA would put the batch last on
    GPUs, and transpose in every block."""
    return with_layout_constraint(x, Layout((0, 1, 2)))


def cast(params: Any, dtype: Any) -> Any:
    """Parameters of a GPT, the matrices of its linear layers and its table in the compute dtype.

    Each layer does this itself; a loop over tokens would read all of the float32 in every one.
    """

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        names = [getattr(key, "key", None) for key in path[-2:]]
        return x.astype(dtype) if names[0] in MATRICES and names[1] != "bias" else x

    return jax.tree_util.tree_map_with_path(leaf, params)
