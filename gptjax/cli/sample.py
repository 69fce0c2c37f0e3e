"""`gptjax sample` and `sample.py`."""

from dataclasses import dataclass, field
from pathlib import Path

from gptjax.cli.draw import print_samples
from gptjax.cli.flags import parse
from gptjax.config import MeshConfig
from gptjax.errors import UserError
from gptjax.text.tokenizers import Unknown

MOST_ALTERNATIVES = 20


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
    """Text to continue, file:PATH, or - for standard input; None: what a pipe brings, or else
    begin a text."""
    prompts: str | None = None
    """File with a prompt in each line, or - for standard input; *.jsonl has JSON in each line:
    {"prompt": "Once", "temperature": 0.5, ...}."""
    interactive: bool = False
    """Converse in the terminal: a chat if the model has a chat template, or else a text that you
    and the model write by turns."""
    chat: bool | None = None
    """Send a prompt as a user's message through the model's chat template; None: only in a
    conversation, if there is a template."""
    system: str | None = None
    """System message of a chat."""
    unknown: Unknown = "error"
    """What to do with characters of the prompt that the tokenizer lacks."""
    special_tokens: bool = True
    """Put around the prompt the tokens that the run's tokenizer puts around a text, such as a
    BOS."""
    max_new_tokens: int = 500
    """Tokens to generate in each sample, at most."""
    num_samples: int = 1
    """Samples of each prompt, drawn together."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample, and are left out of it."""
    ignore_eos: bool = False
    """Continue after the end of a text (the model's end-of-text token)."""
    temperature: float = 0.8
    """Below 1 is safer, above 1 wilder; 0 takes the most likely token each time."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float | None = None
    """Sample from the fewest tokens that hold this much probability."""
    min_p: float | None = None
    """Sample from tokens that have this share of the most likely one's probability."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that have occurred less likely, as in transformers."""
    logit_bias: tuple[str, ...] = ()
    """Added to the logits of single tokens, as ID=BIAS: 50256=-100 never draws that one."""
    seed: int = 1337
    """Random seed; the same seed, prompt and settings give the same text."""
    out: str | None = None
    """New file that gets the samples once they are done, or when Ctrl-C ends them; None: standard
    output, as they are drawn."""
    json: bool = False
    """Write a line of JSON for each sample: prompt, seed, text, tokens, and finish (stop, length,
    or null if Ctrl-C ended it)."""
    logprobs: int | None = None
    """Add to the JSON the log-probability of each token, and this many alternatives (0 to 20)."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small; give 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature} is out of range; give 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k {self.top_k} is too small; give 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is out of range; give 0 < top-p <= 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p {self.min_p} is out of range; give 0 <= min-p <= 1")
        penalty = self.repetition_penalty
        if penalty is not None and not 0 < penalty < float("inf"):
            raise UserError(
                f"--repetition-penalty {penalty} is out of range; give a number above 0"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is out of range; give 0 <= seed < 2**32")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_ALTERNATIVES:
            raise UserError(
                f"--logprobs {self.logprobs} is out of range; give 0 to {MOST_ALTERNATIVES}"
            )
        if "" in self.stop:
            raise UserError("--stop has an empty text, which would end every sample; leave it out")
        _ = self.biases

    @property
    def biases(self) -> dict[int, float]:
        """The logit biases, by token id."""
        found = {}
        for word in self.logit_bias:
            id_, _, bias = word.partition("=")
            try:
                found[int(id_)] = float(bias)
                fine = int(id_) >= 0 and abs(float(bias)) < float("inf")
            except ValueError:
                fine = False
            if not fine:
                raise UserError(f"--logit-bias {word[:40]!r}: expected ID=BIAS, as in 50256=-100")
        return found


def parse_sample(argv: list[str], prog: str = "sample.py") -> SampleCommand:
    """Read the arguments.

    Raises:
        UserError: an unknown flag, a bad value, or flags that exclude one another.
    """
    command = parse(SampleCommand, SampleCommand(), argv, prog)
    alone = [("interactive", name) for name in ("prompt", "prompts", "out", "json")]
    for first, second in [*alone, ("prompts", "prompt")]:
        if getattr(command, first) and getattr(command, second):
            raise UserError(f"--{first} and --{second} exclude one another; give one of them")
    if command.interactive and command.num_samples > 1:
        raise UserError("--interactive draws one answer at a time; leave --num-samples out")
    if command.logprobs is not None and not command.json:
        raise UserError("--logprobs is written with --json; add that")
    if command.system is not None and not (command.interactive or command.chat):
        raise UserError("--system belongs to a chat; add --chat or --interactive")
    if command.out is not None and Path(command.out).exists():
        raise UserError(f"--out {command.out} exists already; give a new name, or remove it")
    return command


def main(argv: list[str], prog: str) -> None:
    """Generate text; jax is imported once the arguments are understood."""
    command = parse_sample(argv, prog)
    from gptjax.cli.compilation_cache import use_compilation_cache

    use_compilation_cache()
    if command.interactive:
        from gptjax.cli.conversation import converse

        converse(command)
    else:
        print_samples(command)
