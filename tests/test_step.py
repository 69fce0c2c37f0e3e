"""Tests of the train step: the same numbers however it is cut, and nothing but (seed, step)."""

import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.build import build_model
from gptjax.config import Config, DataConfig, ModelConfig, OptimConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.optim import make_optimizer
from gptjax.presets import PRESETS
from gptjax.step import (
    TrainState,
    cross_entropy,
    eval_starts,
    init_state,
    make_evaluate,
    make_gradient,
    make_train_steps,
)
from gptjax.text.tokenizers import CharTokenizer
from gptjax.training import train

VOCAB = 13
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0.2)
# Everything random or repeated is on: dropout, micro-batches, several updates a call.
CONFIG = Config(
    steps=40,
    batch_size=4,
    steps_per_dispatch=4,
    model=MODEL,
    optim=OptimConfig(learning_rate=0.01, warmup_steps=3, accumulate=2),
)
BIGRAM = replace(CONFIG, model=ModelConfig(kind="bigram", block_size=8))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, 400), jnp.uint16)
# Tiny programs take longer to compile than to run; this way a third as long.
QUICK = {"xla_backend_optimization_level": 0}
KEY = jax.random.key(0)
GOLDEN = Path(__file__).with_name("golden_cpu.json")


quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


class Program(NamedTuple):
    """The compiled functions of a config, as `train` makes them, on one device."""

    init: Callable[[jax.Array], TrainState]
    steps: Any  # jitted
    evaluate: Any  # jitted


@functools.cache
def init_params(model: nn.Module) -> Any:
    no_optimizer = optax.identity()
    return quick_jit(lambda key: init_state(model, no_optimizer, key).params)


@functools.cache
def program(config: Config, sgd: bool = False) -> Program:
    model = build_model(config.model, VOCAB)
    optimizer = optax.sgd(0.5) if sgd else make_optimizer(config)
    # Configs that differ in nothing else start from the same parameters: compile that once.
    undropped = build_model(replace(config.model, dropout=0.0), VOCAB)

    def init(key: jax.Array) -> TrainState:
        params = init_params(undropped)(key)
        average = None if config.optim.ema is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)

    return Program(
        init,
        quick_jit(make_train_steps(model, optimizer, config), donate_argnums=0),
        quick_jit(make_evaluate(model, config)),
    )


def trained(
    config: Config, *calls: int, sgd: bool = False, seed: int = 0, tokens: jax.Array = TOKENS
) -> tuple[TrainState, np.ndarray]:
    """The state after calls of so many updates each, and the loss of every update."""
    run, key = program(config, sgd), jax.random.key(seed)
    state, losses = run.init(key), []
    for n in calls:
        state, out = run.steps(state, tokens, key, n)
        losses.append(np.asarray(out.loss)[:n])
    return state, np.concatenate(losses)


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def assert_close(a: Any, b: Any, atol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


# ---------------------------------------------------------------------------------------------
# The loss


def numpy_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])  # 1000: exp would overflow
def test_cross_entropy_equals_numpy(dtype, scale):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(2, 5, VOCAB)) * scale, dtype)
    targets = rng.integers(0, VOCAB, (2, 5))
    losses = cross_entropy(logits, jnp.asarray(targets))
    assert losses.dtype == jnp.float32
    expected = numpy_cross_entropy(np.asarray(logits, np.float32), targets)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


ONE = replace(CONFIG, model=replace(MODEL, n_layer=1), optim=OptimConfig())
HEADS = [
    pytest.param({"softcap": 2.0}, id="tied"),
    pytest.param({"tie_head": False, "norm": "rms", "position": "rotary"}, id="untied"),
]


def gradient_of(config: Config) -> tuple[jax.Array, Any]:
    model = build_model(config.model, VOCAB)
    params = jax.tree.map(  # far from the start, where all logits are alike
        lambda x: x * 5, init_params(build_model(replace(config.model, dropout=0.0), VOCAB))(KEY)
    )
    windows = TOKENS[: 4 * 9].reshape(4, 9).astype(jnp.int32)
    return quick_jit(make_gradient(model, config))(params, windows, KEY, 3)


@pytest.mark.parametrize("head", HEADS)
def test_a_loss_in_chunks_is_the_loss_and_so_is_its_gradient(head):
    config = replace(ONE, model=replace(ONE.model, **head))
    loss, gradient = gradient_of(config)
    chunked_loss, chunked = gradient_of(replace(config, loss_chunk=2))
    assert float(chunked_loss) == pytest.approx(float(loss), rel=1e-6)
    assert_close(chunked, gradient, 1e-6 * float(optax.tree.norm(gradient)))


