"""Tests of the tokenizers of the extra `text`: against tiktoken and SentencePiece themselves."""

import hashlib
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import UserError
from gptjax.text import choose
from gptjax.text.stream import StreamDecoder, first_tokens
from gptjax.text.subwords import HFTokenizer, SentencePieceTokenizer
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer, IdTokenizer, Tokenizer, from_json

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra text")
RANKS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "gpt2.tiktoken"
R50K = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
EVERYTHING = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
ODD = [
    "",
    " ",
    "\n\n\n a",
    "don't  you\u2019ll",
    "a<|endoftext|>b",
    "\r\n\t x",
    "e\u0301\u00e9",
    "文字 字",
]


@pytest.fixture(scope="module")
def bpe(play: str) -> HFTokenizer:
    return choose.train_bpe([play], 400)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tiktoken loads GPT-2's ranks from, without a network."""
    pytest.importorskip("tiktoken", reason="needs the extra text")
    if not RANKS.is_file():
        pytest.skip("GPT-2's ranks are not here (../shared/data/gpt2.tiktoken)")
    folder = tmp_path_factory.mktemp("tiktoken")
    shutil.copy(RANKS, folder / hashlib.sha1(R50K.encode()).hexdigest())
    return folder


@pytest.fixture(scope="module")
def gpt2(ranks: Path) -> HFTokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
        return choose.gpt2()


def sentencepiece_model(play: str, **options: Any) -> bytes:
    """A small SentencePiece model."""
    library = pytest.importorskip("sentencepiece", reason="needs the extra text")
    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(play.split("\n")),
        model_writer=written,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def model(play: str) -> bytes:
    """A small SentencePiece model with byte fallback, which keeps all blanks."""
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return sentencepiece_model(play, vocab_size=400, byte_fallback=True, **exact)


def test_bpe_round_trip_of_all_of_unicode(bpe: HFTokenizer):
    assert bpe.vocab_size == 400
    ids = bpe.encode(EVERYTHING)
    assert ids.dtype == np.int32 and bpe.decode(ids) == EVERYTHING
    assert bpe.count_bytes(ids) == len(EVERYTHING.encode())


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_bpe_round_trip(text: str):
    tokenizer = choose.train_bpe(["the king and the queen, the king"], 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    assert tokenizer.end_of_text not in ids


def test_bpe_compresses_and_is_deterministic(bpe: HFTokenizer, play: str):
    assert len(bpe.encode(play)) < len(play) / 2
    assert choose.train_bpe([play], 400) == bpe
    assert choose.train_bpe([play[:20]], 400).vocab_size < 400  # too short for 400 tokens


def test_json_round_trip(bpe: HFTokenizer, model: bytes, play: str):
    for tokenizer in (bpe, SentencePieceTokenizer(model)):
        again = from_json(tokenizer.to_json())
        assert again == tokenizer
        assert again.encode(play).tolist() == tokenizer.encode(play).tolist()
        assert (again.vocab_size, again.end_of_text) == (
            tokenizer.vocab_size,
            tokenizer.end_of_text,
        )


@pytest.mark.shared
def test_gpt2_equals_tiktoken_token_for_token(gpt2: HFTokenizer, ranks: Path, shakespeare: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
        reference = importlib.import_module("tiktoken").get_encoding("r50k_base")
    n = int(0.9 * len(shakespeare))
    parts = shakespeare[:n], shakespeare[n:]
    for text in (*parts, EVERYTHING, *ODD):
        assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)
    assert [len(gpt2.encode(part)) for part in parts] == [301_966, 36_059]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, reference.eot_token)


def test_gpt2_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    public = pytest.importorskip("tiktoken_ext.openai_public", reason="needs the extra text")

    def refuse():
        raise OSError("no\nnetwork")

    monkeypatch.setattr(public, "r50k_base", refuse)
    with pytest.raises(UserError) as error:
        choose.gpt2()
    assert str(error.value).startswith("GPT-2's tokenizer could not be downloaded (no network); ")
    assert "TIKTOKEN_CACHE_DIR" in str(error.value)


def test_special_tokens_in_text_are_encoded_literally(bpe: HFTokenizer):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.end_of_text is not None and bpe.end_of_text not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"
    ends = [*bpe.encode("a"), bpe.end_of_text, *bpe.encode("b")]
    assert bpe.decode(ends) == "a<|endoftext|>b" and bpe.count_bytes(np.array(ends)) == 2


