"""Tests of the GPT: against a reference in numpy, against itself, against PyTorch."""

import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import abstract_params, by_path, close, normal, random_params, random_tokens

from gptjax import model as model_module
from gptjax.assembly import make_model
from gptjax.attention import (
    Kernel,
    causal_attention,
    causal_mask,
)
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.layers import norm
from gptjax.model import GPT, MLP, Block, CausalSelfAttention
from gptjax.presets import PRESETS

core = pytest.mark.core
V = 13
SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8)
UNTIED = replace(SMALL, activation="relu", tie_head=False, n_head=4)
LLAMA = replace(
    SMALL,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    n_inner=24,
    bias=False,
    norm="rms",
    norm_eps=1e-4,
    position="rotary",
    rope_base=100.0,
    activation="swiglu",
)
CONFIGS = {
    "gpt2": SMALL,
    "relu_untied": UNTIED,
    "no_bias": replace(SMALL, bias=False),
    "no_bias_untied": replace(SMALL, bias=False, tie_head=False, activation="relu"),
    "untied": replace(SMALL, tie_head=False),
    "one_head_odd": replace(SMALL, n_layer=3, n_head=1, n_embd=7, block_size=5),
    "odd_heads": replace(SMALL, n_layer=1, n_head=3, n_embd=15, block_size=7),
    "narrow_heads": replace(SMALL, n_head=8, n_embd=8),
    "one_token": replace(SMALL, block_size=1),
    "llama": LLAMA,
    "llama_odd": replace(LLAMA, n_head=3, n_kv_head=1, n_embd=18, bias=True, tie_head=False),
    "relu2_qk_norm": replace(
        SMALL, bias=False, norm="rms", position="rotary", qk_norm=True, activation="relu2"
    ),
    "exact_gelu": replace(SMALL, activation="gelu_erf"),
    "softcap": replace(SMALL, softcap=0.5),
    "window": replace(SMALL, window=4, block_size=16),
    "window_with_remainder": replace(SMALL, window=3, block_size=16),
    "window_of_one": replace(SMALL, window=1, block_size=4),
    "window_beyond_context": replace(SMALL, window=99),
    "llama_window": replace(LLAMA, window=4, block_size=12),
    "llama_narrow": replace(LLAMA, window=3),
    "no_position": replace(SMALL, position="none", n_inner=5),
    "eps": replace(SMALL, norm_eps=0.1, qk_norm=True),
}
IN_CORE = ("gpt2", "llama")  # the others take seconds each
each_config = pytest.mark.parametrize(
    "config",
    [pytest.param(c, id=name, marks=[core] * (name in IN_CORE)) for name, c in CONFIGS.items()],
)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def apply(
    model: Any, params: Any, tokens: Any, cache: Any = None, train: bool = False, key: Any = None
) -> Any:
    """`model.apply`, compiled once for all tests that use the same model and shapes."""
    rngs = None if key is None else {"dropout": key}
    return model.apply({"params": params}, tokens, cache, train=train, rngs=rngs)


def mean_loss(logits: jax.Array, targets: Any) -> jax.Array:
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], -1)
    return -picked.mean()


# ---------------------------------------------------------------------------------------------
# The numbers


@each_config
def test_equals_numpy(config: ModelConfig):
    check_against_numpy(config, config.block_size)


def test_equals_numpy_on_part_of_a_context():
    check_against_numpy(SMALL, 3)


def check_against_numpy(config: ModelConfig, T: int) -> None:
    model = GPT(config, V)
    params, tokens = random_params(model), random_tokens(2, T, V)
    logits, cache = apply(model, params, tokens)
    assert cache is None and logits.shape == (2, T, V) and logits.dtype == jnp.float32
    expected = reference.gpt(params, tokens, config)
    close(logits, expected)
    assert expected.std() > 0.1  # otherwise 1e-5 would say little


@each_config
def test_leaves_follow_the_config(config: ModelConfig):
    """The reference applies the leaves that it is given; this pins which there must be."""
    names = set(by_path(abstract_params(GPT(config, V))))
    qkv = {"c_attn"} if config.n_kv_head is None else {"c_q", "c_kv"}
    biases = {f"h/attn/{name}/bias" for name in (*qkv, "c_proj")}
    biases |= {"h/mlp/c_fc/bias", "h/mlp/c_proj/bias"}
    if config.norm == "layer":
        biases |= {"h/ln_1/bias", "h/ln_2/bias", "ln_f/bias"}
    if not config.tie_head:
        biases |= {"lm_head/bias"}
    assert {name for name in names if "bias" in name} == (biases if config.bias else set())
    assert {n.split("/")[2] for n in names if n.startswith("h/attn/")} == qkv | {"c_proj"}
    assert ("wpe" in names) == (config.position == "learned")
    assert ("lm_head/kernel" in names) == (not config.tie_head)


@core
def test_causality():
    model, T = GPT(SMALL, V), SMALL.block_size
    params = random_params(model)
    tokens = random_tokens(2, T, V)
    before = np.asarray(apply(model, params, tokens)[0])
    for t in range(T):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % V
        after = np.asarray(apply(model, params, changed)[0])
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after - before)[:, t:].max(axis=-1) > 1e-4).all()


