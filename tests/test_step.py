"""Tests of the train step: a pure function of state, batch and key, the same numbers however calls
are grouped, and nothing random but what follows from (seed, step)."""

import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick_jit, random_tokens
from run_helpers import MeanOfThePast, assert_close, assert_same, text_file

from gptjax import assembly
from gptjax.assembly import Setup, assemble, evaluate_random, evaluate_split, make_model
from gptjax.batches import Batch, Windows, windows_at
from gptjax.config import Config, MeshConfig, ModelConfig, OptimConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.lecture.models import Bigram
from gptjax.loss import cross_entropy, next_token_loss
from gptjax.model import GPT
from gptjax.optim import make_optimizer, make_schedule
from gptjax.presets import PRESETS
from gptjax.step import (
    TrainState,
    accumulated,
    init_state,
    layer_norms,
    repeat,
    skip_nonfinite,
    train_step,
    with_ema,
    with_learning_rate,
)
from gptjax.text.tokenizers import CharTokenizer
from gptjax.training import train

core = pytest.mark.core

VOCAB = 13
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.2)
# Everything random or repeated is on: dropout, micro-batches, several updates a call.
CONFIG = Config(
    seed=0,
    steps=40,
    batch_size=4,
    steps_per_dispatch=4,
    model=MODEL,
    optim=OptimConfig(learning_rate=0.01, warmup_steps=3, accumulate=2),
    mesh=MeshConfig(data=1),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, 400), jnp.uint16)
KEY = jax.random.key(0)
GOLDEN = Path(__file__).with_name("golden_cpu.json")


@functools.cache
def setup_of(config: Config, sgd: bool = False) -> Setup:
    """A run's functions, as `train` makes them."""
    return assemble(config, VOCAB, optimizer=optax.sgd(0.5) if sgd else None)


def trained(
    config: Config, *calls: int, sgd: bool = False, seed: int = 0, tokens: jax.Array = TOKENS
) -> tuple[TrainState, np.ndarray]:
    """The state after calls of so many updates each, and the loss of every update."""
    setup = setup_of(replace(config, seed=seed), sgd)
    key = setup.seed_key()
    state, losses, first = setup.start(), [], 0
    for n in calls:
        state, out = setup.steps(state, tokens, key, first, n)
        losses.append(np.asarray(out["loss"])[:n])
        first += n
    return state, np.concatenate(losses)


# ---------------------------------------------------------------------------------------------
# The loss


def numpy_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]


@core
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


ONE = replace(CONFIG, optim=OptimConfig())
HEADS = [
    pytest.param({"softcap": 2.0}, id="tied"),
    pytest.param({"tie_head": False, "norm": "rms", "position": "rotary"}, id="untied"),
]


@functools.cache
def large_params(config: ModelConfig) -> Any:
    """Far from those at the start, with which all logits are alike."""
    init = quick_jit(GPT(config, VOCAB).init)
    return jax.tree.map(lambda x: x * 5, init(KEY, jnp.zeros((1, 1), jnp.int32))["params"])


def gradient_of(config: Config) -> tuple[jax.Array, Any]:
    """Loss and gradient of one batch, with dropout."""
    model = GPT(config.model, VOCAB)
    params = large_params(replace(config.model, dropout=0.0))
    batch = Batch.of_windows(TOKENS[: 4 * 9].reshape(4, 9).astype(jnp.int32))
    loss = lambda params: next_token_loss(model, params, batch, KEY, config.loss_chunk)[0]
    return quick_jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("head", HEADS)
def test_chunked_loss_and_gradient_equal_the_whole(head):
    config = replace(ONE, model=replace(ONE.model, **head))
    loss, gradient = gradient_of(config)
    chunked_loss, chunked = gradient_of(replace(config, loss_chunk=2))
    assert float(chunked_loss) == pytest.approx(float(loss), rel=1e-6)
    assert_close(chunked, gradient, 1e-6 * float(optax.tree.norm(gradient)))


