"""The samples that `gptjax sample` draws, prints and writes."""

import io
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.cli.prompts import read_prompt, read_prompts
from gptjax.cli.recipe import parts_for_run, recipe_of_run
from gptjax.errors import UserError, note, visible
from gptjax.runs import files, folders

if TYPE_CHECKING:
    from gptjax.cli.sample import SampleCommand
    from gptjax.generation.chat import ChatTemplate
    from gptjax.generation.requests import Piece, Request
    from gptjax.runs.loaded import LoadedRun

HEADING = 40  # characters of a prompt above its sample


def open_run(command: "SampleCommand") -> "LoadedRun":
    """Load the run of a command.

    Raises:
        UserError: a run, checkpoint, config file or mesh that cannot be used.
    """
    from gptjax.runs.loaded import load  # jax, once the arguments are understood

    recipe, directory = recipe_of_run(command.config), folders.find(command.run)
    own = parts_for_run(recipe, directory, "model")
    return load(directory, command.checkpoint, mesh=command.mesh, **own)


def template_for(run: "LoadedRun", wanted: bool | None) -> "ChatTemplate | None":
    """The run's chat template, if it is wanted (None: if there is one).

    Raises:
        UserError: it is wanted, and there is none.
    """
    from gptjax.generation import chat

    template = None if wanted is False else chat.template_of(run)
    if wanted and template is None:
        raise UserError(
            f"{run.directory} has no chat template, so it is not a model to chat with; leave "
            f"--chat out, or import a model that was trained on conversations"
        )
    return template


def request_for(
    run: "LoadedRun", command: "SampleCommand", prompt: Any, sample: int = 0
) -> "Request":
    """What a command asks of a run.

    Args:
        run: to ask.
        command: its settings.
        prompt: text, None to begin one, or (N,) ids.
        sample: which one, of several of the same prompt and seed.

    Raises:
        UserError: a prompt that cannot be encoded, or has no tokens; an id that there is not.
    """
    from gptjax.sampling import Sampling

    return run.request(
        prompt,
        max_new_tokens=command.max_new_tokens,
        sampling=Sampling(
            temperature=command.temperature,
            top_k=command.top_k,
            top_p=command.top_p,
            min_p=command.min_p,
            repetition_penalty=command.repetition_penalty,
            logit_bias=command.biases or None,
        ),
        seed=command.seed,
        sample=sample,
        stop=command.stop,
        stop_tokens=() if command.ignore_eos else None,
        alternatives=command.logprobs or 0,
        special_tokens=command.special_tokens,
        unknown=command.unknown,
    )


def messages_of(command: "SampleCommand") -> list[dict[str, str]]:
    """The conversation that a prompt begins."""
    system = [] if command.system is None else [{"role": "system", "content": command.system}]
    return [*system, {"role": "user", "content": command.prompt or ""}]


# ---------------------------------------------------------------------------------------------
# Samples


@dataclass
class Sample:
    """One sample, as far as it is drawn."""

    command: "SampleCommand"  # of its prompt
    number: int  # among the samples of its prompt, from 1
    request: "Request"
    pieces: "list[Piece]" = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        return self.pieces[-1].finish if self.pieces else None


