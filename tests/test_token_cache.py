"""Tests of splits, of encoding in chunks, and of the token cache."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.config import DataConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.runs.files import read_sealed
from gptjax.text import choose, sources, split, token_cache
from gptjax.text import dataset as data
from gptjax.text.dataset import Dataset
from gptjax.text.sources import Piece
from gptjax.text.split import LEFT_OUT, TRAIN, VAL, Part, Split
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

BLOCK = 8  # block_size


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Point the user's cache directory into tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gptjax" / "tokens"


@pytest.fixture(scope="module")
def bpe(play: str) -> Tokenizer:
    pytest.importorskip("tokenizers", reason="needs the extra text")
    return choose.train_bpe([play], 300)


def config_of(text: Any, **options: Any) -> DataConfig:
    return DataConfig(text=str(text), **options)


def opened(config: DataConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    return data.open_dataset(config, BLOCK, tokenizer)


def message(config: DataConfig, tokenizer: Tokenizer | None = None) -> str:
    with pytest.raises(UserError) as caught:
        opened(config, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pieces(documents: list[str], size: int) -> Iterator[Piece]:
    for document in documents:
        for at in range(0, len(document), size):
            yield Piece(document[at : at + size], at + size >= len(document))


# Splits


def test_survey():
    found = split.survey(pieces(["ab\u00e9", "b", "ab\u00e9"], 2), (0, 1, 4, 5))
    assert (found.characters, found.n_bytes, found.alphabet) == (7, 9, "ab\u00e9")
    assert found.lengths.tolist() == [3, 1, 3]
    assert found.names[0] == found.names[2] != found.names[1]
    assert found.marks == (0, 1, 3, 4)  # "\u00e9" has two bytes


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("bounds", [(7, 10), (0, 10), (10, 10), (4, 7)])
def test_parts_by_position(bounds: tuple[int, int], size: int):
    text = "0123456789"
    parts = list(split.parts(pieces([text], size), Split(None, bounds, "")))
    for side, whole in ((TRAIN, text[: bounds[0]]), (VAL, text[bounds[0] : bounds[1]])):
        mine = [part for part in parts if part.side == side]
        assert "".join(part.text for part in mine) == whole
        assert [part.last for part in mine] == [False] * (len(mine) - 1) + [True] * bool(mine)
    assert all(part.side != LEFT_OUT for part in parts)


def sides(documents: list[str], how: Split, size: int = 5) -> dict[int, list[str]]:
    """The texts on each side of a split, each up to its mark `last`."""
    found: dict[int, list[str]] = {TRAIN: [""], VAL: [""]}
    for part in split.parts(pieces(documents, size), how):
        found[part.side][-1] += part.text
        if part.last:
            found[part.side].append("")
    assert found[TRAIN].pop() == found[VAL].pop() == "", "a side that does not end with a mark"
    return found


@pytest.mark.parametrize(("fraction", "limit"), [(0.1, None), (0.5, None), (0.5, 3000)])
def test_whole_documents_are_held_out(fraction: float, limit: int | None):
    documents = [f"document {i} of them " * (1 + i % 7) for i in [*range(50), *range(50)]]
    found = split.survey(pieces(documents, 1000))
    how = split.split(found, fraction, limit)
    assert how.cuts is not None
    on = sides(documents, how)
    train, val = set(on[TRAIN]), set(on[VAL])
    assert train | val == set(documents)
    assert not train & val, "the same document on both sides"
    held = sum(map(len, on[VAL]))
    target = min(fraction * found.characters, limit or 10**9)
    assert 0.9 * target <= held <= target
    n = int((how.cuts == 0).sum())
    share = f"{held / found.characters:.2%} of the text"
    assert how.description == f"by document (validation: {n} of 100 documents, {share})"
    # The order of the documents does not matter.
    other = split.split(split.survey(pieces(documents[::-1], 1000)), fraction, limit)
    assert other.cuts is not None and (other.cuts[::-1] == how.cuts).all()


def numbers(n: int, start: int = 0) -> str:
    """n characters that differ everywhere."""
    return "".join(f"{i} " for i in range(start, start + n))[:n]


@pytest.mark.parametrize("limit", [None, 700])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5])
@pytest.mark.parametrize(
    "documents",
    [
        [numbers(20_000), numbers(200, 5)],  # a book and its README: was 1 % for any fraction
        [numbers(15_000), numbers(26_000, 9)],  # two books: was 36 %
        [numbers(9000, 10_000 * i) for i in range(3)],
        [numbers(20_000, 4)] * 2,  # copies: refused before
        [numbers(20_000), *[numbers(3000, 30_000)] * 9],  # more in the copies
        [numbers(9000), *[numbers(20_000, 30_000)] * 2],
    ],
)
def test_few_documents_are_cut(documents: list[str], fraction: float, limit: int | None):
    """What is held out is near the wanted share, and what is cut is cut in all copies alike."""
    found = split.survey(pieces(documents, 10**6))
    how = split.split(found, fraction, limit)
    on = sides(documents, how, 1000)
    held = sum(map(len, on[VAL]))
    target = min(fraction * found.characters, limit or 10**9)
    assert 0.9 * target <= held <= target + len(documents)
    assert f", {held / found.characters:.2%} of the text)" in how.description
    assert sum(map(len, on[TRAIN])) + held == found.characters
    for text in {*on[VAL]} - {*documents}:
        assert any(document.endswith(text) for document in documents)
        assert any(document == start + text for document in documents for start in on[TRAIN])
        assert not any(text in other for other in on[TRAIN]), "the same text on both sides"
    assert how.cuts is not None
    single = [n for n, document in enumerate(documents) if documents.count(document) == 1]
    if any(how.cuts[n] for n in single):  # copies are not cut then
        assert all(
            how.cuts[n] in (0, len(documents[n])) for n in {*range(len(documents))} - {*single}
        )
    other = split.split(split.survey(pieces(documents[::-1], 10**6)), fraction, limit)
    assert other.cuts is not None
    assert (other.cuts[::-1] == how.cuts).all()


def test_a_book_and_its_readme(tmp_path):
    (tmp_path / "book.txt").write_text(numbers(10_000))
    (tmp_path / "README.md").write_text(numbers(90, 7))
    dataset = opened(config_of(tmp_path))
    assert dataset.notes["split"] == (
        "by document (validation: 1 of 2 documents, 919 characters at the end of 1 more, 10.00% "
        "of the text)"
    )
    # The end-of-text token is where the training part ends, and after each document.
    end = dataset.tokenizer.end_of_text
    assert np.flatnonzero(dataset.train == end).tolist() == [10_000 - 919]
    assert np.flatnonzero(dataset.val == end).tolist() == [90, 90 + 1 + 919]
    with pytest.raises(UserError, match="changed while it was read"):
        how = split.split(split.survey(pieces(["ab", "cd"], 9)), 0.5, None)
        list(split.parts(pieces(["ab", "cd", "ef"], 9), how))


def test_a_text_that_changes_while_it_is_read(tmp_path, monkeypatch, cache, play: str):
    """Nothing is made of it, and nothing is cached."""
    monkeypatch.setattr(data, "LARGE", 1000)
    path = tmp_path / "play.txt"
    path.write_text(play)
    found = os.stat(path)
    decoded = sources._decoded

    def changing(*args: Any) -> Iterator[str]:
        yield from decoded(*args)
        path.write_text(play.swapcase())
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

    monkeypatch.setattr(sources, "_decoded", changing)
    assert message(config_of(path, tokenizer="byte")) == (
        f"{path} changed while it was read; start again"
    )
    assert not list(cache.glob("*/tokens.json"))
    monkeypatch.undo()
    assert opened(config_of(path, tokenizer="byte")).tokenizer.decode(opened(config_of(path)).val)


# Encoding


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("size", [1, 13, 1000, 10**6])
def test_encoding_in_pieces_gives_the_same_ids(
    monkeypatch, play: str, bpe: Tokenizer, kind: str, size: int
):
    """The ids equal those of the whole text encoded at once."""
    monkeypatch.setattr(token_cache, "UNIT", 50)
    monkeypatch.setattr(token_cache, "PER_CORE", 120)
    text = play[:2000] + "\u00e9\U0001f600\n\n  \n" + play[:500]
    tokenizer = {"char": CharTokenizer.fit(text), "byte": ByteTokenizer(), "bpe": bpe}[kind]
    how = Split(None, (1900, len(text)), "")
    encode = lambda skip: list(
        token_cache.encode(split.parts(pieces([text], size), how), tokenizer, False, skip)
    )
    batches = encode(0)
    assert len(batches) > 2
    tokens = token_cache.in_memory(batches, tokenizer, "")
    assert tokens.train.dtype == np.uint16
    assert tokens.train.tolist() == tokenizer.encode(text[:1900]).tolist()
    assert tokens.val.tolist() == tokenizer.encode(text[1900:]).tolist()
    assert tokens.n_bytes == (len(text[:1900].encode()), len(text[1900:].encode()))
    # Continuing after any batch gives the same remaining batches.
    done = sum(batch.characters for batch in batches[:2])
    for again, before in zip(encode(done), batches[2:], strict=True):
        assert again.ids[0].tolist() == before.ids[0].tolist()


def test_a_text_without_a_place_to_cut(monkeypatch, bpe: Tokenizer):
    monkeypatch.setattr(token_cache, "UNIT", 10)
    monkeypatch.setattr(token_cache, "LONGEST", 40)
    text = "0123456789" * 50 + " and then words"
    units = list(token_cache.units([Part(TRAIN, text, True)], True))
    assert max(len(unit.text) for unit in units) <= 80
    assert "".join(unit.text for unit in units) == text
    [batch] = token_cache.encode([Part(TRAIN, text, True)], bpe, False)
    assert bpe.decode(batch.ids[0]) == text


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_documents_end_with_the_end_of_text_token(bpe: Tokenizer, kind: str, tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"{i} the king \u00e9" * 5)
    options = {"bpe": {"bpe_vocab_size": 300}}.get(kind, {})
    dataset = opened(config_of(tmp_path, tokenizer=kind, **options))
    end = dataset.tokenizer.end_of_text
    assert end is not None
    assert (dataset.train == end).sum() + (dataset.val == end).sum() == 20
    assert dataset.train[-1] == dataset.val[-1] == end
    text = dataset.tokenizer.decode(np.concatenate([dataset.train, dataset.val]))
    documents = text.split("<|endoftext|>")
    assert sorted(documents) == sorted(["", *(f"{i} the king \u00e9" * 5 for i in range(20))])
    assert dataset.notes["split"].startswith("by document ")


# Files


def test_the_tokens_of_a_long_text_are_cached(tmp_path, monkeypatch, cache, play: str):
    path = tmp_path / "play.txt"
    path.write_text(play)
    config = config_of(path, tokenizer="byte")
    small = opened(config)
    assert not cache.exists() and not isinstance(small.train, np.memmap)
    monkeypatch.setattr(data, "LARGE", 1000)
    first = opened(config)
    assert isinstance(first.train, np.memmap)
    for name in ("train", "val"):
        assert getattr(first, name).tolist() == getattr(small, name).tolist()
    assert first.val_bytes == small.val_bytes
    assert first.notes["split"] == small.notes["split"]

    with monkeypatch.context() as patch:  # the text is not read again
        patch.setattr("gptjax.text.sources.read", None)
        again = opened(config)
        assert again.train.tolist() == small.train.tolist()
        assert again.notes == first.notes and again.val_bytes == small.val_bytes
        # A resumed run passes its own tokenizer.
        assert opened(config, first.tokenizer).train.tolist() == small.train.tolist()

    # Any other option or file version is another cache entry.
    other = opened(replace(config, val_fraction=0.2))
    assert len(other.val) > len(small.val)
    os.utime(path, ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr("gptjax.text.sources.read", None)
        with pytest.raises(TypeError):
            opened(config)


def test_corrupt_tokens_are_encoded_again(tmp_path, monkeypatch, cache, play: str):
    monkeypatch.setattr(data, "LARGE", 1000)
    path = tmp_path / "play.txt"
    path.write_text(play)
    config = config_of(path, tokenizer="byte")
    expected = opened(config).train.tolist()
    [cached] = cache.glob("*/train.bin")
    for damage in (b"\0" * 100, b""):
        raw = bytearray(cached.read_bytes())
        raw[200:300] = damage
        cached.write_bytes(raw)
        assert opened(config).train.tolist() == expected
    (cached.parent / "tokens.json").write_text("{")
    assert opened(config).train.tolist() == expected


def test_bpe_is_trained_once_for_a_long_text(tmp_path, monkeypatch, play: str):
    pytest.importorskip("tokenizers", reason="needs the extra text")
    monkeypatch.setattr(data, "LARGE", 1000)
    path = tmp_path / "play.txt"
    path.write_text(play)
    config = config_of(path, tokenizer="bpe", bpe_vocab_size=300)
    first = opened(config)
    monkeypatch.setattr(choose, "train_bpe", None)
    again = opened(config)
    assert again.tokenizer == first.tokenizer and again.notes == first.notes
    assert again.train.tolist() == first.train.tolist()


class Killed(BaseException):
    """Simulates a signal that ends the process."""


class Interruptible:
    """Encodes a play in small batches, into `folder`; `started` says where each attempt began."""

    def __init__(self, folder: Path, play: str, monkeypatch: pytest.MonkeyPatch):
        for name, value in (("UNIT", 50), ("PER_CORE", 600), ("SAVE_EVERY", 0.0)):
            monkeypatch.setattr(token_cache, name, value)
        monkeypatch.setattr(os, "cpu_count", lambda: 1)
        self.folder, self.play, self.started = folder, play, []

    def encode(self, skip: int) -> Iterator[token_cache.Batch]:
        self.started.append(skip)
        how = Split(None, (5000, len(self.play)), "split")
        parts = split.parts(pieces([self.play], 700), how)
        return token_cache.encode(parts, ByteTokenizer(), False, skip)

    def run(self, batches: int = 10**9) -> token_cache.Tokens:
        """All tokens; killed after that many batches."""
        calls = []

        def done(characters: int) -> None:
            calls.append(characters)
            if len(calls) == batches:
                raise Killed

        return token_cache.load_or_encode(self.folder, self.encode, ByteTokenizer(), "split", done)


def test_an_interrupted_encoding_is_continued(tmp_path, monkeypatch, play: str):
    folder = tmp_path / "tokens"
    encoding = Interruptible(folder, play, monkeypatch)
    for n in (1, 3, 2):
        with pytest.raises(Killed):
            encoding.run(n)
        with (folder / "train.bin").open("ab") as file:
            file.write(b"\1\2\3")  # written, but not yet counted in progress.json
    tokens, started = encoding.run(), encoding.started
    assert started[0] == started[1] == 0 < started[2] < started[3]
    assert tokens.train.tolist() == list(play[:5000].encode())
    assert tokens.val.tolist() == list(play[5000:].encode())
    assert tokens.n_bytes == (5000, len(play) - 5000) and tokens.description == "split"
    assert sorted(p.name for p in folder.iterdir()) == [
        *(".lock", "tokenizer.json", "tokens.json", "train.bin", "val.bin"),
    ]


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "train.bin").unlink(),
        lambda folder: (folder / "val.bin").unlink(),
        rewritten("train.bin", lambda raw: raw[:-100]),
        rewritten("train.bin", lambda raw: bytes(len(raw))),
        rewritten("val.bin", lambda raw: raw[:10] + b"!" + raw[11:]),
        rewritten("progress.json", lambda raw: b""),
        rewritten("progress.json", lambda raw: raw[:-20]),
        rewritten("progress.json", lambda raw: b"[]"),
        rewritten("progress.json", lambda raw: b"[" * 100_000),
        rewritten("progress.json", lambda raw: b"\xff"),
        rewritten("progress.json", lambda raw: raw.replace(b'"characters": 5', b'"characters": 4')),
        rewritten("progress.json", lambda raw: b'{"characters": 600, "tokens": [600, 0]}'),
        lambda folder: (folder / "progress.json").unlink(),
    ],
)
def test_an_interrupted_encoding_is_not_believed(
    tmp_path, monkeypatch, play: str, damage: Callable[[Path], Any]
):
    """Where the files are not what progress.json says, all is encoded again: nothing is missing,
    nothing is zero."""
    folder = tmp_path / "tokens"
    encoding = Interruptible(folder, play, monkeypatch)
    with pytest.raises(Killed):
        encoding.run(9)
    before = read_sealed(folder / "progress.json")
    assert 5000 < before["characters"] < 6000 and all(before["tokens"])
    damage(folder)
    tokens = encoding.run()
    assert encoding.started == [0, 0]
    assert tokens.train.tolist() == list(play[:5000].encode())
    assert tokens.val.tolist() == list(play[5000:].encode())


def test_a_disk_that_does_not_keep_tokens(tmp_path, monkeypatch, play: str):
    """Files that are replaced while they are written are noticed, and not sealed as they are."""
    folder = tmp_path / "tokens"
    encoding = Interruptible(folder, play, monkeypatch)
    encode = encoding.encode

    def replacing(skip: int) -> Iterator[token_cache.Batch]:
        for batch in encode(skip):
            yield batch
            (folder / "train.bin").unlink()
            (folder / "train.bin").write_bytes(b"\0" * 9000)

    encoding.encode = replacing
    with pytest.raises(UserError, match="do not read back as they were written; check that disk"):
        encoding.run()
    assert token_cache.load(folder) is None


def test_an_unwritable_cache(tmp_path, monkeypatch, cache, play: str):
    monkeypatch.setattr(data, "LARGE", 1000)
    (tmp_path / "cache").touch()
    path = tmp_path / "play.txt"
    path.write_text(play)
    error = message(config_of(path, tokenizer="byte"))
    assert error.startswith(f"cannot cache tokens in {cache}{os.sep}")
    assert ": Not a directory; " in error and "XDG_CACHE_HOME" in error


# Token files in nanoGPT's layout


def test_token_files(tmp_path, play: str):
    ids = np.frombuffer(play.encode(), np.uint8).astype("<u2")
    (tmp_path / "train.bin").write_bytes(ids[:5000].tobytes())
    (tmp_path / "val.bin").write_bytes(ids[5000:].tobytes())
    dataset = opened(config_of(tmp_path, tokenizer="byte"))
    assert dataset.train.tolist() == ids[:5000].tolist()
    assert dataset.val.tolist() == ids[5000:].tolist()
    assert dataset.val_bytes == len(ids) - 5000 - 1
    one = opened(config_of(tmp_path / "train.bin", tokenizer="byte", val_limit=400))
    assert (len(one.train), len(one.val)) == (4600, 400)
    assert "by position" in one.notes["split"] and "last 400 tokens" in one.notes["split"]
    # A tokenizer.json next to them is used, as in a run's folder.
    (tmp_path / "tokenizer.json").write_text(CharTokenizer("".join(map(chr, range(128)))).to_json())
    assert opened(config_of(tmp_path)).tokenizer.decode(dataset.train) == play[:5000]


def test_token_files_of_a_large_vocabulary(tmp_path):
    path = tmp_path / "own.bin"
    ids = np.arange(70_000, dtype="<u4")
    path.write_bytes(ids.tobytes())
    tokenizer = CharTokenizer("".join(map(chr, range(0xE000, 0xE000 + 70_000))))
    dataset = opened(config_of(path), tokenizer)
    assert np.concatenate([dataset.train, dataset.val]).tolist() == ids.tolist()


def test_bad_token_files(tmp_path):
    path = tmp_path / "own.bin"
    path.write_bytes(b"\0" * 401)
    error = message(config_of(path, tokenizer="byte"))
    assert error.startswith(f"{path} has 401 bytes, not a multiple of the 2-byte ids")
    ids = np.zeros(200, "<u2")
    ids[[150, 160]] = 256, 50256
    path.write_bytes(ids.tobytes())
    error = message(config_of(path, tokenizer="byte"))
    assert error.startswith(f"{path} has the id 50256 at position 160")
    assert "256 tokens" in error and "--data.tokenizer" in error
    letters = np.frombuffer(b"a text of some length " * 20, np.uint8)
    for dtype in ("<u4", "<i8"):
        path.write_bytes(letters.astype(dtype).tobytes())
        error = message(config_of(path, tokenizer="byte"))
        assert error.startswith(
            f"in {path} every second id is 0, as where ids are wider than the 2 "
        )
        assert error.endswith("write it with array.astype('uint16').tofile")
    with path.open("wb") as file:
        np.save(file, letters.astype("<u2"))
    error = message(config_of(path, tokenizer="byte"))
    assert error == f"{path} is numpy's .npy; write its ids with array.tofile instead"
    path.write_bytes(ids.tobytes())
    for kind in ("auto", "char", "bpe"):
        error = message(config_of(path, tokenizer=kind))
        assert error.startswith(f"{path} contains token ids, so --data.tokenizer {kind} ")
    path.write_bytes(b"")
    assert message(config_of(path, tokenizer="byte")).startswith("the training split has 0 tokens")
    missing = tmp_path / "absent.bin"
    assert message(config_of(missing, tokenizer="byte")) == (
        f"cannot read the token file {missing}: No such file or directory"
    )


# Which tokenizer


def test_tiny_shakespeare_is_char_level():
    """The presets' losses depend on it."""
    alphabet = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    tokenizer, why = choose.choose(DataConfig(), alphabet, 1_115_394, 1_115_394, 1, lambda: [])
    assert tokenizer == CharTokenizer(alphabet)
    assert why == "char-level, vocab 65 (auto: at most 512 distinct characters)"


