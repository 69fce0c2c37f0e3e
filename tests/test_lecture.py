"""Tests of the lecture's models and notes: their exact figures, and equality with numpy."""

import itertools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import abstract_params, by_path, close, normal, random_params, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.cli import notes as command
from gptjax.config import MeshConfig, differences
from gptjax.errors import UserError
from gptjax.generation.slots import generate
from gptjax.lecture import models as lecture
from gptjax.lecture import notes
from gptjax.lecture.models import STAGES, Embedded, MultiHead
from gptjax.parallel.sharding import make_mesh, shardings
from gptjax.presets import LECTURE_MODELS, PRESETS
from gptjax.sampling import Sampling
from gptjax.text.dataset import open_dataset

V = 65
PRESET_NAMES = [name for name in PRESETS if name.startswith("lecture/")]
SMALL = replace(PRESETS["lecture/6-residual"].model, n_layer=2, n_embd=8, block_size=6)
T = SMALL.block_size
MODELS = (Embedded, *(model for name, model in STAGES.items() if name != "Bigram"))
each_model = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)


def small(kind: Any) -> tuple[Any, Any]:
    """A small model of a class, and random parameters; embeddings are large where there is no
    norm, for attention to be far from a plain average."""
    model = kind(SMALL, V)
    params = random_params(model)
    if kind is not lecture.Transformer:
        params |= {"wte": jax.tree.map(lambda x: 20 * x, params["wte"]), "wpe": 20 * params["wpe"]}
    return model, params


# ---------------------------------------------------------------------------------------------
# The trick


def test_the_averaging_matrix_of_three():
    matrix = np.asarray(lecture.averaging_matrix(3))
    close(matrix, [[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]], 1e-6)
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
    no_query, any_key = jnp.zeros((C, 4)), normal(C, 4)
    return [
        lecture.average_by_loops(x),
        lecture.average_by_matrix(x),
        lecture.average_by_softmax(x),
        lecture.one_head(x, no_query, any_key, jnp.eye(C)),
    ]


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4))


@given(shapes, st.integers(0, 2**16))
@settings(max_examples=20)
def test_four_ways_agree(shape: tuple[int, int, int], seed: int):
    x = normal(*shape, seed=seed)
    expected = [[row[: t + 1].mean(axis=0) for t in range(len(row))] for row in np.asarray(x)]
    for average in four_ways(x):
        assert average.shape == shape
        close(average, expected, 1e-6)


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
# The models


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
    name = f"lecture/{stage}"
    model = STAGES[LECTURE_MODELS[name]](PRESETS[name].model, V)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model))) == count


