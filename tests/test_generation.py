"""Tests of generation with many streams: each as it is alone, and ended where it should be."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params
from run_helpers import message

from gptjax.config import ModelConfig
from gptjax.generation import decoding
from gptjax.generation.engine import Engine
from gptjax.generation.requests import Completion, Piece, Reply, Request, check
from gptjax.generation.slots import NewTokens, Slots, Stream
from gptjax.model import GPT
from gptjax.sampling import ALL, Sampling, draw, most_likely, stacked
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer

core = pytest.mark.core

LETTERS = CharTokenizer("abcdefghijk")
V, S = 11, 8
GREEDY = Sampling(0.0)
HOT = Sampling(1.5)


@pytest.fixture(scope="module")
def gpt() -> tuple[Any, Any]:
    """A model whose greedy text is varied: see test_sampling.py."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=S, tie_head=False), V)
    large = lambda path, leaf: (
        leaf * {"kernel": 4.0, "bias": 1.0, "scale": 1.0}.get(path[-1].key, 20.0)
    )
    return model, jax.tree_util.tree_map_with_path(large, random_params(model, 8))


def engine(gpt: tuple[Any, Any], slots: int = 3) -> Engine:
    return Engine(*gpt, LETTERS, slots)


def served(engine: Engine, requests: list[Request]) -> list[Completion]:
    pieces: list[list[Piece]] = [[] for _ in requests]
    for new in engine.stream(requests):
        for i, piece in new.items():
            pieces[i].append(piece)
    return [Completion.of(parts) for parts in pieces]


def same(ours: Completion, theirs: Completion) -> None:
    assert ours.text == theirs.text and ours.finish == theirs.finish
    for a, b in zip(ours.tokens, theirs.tokens, strict=True):
        assert a.id == b.id and a.logprob == pytest.approx(b.logprob, abs=1e-5)


REQUESTS = [
    Request(np.array([1, 2, 3]), 20, GREEDY),
    Request(np.array([4]), 7, HOT, seed=1, alternatives=4),
    Request(np.arange(11), 30, replace(HOT, top_k=3), seed=2),  # longer than the window
    Request(np.array([4, 4]), 1, HOT, seed=3),
    Request(np.array([4]), 25, replace(HOT, top_p=0.8, min_p=0.1), seed=1),
    Request(np.array([2, 5]), 40, replace(HOT, repetition_penalty=1.3), seed=5),
    Request(np.array([2, 5]), 9, replace(HOT, logit_bias={7: 3.0, 1: -100.0}), seed=5, sample=1),
]


@core
def test_each_reply_is_what_it_is_alone(gpt: tuple[Any, Any]):
    """With seven requests in three slots, of different lengths, past the window too."""
    together = served(engine(gpt), REQUESTS)
    for request, reply in zip(REQUESTS, together, strict=True):
        (alone,) = served(engine(gpt, 1), [request])
        same(reply, alone)
        assert reply.finish == "length" and len(reply.tokens) == request.max_new_tokens
        assert {len(token.alternatives) for token in reply.tokens} == {request.alternatives}


@core
def test_a_loop_of_fixed_length_draws_the_same(gpt: tuple[Any, Any]):
    """As on a GPU: streams end in the middle of it, and find their window full."""
    expected, fixed = served(engine(gpt), REQUESTS), engine(gpt)
    fixed._slots._on_gpu = True
    for ours, theirs in zip(served(fixed, REQUESTS), expected, strict=True):
        same(ours, theirs)


