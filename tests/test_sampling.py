"""Tests of sampling: the same tokens as a plain loop over `model.apply` draws."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params

from gptjax.config import ModelConfig
from gptjax.generation import decoding
from gptjax.generation.decoding import CHUNK, Streams
from gptjax.generation.slots import Slots, Stream, generate
from gptjax.lecture.models import Bigram
from gptjax.model import GPT
from gptjax.plan.hlo import Program
from gptjax.sampling import Sampling, draw, stacked

core = pytest.mark.core

V = 11
GREEDY = Sampling(temperature=0.0)
PLAIN = Sampling()
KEY = jax.random.key(42)


class Cacheless(GPT):
    """A model of one's own without a cache."""

    @nn.nowrap
    def init_cache(self, batch: int) -> Any:
        return None


@functools.cache
def gpt(
    block_size: int = 8, model_class: type[nn.Module] = GPT, seed: int = 8, **options: Any
) -> tuple[Any, Any]:
    """A model, and random parameters that are large: its greedy text is varied, without ties,
    and depends on all of the context and on its positions."""
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=block_size, tie_head=False)
    config = replace(config, **options)
    model = model_class(config, V)
    large = lambda path, leaf: (
        leaf * {"kernel": 4.0, "bias": 1.0, "scale": 1.0}.get(path[-1].key, 20.0)
    )
    return model, jax.tree_util.tree_map_with_path(large, random_params(model, seed))


def run(
    model: Any,
    params: Any,
    prompt: list[int],
    n: int,
    sampling: Sampling = GREEDY,
    num_samples: int = 1,
    key: jax.Array = KEY,
) -> np.ndarray:
    """(num_samples, n) generated ids."""
    chunks = generate(model, params, np.asarray(prompt), key, n, sampling, num_samples)
    return np.concatenate(list(chunks), axis=1)


@functools.partial(jax.jit, static_argnames="model")
def apply(model: Any, params: Any, tokens: Any) -> jax.Array:
    return model.apply({"params": params}, tokens)[0]


def last_logits(model: Any, params: Any, context: list[int]) -> np.ndarray:
    """(V,) logits after a context; what follows it is padding, unseen by a causal model."""
    padded = np.zeros((1, model.config.block_size), np.int32)
    padded[0, : len(context)] = context
    return np.asarray(apply(model, params, padded))[0, len(context) - 1]


@functools.partial(jax.jit, static_argnames="sampling")
def draw_token(logits: Any, i: int, t: int, sampling: Sampling = PLAIN) -> jax.Array:
    """Sample i's t-th token, by the documented rule for keys."""
    key = jax.random.fold_in(jax.random.fold_in(KEY, i), t)
    return draw(logits[None], key[None], sampling)[0]


Choose = Callable[[np.ndarray, int], int]  # logits (V,), index of the new token -> token


def greedily(logits: np.ndarray, t: int) -> int:
    assert np.diff(np.sort(logits))[-1] > 1e-4  # a tie would make the comparison a lottery
    return int(logits.argmax())


def slide(context: list[int], token: int, S: int) -> list[int]:
    """The lecture's crop: the last S tokens, each time."""
    return [*context, token][-S:]