STEPS = {  # differences from the stage before
    "lecture/2-averaging": {
        "steps": (3000, 5000),
        "eval_every": (300, 500),
        "save_every": (1000, 500),
        "model": ("Bigram", "Averaging"),
        "model.n_embd": (128, 32),
        "optim.learning_rate": (1e-2, 1e-3),
    },
    "lecture/3-head": {"model": ("Averaging", "Attention")},
    "lecture/4-heads": {"model.n_head": (1, 4)},
    "lecture/5-feedforward": {"model": ("Attention", "FeedForward")},
    "lecture/6-residual": {"model": ("FeedForward", "Residual"), "model.n_layer": (1, 3)},
    "lecture/7-layernorm": {"model": ("Residual", "Transformer")},
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


def test_each_preset_differs_from_the_one_before_by_one_idea():
    found = {}
    for a, b in itertools.pairwise(PRESET_NAMES):
        found[b] = differences(PRESETS[a], PRESETS[b])
        if LECTURE_MODELS[a] != LECTURE_MODELS[b]:
            found[b]["model"] = LECTURE_MODELS[a], LECTURE_MODELS[b]
    assert found == STEPS
    for short, name in (("lecture", "lecture/8-scale"), ("bigram", "lecture/1-bigram")):
        assert PRESETS[short] == PRESETS[name]
        assert LECTURE_MODELS[short] == LECTURE_MODELS[name]


@pytest.mark.parametrize("name", PRESET_NAMES[1:7])
def test_settings_of_the_presets(name: str):
    """Lecture: batch 32, block 8, width 32, rate 1e-3, 5,000 steps, PyTorch's AdamW."""
    c = PRESETS[name]
    m, o = c.model, c.optim
    assert (c.batch_size, c.steps, c.eval_every, c.eval_batches) == (32, 5000, 500, 200)
    assert (m.block_size, m.n_embd, m.dropout) == (8, 32, 0.0)
    assert (o.learning_rate, o.schedule, o.warmup_steps, o.grad_clip) == (1e-3, "constant", 0, None)
    assert (o.weight_decay, o.beta1, o.beta2) == (0.01, 0.9, 0.999)


def test_bigram_reads_rows_of_its_table():
    model = lecture.Bigram(SMALL, V)
    tokens = random_tokens(4, 8, V)
    params = model.init(jax.random.key(0), tokens)
    table = np.asarray(params["params"]["wte"]["embedding"])
    assert table.shape == (V, V) and table.std() == pytest.approx(1.0, rel=0.05)
    logits: Any = model.apply(params, tokens)[0]
    assert logits.shape == (4, 8, V) and logits.dtype == jnp.float32
    assert model.apply(params, tokens)[1] is None and model.init_cache(4) is None
    np.testing.assert_array_equal(logits, table[tokens])
    long = random_tokens(1, 100, V)  # far beyond block_size
    np.testing.assert_array_equal(model.apply(params, long)[0], table[long])


@each_model
def test_contract_and_causality(kind: Any):
    model, params = small(kind)
    tokens = random_tokens(2, T, V)
    run = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    logits, cache = run(tokens)
    assert logits.shape == (2, T, V) and logits.dtype == jnp.float32
    assert cache is None and model.init_cache(2) is None
    for t in range(T):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % V
        after = run(changed)[0]
        np.testing.assert_array_equal(after[:, :t], logits[:, :t])
        later = np.abs(after - logits)[:, t:].max(axis=-1) > 1e-6
        assert later[:, 0].all() and (later[:, 1:] == (kind is not Embedded)).all()
    with pytest.raises(UserError, match=f"T={T + 1} tokens exceed model.block_size={T}"):
        model.apply({"params": params}, random_tokens(1, T + 1, V))


def expected_logits(kind: Any, params: Any, row: np.ndarray) -> np.ndarray:
    """(T, V) logits of (T,) ids: the model in numpy, float64."""
    p = reference.float64(params)
    x = p["wte"]["embedding"][row] + p["wpe"][: len(row)]
    if kind is lecture.Averaging:
        x = np.stack([x[: t + 1].mean(axis=0) for t in range(len(x))])
    elif kind in (lecture.Attention, lecture.FeedForward):
        x = expected_attention(p["attn"], x)
        if kind is lecture.FeedForward:
            x = np.maximum(reference.linear(x, p["c_fc"]), 0)
    elif kind is not Embedded:
        norm = lambda x, name: (
            reference.layer_norm(x, p[name], SMALL) if kind is lecture.Transformer else x
        )
        for i in range(SMALL.n_layer):
            x = x + expected_attention(p[f"attn_{i}"], norm(x, f"ln_1_{i}"))
            hidden = reference.linear(norm(x, f"ln_2_{i}"), p[f"mlp_{i}"]["c_fc"])
            x = x + reference.linear(np.maximum(hidden, 0), p[f"mlp_{i}"]["proj"])
        x = norm(x, "ln_f")
    return reference.linear(x, p["lm_head"])


def expected_attention(
    p: Any, x: np.ndarray, context: np.ndarray | None = None, causal: bool = True
) -> np.ndarray:
    """(T, C) outputs of `MultiHead`, in numpy."""
    source = x if context is None else context
    q, k, v = x @ p["query"]["kernel"], source @ p["key"]["kernel"], source @ p["value"]["kernel"]
    visible = np.ones((len(x), len(source)), bool)
    if causal and context is None:
        visible = np.tri(len(x), dtype=bool)
    y = reference.heads_side_by_side(q, k, v, SMALL.n_head, visible)
    return reference.linear(y, p["proj"]) if "proj" in p else y


@each_model
@pytest.mark.parametrize("length", [T, 3])
def test_models_equal_numpy(kind: Any, length: int):
    model, params = small(kind)
    tokens = random_tokens(2, length, V)
    logits = jax.jit(model.apply)({"params": params}, tokens)[0]
    for row, actual in zip(tokens, logits, strict=True):
        expected = expected_logits(kind, params, row)
        close(actual, expected)
        assert expected.std() > 0.1


def test_leaves_of_the_transformer():
    shapes = {name: leaf.shape for name, leaf in by_path(small(lecture.Transformer)[1]).items()}
    block = {
        **{f"attn_0/{name}/kernel": (8, 8) for name in ("query", "key", "value", "proj")},
        "attn_0/proj/bias": (8,),
        "mlp_0/c_fc/kernel": (8, 32),
        "mlp_0/c_fc/bias": (32,),
        "mlp_0/proj/kernel": (32, 8),
        "mlp_0/proj/bias": (8,),
        **{f"ln_{i}_0/{name}": (8,) for i in (1, 2) for name in ("scale", "bias")},
    }
    assert shapes == {
        "wte/embedding": (V, 8),
        "wpe": (T, 8),
        **block,
        **{name.replace("_0/", "_1/"): shape for name, shape in block.items()},
        "ln_f/scale": (8,),
        "ln_f/bias": (8,),
        "lm_head/kernel": (8, V),
        "lm_head/bias": (V,),
    }
    without = {name for name in shapes if not name.startswith("ln_")}
    assert set(by_path(small(lecture.Residual)[1])) == without


def test_averaging_ignores_the_order_of_the_past():
    """Positions add the same sum to the last mean in any order."""
    model, params = small(lecture.Averaging)
    tokens = random_tokens(2, T, V)
    last = lambda tokens: model.apply({"params": params}, tokens)[0][:, -1]
    close(last(tokens), last(tokens[:, ::-1]))
    attending, params = small(lecture.Attention)
    before, after = (
        attending.apply({"params": params}, ids)[0] for ids in (tokens, tokens[:, ::-1])
    )
    assert np.abs(before - after)[:, -1].max() > 1e-2


def test_init_is_pytorchs():
    """Linear layers uniform within +-1/sqrt(fan in), biases too; embeddings from N(0, 1)."""
    config = replace(SMALL, n_layer=1, n_embd=64, block_size=64)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = lecture.Transformer(config, V).init(jax.random.key(0), tokens)["params"]
    for name, leaf in by_path(params).items():
        leaf = np.asarray(leaf)
        if name in ("wte/embedding", "wpe"):
            assert leaf.std() == pytest.approx(1.0, rel=0.05), name
            assert 0.035 < (np.abs(leaf) > 2).mean() < 0.056
        elif "ln_" in name:
            assert (leaf == (1.0 if name.endswith("scale") else 0.0)).all(), name
        else:
            bound = (4 * 64 if name.startswith("mlp_0/proj") else 64) ** -0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound, name
            assert leaf.std() == pytest.approx(bound / math.sqrt(3), rel=0.15), name


@pytest.mark.parametrize(
    ("kind", "variance"),
    [(lecture.Bigram, 1), (lecture.Transformer, 1 / 3)],  # of the logits: half adds to the loss
)
def test_loss_before_training(kind: Any, variance: float):
    """The bigram's is about 4.7, as in the lecture."""
    model = kind(replace(SMALL, n_embd=64, block_size=16), V)
    tokens = random_tokens(32, 17, V)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :1])
    logp = jax.nn.log_softmax(jax.jit(model.apply)(params, tokens[:, :-1])[0])
    loss = -np.take_along_axis(np.asarray(logp), tokens[:, 1:, None], -1).mean()
    assert loss == pytest.approx(math.log(V) + variance / 2, abs=0.15)


