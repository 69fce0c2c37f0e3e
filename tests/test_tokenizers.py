"""Tests of the char- and byte-level tokenizers: the lecture's figures, round trips, errors."""

import json
import re
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import UserError
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer, from_json

# With surrogates, unlike st.text()'s default: terminals and file names can contain them.
ANY_TEXT = st.text(st.characters(exclude_categories=()))
OTHER_TYPE = 'expected {"type": ...} with char, byte, hf or sentencepiece'
LECTURE_VOCABULARY = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase


@pytest.mark.shared
def test_lecture_figures(shakespeare: str):
    tokenizer = CharTokenizer.fit(shakespeare)
    assert len(shakespeare) == 1_115_394
    assert tokenizer.vocabulary == LECTURE_VOCABULARY
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("hii").tolist() == [46, 47, 47]
    assert tokenizer.decode([46, 47, 47]) == "hii"
    first = "18 47 56 57 58 1 15 47 58 47 64 43 52 10 0 14 43 44 53 56"
    assert tokenizer.encode(shakespeare[:20]).tolist() == [int(i) for i in first.split()]
    assert tokenizer.decode(tokenizer.encode(shakespeare)) == shakespeare


def test_vocabulary_is_the_sorted_set_of_characters(play: str):
    assert CharTokenizer.fit(play).vocabulary == "".join(sorted(set(play)))


@given(ANY_TEXT)
def test_round_trip_of_any_text(text: str):
    tokenizer = CharTokenizer.fit(text + "a")  # "a": a vocabulary is never empty
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.shape == (len(text),)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert ids.tolist() == [tokenizer.vocabulary.index(character) for character in text]


@pytest.mark.parametrize(
    "text",
    [
        *("", "\r\n", "\r", "a\r\nb\rc\nd", "\0", "\0\0a\0", "\ufeff", "e\u0301\u00e9"),
        *("\U0001f600", "\U0010ffff", "\ud800", "\ud83d\ude00", "\u2028\u2029\x85\x1c"),
    ],
)
def test_round_trip_is_exact(text: str):
    tokenizer = CharTokenizer.fit(text + "a")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ANY_TEXT)
def test_json_round_trip(text: str):
    tokenizer = CharTokenizer.fit(text + "a")
    assert from_json(tokenizer.to_json()) == tokenizer


@pytest.mark.parametrize("vocabulary", ["\0\r\n"[::-1], "\ud800\udc00", "\udbff\udfff\U0001f600"])
def test_json_round_trip_of_surrogates(vocabulary: str):
    """JSON reads an escaped high surrogate followed by a low one as a single character."""
    tokenizer = CharTokenizer.fit(vocabulary)
    assert from_json(tokenizer.to_json()) == tokenizer


def test_json_is_one_ascii_line():
    text = CharTokenizer.fit("b\u00e9a\n").to_json()
    assert text.endswith("\n") and text.count("\n") == 1 and text.isascii()
    assert json.loads(text) == {"type": "char", "vocabulary": ["\n", "a", "b", "\u00e9"]}


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("abd", "1 unknown characters ('d' at 2)"),
        ("xabcyx", "3 unknown characters ('x' at 0, 'y' at 4)"),
        (
            "\U0001f600\n\0",
            r"3 unknown characters ('" + "\U0001f600" + r"' at 0, '\n' at 1, '\x00' at 2)",
        ),
        (
            "a0123456789",
            "10 unknown characters ('0' at 1, '1' at 2, '2' at 3, '3' at 4, '4' at 5, '5' at 6, "
            "'6' at 7, '7' at 8, '8' at 9, '9' at 10)",
        ),
        (
            "a0123456789XXYb",
            "13 unknown characters ('0' at 1, '1' at 2, '2' at 3, '3' at 4, '4' at 5, '5' at 6, "
            "'6' at 7, '7' at 8, '8' at 9, '9' at 10, ...)",
        ),
    ],
)
def test_unknown_characters_are_listed_with_their_first_positions(text: str, unknown: str):
    with pytest.raises(UserError) as error:
        CharTokenizer("abc").encode(text)
    assert str(error.value).startswith(f"{unknown}, ")
    assert "vocabulary of 3;" in str(error.value)
    assert str(error.value).endswith("replace or skip")


