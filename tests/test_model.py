"""Tests of the networks: against a second GPT in numpy, against themselves, against torch."""

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
from reference import random_params

from gptjax import model as model_module
from gptjax.build import build_model
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import GPT, Bigram, CausalSelfAttention
from gptjax.presets import PRESETS

V = 13
SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8)
LECTURE_LIKE = replace(
    SMALL, qkv_bias=False, activation="relu", tie_head=False, init="torch", n_head=4
)
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
    "lecture": LECTURE_LIKE,
    "no_bias": replace(SMALL, bias=False),
    "no_bias_untied": replace(SMALL, bias=False, tie_head=False, activation="relu"),
    "untied": replace(SMALL, tie_head=False),
    "no_qkv_bias": replace(SMALL, qkv_bias=False),
    "one_head_odd": replace(SMALL, n_layer=3, n_head=1, n_embd=7, block_size=5),
    "odd_heads": replace(SMALL, n_layer=1, n_head=3, n_embd=15, block_size=7),
    "narrow_heads": replace(SMALL, n_head=8, n_embd=8),
    "one_token": replace(SMALL, block_size=1),
    "llama": LLAMA,
    "llama_odd": replace(LLAMA, n_head=3, n_kv_head=1, n_embd=18, bias=True, tie_head=False),
    "speedrun": replace(
        SMALL, bias=False, norm="rms", position="rotary", qk_norm=True, activation="relu2"
    ),
    "exact_gelu": replace(SMALL, activation="gelu_erf"),
    "softcap": replace(SMALL, softcap=0.5),
    "ngram": replace(SMALL, ngram=4, position="none", pair_rows=200),
    "pairs": replace(SMALL, pair_rows=19),
    "recall": replace(SMALL, recall=1),
    "recall_pairs": replace(LLAMA, recall=2, block_size=40),
    "window": replace(SMALL, window=4, block_size=16),
    "window_and_rest": replace(SMALL, window=3, block_size=16),
    "one_sees_itself": replace(SMALL, window=1, block_size=4),
    "window_of_all": replace(SMALL, window=99),
    "llama_window": replace(LLAMA, window=4, block_size=12),
    "llama_narrow": replace(LLAMA, window=3),
    "no_position": replace(SMALL, position="none", n_inner=5),
    "eps": replace(SMALL, norm_eps=0.1, qk_norm=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def random_tokens(batch: int, T: int, vocab_size: int = V, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab_size, size=(batch, T), dtype=np.int32)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def apply(
    model: Any, params: Any, tokens: Any, cache: Any = None, train: bool = False, key: Any = None
) -> Any:
    """`model.apply`, compiled once for all tests that use the same model and shapes."""
    rngs = None if key is None else {"dropout": key}
    return model.apply({"params": params}, tokens, cache, train=train, rngs=rngs)


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


def named(tree: Any) -> dict[str, Any]:
    """Leaves by path, as "h/attn/c_attn/kernel"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def abstract_params(model: Any) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def mean_loss(logits: jax.Array, targets: Any) -> jax.Array:
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], -1)
    return -picked.mean()


# ---------------------------------------------------------------------------------------------
# The numbers


@each_config
def test_equals_numpy(config: ModelConfig):
    check_against_numpy(config, config.block_size)


def test_equals_numpy_on_part_of_a_window():
    check_against_numpy(SMALL, 3)


def check_against_numpy(config: ModelConfig, T: int) -> None:
    model = GPT(config, V)
    params, tokens = random_params(model), random_tokens(2, T)
    logits, cache = apply(model, params, tokens)
    assert cache is None and logits.shape == (2, T, V) and logits.dtype == jnp.float32
    expected = reference.gpt(params, tokens, config)
    close(logits, expected)
    assert expected.std() > 0.1  # so that 1e-5 means something


def test_pairs_have_rows_of_their_own_where_there_is_room():
    config = replace(SMALL, n_layer=1, position="none", pair_rows=9)
    params = random_params(GPT(config, 3))
    pairs = np.array([[a, b] for a in range(3) for b in range(3)], np.int32)
    before = np.asarray(apply(GPT(config, 3), params, pairs)[0][:, 1])
    params["wbe"]["embedding"] = jnp.asarray(params["wbe"]["embedding"]).at[4].add(1.0)
    moved = np.asarray(apply(GPT(config, 3), params, pairs)[0][:, 1]) != before
    assert moved.any(axis=1).tolist() == [pair == [1, 1] for pair in pairs.tolist()]


def test_numbers_of_pairs_of_a_large_vocabulary():
    """50,256 times 50,257 is more than 31 bits hold."""
    config = replace(SMALL, pair_rows=11)
    tokens = 50_256 - random_tokens(1, 8, vocab_size=9)
    params = random_params(GPT(config, 50_257))
    close(apply(GPT(config, 50_257), params, tokens)[0], reference.gpt(params, tokens, config))


@each_config
def test_leaves_follow_the_options(config: ModelConfig):
    """The numpy GPT applies the leaves it is given; this says which ones there must be."""
    names = set(named(abstract_params(GPT(config, V))))
    biases = {f"h/{name}/bias" for name in ("attn/c_proj", "mlp/c_fc", "mlp/c_proj")}
    if config.norm == "layer":
        biases |= {"h/ln_1/bias", "h/ln_2/bias", "ln_f/bias"}
    assert names >= biases if config.bias else not any("bias" in n for n in names)
    qkv = {"c_attn"} if config.n_kv_head is None else {"c_q", "c_kv"}
    assert {n.split("/")[2] for n in names if n.startswith("h/attn/")} == qkv | {"c_proj"}
    qkv_biases = {f"h/attn/{name}/bias" for name in qkv}
    assert bool(qkv_biases & names) == (config.bias and config.qkv_bias)
    assert ("wpe" in names) == (config.position == "learned")
    assert ("lm_head/kernel" in names) == (not config.tie_head)
    assert ("lm_head/bias" in names) == (not config.tie_head and config.bias)


def test_causality():
    model, T = GPT(SMALL, V), SMALL.block_size
    params = random_params(model)
    tokens = random_tokens(2, T)
    before = np.asarray(apply(model, params, tokens)[0])
    for t in range(T):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % V
        after = np.asarray(apply(model, params, changed)[0])
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after - before)[:, t:].max(axis=-1) > 1e-4).all()


def test_rows_of_a_batch_do_not_talk():
    model = GPT(SMALL, V)
    params = random_params(model)
    tokens = random_tokens(2, SMALL.block_size)
    changed = tokens.copy()
    changed[1] = (changed[1] + 1) % V
    before, after = (np.asarray(apply(model, params, ids)[0]) for ids in (tokens, changed))
    np.testing.assert_array_equal(after[0], before[0])
    assert np.abs(after[1] - before[1]).min(axis=-1).max() > 1e-4


def logits_in_pieces(model: Any, params: Any, tokens: np.ndarray, sizes: list[int]) -> Any:
    """Read (B, T) ids through the cache, `sizes` at a time; all logits, and the cache."""
    cache, logits, start = model.init_cache(len(tokens)), [], 0
    for size in sizes:
        out, cache = apply(model, params, tokens[:, start : start + size], cache)
        logits.append(np.asarray(out))
        start += size
        assert int(cache.length) == start
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("sizes", [[8], [1] * 8, [5, 1, 1, 1], [1, 5, 2], [1, 2]])
@pytest.mark.parametrize(
    "config",
    [
        CONFIGS[name]
        for name in ("gpt2", "lecture", "llama", "llama_narrow", "ngram", "pairs", "recall")
    ],
)
def test_cache_changes_nothing(config: ModelConfig, sizes: list[int]):
    model = GPT(config, V)
    params = random_params(model)
    tokens = random_tokens(2, sum(sizes))
    logits, cache = logits_in_pieces(model, params, tokens, sizes)
    close(logits, apply(model, params, tokens)[0])
    heads = config.n_kv_head or config.n_head
    assert cache.k.shape == cache.v.shape == (2, 2, heads, 8, config.head_size)
    # What was read is kept; places not read yet are still empty.
    assert (np.abs(cache.k[:, :, :, : sum(sizes)]).max(axis=(2, 4)) > 0).all()
    assert not np.asarray(cache.v[:, :, :, sum(sizes) :]).any()


def test_what_lies_behind_the_length_of_a_cache_is_not_seen():
    """The sampler reads padded prompts and sets the length back; padding must leave no trace."""
    model = GPT(SMALL, V)
    params = random_params(model)
    tokens = random_tokens(2, 8)
    padded = tokens.copy()
    padded[:, 3:] = 0
    _, cache = apply(model, params, padded, model.init_cache(2))
    cache = cache._replace(length=jnp.asarray(3, jnp.int32))
    logits, _ = apply(model, params, tokens[:, 3:8], cache)
    close(logits, apply(model, params, tokens)[0][:, 3:8])


@pytest.mark.parametrize("config", [SMALL, LECTURE_LIKE], ids=["gpt2", "lecture"])
def test_too_long_an_input(config: ModelConfig):
    with pytest.raises(UserError) as error:
        jax.eval_shape(GPT(config, V).init, jax.random.key(0), random_tokens(1, 9))
    assert str(error.value) == "T=9 tokens exceed model.block_size=8; give fewer"


# ---------------------------------------------------------------------------------------------
# Attention, and the lecture's notes on it


def test_attention_equals_jax():
    B, T, H, D = 2, 5, 3, 4
    q, k, v = (2 * normal(B, T, H, D, seed=seed) for seed in range(3))
    ours = functools.partial(model_module.attention, q, k, v)
    theirs = functools.partial(jax.nn.dot_product_attention, q, k, v)
    close(ours(None), theirs())
    close(ours(model_module.causal_mask(T, T)), theirs(is_causal=True))
    mask = (np.random.default_rng(4).random((1, 1, T, T)) < 0.5) | np.eye(T, dtype=bool)
    mask = jnp.asarray(mask)
    close(ours(mask), theirs(mask=mask))


def test_attention_weights_are_scaled():
    """Lecture, note 6: unit-variance queries and keys give unit-variance scores."""
    q, k = normal(1, 200, 1, 16, seed=1), normal(1, 200, 1, 16, seed=2)
    eye = jnp.eye(200)[None, :, None, :]  # as values: the output is the weights themselves
    weights = model_module.attention(q, k, eye, None)[0, :, 0]
    assert 0.9 < float(jnp.log(weights).var(axis=-1).mean()) < 1.1


@pytest.mark.parametrize("T", [1, 7, 128, 130, 256])
def test_causal_attention_in_blocks_equals_jax(T: int):
    """Values and gradients; grouped queries; lengths that are one block and four."""
    q, k, v = (2 * normal(2, T, heads, 8, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    g = normal(2, T, 4, 8, seed=3)
    repeated = lambda x: jnp.repeat(x, 2, axis=2)
    theirs = lambda q, k, v: jax.nn.dot_product_attention(
        q, repeated(k), repeated(v), is_causal=True
    )
    y, back = jax.vjp(model_module.causal_attention, q, k, v)
    expected, expected_back = jax.vjp(theirs, q, k, v)
    close(y, expected)
    jax.tree.map(close, back(g), expected_back(g))


def test_causal_attention_skips_what_nobody_sees():
    """Of 16 pairs of blocks, 6 lie in the future."""
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)

    def flops(f: Any) -> float:
        cost: Any = jax.jit(f).lower(q, q, q).compile().cost_analysis()
        return cost["flops"]

    whole = lambda q, k, v: model_module.attention(q, k, v, model_module.causal_mask(256, 256))
    assert flops(model_module.causal_attention) == pytest.approx(flops(whole) * 10 / 16, rel=0.02)


@pytest.mark.parametrize("start", [0, 2])
def test_causal_mask(start: int):
    mask = model_module.causal_mask(3, 5, start)
    expected = [[key <= start + query for key in range(5)] for query in range(3)]
    assert mask.shape == (1, 1, 3, 5) and mask[0, 0].tolist() == expected


def test_without_the_mask_attention_acts_on_a_set():
    """Lecture, notes 2 and 4: permute the inputs, and the outputs permute."""
    attend = CausalSelfAttention(SMALL, causal=False)
    x = normal(2, 6, SMALL.n_embd)
    params = {"params": random_params(attend, 0, x)}
    order = np.random.default_rng(5).permutation(6)
    y, cache = attend.apply(params, x)
    assert cache is None
    close(attend.apply(params, x[:, order])[0], y[:, order])
    # With the mask it is no longer so, and the same parameters fit both.
    masked = CausalSelfAttention(SMALL)
    y = masked.apply(params, x)[0]
    assert np.abs(masked.apply(params, x[:, order])[0] - y[:, order]).max() > 1e-2


@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_equals_numpy(causal: bool):
    attend = CausalSelfAttention(SMALL, causal=causal)
    x = normal(1, 6, SMALL.n_embd)
    params = random_params(attend, 0, x)
    exact = reference.float64(params)
    q, k, v = np.split(reference.linear(np.asarray(x[0]), exact["c_attn"]), 3, axis=-1)
    visible = np.tri(6, dtype=bool) if causal else np.ones((6, 6), bool)
    heads = reference.heads_side_by_side(q, k, v, SMALL.n_head, visible)
    expected = reference.linear(heads, exact["c_proj"])
    close(attend.apply({"params": params}, x)[0][0], expected)


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention(causal: bool):
    """Lecture, note 5: keys and values from elsewhere, of another length, and all visible."""
    attend = CausalSelfAttention(SMALL, causal=causal)
    x, context = normal(1, 4, SMALL.n_embd), normal(1, 7, SMALL.n_embd, seed=1)
    params = random_params(attend, 0, x, context=context)
    assert sorted(params) == ["c_kv", "c_proj", "c_q"]
    y, cache = attend.apply({"params": params}, x, context=context)
    assert y.shape == x.shape and cache is None
    exact = reference.float64(params)
    q = reference.linear(np.asarray(x[0]), exact["c_q"])
    k, v = np.split(reference.linear(np.asarray(context[0]), exact["c_kv"]), 2, axis=-1)
    heads = reference.heads_side_by_side(q, k, v, SMALL.n_head, np.ones((4, 7), bool))
    close(y[0], reference.linear(heads, exact["c_proj"]))
    # The first query sees the last of the context.
    other = attend.apply({"params": params}, x, context=context.at[:, -1].add(1.0))[0]
    assert (np.abs(other - y).max(axis=-1) > 1e-4).all()


# ---------------------------------------------------------------------------------------------
# Transforms change nothing


def loss_and_gradient(model: Any, params: Any, tokens: np.ndarray, train: bool = False) -> Any:
    """Traced anew each time: no jit, whose cache would not see a changed constant."""

    def loss(params: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(7, impl="rbg")}  # compiles fastest
        logits, _ = model.apply({"params": params}, tokens[:, :-1], train=train, rngs=rngs)
        return mean_loss(logits, tokens[:, 1:])

    compiled = jax.jit(jax.value_and_grad(loss))
    return compiled(params), str(jax.make_jaxpr(loss)(params))


def test_unrolled_equals_rolled(monkeypatch: pytest.MonkeyPatch):
    config = replace(SMALL, n_layer=3, n_head=1)
    model, tokens = GPT(config, V), random_tokens(2, 9)
    params = random_params(model)
    results, programs = [], []
    for limit in (3, 2):  # the third layer is one too many
        monkeypatch.setattr(model_module, "UNROLL_UP_TO", limit)
        result, program = loss_and_gradient(model, params, tokens)
        results.append(result)
        programs.append(program)
    assert "unroll=3" in programs[0] and "unroll=1" in programs[1]
    jax.tree.map(functools.partial(close, tolerance=1e-6), *results)
    expected = reference.gpt(params, tokens[:, :-1], config)
    close(results[1][0], mean_loss(jnp.asarray(expected, jnp.float32), tokens[:, 1:]))


def test_remat_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    """With dropout, for the blocks that are computed again must drop the same again."""
    monkeypatch.setattr(model_module, "UNROLL_UP_TO", 1)  # compiles in half the time
    plain = replace(SMALL, dropout=0.3)
    params, tokens = random_params(GPT(plain, V)), random_tokens(2, 9)
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
    """Shapes of what the forward pass hands to the backward pass."""
    model = GPT(config, V)
    tokens = jnp.asarray(random_tokens(2, 8))
    forward = lambda params: model.apply({"params": params}, tokens)[0].sum()
    _, pullback = jax.eval_shape(functools.partial(jax.vjp, forward), abstract_params(model))
    return [leaf.shape for leaf in jax.tree.leaves(pullback)]


def test_remat_keeps_what_it_says(monkeypatch: pytest.MonkeyPatch):
    """Of a rolled stack of 3 layers, 2 rows of 8 positions: attention's weights only without
    remat, the MLP's inner layer only with the dots, the block's input always."""
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
TORCH_INIT = replace(INIT, init="torch")


@functools.cache
def init_params(config: ModelConfig, kind: type = GPT) -> Any:
    """Compiling an init takes seconds: tests share it, and take the generator that compiles
    fastest."""
    return jax.jit(kind(config, 65).init)(
        jax.random.key(0, impl="rbg"), jnp.zeros((1, 1), jnp.int32)
    )["params"]


def init_leaves(config: ModelConfig) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named(init_params(config)).items()}


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
        if name in stds:  # normal: a share beyond two deviations is what tells it from uniform
            assert leaf.std() == pytest.approx(stds.pop(name), rel=0.05)
            assert abs(leaf.mean()) < 0.1 * leaf.std()
            assert 0.035 < (np.abs(leaf) > 2 * leaf.std()).mean() < 0.056
        else:
            assert (leaf == (1.0 if name.endswith("scale") else 0.0)).all()
    assert not stds  # each was there


def test_torch_init():
    C = INIT.n_embd
    bounds = {  # of a uniform distribution: 1 / sqrt(fan in)
        "lm_head/kernel": C**-0.5,
        "lm_head/bias": C**-0.5,
        "h/attn/c_attn/kernel": C**-0.5,
        "h/attn/c_attn/bias": C**-0.5,
        "h/attn/c_proj/kernel": C**-0.5,
        "h/attn/c_proj/bias": C**-0.5,
        "h/mlp/c_fc/kernel": C**-0.5,
        "h/mlp/c_fc/bias": C**-0.5,
        "h/mlp/c_proj/kernel": (4 * C) ** -0.5,
        "h/mlp/c_proj/bias": (4 * C) ** -0.5,
    }
    for name, leaf in init_leaves(TORCH_INIT).items():
        if name in bounds:
            bound = bounds.pop(name)
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            assert leaf.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        elif name in ("wte/embedding", "wpe"):
            assert leaf.std() == pytest.approx(1.0, rel=0.05)
        else:
            assert (leaf == (1.0 if name.endswith("scale") else 0.0)).all()
    assert not bounds


@pytest.mark.parametrize("config", [INIT, TORCH_INIT], ids=["gpt2", "torch"])
def test_layers_start_differently(config: ModelConfig):
    for name, leaf in init_leaves(config).items():
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
    # With PyTorch's init, logits have a variance of about 1/3; half of it is added to the loss.
    loss = init_loss(GPT(TORCH_INIT, 65), init_params(TORCH_INIT))
    assert loss == pytest.approx(math.log(65) + 1 / 6, abs=0.1)
    # Lecture: about 4.7, for its logits have a variance of 1.
    config = ModelConfig(kind="bigram")
    loss = init_loss(Bigram(config, 65), init_params(config, Bigram))
    assert loss == pytest.approx(math.log(65) + 1 / 2, abs=0.15)


# ---------------------------------------------------------------------------------------------
# Dropout

RATE = 0.25
DROPPING = replace(SMALL, dropout=RATE)


@contextmanager
def recorded(kind: type[nn.Module]) -> Iterator[list[tuple[Any, Any]]]:
    """A list that gets the (input, output) of every call of a module of this kind."""
    calls: list[tuple[Any, Any]] = []

    def interceptor(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = run(*args, **kwargs)
        if isinstance(context.module, kind) and context.method_name == "__call__":
            calls.append((args[0], out))
        return out

    with nn.intercept_methods(interceptor):
        yield calls


def test_dropout_needs_train_and_follows_its_key():
    model, tokens = GPT(DROPPING, V), random_tokens(2, 8)
    params = random_params(model)
    off = np.asarray(apply(model, params, tokens)[0])
    np.testing.assert_array_equal(off, apply(GPT(SMALL, V), params, tokens)[0])
    first, again, other = (
        np.asarray(apply(model, params, tokens, train=True, key=jax.random.key(seed))[0])
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - off).max() > 1e-2 and np.abs(first - other).max() > 1e-2


def test_dropout_places_and_share():
    """Lecture: on the attention weights, after the projection, after the feed-forward."""
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
        nonzero = before != 0  # the mask's zeros prove nothing
        assert (after[nonzero] == 0).mean() == pytest.approx(RATE, abs=0.04)
        kept = nonzero & (after != 0)
        close(after[kept], before[kept] / (1 - RATE))
    # Every example, head and query has its own.
    zeros = np.asarray(calls[0][1] == 0)
    assert (zeros[0] != zeros[1]).any() and (zeros[:, 0] != zeros[:, 1]).any()


def with_blocks_that_add(params: Any, value: float) -> Any:
    """Attention adds nothing to the residual stream, the MLP a constant."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    h, attn, mlp = params["h"], params["h"]["attn"], params["h"]["mlp"]
    constant = zeros(mlp["c_proj"])
    constant = constant | {"bias": constant["bias"] + value}
    attn, mlp = attn | {"c_proj": zeros(attn["c_proj"])}, mlp | {"c_proj": constant}
    return params | {"h": h | {"attn": attn, "mlp": mlp}}


def test_nothing_is_dropped_from_the_embedding_or_the_head():
    """With blocks that add nothing, dropout has nothing left to act on."""
    model, tokens = GPT(DROPPING, V), random_tokens(2, 8)
    params = with_blocks_that_add(random_params(model), 0.0)
    train = apply(model, params, tokens, train=True, key=jax.random.key(0))[0]
    np.testing.assert_array_equal(train, apply(model, params, tokens)[0])


def test_each_layer_drops_its_own():
    """Each of two layers adds a dropped-out 1 to 0: their sum tells how often both dropped it."""
    model, tokens = GPT(replace(DROPPING, n_embd=32, block_size=32), V), random_tokens(8, 32)
    params = with_blocks_that_add(random_params(model), 1.0)
    params |= {"wte": jax.tree.map(jnp.zeros_like, params["wte"]), "wpe": 0 * params["wpe"]}

    @jax.jit
    def residual_stream(params: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        with recorded(nn.LayerNorm) as calls:
            model.apply({"params": params}, tokens, train=True, rngs=rngs)
        return calls[-1][0]  # what ln_f reads

    stream = np.asarray(residual_stream(params)) * (1 - RATE)
    np.testing.assert_allclose(stream, np.rint(stream), atol=1e-5)
    shares = [(np.rint(stream) == n).mean() for n in range(3)]
    expected = [RATE**2, 2 * RATE * (1 - RATE), (1 - RATE) ** 2]
    np.testing.assert_allclose(shares, expected, atol=0.03)


# ---------------------------------------------------------------------------------------------
# Types


@pytest.mark.parametrize("config", [SMALL, LECTURE_LIKE], ids=["gpt2", "lecture"])
def test_bfloat16(config: ModelConfig):
    model, tokens = GPT(replace(config, dtype="bfloat16"), V), random_tokens(2, 8)
    params = random_params(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    logits, cache = apply(model, params, tokens, model.init_cache(2))
    exact = np.asarray(apply(GPT(config, V), params, tokens)[0])
    assert logits.dtype == jnp.float32 and cache.k.dtype == cache.v.dtype == jnp.bfloat16
    error = np.abs(logits - exact).max()
    assert 1e-4 < error < 0.05 * np.abs(exact).max()  # rounded, and not more than that


def in_float32(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Spell out the cast that flax's layer norm leaves to promotion, as it documents."""
    if isinstance(context.module, nn.LayerNorm):
        args = (args[0].astype(jnp.float32), *args[1:])
    return run(*args, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [DROPPING, LECTURE_LIKE], ids=["gpt2", "lecture"])
def test_no_silent_promotion(config: ModelConfig, dtype: Any):
    """No float32 slips into a bfloat16 matmul, no int64 into a position."""
    model, tokens = GPT(replace(config, dtype=dtype), V), jnp.asarray(random_tokens(2, 4))
    params = {"params": random_params(model)}
    forward = lambda *args, **kwargs: jax.eval_shape(
        functools.partial(model.apply, **kwargs), params, *args
    )
    with jax.numpy_dtype_promotion("strict"), nn.intercept_methods(in_float32):
        forward(tokens)
        forward(tokens, train=True, rngs={"dropout": jax.random.key(0)})
        forward(tokens, model.init_cache(2))
        Bigram(config, V).apply({"params": {"wte": {"embedding": jnp.eye(V)}}}, tokens)


# ---------------------------------------------------------------------------------------------
# Parameters


def test_names_and_shapes():
    model = GPT(ModelConfig(n_layer=2, n_head=3, n_embd=12, block_size=5, tie_head=False), 7)
    assert {name: leaf.shape for name, leaf in named(abstract_params(model)).items()} == {
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
    """Tied GPT-2: 12 C^2 + 13 C a block, two tables, a last norm."""
    return L * (12 * C * C + 13 * C) + (vocab_size + T) * C + 2 * C


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("bigram", 65 * 65),
        ("small", gpt2_count(4, 128, 64, 65)),
        ("small", 809_856),
        ("lecture", 10_788_929),  # what the lecture's script prints
        ("gpt2", 124_439_808),
        ("gpt2", gpt2_count(12, 768, 1024, 50257)),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("7b", 6_738_415_616),  # Llama 2's
    ],
)
def test_parameter_count(preset: str, count: int):
    params = abstract_params(build_model(PRESETS[preset].model, 65))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_build_model():
    assert build_model(SMALL, V) == GPT(SMALL, V)
    assert build_model(replace(SMALL, vocab_size=20), V) == GPT(replace(SMALL, vocab_size=20), 20)
    bigram = replace(SMALL, kind="bigram", vocab_size=V)
    assert build_model(bigram, V) == Bigram(bigram, V)
    with pytest.raises(UserError) as error:
        build_model(replace(SMALL, vocab_size=12), V)
    assert str(error.value) == (
        "model.vocab_size=12 is less than the tokenizer's 13 tokens; leave it out, or give 13 or "
        "more"
    )


def test_bigram_reads_a_row_of_its_table():
    model = Bigram(ModelConfig(kind="bigram", block_size=8), 65)
    tokens = random_tokens(4, 8, 65)
    params = model.init(jax.random.key(0), tokens)
    table = np.asarray(params["params"]["wte"]["embedding"])
    assert table.shape == (65, 65) and table.std() == pytest.approx(1.0, rel=0.05)
    logits, cache = model.apply(params, tokens)
    assert logits.shape == (4, 8, 65) and logits.dtype == jnp.float32
    assert cache is None and model.init_cache(4) is None
    np.testing.assert_array_equal(logits, table[tokens])
    long = random_tokens(1, 100, 65)  # far beyond block_size
    np.testing.assert_array_equal(model.apply(params, long)[0], table[long])


# ---------------------------------------------------------------------------------------------
# PyTorch


def torch_gpt(torch: Any, config: ModelConfig, vocab_size: int) -> Any:
    """A GPT-2 of torch's own layers, named as ours are."""
    C, S, bias = config.n_embd, config.block_size, config.bias
    F = torch.nn.functional

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = torch.nn.Linear(C, 3 * C, bias=bias and config.qkv_bias)
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
    """Our parameters, or their gradients, under torch's names and in torch's shapes."""
    out = {}
    for path, leaf in named(params).items():
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
@pytest.mark.parametrize("name", ["gpt2", "lecture", "no_bias", "one_head_odd"])
def test_equals_torch(name: str):
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    model, tokens = GPT(config, V), random_tokens(3, config.block_size + 1)
    params = random_params(model)
    x, y = tokens[:, :-1], tokens[:, 1:]

    network = torch_gpt(torch, config, V)
    weights = {key: torch.tensor(value) for key, value in torch_layout(params).items()}
    network.load_state_dict(weights)  # strict: every parameter of both has its counterpart
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
    """The comparison above is only as good as its layout; this much holds without torch."""
    params = random_params(GPT(SMALL, V))
    weights, x = torch_layout(params), np.asarray(normal(3, 8))
    first = jax.tree.map(lambda leaf: leaf[0], reference.float64(params["h"]))
    for name in ("c_attn", "c_proj"):
        weight, bias = (weights[f"h.0.attn.{name}.{kind}"] for kind in ("weight", "bias"))
        close(x @ weight.T + bias, reference.linear(x, first["attn"][name]))