def test_chunked_loss_accumulates_bfloat16_in_float32():
    """The head's gradient is a sum over chunks, each rounded on its own."""
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


def test_chunked_loss_takes_less_memory():
    """64 x 8 logits of 20,000 tokens are 41 MB, and an eighth of that in chunks of one."""
    config = replace(ONE, batch_size=64, model=replace(ONE.model, vocab_size=20_000, dropout=0.0))

    def temporaries(config: Config) -> int:
        model = make_model(config.model, VOCAB)
        tokens = jax.ShapeDtypeStruct((64, 8), jnp.int32)
        params = jax.eval_shape(model.init, KEY, tokens)["params"]
        loss = functools.partial(next_token_loss, model, chunk=config.loss_chunk)
        gradient = quick_jit(jax.grad(lambda *args: loss(*args)[0]))
        lowered = gradient.lower(params, Batch(tokens, tokens), KEY)
        memory: Any = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes

    logits = 64 * 8 * 20_000 * 4
    assert temporaries(config) > 1.5 * logits
    assert temporaries(replace(config, loss_chunk=1)) < 0.75 * logits


@core
def test_chunks_need_a_model_with_features_and_a_head():
    model, batch = MeanOfThePast(MODEL, VOCAB), Batch.of_windows(jnp.zeros((4, 9), int))
    with pytest.raises(UserError, match=r"^loss_chunk=4 needs .* features and head, .*; leave "):
        next_token_loss(model, {}, batch, KEY, chunk=4)


def masked_batch(rows: int = 4) -> Batch:
    """Weights of 0, 1 and between; the first row counts for nothing, the others differ in sum."""
    windows = jnp.asarray(random_tokens(rows, 9, VOCAB))
    mask = np.random.default_rng(3).choice([0.0, 0.5, 1.0], (rows, 8)).astype(np.float32)
    mask[0] = 0.0
    assert len(set(mask.sum(axis=1).tolist())) == rows
    return Batch.of_windows(windows)._replace(mask=jnp.asarray(mask))


def test_a_mask_weighs_the_positions():
    model, batch = GPT(replace(MODEL, dropout=0.0), VOCAB), masked_batch()
    params = large_params(model.config)
    logits, _ = quick_jit(model.apply)({"params": params}, batch.inputs)
    losses = numpy_cross_entropy(np.asarray(logits), np.asarray(batch.targets))
    expected = np.average(losses, weights=np.asarray(batch.mask))
    assert abs(expected - losses.mean()) > 0.01
    for chunk in (None, 2):
        found, _ = next_token_loss(model, params, batch, KEY, chunk)
        assert float(found) == pytest.approx(expected, rel=1e-5)
    ones = batch._replace(mask=jnp.ones((4, 8)))
    assert float(next_token_loss(model, params, ones, KEY)[0]) == pytest.approx(
        losses.mean(), rel=1e-5
    )


@core
def test_a_batch_without_a_target_has_no_loss_and_no_gradient():
    model, batch = GPT(replace(MODEL, dropout=0.0), VOCAB), masked_batch()
    batch = batch._replace(mask=jnp.zeros((4, 8)))
    loss = lambda params: next_token_loss(model, params, batch, KEY)[0]
    value, gradient = quick_jit(jax.value_and_grad(loss))(large_params(model.config))
    assert value == 0 and not any(np.any(np.asarray(x)) for x in jax.tree.leaves(gradient))


def test_the_first_loss_is_that_of_uniform_predictions():
    _, losses = trained(CONFIG, 1)
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.1)


