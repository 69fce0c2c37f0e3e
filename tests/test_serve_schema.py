"""Tests of the bodies that `gptjax serve` takes and refuses; no model is needed."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.sampling import Sampling
from gptjax.serve.schema import Ask, BadRequest, chat, completions, parse_json

HELLO = [{"role": "user", "content": "Hello"}]


def test_every_field_of_a_completion():
    ask = completions(
        {
            "model": "small@last",
            "prompt": ["KING", [1, 2]],
            "max_tokens": 7,
            "n": 2,
            "seed": -1,
            "stop": ["\n\n", "KING"],
            "temperature": 0,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "logit_bias": {"11": -100},
            "logprobs": 3,
            "echo": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": "me",
            "suffix": None,
            "presence_penalty": 0.0,
        }
    )
    assert ask == Ask(
        model="small@last",
        prompts=("KING", [1, 2]),
        n=2,
        max_tokens=7,
        sampling=Sampling(
            temperature=0.0,
            top_k=5,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.5,
            logit_bias={11: -100.0},
        ),
        seed=2**32 - 1,
        stop=("\n\n", "KING"),
        logprobs=3,
        stream=True,
        usage=True,
    )


def test_the_defaults_are_those_of_openai():
    ask = completions({})
    assert ask.prompts == ("",) and ask.max_tokens == 16 and ask.n == 1 and not ask.stream
    assert ask.sampling.temperature == 1 and ask.logprobs is None and ask.stop == ()
    assert len({completions({}).seed for _ in range(9)}) > 1  # another text each time
    ask = chat({"messages": HELLO})
    assert ask.messages == tuple(HELLO) and ask.max_tokens is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ("a",)), ([3, 4], ([3, 4],)), (["a", "b"], ("a", "b")), ([[1], [2, 3]], ([1], [2, 3]))],
)
def test_the_forms_of_a_prompt(prompt, expected):
    assert completions({"prompt": prompt}).prompts == expected


def test_the_fields_of_a_chat():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    ask = chat({"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 5})
    assert ask.messages == ({"role": "user", "content": "Hello"},) and ask.max_tokens == 5
    assert chat({"messages": HELLO, "logprobs": True}).logprobs == 0
    assert chat({"messages": HELLO, "logprobs": True, "top_logprobs": 4}).logprobs == 4
    assert chat({"messages": HELLO, "logprobs": False}).logprobs is None


@pytest.mark.parametrize(
    ("values", "param", "said"),
    [
        ({"prompt": 1}, "prompt", "expected a text, token ids, or a list of either, got 1"),
        ({"prompt": []}, "prompt", "expected a text"),
        ({"prompt": ["a", 1]}, "prompt", "expected a text"),
        ({"prompt": [True]}, "prompt", "expected a text"),
        ({"max_tokens": 0}, "max_tokens", "expected an integer from 1 to 65536, got 0"),
        ({"max_tokens": 1.5}, "max_tokens", "got 1.5"),
        ({"max_tokens": True}, "max_tokens", "got true"),
        ({"n": 129}, "n", "expected an integer from 1 to 128"),
        ({"n": 64, "prompt": ["a", "b", "c"]}, "n", "192 choices are too many"),
        ({"n": 2, "max_tokens": 65536}, "max_tokens", "2 choices of 65536 tokens are too many"),
        ({"temperature": "hot"}, "temperature", 'expected a number from 0 to 100, got "hot"'),
        ({"temperature": -0.1}, "temperature", "got -0.1"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": 0}, "top_k", "expected an integer from 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"stop": [""]}, "stop", "expected a text, or up to 16"),
        ({"stop": ["a"] * 17}, "stop", "up to 16"),
        ({"stop": 3}, "stop", "got 3"),
        ({"seed": "x"}, "seed", "expected an integer"),
        ({"stream": 1}, "stream", "expected true or false, got 1"),
        ({"stream_options": {"x": 1}}, "stream_options", "include_usage"),
        ({"logit_bias": {"x": 1}}, "logit_bias", 'got {"x": 1}'),
        ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": [1]}, "logit_bias", "got [1]"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"logprobs": 1, "echo": True}, "echo", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "suffix is not supported here; leave it out"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"promt": "a"}, "promt", "unknown field 'promt'; did you mean prompt?"),
        ({"model": 3}, "model", "expected the name of a run, got 3"),
    ],
)
def test_what_a_completion_refuses(values: dict[str, Any], param: str, said: str):
    with pytest.raises(BadRequest) as caught:
        completions(values)
    assert caught.value.param == param and said in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "messages: expected a list"),
        ({"messages": []}, "messages: expected a list"),
        ({"messages": ["hi"]}, "messages[0]: expected an object with role and content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: expected a text, got null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: expected text only",
        ),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools is not supported here"),
        ({"messages": HELLO, "prompt": "x"}, "unknown field 'prompt'"),
    ],
)
def test_what_a_chat_refuses(values: dict[str, Any], said: str):
    with pytest.raises(BadRequest) as caught:
        chat(values)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"temperature": NaN}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"prompt":' * 50_000,
    ],
)
def test_what_is_not_json(body: bytes):
    with pytest.raises(BadRequest, match=r"the body is not (JSON|a JSON object)"):
        parse_json(body)


SIMPLE = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
SIMPLE |= st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
NAMES = (
    "prompt messages model n seed stop max_tokens max_completion_tokens temperature top_p top_k "
    "min_p repetition_penalty logit_bias logprobs top_logprobs echo stream stream_options user "
    "tools best_of"
).split()


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES, max_size=5))
def test_any_json_is_taken_or_refused_in_one_line(values: dict[str, Any]):
    values = parse_json(json.dumps(values).encode())
    for read in (completions, chat):
        try:
            assert isinstance(read(values), Ask)
        except BadRequest as error:
            assert str(error).isprintable() and str(error)
