"""Tests of GGUF's tokenizers: ids equal to transformers' and to those of the families' own."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from run_helpers import message

from gptjax.interop import gguf_tokenizer, pretrained
from gptjax.text import choose, special_tokens

gguf: Any = pytest.importorskip("gguf", reason="needs the extra hf")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
SPECIAL = ["<|endoftext|>", "<bos>"]
SAMPLES = [
    "The king's crown, and the queen's; don't DON'T we'LL",
    "1 12 123 1234 12345.678 ٣٤٥٦ ½ x2y34",
    "a  b   c\n\n\n  d\r\n\te \n f  ",
    "if x==1:\n    return (x+y)*[z]//2  # !!! ???\n",
    "naïve ÉCOLE straße CamelCaseWords HTTPServer iPhone",
    "東京は日本の首都です。 Привет, мир! שלום नमस्ते สวัสดี",
    "🙂🙃 👩‍👩‍👧 e\u0301 ﬁ \u00a0\u2003\u200b…",
    'http://a.b/c?d=e&f#g <html> {json: "x"}',
    "",
    "x",
    "'s 't\n'll",
]
LEADING = ["  two", " one", "\n\nlines", "\t"]


def words(text: str) -> list[str]:
    return [text] * 3 + SAMPLES * 4


def train(pre: str, text: str, ignore: bool = False) -> tuple[Any, dict[str, Any]]:
    """A byte-level BPE trained with a family's own pre-tokenizer, and its metadata in GGUF."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore))
    library.pre_tokenizer = OWN[pre]
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(words(text), trainer)
    vocabulary = library.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(pair) for pair in json.loads(library.to_str())["model"]["merges"]]
    return library, {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }


def split(pattern: str) -> Any:
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    spell = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizers.pre_tokenizers.Sequence([cut, spell])


# As the families' own tokenizer.json have them.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
OWN = {
    "default": GPT_2,
    "gpt-2": GPT_2,
    "smollm": tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), GPT_2]
    ),
    "llama-bpe": split(LLAMA_3),
    "smaug-bpe": split(LLAMA_3),
    "qwen2": split(LLAMA_3.replace("{1,3}", "")),
    "tekken": split(NEMO),
}
WITH_BOS = ("llama-bpe", "tekken")


