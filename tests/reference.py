"""Reference GPT for parity tests: plain numpy, float64, one example and one head at a time.

Written from the definitions of GPT-2 and Llama, independently of `gptjax.model`; they share only
the parameter layout.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig


def gpt(params: Any, tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    """(B, T, V) logits for (B, T) ids; biases, tables and heads not in `params` are skipped."""
    params = float64(params)
    return np.stack([_one(params, row, config) for row in np.asarray(tokens)])


def _one(params: Any, tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    embedding, T = params["wte"]["embedding"], len(tokens)
    x = embedding[tokens]
    for back in range(1, config.ngram):
        for t in range(back, T):
            row = (back - 1) * len(embedding) + tokens[t - back]
            x[t] += params["wse"]["embedding"][row]
    if config.pair_rows is not None:
        for t in range(1, T):
            number = len(embedding) * int(tokens[t - 1]) + int(tokens[t])
            x[t] += params["wbe"]["embedding"][number % config.pair_rows]
    if config.recall is not None:
        for t in range(config.recall, T):
            last = tokens[t + 1 - config.recall : t + 1].tolist()
            ends = [s for s in range(t) if tokens[: s + 1][-config.recall :].tolist() == last]
            if ends:
                x[t] += params["wre"]["embedding"][tokens[ends[-1] + 1]]
    if "wpe" in params:
        x = x + params["wpe"][:T]
    norm = layer_norm if config.norm == "layer" else rms_norm
    for layer in range(len(params["h"]["ln_1"]["scale"])):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["h"])
        q, k, v = _queries_keys_values(norm(x, block["ln_1"], config), block["attn"], config)
        visible = np.tri(T, dtype=bool)
        if config.window is not None:
            visible &= ~np.tri(T, k=-config.window, dtype=bool)
        heads = heads_side_by_side(q, k, v, config.n_head, visible)
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
    """Rotary positions, (T, D): rotate the pair (i, i + D/2) by t / base^(2i/D) radians."""
    T, D = x.shape
    z = x[:, : D // 2] + 1j * x[:, D // 2 :]
    for t in range(T):
        for i in range(D // 2):
            z[t, i] *= np.exp(1j * t / base ** (2 * i / D))
    return np.concatenate([z.real, z.imag], axis=-1)


def heads_side_by_side(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, n_head: int, visible: np.ndarray
) -> np.ndarray:
    """Multi-head attention: (T, C) queries, (S, C) keys and values, `visible` (T, S) bool."""
    qs, ks, vs = (np.split(x, n_head, axis=-1) for x in (q, k, v))
    heads = [_head(*qkv, visible) for qkv in zip(qs, ks, vs, strict=True)]
    return np.concatenate(heads, axis=-1)


def _head(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    out = []
    for query, sees in zip(q, visible, strict=True):
        scores = k[sees] @ query / np.sqrt(len(query))
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
    """GELU in the tanh approximation, as in GPT-2."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gated(x: np.ndarray) -> np.ndarray:
    """SwiGLU: silu of the first half times the second half."""
    gate, up = np.split(x, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_erf": np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": gated,
}


def random_params(model: nn.Module, seed: int = 0, *inputs: Any, **kwargs: Any) -> Any:
    """Randomise every leaf, biases and norms included, so that no term keeps a neutral init.

    Args:
        model: the module whose parameters to make.
        seed: random seed.
        *inputs: arguments of `model.init`; default: two token ids.
        **kwargs: keyword arguments of `model.init`.
    """
    inputs = inputs or (jnp.zeros((1, min(2, block_size(model))), jnp.int32),)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs, **kwargs)["params"]
    random = np.random.default_rng(seed)

    def value(path: Any, leaf: Any) -> jax.Array:
        noise = random.standard_normal(leaf.shape)
        match path[-1].key:
            case "kernel":
                noise *= 0.2
            case "bias":
                noise *= 0.5
            case "scale":
                noise = 1 + 0.3 * noise
            case "embedding" | "wpe":  # small, so that the norm's epsilon matters
                noise *= 0.05
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def block_size(model: Any) -> int:
    """The model's context length."""
    return model.config.block_size
