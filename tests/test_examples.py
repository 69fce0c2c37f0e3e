"""Tests of the examples: each runs, small; the n-gram model against numpy and its own past."""

import ast
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import random_params

import gptjax
from benchmarks import measure
from examples import alibi, custom_loop, own_data, probe, sweep, zloss
from examples.speedrun.ngrams import NGramGPT
from gptjax import MeshConfig, ModelConfig, OptimConfig, UserError
from gptjax.assembly import assemble
from gptjax.generation.slots import generate
from gptjax.parallel import sharding
from gptjax.sampling import Sampling

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
V = 13
SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8)
LLAMA = replace(
    SMALL,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    bias=False,
    norm="rms",
    norm_eps=1e-4,
    position="rotary",
    activation="swiglu",
    block_size=40,
)
MODELS = {
    "none": NGramGPT(SMALL, V),
    "ngram": NGramGPT(replace(SMALL, position="none"), V, ngram=4, pair_rows=200),
    "pairs": NGramGPT(SMALL, V, pair_rows=19),
    "recall": NGramGPT(SMALL, V, recall=1),
    "recall_pairs": NGramGPT(LLAMA, V, recall=2),
    "all": NGramGPT(LLAMA, V, ngram=3, pair_rows=30, recall=1),
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
SHORT = gptjax.Config(
    steps=6, batch_size=8, eval_every=3, save_every=6, mesh=MeshConfig(data=1), model=SMALL
)


@pytest.fixture
def text(tmp_path: Path, play: str) -> str:
    (tmp_path / "play.txt").write_text(play)
    return str(tmp_path / "play.txt")


def random_tokens(batch: int, T: int, vocab_size: int = V) -> np.ndarray:
    return np.random.default_rng(1).integers(vocab_size, size=(batch, T), dtype=np.int32)


@partial(jax.jit, static_argnames="model")
def apply(model: Any, params: Any, tokens: Any, cache: Any = None) -> Any:
    return model.apply({"params": params}, tokens, cache)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# speedrun/ngrams.py


def looked_up(model: NGramGPT, params: Any, tokens: np.ndarray) -> np.ndarray:
    """(T, C): what the tables add to one row of (T,) ids, position by position."""
    rows = [int(token) for token in tokens]
    V, x = model.vocab_size, np.zeros((len(rows), model.config.n_embd))
    for t in range(len(rows)):
        for back in range(1, min(model.ngram - 1, t) + 1):
            x[t] += params["wse"]["embedding"][(back - 1) * V + rows[t - back]]
        if model.pair_rows is not None and t > 0:
            x[t] += params["wbe"]["embedding"][(V * rows[t - 1] + rows[t]) % model.pair_rows]
        if (n := model.recall) is not None and t >= n:
            last = rows[t + 1 - n : t + 1]
            if ends := [s for s in range(t) if rows[: s + 1][-n:] == last]:
                x[t] += params["wre"]["embedding"][rows[ends[-1] + 1]]
    return x


def expected_logits(model: NGramGPT, params: Any, tokens: np.ndarray) -> np.ndarray:
    """By the numpy GPT, which adds what the tables give as it adds embeddings of positions."""
    params = reference.float64(params)
    positions = params.get("wpe", np.zeros((model.config.block_size, model.config.n_embd)))
    return np.concatenate(
        [
            reference.gpt(
                {**params, "wpe": positions[: len(row)] + looked_up(model, params, row)},
                row[None],
                model.config,
            )
            for row in tokens
        ]
    )


@each_model
def test_equals_numpy(model: NGramGPT):
    params, tokens = random_params(model), random_tokens(2, model.config.block_size)
    expected = expected_logits(model, params, tokens)
    close(apply(model, params, tokens)[0], expected)
    if model.ngram > 1 or model.pair_rows or model.recall:  # the tables matter
        without = gptjax.GPT(model.config, V).apply({"params": params}, tokens)[0]
        assert np.abs(np.asarray(without) - expected).max() > 1e-2


@each_model
@pytest.mark.parametrize("sizes", [[8], [1] * 8, [5, 1, 2], [1, 2]], ids=str)
def test_cached_logits_are_those_of_the_full_pass(model: NGramGPT, sizes: list[int]):
    params, tokens = random_params(model), random_tokens(2, sum(sizes))
    cache, logits, start = model.init_cache(2), [], 0
    for size in sizes:
        out, cache = apply(model, params, tokens[:, start : start + size], cache)
        logits.append(out)
        start += size
        assert int(cache.length) == start
    close(np.concatenate(logits, axis=1), apply(model, params, tokens)[0])


@each_model
def test_rows_at_positions_of_their_own(model: NGramGPT):
    params, tokens = random_params(model), random_tokens(2, 8)
    _, cache = apply(model, params, tokens, model.init_cache(2))
    cache = cache._replace(length=jnp.array([3, 5]))
    logits, _ = apply(model, params, np.array([tokens[0, 3:4], tokens[1, 5:6]]), cache)
    full = np.asarray(apply(model, params, tokens)[0])
    close(logits[:, 0], np.array([full[0, 3], full[1, 5]]))


def test_pairs_have_rows_of_their_own_where_there_is_room():
    model = NGramGPT(replace(SMALL, n_layer=1, position="none"), 3, pair_rows=9)
    params = random_params(model)
    pairs = np.array([[a, b] for a in range(3) for b in range(3)], np.int32)
    before = np.asarray(apply(model, params, pairs)[0][:, 1])
    params["wbe"]["embedding"] = jnp.asarray(params["wbe"]["embedding"]).at[4].add(1.0)
    moved = np.asarray(apply(model, params, pairs)[0][:, 1]) != before
    assert moved.any(axis=1).tolist() == [pair == [1, 1] for pair in pairs.tolist()]


def test_numbers_of_pairs_of_a_large_vocabulary():
    """50,256 times 50,257 is more than 31 bits hold."""
    model = NGramGPT(SMALL, 50_257, pair_rows=11)
    params, tokens = random_params(model), 50_256 - random_tokens(1, 8, vocab_size=9)
    close(apply(model, params, tokens)[0], expected_logits(model, params, tokens))


def test_past_the_context_half_of_it_is_read_again():
    model = NGramGPT(replace(LLAMA, block_size=8), V, ngram=3, pair_rows=30, recall=1)
    params, text = random_params(model, seed=2), [1, 2, 3]
    key, sampling = jax.random.key(0), Sampling(temperature=0.0)
    drawn = generate(model, params, np.array(text), key, 30, sampling)
    found = np.concatenate(list(drawn), axis=1)[0].tolist()
    window = text
    for token in found:
        assert token == int(apply(model, params, np.array([window], np.int32))[0][0, -1].argmax())
        window = [*window, token] if len(window) < 8 else [*window[-3:], token]
    assert len(set(found)) > 4


def test_losses_are_those_of_the_model_that_had_the_tables_built_in():
    """Figures of commit 3f79c39, where ngram, pair_rows and recall were fields of ModelConfig."""
    config = replace(
        SHORT,
        steps=8,
        batch_size=4,
        model=ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, dropout=0.1),
        optim=OptimConfig(learning_rate=1e-2),
    )
    losses = first_losses(config, partial(NGramGPT, ngram=3, pair_rows=30, recall=2))
    old = [2.194359, 2.220174, 2.183249, 2.154587, 2.189233, 2.193316, 2.186964, 2.163769]
    np.testing.assert_allclose(losses, old, rtol=2e-6)


