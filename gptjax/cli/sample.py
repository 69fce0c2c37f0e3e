"""`gptjax sample` and `sample.py`."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gptjax.cli.flags import parse
from gptjax.cli.recipe import parts_for_run, recipe_of_run
from gptjax.config import MeshConfig
from gptjax.errors import UserError, note, visible
from gptjax.runs import folders
from gptjax.runs.files import read_bytes
from gptjax.text.tokenizers import Unknown


@dataclass(frozen=True)
class SampleCommand:
    """Generate text from a run. The run's folder is all it needs."""

    run: str | None = None
    """Name in runs/, or path of a run's folder; None: the newest run."""
    checkpoint: str = "best"
    """best (by validation loss), last, or a step."""
    config: str | None = None
    """Python file that the run's own model comes from; None: the model of its config."""
    prompt: str | None = None
    """Text to continue, or file:PATH; None: begin a text, after a newline if the tokenizer has
    one."""
    unknown: Unknown = "error"
    """What to do with characters of the prompt that the tokenizer lacks."""
    special_tokens: bool = True
    """Put around the prompt the tokens that the run's tokenizer puts around a text, such as a
    BOS."""
    max_new_tokens: int = 500
    """Tokens to generate in each sample."""
    num_samples: int = 1
    """Samples, generated as one batch."""
    temperature: float = 0.8
    """Below 1 is safer, above 1 wilder; 0 takes the most likely token each time."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float | None = None
    """Sample from the fewest tokens that hold this much probability."""
    seed: int = 1337
    """Random seed; the same seed, prompt and settings give the same text."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))


def parse_sample(argv: list[str], prog: str = "sample.py") -> SampleCommand:
    """Read the arguments.

    Raises:
        UserError: an unknown flag or a bad value.
    """
    command = parse(SampleCommand, SampleCommand(), argv, prog)
    for name in ("max_new_tokens", "num_samples"):
        if (value := getattr(command, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small; give 1 or more")
    if not 0 <= command.temperature < float("inf"):
        raise UserError(f"--temperature {command.temperature} is out of range; give 0 or more")
    if command.top_k is not None and command.top_k < 1:
        raise UserError(f"--top-k {command.top_k} is too small; give 1 or more")
    if command.top_p is not None and not 0 < command.top_p <= 1:
        raise UserError(f"--top-p {command.top_p} is out of range; give 0 < top-p <= 1")
    if not 0 <= command.seed < 2**32:
        raise UserError(f"--seed {command.seed} is out of range; give 0 <= seed < 2**32")
    return command


def read_prompt(prompt: str | None) -> str | None:
    """The prompt itself, or the text of `file:PATH` without its byte order mark.

    Raises:
        UserError: no such file, not UTF-8, or an empty prompt.
    """
    if prompt is None:
        return None
    if prompt.startswith("file:"):
        path = Path(prompt.removeprefix("file:"))
        try:
            prompt = read_bytes(path).decode("utf-8").removeprefix("\ufeff")
        except OSError as error:
            raise UserError(f"prompt file {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"prompt file {path} is not UTF-8 (byte {error.start})") from None
        if "\0" in prompt:
            raise UserError(f"prompt file {path} has NULs, as in UTF-16; store it as UTF-8")
    if not prompt:
        raise UserError("the prompt has no characters; give one or more, or leave --prompt out")
    return prompt


def stream(command: SampleCommand) -> Iterator[list[str]]:
    """Pieces of text as they are generated, one for each sample; see `LoadedRun.stream`.

    Raises:
        UserError: a run, checkpoint, config file, prompt or mesh that cannot be used.
    """
    from gptjax.runs.loaded import load  # jax, once the arguments are understood
    from gptjax.sampling import Sampling

    prompt, recipe = read_prompt(command.prompt), recipe_of_run(command.config)
    directory = folders.find(command.run)
    own = parts_for_run(recipe, directory, "model")
    run = load(directory, command.checkpoint, mesh=command.mesh, **own)
    requests = [
        run.request(
            prompt,
            command.max_new_tokens,
            sampling=Sampling(command.temperature, command.top_k, command.top_p),
            seed=command.seed,
            sample=i,
            unknown=command.unknown,
            special_tokens=command.special_tokens,
        )
        for i in range(command.num_samples)
    ]
    for pieces in run.stream(requests, slots=len(requests)):
        yield [pieces[i].text if i in pieces else "" for i in range(len(requests))]


def print_samples(command: SampleCommand) -> None:
    """Print the samples: one as it comes, several one after the other; the rate on stderr."""
    from gptjax.generation.decoding import CHUNK

    one = command.num_samples == 1
    shown = visible if sys.stdout.isatty() else str  # a file gets the text as it is
    texts = [""] * command.num_samples
    times: list[float] = []
    for pieces in stream(command):
        if one:
            print(shown(pieces[0]), end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        times.append(time.perf_counter())
    print("" if one else "\n---\n".join(map(shown, texts)))
    # The first two pieces, of 1 and CHUNK tokens, wait for their programs to be compiled.
    if (made := command.max_new_tokens - 1 - CHUNK) > 0:
        rate = made * command.num_samples / (times[-2] - times[1])
        note(f"{rate:,.0f} tokens/s, compilation not counted")


def main(argv: list[str], prog: str) -> None:
    """Generate text; jax is imported once the arguments are understood."""
    command = parse_sample(argv, prog)
    from gptjax.cli.compilation_cache import use_compilation_cache

    use_compilation_cache()
    print_samples(command)