@core
def test_rows_of_a_batch_are_independent():
    model = GPT(SMALL, V)
    params = random_params(model)
    tokens = random_tokens(2, SMALL.block_size, V)
    changed = tokens.copy()
    changed[1] = (changed[1] + 1) % V
    before, after = (np.asarray(apply(model, params, ids)[0]) for ids in (tokens, changed))
    np.testing.assert_array_equal(after[0], before[0])
    assert np.abs(after[1] - before[1]).min(axis=-1).max() > 1e-4


def logits_in_pieces(model: Any, params: Any, tokens: np.ndarray, sizes: list[int]) -> Any:
    """Logits of (B, T) ids read through the cache, `sizes` at a time, and the cache."""
    cache, logits, start = model.init_cache(len(tokens)), [], 0
    for size in sizes:
        out, cache = apply(model, params, tokens[:, start : start + size], cache)
        logits.append(np.asarray(out))
        start += size
        assert int(cache.length) == start
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize(
    "sizes", [[8], [1] * 8, pytest.param([5, 1, 1, 1], marks=core), [1, 5, 2], [1, 2]]
)
@pytest.mark.parametrize(
    "config",
    [CONFIGS[name] for name in ("gpt2", "relu_untied", "llama", "llama_narrow")],
    ids=["gpt2", "relu_untied", "llama", "llama_narrow"],
)
def test_cached_decoding_equals_the_full_pass(config: ModelConfig, sizes: list[int]):
    model = GPT(config, V)
    params = random_params(model)
    tokens = random_tokens(2, sum(sizes), V)
    logits, cache = logits_in_pieces(model, params, tokens, sizes)
    close(logits, apply(model, params, tokens)[0])
    heads = config.n_kv_head or config.n_head
    assert cache.k.shape == cache.v.shape == (2, 2, heads, 8, config.head_size)
    # Positions that were read are filled, the others are still empty.
    assert (np.abs(cache.k[:, :, :, : sum(sizes)]).max(axis=(2, 4)) > 0).all()
    assert not np.asarray(cache.v[:, :, :, sum(sizes) :]).any()


@pytest.mark.parametrize(
    "config", [pytest.param("gpt2", marks=core), "llama", "llama_narrow", "own attention"]
)
def test_rows_at_positions_of_their_own(config: str):
    """Each row's next logits are those of the full pass, whatever lies beyond its length."""
    own = config == "own attention"
    model = GPT(ALIBI, V, attention=ALiBi) if own else GPT(CONFIGS[config], V)
    params, tokens = random_params(model), random_tokens(3, 8, V)
    lengths = np.array([2, 6, 4], np.int32)
    _, cache = apply(model, params, tokens, model.init_cache(3))
    cache = cache._replace(length=jnp.asarray(lengths))
    full = np.asarray(apply(model, params, tokens)[0])
    for n in range(2):
        at = (lengths + n)[:, None]
        logits, cache = apply(model, params, np.take_along_axis(tokens, at, axis=1), cache)
        close(logits, np.take_along_axis(full, at[:, :, None], axis=1))
    assert cache.length.tolist() == [4, 8, 6]


@core
def test_cache_entries_beyond_its_length_are_masked():
    """The sampler reads padded prompts and then resets the length."""
    model = GPT(SMALL, V)
    params = random_params(model)
    tokens = random_tokens(2, 8, V)
    padded = tokens.copy()
    padded[:, 3:] = 0
    _, cache = apply(model, params, padded, model.init_cache(2))
    cache = cache._replace(length=jnp.asarray(3, jnp.int32))
    logits, _ = apply(model, params, tokens[:, 3:8], cache)
    close(logits, apply(model, params, tokens)[0][:, 3:8])


@core
def test_an_input_longer_than_the_context_is_refused():
    with pytest.raises(UserError) as error:
        jax.eval_shape(GPT(SMALL, V).init, jax.random.key(0), random_tokens(1, 9, V))
    assert str(error.value).startswith("T=9 tokens exceed model.block_size=8")


# ---------------------------------------------------------------------------------------------
# An attention or a block of one's own


class ALiBi(CausalSelfAttention):
    """Scores lowered in proportion to the distance (Press et al. 2021)."""

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, start: Any) -> jax.Array:
        H = q.shape[2]
        slopes = 2.0 ** (-8 * (1 + jnp.arange(H)) / H)
        back = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None, :]
        distance = start + back[None, None]
        return self.weigh(q, k, v, start, bias=-slopes[None, :, None, None] * distance)


def alibi_bias(H: int, T: int) -> np.ndarray:
    """(H, T, T), as `ALiBi` adds it."""
    places = range(T)
    return np.array(
        [[[-(2 ** (-8 * (h + 1) / H)) * (t - s) for s in places] for t in places] for h in range(H)]
    )


ALIBI = replace(SMALL, position="none")
OWN_ATTENTION = {
    "plain": ALIBI,
    "grouped": replace(ALIBI, n_head=4, n_kv_head=2),
    "window": replace(ALIBI, window=3),
}
each_own_attention = pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[core] * (name == "grouped"))
        for name, config in OWN_ATTENTION.items()
    ],
)


