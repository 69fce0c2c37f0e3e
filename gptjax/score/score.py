"""Score texts with a run: token by token, and in total."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from gptjax.errors import UserError
from gptjax.runs.loaded import LoadedRun
from gptjax.score.streams import streams
from gptjax.score.windows import MOST_ALTERNATIVES, Scored, cut, join, score_windows
from gptjax.text import special_tokens
from gptjax.text.sources import Piece
from gptjax.text.tokenizers import Unknown

BIT = math.log(2)  # nats


@dataclass(frozen=True)
class Policy:
    """How a text is read.

    Attributes:
        packed: see `streams.py`.
        stride: see `windows.py`; None: half the context, rounded up.
        special_tokens: put the tokens around each document that the run's tokenizer puts around a
            text, such as a BOS. Those that something predicts count as tokens, of no bytes.
        unknown: what to do with characters that the tokenizer lacks.
        alternatives: most likely tokens to report for each position, up to 20.
    """

    packed: bool = False
    stride: int | None = None
    special_tokens: bool = True
    unknown: Unknown = "error"
    alternatives: int = 0

    def stride_of(self, block_size: int) -> int:
        """The stride for a context of T tokens.

        Raises:
            UserError: it is not 1 to T.
        """
        if self.stride is not None and not 1 <= self.stride <= block_size:
            raise UserError(
                f"--stride {self.stride} is out of range; give 1 to the context length of the run, "
                f"{block_size}"
            )
        return self.stride or -(-block_size // 2)


@dataclass(frozen=True)
class Total:
    """Sums over scored tokens.

    Attributes:
        tokens: all of them.
        predicted: those that something predicts: all but the first of each stream.
        nats: sum of the surprise of the predicted ones, minus the logarithm of the probability.
        n_bytes: UTF-8 bytes of the text, without those of tokens that nothing predicts.
    """

    tokens: int = 0
    predicted: int = 0
    nats: float = 0.0
    n_bytes: int = 0

    def __add__(self, other: "Total") -> "Total":
        return Total(
            self.tokens + other.tokens,
            self.predicted + other.predicted,
            self.nats + other.nats,
            self.n_bytes + other.n_bytes,
        )

    @property
    def loss(self) -> float:
        """Nats per predicted token; nan if there is none."""
        return self.nats / self.predicted if self.predicted else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers; nan if no byte is predicted."""
        return self.nats / BIT / self.n_bytes if self.n_bytes else math.nan


def score(
    run: LoadedRun,
    pieces: Iterable[Piece],
    policy: Policy | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> Iterator[Scored]:
    """Score documents: parts of bounded size, in the order of the text.

    Args:
        run: opened by `gptjax.load`.
        pieces: of the documents, as from `text.sources.read`.
        policy: None: each document alone, with strides of half the context.
        notice: called with one line about unknown characters, if they are replaced or skipped.

    Raises:
        UserError: a stride that the context does not have room for, too many alternatives, a
            character that the tokenizer lacks, or no text.
    """
    policy = policy or Policy()
    if not 0 <= policy.alternatives <= MOST_ALTERNATIVES:
        raise UserError(
            f"--alternatives {policy.alternatives} is out of range; give 0 to {MOST_ALTERNATIVES}"
        )
    T = run.config.model.block_size
    stride = policy.stride_of(T)
    tokenizer = run.tokenizer
    if not policy.special_tokens:
        tokenizer = special_tokens.without(tokenizer)
    chunks = streams(pieces, tokenizer, policy.packed, policy.unknown, notice)
    return score_windows(
        run.model, run.params, cut(chunks, T, stride), T, tokenizer.vocab_size, policy.alternatives
    )


def total(run: LoadedRun, scored: Scored) -> Total:
    """The sums of some scored tokens of a run."""
    predicted = scored.ranks > 0
    unread = run.tokenizer.count_bytes(scored.ids[~predicted]) if not predicted.all() else 0
    return Total(
        len(scored.ids),
        int(predicted.sum()),
        -float(scored.logprobs[predicted].sum(dtype=np.float64)),
        scored.n_bytes - unread,
    )


def score_text(run: LoadedRun, text: str, policy: Policy | None = None) -> Scored:
    """All tokens of one text; see `score`.

    Example:
        scored = score_text(gptjax.load("small"), "the king", Policy(alternatives=5))
        surprise = -scored.logprobs / BIT  # (N,) bits
    """
    policy = replace(policy or Policy(), packed=False)
    return join(score(run, [Piece(text, True)] if text else [], policy))