@core
def test_a_lone_stream_is_decoded_by_itself(gpt: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    """In a warm engine; here in the second slot, until another joins it."""
    expected, warm = served(engine(gpt), REQUESTS), engine(gpt)
    warm.warm_up()
    sizes: list[int] = []
    decode = decoding.decode
    counted = lambda *args, **how: sizes.append(len(args[3].left)) or decode(*args, **how)
    monkeypatch.setattr(decoding, "decode", counted)
    numbers = {warm.add(REQUESTS[i]): i for i in (1, 2)}
    pieces: dict[int, list[Piece]] = defaultdict(list)

    def step(seconds: float | None = None) -> None:
        for number, piece in warm.step(seconds).items():
            pieces[numbers[number]].append(piece)

    for _ in range(10):  # a token each: the first one ends after 7
        step(0.0)
    numbers[warm.add(REQUESTS[5])] = 5
    while warm.free < 3:
        step()
    for i, parts in pieces.items():
        same(Completion.of(parts), expected[i])
    assert sizes[:11] == [3] * 7 + [1] * 3 + [3] and sizes[-1] == 1


@core
def test_logprobs_are_the_models_own(gpt: tuple[Any, Any]):
    """Whatever the temperature, cuts and penalties: from the plain forward pass."""
    model, params = gpt
    how = Sampling(2.0, top_k=5, repetition_penalty=1.5, logit_bias={3: 2.0})
    request = Request(np.array([1, 2]), 6, how, alternatives=3)
    (reply,) = served(engine(gpt), [request])
    ids = [1, 2, *(token.id for token in reply.tokens)]
    logits = model.apply({"params": params}, np.array([ids]))[0][0]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for token, row in zip(reply.tokens, logprobs[1:-1], strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        best = np.argsort(-row)[:3]
        assert [id_ for id_, _ in token.alternatives] == best.tolist()
        np.testing.assert_allclose([p for _, p in token.alternatives], row[best], atol=1e-5)


@core
def test_penalty_and_bias_are_those_of_transformers_formula():
    """Bias first, then the penalty for tokens that were there; greedy draws show the order."""
    logits = jnp.array([[2.0, 1.9, -1.0, -1.1]])
    keys = jax.random.split(jax.random.key(0), 1)
    seen = jnp.array([[True, False, True, False]])
    greedy = lambda **how: int(draw(logits, keys, Sampling(0.0, **how), seen)[0])
    assert greedy() == 0
    assert greedy(repetition_penalty=1.1) == 1  # 2.0 / 1.1 = 1.82
    assert greedy(repetition_penalty=1.1, logit_bias={0: 0.2}) == 0  # 2.2 / 1.1 = 2.0
    only = {0: -50.0, 1: -50.0}
    assert greedy(logit_bias=only) == 2
    assert greedy(repetition_penalty=1.2, logit_bias=only) == 3  # -1.0 * 1.2 = -1.2


@core
def test_settings_of_one_stream_do_not_reach_another():
    rows = [GREEDY, Sampling(1.0, top_k=1), Sampling(2.0), Sampling(1.0, min_p=1.0)]
    rows[2] = replace(rows[2], logit_bias={4: 100.0})
    logits = jnp.tile(jnp.array([1.0, 3.0, 2.0, 0.0, 0.0])[None], (4, 1))
    keys = jax.random.split(jax.random.key(1), 4)
    seen = jnp.zeros((4, 5), bool)
    assert draw(logits, keys, stacked(rows, 5), seen).tolist() == [1, 1, 4, 1]


@core
def test_min_p_keeps_tokens_by_their_share_of_the_most_likely_one():
    probs = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    keys = jax.random.split(jax.random.key(0), 500)
    logits = jnp.tile(jnp.log(probs)[None], (500, 1))
    for min_p, kept in ((0.0, {0, 1, 2, 3}), (0.2, {0, 1, 2}), (0.5, {0, 1}), (0.7, {0})):
        assert set(draw(logits, keys, Sampling(1.0, min_p=min_p)).tolist()) == kept


@core
def test_a_top_p_of_one_keeps_every_token():
    """Beside another stream's cut; the rounded sum of the likely ones is 1 already."""
    logits = jnp.array([[0.0, -30.0, -40.0]])
    columns = jnp.array([[ALL]]), jnp.array([[1.0]])
    assert most_likely(logits, *columns).all()


@core
def test_a_stop_token_ends_a_reply_and_frees_its_slot(gpt: tuple[Any, Any]):
    (whole,) = served(engine(gpt), [REQUESTS[0]])
    ids = [token.id for token in whole.tokens]
    at = next(i for i, id_ in enumerate(ids) if id_ not in ids[:i] and i > 2)
    stopping = replace(REQUESTS[0], stop_tokens=(99, ids[at]))
    busy = engine(gpt)
    reply, other = served(busy, [stopping, REQUESTS[2]])
    assert reply.finish == "stop" and [token.id for token in reply.tokens] == ids[:at]
    assert reply.text == whole.text[:at]
    assert other.text == served(engine(gpt), [REQUESTS[2]])[0].text
    assert busy.free == 3


@core
def test_a_stop_string_ends_a_reply(gpt: tuple[Any, Any]):
    (whole,) = served(engine(gpt), [REQUESTS[0]])
    stop = whole.text[5:8]
    at = whole.text.find(stop)
    (reply,) = served(engine(gpt), [replace(REQUESTS[0], stop=("zz", stop))])
    assert (reply.text, reply.finish) == (whole.text[:at], "stop")
    assert "".join(token.text for token in reply.tokens) == reply.text
    (never,) = served(engine(gpt), [replace(REQUESTS[0], stop=("zz",))])
    assert never == whole


def test_a_cancelled_request_leaves_the_others_alone(gpt: tuple[Any, Any]):
    busy = engine(gpt, 2)
    first, second = busy.add(REQUESTS[0]), busy.add(REQUESTS[4])
    with pytest.raises(ValueError):
        busy.add(REQUESTS[1])
    busy.step()
    busy.cancel(first)
    busy.cancel(first)  # nothing the second time
    assert busy.free == 1
    third = busy.add(REQUESTS[1])
    texts = {second: "", third: ""}
    while busy.free < 2:
        for number, piece in busy.step().items():
            texts[number] += piece.text
    assert texts[third] == served(engine(gpt), [REQUESTS[1]])[0].text
    whole = served(engine(gpt), [REQUESTS[4]])[0].text
    assert whole.endswith(texts[second]) and len(texts[second]) < len(whole)


def test_steps_of_any_size_draw_the_same(gpt: tuple[Any, Any]):
    texts = set()
    for seconds in (None, 0.0):
        busy, text = engine(gpt), ""
        number = busy.add(REQUESTS[2])
        while busy.free < 3:
            text += busy.step(seconds)[number].text
        texts.add(text)
    assert len(texts) == 1


def test_once_all_are_done_nothing_is_computed(gpt: tuple[Any, Any]):
    """A stop token among the first of a long chunk: the device loop ends with it."""
    slots = Slots(*gpt, 2)
    for i in range(2):
        slots.add(Stream(np.array([i]), jax.random.key(i), 16, HOT, tuple(range(V))))
    new = slots.step(16)
    assert [len(row.tokens) for row in new.values()] == [1, 1] and not slots.busy


# ---------------------------------------------------------------------------------------------
# Replies


def drawn(ids: list[int], ended: bool = False) -> NewTokens:
    return NewTokens(np.array(ids), np.zeros(len(ids), np.float32), None, None, ended)


def replied(stop: tuple[str, ...], *parts: bytes, end: bool = True) -> list[Piece]:
    """Pieces of a reply whose tokens are bytes."""
    reply = Reply(Request(np.array([65]), stop=stop), ByteTokenizer())
    made = []
    for i, part in enumerate(parts):
        made.append(reply.add(drawn(list(part), end and i + 1 == len(parts))))
        if made[-1].finish:
            break
    return made


@core
def test_the_beginning_of_a_stop_string_is_held_back():
    pieces = replied(("END",), b"one E", b"N", b"ough EN", b"D more")
    assert [piece.text for piece in pieces] == ["one ", "", "ENough ", ""]
    assert [len(piece.tokens) for piece in pieces] == [4, 0, 7, 0]
    assert [piece.finish for piece in pieces] == [None, None, None, "stop"]
    pieces = replied(("END",), b"one E", b"N")
    assert [piece.text for piece in pieces] == ["one ", "EN"]
    assert pieces[-1].finish == "length" and len(pieces[-1].tokens) == 2


@core
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("b",), "a"),
        (("cd", "b"), "a"),  # the first in the text, not in the list
        (("bc", "b"), "a"),
        (("\u00e9",), "abcd"),
        (("aa",), "abcd\u00e9f"),
        (("f",), "abcd\u00e9"),
        (("a",), ""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_reply_is_cut_before_the_first_stop_string(
    stop: tuple[str, ...], expected: str, size: int
):
    raw = "abcd\u00e9f".encode()
    pieces = replied(stop, *(raw[i : i + size] for i in range(0, len(raw), size)))
    assert "".join(piece.text for piece in pieces) == expected
    found = pieces[-1].finish == "stop"
    assert found == (expected != "abcd\u00e9f")
    tokens = [token for piece in pieces for token in piece.tokens]
    assert bytes(token.id for token in tokens).decode() == expected


@core
def test_bytes_of_no_character_come_at_the_end():
    (piece,) = replied((), b"a\xc3")
    assert piece.text == "a\ufffd" and len(piece.tokens) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 is out of range; give 1 to"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"alternatives": 21}, "alternatives 21 is out of range; give 0 to 20"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"stop_tokens": (11,)}, "there is no token 11; the vocabulary has 0 to 10"),
        ({"prompt": np.array([], int)}, "the prompt has no tokens"),
        ({"prompt": np.array([-1])}, "there is no token -1"),
        ({"sampling": Sampling(-1.0)}, "temperature -1.0 is out of range"),
        ({"sampling": Sampling(float("nan"))}, "temperature nan is out of range"),
        ({"sampling": Sampling(top_k=0)}, "top_k 0 is out of range"),
        ({"sampling": Sampling(top_p=1.1)}, "top_p 1.1 is out of range"),
        ({"sampling": Sampling(min_p=2.0)}, "min_p 2.0 is out of range"),
        ({"sampling": Sampling(repetition_penalty=0.0)}, "repetition_penalty 0.0 is out of"),
        ({"sampling": Sampling(logit_bias={12: 1.0})}, "there is no token 12"),
        ({"sampling": Sampling(logit_bias={1: float("nan")})}, "logit_bias nan is out of range"),
    ],
)
def test_requests_that_cannot_be_served(change: dict[str, Any], said: str):
    sampling = replace(change.pop("sampling", GREEDY), vocab_size=V)
    request = replace(Request(np.array([1]), sampling=sampling), **change)
    assert message(check, request).startswith(said)
