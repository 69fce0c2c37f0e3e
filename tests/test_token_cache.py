"""Tests of splits, of encoding piece by piece, and of the files that keep the ids."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.config import DataConfig
from gptjax.console import Report
from gptjax.errors import UserError
from gptjax.text import choose, split, token_cache
from gptjax.text import dataset as data
from gptjax.text.dataset import Dataset
from gptjax.text.sources import Piece
from gptjax.text.split import LEFT_OUT, TRAIN, VAL, Part, Split
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

BLOCK = 8  # block_size


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache folder, for a test."""
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


def test_a_survey():
    found = split.survey(pieces(["ab\u00e9", "b", "ab\u00e9"], 2), (0, 1, 4, 5))
    assert (found.characters, found.alphabet) == (7, "ab\u00e9")
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


@pytest.mark.parametrize(
    ("fraction", "limit"), [(0.1, None), (0.5, None), (0.5, 300), (0.001, None)]
)
def test_documents_are_held_out_whole(fraction: float, limit: int | None):
    documents = [f"document {i} of them " * (1 + i % 7) for i in [*range(50), *range(50)]]
    found = split.survey(pieces(documents, 1000))
    how = split.split(found, fraction, limit)
    assert how.sides is not None
    parts = list(split.parts(pieces(documents, 5), how))
    sides: dict[int, list[str]] = {TRAIN: [""], VAL: [""]}
    for part in parts:
        sides[part.side][-1] += part.text
        if part.last:
            sides[part.side].append("")
    train, val = (set(sides[side][:-1]) for side in (TRAIN, VAL))
    assert train | val == set(documents)
    assert not train & val, "the same document on both sides"
    held = sum(map(len, sides[VAL]))
    target = min(fraction * found.characters, limit or 10**9)
    longest = 2 * max(map(len, documents))  # twice the same
    assert 0 < held <= max(target, longest) and held > min(target - longest, target / 2)
    n = int((how.sides == VAL).sum())
    assert how.description == f"by document, {n} of 100 held out, each whole on one side"
    # Their order changes nothing.
    other = split.split(split.survey(pieces(documents[::-1], 1000)), fraction, limit)
    assert other.sides is not None and (other.sides[::-1] == how.sides).all()


def test_two_documents_and_none(tmp_path):
    how = split.split(split.survey(pieces(["aaaa", "b"], 9)), 0.1, None)
    assert how.sides is not None and how.sides.tolist() == [TRAIN, VAL]  # the smaller one
    (tmp_path / "a.txt").write_text("x" * 99)
    (tmp_path / "b.txt").write_text("x" * 99)
    assert message(config_of(tmp_path)) == (
        "all 2 documents begin alike, so none can be held out; give one text, or other documents"
    )


# Encoding


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("size", [1, 13, 1000, 10**6])
def test_pieces_change_no_id(monkeypatch, play: str, bpe: Tokenizer, kind: str, size: int):
    """The ids are those of the whole text, encoded at once."""
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
    # From any batch on, the rest is the same.
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
def test_documents_end(bpe: Tokenizer, kind: str, tmp_path):
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
    assert dataset.notes["split"].startswith("by document, ")


# Files


