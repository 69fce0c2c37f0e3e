"""A run as a model of lm-evaluation-harness, EleutherAI's `lm_eval` (extra `eval`).

    import lm_eval
    from gptjax.score.harness import GptjaxLM

    lm_eval.simple_evaluate(model=GptjaxLM("small"), tasks=["lambada_openai"])

Contexts, prefix token, truncation and rolling windows are those of the harness's own model for
transformers, so that results can be compared with published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError, optional_import
from gptjax.generation.requests import Request
from gptjax.runs.loaded import LoadedRun, load
from gptjax.sampling import Sampling
from gptjax.score.windows import Window, score_windows
from gptjax.text import special_tokens
from gptjax.text.stream import first_tokens

model_api: Any = optional_import("lm_eval.api.model", "eval")
utils: Any = optional_import("lm_eval.utils", "eval")
model_utils: Any = optional_import("lm_eval.models.utils", "eval")

MOST_NEW = 256  # tokens, where a task sets no limit; the harness's own
DRAWN = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"


class GptjaxLM(model_api.TemplateLM):
    """A run, for `lm_eval.simple_evaluate(model=...)`.

    Args:
        run: opened by `gptjax.load`, or what that takes.
        checkpoint: "best", "last" or a step, of a run that is not opened yet.

    Raises:
        UserError: the package lm_eval is missing, or a run that cannot be opened.
    """

    def __init__(self, run: LoadedRun | str | Path, checkpoint: str | int = "best"):
        super().__init__()
        self.run = run if isinstance(run, LoadedRun) else load(run, checkpoint)
        self.max_length: int = self.run.config.model.block_size

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, or else what a text without a prompt begins after."""
        end = self.run.tokenizer.end_of_text
        return int(first_tokens(self.run.tokenizer)[0]) if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is predicted from: a BOS, or else `eot_token_id`."""
        before = special_tokens.of(self.run.tokenizer)[0].tolist()
        return before[-1] if before else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, after the tokens that the tokenizer puts before one."""
        ids = self.run.tokenizer.encode(string).tolist()
        before = special_tokens.of(self.run.tokenizer)[0].tolist()
        return ids if add_special_tokens is False else before + ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids) the log-probability of the continuation,
        and whether it is what greedy decoding gives. A context that is too long loses its start.

        Raises:
            UserError: a continuation longer than the context length.
        """
        T = self.max_length
        windows = []
        for _, context, continuation in requests:
            if not 1 <= len(continuation) <= T:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens; this run's context length "
                    f"allows 1 to {T}: choose another task, or a run with a longer context"
                )
            ids = np.array((context + continuation)[-(T + 1) :], np.int32)
            windows.append(Window(ids, len(ids) - len(continuation)))
        # Those of one length together, so that little is padded.
        order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
        sizes = T, self.run.tokenizer.vocab_size
        scored = score_windows(self.run.model, self.run.params, (windows[i] for i in order), *sizes)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(windows)
        for i, part in zip(order, scored, strict=True):
            found = float(part.logprobs.sum(dtype=np.float64)), bool((part.ranks == 1).all())
            results[i] = found
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found)
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in windows that follow on one another; the first one
        starts with `prefix_token_id`."""
        sums = []
        for request in requests:
            (text,) = request.args
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            windows = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            sums.append(sum(found for found, _ in self._loglikelihood_tokens(windows)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to a stop string, the end-of-text token or the most
        tokens; greedy unless the task asks for sampling. A context that leaves no room for them
        loses its start.

        Raises:
            UserError: a setting of the task that gptjax does not have, or no room for a context.
        """
        asked = [self._request(*request.args) for request in requests]
        texts = [done.text for done in self.run.complete(asked)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        """What the harness asks for, as the engine takes it."""
        given = model_utils.normalize_gen_kwargs(settings, MOST_NEW)
        if unknown := given.keys() - {"until", "max_gen_toks", "do_sample", *DRAWN}:
            raise UserError(
                f"the task sets {', '.join(sorted(unknown))} for generation; gptjax knows until, "
                f"max_gen_toks, do_sample, {', '.join(DRAWN)}"
            )
        new = given["max_gen_toks"]
        if (room := self.max_length - new) < 1:
            raise UserError(
                f"the task asks for {new} new tokens, and the run's context length is "
                f"{self.max_length}; set max_gen_toks of the task lower"
            )
        drawn: dict[str, Any] = {name: given[name] for name in DRAWN if name in given}
        drawn.setdefault("temperature", 0.0)
        if not drawn.get("top_k"):  # transformers' 0: all tokens
            drawn["top_k"] = None
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        end = self.run.tokenizer.end_of_text
        return Request(
            prompt=np.array(ids, np.int32),
            max_new_tokens=new,
            sampling=Sampling(**drawn),
            stop=tuple(text for text in given["until"] if text),
            stop_tokens=() if end is None else (end,),
        )
