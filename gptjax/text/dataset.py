"""From texts to tokens: read, split, choose a tokenizer, encode."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from gptjax.config import DataConfig
from gptjax.errors import UserError
from gptjax.text import choose, corpora, sniff, sources, special_tokens, split, token_cache
from gptjax.text.token_cache import Tokens
from gptjax.text.tokenizers import Tokenizer, UnknownCharacters

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?inf(?:inity)?|nan"  # as `float` reads it
LEAST_SHARE = 1e-9  # of a text in a mixture; less is never read
LARGE = 2**24  # bytes of text; from this size on, its tokens are cached on disk

SAMPLED, PIECES = 2**24, 2**8  # tokens of a split that its fingerprint hashes, in how many pieces


class Dataset(NamedTuple):
    """The tokens of one or more texts.

    Attributes:
        tokenizer: made the tokens.
        parts: for each text, its training split, (N,) uint16 or (for a vocabulary over 65,536)
            uint32, and its sampling weight.
        val: the validation split of all texts, (N,).
        val_bytes: UTF-8 bytes of its text without the first token, which nothing predicts.
        notes: phrases for the console, by name: tokenizer, split.
    """

    tokenizer: Tokenizer
    parts: tuple[tuple[np.ndarray, float], ...]
    val: np.ndarray
    val_bytes: int
    notes: dict[str, str]

    @property
    def train(self) -> np.ndarray:
        """The training split of all texts, (N,)."""
        return _concatenate([tokens for tokens, _ in self.parts])

    @property
    def n_train(self) -> int:
        return sum(len(tokens) for tokens, _ in self.parts)

    def bits_per_byte(self, loss: float) -> float:
        """Convert a loss over the whole validation split, in nats per token, to bits per byte of
        text, which is comparable across tokenizers."""
        return loss * (len(self.val) - 1) / max(1, self.val_bytes) / math.log(2)


class Progress(Protocol):
    """Where reading and encoding report; `console.Report` is one."""

    def say(self, text: str) -> None:
        """Show one line."""
        ...

    def work(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context whose value is called with how much of `total` is done so far."""
        ...


class Silent:
    """A `Progress` that shows nothing."""

    def say(self, text: str) -> None:
        pass

    def work(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda done: None)


SILENT = Silent()


def open_dataset(
    config: DataConfig,
    block_size: int,
    tokenizer: Tokenizer | None = None,
    progress: Progress = SILENT,
    special: bool = True,
) -> Dataset:
    """Read the configured texts, split them and encode them.

    Args:
        config: which texts, tokenizer and split.
        block_size: context length; each split must hold at least one window of block_size + 1.
        tokenizer: use this one, as a resumed run does; None: the one that `config` names.
        progress: shows what takes time.
        special: put the tokens around each document that the tokenizer itself puts around a text,
            such as a BOS; without them the dataset's tokenizer has none either.

    Raises:
        UserError: no such text or tokenizer, a character that the tokenizer lacks, or a split
            shorter than one window.
    """
    weights = _weights(config.text)
    if len(weights) > 1 and config.order == "random":
        raise UserError(
            f"{len(weights)} weighted texts need shuffled order, not {config.order}; add "
            f"--data.order shuffled"
        )
    side = None if config.val is None else split.TRAIN
    found = [_bins(name) or _Text(name, config, progress, side) for name in weights]
    why = "from the run"
    if tokenizer is None:
        tokenizer, why = _tokenizer(config, found)
    if not special:
        tokenizer = special_tokens.without(tokenizer)
    opened = [
        text.tokens(tokenizer) if isinstance(text, _Text) else _read(text, tokenizer, config, side)
        for text in found
    ]
    own = [] if config.val is None else [_validation(config.val, config, tokenizer, progress)]
    val = _concatenate([tokens.val for tokens in own or opened])
    window = block_size + 1
    splits_ = [("training", tokens.train) for tokens in opened] + [("validation", val)]
    for name, tokens in splits_:
        if len(tokens) < window:
            raise UserError(
                f"the {name} split has {len(tokens)} tokens, fewer than one window of "
                f"block_size + 1 = {window}; give a longer text, a smaller --model.block-size, "
                f"or another --data."
                + ("val" if own else f"val-fraction (now {config.val_fraction})")
            )
    read = [*opened, *own]
    count = sum(len(tokens.train) + len(tokens.val) for tokens in read)
    per_token = f"{sum(sum(tokens.n_bytes) for tokens in read) / count:.2f} bytes"
    characters = [tokens.characters for tokens in read if tokens.characters is not None]
    if len(characters) == len(read):
        per_token = f"{sum(characters) / count:.2f} characters, {per_token}"
    notes = {
        "tokenizer": f"{why}; {per_token} per token",
        "split": f"all of the text trains; {config.val} validates"
        if own
        else "; ".join(dict.fromkeys(tokens.description for tokens in opened)),
    }
    return Dataset(
        tokenizer,
        tuple((tokens.train, weights[name]) for name, tokens in zip(weights, opened, strict=True)),
        val,
        sum(tokens.n_bytes[1] for tokens in read) - tokenizer.count_bytes(val[:1]),
        notes,
    )