def test_one_batch_can_be_memorised():
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
# EMA
def test_ema_averages_the_parameters_after_each_step():
    config = replace(CONFIG, optim=replace(CONFIG.optim, ema=0.3))
    setup, key = setup_of(config), KEY
    state = setup.start()
    assert state.weights is state.ema
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    for step in range(8):
        state, _ = setup.steps(state, TOKENS, key, step, 1)
        decay = min(0.3, (1 + step) / (10 + step))
        mean = lambda a, p, decay=decay: decay * a + (1 - decay) * np.asarray(p, np.float64)
        expected = jax.tree.map(mean, expected, state.params)
    assert decay == 0.3  # the cap was reached, and the rise before it was seen
    assert_close(state.ema, expected, 1e-6)
    state, plain = setup_of(config).start(), setup_of(CONFIG).start()
    state, _ = setup.steps(state, TOKENS, key, 0, 4)
    plain, _ = setup_of(CONFIG).steps(plain, TOKENS, key, 0, 4)
    assert_close(state.params, plain.params, 1e-6)  # it changes nothing else
    assert plain.weights is plain.params


# ---------------------------------------------------------------------------------------------
# Accumulation


def accumulating(G: int) -> Config:
    optim = replace(CONFIG.optim, accumulate=G)
    return replace(CONFIG, model=replace(MODEL, dropout=0.0), optim=optim)


@pytest.mark.parametrize("G", [2, 4])
def test_accumulation_makes_the_same_update(G):
    """With plain SGD: Adam divides by the gradient's size, and amplifies its rounding."""
    whole, whole_losses = trained(accumulating(1), 3, sgd=True)
    parts, losses = trained(accumulating(G), 3, sgd=True)
    assert_close(parts.params, whole.params, 1e-6)
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-6)


def test_accumulation_makes_the_same_update_under_adamw():
    whole, _ = trained(accumulating(1), 3)
    parts, _ = trained(accumulating(2), 3)
    assert_close(parts.params, whole.params, 1e-4)


def jaxpr(config: Config) -> str:
    return str(assembly.trace(setup_of(config, sgd=True), len(TOKENS)).jaxpr)


def test_micro_batches_are_smaller():
    """The tests above compare different programs: 4 rows at once, or 2."""
    four, two = f"f32[4,8,{VOCAB}]", f"f32[2,8,{VOCAB}]"  # logits
    assert four in jaxpr(accumulating(1)) and two not in jaxpr(accumulating(1))
    assert two in jaxpr(accumulating(2)) and four not in jaxpr(accumulating(2))


@pytest.mark.parametrize("n", [2, 4])
def test_accumulation_weighs_masked_micro_batches_as_the_whole_batch(n):
    """The masks of the micro-batches differ in their sums, and one of four is 0 everywhere."""
    model, batch = GPT(replace(MODEL, dropout=0.0), VOCAB), masked_batch()
    params = large_params(model.config)

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return next_token_loss(model, params, batch, key)

    gradient = jax.value_and_grad(loss, has_aux=True)
    (whole, _), expected = quick_jit(gradient)(params, batch, KEY)
    (value, _), found = quick_jit(accumulated(gradient, n))(params, batch, KEY)
    assert float(value) == pytest.approx(float(whole), rel=1e-6)
    assert_close(found, expected, 1e-6 * max(1.0, float(optax.tree.norm(expected))))


@core
def test_accumulated_metrics_are_means_too():
    def loss(params: jax.Array, batch: jax.Array, key: jax.Array) -> Any:
        return (params * batch).mean(), {"largest": batch.max()}

    rows = jnp.asarray([[1.0], [2.0], [3.0], [8.0]])
    gradient = accumulated(jax.value_and_grad(loss, has_aux=True), 2)
    (value, metrics), slope = gradient(jnp.float32(2.0), rows, KEY)
    assert (float(value), float(slope)) == (7.0, 3.5)
    assert float(metrics["largest"]) == (3 + 8) / 2  # rows 0 and 2, rows 1 and 3


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
    setup = setup_of(CONFIG)
    _, out = setup.steps(setup.start(), TOKENS, KEY, 0, 3)
    assert set(out) == {"loss", "grad_norm", "lr"}
    for values in out.values():
        assert values.shape == (4,) and values.dtype == jnp.float32
        assert np.all(np.asarray(values)[:3] > 0) and values[3] == 0
    # The rate of each update, as the optimizer uses it.
    np.testing.assert_allclose(out["lr"][:3], [0.0025, 0.005, 0.0075], rtol=1e-6)