def halve(context: list[int], token: int, S: int) -> list[int]:
    """A full window makes room: the last half of the text is read again."""
    return [*context, token][-max(1, S // 2) :] if len(context) == S else [*context, token]


def plain_loop(
    model: Any,
    params: Any,
    prompt: list[int],
    n: int,
    go_on: Callable[[list[int], int, int], list[int]],
    choose: Choose = greedily,
) -> list[int]:
    """Generate by reading the whole context again for each token."""
    S = model.config.block_size
    context, new = prompt[-S:], []
    for t in range(n):
        new.append(choose(last_logits(model, params, context), t))
        context = go_on(context, new[-1], S)
    return new


# ---------------------------------------------------------------------------------------------
# Contexts


@core
@pytest.mark.parametrize("length", [4, 8])
def test_greedy_through_the_cache_equals_reading_all_again(length: int):
    model, params = gpt()
    prompt = [5, 2, 9, 1, 1, 7, 0, 3][:length]
    n = 8 - length + 1  # as far as the window reaches: nothing has been dropped from it yet
    new = run(model, params, prompt, n)
    text = prompt.copy()
    for token in new[0].tolist():
        logits = np.asarray(apply(model, params, np.asarray([text], np.int32)))
        assert token == greedily(logits[0, -1], 0)
        text.append(token)


@pytest.mark.parametrize("block_size", [1, 2, 3, 20])
@pytest.mark.parametrize("length", [1, 2, 4, 30])
def test_past_the_window_the_last_half_is_read_again(block_size: int, length: int):
    model, params = gpt(block_size)
    prompt = np.random.default_rng(length).integers(V, size=length).tolist()
    n = 3 * block_size + 2
    assert run(model, params, prompt, n)[0].tolist() == plain_loop(model, params, prompt, n, halve)


@pytest.mark.parametrize(
    "options",
    # Seeds of a varied text.
    [{"seed": 7}, {"window": 3, "seed": 7}, {"norm": "rms", "qk_norm": True, "seed": 0}],
    ids=["rotary", "sliding window", "normed"],
)
def test_a_modern_model_past_its_window(options: dict[str, Any]):
    """Rotary positions and the keys of shared heads start again with the half window."""
    model, params = gpt(position="rotary", n_kv_head=1, **options)
    expected = plain_loop(model, params, [1, 2, 3], 30, halve)
    assert run(model, params, [1, 2, 3], 30)[0].tolist() == expected
    assert len(set(expected)) > 4


@core
def test_the_two_rules_differ():
    """Else the tests of either prove nothing."""
    model, params = gpt()
    half, slid = (plain_loop(model, params, [1, 2], 40, rule) for rule in (halve, slide))
    assert half[:6] == slid[:6]  # room for six more in a window of eight, and one drawn after it
    assert half != slid
    assert len(set(half)) > 4


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("length", [1, 4, 30])
def test_without_a_cache_the_window_slides(block_size: int, length: int):
    model, params = gpt(block_size, Cacheless)
    prompt = np.random.default_rng(length).integers(V, size=length).tolist()
    n = 2 * block_size + CHUNK + 3
    assert run(model, params, prompt, n)[0].tolist() == plain_loop(model, params, prompt, n, slide)


@core
def test_bigram_equals_the_lectures_loop():
    """idx -> logits of the last position -> draw -> append."""
    model, params = gpt(8, Bigram)
    table = np.asarray(params["wte"]["embedding"])
    idx = [0]
    for t in range(40):
        idx.append(int(draw_token(table[idx[-1]], 0, t)))
    assert run(model, params, [0], 40, Sampling())[0].tolist() == idx[1:]


@core
@pytest.mark.parametrize("model_class", [GPT, Cacheless, Bigram])
def test_a_long_prompt_is_read_from_its_end(model_class: type[nn.Module]):
    model, params = gpt(8, model_class)
    prompt = np.random.default_rng(0).integers(V, size=50).tolist()
    expected = run(model, params, prompt[-8:], 12)
    assert run(model, params, prompt, 12).tolist() == expected.tolist()
    assert run(model, params, prompt[::-1], 12).tolist() != expected.tolist()


@pytest.mark.parametrize("model_class", [GPT, Bigram])
@pytest.mark.parametrize("n", [1, 2, CHUNK, CHUNK + 1, CHUNK + 2, 3 * CHUNK + 5])
def test_chunks_add_up(model_class: type[nn.Module], n: int):
    model, params = gpt(20, model_class)
    chunks = list(generate(model, params, np.array([1, 2]), KEY, n, GREEDY, 2))
    assert sum(chunk.shape[1] for chunk in chunks) == n
    for chunk in chunks:
        assert chunk.shape[0] == 2 and 1 <= chunk.shape[1] <= CHUNK
        assert chunk.dtype == np.int32 and isinstance(chunk, np.ndarray)
    # The first token is shown at once, and fewer tokens are the beginning of more.
    assert chunks[0].shape == (2, 1)
    more = run(model, params, [1, 2], 3 * CHUNK + 5, num_samples=2)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), more[:, :n])


@core
def test_chunks_come_as_they_are_drawn():
    model, params = gpt(8)
    endless = generate(model, params, np.array([1]), KEY, 10**9, GREEDY)
    assert sum(chunk.shape[1] for chunk in itertools.islice(endless, 6)) > 6


# ---------------------------------------------------------------------------------------------
# Randomness


def test_each_token_has_a_key_of_its_own():
    """Sample i's t-th token is drawn with the key folded with i, then t; re-reading included."""
    model, params = gpt()
    new = run(model, params, [3], 3 * CHUNK, Sampling(), num_samples=3)
    for i, row in enumerate(new.tolist()):
        choose = lambda logits, t, i=i: int(draw_token(logits, i, t))
        assert row == plain_loop(model, params, [3], 3 * CHUNK, halve, choose)