@each_own_attention
def test_own_attention_in_evaluation_equals_numpy(config: ModelConfig):
    model, tokens = GPT(config, V, attention=ALiBi), random_tokens(2, 8, V)
    params = random_params(model)
    logits = apply(model, params, tokens)[0]
    close(logits, reference.gpt(params, tokens, config, bias=alibi_bias(config.n_head, 8)))
    assert np.abs(logits - apply(GPT(config, V), params, tokens)[0]).max() > 1e-3


@each_own_attention
@pytest.mark.parametrize("sizes", [[1] * 8, [5, 1, 2]], ids=str)
def test_own_attention_in_cached_decoding_equals_the_full_pass(
    config: ModelConfig, sizes: list[int]
):
    model, tokens = GPT(config, V, attention=ALiBi), random_tokens(2, 8, V)
    params = random_params(model)
    logits, _ = logits_in_pieces(model, params, tokens, sizes)
    close(logits, apply(model, params, tokens)[0])


@core
def test_own_attention_in_training_with_dropout():
    """The weights have the bias, and what is read is a sum by the weights that dropout left."""
    config, tokens = replace(ALIBI, dropout=0.25), random_tokens(4, 8, V)
    model = GPT(config, V, attention=ALiBi)
    params = random_params(model)
    _, kept = captured(model, params, tokens, train=True)
    attn = jax.tree.map(np.asarray, kept["intermediates"]["h"]["attn"])
    weights = np.asarray(kept["attention"]["h"]["attn"]["weights"][0])
    qkv = attn["c_attn"]["__call__"][0]  # (L, B, T, 3, H, D)
    scores = np.einsum("LBTHD,LBSHD->LBHTS", qkv[:, :, :, 0], qkv[:, :, :, 1])
    scores = scores / math.sqrt(config.head_size) + alibi_bias(config.n_head, 8)
    scores = np.where(np.tri(8, dtype=bool), np.exp(scores), 0)
    close(weights, scores / scores.sum(axis=-1, keepdims=True))

    dropped = attn["Dropout_0"]["__call__"][0]
    some = weights > 0
    assert (dropped[some] == 0).mean() == pytest.approx(0.25, abs=0.05)
    close(dropped[dropped > 0], weights[dropped > 0] / 0.75)
    read = np.einsum("LBHTS,LBSHD->LBTHD", dropped, qkv[:, :, :, 2])
    kernel, bias = (params["h"]["attn"]["c_proj"][name] for name in ("kernel", "bias"))
    y = np.einsum("LBTHD,LHDC->LBTC", read, kernel) + bias[:, None, None]
    close(attn["c_proj"]["__call__"][0], y)


@core
def test_a_function_is_no_kernel():
    model = GPT(SMALL, V, kernel=causal_attention)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError) as error:
        model.init(jax.random.key(0), random_tokens(1, 2, V))
    message = str(error.value)
    assert "kernel=" in message and "GPT(attention=...)" in message and "\n" not in message


def test_a_kernel_serves_the_plain_attention_only():
    """Where an own attention is given, it is the one that runs."""

    class Called(Exception):
        pass

    def refuse(*_: Any) -> Any:
        raise Called

    tokens, kernel = random_tokens(1, 8, V), Kernel(refuse)
    params = random_params(GPT(ALIBI, V))
    with pytest.raises(Called):
        apply(GPT(ALIBI, V, kernel=kernel), params, tokens)
    ours = apply(GPT(ALIBI, V, attention=ALiBi, kernel=kernel), params, tokens)[0]
    close(ours, apply(GPT(ALIBI, V, attention=ALiBi), params, tokens)[0])


class ParallelBlock(Block):
    """Attention and MLP side by side, as in GPT-J."""

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any = None, start: Any = 0) -> tuple[jax.Array, Any]:
        c = self.config
        attn: Any = self.attention(c, train=self.train, kernel=self.kernel, name="attn")
        read = norm(c, "ln_1")(x)
        y, cache = attn(read, cache, start)
        return x + y + MLP(c, train=self.train, name="mlp")(read), cache


@pytest.mark.parametrize("remat", [False, True])
def test_own_block_equals_numpy(remat: bool):
    config, tokens = replace(SMALL, remat=remat), random_tokens(1, 8, V)
    model = GPT(config, V, block=ParallelBlock)
    params = random_params(model)
    assert sorted(params["h"]) == ["attn", "ln_1", "mlp"]
    exact = reference.float64(params)
    x = exact["wte"]["embedding"][tokens[0]] + exact["wpe"]
    for layer in range(config.n_layer):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], exact["h"])
        read = reference.layer_norm(x, block["ln_1"], config)
        q, k, v = np.split(reference.linear(read, block["attn"]["c_attn"]), 3, axis=-1)
        y = reference.heads_side_by_side(q, k, v, config.n_head, np.tri(8, dtype=bool))
        hidden = reference.gelu(reference.linear(read, block["mlp"]["c_fc"]))
        x = x + reference.linear(y, block["attn"]["c_proj"])
        x = x + reference.linear(hidden, block["mlp"]["c_proj"])
    expected = reference.layer_norm(x, exact["ln_f"], config) @ exact["wte"]["embedding"].T
    close(apply(model, params, tokens)[0][0], expected)
    logits, _ = logits_in_pieces(model, params, tokens, [3, 1, 4])
    close(logits[0], expected)