def test_dropout():
    """On the attention weights, after the projection and after the MLP; only in training."""
    config, tokens = replace(SMALL, n_layer=1, dropout=0.25, n_embd=64), random_tokens(8, T, V)
    model = lecture.Transformer(config, V)
    params = random_params(model)
    plain = lecture.Transformer(replace(config, dropout=0.0), V)

    def run(model: Any, seed: int | None = None) -> Any:
        train = {} if seed is None else {"rngs": {"dropout": jax.random.key(seed)}}
        return jax.jit(
            lambda params: model.apply(
                {"params": params},
                jnp.asarray(tokens),
                train=bool(train),
                capture_intermediates=True,
                mutable=["intermediates"],
                **train,
            )
        )(params)

    (off, _), _ = run(model)
    np.testing.assert_array_equal(off, run(plain)[0][0])
    (on, _), kept = run(model, 0)
    assert np.abs(on - run(model, 1)[0][0]).max() > 1e-3 < np.abs(on - off).max()
    found = kept["intermediates"]
    weights, projected = map(np.asarray, found["attn_0"]["Dropout_0"]["__call__"])
    [hidden] = map(np.asarray, found["mlp_0"]["Dropout_0"]["__call__"])
    assert weights.shape == (8, 4, T, T) and projected.shape == hidden.shape == (8, T, 64)
    past = np.broadcast_to(np.tri(T, dtype=bool), weights.shape)
    for dropped in (weights[past], projected, hidden):
        assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.05)
    full = np.asarray(found["attn_0"]["proj"]["__call__"][0])
    close(projected[projected != 0], full[projected != 0] / 0.75)


