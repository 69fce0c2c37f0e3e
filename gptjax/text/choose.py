"""Choose a tokenizer for a text: load one by name, train BPE, or pick by size and alphabet."""

import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path

from gptjax.config import DataConfig
from gptjax.errors import UserError, optional_import
from gptjax.runs import files
from gptjax.text import special_tokens
from gptjax.text import tokenizers as tokenizer_module
from gptjax.text.subwords import END_OF_TEXT, HFTokenizer
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

# Rules of thumb. With more distinct characters than this, most are too rare to learn an embedding
# for; BPE trained on a shorter text than this overfits to its phrases.
MAX_CHARS = 512  # vocabulary size of a char-level tokenizer
# In other scripts, such as Chinese, there are more characters, and each takes several bytes: a
# byte-level model would have to spell them, and its samples break off inside of them.
WIDE = 1.2  # bytes for each character on average, from which on a text is of such a script
MAX_WIDE_CHARS = 2**14  # vocabulary size of a char-level tokenizer for it
MIN_BPE_TEXT = 10_000_000  # characters
BPE_SAMPLE = 50_000_000  # characters; BPE is trained on a sample, spread evenly, of a longer text


def choose(
    config: DataConfig,
    alphabet: str,
    n_characters: int,
    n_bytes: int,
    n_documents: int,
    texts: Callable[[], Iterable[str]],
) -> tuple[Tokenizer, str]:
    """Make the tokenizer that the config asks for, or that suits the text.

    Args:
        config: its `tokenizer` is auto, char, byte or bpe.
        alphabet: the distinct characters of the text, sorted.
        n_characters: length of the text.
        n_bytes: its length in UTF-8.
        n_documents: if more than one, the tokenizer gets an end-of-text token.
        texts: pieces of the training split, to train BPE on.

    Returns:
        The tokenizer, and a phrase for the console: its kind, its vocabulary size and the reason.

    Raises:
        UserError: a library is missing.
    """
    kind, why = config.tokenizer, "as configured"
    if kind == "auto":
        kind, why = _auto(len(alphabet), n_characters, n_bytes)
    separate = n_documents > 1
    if kind == "char":
        tokenizer = CharTokenizer(alphabet, len(alphabet) if separate else None)
        return tokenizer, f"char-level, vocab {tokenizer.vocab_size:,} ({why})"
    if kind == "byte":
        tokenizer = ByteTokenizer(256 if separate else None)
        return tokenizer, f"byte-level, vocab {tokenizer.vocab_size:,} ({why})"
    every = -(-n_characters // BPE_SAMPLE)
    tokenizer = train_bpe(islice(texts(), 0, None, every), config.bpe_vocab_size)
    share = "" if every == 1 else f"1/{every} of "
    return tokenizer, (
        f"BPE, vocab {tokenizer.vocab_size:,}, trained on {share}the training split ({why})"
    )


def cached(path: Path, choose: Callable[[], tuple[Tokenizer, str]]) -> tuple[Tokenizer, str]:
    """Load the result of an earlier `choose` from a folder, or call it and cache the result."""
    try:
        values = files.read_sealed(path / "chosen.json")
        return tokenizer_module.from_json(values["tokenizer"]), values["why"]
    except (OSError, ValueError, KeyError):
        pass  # not cached yet, or damaged
    tokenizer, why = choose()
    try:
        path.mkdir(parents=True, exist_ok=True)
        values = {"tokenizer": tokenizer.to_json(), "why": why}
        files.write_sealed(path / "chosen.json", values)
    except (OSError, UserError):
        pass  # not cached: the next run chooses again
    return tokenizer, why


def _auto(n_distinct: int, n_characters: int, n_bytes: int) -> tuple[str, str]:
    """The kind of tokenizer for a text of that many (distinct) characters, and the reason."""
    long, has_bpe = n_characters >= MIN_BPE_TEXT, find_spec("tokenizers") is not None
    if long and has_bpe:
        return "bpe", f"auto: at least {MIN_BPE_TEXT:,} characters of text"
    hint = "; install the extra text to train BPE on a text this long" if long else ""
    if n_distinct <= MAX_CHARS:
        return "char", f"auto: at most {MAX_CHARS} distinct characters{hint}"
    distinct = f"auto: {n_distinct:,} distinct characters"
    if n_bytes < WIDE * n_characters:
        return "byte", f"{distinct}, more than {MAX_CHARS}{hint}"
    wide = f"{distinct} of {n_bytes / n_characters:.1f} bytes on average"
    if n_distinct <= MAX_WIDE_CHARS:
        return "char", f"{wide}{hint}"
    if has_bpe:
        return "bpe", wide
    return "byte", f"{wide}; install the extra text to train BPE"


def named(name: str) -> Tokenizer:
    """Load a tokenizer that needs no training text: byte, gpt2, or one from a file.

    Args:
        name: byte; gpt2; or the path of a tokenizer.json (Hugging Face's or a run's), of a
            SentencePiece model, or of a folder that contains one of them.

    Raises:
        UserError: no such tokenizer, or an unusable file.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return gpt2()
    path = Path(name)
    if os.path.isdir(name):  # unlike Path's, false for any name that cannot be one
        inside = [path / "tokenizer.json", path / "tokenizer.model"]
        path = next((file for file in inside if file.exists()), inside[0])
    try:
        raw = files.read_bytes(path)
    except OSError as error:
        raise UserError(
            f"no tokenizer {name!r}: give auto, char, byte, bpe, gpt2, or the path of a "
            f"tokenizer.json or of a SentencePiece model ({error.strerror})"
        ) from None
    try:
        if path.suffix == ".model":
            return special_tokens.sentencepiece(raw, path.parent)
        text = raw.decode("utf-8")
        if '"type"' in text[:20]:  # the format of a run's tokenizer.json
            return tokenizer_module.from_json(text)
        return special_tokens.hf(text)
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not a tokenizer.json; name a SentencePiece model *.model"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Train byte-level BPE with GPT-2's pre-tokenizer; it encodes any text losslessly.

    Args:
        texts: pieces of text, cut between a letter and a space.
        vocab_size: the 256 bytes, the merges and the end-of-text token. The result is smaller if
            the texts have too few token pairs that occur at least twice.

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
    """GPT-2's tokenizer, converted from tiktoken's merge ranks.

    Raises:
        UserError: tiktoken is missing, or cannot download the ranks.
    """
    public = optional_import("tiktoken_ext.openai_public")
    try:
        encoding = public.r50k_base()
    except Exception as error:  # from requests, OSError, or a hash mismatch
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"GPT-2's tokenizer could not be downloaded ({reason}); without a network, put its "
            f"file into a folder and set TIKTOKEN_CACHE_DIR to it"
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
    """A BPE tokenizer of the tokenizers library with GPT-2's pre-tokenizer."""
    tokenizers = optional_import("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def byte_letters() -> list[str]:
    """The printable character that represents each byte in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    places = dict(zip([*printable, *others], [*printable, *range(0x100, 0x200)], strict=False))
    return [chr(places[byte]) for byte in range(256)]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge gave a token: apply the earlier merges until two parts remain."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