def named(config: DataConfig) -> str:
    """The texts, for a message."""
    return config.text + (f" with the validation text {config.val}" if config.val else "")


def _weights(text: str) -> dict[str, float]:
    """Parse "a.txt=0.7,b.txt=0.3" into weights by name; anything else names one text.

    Raises:
        UserError: a weight that is not above 0 and finite or is no share of the sum, or a text
            named twice.
    """
    pairs = [re.fullmatch(rf"(.+)=({NUMBER})", part, re.IGNORECASE) for part in text.split(",")]
    if not all(pairs) or os.path.exists(text):
        return {text: 1.0}
    weights = {pair[1]: float(pair[2]) for pair in pairs if pair}
    shares = [weight / sum(weights.values()) for weight in weights.values() if weight]
    if len(shares) < len(pairs) or not all(share >= LEAST_SHARE for share in shares):
        raise UserError(
            f"--data.text {text}: name each text once, with a weight above 0, of which each is at "
            f"least {LEAST_SHARE} of the sum"
        )
    return weights


def _bins(name: str) -> list[Path] | None:
    """The token files that a name refers to; None: it is not one or a folder of them."""
    path = Path(name)
    inside = [path / "train.bin", path / "val.bin"]
    if path.suffix == ".bin":
        return [path]
    return inside if all(os.path.isfile(file) for file in inside) else None


def _validation(name: str, config: DataConfig, tokenizer: Tokenizer, progress: Progress) -> Tokens:
    """The validation text of the user's own, whole.

    Raises:
        UserError: a folder of token files, of which one must be named; or a character that the
            tokenizer, which comes with the training text, lacks.
    """
    bins = _bins(name)
    if bins and len(bins) > 1:
        raise UserError(f"--data.val {name} has two token files; name the one to validate on")
    if bins:
        return _read(bins, tokenizer, config, split.VAL)
    try:
        return _Text(name, config, progress, split.VAL).tokens(tokenizer)
    except UnknownCharacters as error:
        raise UserError(
            f"--data.val {name}: {error.found}, which is that of the training text {config.text}; "
            f"remove them, or train with another tokenizer (--data.tokenizer byte has everything)"
        ) from None


def _read(
    paths: list[Path], tokenizer: Tokenizer, config: DataConfig, side: int | None = None
) -> Tokens:
    """Memory-map token files; a single one is split by position, unless it is all of one side."""
    ids = [token_cache.read_bin(path, tokenizer.vocab_size) for path in paths]
    description = "as given by the files"
    if side is not None:
        ids = [ids[0], ids[0][:0]] if side == split.TRAIN else [ids[0][:0], ids[0]]
        description = split.whole(side)
    elif len(ids) == 1:
        n_train = split.training_part(len(ids[0]), config.val_fraction, config.val_limit)
        ids = [ids[0][:n_train], ids[0][n_train:]]
        description = f"by position (validation: the last {len(ids[1]):,} tokens)"
    n_bytes = tokenizer.count_bytes(ids[0]), tokenizer.count_bytes(ids[1])
    return Tokens(ids[0], ids[1], n_bytes, None, description)


