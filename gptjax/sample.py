"""Load a run and let it speak: text in, text out. The run's folder is all it reads."""

import sys
import time
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax import runs
from gptjax.build import build_model
from gptjax.checkpoint import Checkpoints
from gptjax.cli import SampleCommand, read_prompt
from gptjax.generate import CHUNK, Sampling, generate
from gptjax.runs import Run

WARM_UP = 1 + CHUNK  # tokens of the first two yields, which both programs are compiled for


def stream(command: SampleCommand, model: nn.Module | None = None) -> Iterator[list[str]]:
    """The samples, as they grow.

    Args:
        command: what to load and how to draw.
        model: your own, if the run was trained with one; None: the config's.

    Yields:
        num_samples pieces of new text at a time, one for each sample.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or a prompt that cannot be encoded.
    """
    run = Run(runs.find(command.run))
    tokenizer = run.tokenizer
    prompt = tokenizer.encode(read_prompt(command.prompt), command.unknown)
    if not len(prompt):
        prompt = tokenizer.encode("\n", "replace")[:1]
    model = model or build_model(run.config.model, tokenizer.vocab_size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    checkpoints = Checkpoints(run.checkpoints_path)
    step = run.choose(command.checkpoint, checkpoints.steps())
    params = checkpoints.load(step, {"params": target})["params"]
    sampling = Sampling(command.temperature, command.top_k, command.top_p, tokenizer.vocab_size)
    key = jax.random.key(command.seed)
    for chunk in generate(
        model, params, prompt, key, command.max_new_tokens, sampling, command.num_samples
    ):
        yield [tokenizer.decode(row) for row in chunk]


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
        rate = made * command.num_samples / (times[-1] - times[1])
        print(f"{rate:,.0f} tokens/s, compilation not counted", file=sys.stderr)