@core
def test_samples_depend_on_the_key_alone():
    model, params = gpt()
    three = run(model, params, [1, 2], 24, Sampling(), num_samples=3)
    assert three.tolist() == run(model, params, [1, 2], 24, Sampling(), num_samples=3).tolist()
    assert len({tuple(row) for row in three.tolist()}) == 3
    alone = run(model, params, [1, 2], 24, Sampling(), num_samples=1)
    assert alone.tolist() == three[:1].tolist()
    other = run(model, params, [1, 2], 24, Sampling(), num_samples=3, key=jax.random.key(43))
    assert (other != three).any(axis=1).all()


@core
@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(temperature=1e-6, top_p=0.9)])
def test_limits_that_are_greedy(sampling: Sampling):
    model, params = gpt(8)
    assert run(model, params, [4], 20, sampling).tolist() == run(model, params, [4], 20).tolist()


# ---------------------------------------------------------------------------------------------
# Drawing


def drawn(probs: list[float], sampling: Sampling, n: int = 2000, seed: int = 0) -> np.ndarray:
    """n tokens drawn from one row of probabilities."""
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(np.asarray(probs, np.float32)))
    keys = jax.random.split(jax.random.key(seed), n)
    tokens = draw(jnp.broadcast_to(logits[None], (n, len(probs))), keys, sampling)
    assert tokens.shape == (n,) and tokens.dtype == jnp.int32
    return np.asarray(tokens)


PROBS = [0.1, 0.4, 0.05, 0.25, 0.2]  # by likelihood: 1, 3, 4, 0, 2
TIES = [0.3, 0.1, 0.3, 0.1, 0.1, 0.1]


@core
@pytest.mark.parametrize(
    ("probs", "sampling", "kept"),
    [
        (PROBS, Sampling(), {0, 1, 2, 3, 4}),
        (PROBS, Sampling(top_k=1), {1}),
        (PROBS, Sampling(top_k=2), {1, 3}),
        (PROBS, Sampling(top_k=4), {0, 1, 3, 4}),
        (PROBS, Sampling(top_k=5), {0, 1, 2, 3, 4}),
        (PROBS, Sampling(top_k=99), {0, 1, 2, 3, 4}),  # more than there are
        # top_p keeps the fewest tokens whose probabilities reach p.
        (PROBS, Sampling(top_p=1e-9), {1}),
        (PROBS, Sampling(top_p=0.39), {1}),
        (PROBS, Sampling(top_p=0.41), {1, 3}),
        (PROBS, Sampling(top_p=0.64), {1, 3}),
        (PROBS, Sampling(top_p=0.66), {1, 3, 4}),
        (PROBS, Sampling(top_p=0.94), {0, 1, 3, 4}),
        (PROBS, Sampling(top_p=0.96), {0, 1, 2, 3, 4}),
        (PROBS, Sampling(top_p=1.0), {0, 1, 2, 3, 4}),
        # Of equal logits the first ones are kept: exactly k, and no more than top_p needs.
        (TIES, Sampling(top_k=1), {0}),
        (TIES, Sampling(top_k=2), {0, 2}),
        (TIES, Sampling(top_k=3), {0, 1, 2}),
        (TIES, Sampling(top_p=0.2), {0}),
        (TIES, Sampling(top_p=0.65), {0, 1, 2}),
        # Both: top_p is of what top_k left, here 0.4/0.65 = 0.62 for token 1.
        (PROBS, Sampling(top_k=2, top_p=0.6), {1}),
        (PROBS, Sampling(top_k=2, top_p=0.63), {1, 3}),
        # Temperature comes first: at 0.5 token 1 has 0.16/0.275 = 0.58 of it.
        (PROBS, Sampling(temperature=0.5, top_p=0.57), {1}),
        (PROBS, Sampling(temperature=0.5, top_p=0.59), {1, 3}),
        # Padding rows are never drawn, and count for neither cut.
        (PROBS, Sampling(vocab_size=3), {0, 1, 2}),
        (PROBS, Sampling(vocab_size=5), {0, 1, 2, 3, 4}),
        (PROBS, Sampling(vocab_size=3, top_k=2), {0, 1}),
        (PROBS, Sampling(vocab_size=3, top_p=0.72), {1}),
        (PROBS, Sampling(vocab_size=3, top_p=0.74), {0, 1}),
        ([0.1, 0.2, 0.3, 0.4], Sampling(temperature=0.0, vocab_size=2), {1}),
        (PROBS, Sampling(temperature=0.0, top_k=3, top_p=0.9), {1}),
        # What the model itself rules out stays out.
        ([0.5, 0.0, 0.5], Sampling(), {0, 2}),
        ([0.5, 0.0, 0.5], Sampling(top_p=0.99), {0, 2}),
    ],
)
def test_cuts_keep_exactly_the_right_tokens(probs: list[float], sampling: Sampling, kept: set[int]):
    assert set(drawn(probs, sampling).tolist()) == kept


