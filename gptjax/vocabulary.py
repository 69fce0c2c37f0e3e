"""Which tokenizer: named, trained on the text, or chosen by its size and alphabet."""

from collections.abc import Iterable
from itertools import pairwise

from gptjax.errors import UserError
from gptjax.subwords import END_OF_TEXT, HFTokenizer, extra


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Byte-level BPE with GPT-2's rules, trained on texts; takes any text, exactly.

    Args:
        texts: pieces that are cut between a letter and a space.
        vocab_size: of the 256 bytes, the merges, and the end of text; a text with too few pairs
            of tokens that come twice gives fewer.

    Source: Sennrich et al. 2016; on bytes: Radford et al. 2019 (GPT-2).
    """
    library = _byte_level({}, [])
    trainer = extra("tokenizers").trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=extra("tokenizers").pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return HFTokenizer(library.to_str())


def gpt2() -> HFTokenizer:
    """GPT-2's tokenizer, made from the ranks that tiktoken keeps.

    Raises:
        UserError: tiktoken is missing, or cannot fetch them.
    """
    public = extra("tiktoken_ext.openai_public")
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
    tokenizers = extra("tokenizers")
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