def write(folder: Path, values: dict[str, Any]) -> Path:
    """A GGUF file of metadata alone, for transformers."""
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), values["general.architecture"])
    for key, value in values.items():
        if key != "general.architecture":
            vtype = {int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
            vtype |= {bool: gguf.GGUFValueType.BOOL, list: gguf.GGUFValueType.ARRAY}
            writer.add_key_value(key, value, vtype[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def ids(tokenizer: Any, text: str) -> list[int]:
    return special_tokens.around(tokenizer, tokenizer.encode(text)).tolist()


@pytest.mark.parametrize("pre", OWN)
def test_byte_level_equals_the_family(pre: str, play: str):
    library, values = train(pre, play, ignore=pre in WITH_BOS)
    ours = gguf_tokenizer.read(values)
    assert (ours.vocab_size, ours.end_of_text) == (library.get_vocab_size(), 0)
    bos = [1] if pre in WITH_BOS else []  # as llama.cpp: the file does not say
    for text in [play, *SAMPLES, *LEADING]:
        if pre == "qwen2":  # which composes first
            text = tokenizers.normalizers.NFC().normalize_str(text)
        assert ids(ours, text) == bos + library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
    if pre == "qwen2":
        assert ids(ours, "e\u0301") == ids(ours, "é")


@pytest.mark.parametrize("pre", OWN)
def test_another_familys_tokens_without_a_name_are_refused(pre: str, play: str):
    """Llama 3's, Qwen 2's and Mistral's have words like ".get", which GPT-2's cut never makes."""
    _, values = train(pre, "".join(f"x.{word}(y)" for word in play.split()))
    named = gguf_tokenizer.read(values)
    default = {**values, "tokenizer.ggml.pre": "default"}
    absent = {key: value for key, value in values.items() if key != "tokenizer.ggml.pre"}
    for unnamed in (default, absent):
        if pre in ("default", "gpt-2", "smollm"):
            ours = gguf_tokenizer.read(unnamed)
            assert ids(ours, SAMPLES[0]) == ids(named, SAMPLES[0])
        else:
            line = message(gguf_tokenizer.read, unnamed)
            assert line.startswith("it does not name its pre-tokenizer (tokenizer.ggml.pre), and ")


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken", "smaug-bpe", "gpt-2"])
def test_a_whole_word_needs_no_merges_in_llama_3_and_tekken(pre: str):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*alphabet, "king", "xy"],
        "tokenizer.ggml.merges": ["x y"],
    }
    whole = gguf_tokenizer.read(values).encode("king").tolist() == [256]
    assert whole == (pre in WITH_BOS)


@pytest.mark.torch
@pytest.mark.parametrize("pre", [pre for pre in OWN if pre != "smollm"])
@pytest.mark.parametrize("bos", [None, True, False])
def test_byte_level_equals_transformers(pre: str, bos: bool | None, play: str, tmp_path: Path):
    """Which knows no smollm, and whose files without a word about it have no BOS."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    _, values = train(pre, play)
    if bos is not None:
        values["tokenizer.ggml.add_bos_token"] = bos
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, values), gguf_file="m.gguf")
    ours = gguf_tokenizer.read(values)
    if bos is None:
        ours = special_tokens.without(ours)
    assert special_tokens.of(ours)[0].tolist() == [1] * bool(bos)
    for text in [play, *SAMPLES, *LEADING]:
        if pre != "qwen2" or "\u0301" not in text:
            assert ids(ours, text) == theirs(text).input_ids


@pytest.fixture(scope="module")
def spm(play: str) -> bytes:
    library = pytest.importorskip("sentencepiece", reason="needs the extra text")
    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(words(play)).split("\n")), model_writer=written,
        vocab_size=600, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<think>"],
    )  # fmt: skip
    return written.getvalue()


@pytest.fixture(scope="module")
def llama(spm: bytes) -> dict[str, Any]:
    """The metadata of a SentencePiece model, as llama.cpp's converter writes them."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(spm)
    n = range(library.vocab_size())
    types = [
        2 if library.IsUnknown(i)
        else 3 if library.IsControl(i)
        else 6 if library.IsByte(i)
        else 4 if library.IdToPiece(i) == "<think>"
        else 1
        for i in n
    ]  # fmt: skip
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [library.IdToPiece(i) for i in n],
        "tokenizer.ggml.scores": [float(library.GetScore(i)) for i in n],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_llama_equals_sentencepiece(llama: dict[str, Any], spm: bytes, play: str):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(spm)
    ours = gguf_tokenizer.read(llama)
    assert (ours.before, ours.after, ours.end_of_text) == ((1,), (), 2)
    for text in [*SAMPLES, "<think>hm</think>", "\n\nlines", "\t", *play.split("\n")]:
        if text and not text.startswith("<think>"):  # before which only SentencePiece has a space
            assert ids(ours, text) == [1, *library.encode(text)]
            assert ours.decode(ours.encode(text)) == text
    literal = ours.encode("<s></s><unk><0x41>")
    assert not {0, 1, 2} & set(literal.tolist())
    assert ours.decode(literal) == "<s></s><unk><0x41>"


@pytest.mark.torch
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("bos", [None, True, False])
def test_llama_equals_transformers(
    architecture: str, bos: bool | None, llama: dict[str, Any], play: str, tmp_path: Path
):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    values = {**llama, "general.architecture": architecture}
    if architecture == "gemma2":  # which has tokens of several spaces, and no space before a text
        tokens = [*llama["tokenizer.ggml.tokens"], "  ", "   "]
        values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.add_space_prefix": False}
        values["tokenizer.ggml.scores"] = llama["tokenizer.ggml.scores"] + [-1000.0, -1000.0]
        values["tokenizer.ggml.token_type"] = llama["tokenizer.ggml.token_type"] + [4, 4]
    if bos is not None:
        values["tokenizer.ggml.add_bos_token"] = bos
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, values), gguf_file="m.gguf")
    ours = gguf_tokenizer.read(values)
    assert special_tokens.of(ours)[0].tolist() == [1] * (bos is not False)
    for text in [play, *SAMPLES, *LEADING, "a    b", "<think>hm</think>"]:
        assert ids(ours, text) == theirs(text).input_ids
    if architecture == "gemma2":
        assert len(tokens) - 2 in ours.encode("a  ") and ours.decode(ours.encode(" a")) == " a"