@core
@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (Sampling(), PROBS),
        (Sampling(temperature=2.0), [math.sqrt(p) for p in PROBS]),
        (Sampling(temperature=0.5), [p * p for p in PROBS]),
        (Sampling(top_k=3), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(top_p=0.8), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(vocab_size=4), [0.1, 0.4, 0.05, 0.25, 0]),
    ],
)
def test_draws_follow_the_softmax(sampling: Sampling, weights: list[float]):
    n = 20_000
    expected = n * np.asarray(weights) / sum(weights)
    counts = np.bincount(drawn(PROBS, sampling, n), minlength=len(PROBS))
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 20  # of at most 4 degrees of freedom: 1 in 2,000


@core
@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-45])
def test_a_cold_draw_is_greedy(temperature: float):
    """Logits of a trained model reach tens; divided by a tiny temperature they overflow."""
    logits = jnp.asarray([[3.0, 20.0, -5.0, 19.0], [-9.0, -7.0, -8.0, -9.5]])
    keys = jax.random.split(KEY, 2)
    assert draw(logits, keys, Sampling(temperature=temperature)).tolist() == [1, 1]


@core
def test_padding_rows_are_not_generated():
    """A table with more rows than the tokenizer has tokens, all of them likely."""
    model, params = gpt(8)
    sampling = Sampling(temperature=50.0, vocab_size=6)
    assert set(run(model, params, [1], 200, sampling)[0].tolist()) == set(range(6))


# ---------------------------------------------------------------------------------------------
# Compilation


@pytest.mark.parametrize("model_class", [GPT, Bigram])
def test_a_session_compiles_once(model_class: type[nn.Module]):
    """Prompts, lengths, keys and settings of any value run the programs of the first calls."""
    model, params = gpt(8, model_class)
    programs = dict.fromkeys(("prefill", "merge", "insert", "take", "decode"), 0)

    def count(event: str, duration_secs: float, **about: Any) -> None:
        name = about.get("fun_name", "").removeprefix("jit(").removesuffix(")")
        if event.endswith("/backend_compile_duration") and name in programs:
            programs[name] += 1

    jax.clear_caches()
    slots = Slots(model, params, 2)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        slots.warm_up()
        assert not slots.busy
        # Half a window and a whole one for one slot or both; both slots at once, from two rows or
        # one; one slot; the loop for one or both, with and without cuts, penalties, alternatives.
        warm = list(programs.values())
        assert warm == [4, 2, 1, 1, 16]
        for length, n in itertools.product((1, 4, 5, 8, 40), (1, 7, 33)):
            prompt = list(range(length)) if length < V else [0] * length
            sampling = Sampling(1 / n, top_k=[None, 3][n % 2], top_p=[None, 0.9][length % 2])
            sampling = replace(sampling, logit_bias=[None, {1: 2.0}][n % 2])
            run(model, params, prompt, n, sampling, 2, jax.random.key(n))
            slots.add(Stream(np.array(prompt), KEY, n, sampling, (1, 2), length > 4))
            while slots.busy:
                slots.step()
        assert list(programs.values()) == warm
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_a_short_prompt_of_a_long_window_is_read_in_a_short_one(monkeypatch: pytest.MonkeyPatch):
    """256 places for it, not half of 1024; and the same tokens."""
    widths: list[int] = []
    read = decoding.prefill

    def counting(model: Any, params: Any, text: Any, *rest: Any) -> Any:
        widths.append(text.shape[1])
        return read(model, params, text, *rest)

    monkeypatch.setattr(decoding, "prefill", counting)
    model, params = gpt(1024, GPT)
    long = run(model, params, [1, 2, 3], 4, Sampling(temperature=0))
    run(model, params, list(range(V)) * 100, 4, Sampling(temperature=0))
    assert widths == [256, 1024, 512]  # the last is half of the full cache, read again
    ids = [1, 2, 3]
    for _ in range(4):
        logits, _ = model.apply({"params": params}, jnp.asarray([ids]))
        ids.append(int(logits[0, -1].argmax()))
    assert np.ravel(long).tolist() == ids[3:]


def streams(size: int) -> Streams:
    """Of streams that have drawn nothing."""
    zeros = np.zeros(size, np.int32)
    stops, keys = np.full((size, 8), -1), np.zeros((size, 2), np.uint32)
    return Streams(keys, zeros, zeros + 9, stops, stacked([PLAIN] * size, V), None)


