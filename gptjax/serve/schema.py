"""Bodies of requests: JSON of a client, to be checked, to what it asks for.

The fields are OpenAI's; top_k, min_p and repetition_penalty are added. A field that would change
the answer and is not supported is refused unless it has its neutral value; a field that changes no
answer (`user`, `metadata`) is ignored; an unknown one is refused, as OpenAI does.
"""

import difflib
import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from gptjax.errors import UserError
from gptjax.sampling import Sampling

MOST_CHOICES = 128  # of all prompts of a body together, as OpenAI's n
MOST_TOKENS = 2**16  # to generate, of all choices together
MOST_ALTERNATIVES = 20
MOST_STOPS, LONGEST_STOP = 16, 1000  # OpenAI: 4 of any length
SEEDS = 2**32

IGNORED = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls"
).split()
# Fields that are not supported, each with the values that ask for nothing.
NEUTRAL: dict[str, Collection[Any]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}

Prompt = str | list[int]


class BadRequest(UserError):
    """A body that cannot be answered.

    Args:
        message: one line.
        param: the field that it is about.
        code: OpenAI's name for some errors.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class Ask:
    """What a client asks for."""

    model: str | None
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    """Of a chat, in place of prompts."""
    n: int = 1
    """Choices for each prompt."""
    max_tokens: int | None = None
    """None: as many as the context holds."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    """Choice i of a prompt is the i-th sample of this seed."""
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """Alternatives to report for each token; None: no log-probabilities."""
    echo: bool = False
    stream: bool = False
    usage: bool = False
    """Whether a stream ends with the usage."""


class _Fields:
    """The fields of a body, each read once; null counts as absent."""

    def __init__(self, values: dict[str, Any]):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._names: list[str] = []

    def any(self, name: str, default: Any = None) -> Any:
        self._names.append(name)
        return self._values.pop(name, default)

    def bool(self, name: str) -> bool:
        value = self.any(name, False)
        if not isinstance(value, bool):
            raise expected(name, "true or false", value)
        return value

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        value = self.any(name, default)
        if value is not default and (type(value) is not int or not low <= value <= high):
            raise expected(name, f"an integer from {low} to {high}", value)
        return value

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        value = self.any(name, default)
        if value is default:
            return value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise expected(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def end(self) -> None:
        """Refuse what was not read."""
        for name, value in self._values.items():
            if name in IGNORED:
                continue
            if name not in NEUTRAL:
                close = difflib.get_close_matches(name, [*self._names, *IGNORED], n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise BadRequest(f"unknown field {name[:100]!r}{hint}", name[:100])
            if value not in NEUTRAL[name]:
                raise BadRequest(f"{name} is not supported here; leave it out", name)


def expected(name: str, what: str, given: Any) -> BadRequest:
    """The error for a field of another type or range."""
    shown = json.dumps(given)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    return BadRequest(f"{name}: expected {what}, got {shown}", name)


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        BadRequest: it is none, or not strict JSON.
    """

    def no(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        values = json.loads(body.decode("utf-8"), parse_constant=no)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise BadRequest('the body is not a JSON object; give one, such as {"prompt": "KING"}')
    return values


def completions(values: dict[str, Any]) -> Ask:
    """The body of `POST /v1/completions`.

    Raises:
        BadRequest: a field that cannot be used.
    """
    fields = _Fields(values)
    prompts = _prompts(fields.any("prompt", ""))
    common = _common(fields)
    max_tokens = fields.integer("max_tokens", 16, 1, MOST_TOKENS)  # OpenAI's default
    logprobs = fields.integer("logprobs", None, 0, MOST_ALTERNATIVES)
    echo = fields.bool("echo")
    best_of = fields.integer("best_of", common["n"], 1, MOST_CHOICES)
    if best_of != common["n"]:
        raise BadRequest(f"best_of {best_of} is not supported; leave it out, or give n", "best_of")
    if echo and logprobs is not None:
        raise BadRequest(
            "echo with logprobs is not supported: log-probabilities are of new tokens only; "
            "gptjax score gives those of a text",
            "echo",
        )
    _check_size(len(prompts) * common["n"], max_tokens)
    fields.end()
    return Ask(prompts=prompts, max_tokens=max_tokens, logprobs=logprobs, echo=echo, **common)


def chat(values: dict[str, Any]) -> Ask:
    """The body of `POST /v1/chat/completions`.

    Raises:
        BadRequest: a field that cannot be used.
    """
    fields = _Fields(values)
    messages = _messages(fields.any("messages"))
    common = _common(fields)
    older = fields.integer("max_tokens", None, 1, MOST_TOKENS)
    max_tokens = fields.integer("max_completion_tokens", older, 1, MOST_TOKENS)
    wanted = fields.bool("logprobs")
    top = fields.integer("top_logprobs", None, 0, MOST_ALTERNATIVES)
    if top is not None and not wanted:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    _check_size(common["n"], max_tokens or 1)
    fields.end()
    logprobs = (top or 0) if wanted else None
    return Ask(messages=messages, max_tokens=max_tokens, logprobs=logprobs, **common)


def _common(fields: _Fields) -> dict[str, Any]:
    """The fields that both bodies have, as arguments of `Ask`."""
    model = fields.any("model")
    if model is not None and not isinstance(model, str):
        raise expected("model", "the name of a run", model)
    stream, options = fields.bool("stream"), fields.any("stream_options", {})
    if not isinstance(options, dict) or not set(options) <= {
        "include_usage",
        "include_obfuscation",
    }:
        raise expected("stream_options", "an object with include_usage", options)
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    return {
        "model": model,
        "n": fields.integer("n", 1, 1, MOST_CHOICES),
        "sampling": Sampling(
            temperature=fields.number("temperature", 1.0, 0, 100),
            top_k=fields.integer("top_k", None, 1, 2**31 - 1),
            top_p=_above_zero("top_p", fields.number("top_p", None, 0, 1)),
            min_p=fields.number("min_p", None, 0, 1),
            repetition_penalty=_above_zero(
                "repetition_penalty", fields.number("repetition_penalty", None, 0, 100)
            ),
            logit_bias=_logit_bias(fields.any("logit_bias", {})) or None,
        ),
        "seed": secrets.randbelow(SEEDS) if seed is None else seed % SEEDS,
        "stop": _stops(fields.any("stop", [])),
        "stream": stream,
        "usage": options.get("include_usage") is True,
    }


def _check_size(choices: int, max_tokens: int) -> None:
    """Refuse what would take too much memory: an answer is held until its client has read it."""
    if choices > MOST_CHOICES:
        raise BadRequest(f"{choices} choices are too many; ask for {MOST_CHOICES} at most", "n")
    if choices * max_tokens > MOST_TOKENS:
        raise BadRequest(
            f"{choices} choices of {max_tokens} tokens are too many; ask for {MOST_TOKENS} tokens "
            f"at most",
            "max_tokens",
        )


def _above_zero(name: str, value: float | None) -> Any:
    if value == 0:
        raise expected(name, "a number above 0", value)
    return value


def _is_ids(value: Any) -> bool:
    return bool(value) and all(type(id_) is int for id_ in value)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """A string, a list of strings, a list of ids, or a list of lists of ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        if _is_ids(value):
            return (value,)
        if value and all(isinstance(v, str) or (isinstance(v, list) and _is_ids(v)) for v in value):
            return tuple(value)
    raise expected("prompt", "a text, token ids, or a list of either", value)


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    """Messages with their content as one string; a list of text parts is joined."""
    if not isinstance(value, list) or not value:
        raise expected("messages", 'a list such as [{"role": "user", "content": "Hello"}]', value)
    messages = []
    for i, message in enumerate(value):
        here = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise expected(here, "an object with role and content", message)
        content = message.get("content")
        if isinstance(content, list):
            parts = [p.get("text") if isinstance(p, dict) else None for p in content]
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(parts):
                raise expected(f"{here}.content", "text only", content)
            content = "".join(texts)
        if not isinstance(content, str):
            raise expected(f"{here}.content", "a text", content)
        messages.append({**message, "content": content})
    return tuple(messages)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops)
    ):
        raise expected(
            "stop", f"a text, or up to {MOST_STOPS} of 1 to {LONGEST_STOP} characters", value
        )
    return tuple(stops)


def _logit_bias(value: Any) -> dict[int, float]:
    """Token ids, written as JSON's names, to biases."""
    wanted = 'token ids with numbers from -100 to 100, such as {"11": -100}'
    if not isinstance(value, dict) or len(value) > 1024:
        raise expected("logit_bias", wanted, value)
    biases = {}
    for name, bias in value.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (name.isascii() and name.isdecimal() and len(name) < 10) or not number:
            raise expected("logit_bias", wanted, {name: bias})
        if not -100 <= bias <= 100:
            raise expected("logit_bias", wanted, {name: bias})
        biases[int(name)] = float(bias)
    return biases