@core
def test_own_block_with_own_attention():
    config, tokens = replace(ALIBI, n_layer=1), random_tokens(2, 8, V)
    params = random_params(GPT(config, V, block=ParallelBlock))
    one, other = (
        apply(GPT(config, V, block=ParallelBlock, attention=kind), params, tokens)[0]
        for kind in (CausalSelfAttention, ALiBi)
    )
    assert np.abs(one - other).max() > 1e-3


# ---------------------------------------------------------------------------------------------
# Activations


def captured(model: Any, params: Any, tokens: Any, cache: Any = None, train: bool = False) -> Any:
    """Logits and cache; the activations of every module, and the attention weights. Compiled in
    every call: a jit cache would not see a patched constant."""

    @jax.jit
    def run(params: Any, cache: Any) -> Any:
        return model.apply(
            {"params": params},
            jnp.asarray(tokens),
            cache,
            train=train,
            mutable=["intermediates", "attention"],
            capture_intermediates=True,
            rngs={"dropout": jax.random.key(0)},
        )

    return run(params, cache)


@pytest.mark.parametrize("rolled", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_activations_of_every_block(monkeypatch: pytest.MonkeyPatch, remat: bool, rolled: bool):
    """Stacked over layers, in their order, and the same as when each block runs by itself."""
    if rolled:
        monkeypatch.setattr(model_module, "UNROLL_UP_TO", 1)
    config, tokens = replace(SMALL, n_layer=3, remat=remat), jnp.asarray(random_tokens(2, 6, V))
    model = GPT(config, V)
    params = random_params(model)
    (logits, _), kept = captured(model, params, tokens)
    close(logits, apply(GPT(replace(SMALL, n_layer=3), V), params, tokens)[0], 1e-6)
    found = kept["intermediates"]
    shapes = {
        "wte": (2, 6, 8),
        "ln_f": (2, 6, 8),
        "h/ln_1": (3, 2, 6, 8),
        "h/attn/c_attn": (3, 2, 6, 3, 2, 4),
        "h/attn/c_proj": (3, 2, 6, 8),
        "h/ln_2": (3, 2, 6, 8),
        "h/mlp": (3, 2, 6, 8),
        "h/mlp/c_fc": (3, 2, 6, 32),
        "h/mlp/c_proj": (3, 2, 6, 8),
    }
    paths = by_path(found)
    assert {name: paths[f"{name}/__call__/0"].shape for name in shapes} == shapes
    assert set(found["h"]) == {"__call__", "ln_1", "attn", "ln_2", "mlp"}

    run = jax.jit(lambda params, x: Block(config).apply({"params": params}, x)[0])
    x = params["wte"]["embedding"][tokens] + params["wpe"][None, :6]
    for layer, stream in enumerate(found["h"]["__call__"][0][0]):
        x = run(jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["h"]), x)
        close(stream, x)
    inside = np.asarray(found["h"]["attn"]["__call__"][0][0] + found["h"]["mlp"]["__call__"][0])
    stream = np.asarray(found["h"]["__call__"][0][0])
    close(stream[1:], stream[:-1] + inside[1:])


