"""Tests of the lecture's stages and notes, with its exact figures."""

import itertools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_params

from gptjax.build import build_model
from gptjax.config import MeshConfig, ModelConfig, differences
from gptjax.errors import UserError
from gptjax.lecture import models as lecture
from gptjax.lecture import notes
from gptjax.model import GPT, CausalSelfAttention
from gptjax.parallel.sharding import make_mesh, shardings
from gptjax.presets import PRESETS
from gptjax.sampling import Sampling, generate
from gptjax.text.dataset import open_dataset

V = 65
STAGES = [name for name in PRESETS if name.startswith("lecture/")]
KINDS = ("averaging", "attention", "feedforward")
SMALL = replace(PRESETS["lecture/4-heads"].model, n_embd=8, block_size=6)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


def tokens_of(batch: int, T: int, vocab_size: int = V, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab_size, size=(batch, T), dtype=np.int32)


def small(kind: str) -> tuple[Any, Any]:
    """A small model of this kind, and random parameters."""
    model = build_model(replace(SMALL, kind=kind), V)
    return model, random_params(model)


# ---------------------------------------------------------------------------------------------
# The averaging trick


def test_the_averaging_matrix_of_three():
    matrix = np.asarray(lecture.averaging_matrix(3))
    close(matrix, [[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert matrix.round(4).tolist()[2] == pytest.approx([0.3333] * 3)


def test_a_softmax_of_masked_zeros_is_the_averaging_matrix():
    weights = np.asarray(lecture.masked_softmax(jnp.zeros((8, 8))))
    close(weights, lecture.averaging_matrix(8))
    assert weights[-1].tolist() == [0.125] * 8
    assert (weights[np.triu_indices(8, 1)] == 0).all()


def test_masked_softmax_of_other_scores():
    scores = np.asarray(normal(5, 5))
    expected = np.tril(np.exp(scores))
    close(lecture.masked_softmax(jnp.asarray(scores)), expected / expected.sum(1, keepdims=True))


def four_ways(x: jax.Array) -> list[jax.Array]:
    C = x.shape[-1]
    indifferent, anything = jnp.zeros((C, 4)), normal(C, 4)
    return [
        lecture.average_by_loops(x),
        lecture.average_by_matrix(x),
        lecture.average_by_softmax(x),
        lecture.one_head(x, indifferent, anything, jnp.eye(C)),
    ]


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4))


@given(shapes, st.integers(0, 2**16))
@settings(max_examples=20)
def test_four_ways_agree(shape: tuple[int, int, int], seed: int):
    x = normal(*shape, seed=seed)
    wanted = [[row[: t + 1].mean(axis=0) for t in range(len(row))] for row in np.asarray(x)]
    for average in four_ways(x):
        assert average.shape == shape
        close(average, wanted)


def test_one_head_equals_numpy():
    B, T, C, D = 4, 8, 32, 16  # the lecture's
    x, query, key, value = normal(B, T, C), *(0.3 * normal(C, D, seed=s) for s in (1, 2, 3))
    out = lecture.one_head(x, query, key, value)
    assert out.shape == (B, T, D)
    exact = reference.float64((x, query, key, value))
    expected = [
        reference.heads_side_by_side(
            row @ exact[1], row @ exact[2], row @ exact[3], 1, np.tri(T, dtype=bool)
        )
        for row in exact[0]
    ]
    close(out, expected, 1e-5)


# ---------------------------------------------------------------------------------------------
# The stages


@pytest.mark.parametrize(
    ("stage", "count"),
    [
        ("1-bigram", 65 * 65),
        ("2-averaging", 65 * 32 + 8 * 32 + 32 * 65 + 65),
        ("3-head", 4481 + 3 * 32 * 32),
        ("4-heads", 4481 + 3 * 32 * 32),
        ("5-feedforward", 7553 + 32 * 32 + 32),
        ("6-residual", 4481 + 3 * (4 * 32 * 32 + 32 + 2 * 4 * 32 * 32 + 4 * 32 + 32)),
        ("6-residual", 41_921),
        ("7-layernorm", 41_921 + (3 * 2 + 1) * 2 * 32),
        ("7-layernorm", 42_369),
        ("8-scale", 10_788_929),  # what the lecture's script prints
    ],
)
def test_parameter_count(stage: str, count: int):
    model = build_model(PRESETS[f"lecture/{stage}"].model, V)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


STEPS = {  # fields that differ from the previous stage
    "lecture/2-averaging": {
        "steps": (3000, 5000),
        "eval_every": (300, 500),
        "save_every": (1000, 500),
        "model.kind": ("bigram", "averaging"),
        "model.n_embd": (128, 32),
        "optim.learning_rate": (1e-2, 1e-3),
    },
    "lecture/3-head": {"model.kind": ("averaging", "attention")},
    "lecture/4-heads": {"model.n_head": (1, 4)},
    "lecture/5-feedforward": {"model.kind": ("attention", "feedforward")},
    "lecture/6-residual": {"model.kind": ("feedforward", "gpt"), "model.n_layer": (1, 3)},
    "lecture/7-layernorm": {"model.norm": ("none", "layer")},
    "lecture/8-scale": {
        "batch_size": (32, 64),
        "model.n_layer": (3, 6),
        "model.n_head": (4, 6),
        "model.n_embd": (32, 384),
        "model.block_size": (8, 256),
        "model.dropout": (0.0, 0.2),
        "optim.learning_rate": (1e-3, 3e-4),
    },
}


def test_each_stage_changes_only_the_expected_fields():
    pairs = itertools.pairwise(STAGES)
    found = {b: differences(PRESETS[a], PRESETS[b]) for a, b in pairs}
    assert found == STEPS
    assert PRESETS["lecture"] == PRESETS["lecture/8-scale"]
    assert PRESETS["bigram"] == PRESETS["lecture/1-bigram"]


@pytest.mark.parametrize("stage", STAGES[1:7])
def test_the_stages_have_the_lectures_settings(stage: str):
    """Batch 32, block 8, width 32, learning rate 1e-3, 5,000 steps, PyTorch's AdamW and init."""
    c = PRESETS[stage]
    m, o = c.model, c.optim
    assert (c.batch_size, c.steps, c.eval_every, c.eval_batches) == (32, 5000, 500, 200)
    assert (m.block_size, m.n_embd, m.dropout, m.init) == (8, 32, 0.0, "torch")
    assert (m.activation, m.tie_head, m.bias, m.qkv_bias) == ("relu", False, True, False)
    assert (o.learning_rate, o.schedule, o.warmup_steps, o.grad_clip) == (1e-3, "constant", 0, None)
    assert (o.weight_decay, o.beta1, o.beta2) == (0.01, 0.9, 0.999)


@pytest.mark.parametrize("kind", (*KINDS, "gpt"))
def test_contract_and_causality(kind: str):
    model, params = small(kind)
    T = SMALL.block_size
    tokens = tokens_of(2, T)
    logits, cache = model.apply({"params": params}, tokens)
    assert logits.shape == (2, T, V) and logits.dtype == jnp.float32 and cache is None
    assert (model.init_cache(2) is None) == (kind != "gpt")
    for t in range(T):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % V
        after, _ = model.apply({"params": params}, changed)
        np.testing.assert_array_equal(after[:, :t], logits[:, :t])
        assert (np.abs(after - logits)[:, t:].max(axis=-1) > 1e-6).all()
    with pytest.raises(UserError, match="T=7 tokens exceed"):
        model.apply({"params": params}, tokens_of(1, T + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_small_models_equal_numpy(kind: str):
    model, params = small(kind)
    tokens = tokens_of(2, SMALL.block_size)
    exact = reference.float64(params)
    T, visible = SMALL.block_size, np.tri(SMALL.block_size, dtype=bool)
    for row, logits in zip(tokens, model.apply({"params": params}, tokens)[0], strict=True):
        x = exact["wte"]["embedding"][row] + exact["wpe"]
        if kind == "averaging":
            x = np.stack([x[: t + 1].mean(axis=0) for t in range(T)])
        else:
            q, k, v = np.split(reference.linear(x, exact["attn"]["c_attn"]), 3, axis=-1)
            x = reference.heads_side_by_side(q, k, v, SMALL.n_head, visible)
        if kind == "feedforward":
            x = np.maximum(reference.linear(x, exact["c_fc"]), 0)
        close(logits, reference.linear(x, exact["lm_head"]), 1e-5)


def test_averaging_ignores_the_order_of_the_past():
    """The sum of the position embeddings is the same in any order."""
    model, params = small("averaging")
    tokens = tokens_of(2, SMALL.block_size)
    last = lambda tokens: model.apply({"params": params}, tokens)[0][:, -1]
    close(last(tokens), last(tokens[:, ::-1]))
    attending, params = small("attention")
    before, after = (
        attending.apply({"params": params}, ids)[0] for ids in (tokens, tokens[:, ::-1])
    )
    assert np.abs(before - after)[:, -1].max() > 1e-4


def test_attention_without_projection_equals_the_gpts_heads():
    """The heads of stage 4 and of the GPT agree for the same parameters."""
    x = normal(2, 6, SMALL.n_embd)
    with_projection: Any = CausalSelfAttention(SMALL)
    params = random_params(with_projection, 0, x)
    heads, _ = CausalSelfAttention(SMALL, project=False).apply(
        {"params": {"c_attn": params["c_attn"]}}, x
    )
    assert heads.shape == x.shape
    projected = reference.linear(np.asarray(heads, np.float64), reference.float64(params["c_proj"]))
    close(projected, with_projection.apply({"params": params}, x)[0], 1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_without_projection(causal: bool):
    x, context = normal(1, 4, SMALL.n_embd), normal(1, 7, SMALL.n_embd, seed=1)
    attend = CausalSelfAttention(SMALL, project=False, causal=causal)
    params = random_params(attend, 0, x, context=context)
    assert sorted(params) == ["c_kv", "c_q"]
    exact = reference.float64(params)
    q = reference.linear(np.asarray(x[0]), exact["c_q"])
    k, v = np.split(reference.linear(np.asarray(context[0]), exact["c_kv"]), 2, axis=-1)
    expected = reference.heads_side_by_side(q, k, v, SMALL.n_head, np.ones((4, 7), bool))
    close(attend.apply({"params": params}, x, context=context)[0][0], expected, 1e-5)


def test_norm_none_is_a_gpt_without_norms():
    model, params = small("gpt")
    assert isinstance(model, GPT) and SMALL.norm == "none"
    assert sorted(params) == ["h", "lm_head", "wpe", "wte"]
    assert sorted(params["h"]) == ["attn", "mlp"]
    # One block by hand: x + attention(x), then x + mlp(x), nothing else.
    tokens = tokens_of(1, 6)
    block = reference.float64(jax.tree.map(lambda leaf: leaf[0], params["h"]))
    exact = reference.float64(params)
    x = exact["wte"]["embedding"][tokens[0]] + exact["wpe"]
    q, k, v = np.split(reference.linear(x, block["attn"]["c_attn"]), 3, axis=-1)
    heads = reference.heads_side_by_side(q, k, v, SMALL.n_head, np.tri(6, dtype=bool))
    x = x + reference.linear(heads, block["attn"]["c_proj"])
    hidden = np.maximum(reference.linear(x, block["mlp"]["c_fc"]), 0)
    x = x + reference.linear(hidden, block["mlp"]["c_proj"])
    logits = model.apply({"params": params}, tokens)[0][0]
    close(logits, reference.linear(x, exact["lm_head"]), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_without_a_cache_sample_past_the_window(kind: str):
    """Greedy, compared with the lecture's loop over cropped contexts."""
    model, params = small(kind)
    text = [3, 1]
    for _ in range(20):
        window = jnp.asarray([text[-SMALL.block_size :]], jnp.int32)
        text.append(int(model.apply({"params": params}, window)[0][0, -1].argmax()))
    prompt, key = np.array([3, 1]), jax.random.key(0)
    chunks = list(generate(model, params, prompt, key, 20, Sampling(temperature=0)))
    assert np.concatenate(chunks, axis=1)[0].tolist() == text[2:]


@pytest.mark.parametrize("kind", KINDS)
def test_stages_can_be_sharded_on_any_mesh(kind: str):
    model = build_model(replace(SMALL, kind=kind), V)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), rows=8)
    placed = shardings(mesh, params)
    assert jax.tree.structure(placed) == jax.tree.structure(params)


# ---------------------------------------------------------------------------------------------
# The counted bigram


def count_pairs(split: np.ndarray) -> list[list[int]]:
    pairs = list(itertools.pairwise(split.tolist()))
    return [[pairs.count((first, second)) for second in range(4)] for first in range(4)]


def test_counted_bigram_equals_brute_force():
    train, val = tokens_of(1, 60, 4, seed=2)[0], tokens_of(1, 40, 4, seed=3)[0]
    train = train[train < 3]  # so that some pairs never occur
    seen, wanted = (count_pairs(split) for split in (train, val))

    def loss(table: Any, split: np.ndarray) -> float:
        pairs = list(itertools.pairwise(split))
        return -sum(math.log(table[a][b] / sum(table[a])) for a, b in pairs) / len(pairs)

    plus_one = [[n + 1 for n in row] for row in seen]
    found = lecture.counted_bigram(train, val, 4)
    assert found.train == pytest.approx(loss(seen, train))
    assert found.val == pytest.approx(loss(plus_one, val))
    assert found.floor == pytest.approx(loss(wanted, val))
    unseen = sum(seen[a][b] == 0 for a, b in itertools.pairwise(val))
    assert found.unseen == unseen > 0
    assert found.floor < found.val


def test_counted_bigram_rejects_a_split_without_pairs():
    with pytest.raises(UserError, match="the validation split has 1 tokens"):
        lecture.counted_bigram(np.array([0, 1]), np.array([0]), 2)


@pytest.mark.shared
def test_counted_bigram_of_tiny_shakespeare(shakespeare: str, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(shakespeare.encode())
    config = replace(PRESETS["bigram"], data=replace(PRESETS["bigram"].data, text=str(path)))
    dataset = open_dataset(config.data, config.model.block_size)
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)
    found = lecture.counted_bigram(dataset.train, dataset.val, dataset.tokenizer.vocab_size)
    assert found == pytest.approx((2.45191342, 2.48188943, 2.37348605, 187), abs=1e-8)


# ---------------------------------------------------------------------------------------------
# The notes

SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
def test_note_1_communication(seed: int):
    found = notes.communication(seed)
    weights = np.asarray(found["weights"])
    assert found["edges"] == 10 and (weights[np.triu_indices(4, 1)] == 0).all()
    close(found["sum of each row"], np.ones(4))
    assert np.ptp(weights[-1]) > 0.05  # not the plain average


@pytest.mark.parametrize("seed", SEEDS)
def test_note_2_sets(seed: int):
    found = notes.sets(seed)
    assert found["without positions"] < 1e-5 and found["with positions"] > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_note_3_batches(seed: int):
    found = notes.batch(seed)
    assert found["first example"] == 0 and found["second example"] > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_note_4_masks(seed: int):
    found = notes.masks(seed)
    assert found["decoder, masked"] == 0 and found["encoder, unmasked"] > 0.01


@pytest.mark.parametrize("seed", SEEDS)
def test_note_5_cross_attention(seed: int):
    found = notes.cross(seed)
    assert found["with x as its own context, difference from self-attention"] < 1e-5
    assert np.array_equal(found["shape of the output"], found["shape of the queries' source"])
    assert found["change when the context changes"] > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_note_6_variances(seed: int):
    found = notes.variances(seed)
    assert 0.95 < found["q"] < 1.05 and 0.95 < found["k"] < 1.05
    assert 14.5 < found["q @ k"] < 17.5
    assert found["q @ k / sqrt(16)"] == pytest.approx(found["q @ k"] / 16, rel=1e-5)


def test_note_6_saturation():
    found = notes.saturation()
    exact = [0.0326, 0.0030, 0.1615, 0.0030, 0.8000]  # the lecture's
    assert np.asarray(found["softmax(8 x)"]).round(4).tolist() == pytest.approx(exact, abs=1e-7)
    assert np.max(found["softmax(x)"]) < 0.3


def test_the_notes_command_prints_all_six(capsys: pytest.CaptureFixture[str]):
    notes.main([])
    printed = capsys.readouterr().out
    assert [line[0] for line in printed.splitlines() if line[:1].isdigit()] == list("123456")
    assert "[0.0326 0.0030 0.1615 0.0030 0.8000]" in printed
    with pytest.raises(UserError):
        notes.main(["--sed", "1"])


def test_every_note_has_a_demonstration():
    assert len(notes.NOTES) == 6
    assert all(line.endswith(".") and show for line, show in notes.NOTES)
    assert ModelConfig().norm == "layer"  # as in runs older than the field