class _Text:
    """One of the configured texts, split or all of one side; reading it is lazy and happens as
    rarely as possible."""

    def __init__(self, name: str, config: DataConfig, progress: Progress, side: int | None = None):
        self.name, self._config, self._progress, self._side = name, config, progress, side
        self._sources = sources.find(name, progress.say)
        self.size = sum(source.size for source in self._sources)
        # What the split depends on. With the tokenizer, it identifies the tokens in the cache.
        how = (config.val_fraction, config.val_limit) if side is None else (split.whole(side),)
        options = (config.encoding, config.field, *how)
        self.key = [[source.stamp for source in self._sources], *options]

    def pieces(self) -> Iterator[sources.Piece]:
        yield from sources.read(self._sources, self._config.encoding, self._config.field)
        # Split, tokenizer and tokens come from several passes, and are cached under this key.
        now = sources.find(self.name, lambda line: None)
        if [source.stamp for source in now] != self.key[0]:
            raise UserError(f"{self.name} changed while it was read; start again")

    @cached_property
    def survey(self) -> split.Survey:
        marks = ()
        if self.name in corpora.names() and (usual := corpora.describe(self.name).split):
            marks = usual[0], usual[0] + usual[1]
        with self._progress.work(f"reading {self.name}", self.size) as done:
            found = split.survey(self.pieces(), marks, done)
        if not found.characters:
            raise UserError(f"text is empty: {self.name}")
        if self.name not in corpora.names():
            for remark in sniff.remarks(found.alphabet):
                self._progress.say(f"{self.name} {remark}")
        return found

    @cached_property
    def split(self) -> split.Split:
        if self._side is not None:
            return split.undivided(self.survey, self._side)
        return split.split(self.survey, self._config.val_fraction, self._config.val_limit)

    def training_units(self) -> Iterator[str]:
        """Pieces of the training split, cut where a tokenizer may be trained on each separately."""
        parts = split.parts(self.pieces(), self.split)
        return (unit.text for unit in token_cache.units(parts, True) if unit.side == split.TRAIN)

    def tokens(self, tokenizer: Tokenizer) -> Tokens:
        """Encode and split the text; a long one is encoded once, to files, and memory-mapped."""
        path = None
        if self.size >= LARGE:
            made_by = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
            path = token_cache.folder("tokens", self.key, made_by)
            if cached := token_cache.load(path):
                return cached

        def encode(skip: int) -> Iterator[token_cache.Batch]:
            parts = split.parts(self.pieces(), self.split)
            separate = len(self.survey.lengths) > 1 and tokenizer.end_of_text is not None
            return token_cache.encode(parts, tokenizer, separate, skip)

        with self._progress.work(f"encoding {self.name}", self.survey.characters) as done:
            if path is None:
                return token_cache.in_memory(encode(0), tokenizer, self.split.description)
            tokens = token_cache.load_or_encode(
                path, encode, tokenizer, self.split.description, done
            )
        self._progress.say(f"{self.name}: tokens cached in {path}")
        return tokens


def _tokenizer(config: DataConfig, found: list[_Text | list[Path]]) -> tuple[Tokenizer, str]:
    """The tokenizer of a new run on these texts, and a phrase about it for the console."""
    kind = config.tokenizer
    if bins := [text for text in found if isinstance(text, list)]:
        sibling = bins[0][0].parent / "tokenizer.json"
        if kind == "auto" and sibling.exists():
            return choose.named(str(sibling)), f"{sibling} (found next to the token file)"
        if kind in ("auto", "char", "bpe"):
            raise UserError(
                f"{bins[0][0]} contains token ids, so --data.tokenizer {kind} cannot be used; name "
                f"the tokenizer that made them (for example gpt2), or put its tokenizer.json there"
            )
    if bins or kind not in ("auto", "char", "byte", "bpe"):
        return choose.named(kind), f"{kind} (as configured)"
    known = [text for text in found if isinstance(text, _Text)]
    make = lambda: choose.choose(
        config,
        "".join(sorted(set().union(*(text.survey.alphabet for text in known)))),
        sum(text.survey.characters for text in known),
        sum(text.survey.n_bytes for text in known),
        max(len(text.survey.lengths) for text in known),
        lambda: (unit for text in known for unit in text.training_units()),
    )
    if sum(text.size for text in known) < LARGE:
        return make()
    key = [[text.key for text in known], config.tokenizer, config.bpe_vocab_size]
    return choose.cached(token_cache.folder("tokenizer", *key), make)


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def fingerprint(dataset: Dataset) -> str:
    """JSON that identifies the tokens, so that a run is not resumed on another text.

    Hashes the whole of a split of up to SAMPLED tokens; of a longer one, PIECES evenly spaced
    pieces of SAMPLED tokens in total.
    """
    found = []
    for tokens in (*(tokens for tokens, _ in dataset.parts), dataset.val):
        digest = hashlib.sha256(str(tokens.dtype).encode())
        pieces = min(PIECES, -(-len(tokens) // (SAMPLED // PIECES)))
        last = max(0, len(tokens) - SAMPLED // PIECES)
        for start in np.linspace(0, last, pieces).astype(int):
            digest.update(tokens[start : start + SAMPLED // PIECES].tobytes())
        found.append({"tokens": len(tokens), "sha256": digest.hexdigest()})
    return json.dumps(found)