# ---------------------------------------------------------------------------------------------
# MultiHead


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_equals_numpy(causal: bool, project: bool):
    attend, x = MultiHead(SMALL, causal=causal, project=project), normal(2, 5, SMALL.n_embd)
    params = random_params(attend, 0, x)
    assert ("proj" in params) == project
    exact = reference.float64(params)
    y: Any = attend.apply({"params": params}, x)
    close(y, [expected_attention(exact, np.asarray(row), causal=causal) for row in x])


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_equals_numpy(causal: bool, project: bool):
    """Keys and values from a context of another length; never masked (lecture, note 5)."""
    attend = MultiHead(SMALL, causal=causal, project=project)
    x, context = normal(1, 4, SMALL.n_embd), normal(1, 7, SMALL.n_embd, seed=1)
    params = random_params(attend, 0, x)
    y: Any = attend.apply({"params": params}, x, context)
    assert y.shape == x.shape
    exact = reference.float64(params)
    close(y[0], expected_attention(exact, np.asarray(x[0]), np.asarray(context[0])))
    # The first query sees the end of the context.
    other: Any = attend.apply({"params": params}, x, context.at[:, -1].add(1.0))
    assert (np.abs(other - y).max(axis=-1) > 1e-4).all()


def test_attention_without_a_mask_acts_on_a_set():
    """Permuted inputs give permuted outputs (lecture, notes 2 and 4)."""
    x, order = normal(2, 6, SMALL.n_embd), np.random.default_rng(5).permutation(6)
    unmasked, masked = MultiHead(SMALL, causal=False), MultiHead(SMALL)
    params = {"params": random_params(unmasked, 0, x)}  # of both
    change = lambda attend: np.abs(
        attend.apply(params, x[:, order]) - attend.apply(params, x)[:, order]
    ).max()
    assert change(unmasked) < 1e-5 and change(masked) > 1e-2


# ---------------------------------------------------------------------------------------------
# Sampling and sharding


@each_model
def test_sampling_reads_a_sliding_context(kind: Any):
    """Greedy, past block_size, against the lecture's own loop over crops."""
    model, params = small(kind)
    run = jax.jit(lambda window: model.apply({"params": params}, window)[0][0, -1].argmax())
    text = [3, 1]
    for _ in range(20):
        text.append(int(run(jnp.asarray([text[-T:]], jnp.int32))))
    prompt, key = np.array([3, 1]), jax.random.key(0)
    chunks = list(generate(model, params, prompt, key, 20, Sampling(temperature=0)))
    assert np.concatenate(chunks, axis=1)[0].tolist() == text[2:]


@each_model
def test_parameters_can_be_sharded(kind: Any):
    params = abstract_params(kind(SMALL, V))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), rows=8)
    placed = shardings(mesh, params)
    assert jax.tree.structure(placed) == jax.tree.structure(params)
    assert placed["wpe"].spec == jax.sharding.PartitionSpec(None, "fsdp")


# ---------------------------------------------------------------------------------------------
# The counted bigram


def count_pairs(split: np.ndarray) -> list[list[int]]:
    pairs = list(itertools.pairwise(split.tolist()))
    return [[pairs.count((first, second)) for second in range(4)] for first in range(4)]


def test_counted_bigram_equals_brute_force():
    train, val = random_tokens(1, 60, 4, seed=2)[0], random_tokens(1, 40, 4, seed=3)[0]
    train = train[train < 3]  # some pairs never occur
    seen, counts = (count_pairs(split) for split in (train, val))

    def loss(table: Any, split: np.ndarray) -> float:
        pairs = list(itertools.pairwise(split))
        return -sum(math.log(table[a][b] / sum(table[a])) for a, b in pairs) / len(pairs)

    plus_one = [[n + 1 for n in row] for row in seen]
    found = lecture.counted_bigram(train, val, 4)
    assert found.train == pytest.approx(loss(seen, train))
    assert found.val == pytest.approx(loss(plus_one, val))
    assert found.floor == pytest.approx(loss(counts, val))
    unseen = sum(seen[a][b] == 0 for a, b in itertools.pairwise(val))
    assert found.unseen == unseen > 0
    assert found.floor < found.val


def test_counted_bigram_refuses_a_split_without_pairs():
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
    close(found["sum of each row"], np.ones(4), 1e-6)
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
    command.main([], "gptjax notes")
    printed = capsys.readouterr().out
    assert [line[0] for line in printed.splitlines() if line[:1].isdigit()] == list("123456")
    assert "[0.0326 0.0030 0.1615 0.0030 0.8000]" in printed
    with pytest.raises(UserError):
        command.main(["--sed", "1"], "gptjax notes")


def test_every_note_has_a_demonstration():
    assert len(notes.NOTES) == 6
    assert all(line.endswith(".") and show for line, show in notes.NOTES)