def test_auto_depends_on_length_and_alphabet(monkeypatch, play: str):
    pytest.importorskip("tokenizers", reason="needs the extra text")
    auto = lambda alphabet, n, documents=1, width=1.0: choose.choose(
        DataConfig(bpe_vocab_size=300),
        "".join(map(chr, range(alphabet))),
        n,
        int(width * n),
        documents,
        lambda: [play],
    )
    tokenizer, why = auto(513, 10_000)
    assert tokenizer == ByteTokenizer()
    assert why.startswith("byte-level, vocab 256 (auto: 513 distinct characters")
    assert auto(512, 10_000, 2)[0] == CharTokenizer("".join(map(chr, range(512))), 512)
    assert auto(513, 10_000, 2)[0] == ByteTokenizer(256)
    tokenizer, why = auto(65, 10_000_000)
    assert tokenizer == choose.train_bpe([play], 300)
    assert why.startswith("BPE, vocab 300, trained on the training split (auto: ")
    assert "trained on 1/3 of the training split" in auto(65, 100_000_001)[1]
    # Chinese has more characters, of several bytes each.
    tokenizer, why = auto(3000, 50_000, width=2.8)
    assert tokenizer.vocab_size == 3000 and isinstance(tokenizer, CharTokenizer)
    assert (
        why == "char-level, vocab 3,000 (auto: 3,000 distinct characters of 2.8 bytes on average)"
    )
    assert auto(3000, 50_000, width=1.1)[0] == ByteTokenizer()
    assert auto(2**14 + 1, 50_000, width=3)[1].startswith("BPE, vocab 300, ")
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert "install the extra text" in auto(2**14 + 1, 50_000, width=3)[1]
    why = auto(65, 10_000_000)[1]
    assert why.startswith("char-level, vocab 65 (auto: ") and "install the extra text" in why