def first_losses(config: gptjax.Config, model: Any) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 9, 400).astype(np.uint16)
    setup = assemble(config, 9, model=model)
    on_device = sharding.put(setup.mesh, tokens)
    out = setup.steps(setup.start(), on_device, setup.seed_key(), 0, config.steps_per_dispatch)[1]
    return np.asarray(out["loss"])


def test_on_a_mesh_the_losses_are_the_same():
    """Its tables are sharded as those of the GPT are."""
    make = partial(NGramGPT, ngram=3, pair_rows=40, recall=1)
    config = replace(SHORT, steps_per_dispatch=4)
    sharded = replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    spec = assemble(sharded, 9, model=make).layout.params["wbe"]["embedding"].sharding.spec
    assert spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    np.testing.assert_allclose(first_losses(sharded, make), first_losses(config, make), rtol=1e-5)


@pytest.mark.parametrize("name", ["ngram", "pair_rows", "recall"])
def test_an_option_below_1_is_refused(name: str):
    option: Any = {name: 0}
    with pytest.raises(UserError, match=f"{name}=0 is too small; give 1 or more"):
        jax.eval_shape(NGramGPT(SMALL, V, **option).init, jax.random.key(0), random_tokens(1, 2))


@pytest.mark.parametrize("name", ["ngram", "recall"])
def test_an_option_beyond_the_context_is_refused(name: str):
    """Each is a loop in Python."""
    option: Any = {name: 10_000_000}
    with pytest.raises(UserError, match=f"{name}=10000000 reaches back beyond"):
        jax.eval_shape(NGramGPT(SMALL, V, **option).init, jax.random.key(0), random_tokens(1, 2))


@pytest.mark.parametrize(("name", "dtype"), [("fast", "float32"), ("record", "bfloat16")])
def test_a_speedrun_is_trained_and_sampled(name: str, dtype: str, tmp_path: Path, text: str):
    config, model = measure.recipe(str(EXAMPLES / "speedrun" / f"{name}.py"))
    small = replace(config.model, n_embd=16, n_head=2, n_layer=1, block_size=64, dtype=dtype)
    short = replace(SHORT, model=small, optim=replace(config.optim, warmup_steps=2))
    short = replace(short, data=replace(config.data, text=text))
    record = gptjax.train(short, tmp_path / "run", model=model)
    run = gptjax.load(tmp_path / "run", model=model)
    assert record["val_loss"] < run.metrics[0]["val_loss"] - 0.2
    assert len("".join(run.generate("KING", 10))) == 10
    with pytest.raises(UserError, match="NGramGPT"):
        gptjax.load(tmp_path / "run")