def test_chunks_of_bfloat16_add_up_in_float32():
    """The head's gradient is a sum over chunks; rounding each of them is all that may differ."""
    config = replace(ONE, model=replace(ONE.model, dtype="bfloat16", dropout=0.0))
    loss, gradient = gradient_of(config)
    chunked_loss, chunked = gradient_of(replace(config, loss_chunk=1))
    assert float(chunked_loss) == pytest.approx(float(loss), rel=1e-3)
    assert {x.dtype for x in jax.tree.leaves(chunked)} == {jnp.dtype("float32")}
    assert_close(chunked, gradient, 0.01 * float(optax.tree.norm(gradient)))


def test_chunked_logits_never_exist_at_once():
    config = ONE
    whole, part = f"f32[4,8,{VOCAB}]", f"f32[4,2,{VOCAB}]"
    assert whole in jaxpr(config) and part not in jaxpr(config)
    chunked = jaxpr(replace(config, loss_chunk=2))
    assert part in chunked and whole not in chunked and f"f32[32,{VOCAB}]" not in chunked


def test_a_large_vocabulary_takes_less_memory_in_chunks():
    """64 x 8 logits of 20,000 tokens are 41 MB, and an eighth of that in chunks of one."""
    config = replace(ONE, batch_size=64, model=replace(ONE.model, vocab_size=20_000, dropout=0.0))

    def temporaries(config: Config) -> int:
        model = build_model(config.model, VOCAB)
        params = jax.eval_shape(functools.partial(init_state, model, optax.identity()), KEY).params
        windows = jax.ShapeDtypeStruct((64, 9), jnp.int32)
        lowered = quick_jit(make_gradient(model, config)).lower(params, windows, KEY, 0)
        memory: Any = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes

    logits = 64 * 8 * 20_000 * 4
    assert temporaries(config) > 1.5 * logits
    assert temporaries(replace(config, loss_chunk=1)) < 0.75 * logits


def test_a_model_of_your_own_without_a_head_has_no_chunks():
    model = MeanOfThePast(MODEL, VOCAB)
    with pytest.raises(UserError) as caught:
        jax.eval_shape(
            make_gradient(model, replace(CONFIG, loss_chunk=4)), {}, jnp.zeros((4, 9), int), KEY, 0
        )
    assert str(caught.value) == (
        "loss_chunk=4 needs a model with the methods features and head, as GPT has; leave "
        "loss_chunk out"
    )


def test_a_new_model_knows_nothing():
    _, losses = trained(CONFIG, 1)
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.1)


def test_one_batch_can_be_learnt_by_heart():
    config = replace(
        CONFIG,
        steps=100,
        steps_per_dispatch=100,
        model=replace(MODEL, dropout=0.0),
        optim=OptimConfig(learning_rate=0.01),
    )
    one_window = TOKENS[: MODEL.block_size + 1]  # so that every batch is the same
    _, losses = trained(config, 100, tokens=one_window)
    assert losses[0] > 2 and losses[-1] < 0.1


# ---------------------------------------------------------------------------------------------
# The average


def test_the_average_is_that_of_the_parameters_after_each_step():
    config = replace(CONFIG, optim=replace(CONFIG.optim, ema=0.3))
    run, key = program(config), jax.random.key(0)
    state = run.init(key)
    assert state.weights is state.average
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    for step in range(8):
        state, _ = run.steps(state, TOKENS, key, 1)
        decay = min(0.3, (1 + step) / (10 + step))
        mean = lambda a, p, decay=decay: decay * a + (1 - decay) * np.asarray(p, np.float64)
        expected = jax.tree.map(mean, expected, state.params)
    assert decay == 0.3  # the cap was reached, and the rise before it was seen
    assert_close(state.average, expected, 1e-6)
    plain, _ = trained(CONFIG, 4, 4)
    assert_close(state.params, plain.params, 1e-6)  # it changes nothing else
    assert plain.weights is plain.params


# ---------------------------------------------------------------------------------------------
# Accumulation


def accumulating(G: int) -> Config:
    optim = replace(CONFIG.optim, accumulate=G)
    return replace(CONFIG, model=replace(MODEL, dropout=0.0), optim=optim)


@pytest.mark.parametrize("G", [2, 4])
def test_micro_batches_make_the_same_update(G):
    """With plain SGD: Adam would divide the gradient's size away, and blow up its rounding."""
    whole, whole_losses = trained(accumulating(1), 3, sgd=True)
    parts, losses = trained(accumulating(G), 3, sgd=True)
    assert_close(parts.params, whole.params, 1e-6)
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-6)


