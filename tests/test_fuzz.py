"""Mutated files and odd command lines: accepted, or refused in one line; nothing else."""

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import UserError
from gptjax.runs import folders
from gptjax.text.tokenizers import CharTokenizer

EXAMPLES = 150  # of each; `python tests/fuzz.py` tries many more

# JSON's own pieces, numbers that do not fit, and names that are known, go in anywhere.
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
    """The seed with pieces cut out and others put there."""
    for place, cut, piece in changes:
        at = int(place * len(seed))
        seed = seed[:at] + piece + seed[at + cut :]
    return seed


@pytest.mark.parametrize("target", fuzz.TARGETS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_mutated_files(target, data):
    seed = data.draw(st.sampled_from(fuzz.SEEDS[target]))
    fuzz.try_one(target, mutated(seed, data.draw(edits)))


@pytest.mark.parametrize("target", fuzz.TARGETS)
@given(raw=st.binary(max_size=200))
@settings(max_examples=EXAMPLES)
def test_any_bytes(target, raw):
    fuzz.try_one(target, raw)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_the_seeds_themselves_are_read(target):
    """Else the mutations would all be refused at the door."""
    if target != "checksums":
        fuzz.TARGETS[target](fuzz.SEEDS[target][0])


ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(vocabulary=ANY_TEXT, prompt=ANY_TEXT, unknown=st.sampled_from(["error", "replace", "skip"]))
def test_any_prompt_becomes_ids_or_a_line(vocabulary, prompt, unknown):
    tokenizer = CharTokenizer.fit(vocabulary + "a")
    try:
        ids = tokenizer.encode(prompt, unknown)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
    else:
        assert ((0 <= ids) & (ids < tokenizer.vocab_size)).all()


@given(name=ANY_TEXT)
def test_any_name_of_a_run_is_a_folder_or_a_line(name):
    for look in (folders.find, lambda name: folders.new_directory(name, "small")):
        try:
            look(name)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
