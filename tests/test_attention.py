"""Tests of attention as a function: against JAX's own, and what it skips."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, normal

from gptjax.attention import (
    attention,
    attention_weights,
    causal_attention,
    causal_mask,
    window_attention,
)

pytestmark = pytest.mark.core


def test_attention_equals_jax():
    B, T, H, D = 2, 5, 3, 4
    q, k, v = (2 * normal(B, T, H, D, seed=seed) for seed in range(3))
    theirs = functools.partial(jax.nn.dot_product_attention, q, k, v)
    close(attention(q, k, v, None), theirs())
    close(attention(q, k, v, causal_mask(T, T)), theirs(is_causal=True))
    mask = (np.random.default_rng(4).random((1, 1, T, T)) < 0.5) | np.eye(T, dtype=bool)
    mask = jnp.asarray(mask)
    close(attention(q, k, v, mask), theirs(mask=mask))


def test_attention_weights_equal_jax_with_a_bias_and_grouped_queries():
    q, k = 2 * normal(2, 4, 4, 6), 2 * normal(2, 6, 2, 6, seed=1)
    one_hot = jnp.broadcast_to(jnp.eye(6)[None, :, None], (2, 6, 2, 6))  # as values
    bias, mask = normal(1, 4, 4, 6, seed=2), causal_mask(4, 6, 2)
    expected = jax.nn.dot_product_attention(q, k, one_hot, bias=bias, mask=mask)
    close(attention_weights(q, k, mask, bias).swapaxes(1, 2), expected)


def test_attention_scores_are_scaled():
    """Unit-variance queries and keys give unit-variance scores (lecture, note 6)."""
    q, k = normal(1, 200, 1, 16, seed=1), normal(1, 200, 1, 16, seed=2)
    weights = attention_weights(q, k)[0, 0]
    assert 0.9 < float(jnp.log(weights).var(axis=-1).mean()) < 1.1


def same_values_and_gradients(ours: Any, theirs: Any, T: int) -> None:
    """Compare two functions of grouped queries, keys and values."""
    q, k, v = (2 * normal(2, T, heads, 8, seed=seed) for seed, heads in enumerate((4, 2, 2)))

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        results = []
        for function in (ours, theirs):
            y, pullback = jax.vjp(function, q, k, v)
            results.append((y, *pullback(g)))
        return results

    jax.tree.map(close, *run(q, k, v, normal(2, T, 4, 8, seed=3)))


@pytest.mark.parametrize("T", [1, 7, 128, 130])
def test_blockwise_causal_attention_equals_jax(T: int):
    """In one block of queries, and in four from 128 on."""
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    same_values_and_gradients(causal_attention, theirs, T)


def test_causal_attention_skips_masked_blocks():
    """6 of the 16 blocks of the score matrix."""
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)

    def flops(f: Any) -> float:
        cost: Any = jax.jit(f).lower(q, q, q).compile().cost_analysis()
        return cost["flops"]

    whole = lambda q, k, v: attention(q, k, v, causal_mask(256, 256))
    assert flops(causal_attention) == pytest.approx(flops(whole) * 10 / 16, rel=0.02)


@pytest.mark.parametrize(("T", "window"), [(12, 4), (12, 12), (10, 4), (3, 4), (8, 1)])
def test_window_attention_equals_masked_attention(T: int, window: int):
    """By blocks where the window divides T, otherwise as a whole."""
    masked = lambda q, k, v: attention(q, k, v, causal_mask(T, T, window=window))
    same_values_and_gradients(functools.partial(window_attention, window=window), masked, T)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_causal_mask(start: int, window: int | None):
    mask = causal_mask(3, 5, start, window)
    expected = [
        [start + query - (window or 99) < key <= start + query for key in range(5)]
        for query in range(3)
    ]
    assert mask.shape == (1, 1, 3, 5) and mask[0, 0].tolist() == expected