def plan_samples(run: "LoadedRun", command: "SampleCommand") -> list[Sample]:
    """The samples that a command asks for, none of them drawn yet."""
    if command.prompts is not None:
        commands = read_prompts(command, command.prompts)
    else:
        commands = [replace(command, prompt=read_prompt(command.prompt))]
    template = template_for(run, bool(command.chat))
    samples = []
    for one in commands:
        if template and not one.prompt:
            raise UserError("--chat needs a message; give it as --prompt")
        prompt = template.encode(messages_of(one)) if template else one.prompt
        for i in range(one.num_samples):
            samples.append(Sample(one, i + 1, request_for(run, one, prompt, i)))
    return samples


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C and SIGTERM instead of ending at once: the function tells whether one came. JAX
    is not interrupted in the middle of a step. A second signal ends the process."""
    came: list[int] = []

    def note_it(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = {n: signal.signal(n, note_it) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_order(
    samples: list[Sample], stream: "Iterator[Mapping[int, Piece]]"
) -> "Iterator[tuple[Sample, Piece]]":
    """The pieces of samples that are drawn side by side, one sample after the other: the first as
    it is drawn, the next as far as it is when that is done, and so on."""
    current, shown = 0, 0
    for pieces in stream:
        for i, piece in pieces.items():
            samples[i].pieces.append(piece)
        while current < len(samples):
            sample = samples[current]
            for piece in sample.pieces[shown:]:
                yield sample, piece
            shown = len(sample.pieces)
            if sample.finish is None:
                break
            current, shown = current + 1, 0


def heading(sample: Sample, total: int, place: int) -> str:
    """The line above one of several samples."""
    prompt = sample.command.prompt
    if sample.command.prompts is None or prompt is None:
        return f"--- {place} of {total}"
    prompt = visible(" ".join(prompt.split()))
    shown = prompt if len(prompt) <= HEADING else f"{prompt[: HEADING - 3]}..."
    return f"--- {place} of {total}: {shown}"


def as_text(samples: Sequence[Sample], total: int) -> str:
    """What `print_samples` prints without JSON."""
    if total == 1:
        return f"{samples[0].text}\n"
    return "".join(
        f"{heading(sample, total, i)}\n{sample.text}\n" for i, sample in enumerate(samples, start=1)
    )


def as_json(run: "LoadedRun", sample: Sample) -> str:
    """A sample as a line of JSON, in ASCII so that any output takes it."""
    tokens = [token for piece in sample.pieces for token in piece.tokens]
    values: dict[str, Any] = {
        "prompt": sample.command.prompt,
        "sample": sample.number,
        "seed": sample.request.seed,
        "text": sample.text,
        "tokens": [token.id for token in tokens],
        "finish": sample.finish,
    }
    if sample.command.logprobs is not None:
        shown = lambda id_, logprob: {
            "id": id_,
            "text": run.tokenizer.decode([id_]),
            "logprob": logprob if logprob > -float("inf") else None,
        }
        values["logprobs"] = [
            {
                **shown(token.id, token.logprob),
                "alternatives": [shown(*pair) for pair in token.alternatives],
            }
            for token in tokens
        ]
    return json.dumps(values)


def print_samples(command: "SampleCommand") -> None:
    """Draw the samples, and print or write them; the rate on stderr.

    Raises:
        UserError: see `open_run`, `plan_samples`.
    """
    run = open_run(command)
    samples = plan_samples(run, command)
    times = [(0, time.perf_counter())]
    lengths, S = [len(x.request.prompt) for x in samples], run.config.model.block_size
    if max(lengths) > S:
        what = "the prompt" if len(set(lengths)) == 1 else "the longest prompt"
        note(
            f"{what} has {max(lengths):,} tokens and the model's context holds {S:,}: only the "
            f"last {S:,} are read"
        )

    def timed(stream: "Iterator[Mapping[int, Piece]]") -> "Iterator[Mapping[int, Piece]]":
        for pieces in stream:
            made = sum(len(piece.tokens) for piece in pieces.values())
            times.append((times[-1][0] + made, time.perf_counter()))
            yield pieces

    stream = timed(run.stream([sample.request for sample in samples]))
    if command.out is not None:
        write_samples(run, command, samples, stream)
    else:
        show = print_json if command.json else print_text
        show(run, samples, stream)
    # The first two steps wait for their programs to be compiled.
    if len(times) > 3:
        (before, start), (made, end) = times[2], times[-1]
        note(f"{(made - before) / (end - start):,.0f} tokens/s, compilation not counted")


def print_text(
    run: "LoadedRun", samples: list[Sample], stream: "Iterator[Mapping[int, Piece]]"
) -> None:
    """Print the samples as they are drawn, one after the other."""
    shown = visible if sys.stdout.isatty() else str  # a file gets the text as it is
    begun: list[Sample] = []
    for sample, piece in in_order(samples, stream):
        if sample not in begun:
            begun.append(sample)
            if len(samples) > 1:
                print(heading(sample, len(samples), len(begun)))
        print(shown(piece.text), end="" if piece.finish is None else "\n", flush=True)


def print_json(
    run: "LoadedRun", samples: list[Sample], stream: "Iterator[Mapping[int, Piece]]"
) -> None:
    """Print a line of JSON for each sample that is done."""
    for sample, piece in in_order(samples, stream):
        if piece.finish is not None:
            print(as_json(run, sample), flush=True)


def write_samples(
    run: "LoadedRun",
    command: "SampleCommand",
    samples: list[Sample],
    stream: "Iterator[Mapping[int, Piece]]",
) -> None:
    """Write the samples to a file once they are done, or as far as they are at Ctrl-C or SIGTERM.

    Raises:
        UserError: the file cannot be written.
        KeyboardInterrupt: they were interrupted, and are written.
    """
    assert command.out is not None
    with interruptible() as is_stopped:
        for pieces in stream:
            for i, piece in pieces.items():
                samples[i].pieces.append(piece)
            if is_stopped():
                break
        interrupted = is_stopped()
    begun = [sample for sample in samples if sample.pieces]
    if command.json:
        text = "".join(f"{as_json(run, sample)}\n" for sample in begun)
    else:
        text = as_text(begun, len(samples)) if begun else ""
    done = sum(sample.finish is not None for sample in begun)
    if begun:
        content = io.BytesIO(text.encode("utf-8", "backslashreplace"))
        files.write_atomically(Path(command.out), content)
        note(f"{done} of {len(samples)} samples are whole, written to {command.out}")
    if interrupted:
        raise KeyboardInterrupt
