"""A run opened for use: its model, parameters and tokenizer in one object."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batches import Batch, whole_split_starts, windows
from gptjax.config import Config, MeshConfig
from gptjax.errors import UserError
from gptjax.generation import chat
from gptjax.generation.engine import SLOTS, Engine
from gptjax.generation.requests import Completion, Piece, Request, check
from gptjax.loss import evaluate_batch
from gptjax.model import Model
from gptjax.parallel import sharding
from gptjax.parallel.switches import pinned, pinned_pieces
from gptjax.plan import room
from gptjax.runs import folders, parts
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.records import Record
from gptjax.runs.run import Run
from gptjax.sampling import Sampling
from gptjax.text import special_tokens
from gptjax.text.stream import first_tokens
from gptjax.text.tokenizers import Tokenizer, Unknown

ROWS = 16  # windows of a text whose loss is computed at once


def load(
    run: str | Path | None = None,
    checkpoint: str | int = "best",
    *,
    model: Model | None = None,
    mesh: MeshConfig | None = None,
) -> "LoadedRun":
    """Open a trained run.

    Args:
        run: a name in runs/, or the path of a run's folder; None: the newest.
        checkpoint: "best" (by validation loss), "last", or a step.
        model: your own, for a run that was trained with one (see `train`).
        mesh: devices to load onto; None: one.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or another model.
    """
    return LoadedRun(Run(folders.find(run and str(run))), checkpoint, model, mesh)


class LoadedRun:
    """A run's model with the parameters of one of its checkpoints.

    Attributes:
        directory: the run's folder.
        config: of the run.
        model: the Flax module; `model.apply({"params": params}, ids)` gives logits and no cache.
        params: its parameters.
        step: of the checkpoint.
        tokenizer: of the run.
        chat: the text of the run's chat.json, see generation/chat.py; None: it has none.
    """

    @pinned()
    def __init__(
        self, run: Run, checkpoint: str | int, model: Model | None, mesh: MeshConfig | None
    ):
        self._run = run
        self._kept: tuple[int, Any, Engine] | None = None  # slots, parameters, for `stream`
        self._mesh = sharding.mesh_of(mesh or MeshConfig(data=1))
        self.directory: Path = run.directory
        self.config: Config = run.config
        self.tokenizer: Tokenizer = run.tokenizer
        self.chat: str | None = run.chat
        self.model: nn.Module = parts.run_model(run, model)
        checkpoints = Checkpoints(run.checkpoints_path)
        self.step: int
        self.params: Any
        self.step, self.params = checkpoints.read(
            lambda steps: run.choose(str(checkpoint), steps),
            lambda step: (step, checkpoints.load_params(step, self.model, self._mesh)),
        )

    @cached_property
    def metrics(self) -> list[Record]:
        """The records of metrics.jsonl: one dict for each step."""
        return self._run.metrics()

    @pinned()
    def logits(self, text: str, *, special_tokens: bool = True) -> np.ndarray:
        """(T, V) float32 logits of the token after each token of a text.

        Args:
            text: any text.
            special_tokens: put the tokens around it that the run's tokenizer puts around a text,
                such as a BOS; they count in T.

        Raises:
            UserError: a character that the tokenizer lacks, no token, or more than the context
                holds.
        """
        ids = self._encode(text, special_tokens)
        if not len(ids):
            raise UserError("the text has no tokens; give one or more")
        return np.asarray(_logits(self.model, self.params, jnp.asarray(ids)[None])[0])

    @pinned()
    def loss(self, text: str, *, special_tokens: bool = True) -> float:
        """Mean loss of a text's tokens but the first, in nats per token, read in windows that
        follow on one another, as validation reads its split.

        Args:
            text: any text.
            special_tokens: see `logits`; after a BOS the text's own first token counts.

        Raises:
            UserError: a character that the tokenizer lacks, or fewer than two tokens.
        """
        ids, T = self._encode(text, special_tokens), self.config.model.block_size
        if len(ids) < 2:
            raise UserError(f"the text has {len(ids)} tokens; a loss takes two or more")
        T = min(T, len(ids) - 1)
        starts = whole_split_starts(len(ids), min(ROWS, -(-len(ids) // T)), T)
        padded = np.pad(ids, (0, T + 1))
        total, count = 0.0, 0
        for row in starts:
            inside = row[:, None] + np.arange(T) < len(ids) - 1
            batch = Batch.of_windows(windows(padded, row, T))._replace(mask=inside)
            sums, weight = _evaluate(self.model, self.params, batch)
            total, count = total + float(sums["loss"]), count + int(weight)
        return total / count

    def generate(
        self,
        prompt: str | None = None,
        max_new_tokens: int = 500,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1337,
        unknown: Unknown = "error",
        special_tokens: bool = True,
    ) -> Iterator[str]:
        """Continue a prompt: pieces of new text as they are drawn; never splits a character.

        It ends with the end-of-text token, where the tokenizer has one; for more control, such as
        other ends, log-probabilities, or many prompts at once, see `request` and `stream`.

        Args:
            prompt: text to continue; None: begin one, see `first_tokens` in text/stream.py.
            max_new_tokens: to draw at most.
            temperature, top_k, top_p: see `Sampling`.
            seed: the same seed, prompt and settings give the same text.
            unknown: what to do with characters of the prompt that the tokenizer lacks.
            special_tokens: see `logits`.

        Raises:
            UserError: a prompt that cannot be encoded, or has no tokens; a setting out of range.
        """
        request = self.request(
            prompt,
            max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            unknown=unknown,
            special_tokens=special_tokens,
        )
        for pieces in self.stream([request]):
            yield pieces[0].text

    @pinned()
    def request(
        self,
        prompt: str | np.ndarray | None = None,
        max_new_tokens: int = 500,
        *,
        sampling: Sampling | None = None,
        seed: int = 1337,
        sample: int = 0,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        alternatives: int = 0,
        unknown: Unknown = "error",
        special_tokens: bool = True,
    ) -> Request:
        """A checked request for `stream`, `complete` or an `engine`.

        Args:
            prompt: text to continue, or its (N,) ids; None: begin a text, see `generate`.
            sampling: None: at temperature 0.8.
            stop_tokens: None: the end-of-text token, where the tokenizer has one, and those that
                a pretrained model's files name.
            unknown, special_tokens: see `generate`.
            max_new_tokens, seed, sample, stop, alternatives: see `Request`.

        Raises:
            UserError: a prompt that cannot be encoded, or has no tokens; a setting out of range.
        """
        if stop_tokens is None:
            stop_tokens = chat.stop_tokens(self)
        request = Request(
            self._prompt(prompt, special_tokens, unknown),
            max_new_tokens,
            replace(sampling or Sampling(0.8), vocab_size=self.tokenizer.vocab_size),
            seed,
            sample,
            tuple(stop),
            tuple(stop_tokens),
            alternatives,
        )
        check(request)
        return request

    def stream(self, requests: Sequence[Request], slots: int = SLOTS) -> Iterator[dict[int, Piece]]:
        """Serve requests in one batch: at each step the new pieces, by the index of the request.

        Args:
            requests: as made by `request`.
            slots: how many to serve at once, at most.

        Raises:
            UserError: more at once than memory holds.
        """

        def pieces() -> Iterator[dict[int, Piece]]:
            if not requests:
                return
            # An engine whose streams have all ended serves the next call of its size; one that
            # is left in the middle does not come back.
            size, params, kept = min(slots, len(requests)), self.params, self._kept
            self._kept = None
            fits = kept is not None and kept[0] == size and kept[1] is params
            engine = kept[2] if kept is not None and fits else self.engine(size)
            yield from engine.stream(requests)
            self._kept = size, params, engine

        return pinned_pieces(pieces())

    def complete(self, requests: Sequence[Request], slots: int = SLOTS) -> list[Completion]:
        """The whole replies to requests, in their order; see `stream`."""
        pieces: list[list[Piece]] = [[] for _ in requests]
        for new in self.stream(requests, slots):
            for i, piece in new.items():
                pieces[i].append(piece)
        return [Completion.of(parts) for parts in pieces]

    @pinned()
    def engine(self, slots: int) -> Engine:
        """A batch that requests come to and leave. It computes under the caller's own settings of
        JAX; `stream` uses those of the run (`parallel/switches.py`).

        Args:
            slots: how many are served at once; rounded up to a multiple of the data axis.

        Raises:
            UserError: more at once than memory holds.
        """
        rows = self._mesh.shape["data"]
        slots = -(-slots // rows) * rows
        room.check_sampling(self.model, slots, self.tokenizer.vocab_size)
        model = sharding.on_mesh(self.model, self._mesh)
        return Engine(model, self.params, self.tokenizer, slots)

    def _prompt(
        self, prompt: str | np.ndarray | None, special: bool, unknown: Unknown
    ) -> np.ndarray:
        """The (N,) ids to continue, N >= 1."""
        if isinstance(prompt, np.ndarray):
            return prompt.astype(np.int32)
        tokenizer = self.tokenizer if special else special_tokens.without(self.tokenizer)
        if prompt is None:
            return chat.first_tokens(self) if special else first_tokens(tokenizer)
        if not len(ids := tokenizer.encode(prompt, unknown)):
            raise UserError(
                f"the prompt {prompt!r} has no tokens: to this run's tokenizer it is blank, or its "
                f"characters are all skipped; give another one, or none"
            )
        return special_tokens.around(tokenizer, ids)

    def _encode(self, text: str, special: bool) -> np.ndarray:
        ids = self.tokenizer.encode(text)
        return special_tokens.around(self.tokenizer, ids) if special else ids

    def __repr__(self) -> str:
        return f"LoadedRun({str(self.directory)!r}, step={self.step})"


@jax.jit(static_argnames="model")
def _logits(model: nn.Module, params: Any, ids: jax.Array) -> jax.Array:
    return model.apply({"params": params}, ids)[0]


@jax.jit(static_argnames="model")
def _evaluate(model: nn.Module, params: Any, batch: Batch) -> Any:
    return evaluate_batch(model, params, batch)
