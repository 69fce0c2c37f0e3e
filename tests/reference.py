"""Reference GPT for parity tests: plain numpy, float64, one example and one head at a time.

Written from the definitions of GPT-2 and Llama, independently of `gptjax.model`; they share only
the parameter layout.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptjax.config import ModelConfig


def gpt(
    params: Any,
    tokens: np.ndarray,
    config: ModelConfig,
    extra: Callable[[Any, np.ndarray], Any] = lambda params, row: 0.0,
    bias: np.ndarray | float = 0.0,
) -> np.ndarray:
    """(B, T, V) logits of (B, T) ids; a bias, table or head that `params` lacks is not applied.

    Args:
        params: of a `gptjax.model.GPT`.
        tokens: (B, T) ids.
        config: its config.
        extra: `extra(params, row)` gives (T, C) values to add to the embeddings of (T,) ids.
        bias: (H, T, T), added to the scores of every layer.
    """
    params = float64(params)
    return np.stack([_one(params, row, config, extra, bias) for row in np.asarray(tokens)])


def _one(
    params: Any, tokens: np.ndarray, config: ModelConfig, extra: Callable, bias: Any
) -> np.ndarray:
    embedding, T = params["wte"]["embedding"], len(tokens)
    x = embedding[tokens] + extra(params, tokens)
    if "wpe" in params:
        x = x + params["wpe"][:T]
    norm = layer_norm if config.norm == "layer" else rms_norm
    for layer in range(len(params["h"]["ln_1"]["scale"])):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["h"])
        q, k, v = _queries_keys_values(norm(x, block["ln_1"], config), block["attn"], config)
        visible = np.tri(T, dtype=bool)
        if config.window is not None:
            visible &= ~np.tri(T, k=-config.window, dtype=bool)
        heads = heads_side_by_side(q, k, v, config.n_head, visible, bias)
        x = x + linear(heads, block["attn"]["c_proj"])
        hidden = linear(norm(x, block["ln_2"], config), block["mlp"]["c_fc"])
        x = x + linear(ACTIVATIONS[config.activation](hidden), block["mlp"]["c_proj"])
    x = norm(x, params["ln_f"], config)
    logits = linear(x, params["lm_head"]) if "lm_head" in params else x @ embedding.T
    cap = config.softcap
    return logits if cap is None else cap * np.tanh(logits / cap)


def _queries_keys_values(x: np.ndarray, layer: Any, config: ModelConfig) -> list[np.ndarray]:
    """Queries, keys and values, each (T, C); shared key/value heads are repeated per query head."""
    H, G = config.n_head, config.n_kv_head or config.n_head
    if "c_attn" in layer:
        q, k, v = np.split(linear(x, layer["c_attn"]), 3, axis=-1)  # GPT-2's fused weight
    else:
        q = linear(x, layer["c_q"])
        k, v = np.split(linear(x, layer["c_kv"]), 2, axis=-1)
    qs, ks, vs = np.split(q, H, axis=-1), np.split(k, G, axis=-1), np.split(v, G, axis=-1)
    if config.qk_norm:
        qs, ks = ([over_rms(head, config.norm_eps) for head in heads] for heads in (qs, ks))
    if config.position == "rotary":
        qs, ks = ([rotate(head, config.rope_base) for head in heads] for heads in (qs, ks))
    ks, vs = ([heads[i * G // H] for i in range(H)] for heads in (ks, vs))
    return [np.concatenate(heads, axis=-1) for heads in (qs, ks, vs)]


def rotate(x: np.ndarray, base: float) -> np.ndarray:
    """(T, D): the pair (i, i + D/2) as a complex number, rotated by t / base^(2i/D) radians."""
    T, D = x.shape
    z = x[:, : D // 2] + 1j * x[:, D // 2 :]
    for t in range(T):
        for i in range(D // 2):
            z[t, i] *= np.exp(1j * t / base ** (2 * i / D))
    return np.concatenate([z.real, z.imag], axis=-1)


def heads_side_by_side(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    n_head: int,
    visible: np.ndarray,
    bias: np.ndarray | float = 0.0,
) -> np.ndarray:
    """(T, C) queries on (S, C) keys and values, head by head; `visible` is (T, S) bool and `bias`
    (H, T, S)."""
    biases = np.broadcast_to(bias, (n_head, *visible.shape))
    qs, ks, vs = (np.split(x, n_head, axis=-1) for x in (q, k, v))
    parts = zip(qs, ks, vs, biases, strict=True)
    heads = [_head(q, k, v, visible, bias) for q, k, v, bias in parts]
    return np.concatenate(heads, axis=-1)


def _head(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    out = []
    for query, sees, more in zip(q, visible, bias, strict=True):
        scores = k[sees] @ query / np.sqrt(len(query)) + more[sees]
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ v[sees])
    return np.stack(out)


def float64(tree: Any) -> Any:
    """The tree as numpy float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def linear(x: np.ndarray, layer: Any) -> np.ndarray:
    """`x @ W + b`, with the head axes of W and b flattened."""
    weight = layer["kernel"].reshape(x.shape[-1], -1)
    return x @ weight + (layer["bias"].reshape(-1) if "bias" in layer else 0.0)


def layer_norm(x: np.ndarray, layer: Any, config: ModelConfig) -> np.ndarray:
    """LayerNorm, as in GPT-2."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return over_rms(centred, config.norm_eps) * layer["scale"] + layer.get("bias", 0.0)


def rms_norm(x: np.ndarray, layer: Any, config: ModelConfig) -> np.ndarray:
    """RMSNorm, as in Llama."""
    return over_rms(x, config.norm_eps) * layer["scale"]


def over_rms(x: np.ndarray, eps: float) -> np.ndarray:
    """Divide by the root mean square over the last axis."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def gelu(x: np.ndarray) -> np.ndarray:
    """GPT-2's tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gated(x: np.ndarray) -> np.ndarray:
    """SwiGLU: silu of the first half times the second."""
    gate, up = np.split(x, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_erf": np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": gated,
}