def test_a_chinese_text_has_whole_characters(tmp_path):
    """Bytes would show U+FFFD wherever a sample breaks off inside a character."""
    path = tmp_path / "own.txt"
    text = "".join(chr(0x4E00 + i * 7919 % 1500) + "\n" * (i % 20 == 0) for i in range(6000))
    path.write_text(text, encoding="utf-8")
    dataset = opened(config_of(path))
    assert dataset.tokenizer == CharTokenizer.fit(text)
    assert dataset.tokenizer.vocab_size == 1501 and dataset.train.dtype == np.uint16


def test_odd_characters_are_told(tmp_path):
    said: list[str] = []

    class Listening(data.Silent):
        def say(self, text: str) -> None:
            said.append(text)

    path = tmp_path / "own.txt"
    for odd in ("", "\0", "\x01\x02\0", "\ufffd"):
        path.write_text("a line of text\r\n\t\x1b\x0c" * 50 + odd, encoding="utf-8")
        data.open_dataset(config_of(path), BLOCK, None, Listening())
    learns = "the model learns them: remove what is not meant"
    assert said == [
        f"{path} has control characters (U+0000); {learns}",
        f"{path} has control characters (U+0000, U+0001, U+0002); {learns}",
        f"{path} has U+FFFD, which stands for what an earlier program could not decode; if it is "
        f"not meant, decode the original again",
    ]


