"""Which tokenizer: named, trained on the text, or chosen by its size and alphabet."""

import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path

from gptjax.config import DataConfig
from gptjax.errors import UserError, optional_import
from gptjax.runs.files import write_atomically
from gptjax.text import tokenizers as tokenizer_module
from gptjax.text.subwords import END_OF_TEXT, HFTokenizer, SentencePieceTokenizer
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

# Rules of thumb: an id for each of very many characters leaves most of them too rare to learn, and
# BPE learned on less text than this keeps pieces of that text.
MANY_KINDS = 512
LONG = 10_000_000  # characters
LEARN_FROM = 50_000_000  # characters; of a longer text BPE learns from pieces all over it


def choose(
    config: DataConfig,
    alphabet: str,
    characters: int,
    documents: int,
    texts: Callable[[], Iterable[str]],
) -> tuple[Tokenizer, str]:
    """The tokenizer that the config names, or that suits the text.

    Args:
        config: what is asked for: auto, char, byte or bpe.
        alphabet: the text's characters, sorted.
        characters: its length.
        documents: how many; of more than one, each is ended by a token where there can be one.
        texts: pieces of its training part, to learn BPE from.

    Returns:
        The tokenizer, and why it.

    Raises:
        UserError: a library is missing.
    """
    kind, why = config.tokenizer, "as asked"
    if kind == "auto":
        kind, why = _suits(len(alphabet), characters)
    many = documents > 1
    if kind == "char":
        end = len(alphabet) if many else None
        return CharTokenizer(alphabet, end), f"characters, {len(alphabet)} kinds: {why}"
    if kind == "byte":
        return ByteTokenizer(256 if many else None), f"bytes of UTF-8: {why}"
    every = -(-characters // LEARN_FROM)
    tokenizer = train_bpe(islice(texts(), 0, None, every), config.bpe_vocab_size)
    share = "" if every == 1 else f"1/{every} of "
    return tokenizer, (
        f"BPE, {tokenizer.vocab_size:,} tokens, learnt from {share}the training part: {why}"
    )


def kept(path: Path, choose: Callable[[], tuple[Tokenizer, str]]) -> tuple[Tokenizer, str]:
    """What was chosen before, or is chosen now and kept in that folder."""
    try:
        values = json.loads((path / "chosen.json").read_text(encoding="utf-8"))
        return tokenizer_module.from_json(values["tokenizer"]), values["why"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not yet, or damaged
    tokenizer, why = choose()
    try:
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"tokenizer": tokenizer.to_json(), "why": why})
        write_atomically(path / "chosen.json", text)
    except (OSError, UserError):
        pass  # it will be chosen anew
    return tokenizer, why


def _suits(kinds: int, characters: int) -> tuple[str, str]:
    """Which tokenizer, and why."""
    long = characters >= LONG
    if long and find_spec("tokenizers"):
        return "bpe", f"{characters:,} characters are enough to learn it (from {LONG:,} on)"
    hint = "; for BPE, which suits so long a text, install the extra text" if long else ""
    if kinds <= MANY_KINDS:
        return "char", f"few (up to {MANY_KINDS}), {characters:,} characters in all{hint}"
    return "byte", f"{kinds:,} kinds of characters are many (over {MANY_KINDS}){hint}"


def named(name: str) -> Tokenizer:
    """A tokenizer that needs no text: byte, gpt2, or the one in a file.

    Args:
        name: gpt2; or the path of a Hugging Face tokenizer.json, of a run's, of a SentencePiece
            model, or of a folder with one of them.

    Raises:
        UserError: no such tokenizer, or a file that holds none.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return gpt2()
    path = Path(name)
    if path.is_dir():
        inside = [path / "tokenizer.json", path / "tokenizer.model"]
        path = next((file for file in inside if file.exists()), inside[0])
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"no tokenizer {name!r}: give auto, char, byte, bpe, gpt2, or the path of a "
            f"tokenizer.json or of a SentencePiece model ({error.strerror})"
        ) from None
    try:
        if path.suffix == ".model":
            return SentencePieceTokenizer(raw)
        text = raw.decode("utf-8")
        if '"type"' in text[:20]:  # as a run keeps it
            return tokenizer_module.from_json(text)
        return HFTokenizer(text)
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is no tokenizer.json; a SentencePiece model ends in .model"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Byte-level BPE with GPT-2's rules, trained on texts; takes any text, exactly.

    Args:
        texts: pieces that are cut between a letter and a space.
        vocab_size: of the 256 bytes, the merges, and the end of text; a text with too few pairs
            of tokens that come twice gives fewer.

    Source: Sennrich et al. 2016; on bytes: Radford et al. 2019 (GPT-2).
    """
    library = _byte_level({}, [])
    trainer = optional_import("tokenizers").trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=optional_import("tokenizers").pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return HFTokenizer(library.to_str())


def gpt2() -> HFTokenizer:
    """GPT-2's tokenizer, made from the ranks that tiktoken keeps.

    Raises:
        UserError: tiktoken is missing, or cannot fetch them.
    """
    public = optional_import("tiktoken_ext.openai_public")
    try:
        encoding = public.r50k_base()
    except Exception as error:  # requests', OSError, or a hash that does not match
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"GPT-2's tokenizer could not be fetched ({reason}); where there is no network, put "
            f"its file into a folder that TIKTOKEN_CACHE_DIR names"
        ) from None
    ranks: dict[bytes, int] = encoding["mergeable_ranks"]
    letters = byte_letters()
    spell = lambda token: "".join(letters[byte] for byte in token)
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _last_merge(token, ranks)
            merges.append((spell(left), spell(right)))
    library = _byte_level(vocabulary, merges)
    library.add_special_tokens([END_OF_TEXT])
    return HFTokenizer(library.to_str())


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]]):
    """An HF tokenizer that cuts text as GPT-2 does."""
    tokenizers = optional_import("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    places = dict(zip([*printable, *others], [*printable, *range(0x100, 0x200)], strict=False))
    return [chr(places[byte]) for byte in range(256)]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token is made of: merge as BPE would, until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