def test_a_written_tokenizer_is_the_same(llama: dict[str, Any], tmp_path: Path):
    """What `gptjax export` writes of it."""
    from gptjax.interop import hf_tokenizer

    ours = gguf_tokenizer.read(llama)
    for name, content in hf_tokenizer.write(ours, 64).items():
        (tmp_path / name).write_bytes(content)
    assert hf_tokenizer.read(tmp_path) == choose.named(str(tmp_path)) == ours


GPT2_VALUES = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"tokens": None}, "it has no tokenizer.ggml.tokens, so its tokenizer cannot be made"),
        ({"merges": None}, "it has no tokenizer.ggml.merges, so its tokenizer cannot be made"),
        ({"model": None}, "the tokenizer None with the pre-tokenizer 'default' is not supported"),
        ({"model": "t5"}, "the tokenizer 't5' with"),
        ({"model": ["gpt2"]}, "the tokenizer ['gpt2'] with"),
        ({"pre": "falcon"}, "the tokenizer 'gpt2' with the pre-tokenizer 'falcon' is not"),
        ({"pre": 3}, "the tokenizer 'gpt2' with the pre-tokenizer 3 is not"),
        ({"pre": ["gpt-2"]}, "the tokenizer 'gpt2' with the pre-tokenizer ['gpt-2'] is not"),
        ({"tokens": []}, "tokenizer.ggml.tokens has 0 entries, expected some"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is damaged: expected a list of str"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is damaged: expected a list of str"),
        ({"tokens": ["a", "b", "ab", "a"]}, "tokenizer.ggml.tokens has 1 tokens twice"),
        ({"merges": ["a c"]}, "its tokenizer is not usable: "),
        ({"merges": ["ab"]}, "its tokenizer is not usable: "),
        ({"token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries, expected 4"),
        ({"token_type": 1}, "tokenizer.ggml.token_type is damaged: expected a list of int"),
        ({"unknown_token_id": 4}, "tokenizer.ggml.unknown_token_id=4 is not an id below 4"),
        ({"bos_token_id": -1}, "tokenizer.ggml.bos_token_id=-1 is not an id below 4"),
        ({"bos_token_id": "0"}, "tokenizer.ggml.bos_token_id='0' is not an id below 4"),
        ({"add_bos_token": True}, "tokenizer.ggml.add_bos_token is true, and there is no "),
        ({"add_sep_token": True}, "tokenizer.ggml.add_sep_token=True is not supported"),
        ({"lowercase": True}, "tokenizer.ggml.lowercase=True is not supported"),
        ({"model": "llama", "merges": None}, "it has no tokenizer.ggml.scores, so its"),
        (
            {"model": "llama", "merges": None, "scores": [0.0]},
            "tokenizer.ggml.scores has 1 entries, expected 4",
        ),
        ({"unknown_token_id": None}, "its tokenizer is not usable: this tokenizer.json silently"),
    ],
)
def test_one_line_for_what_cannot_be_used(change: dict[str, Any], line: str):
    values = GPT2_VALUES | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    values = {key: value for key, value in values.items() if value is not None}
    assert message(gguf_tokenizer.read, values).startswith(line)


def test_the_line_names_the_file(tmp_path: Path):
    values = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}
    path = write(tmp_path, values) / "m.gguf"
    assert message(pretrained.load, str(path)).startswith(f"{path}: ")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"gpt2", b"gp\xff2"))
    line = message(pretrained.load, str(path))
    assert line.startswith(f"{path} is not a valid GGUF file: 'utf-8' codec can't decode byte 0xff")


def test_what_changes_nothing_is_accepted():
    values = {
        "tokenizer.ggml.add_sep_token": False,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.chat_template": "{{ x }}",
    }
    assert gguf_tokenizer.read(GPT2_VALUES | values).vocab_size == 4
