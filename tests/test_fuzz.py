"""Fuzz tests: mutated files and names are accepted, or refused in one line."""

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import UserError
from gptjax.runs import folders
from gptjax.text.tokenizers import CharTokenizer

EXAMPLES = 150  # per test; `python tests/fuzz.py` tries many more

# JSON fragments, out-of-range numbers and known keys, inserted anywhere.
PIECES = [
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\n", b"\0", b"\xff", b"\xed\xa0\x80"),
    *(b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 400, b"2147483648", b"[" * 2000, b"{}"),
    *(b'"step"', b'"val_loss"', b'"format"', b'"type"', b'"\\ud800"', b'"\\u0000"', b'"x"'),
]
edits = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(0, 12),
        st.one_of(st.sampled_from(PIECES), st.binary(max_size=6)),
    ),
    min_size=1,
    max_size=4,
)


def mutated(seed: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """The seed with parts replaced by other bytes."""
    for place, cut, piece in changes:
        at = int(place * len(seed))
        seed = seed[:at] + piece + seed[at + cut :]
    return seed


@pytest.mark.parametrize("target", fuzz.TARGETS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_mutated_files_are_read_or_refused(target, data):
    seed = data.draw(st.sampled_from(fuzz.SEEDS[target]))
    fuzz.try_one(target, mutated(seed, data.draw(edits)))


@pytest.mark.parametrize("target", fuzz.TARGETS)
@given(raw=st.binary(max_size=200))
@settings(max_examples=EXAMPLES)
def test_any_bytes_are_read_or_refused(target, raw):
    fuzz.try_one(target, raw)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_the_unmutated_seeds_are_accepted(target):
    """Otherwise every mutation would be refused for the same reason."""
    if target != "checksums":
        fuzz.TARGETS[target](fuzz.SEEDS[target][0])


ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(vocabulary=ANY_TEXT, prompt=ANY_TEXT, unknown=st.sampled_from(["error", "replace", "skip"]))
def test_any_prompt_is_encoded_or_refused(vocabulary, prompt, unknown):
    tokenizer = CharTokenizer.fit(vocabulary + "a")
    try:
        ids = tokenizer.encode(prompt, unknown)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
    else:
        assert ((0 <= ids) & (ids < tokenizer.vocab_size)).all()


@given(name=ANY_TEXT)
def test_any_run_name_is_accepted_or_refused(name):
    for look in (folders.find, lambda name: folders.new_directory(name, "small")):
        try:
            look(name)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