def test_a_long_text_is_kept_and_found_again(tmp_path, monkeypatch, cache, play: str):
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

    with monkeypatch.context() as patch:  # now nothing is read
        patch.setattr("gptjax.text.sources.read", None)
        again = opened(config)
        assert again.train.tolist() == small.train.tolist()
        assert again.notes == first.notes and again.val_bytes == small.val_bytes
        # A run that goes on brings its tokenizer along.
        assert opened(config, first.tokenizer).train.tolist() == small.train.tolist()

    # Anything else makes other tokens.
    other = opened(replace(config, val_fraction=0.2))
    assert len(other.val) > len(small.val)
    os.utime(path, ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr("gptjax.text.sources.read", None)
        with pytest.raises(TypeError):
            opened(config)


def test_damaged_tokens_are_made_again(tmp_path, monkeypatch, cache, play: str):
    monkeypatch.setattr(data, "LARGE", 1000)
    path = tmp_path / "play.txt"
    path.write_text(play)
    config = config_of(path, tokenizer="byte")
    expected = opened(config).train.tolist()
    [kept] = cache.glob("*/train.bin")
    for damage in (b"\0" * 100, b""):
        raw = bytearray(kept.read_bytes())
        raw[200:300] = damage
        kept.write_bytes(raw)
        assert opened(config).train.tolist() == expected
    (kept.parent / "tokens.json").write_text("{")
    assert opened(config).train.tolist() == expected


def test_bpe_of_a_long_text_is_learnt_once(tmp_path, monkeypatch, play: str):
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
    """Stands for a signal that ends the process."""


def test_what_a_killed_process_wrote_is_gone_on_from(tmp_path, monkeypatch, play: str):
    monkeypatch.setattr(token_cache, "UNIT", 50)
    monkeypatch.setattr(token_cache, "PER_CORE", 300)
    monkeypatch.setattr(token_cache, "SAVE_EVERY", 0.0)
    tokenizer, how = ByteTokenizer(), Split(None, (5000, len(play)), "split")
    started: list[int] = []

    def encode(skip: int) -> Iterator[token_cache.Batch]:
        started.append(skip)
        return token_cache.encode(split.parts(pieces([play], 700), how), tokenizer, False, skip)

    def stop_after(n: int):
        calls = []

        def done(characters: int) -> None:
            calls.append(characters)
            if len(calls) == n:
                raise Killed

        return done

    folder = tmp_path / "tokens"
    for n in (1, 3, 2):
        with pytest.raises(Killed):
            token_cache.keep(folder, encode, tokenizer, "split", stop_after(n))
        with (folder / "train.bin").open("ab") as file:
            file.write(b"\1\2\3")  # what was not yet counted
    tokens = token_cache.keep(folder, encode, tokenizer, "split", lambda n: None)
    assert started[0] == started[1] == 0 < started[2] < started[3]
    assert tokens.train.tolist() == list(play[:5000].encode())
    assert tokens.val.tolist() == list(play[5000:].encode())
    assert tokens.n_bytes == (5000, len(play) - 5000) and tokens.description == "split"
    assert sorted(p.name for p in folder.iterdir()) == [
        *(".lock", "tokenizer.json", "tokens.json", "train.bin", "val.bin"),
    ]


def test_a_folder_that_takes_no_tokens(tmp_path, monkeypatch, cache, play: str):
    monkeypatch.setattr(data, "LARGE", 1000)
    (tmp_path / "cache").touch()
    path = tmp_path / "play.txt"
    path.write_text(play)
    error = message(config_of(path, tokenizer="byte"))
    assert error.startswith(f"cannot keep tokens in {cache}{os.sep}")
    assert error.endswith(
        ": Not a directory; make room there, or set XDG_CACHE_HOME to another folder"
    )


# Token files of nanoGPT's layout


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
    assert one.notes["split"] == "by position, the last 400 tokens"
    # The tokenizer beside them is taken, as in a folder of ours.
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
    assert message(config_of(path, tokenizer="byte")) == (
        f"{path} has 401 bytes, which is no whole number of 2-byte ids; it was cut short, or is no "
        f"token file of this vocabulary"
    )
    ids = np.zeros(200, "<u2")
    ids[[150, 160]] = 256, 50256
    path.write_bytes(ids.tobytes())
    assert message(config_of(path, tokenizer="byte")) == (
        f"{path} has the id 50256 (at 160), and the tokenizer has 256 tokens; name the one that "
        f"made them with --data.tokenizer"
    )
    for kind in ("auto", "char", "bpe"):
        assert message(config_of(path, tokenizer=kind)) == (
            f"{path} holds ids and no text; name the tokenizer that made them, such as "
            f"--data.tokenizer gpt2, or put its tokenizer.json beside it"
        )
    path.write_bytes(b"")
    assert message(config_of(path, tokenizer="byte")).startswith("the training split has 0 tokens")
    missing = tmp_path / "absent.bin"
    assert message(config_of(missing, tokenizer="byte")) == (
        f"token file cannot be read: {missing}: No such file or directory"
    )


# Which tokenizer


def test_the_lectures_text_stays_in_characters():
    """However rules change: a preset's numbers hang on it."""
    alphabet = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    tokenizer, why = choose.choose(DataConfig(), alphabet, 1_115_394, 1, lambda: [])
    assert tokenizer == CharTokenizer(alphabet)
    assert why == "characters, 65 kinds: few (up to 512), 1,115,394 characters in all"


def test_what_suits(monkeypatch, play: str):
    pytest.importorskip("tokenizers", reason="needs the extra text")
    auto = lambda kinds, n, documents=1: choose.choose(
        DataConfig(bpe_vocab_size=300),
        "".join(map(chr, range(kinds))),
        n,
        documents,
        lambda: [play],
    )
    tokenizer, why = auto(513, 10_000)
    assert tokenizer == ByteTokenizer()
    assert why == "bytes of UTF-8: 513 kinds of characters are many (over 512)"
    assert auto(512, 10_000, 2)[0] == CharTokenizer("".join(map(chr, range(512))), 512)
    assert auto(513, 10_000, 2)[0] == ByteTokenizer(256)
    tokenizer, why = auto(65, 10_000_000)
    assert tokenizer == choose.train_bpe([play], 300)
    assert why == (
        "BPE, 300 tokens, learnt from the training part: 10,000,000 characters are enough to learn "
        "it (from 10,000,000 on)"
    )
    assert "learnt from 1/3 of the training part" in auto(65, 100_000_001)[1]
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert auto(65, 10_000_000)[1] == (
        "characters, 65 kinds: few (up to 512), 10,000,000 characters in all; for BPE, which suits "
        "so long a text, install the extra text"
    )


def test_a_tokenizer_by_its_path(tmp_path, bpe: Tokenizer, play: str):
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
        assert dataset.notes["tokenizer"].startswith(f"{path}: as asked; ")
    n = int(0.9 * len(play))  # of characters, whatever a token is
    assert dataset.train.tolist() == bpe.encode(play[:n]).tolist()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "absent.json",
            None,
            "no tokenizer '{path}': give auto, char, byte, bpe, gpt2, or the path of a "
            "tokenizer.json or of a SentencePiece model (No such file or directory)",
        ),
        (
            "own.json",
            b'{"type": "char", "vocabulary": []}',
            "{path}: the vocabulary must be a list of one character or more",
        ),
        (
            "own.json",
            b"\xff",
            "{path} is no tokenizer.json; a SentencePiece model ends in .model",
        ),
    ],
)
def test_no_tokenizer_there(tmp_path, name: str, content: bytes | None, reason: str):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        choose.named(str(path))
    assert str(error.value) == reason.format(path=path)


