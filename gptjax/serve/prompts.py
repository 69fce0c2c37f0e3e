"""From what a client asks for to requests of an engine."""

from dataclasses import replace

import numpy as np

from gptjax.generation.requests import Request
from gptjax.serve.models import Served
from gptjax.serve.schema import Ask, BadRequest, Prompt


def requests(ask: Ask, served: Served) -> list[Request]:
    """A request for each choice: those of the first prompt, then those of the next.

    Raises:
        UserError: a prompt that cannot be encoded, or ids that the vocabulary lacks.
    """
    V = served.run.tokenizer.vocab_size
    if unknown := [id_ for id_ in ask.sampling.logit_bias or {} if id_ >= V]:
        raise BadRequest(f"logit_bias: token {unknown[0]} is not below {V}", "logit_bias")
    first = [_chat(ask, served)] if ask.messages else [_text(p, ask, served) for p in ask.prompts]
    return [replace(request, sample=i) for request in first for i in range(ask.n)]


def _text(prompt: Prompt, ask: Ask, served: Served) -> Request:
    """The request of one prompt; an empty one begins a text."""
    if isinstance(prompt, str):
        return _request(prompt or None, ask, served)
    V = served.run.tokenizer.vocab_size
    for id_ in prompt:
        if not 0 <= id_ < V:
            raise BadRequest(f"prompt: token {str(id_)[:20]} is not in 0 .. {V - 1}", "prompt")
    return _request(np.array(prompt, np.int32), ask, served)


def _chat(ask: Ask, served: Served) -> Request:
    """The request that answers a conversation.

    Raises:
        BadRequest: the run has no chat template, or the conversation fills the context.
    """
    if served.template is None:
        raise BadRequest(
            f"{served.name} has no chat template; ask /v1/completions to continue a text", "model"
        )
    ids, T = served.template.encode(ask.messages), served.run.config.model.block_size
    if len(ids) >= T:
        raise BadRequest(
            f"the conversation has {len(ids)} tokens, and the context holds {T}; leave out earlier "
            f"messages",
            "messages",
            "context_length_exceeded",
        )
    ask = replace(ask, max_tokens=min(ask.max_tokens or T, T - len(ids)))
    return _request(ids, ask, served)


def _request(prompt: str | np.ndarray | None, ask: Ask, served: Served) -> Request:
    assert ask.max_tokens is not None  # a chat's is known by now
    return served.run.request(
        prompt,
        ask.max_tokens,
        sampling=ask.sampling,
        seed=ask.seed,
        stop=ask.stop,
        alternatives=ask.logprobs or 0,
    )