def arrays_made(model: Any, params: Any) -> tuple[int, int]:
    """How many arrays of the shape of a layer's MLP weights each turn of `decode` makes, and how
    many of the shape of the keys or values of a layer or of a stack of them."""
    write: Any = decoding.decode
    write = write.__wrapped__  # traced again, for what it calls may be replaced
    traced = jax.jit(lambda *given: write(model, *given, 4), donate_argnums=1)
    prepared = decoding.prepare(model, params)
    lowered = traced.lower(prepared, decoding.blank(model, 2, V), streams(2))
    # With the emitters that users have; those of the tests write the cache in more steps.
    older = jax.__version_info__ < (0, 11)
    compiled = lowered.compile({"xla_cpu_use_fusion_emitters": True} if older else None)
    program = Program(str(compiled.as_text()))
    every = list(itertools.chain(*program.computations.values()))
    loops = re.findall(r"body=%?([\w.-]+)", " ".join(i.attributes for i in every))
    there = ("parameter", "get-tuple-element", "bitcast")
    in_loops = itertools.chain(*(program.computations[name] for name in loops))
    made = [i.shape.split("{")[0] for i in in_loops if i.opcode not in there]
    C, D = model.config.n_embd, model.config.head_size
    weights = sum(shape == f"f32[{C},{4 * C}]" for shape in made)
    return weights, sum(shape.endswith(f"2,{C // D},8,{D}]") for shape in made)


def test_a_loop_over_tokens_copies_neither_weights_nor_cache(monkeypatch: pytest.MonkeyPatch):
    model, params = gpt(8, GPT, n_layer=3)
    assert arrays_made(model, params) == (0, 3 * 2)  # a token is written into each in its place
    monkeypatch.setattr(decoding, "unstack", lambda tree: tree)
    jax.clear_caches()
    weights, cached = arrays_made(model, params)
    assert weights == 3 and cached > 3 * 2  # so XLA needs the help, and this would notice


def equations(jaxpr: Any, in_loop: bool = False) -> Any:
    """Every equation in a loop over tokens, and in what it calls."""
    for eqn in jaxpr.eqns:
        if in_loop:
            yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner, in_loop or eqn.primitive.name == "while")


@core
def test_weights_are_cast_before_the_loop(monkeypatch: pytest.MonkeyPatch):
    """In float32 they would be read, and cast, for every token."""

    def casts() -> list[tuple[int, ...]]:
        model, params = gpt(8, GPT, n_layer=2, dtype="bfloat16")
        prepared, state = decoding.prepare(model, params), decoding.blank(model, 1, V)
        decode = functools.partial(decoding.decode, model)
        jaxpr = jax.make_jaxpr(decode)(prepared, state, streams(1), 2)
        return [
            eqn.outvars[0].aval.shape
            for eqn in equations(jaxpr.jaxpr)
            if eqn.primitive.name == "convert_element_type"
            and eqn.params["new_dtype"] == jnp.bfloat16
            and len(eqn.outvars[0].aval.shape) > 1
            and eqn.invars[0].aval.size > 4 * model.config.n_embd
        ]

    assert casts() == []
    monkeypatch.setattr(decoding, "cast", lambda params, dtype: params)
    jax.clear_caches()
    assert len(casts()) == 5  # what this would notice: the table, and four matrices of the blocks


def test_a_model_too_deep_to_unroll_draws_the_same(monkeypatch: pytest.MonkeyPatch):
    model, params = gpt(8, GPT, n_layer=3, n_head=4)
    tokens = run(model, params, [1, 2], 20, GREEDY, 2)
    monkeypatch.setattr("gptjax.model.UNROLL_UP_TO", 2)
    jax.clear_caches()  # of the programs of the unrolled one
    np.testing.assert_array_equal(run(model, params, [1, 2], 20, GREEDY, 2), tokens)


@core
def test_of_equal_logits_exactly_k_remain():
    """By rank: the first of equal ones count, as they would in a stable sort."""
    logits = jnp.array([[2.0, 2.0, 2.0, 1.0, 0.0]])
    keys = jax.random.split(KEY, 200)
    for sampling, kept in (
        (Sampling(top_k=1), {0}),
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_k=4), {0, 1, 2, 3}),
        (Sampling(top_p=0.2), {0}),
        (Sampling(top_p=0.5), {0, 1}),
        (Sampling(top_k=3, top_p=0.6), {0, 1}),
    ):
        drawn = draw(jnp.repeat(logits, 200, axis=0), keys, sampling)
        assert set(drawn.tolist()) == kept