@pytest.mark.parametrize(
    ("vocabulary", "replaced"),
    [
        ("\n ?abc\ufffd", "a\ufffdb\ufffd"),
        ("\n ?abc", "a?b?"),
        ("\n abc", "a b "),
        ("\nabc", "a\nb\n"),
    ],
)
def test_replace_uses_the_first_replacement_in_the_vocabulary(vocabulary: str, replaced: str):
    tokenizer = CharTokenizer(vocabulary)
    assert tokenizer.decode(tokenizer.encode("aXb\U0001f600", "replace")) == replaced


def test_replace_without_a_replacement():
    tokenizer = CharTokenizer("abc")
    assert tokenizer.decode(tokenizer.encode("cab", "replace")) == "cab"  # nothing to replace
    with pytest.raises(UserError) as error:
        tokenizer.encode("abX", "replace")
    assert str(error.value).startswith("cannot replace unknown characters: ")


@given(ANY_TEXT, ANY_TEXT)
def test_skip_drops_only_unknown_characters(text: str, other: str):
    tokenizer = CharTokenizer.fit(other + "a")
    kept = "".join(character for character in text if character in tokenizer.vocabulary)
    assert tokenizer.decode(tokenizer.encode(text, "skip")) == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("{", "not JSON: Expecting property name enclosed in double quotes: "),
        ("[" * 100_000, "not JSON: "),
        ("[1]", OTHER_TYPE),
        ("{}", OTHER_TYPE),
        (
            '{"type": "bpe", "vocabulary": "ab"}',
            OTHER_TYPE,
        ),
        ('{"type": "char"}', "the vocabulary must be a list of at least one character"),
        (
            '{"type": "char", "vocabulary": []}',
            "the vocabulary must be a list of at least one character",
        ),
        (
            '{"type": "char", "vocabulary": ["a", "bc"]}',
            "each entry of the vocabulary must be a string of one character",
        ),
        (
            '{"type": "char", "vocabulary": ["b", "a"]}',
            "the vocabulary must be sorted, without repeats",
        ),
        (
            '{"type": "char", "vocabulary": ["a", "a", "b"]}',
            "the vocabulary must be sorted, without repeats",
        ),
        (
            '{"type": "char", "vocabulary": ["a"], "end_of_text": 0}',
            "end_of_text must be 1, the id after all others, not 0",
        ),
        (
            '{"type": "byte", "end_of_text": "256"}',
            "end_of_text must be 256, the id after all others, not '256'",
        ),
        ('{"type": "sentencepiece"}', "the SentencePiece model must be in base64"),
        ('{"type": "sentencepiece", "model": "?"}', "the SentencePiece model must be in base64"),
    ],
)
def test_refused_json(text: str, message: str):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        from_json(text)


SCALARS = st.text(st.characters(exclude_categories=("Cs",)))


@given(SCALARS)
def test_byte_ids_are_utf8(text: str):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(ids)


def test_invalid_utf8_and_lone_surrogates():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xE2, 0x82, 0x41, 0xFF]) == "\ufffdA\ufffd"
    with pytest.raises(UserError) as error:
        tokenizer.encode("ab\ud800")
    assert str(error.value).startswith("character 2 is '\\ud800', a lone surrogate")
    assert tokenizer.decode(tokenizer.encode("ab\ud800c", "replace")) == "ab\ufffdc"
    assert tokenizer.decode(tokenizer.encode("ab\ud800c", "skip")) == "abc"


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer("\nabcé", 5), ByteTokenizer(256)], ids=["char", "byte"]
)
def test_end_of_text_token(tokenizer: CharTokenizer | ByteTokenizer):
    end = tokenizer.end_of_text
    assert end == tokenizer.vocab_size - 1
    ids = [*tokenizer.encode("ab"), end, end, *tokenizer.encode("é"), end]
    assert tokenizer.decode(ids) == "ab<|endoftext|><|endoftext|>é<|endoftext|>"
    assert tokenizer.count_bytes(np.array(ids)) == 4
    assert from_json(tokenizer.to_json()) == tokenizer
    assert end not in tokenizer.encode("<|endoftext|>", "skip")