def test_micro_batches_make_the_same_update_under_adamw():
    whole, _ = trained(accumulating(1), 3)
    parts, _ = trained(accumulating(2), 3)
    assert_close(parts.params, whole.params, 1e-4)


def jaxpr(config: Config) -> str:
    model, optimizer = build_model(config.model, VOCAB), optax.sgd(0.5)
    key = jax.random.key(0)
    state = jax.eval_shape(functools.partial(init_state, model, optimizer), key)
    return str(jax.make_jaxpr(make_train_steps(model, optimizer, config))(state, TOKENS, key, 1))


def test_micro_batches_are_smaller():
    """What the tests above compare are different programs: 4 rows at once, or 2."""
    assert "i32[4,8]" in jaxpr(accumulating(1)) and "i32[2,8]" not in jaxpr(accumulating(1))
    assert "i32[2,8]" in jaxpr(accumulating(2)) and "i32[4,8]" not in jaxpr(accumulating(2))


# ---------------------------------------------------------------------------------------------
# Updates per call


@functools.cache
def seven_updates() -> tuple[TrainState, np.ndarray]:
    return trained(CONFIG, 4, 3)


@pytest.mark.parametrize("calls", [(1,) * 7, (2, 1, 4)])
def test_calls_can_be_grouped_in_any_way(calls):
    state, losses = trained(CONFIG, *calls)
    assert_same(state, seven_updates()[0])
    assert_same(losses, seven_updates()[1])
    assert int(state.step) == 7


def test_steps_per_dispatch_never_changes_the_numbers():
    state, losses = trained(replace(CONFIG, steps_per_dispatch=1), *(1,) * 7)
    assert_same(state, seven_updates()[0])
    assert_same(losses, seven_updates()[1])


def test_metrics_beyond_the_updates_made_are_empty():
    run, key = program(CONFIG), jax.random.key(0)
    _, out = run.steps(run.init(key), TOKENS, key, 3)
    for values in out:
        assert values.shape == (4,) and values.dtype == jnp.float32
        assert np.all(np.asarray(values)[:3] > 0) and values[3] == 0
    # The rate of each update, as the optimizer uses it.
    np.testing.assert_allclose(out.lr[:3], [0.0025, 0.005, 0.0075], rtol=1e-6)


def test_the_logged_norm_is_that_of_the_gradient_before_clipping():
    """Plain SGD tells the gradient: it moves by 0.5 times that."""
    run, key = program(accumulating(2), sgd=True), jax.random.key(0)
    before = run.init(key)
    old = jax.tree.map(np.asarray, before.params)
    after, out = run.steps(before, TOKENS, key, 1)
    moved = jax.tree.map(lambda x, y: (x - np.asarray(y)) / 0.5, old, after.params)
    assert float(out.grad_norm[0]) == pytest.approx(float(optax.tree.norm(moved)), rel=1e-4)


def test_train_compiles_once_and_donates_its_state(tmp_path, play, monkeypatch):
    """In `train` itself, whose dispatches are of 4, 1, 4, 1 updates."""
    compiled, donated, real_jit = [], [], jax.jit

    def spying_jit(function: Any, **options: Any) -> Any:
        jitted = real_jit(function, compiler_options=QUICK, **options)
        if getattr(function, "__name__", "") != "train_steps":
            return jitted
        compiled.append(jitted)

        def call(state: TrainState, *rest: Any) -> Any:
            result = jitted(state, *rest)
            donated.append(all(leaf.is_deleted() for leaf in jax.tree.leaves(state)))
            return result

        return call

    monkeypatch.setattr(jax, "jit", spying_jit)
    config = replace(BIGRAM, steps=10, eval_every=5, save_every=10, data=text_file(tmp_path, play))
    train(config, tmp_path / "run", report=Report(quiet=True))
    assert donated == [True] * 4
    assert [jitted._cache_size() for jitted in compiled] == [1]


def test_nothing_is_transferred_between_calls():
    run, key, n = program(CONFIG), jax.random.key(0), jax.device_put(np.int32(4))
    state, out = run.steps(run.init(key), TOKENS, key, n)
    with jax.transfer_guard("disallow"):
        for _ in range(4):
            state, out = run.steps(state, TOKENS, key, n)
    assert np.isfinite(np.asarray(out.loss)).all()
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        run.steps(state, np.asarray(TOKENS), key, n)  # the guard is awake


# ---------------------------------------------------------------------------------------------
# Randomness follows from (seed, step)