def test_a_tokenizer_from_a_path(tmp_path, bpe: Tokenizer, play: str):
    text = tmp_path / "play.txt"
    text.write_text(play)
    own, foreign, folder = tmp_path / "own.json", tmp_path / "hf.json", tmp_path / "model"
    own.write_text(bpe.to_json())
    foreign.write_text(json.dumps(json.loads(bpe.to_json())["tokenizer"]))
    folder.mkdir()
    (folder / "tokenizer.json").write_text(foreign.read_text())
    for path in (own, foreign, folder):
        dataset = opened(config_of(text, tokenizer=str(path)))
        assert dataset.tokenizer == bpe
        assert dataset.notes["tokenizer"].startswith(f"{path} (as configured); ")
    n = int(0.9 * len(play))  # the split is by character for every tokenizer
    assert dataset.train.tolist() == bpe.encode(play[:n]).tolist()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "absent.json",
            None,
            "no tokenizer '{path}': ",
        ),
        (
            "own.json",
            b'{"type": "char", "vocabulary": []}',
            "{path}: the vocabulary must be a list",
        ),
        (
            "own.json",
            b"\xff",
            "{path} is not a tokenizer.json; ",
        ),
    ],
)
def test_unusable_tokenizer_files(tmp_path, name: str, content: bytes | None, reason: str):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        choose.named(str(path))
    assert str(error.value).startswith(reason.format(path=path))
    assert content is not None or "No such file or directory" in str(error.value)