# Bits per byte


def test_bits_per_byte_are_of_the_text(tmp_path, bpe: Tokenizer, play: str):
    """However it is cut into tokens: knowing nothing costs log2(V) bits for each of them."""
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
    ("text", "reason"),
    [
        (
            "a.txt=1,a.txt=2",
            "--data.text a.txt=1,a.txt=2: name each text once, with a weight above 0",
        ),
        (
            "a.txt=0,b.txt=2",
            "--data.text a.txt=0,b.txt=2: name each text once, with a weight above 0",
        ),
        (
            "a.txt=.5,b.txt=2",
            "2 texts are drawn from by their weights in shuffled order; give --data.order shuffled "
            "too",
        ),
    ],
)
def test_refused_mixtures(text: str, reason: str):
    assert message(config_of(text)) == reason


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
            "data.encoding='nothing' is no text encoding that Python knows; give e.g. utf-8, "
            "latin-1, cp1252, utf-16",
        ),
        (
            {"bpe_vocab_size": 256},
            "data.bpe_vocab_size=256 is too small; give 257 or more (256 bytes and the end of a "
            "text)",
        ),
        ({"val_limit": 0}, "data.val_limit=0 is too small; give 1 or more"),
        ({"resident_tokens": -1}, "data.resident_tokens=-1 is out of range; give 0 or more"),
    ],
)
def test_refused_options(options: dict[str, Any], reason: str):
    with pytest.raises(UserError) as error:
        DataConfig(**options)
    assert str(error.value) == reason


def test_options_reach_the_reader(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"body": f"na\u00efve {i} " * 9} for i in range(20)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(lines.encode("latin-1"))
    dataset = opened(config_of(path, encoding="latin-1", field="body", val_limit=150))
    assert "\u00ef" in dataset.tokenizer.decode(dataset.train)
    assert 0 < dataset.val_bytes < 200


def test_not_a_folder_of_bins_but_texts_too(tmp_path):
    """A file that is no text in the alphabet of a given tokenizer says where."""
    path = tmp_path / "own.txt"
    path.write_text("ab" * 100 + "X")
    error = message(config_of(path), CharTokenizer("ab"))
    assert error.startswith("1 unknown characters ('X' at 200): ")


def test_progress_is_told(tmp_path, monkeypatch, play: str):
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
        assert file.read().startswith("reading: 50%, 0 s left")