def test_the_logged_norm_is_that_of_the_gradient_before_clipping():
    """Plain SGD shows the gradient: the parameters move by 0.5 times that."""
    setup = setup_of(accumulating(2), sgd=True)
    before = setup.start()
    old = jax.tree.map(np.asarray, before.params)
    after, out = setup.steps(before, TOKENS, KEY, 0, 1)
    moved = jax.tree.map(lambda x, y: (x - np.asarray(y)) / 0.5, old, after.params)
    assert float(out["grad_norm"][0]) == pytest.approx(float(optax.tree.norm(moved)), rel=1e-4)
    assert "lr" not in out  # nobody knows the rate of another's optimizer


def test_a_call_for_another_step_is_a_no_op():
    """A call that was dispatched ahead finds the state before a step that was skipped: it must not
    train on the batches of later steps."""
    setup = setup_of(CONFIG)
    state = setup.start()
    before = jax.device_get(state)
    state, out = setup.steps(state, TOKENS, KEY, 3, 4)
    assert_same(before, jax.device_get(state))
    assert not any(np.any(np.asarray(values)) for values in out.values())
    state, _ = setup.steps(state, TOKENS, KEY, 0, 2)
    assert int(state.step) == 2


def test_train_compiles_once_and_donates_its_state(tmp_path, play, monkeypatch):
    """In `train` itself, whose dispatches are of 4, 1, 4, 1 updates."""
    compiled, donated, real_jit = [], [], jax.jit

    def spying_jit(function: Any, **options: Any) -> Any:
        jitted = real_jit(function, **options)
        if getattr(function, "__name__", "") != "steps":
            return jitted
        compiled.append(jitted)

        def call(state: TrainState, *rest: Any) -> Any:
            result = jitted(state, *rest)
            donated.append(all(leaf.is_deleted() for leaf in jax.tree.leaves(state)))
            return result

        return call

    monkeypatch.setattr(jax, "jit", spying_jit)
    config = replace(CONFIG, steps=10, eval_every=5, save_every=10, data=text_file(tmp_path, play))
    train(config, tmp_path / "run", model=Bigram, report=Report(quiet=True))
    assert donated == [True] * 4
    assert [jitted._cache_size() for jitted in compiled] == [1]


def test_nothing_is_transferred_between_calls():
    setup = setup_of(CONFIG)
    n, *firsts = (jax.device_put(np.int32(x)) for x in (4, 0, 4, 8, 12, 16))
    key = setup.seed_key()
    state, out = setup.steps(setup.start(), TOKENS, key, firsts[0], n)
    with jax.transfer_guard("disallow"):
        for first in firsts[1:]:
            state, out = setup.steps(state, TOKENS, key, first, n)
    assert int(state.step) == 20 and np.isfinite(np.asarray(out["loss"])).all()
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        setup.steps(state, np.asarray(TOKENS), key, firsts[0], n)  # the guard is on


# ---------------------------------------------------------------------------------------------
# Randomness follows from (seed, step)


class Recorder(nn.Module):
    """A table of logits that records what it is trained on: tokens and dropout key."""

    config: ModelConfig
    note: Callable[..., None]

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: None = None, train: bool = False) -> Any:
        if train:
            key = jax.random.key_data(self.make_rng("dropout"))
            jax.debug.callback(self.note, tokens, key, ordered=True)
        return self.param("table", nn.initializers.normal(), (VOCAB, VOCAB))[tokens], None


