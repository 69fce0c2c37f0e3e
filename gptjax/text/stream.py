"""Text as it is generated: where it begins, and decoding it token by token."""

import numpy as np

from gptjax.text import special_tokens
from gptjax.text.tokenizers import INCOMPLETE, Tokenizer


def first_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The ids that a text without a prompt begins after, at least one.

    The tokens that the tokenizer puts before a text; without any a newline, as in the lecture;
    where it has none the end-of-text token, or else id 0.

    Returns:
        (N,) int32.
    """
    if len(before := special_tokens.of(tokenizer)[0]):
        return before
    newline = tokenizer.encode("\n", unknown="skip")
    if len(newline):
        return newline
    return np.array([tokenizer.end_of_text or 0], np.int32)


class StreamDecoder:
    """Decodes generated tokens as they arrive; never splits a character.

    A token may hold only some bytes of a character. Those are held back until the tokens that
    complete the character arrive, so the pieces, joined, are the text of all the tokens.

    Args:
        tokenizer: decodes the ids.
        prompt: (N,) ids before the stream. Some tokenizers need the last one to decode the next
            (whether it starts with a space); its text is not returned again.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray):
        self._tokenizer = tokenizer
        self._start_window(prompt[-1:].tolist())

    def _start_window(self, context: list[int]) -> None:
        """Decode from `context` on, ids whose text has been returned, instead of from the start
        of the stream: the cost of a token does not grow with the length of the text."""
        self._ids, self._n_context = context, len(context)
        self._n_returned = len(self._tokenizer.decode(context))  # characters

    def add(self, ids: np.ndarray) -> str:
        """The text that (N,) more ids complete; may be empty."""
        pieces = []
        for token in ids.tolist():
            self._ids.append(token)
            text = self._tokenizer.decode(self._ids)
            # At most three of a character's four bytes can be waiting for the last one.
            complete = max(len(text.rstrip(INCOMPLETE)), len(text) - 3)
            pieces.append(text[self._n_returned : complete])
            self._n_returned = max(self._n_returned, complete)
            if complete == len(text):
                self._start_window(self._ids[self._n_context :])
        return "".join(pieces)

    def end(self) -> str:
        """The text of incomplete bytes at the end of the stream: U+FFFD for each."""
        return self._tokenizer.decode(self._ids)[self._n_returned :]
