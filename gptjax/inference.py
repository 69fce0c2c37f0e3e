"""Load a run and let it speak: text in, text out. The run's folder is all it reads."""

import sys
import time
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np

from gptjax.build import build_model
from gptjax.cli import SampleCommand, read_prompt
from gptjax.errors import UserError
from gptjax.interop.pretrained import weights
from gptjax.parallel import sharding
from gptjax.runs import folders
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.sampling import CHUNK, Sampling, generate
from gptjax.text.tokenizers import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # how bytes read that are no UTF-8, or not yet
WARM_UP = 1 + CHUNK  # tokens of the first two yields, which both programs are compiled for


def stream(command: SampleCommand, model: nn.Module | None = None) -> Iterator[list[str]]:
    """The samples, as they grow.

    Args:
        command: what to load and how to draw.
        model: your own, if the run was trained with one; None: the config's.

    Yields:
        num_samples pieces of new text at a time, one for each sample; no character in halves.

    Raises:
        UserError: no such run or checkpoint, a damaged one, a prompt that cannot be encoded, or
            a mesh that does not fit.
    """
    run = Run(folders.find(command.run))
    tokenizer = run.tokenizer
    prompt = tokenizer.encode(read_prompt(command.prompt), command.unknown)
    if not len(prompt):
        prompt = tokenizer.encode("\n", "replace")[:1]
    model = model or build_model(run.config.model, tokenizer.vocab_size)
    mesh = sharding.mesh_of(command.mesh)
    if command.num_samples % mesh.shape["data"]:
        raise UserError(
            f"--num-samples {command.num_samples} is not divisible by --mesh.data "
            f"{mesh.shape['data']}; change one of them (each device draws as many)"
        )
    step = run.choose(command.checkpoint, Checkpoints(run.checkpoints_path).steps())
    params = weights(run, step, model, mesh)
    sampling = Sampling(command.temperature, command.top_k, command.top_p, tokenizer.vocab_size)
    key = jax.random.key(command.seed)
    growing = [Growing(tokenizer, prompt) for _ in range(command.num_samples)]
    model = sharding.on_mesh(model, mesh)
    for chunk in generate(
        model, params, prompt, key, command.max_new_tokens, sampling, command.num_samples
    ):
        yield [text.add(row) for text, row in zip(growing, chunk, strict=True)]
    yield [text.end() for text in growing]


class Growing:
    """The text of tokens as they come: a character that is not whole yet is held back.

    Args:
        tokenizer: of the tokens; one of them may hold a part of a character only.
        prompt: what they come after, which some tokenizers need to know (not given out again).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._restart(prompt[-1:].tolist())

    def _restart(self, ids: list[int]) -> None:
        """Decode from `ids` on, whose text has been given out."""
        self._ids, self._given = ids, len(self._tokenizer.decode(ids))
        self._new = len(ids)

    def add(self, ids: np.ndarray) -> str:
        """What can be said after these too; together the pieces are the text of all tokens."""
        pieces = []
        for token in ids.tolist():
            self._ids.append(token)
            text = self._tokenizer.decode(self._ids)
            # Of a character, three bytes of four can be waiting for the last.
            ready = max(len(text.rstrip(BROKEN)), len(text) - 3)
            pieces.append(text[self._given : ready])
            self._given = max(self._given, ready)
            if ready == len(text):
                self._restart(self._ids[self._new :])
        return "".join(pieces)

    def end(self) -> str:
        """What was held back and will not be completed."""
        return self._tokenizer.decode(self._ids)[self._given :]


def main(command: SampleCommand) -> None:
    """Print the samples: one as it comes, several one after the other; the rate on stderr."""
    one = command.num_samples == 1
    texts = [""] * command.num_samples
    times: list[float] = []
    for pieces in stream(command):
        if one:
            print(pieces[0], end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        times.append(time.perf_counter())
    print("" if one else "\n---\n".join(texts))
    if (made := command.max_new_tokens - WARM_UP) > 0:
        rate = made * command.num_samples / (times[-2] - times[1])
        print(f"{rate:,.0f} tokens/s, compilation not counted", file=sys.stderr)