class Recorder(nn.Module):
    """A table of logits that notes what it is trained on: its tokens and its dropout key."""

    config: ModelConfig
    note: Callable[..., None]

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: None = None, train: bool = False) -> Any:
        if train:
            key = jax.random.key_data(self.make_rng("dropout"))
            jax.debug.callback(self.note, tokens, key, ordered=True)
        return self.param("table", nn.initializers.normal(), (VOCAB, VOCAB))[tokens], None


@functools.cache
def recorder() -> tuple[Any, ...]:
    """The list that fills as a Recorder trains, and its compiled functions."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    note = lambda tokens, key: seen.append((np.array(tokens), np.array(key)))
    model, optimizer = Recorder(MODEL, note), optax.sgd(0.1)
    init = functools.partial(init_state, model, optimizer)
    steps = quick_jit(make_train_steps(model, optimizer, CONFIG))
    return seen, init, steps, quick_jit(make_evaluate(model, CONFIG))


def recorded(*calls: int, seed: int = 0, start: int = 0, evaluating: bool = False) -> Any:
    """(tokens, dropout key) of each micro-batch, two to an update."""
    seen, init, steps, evaluate = recorder()
    key = jax.random.key(seed)
    state = init(key)._replace(step=jnp.int32(start))
    jax.effects_barrier()
    seen.clear()
    for n in calls:
        state, _ = steps(state, TOKENS, key, n)
        if evaluating:
            evaluate(state.params, TOKENS, eval_starts(CONFIG, 400, key, int(state.step), True))
    jax.effects_barrier()
    return list(seen)


def test_batches_and_dropout_follow_from_seed_and_step():
    seen = recorded(4, 2)
    assert len(seen) == 6 * 2
    assert_same(seen, recorded(1, 1, 4, evaluating=True))
    assert_same(seen[3 * 2 :], recorded(3, start=3))  # where a resumed run would begin
    for tokens, _ in seen:
        assert tokens.shape == (2, 8) and tokens.dtype == np.int32


def test_no_two_micro_batches_share_tokens_or_dropout():
    seen = recorded(4, 2) + recorded(4, 2, seed=1)
    for i in range(2):
        assert len({part[i].tobytes() for part in seen}) == len(seen)


def test_dropout_is_in_force():
    """Without it the losses are others, from the first update on."""
    _, losses = trained(accumulating(2), 4)  # differs from CONFIG in that alone
    assert np.all(losses != seven_updates()[1][:4])


def test_another_seed_is_another_run():
    _, losses = trained(CONFIG, 4, seed=1)
    assert np.all(losses != seven_updates()[1][:4])


# ---------------------------------------------------------------------------------------------
# Evaluation


def brute_force_loss(config: Config, params: Any, tokens: np.ndarray) -> float:
    """Mean over every token but the first, window by window, each seen with what it has."""
    T, losses = config.model.block_size, []
    apply = quick_jit(build_model(config.model, VOCAB).apply)
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start : start + T + 1].astype(np.int32)
        logits, _ = apply({"params": params}, window[None, :-1])
        losses.append(numpy_cross_entropy(np.asarray(logits[0]), window[1:]))
    assert sum(map(len, losses)) == len(tokens) - 1
    return float(np.concatenate(losses).mean())


def whole_loss(config: Config, params: Any, tokens: np.ndarray) -> float:
    starts = eval_starts(config, len(tokens), jax.random.key(0), 0, whole=True)
    return float(program(config).evaluate(params, jnp.asarray(tokens), starts))


# Full batches; a short last window; a last batch with one row; one with a single target.
@pytest.mark.parametrize("n_tokens", [65, 61, 33 + 8, 34, 9])
def test_evaluation_counts_every_target_once(n_tokens):
    tokens = np.asarray(TOKENS)[:n_tokens]
    params = program(BIGRAM).init(jax.random.key(0)).params
    expected = brute_force_loss(BIGRAM, params, tokens)
    assert whole_loss(BIGRAM, params, tokens) == pytest.approx(expected, rel=1e-5)


def test_evaluation_of_a_gpt():
    tokens = np.asarray(TOKENS)[:45]
    params = jax.tree.map(lambda x: x * 3, seven_updates()[0].params)  # far from uniform logits
    expected = brute_force_loss(CONFIG, params, tokens)
    assert whole_loss(CONFIG, params, tokens) == pytest.approx(expected, rel=1e-5)


def test_evaluation_leaves_training_alone():
    run, key = program(CONFIG), jax.random.key(0)
    state = run.init(key)
    for n in (4, 3):
        for whole in (True, False):
            config = replace(CONFIG, eval_batches=2)
            starts = eval_starts(config, len(TOKENS), key, int(state.step), whole)
            run.evaluate(state.params, TOKENS, starts)
        state, _ = run.steps(state, TOKENS, key, n)
    assert_same(state, seven_updates()[0])


def test_random_evaluation_follows_from_seed_and_step():
    config = replace(CONFIG, eval_batches=50)
    draw = lambda seed, step: np.asarray(
        eval_starts(config, 30, jax.random.key(seed), step, whole=False)
    )
    starts = draw(0, 5)
    assert starts.shape == (50, 4) and starts.dtype == np.int32
    # Each whole window of 8 + 1 tokens may come, the last one too.
    assert set(starts.ravel()) == set(range(30 - 8))
    assert_same(starts, draw(0, 5))
    assert np.any(starts != draw(0, 6)) and np.any(starts != draw(1, 5))


# ---------------------------------------------------------------------------------------------
# Number formats, platforms, golden losses


def test_bfloat16_keeps_float32_parameters_and_moments():
    config = replace(CONFIG, model=replace(MODEL, dtype="bfloat16"))
    state, losses = trained(config, 4, 3)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    assert len(floats) == 3 * len(jax.tree.leaves(state.params))  # with two moments of each
    assert losses.dtype == np.float32 and np.isfinite(losses).all()
    np.testing.assert_allclose(losses, seven_updates()[1], rtol=0.02)
    assert np.any(losses != seven_updates()[1])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_small_preset_lowers_for_accelerators(platform):
    config = PRESETS["small"]
    model, optimizer = build_model(config.model, 65), make_optimizer(config)
    key = jax.random.key(0)
    state = jax.eval_shape(functools.partial(init_state, model, optimizer), key)
    traced = jax.jit(make_train_steps(model, optimizer, config)).trace(state, TOKENS, key, 8)
    assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_golden_losses(play):
    config = replace(CONFIG, batch_size=8, optim=replace(CONFIG.optim, accumulate=1))
    text = play.lower()[:3000]
    tokenizer = CharTokenizer.fit(text)
    model, optimizer = build_model(config.model, tokenizer.vocab_size), make_optimizer(config)
    key, tokens = jax.random.key(config.seed), jnp.asarray(tokenizer.encode(text))
    state = quick_jit(functools.partial(init_state, model, optimizer))(key)
    steps = quick_jit(make_train_steps(model, optimizer, config))
    losses: list[float] = []
    for _ in range(5):
        state, out = steps(state, tokens, key, 4)
        losses += np.asarray(out.loss).tolist()
    if "GPTJAX_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(json.dumps({"jax": jax.__version__, "losses": losses}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert losses == pytest.approx(golden["losses"], rel=1e-5), (
        f"The losses of a fixed run changed (recorded with jax {golden['jax']}, here is jax "
        f"{jax.__version__}). If you did not mean to change any number (a refactoring, a faster "
        "kernel), find what did: the first differing step says where to look (0: model, init or "
        "batches; 1: gradient or optimizer). If you meant to, or jax's random numbers changed, "
        "say so in your change and record anew: GPTJAX_WRITE_GOLDEN=1 pytest tests/test_step.py "
        "-k golden"
    )


# ---------------------------------------------------------------------------------------------
# Your own model and optimizer


def text_file(folder: Path, text: str) -> DataConfig:
    (folder / "play.txt").write_text(text, encoding="utf-8")
    return DataConfig(text=str(folder / "play.txt"))


class MeanOfThePast(nn.Module):
    """No more than the contract in `model.py` asks of a module."""

    config: ModelConfig
    vocab_size: int

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: None = None, train: bool = False) -> Any:
        x = nn.Embed(self.vocab_size, 8)(tokens)
        mean = jnp.cumsum(x, axis=1) / jnp.arange(1, tokens.shape[1] + 1)[None, :, None]
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(jnp.concatenate([x, mean], -1)))
        return nn.Dense(self.vocab_size)(x), None

    @nn.nowrap
    def init_cache(self, batch: int) -> None:
        return None


def test_train_takes_your_own_model_and_optimizer(tmp_path, play, capsys):
    config = replace(CONFIG, steps=12, eval_every=6, save_every=12, data=text_file(tmp_path, play))
    model = MeanOfThePast(config.model, CharTokenizer.fit(play).vocab_size)
    report = Report(quiet=True)
    record = train(config, tmp_path / "run", model=model, optimizer=optax.sgd(0.5), report=report)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["step"] == 12 and record["val_loss"] < first["val_loss"]
    assert capsys.readouterr().out == ""