@functools.cache
def recorder() -> tuple[Any, Setup]:
    """The list that fills as a Recorder trains, and its compiled functions."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    note = lambda tokens, key: seen.append((np.array(tokens), np.array(key)))
    model = Recorder(MODEL, note)
    return seen, assemble(CONFIG, VOCAB, model=model, optimizer=optax.sgd(0.1))


def recorded(*calls: int, seed: int = 0, start: int = 0, evaluating: bool = False) -> Any:
    """(tokens, dropout key) of each micro-batch, two to an update."""
    seen, setup = recorder()
    state = setup.start()._replace(step=jnp.int32(start))
    jax.effects_barrier()
    seen.clear()
    for n in calls:
        state, _ = setup.steps(state, TOKENS, jax.random.key(seed), start, n)
        start += n
        if evaluating:
            evaluate_split(setup, state.params, TOKENS)
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


def brute_force_loss(model: Any, params: Any, tokens: np.ndarray) -> float:
    """Mean over every token but the first, window by window, each with what context it has."""
    T, losses = model.config.block_size, []
    apply = quick_jit(model.apply)
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start : start + T + 1].astype(np.int32)
        logits, _ = apply({"params": params}, window[None, :-1])
        losses.append(numpy_cross_entropy(np.asarray(logits[0]), window[1:]))
    assert sum(map(len, losses)) == len(tokens) - 1
    return float(np.concatenate(losses).mean())


@functools.cache
def bigram() -> Setup:
    return assemble(CONFIG, VOCAB, model=Bigram)


@core
# Full batches; a short last window; a last batch with one row; one with a single target.
@pytest.mark.parametrize("n_tokens", [65, 61, 33 + 8, 34, 9])
def test_evaluation_counts_every_target_once(n_tokens):
    tokens, params = np.asarray(TOKENS)[:n_tokens], bigram().start().params
    expected = brute_force_loss(bigram().model, params, tokens)
    found = evaluate_split(bigram(), params, jnp.asarray(tokens))
    assert found == {"loss": pytest.approx(expected, rel=1e-5)}


@core
@pytest.mark.parametrize("resident_tokens", [1, 70, 100])
def test_evaluation_in_slabs_counts_every_target_once(resident_tokens):
    """Tokens that do not fit the device are evaluated a part at a time."""
    tokens, params = np.asarray(TOKENS)[:141], bigram().start().params
    config = replace(CONFIG, data=replace(CONFIG.data, resident_tokens=resident_tokens))
    expected = brute_force_loss(bigram().model, params, tokens)
    found = evaluate_split(bigram()._replace(config=config), params, tokens)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_of_a_gpt():
    tokens = np.asarray(TOKENS)[:45]
    params = jax.tree.map(lambda x: x * 3, seven_updates()[0].params)  # far from uniform logits
    setup = setup_of(CONFIG)
    expected = brute_force_loss(setup.model, params, tokens)
    found = evaluate_split(setup, params, jnp.asarray(tokens))["loss"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_evaluation_with_metrics_of_ones_own():
    """Means over all targets: batches with fewer of them weigh less."""

    def share_of_zeros(model: nn.Module, params: Any, batch: Any) -> dict[str, jax.Array]:
        assert isinstance(batch, Batch) and batch.mask is not None
        return {"zeros": (batch.targets == 0).astype(jnp.float32).mean(where=batch.mask > 0)}

    tokens = np.asarray(TOKENS)[:45]
    setup = assemble(CONFIG, VOCAB, model=Bigram, metrics=share_of_zeros)
    found = evaluate_split(setup, setup.start().params, jnp.asarray(tokens))
    assert found["zeros"] == pytest.approx((tokens[1:] == 0).mean(), rel=1e-6)
    assert set(found) == {"loss", "zeros"}


def test_evaluation_leaves_training_alone():
    setup, first = setup_of(CONFIG), 0
    state = setup.start()
    for n in (4, 3):
        evaluate_split(setup, state.params, TOKENS)
        evaluate_random(setup, state.params, TOKENS, int(state.step), 2)
        state, _ = setup.steps(state, TOKENS, KEY, first, n)
        first += n
    assert_same(state, seven_updates()[0])


def test_random_evaluation_follows_from_seed_and_step():
    """Read off a model whose loss on a window is the place of the window."""
    tokens, starts = jnp.arange(30, dtype=jnp.int32), []

    def first_token(model: nn.Module, params: Any, batch: Any) -> dict[str, jax.Array]:
        jax.debug.callback(lambda rows: starts.append(np.array(rows)), batch.inputs[:, 0])
        return {}

    def drawn(seed: int, step: int) -> np.ndarray:
        starts.clear()
        model = ModelConfig(block_size=8, vocab_size=30)
        config = replace(CONFIG, seed=seed, model=model)
        setup = assemble(config, 30, model=Bigram, metrics=first_token)
        evaluate_random(setup, setup.start().params, tokens, step, 50)
        jax.effects_barrier()
        return np.sort(np.concatenate(starts))

    found = drawn(0, 5)
    assert found.shape == (50 * 4,)
    # Each whole window of 8 + 1 tokens may come, the last one too.
    assert set(found) == set(range(30 - 8))
    assert_same(found, drawn(0, 5))
    assert np.any(found != drawn(0, 6)) and np.any(found != drawn(1, 5))


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
    setup = assemble(replace(PRESETS["small"], mesh=MeshConfig(data=1)), 65)
    lowered = assembly.trace(setup, 400).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()


@core
def test_golden_losses(play):
    model, optim = replace(MODEL, n_layer=2), replace(CONFIG.optim, accumulate=1)
    config = replace(CONFIG, seed=1337, batch_size=8, model=model, optim=optim)
    text = play.lower()[:3000]
    tokenizer = CharTokenizer.fit(text)
    setup = assemble(config, tokenizer.vocab_size)
    key, tokens = setup.seed_key(), jnp.asarray(tokenizer.encode(text))
    state, losses = setup.start(), []
    for first in range(0, 20, 4):
        state, out = setup.steps(state, tokens, key, first, 4)
        losses += np.asarray(out["loss"]).tolist()
    if "GPTJAX_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(json.dumps({"jax": jax.__version__, "losses": losses}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert losses == pytest.approx(golden["losses"], rel=1e-5), (
        f"The losses of a fixed run changed (recorded with jax {golden['jax']}, here is jax "
        f"{jax.__version__}). If you did not mean to change any number (a refactoring, a faster "
        "kernel), find what did: the first differing step says where to look (0: model, init or "
        "batches; 1: gradient or optimizer). If you meant to, or jax's random numbers changed, "
        "say so in your change and record again: GPTJAX_WRITE_GOLDEN=1 pytest tests/test_step.py "
        "-k golden"
    )


# ---------------------------------------------------------------------------------------------
# The pieces by themselves: a loop of one's own


def pieces(skipping: bool = True) -> tuple[GPT, optax.GradientTransformation, Any]:
    model, optimizer = GPT(MODEL, VOCAB), make_optimizer(CONFIG.optim, CONFIG.steps)
    step = functools.partial(train_step, model=model, optimizer=optimizer, accumulate=2)
    return model, optimizer, skip_nonfinite(step) if skipping else step


def test_a_plain_python_loop_makes_the_steps_of_a_run():
    """`train_step` alone, without assembly, mesh or device loop."""
    model, optimizer, step = pieces(skipping=False)
    state, step, losses = init_state(model, optimizer, KEY), quick_jit(step), []
    for i in range(7):
        batch = windows_at(TOKENS, KEY, i, CONFIG.batch_size, MODEL.block_size)
        key = jax.random.fold_in(jax.random.fold_in(KEY, 2), i)  # DROPOUT
        state, metrics = step(state, batch, key)
        losses.append(float(metrics["loss"]))
    expected, expected_losses = seven_updates()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_close(state.params, expected.params, 1e-4)
    assert int(state.step) == 7


def test_repeat_needs_no_assembly():
    model, optimizer, step = pieces()
    step = with_learning_rate(step, make_schedule(CONFIG.optim, CONFIG.steps))
    batch_at = functools.partial(windows_at, batch_size=4, block_size=MODEL.block_size)
    steps = quick_jit(repeat(step, batch_at, 7), donate_argnums=0)
    state, out = steps(init_state(model, optimizer, KEY), TOKENS, KEY, 0, 7)
    np.testing.assert_allclose(out["loss"], seven_updates()[1], rtol=1e-5)
    assert_close(state.params, seven_updates()[0].params, 1e-4)


@core
def test_a_source_of_windows_gives_the_batches_that_the_device_cuts():
    source = Windows(TOKENS, KEY, 4, 8)
    for step in (0, 5):
        assert_same(source.batch(step), jax.device_get(windows_at(TOKENS, KEY, step, 4, 8)))


def poisoned_at(bad: int) -> Any:
    """A loss that is not finite at one step, by its number in the batch."""

    def loss_fn(model: nn.Module, params: Any, batch: Any, key: jax.Array) -> Any:
        value = (params["table"] ** 2).sum()
        return value * jnp.where(batch == bad, jnp.nan, 1.0), {"batch": batch.astype(jnp.float32)}

    return loss_fn


@core
def test_a_nonfinite_step_keeps_the_whole_state_and_ends_the_call():
    model, optimizer = Recorder(MODEL, print), optax.adam(0.1)
    step = functools.partial(train_step, model=model, optimizer=optimizer, loss_fn=poisoned_at(3))
    state = init_state(model, optimizer, KEY, ema=True)
    step = skip_nonfinite(with_ema(step, 0.9))
    steps = quick_jit(repeat(step, lambda data, key, step: data[step], 8))
    data = jnp.arange(100)
    three, _ = steps(state, data, KEY, 0, 3)
    stopped, out = steps(state, data, KEY, 0, 8)
    assert_same(stopped, three)  # moments, EMA and step count included
    assert int(stopped.step) == 3
    assert np.isfinite(np.asarray(out["loss"][:3])).all() and np.isnan(out["loss"][3])
    assert np.asarray(out["batch"]).tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    after, out = steps(stopped._replace(step=jnp.int32(4)), data, KEY, 4, 2)
    assert int(after.step) == 6 and np.asarray(out["batch"])[:2].tolist() == [4, 5]


@core
def test_the_logged_rate_is_the_one_of_updates_made():
    """After a skipped step the optimizer's count is behind the step, and so is the rate."""
    schedule = lambda count: 0.01 * (count + 1)
    model, optimizer = Recorder(MODEL, print), optax.adam(schedule)
    step = functools.partial(train_step, model=model, optimizer=optimizer, loss_fn=poisoned_at(1))
    step = skip_nonfinite(with_learning_rate(step, schedule))
    state, rates = init_state(model, optimizer, KEY), []
    for i in range(4):
        state, metrics = step(state, jnp.int32(i), KEY)
        state = state._replace(step=jnp.int32(i + 1))
        rates.append(float(metrics["lr"]))
    assert rates == pytest.approx([0.01, 0.02, 0.02, 0.03])


# ---------------------------------------------------------------------------------------------
# Norms of layers


@core
def test_norms_of_layers_equal_numpy():
    """Of blocks stacked on an axis, of leaves without a layer's axis, and of what is frozen."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tree = lambda: {"h": {"a": draw(2, 3, 4), "b": draw(2)}, "wte": {"x": draw(5, 2)}, "ln_f": None}
    params, grads, updates = tree(), tree(), tree()
    norms = quick_jit(functools.partial(layer_norms, every=3))
    state = TrainState(jnp.int32(2), params, ())
    found = norms(state, grads, updates)
    for start, of in (("param_norms/", params), ("grad_norms/", grads), ("update_norms/", updates)):
        for i in range(2):
            both = np.concatenate([of["h"]["a"][i].ravel(), of["h"]["b"][i : i + 1]])
            np.testing.assert_allclose(found.pop(f"{start}h/{i}"), np.linalg.norm(both), rtol=1e-6)
        expected = np.linalg.norm(of["wte"]["x"])
        np.testing.assert_allclose(found.pop(f"{start}wte"), expected, rtol=1e-6)
    assert not found
    between = norms(state._replace(step=jnp.int32(3)), grads, updates)
    assert set(map(float, between.values())) == {0.0}
