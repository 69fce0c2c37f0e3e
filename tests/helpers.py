"""Helpers that several test files share."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Tiny programs take longer to compile than to run; this cuts compilation to a third.
QUICK = {"xla_backend_optimization_level": 0}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Assert equality up to an absolute and relative tolerance."""
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Unit normal float32 values."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_tokens(batch: int, T: int, vocab_size: int, seed: int = 1) -> np.ndarray:
    """(batch, T) int32 ids in [0, vocab_size)."""
    return np.random.default_rng(seed).integers(vocab_size, size=(batch, T), dtype=np.int32)


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by path, as "h/attn/c_attn/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def abstract_params(model: nn.Module) -> Any:
    """Shapes and dtypes of a language model's parameters."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def random_params(model: nn.Module, seed: int = 0, *inputs: Any, **kwargs: Any) -> Any:
    """Random values in every leaf, biases and norms too: no term is hidden by its initial value.

    Args:
        model: the module to make parameters for.
        seed: of the values.
        *inputs: arguments of `init`; none: two token ids, or one if block_size is 1.
        **kwargs: likewise.
    """
    if not inputs:
        block_size = model.config.block_size  # pyright: ignore[reportAttributeAccessIssue]
        inputs = (jnp.zeros((1, min(2, block_size)), jnp.int32),)
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
            case "embedding" | "wpe":  # of the order of the norm's epsilon, so that it matters
                noise *= 0.05
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)