def test_which_tokenizers_are_cuttable(bpe: HFTokenizer, model: bytes):
    """Byte-level BPE is, between a letter and a space; with a prefix space it is not."""
    assert bpe.cuttable and not SentencePieceTokenizer(model).cuttable
    values = json.loads(bpe.source)
    values["pre_tokenizer"]["add_prefix_space"] = True
    assert not HFTokenizer(json.dumps(values)).cuttable
    values["pre_tokenizer"] = None  # now merges can cross words
    words = tokenizers.Tokenizer.from_str(json.dumps(values))
    trainer = tokenizers.trainers.BpeTrainer(
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    words.train_from_iterator(["Wörter \nword" * 9], trainer)
    assert not HFTokenizer(words.to_str()).cuttable


def word_level(unknown: bool) -> str:
    vocabulary = {"a": 0, "b": 1, "[UNK]": 2}
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
        if unknown
        else tokenizers.models.BPE({"a": 0, "b": 1}, [])
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return library.to_str()


def test_unknown_words():
    tokenizer = HFTokenizer(word_level(unknown=True))
    assert tokenizer.encode("a b a").tolist() == [0, 1, 0]
    with pytest.raises(UserError) as error:
        tokenizer.encode("a x y")
    assert str(error.value).startswith(
        "2 of 3 tokens are the unknown token (the first at position 1)"
    )
    assert tokenizer.encode("a x b", "replace").tolist() == [0, 2, 1]
    assert tokenizer.encode("a x b", "skip").tolist() == [0, 1]
    assert tokenizer.end_of_text is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "not a Hugging Face tokenizer.json: Expecting value: line 1 column 1 (char 0)"),
        ("null", "not a Hugging Face tokenizer.json: "),
        ('{"model": {"type": "BPE"}}', "not a Hugging Face tokenizer.json: "),
        (
            word_level(unknown=False),
            "this tokenizer.json silently drops unknown characters",
        ),
    ],
)
def test_refused_sources(source: str, message: str):
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        HFTokenizer(source)
    assert "\n" not in str(error.value)


def test_a_refused_model():
    pytest.importorskip("sentencepiece", reason="needs the extra text")
    with pytest.raises(UserError, match=r"^not a SentencePiece model: ") as error:
        SentencePieceTokenizer(b"nothing of the kind")
    assert "\n" not in str(error.value)


def test_sentencepiece_equals_the_library(model: bytes, play: str):
    library = importlib.import_module("sentencepiece").SentencePieceProcessor()
    library.LoadFromSerializedProto(model)
    tokenizer = SentencePieceTokenizer(model)
    for text in (play, *ODD):
        assert tokenizer.encode(text).tolist() == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 400 and tokenizer.end_of_text == library.eos_id()
    ids = np.array([*tokenizer.encode("a"), tokenizer.end_of_text, *tokenizer.encode("b")])
    assert tokenizer.decode(ids) == "a<|endoftext|>b" and tokenizer.count_bytes(ids) == 2


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError) as error:
        HFTokenizer('{"model": {"type": "BPE"}}')
    assert str(error.value) == (
        "this needs the package tokenizers: pip install 'gptjax[text]', or from a checkout pip "
        "install -e '.[text]'"
    )


@pytest.mark.parametrize("kind", ["byte", "bpe", "sentencepiece"])
@pytest.mark.parametrize(
    "text", ["naïve €uro 文字 😀😀 e\u0301", "\ufffd\ufffd", " a  b\n", "<s>é"]
)
def test_stream_decoder_never_splits_a_character(
    kind: str, text: str, bpe: HFTokenizer, model: bytes
):
    tokenizer: Tokenizer = {
        "byte": ByteTokenizer(),
        "bpe": bpe,
        "sentencepiece": SentencePieceTokenizer(model),
    }[kind]
    prompt, ids = tokenizer.encode("so"), tokenizer.encode("so" + text)
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    for step in (1, 3, 16):
        decoder = StreamDecoder(tokenizer, prompt)
        pieces = [decoder.add(ids[i : i + step]) for i in range(len(prompt), len(ids), step)]
        pieces.append(decoder.end())
        assert "".join(pieces) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), min_size=1))
def test_stream_decoder_returns_invalid_bytes_too(ids: list[int]):
    tokenizer = ByteTokenizer()
    decoder = StreamDecoder(tokenizer, np.array([65]))
    pieces = [decoder.add(np.array([token])) for token in ids]
    assert "".join(pieces) + decoder.end() == tokenizer.decode(ids)


def test_where_a_text_begins(play: str, bpe: HFTokenizer):
    """After a newline if there is one, else the end-of-text token, else id 0: never nothing."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    word_level = HFTokenizer(words.to_str())
    words.add_special_tokens(["</s>"])
    ending = HFTokenizer(words.to_str())
    sentencepiece = SentencePieceTokenizer(sentencepiece_model(play, vocab_size=200))
    for tokenizer in (word_level, ending, sentencepiece):
        assert not len(tokenizer.encode(" \n "))
    for tokenizer, expected in (
        (word_level, [0]),
        (ending, [2]),
        (sentencepiece, [sentencepiece.end_of_text]),
        (bpe, bpe.encode("\n").tolist()),
        (ByteTokenizer(256), [10]),
        (CharTokenizer("\nab"), [0]),
        (CharTokenizer("ab", 2), [2]),
        (CharTokenizer("ab"), [0]),
        (IdTokenizer(9), [0]),
    ):
        assert first_tokens(tokenizer).tolist() == expected
        assert first_tokens(tokenizer).dtype == np.int32