# Bits per byte


def test_bits_per_byte(tmp_path, bpe: Tokenizer, play: str):
    """A uniform prediction costs log2(V) bits per token, whatever the tokenizer."""
    path = tmp_path / "play.txt"
    path.write_text(play.replace("k", "\u00e9"))
    n_train = int(0.9 * len(play))
    val = path.read_text()[n_train:]
    for tokenizer in (CharTokenizer.fit(path.read_text()), ByteTokenizer(), bpe):
        dataset = opened(config_of(path), tokenizer)
        ids = tokenizer.encode(val)
        first = len(tokenizer.decode(ids[:1]).encode())
        loss = np.log(tokenizer.vocab_size)
        bits = (len(ids) - 1) * np.log2(tokenizer.vocab_size) / (len(val.encode()) - first)
        assert dataset.bits_per_byte(loss) == pytest.approx(bits, rel=1e-12)
    loss = 1.0
    dataset = opened(config_of(path), ByteTokenizer())
    assert dataset.bits_per_byte(loss) == pytest.approx(1 / np.log(2), rel=1e-12)


# Mixtures


@pytest.mark.parametrize(
    "text",
    [
        *("a.txt=1,a.txt=2", "a.txt=0,b.txt=2", "a.txt=-1,b.txt=2", "a.txt=-0.0"),
        *(
            "a.txt=inf,b.txt=2",
            "a.txt=1,b.txt=Infinity",
            "a.txt=nan,b.txt=2",
            "a.txt=1e400,b.txt=2",
        ),
        *(f"a.txt=1{'0' * 400},b.txt=2", "a.txt=1e308,b.txt=1e308", "a.txt=1e-300,b.txt=1"),
    ],
)
def test_refused_mixtures(text: str):
    assert message(config_of(text)).startswith(f"--data.text {text}: name each text once, with a ")


