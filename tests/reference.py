"""A second GPT to compare with: plain numpy, float64, one example and one head at a time.

Written from the definition of GPT-2 and not from `gptjax.model`; it shares the layout of the
parameters with it, nothing else.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def gpt(params: Any, tokens: np.ndarray, n_head: int, activation: str = "gelu") -> np.ndarray:
    """(B, T, V) logits of (B, T) ids; a bias or a head that `params` lacks is not applied."""
    params = float64(params)
    return np.stack([_one(params, row, n_head, activation) for row in np.asarray(tokens)])


def _one(params: Any, tokens: np.ndarray, n_head: int, activation: str) -> np.ndarray:
    embedding, T = params["wte"]["embedding"], len(tokens)
    x = embedding[tokens] + params["wpe"][:T]
    for layer in range(len(params["h"]["ln_1"]["scale"])):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["h"])
        qkv = linear(layer_norm(x, block["ln_1"]), block["attn"]["c_attn"])
        q, k, v = np.split(qkv, 3, axis=-1)  # as GPT-2's fused weight: all queries, keys, values
        heads = heads_side_by_side(q, k, v, n_head, visible=np.tri(T, dtype=bool))
        x = x + linear(heads, block["attn"]["c_proj"])
        hidden = linear(layer_norm(x, block["ln_2"]), block["mlp"]["c_fc"])
        hidden = gelu(hidden) if activation == "gelu" else np.maximum(hidden, 0)
        x = x + linear(hidden, block["mlp"]["c_proj"])
    x = layer_norm(x, params["ln_f"])
    return linear(x, params["lm_head"]) if "lm_head" in params else x @ embedding.T


def heads_side_by_side(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, n_head: int, visible: np.ndarray
) -> np.ndarray:
    """(T, C) queries on (S, C) keys and values, head by head; `visible` is (T, S) bool."""
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
    """The same tree in numpy and double precision."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def linear(x: np.ndarray, layer: Any) -> np.ndarray:
    """`x @ W + b`, the head axes of W and b flattened away."""
    weight = layer["kernel"].reshape(x.shape[-1], -1)
    return x @ weight + (layer["bias"].reshape(-1) if "bias" in layer else 0.0)


def layer_norm(x: np.ndarray, layer: Any) -> np.ndarray:
    """GPT-2's, with its epsilon."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * layer["scale"] + layer.get("bias", 0.0)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form, which GPT-2 uses."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def random_params(model: nn.Module, seed: int = 0, *inputs: Any, **kwargs: Any) -> Any:
    """Random values in every leaf, biases and norms too, so that no term hides at its init.

    Args:
        model: what to make parameters for.
        seed: of the values.
        *inputs: what `init` is called with; none: two token ids.
        **kwargs: likewise.
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
            case "embedding" | "wpe":  # small beside the norm's epsilon, so that it counts
                noise *= 0.05
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def block_size(model: Any) -> int:
    """Longest context of any model of the contract."""
    return model.config.block_size
