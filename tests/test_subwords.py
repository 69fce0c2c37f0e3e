"""Tests of the tokenizers of the extra `text`: against tiktoken and SentencePiece themselves."""

import hashlib
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import UserError
from gptjax.text import choose
from gptjax.text.subwords import HFTokenizer, SentencePieceTokenizer
from gptjax.text.tokenizers import ByteTokenizer, StreamDecoder, Tokenizer, from_json

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
    """A folder in which tiktoken finds GPT-2's ranks, without a network."""
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


@pytest.fixture(scope="module")
def model(play: str) -> bytes:
    """A small SentencePiece model, with a fall back to bytes."""
    library = pytest.importorskip("sentencepiece", reason="needs the extra text")
    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(play.split("\n")),
        model_writer=written,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return written.getvalue()


def test_bpe_gives_back_all_of_unicode(bpe: HFTokenizer):
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


def test_bpe_is_shorter_than_bytes_and_the_same_each_time(bpe: HFTokenizer, play: str):
    assert len(bpe.encode(play)) < len(play) / 2
    assert choose.train_bpe([play], 400) == bpe
    assert choose.train_bpe([play[:20]], 400).vocab_size < 400  # too short for so many


def test_json_keeps_a_tokenizer_whole(bpe: HFTokenizer, model: bytes, play: str):
    for tokenizer in (bpe, SentencePieceTokenizer(model)):
        again = from_json(tokenizer.to_json())
        assert again == tokenizer
        assert again.encode(play).tolist() == tokenizer.encode(play).tolist()
        assert (again.vocab_size, again.end_of_text) == (
            tokenizer.vocab_size,
            tokenizer.end_of_text,
        )


@pytest.mark.shared
def test_gpt2_is_tiktokens_token_for_token(gpt2: HFTokenizer, ranks: Path, shakespeare: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
        reference = importlib.import_module("tiktoken").get_encoding("r50k_base")
    n = int(0.9 * len(shakespeare))
    parts = shakespeare[:n], shakespeare[n:]
    for text in (*parts, EVERYTHING, *ODD):
        assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)
    assert [len(gpt2.encode(part)) for part in parts] == [301_966, 36_059]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, reference.eot_token)


def test_gpt2_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    public = pytest.importorskip("tiktoken_ext.openai_public", reason="needs the extra text")

    def refuse():
        raise OSError("no\nnetwork")

    monkeypatch.setattr(public, "r50k_base", refuse)
    with pytest.raises(UserError) as error:
        choose.gpt2()
    assert str(error.value) == (
        "GPT-2's tokenizer could not be fetched (no network); where there is no network, put its "
        "file into a folder that TIKTOKEN_CACHE_DIR names"
    )


def test_what_looks_special_in_a_text_is_text(bpe: HFTokenizer):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.end_of_text is not None and bpe.end_of_text not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"
    ends = [*bpe.encode("a"), bpe.end_of_text, *bpe.encode("b")]
    assert bpe.decode(ends) == "a<|endoftext|>b" and bpe.count_bytes(np.array(ends)) == 2


def test_where_texts_may_be_cut(bpe: HFTokenizer, model: bytes):
    """Byte-level BPE may be cut between a letter and a space; with a prefix space it may not."""
    assert bpe.cuttable and not SentencePieceTokenizer(model).cuttable
    values = json.loads(bpe.source)
    values["pre_tokenizer"]["add_prefix_space"] = True
    assert not HFTokenizer(json.dumps(values)).cuttable
    values["pre_tokenizer"] = None  # then merges join words
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
    assert str(error.value) == (
        "2 of 3 tokens are unknown to the tokenizer (the first is token 1); remove what it does "
        "not know, or choose replace or skip"
    )
    assert tokenizer.encode("a x b", "replace").tolist() == [0, 2, 1]
    assert tokenizer.encode("a x b", "skip").tolist() == [0, 1]
    assert tokenizer.end_of_text is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "not a tokenizer.json of Hugging Face: Expecting value: line 1 column 1 (char 0)"),
        ("null", "not a tokenizer.json of Hugging Face: "),
        ('{"model": {"type": "BPE"}}', "not a tokenizer.json of Hugging Face: "),
        (
            word_level(unknown=False),
            "this tokenizer.json drops characters that it does not know: it has neither an unknown "
            "token nor a token for each byte; take another",
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


def test_sentencepiece_is_the_librarys(model: bytes, play: str):
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
def test_text_that_grows_has_no_half_characters(
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
def test_bytes_that_are_no_text_come_out_too(ids: list[int]):
    tokenizer = ByteTokenizer()
    decoder = StreamDecoder(tokenizer, np.array([65]))
    pieces = [decoder.add(np.array([token])) for token in ids]
    assert "".join(pieces) + decoder.end() == tokenizer.decode(ids)