def test_a_mixture_needs_shuffled_order():
    expected = "2 weighted texts need shuffled order, not random; add --data.order shuffled"
    assert message(config_of("a.txt=.5,b.txt=2e3")) == expected
    assert message(config_of("a.txt=x,b.txt=2")).startswith("text not found: a.txt=x,b.txt=2; ")


def test_a_mixture_has_one_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("ab" * 100)
    Path("b.txt").write_text("xy" * 50)
    dataset = opened(config_of("a.txt=3,b.txt=1", order="shuffled"))
    assert dataset.tokenizer == CharTokenizer("abxy")
    assert [(len(tokens), weight) for tokens, weight in dataset.parts] == [(180, 3.0), (90, 1.0)]
    assert dataset.tokenizer.decode(dataset.val) == "ab" * 10 + "xy" * 5
    assert dataset.n_train == len(dataset.train) == 270


# Encodings and other options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"encoding": "nothing"},
            "data.encoding='nothing'",
        ),
        (
            {"bpe_vocab_size": 256},
            "data.bpe_vocab_size=256 is too small; give 257 or more",
        ),
        (
            {"bpe_vocab_size": 10**9},
            "data.bpe_vocab_size=1000000000 is too large; give 1048576 or ",
        ),
        ({"encoding": "undefined"}, "data.encoding='undefined' is not a text encoding that"),
        ({"encoding": "a\0"}, "data.encoding='a\\x00' is not a text encoding that"),
        ({"val_limit": 0}, "data.val_limit=0 is too small; give 1 or more"),
        ({"resident_tokens": -1}, "data.resident_tokens=-1 is out of range; give 0 or more"),
    ],
)
def test_refused_options(options: dict[str, Any], reason: str):
    with pytest.raises(UserError) as error:
        DataConfig(**options)
    assert str(error.value).startswith(reason)


def test_options_reach_the_reader(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"body": f"na\u00efve {i} " * 9} for i in range(20)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(lines.encode("latin-1"))
    dataset = opened(config_of(path, encoding="latin-1", field="body", val_limit=150))
    assert "\u00ef" in dataset.tokenizer.decode(dataset.train)
    assert 0 < dataset.val_bytes < 200


def test_a_text_with_characters_that_a_given_tokenizer_lacks(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("ab" * 100 + "X")
    error = message(config_of(path), CharTokenizer("ab"))
    assert error.startswith("1 unknown characters ('X' at 200)")


def test_progress_lines_without_a_terminal(tmp_path, monkeypatch, play: str):
    from rich.console import Console

    monkeypatch.setattr("gptjax.console.PLAIN_EVERY", 0.0)
    path = tmp_path / "play.txt"
    path.write_text(play)
    with (tmp_path / "console").open("w+") as file:
        report = Report(Console(file=file, width=200))
        with report.work("reading", 100) as done:
            time.sleep(0.01)
            done(50)
        file.seek(0)
        assert file.read().startswith("reading: 50%, under 1 s left")