@pytest.mark.parametrize("rolled", [False, pytest.param(True, marks=core)])
@pytest.mark.parametrize("name", ["gpt2", "llama_narrow", "remat"])
def test_attention_weights_of_every_block(monkeypatch: pytest.MonkeyPatch, name: str, rolled: bool):
    """(L, B, H, T, S); they reproduce what the block's attention returned."""
    if rolled:
        monkeypatch.setattr(model_module, "UNROLL_UP_TO", 1)
    config = replace(SMALL, remat=True) if name == "remat" else CONFIGS[name]
    model, tokens = GPT(config, V), random_tokens(2, 6, V)
    params = random_params(model)
    (logits, _), kept = captured(model, params, tokens)
    close(logits, apply(model, params, tokens)[0])
    [weights] = kept["attention"]["h"]["attn"]["weights"]
    L, H = config.n_layer, config.n_head
    assert weights.shape == (L, 2, H, 6, 6) and weights.dtype == jnp.float32
    close(weights.sum(axis=-1), np.ones((L, 2, H, 6)))
    seen = np.asarray(causal_mask(6, 6, window=config.window))[0, 0]
    assert ((np.asarray(weights) > 0) == seen).all()
    attn = kept["intermediates"]["h"]["attn"]
    if "c_kv" in attn:
        v = np.repeat(attn["c_kv"]["__call__"][0][:, :, :, 1], H // 2, axis=3)
    else:
        v = attn["c_attn"]["__call__"][0][:, :, :, 2]
    y = np.einsum("LBHTS,LBSHD->LBTHD", weights, v)
    kernel = params["h"]["attn"]["c_proj"]["kernel"]  # (L, H, D, C)
    y = np.einsum("LBTHD,LHDC->LBTC", y, kernel)
    if config.bias:
        y = y + params["h"]["attn"]["c_proj"]["bias"][:, None, None]
    close(attn["__call__"][0][0], y)


def test_attention_weights_of_cached_decoding():
    model, tokens = GPT(SMALL, V), random_tokens(2, 6, V)
    params = random_params(model)
    whole = captured(model, params, tokens)[1]["attention"]["h"]["attn"]["weights"][0]
    _, cache = apply(model, params, tokens[:, :4], model.init_cache(2))
    found = captured(model, params, tokens[:, 4:], cache=cache)[1]
    [weights] = found["attention"]["h"]["attn"]["weights"]
    assert weights.shape == (2, 2, 2, 2, 8)  # S is the size of the cache
    close(weights[..., :6], whole[..., 4:, :])
    assert not np.asarray(weights[..., 6:]).any()


@core
def test_init_returns_parameters_only():
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    assert list(jax.eval_shape(GPT(SMALL, V).init, jax.random.key(0), tokens)) == ["params"]


# ---------------------------------------------------------------------------------------------
# Unrolling and rematerialisation


def loss_and_gradient(model: Any, params: Any, tokens: np.ndarray, train: bool = False) -> Any:
    """Traced in every call: a jit cache would not see a patched constant."""

    def loss(params: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(7, impl="rbg")}  # compiles fastest
        logits, _ = model.apply({"params": params}, tokens[:, :-1], train=train, rngs=rngs)
        return mean_loss(logits, tokens[:, 1:])

    compiled = jax.jit(jax.value_and_grad(loss))
    return compiled(params), str(jax.make_jaxpr(loss)(params))


def test_unrolled_equals_rolled(monkeypatch: pytest.MonkeyPatch):
    config = replace(SMALL, n_layer=3, n_head=1)
    model, tokens = GPT(config, V), random_tokens(2, 9, V)
    params = random_params(model)
    results, programs = [], []
    for limit in (3, 2):  # unrolled, rolled
        monkeypatch.setattr(model_module, "UNROLL_UP_TO", limit)
        result, program = loss_and_gradient(model, params, tokens)
        results.append(result)
        programs.append(program)
    assert "unroll=3" in programs[0] and "unroll=1" in programs[1]
    jax.tree.map(functools.partial(close, tolerance=1e-6), *results)
    expected = reference.gpt(params, tokens[:, :-1], config)
    close(results[1][0], mean_loss(jnp.asarray(expected, jnp.float32), tokens[:, 1:]))


def test_remat_changes_no_number(monkeypatch: pytest.MonkeyPatch):
    """With dropout: the recomputed blocks must use the same masks."""
    monkeypatch.setattr(model_module, "UNROLL_UP_TO", 1)  # compiles in half the time
    plain = replace(SMALL, dropout=0.3)
    params, tokens = random_params(GPT(plain, V)), random_tokens(2, 9, V)
    expected, program = loss_and_gradient(GPT(plain, V), params, tokens, train=True)
    is_remat = lambda text: "checkpoint" in text or "remat" in text
    assert not is_remat(program)
    for saves in ("nothing", "dots"):
        remat = replace(plain, remat=True, remat_saves=saves)
        actual, rematted = loss_and_gradient(GPT(remat, V), params, tokens, train=True)
        assert is_remat(rematted)
        assert ("policy=None" in rematted) == (saves == "nothing")
        jax.tree.map(functools.partial(close, tolerance=1e-6), actual, expected)


def residuals(config: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of the residuals of the backward pass."""
    model = GPT(config, V)
    tokens = jnp.asarray(random_tokens(2, 8, V))
    forward = lambda params: model.apply({"params": params}, tokens)[0].sum()
    _, pullback = jax.eval_shape(functools.partial(jax.vjp, forward), abstract_params(model))
    return [leaf.shape for leaf in jax.tree.leaves(pullback)]


def test_what_remat_saves(monkeypatch: pytest.MonkeyPatch):
    """In a rolled stack of 3 layers, 2 rows of 8 positions: the attention weights only without
    remat, the MLP's hidden layer only with "dots", the block's input always."""
    monkeypatch.setattr(model_module, "UNROLL_UP_TO", 1)
    config = replace(SMALL, n_layer=3, n_head=1, n_embd=12)
    kept = {
        saves: {shape[1:] for shape in residuals(c) if shape[:1] == (3,)}
        for saves, c in {
            "all": config,
            "nothing": replace(config, remat=True),
            "dots": replace(config, remat=True, remat_saves="dots"),
        }.items()
    }
    weights, inner, given = (2, 1, 8, 8), (16, 48), (2, 8, 12)
    assert all(given in shapes for shapes in kept.values())
    assert weights in kept["all"]
    assert not {weights, inner} & kept["nothing"]
    assert inner in kept["dots"] and weights not in kept["dots"]


# ---------------------------------------------------------------------------------------------
# Init

INIT = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, tie_head=False)
ZERO_INIT = replace(INIT, init="zero")


@functools.cache
def init_params(config: ModelConfig) -> Any:
    """Compiling an init takes seconds: tests share it, with the generator that compiles fastest."""
    key = jax.random.key(0, impl="rbg")
    return jax.jit(GPT(config, 65).init)(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_leaves(config: ModelConfig) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in by_path(init_params(config)).items()}


def test_gpt2_init():
    residual = 0.02 / math.sqrt(2 * INIT.n_layer)
    stds = {
        "wte/embedding": 0.02,
        "wpe": 0.02,
        "lm_head/kernel": 0.02,
        "h/attn/c_attn/kernel": 0.02,
        "h/attn/c_proj/kernel": residual,
        "h/mlp/c_fc/kernel": 0.02,
        "h/mlp/c_proj/kernel": residual,
    }
    for name, leaf in init_leaves(INIT).items():
        if name in stds:  # the share beyond two deviations tells normal from uniform
            assert leaf.std() == pytest.approx(stds.pop(name), rel=0.05)
            assert abs(leaf.mean()) < 0.1 * leaf.std()
            assert 0.035 < (np.abs(leaf) > 2 * leaf.std()).mean() < 0.056
        else:
            assert (leaf == (1.0 if name.endswith("scale") else 0.0)).all()
    assert not stds  # every leaf was found


def test_zero_init():
    """GPT-2's, but for residual projections and the head."""
    ours, gpt2 = init_leaves(ZERO_INIT), init_leaves(INIT)
    zero = {"h/attn/c_proj/kernel", "h/mlp/c_proj/kernel", "lm_head/kernel"}
    for name, leaf in ours.items():
        if name in zero:
            assert not leaf.any()
        else:
            assert leaf.std() == pytest.approx(gpt2[name].std(), rel=0.1)


def test_layers_start_differently():
    for name, leaf in init_leaves(INIT).items():
        if name.startswith("h/") and name.endswith("kernel"):
            for one, other in itertools.pairwise(leaf):
                assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1


def init_loss(model: Any, params: Any) -> float:
    tokens = random_tokens(32, 17, 65)
    return float(jax.jit(mean_loss)(apply(model, params, tokens[:, :-1])[0], tokens[:, 1:]))


def test_loss_before_training():
    params = init_params(INIT)
    assert init_loss(GPT(INIT, 65), params) == pytest.approx(math.log(65), abs=0.05)
    tied = GPT(replace(INIT, tie_head=True), 65)
    params = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    assert init_loss(tied, params) == pytest.approx(math.log(65), abs=0.1)
    assert init_loss(GPT(ZERO_INIT, 65), init_params(ZERO_INIT)) == pytest.approx(
        math.log(65), abs=1e-4
    )


# ---------------------------------------------------------------------------------------------
# Dropout

RATE = 0.25
DROPPING = replace(SMALL, dropout=RATE)


@contextmanager
def recorded(kind: type[nn.Module]) -> Iterator[list[tuple[Any, Any]]]:
    """A list of the (input, output) of every call of a module of this class."""
    calls: list[tuple[Any, Any]] = []

    def interceptor(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = run(*args, **kwargs)
        if isinstance(context.module, kind) and context.method_name == "__call__":
            calls.append((args[0], out))
        return out

    with nn.intercept_methods(interceptor):
        yield calls


def test_dropout_needs_train_and_follows_its_key():
    model, tokens = GPT(DROPPING, V), random_tokens(2, 8, V)
    params = random_params(model)
    off = np.asarray(apply(model, params, tokens)[0])
    np.testing.assert_array_equal(off, apply(GPT(SMALL, V), params, tokens)[0])
    first, again, other = (
        np.asarray(apply(model, params, tokens, train=True, key=jax.random.key(seed))[0])
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - off).max() > 1e-2 and np.abs(first - other).max() > 1e-2


def test_dropout_places_and_rates():
    """On the attention weights, after the projection and after the MLP (lecture)."""
    B, T, C = 4, 32, 32
    block = model_module.Block(replace(DROPPING, n_embd=C, block_size=T), train=True)
    x = normal(B, T, C)

    @jax.jit
    def run(params: Any) -> Any:
        with recorded(nn.Dropout) as calls:
            block.apply({"params": params}, x, None, 0, rngs={"dropout": jax.random.key(1)})
        return calls

    calls = run(random_params(block, 0, x, None, 0))
    assert [before.shape for before, _ in calls] == [(B, 2, T, T), (B, T, C), (B, T, C)]
    np.testing.assert_allclose(np.sum(calls[0][0], axis=-1), 1.0, rtol=1e-5)  # the weights
    for before, after in jax.tree.map(np.asarray, calls):
        nonzero = before != 0  # not those of the causal mask
        assert (after[nonzero] == 0).mean() == pytest.approx(RATE, abs=0.04)
        kept = nonzero & (after != 0)
        close(after[kept], before[kept] / (1 - RATE))
    # Masks differ between examples and between heads.
    zeros = np.asarray(calls[0][1] == 0)
    assert (zeros[0] != zeros[1]).any() and (zeros[:, 0] != zeros[:, 1]).any()


def with_blocks_that_add(params: Any, value: float) -> Any:
    """Parameters with which attention adds 0 to the residual stream, and the MLP a constant."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    h, attn, mlp = params["h"], params["h"]["attn"], params["h"]["mlp"]
    constant = zeros(mlp["c_proj"])
    constant = constant | {"bias": constant["bias"] + value}
    attn, mlp = attn | {"c_proj": zeros(attn["c_proj"])}, mlp | {"c_proj": constant}
    return params | {"h": h | {"attn": attn, "mlp": mlp}}


def test_embeddings_and_head_have_no_dropout():
    """With blocks that add 0, dropout changes nothing."""
    model, tokens = GPT(DROPPING, V), random_tokens(2, 8, V)
    params = with_blocks_that_add(random_params(model), 0.0)
    train = apply(model, params, tokens, train=True, key=jax.random.key(0))[0]
    np.testing.assert_array_equal(train, apply(model, params, tokens)[0])


def test_each_layer_has_its_own_dropout_masks():
    """Each of two layers adds 1, with dropout, to 0: the counts of 0, 1 and 2 are binomial."""
    model, tokens = GPT(replace(DROPPING, n_embd=32, block_size=32), V), random_tokens(8, 32, V)
    params = with_blocks_that_add(random_params(model), 1.0)
    params |= {"wte": jax.tree.map(jnp.zeros_like, params["wte"]), "wpe": 0 * params["wpe"]}
    found = captured(model, params, tokens, train=True)[1]["intermediates"]
    stream = np.asarray(found["h"]["__call__"][0][0][-1]) * (1 - RATE)
    np.testing.assert_allclose(stream, np.rint(stream), atol=1e-5)
    shares = [(np.rint(stream) == n).mean() for n in range(3)]
    expected = [RATE**2, 2 * RATE * (1 - RATE), (1 - RATE) ** 2]
    np.testing.assert_allclose(shares, expected, atol=0.03)


# ---------------------------------------------------------------------------------------------
# Types


@pytest.mark.parametrize("config", [pytest.param(SMALL, marks=core), LLAMA], ids=["gpt2", "llama"])
def test_bfloat16(config: ModelConfig):
    model, tokens = GPT(replace(config, dtype="bfloat16"), V), random_tokens(2, 8, V)
    params = random_params(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    logits, cache = apply(model, params, tokens, model.init_cache(2))
    exact = np.asarray(apply(GPT(config, V), params, tokens)[0])
    assert logits.dtype == jnp.float32 and cache.k.dtype == cache.v.dtype == jnp.bfloat16
    error = np.abs(logits - exact).max()
    assert 1e-4 < error < 0.05 * np.abs(exact).max()  # rounding only


def in_float32(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Make the cast explicit that flax's layer norm, as documented, leaves to promotion."""
    if isinstance(context.module, nn.LayerNorm | nn.RMSNorm):
        args = (args[0].astype(jnp.float32), *args[1:])
    return run(*args, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [DROPPING, UNTIED, LLAMA], ids=["gpt2", "untied", "llama"])
def test_no_silent_promotion(config: ModelConfig, dtype: Any):
    """No implicit float32 in a bfloat16 matmul, no implicit int64 position."""
    model, tokens = GPT(replace(config, dtype=dtype), V), jnp.asarray(random_tokens(2, 4, V))
    params = {"params": random_params(model)}
    forward = lambda *args, **kwargs: jax.eval_shape(
        functools.partial(model.apply, **kwargs), params, *args
    )
    with jax.numpy_dtype_promotion("strict"), nn.intercept_methods(in_float32):
        forward(tokens)
        forward(tokens, train=True, rngs={"dropout": jax.random.key(0)})
        forward(tokens, model.init_cache(2))


# ---------------------------------------------------------------------------------------------
# Parameters


def test_names_and_shapes():
    model = GPT(ModelConfig(n_layer=2, n_head=3, n_embd=12, block_size=5, tie_head=False), 7)
    assert {name: leaf.shape for name, leaf in by_path(abstract_params(model)).items()} == {
        "wte/embedding": (7, 12),
        "wpe": (5, 12),
        "h/ln_1/scale": (2, 12),
        "h/ln_1/bias": (2, 12),
        "h/attn/c_attn/kernel": (2, 12, 3, 3, 4),
        "h/attn/c_attn/bias": (2, 3, 3, 4),
        "h/attn/c_proj/kernel": (2, 3, 4, 12),
        "h/attn/c_proj/bias": (2, 12),
        "h/ln_2/scale": (2, 12),
        "h/ln_2/bias": (2, 12),
        "h/mlp/c_fc/kernel": (2, 12, 48),
        "h/mlp/c_fc/bias": (2, 48),
        "h/mlp/c_proj/kernel": (2, 48, 12),
        "h/mlp/c_proj/bias": (2, 12),
        "ln_f/scale": (12,),
        "ln_f/bias": (12,),
        "lm_head/kernel": (12, 7),
        "lm_head/bias": (7,),
    }


def gpt2_count(L: int, C: int, T: int, vocab_size: int) -> int:
    """Tied GPT-2: 12 C^2 + 13 C per block, two tables, a last norm."""
    return L * (12 * C * C + 13 * C) + (vocab_size + T) * C + 2 * C


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("small", gpt2_count(4, 128, 64, 65)),
        ("small", 809_856),
        ("finetune", 124_439_808),
        ("finetune", gpt2_count(12, 768, 1024, 50257)),
        ("gpt2", gpt2_count(12, 768, 1024, 50304)),  # padded, as nanoGPT's
        ("gpt2-medium", gpt2_count(24, 1024, 1024, 50304)),
        ("gpt2-large", gpt2_count(36, 1280, 1024, 50304)),
        ("gpt2-xl", gpt2_count(48, 1600, 1024, 50304)),
        ("7b", 6_738_415_616),  # Llama 2's
    ],
)
def test_parameter_count(preset: str, count: int):
    params = abstract_params(make_model(PRESETS[preset].model, 65))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@core
def test_make_model():
    assert make_model(SMALL, V) == GPT(SMALL, V)
    padded = replace(SMALL, vocab_size=20)
    assert make_model(padded, V) == GPT(padded, 20)
    own = functools.partial(GPT, block=ParallelBlock)
    assert make_model(padded, V, own) == GPT(padded, 20, block=ParallelBlock)
    mine = nn.Dense(3)
    assert make_model(SMALL, V, mine) is mine
    with pytest.raises(UserError) as error:
        make_model(replace(SMALL, vocab_size=12), V)
    assert str(error.value).startswith("model.vocab_size=12 is less than the tokenizer's 13 tokens")
    with pytest.raises(UserError, match="another ModelConfig"):
        make_model(SMALL, V, GPT(padded, V))


@core
def test_make_model_gives_a_gpt_the_runs_kernel():
    run, mine = Kernel(causal_attention), Kernel(lambda q, k, v: v)
    assert make_model(SMALL, V, kernel=run) == GPT(SMALL, V, kernel=run)
    own = GPT(SMALL, V, attention=ALiBi)
    assert make_model(SMALL, V, own, run) == own.clone(kernel=run)
    chosen = GPT(SMALL, V, kernel=mine)
    assert make_model(SMALL, V, chosen, run) is chosen


# ---------------------------------------------------------------------------------------------
# PyTorch


def torch_gpt(torch: Any, config: ModelConfig, vocab_size: int) -> Any:
    """A GPT-2 made of PyTorch's layers, with our parameter names."""
    C, S, bias = config.n_embd, config.block_size, config.bias
    F = torch.nn.functional

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = torch.nn.Linear(C, 3 * C, bias=bias)
            self.c_proj = torch.nn.Linear(C, C, bias=bias)

        def forward(self, x):
            B, T, _ = x.shape
            split = lambda y: y.view(B, T, config.n_head, C // config.n_head).transpose(1, 2)
            q, k, v = (split(y) for y in self.c_attn(x).split(C, dim=-1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc = torch.nn.Linear(C, 4 * C, bias=bias)
            self.c_proj = torch.nn.Linear(4 * C, C, bias=bias)

        def forward(self, x):
            x = self.c_fc(x)
            x = F.gelu(x, approximate="tanh") if config.activation == "gelu" else F.relu(x)
            return self.c_proj(x)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1 = torch.nn.LayerNorm(C, bias=bias)
            self.attn = Attention()
            self.ln_2 = torch.nn.LayerNorm(C, bias=bias)
            self.mlp = MLP()

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(vocab_size, C)
            self.wpe = torch.nn.Embedding(S, C)
            self.h = torch.nn.ModuleList(Block() for _ in range(config.n_layer))
            self.ln_f = torch.nn.LayerNorm(C, bias=bias)
            if not config.tie_head:
                self.lm_head = torch.nn.Linear(C, vocab_size, bias=bias)

        def forward(self, tokens):
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
            for block in self.h:
                x = block(x)
            x = self.ln_f(x)
            return x @ self.wte.weight.T if config.tie_head else self.lm_head(x)

    return Network()


def torch_layout(params: Any) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients, with PyTorch's names and shapes."""
    out = {}
    for path, leaf in by_path(params).items():
        *modules, kind = path.split("/")
        if path == "wpe":
            modules, kind = ["wpe"], "embedding"
        layers = enumerate(np.asarray(leaf)) if modules[0] == "h" else [(None, np.asarray(leaf))]
        for layer, value in layers:
            names = modules if layer is None else ["h", str(layer), *modules[1:]]
            if kind == "kernel":  # c_proj of attention sums over two axes, the others over one
                summed = 2 if modules[-2:] == ["attn", "c_proj"] else 1
                value = value.reshape(math.prod(value.shape[:summed]), -1).T
            elif kind == "bias":
                value = value.reshape(-1)
            out[".".join([*names, "bias" if kind == "bias" else "weight"])] = np.array(value)
    return out


@pytest.mark.torch
@pytest.mark.parametrize("name", ["gpt2", "relu_untied", "no_bias", "one_head_odd"])
def test_equals_torch(name: str):
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    model, tokens = GPT(config, V), random_tokens(3, config.block_size + 1, V)
    params = random_params(model)
    x, y = tokens[:, :-1], tokens[:, 1:]

    network = torch_gpt(torch, config, V)
    weights = {key: torch.tensor(value) for key, value in torch_layout(params).items()}
    network.load_state_dict(weights)  # strict: both have the same parameters
    logits = network(torch.tensor(x, dtype=torch.long))
    target = torch.tensor(y, dtype=torch.long).reshape(-1)
    torch.nn.functional.cross_entropy(logits.reshape(-1, V), target).backward()

    close(apply(model, params, x)[0], logits.detach().numpy(), 1e-4)
    gradients = jax.grad(lambda params: mean_loss(apply(model, params, x)[0], y))(params)
    theirs = {key: value.grad.numpy() for key, value in network.named_parameters()}
    ours = torch_layout(gradients)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        close(gradient, theirs[key], 1e-4)


def test_torch_layout_agrees_with_numpy():
    """So that the layout above is checked where PyTorch is missing too."""
    params = random_params(GPT(SMALL, V))
    weights, x = torch_layout(params), np.asarray(normal(3, 8))
    first = jax.tree.map(lambda leaf: leaf[0], reference.float64(params["h"]))
    for name in ("c_attn", "c_proj"):
        weight, bias = (weights[f"h.0.attn.{name}.{kind}"] for kind in ("weight", "bias"))
        close(x @ weight.T + bias, reference.linear(x, first["attn"][name]))