# ---------------------------------------------------------------------------------------------
# The single files


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path: Path):
    source = path.read_text()
    assert len(source.splitlines()) < 60
    doc = ast.get_docstring(ast.parse(source)) or ""
    assert f"examples/{path.name}" in doc and "\n    python " in doc


def test_custom_loop(play: str, capsys: pytest.CaptureFixture[str]):
    losses = custom_loop.main(play, steps=30)
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.5
    assert "step 29: loss" in capsys.readouterr().out


def test_alibi(tmp_path: Path, text: str):
    config = replace(SHORT, model=replace(alibi.config.model, n_layer=2, n_embd=16, block_size=8))
    config = replace(config, data=replace(config.data, text=text))
    gptjax.train(config, tmp_path / "run", model=alibi.model)
    run = gptjax.load(tmp_path / "run", model=alibi.model)
    model: Any = run.model
    ids = np.array([run.tokenizer.encode("the king")], np.int32)
    full = np.asarray(apply(model, run.params, ids)[0])
    cache, logits = model.init_cache(1), []
    for t in range(ids.shape[1]):
        out, cache = apply(model, run.params, ids[:, t : t + 1], cache)
        logits.append(out)
    close(np.concatenate(logits, axis=1), full)
    requests = [run.request(prompt, 12, seed=1) for prompt in ("the king", "a", "lord and")]
    together = run.complete(requests)
    assert together == run.complete(requests)
    assert [r.text for r in together] == [run.complete([r])[0].text for r in requests]
    plain = gptjax.GPT(model.config, run.tokenizer.vocab_size)
    assert np.abs(np.asarray(apply(plain, run.params, ids)[0]) - full).max() > 1e-4
    with pytest.raises(UserError, match="ALiBi"):
        gptjax.load(tmp_path / "run")


def test_zloss(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zloss, "COEFFICIENT", 1.0)
    config = replace(SHORT, steps=30, eval_every=30, optim=OptimConfig(learning_rate=1e-2))
    config = replace(config, data=replace(config.data, text=text))
    ours = {"loss_fn": zloss.loss_fn, "metrics": zloss.metrics}
    last = gptjax.train(config, tmp_path / "run", **ours)
    first, *_ = gptjax.load(tmp_path / "run").metrics
    assert last["loss"] == pytest.approx(last["ce"] + last["z_loss"])
    assert last["val_log_z"] < first["val_log_z"] - 1


def test_probe(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]):
    config = replace(SHORT, data=replace(SHORT.data, text=text))
    gptjax.train(config, tmp_path / "run")
    found = probe.main(tmp_path / "run", "the king")
    for name in ("residual", "attn", "mlp"):
        assert found[name].shape == (2,) and (found[name] > 0).all()
    for name in ("itself", "previous"):
        assert found[name].shape == (2, 2) and (0 < found[name]).all()
    assert (found["itself"] + found["previous"] < 1).all()
    assert "residual" in capsys.readouterr().out


def test_own_data(tmp_path: Path):
    short = {
        "steps": 4,
        "eval_every": 2,
        "batch_size": 16,
        "optim": OptimConfig(learning_rate=1e-2),
    }
    config = replace(own_data.config, mesh=MeshConfig(data=1), **short)
    source = own_data.Additions(rows=16)
    ours: Any = {"batches": source, "metrics": own_data.metrics}
    last = gptjax.train(config, tmp_path / "run", **ours)
    assert 0 <= last["val_exact"] <= 1 and last["val_loss"] < 3
    inputs, targets, mask = source.batch(7)
    question = source.tokenizer.decode(inputs[0])[:5]
    answer = source.tokenizer.decode(targets[0][mask[0] > 0])
    a, b = question.split("+")
    assert int(answer[:3][::-1]) == int(a) + int(b) and answer[3:] == "\n"
    held_out = {source.tokenizer.decode(row)[:5] for b in source.validation for row in b.inputs}
    trained = {
        source.tokenizer.decode(row)[:5] for i in range(50) for row in source.batch(i).inputs
    }
    assert len(held_out) == 1024 and not held_out & trained
    assert "".join(gptjax.load(tmp_path / "run").generate("27+58=", 4))


def test_sweep(play: str, monkeypatch: pytest.MonkeyPatch):
    """Runs that are trained side by side are those that are trained alone."""
    found = sweep.main(play, steps=5, last=1)
    assert list(found) == sweep.RATES.tolist() and len({f"{x:.3f}" for x in found.values()}) > 4
    monkeypatch.setattr(sweep, "RATES", sweep.RATES[4:5])
    [(rate, loss)] = sweep.main(play, steps=5, last=1).items()
    assert loss == pytest.approx(found[rate], rel=1e-5)
