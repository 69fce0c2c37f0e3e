"""The tokens of documents as streams.

A stream is what one token after the other is predicted in: a document by itself, or all documents
one after the other, with the end-of-text token between them, as training reads them.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from gptjax.errors import UserError
from gptjax.score.windows import Chunk
from gptjax.text import special_tokens, token_cache
from gptjax.text.sources import Piece
from gptjax.text.split import TRAIN, Part
from gptjax.text.tokenizers import Tokenizer, Unknown, UnknownCharacters


def streams(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    packed: bool,
    unknown: Unknown = "error",
    notice: Callable[[str], None] = lambda line: None,
) -> Iterator[Chunk]:
    """Encode documents, a bounded part of the text at a time if the tokenizer is cuttable.

    Args:
        pieces: of the documents.
        tokenizer: the tokens that it puts around a text go around each document.
        packed: all documents are one stream, with the end-of-text token, if there is one, before
            each but the first; else each is a stream of its own.
        unknown: what to do with characters that the tokenizer lacks.
        notice: called with one line when the first of them is replaced or skipped.

    Raises:
        UserError: a character that the tokenizer lacks; no text.
    """
    before, after = special_tokens.of(tokenizer)
    between, end = np.zeros(0, np.int32), tokenizer.end_of_text
    if packed and end is not None and end not in after[-1:]:
        between = np.array([end], np.int32)
    parts = (Part(TRAIN, piece.text, piece.last) for piece in pieces)
    at, documents, noticed = 0, 0, False
    for unit in token_cache.units(parts, tokenizer.cuttable):
        n_bytes = len(unit.text.encode("utf-8", "surrogatepass"))
        try:
            ids = tokenizer.encode(unit.text)
        except UserError as error:
            found, advice = str(error), ""
            if isinstance(error, UnknownCharacters):
                found, advice = error.found, "; remove them, or add --unknown replace or skip"
            found = f"after {at:,} characters: {found}" if at else found
            if unknown == "error":
                raise UserError(found + advice) from None
            if not noticed:
                notice(f"{found}; --unknown {unknown}: these and all later ones")
            ids, noticed = tokenizer.encode(unit.text, unknown), True
            if unknown == "skip":
                n_bytes = tokenizer.count_bytes(ids)
        start = [between, before] if documents else [before]
        whole = [*start * unit.first, ids, *[after] * unit.last]
        yield Chunk(np.concatenate(whole), n_bytes, unit.last and not packed)
        at, documents = at + len(unit.text), documents + unit.last
    if not documents:
        raise UserError("the text to score is empty; give one with some characters")
    if packed:
        yield Chunk(between[:0], 0, True)
