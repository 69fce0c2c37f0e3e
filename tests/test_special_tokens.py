"""Tests of the tokens around a text, such as a BOS: ids equal to transformers' everywhere."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import random_params
from run_helpers import CONFIG, QUIET, message

from gptjax.assembly import make_model
from gptjax.config import DataConfig, ModelConfig
from gptjax.interop import hf, hf_config, hf_tokenizer
from gptjax.interop.export import export
from gptjax.interop.import_ import import_model
from gptjax.runs.loaded import load
from gptjax.text import choose, special_tokens
from gptjax.text.dataset import open_dataset
from gptjax.text.stream import first_tokens
from gptjax.text.subwords import HFTokenizer
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer, from_json
from gptjax.training import train

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra text")
TEXTS = ["the king", "", " ", "\n", "  two\n\n words", "<s>", "naïve 文字 🙂", "a" * 300]
V, BOS, EOS = 302, 300, 301


def template(single: str) -> Any:
    return tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )


POST: dict[str, tuple[Any, list[int], list[int]]] = {
    "none": (None, [], []),
    "byte level": (tokenizers.processors.ByteLevel(), [], []),
    "bos": (template("<s> $A"), [BOS], []),
    "eos": (template("$A </s>"), [], [EOS]),
    "both": (template("<s> $A </s>"), [BOS], [EOS]),
    "two": (template("</s> <s> $A"), [EOS, BOS], []),
    "sequence": (
        tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(), template("<s> $A")]),
        [BOS],
        [],
    ),
    "roberta": (tokenizers.processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS)), [BOS], [EOS]),
}


@pytest.fixture(scope="module")
def bpe(play: str) -> Any:
    library = tokenizers.Tokenizer.from_str(choose.train_bpe([play], 300).source)
    library.add_special_tokens(["<s>", "</s>"])
    assert library.get_vocab_size() == V
    return library


def source(bpe: Any, name: str) -> str:
    copy = tokenizers.Tokenizer.from_str(bpe.to_str())
    if POST[name][0] is not None:
        copy.post_processor = POST[name][0]
    return copy.to_str()


def write_folder(folder: Path, tokenizer: str) -> Path:
    """A random Llama with a tokenizer.json."""
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, n_inner=24, block_size=64, vocab_size=V, bias=False,
        norm="rms", position="rotary", activation="swiglu", tie_head=False,
    )  # fmt: skip
    import safetensors.numpy

    folder.mkdir()
    params = random_params(make_model(config, V), 0)
    (folder / "config.json").write_text(json.dumps(hf_config.write_config(config, None)))
    tensors = hf.to_tensors(params, config)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


@pytest.mark.parametrize("name", POST)
def test_the_post_processor_of_a_tokenizer_json(name: str, bpe: Any):
    given = tokenizers.Tokenizer.from_str(source(bpe, name))
    given.encode_special_tokens = True  # "<s>" in a text stays text
    tokenizer = special_tokens.hf(source(bpe, name))
    assert (list(tokenizer.before), list(tokenizer.after)) == POST[name][1:]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert BOS not in ids and EOS not in ids
        assert special_tokens.around(tokenizer, ids).tolist() == given.encode(text).ids
        plain = special_tokens.without(tokenizer)
        assert special_tokens.around(plain, plain.encode(text)).tolist() == ids.tolist()
    assert from_json(tokenizer.to_json()) == tokenizer
    around = special_tokens.around(tokenizer, tokenizer.encode("né"))
    assert tokenizer.count_bytes(around) == 3


def test_a_text_without_a_prompt_begins_after_them(bpe: Any):
    assert first_tokens(special_tokens.hf(source(bpe, "bos"))).tolist() == [BOS]
    newline = HFTokenizer(source(bpe, "bos")).encode("\n").tolist()
    assert first_tokens(special_tokens.hf(source(bpe, "eos"))).tolist() == newline
    assert first_tokens(HFTokenizer(source(bpe, "bos"))).tolist() == newline


def test_runs_from_before_keep_their_meaning(bpe: Any):
    """A run's tokenizer.json without a word about them: the run was trained without."""
    old = json.dumps({"type": "hf", "tokenizer": json.loads(source(bpe, "bos"))})
    tokenizer = from_json(old)
    assert tokenizer == HFTokenizer(source(bpe, "bos"))
    assert special_tokens.around(tokenizer, np.array([5])).tolist() == [5]
    # And tokenizers without such tokens are written as before.
    assert json.loads(special_tokens.hf(source(bpe, "none")).to_json()).keys() == {
        "type",
        "tokenizer",
    }


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("ab", 2)])
def test_other_tokenizers_have_none(tokenizer: Any):
    ids = tokenizer.encode("ab")
    assert special_tokens.around(tokenizer, ids) is ids
    assert special_tokens.without(tokenizer) is tokenizer


@pytest.mark.parametrize("before", [[V], [-1], ["<s>"], [True], 3, None, {"a": 1}])
def test_damaged_ids_are_refused(before: Any, bpe: Any):
    values = {"type": "hf", "tokenizer": json.loads(bpe.to_str()), "before": before}
    line = message(from_json, json.dumps(values))
    assert line.startswith(f"tokens before each text: expected a list of ids below {V}, not ")


def test_a_post_processor_that_changes_the_text_is_refused(bpe: Any):
    values = json.loads(bpe.to_str())
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }
    line = message(special_tokens.hf, json.dumps(values))
    assert line.startswith("the post-processor of this tokenizer.json changes the tokens")


@pytest.mark.torch
@pytest.mark.parametrize("name", POST)
@pytest.mark.parametrize("claimed", [None, True, False])
def test_a_folder_equals_transformers(name: str, claimed: bool | None, bpe: Any, tmp_path: Path):
    """With a tokenizer.json its post-processor decides, whatever add_bos_token claims."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = write_folder(tmp_path / "model", source(bpe, name))
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if claimed is not None:
        about |= {"add_bos_token": claimed, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours: Any = hf_tokenizer.read(folder)
    assert ours == choose.named(str(folder)) == choose.named(str(folder / "tokenizer.json"))
    for text in TEXTS:
        if "<s>" not in text:  # which transformers takes for the token
            assert special_tokens.around(ours, ours.encode(text)).tolist() == theirs(text).input_ids


@pytest.fixture(scope="module")
def spm(play: str) -> bytes:
    library = pytest.importorskip("sentencepiece", reason="needs the extra text")
    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(play.split("\n")), model_writer=written, vocab_size=400,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("about", "before", "after"),
    [
        (None, (), ()),
        ({}, (), ()),
        ({"add_bos_token": True}, (1,), ()),
        ({"add_bos_token": False, "add_eos_token": False}, (), ()),
        (
            {"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<s>"}},
            (1,),
            (),
        ),
        ({"add_bos_token": True, "add_eos_token": True, "bos_token": "</s>"}, (2,), (2,)),
    ],
)
def test_sentencepiece_equals_transformers(
    about: Any, before: Any, after: Any, spm: bytes, tmp_path: Path
):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(spm)
    if about is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    ours: Any = hf_tokenizer.read(tmp_path)
    assert ours == choose.named(str(tmp_path / "tokenizer.model")) == choose.named(str(tmp_path))
    assert (ours.before, ours.after) == (before, after)
    assert from_json(ours.to_json()) == ours
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the king", " the", "naïve 文字 🙂", "a  b\n"):
        assert special_tokens.around(ours, ours.encode(text)).tolist() == theirs(text).input_ids
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text('{"model_type": "llama"}')
    for name, content in hf_tokenizer.write(ours, 64).items():
        (again / name).write_bytes(content)
    assert hf_tokenizer.read(again) == ours
    theirs = transformers.AutoTokenizer.from_pretrained(again)
    ids = special_tokens.around(ours, ours.encode("the king"))
    assert theirs("the king").input_ids == ids.tolist()


def test_a_bos_that_the_model_lacks_is_refused(spm: bytes, tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(spm)
    about = tmp_path / "tokenizer_config.json"
    about.write_text('{"add_bos_token": true, "bos_token": "<bos>"}')
    assert "the model has no token <bos>; correct bos_token" in message(hf_tokenizer.read, tmp_path)
    for content in ("[]", "{", '{"add_bos_token": true, "bos_token": 7}'):
        about.write_text(content)
        assert str(about) in message(hf_tokenizer.read, tmp_path)


def test_documents_get_them(bpe: Any, tmp_path: Path):
    """Each document of a text, cut or not, and the beginning of each side of a split one."""
    (tmp_path / "tokenizer.json").write_text(source(bpe, "both"))
    documents = ["the king and the queen. " * n for n in (300, 4000, 500)]
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    data = DataConfig(text=str(tmp_path / "many.jsonl"), tokenizer=str(tmp_path / "tokenizer.json"))
    found = open_dataset(data, 8)
    plain = lambda text: found.tokenizer.encode(text).tolist()
    end = found.tokenizer.end_of_text
    for ids in (found.train, found.val):
        inside = " ".join(map(str, ids.tolist()))
        assert ids[0] == BOS and (ids == BOS).sum() == (ids == EOS).sum() == (ids == end).sum()
        assert f"{EOS} {end}" in inside and inside.count(f"{BOS} ") == (ids == BOS).sum()
    text = "".join(documents)
    (tmp_path / "one.txt").write_text(text)
    one = open_dataset(replace(data, text=str(tmp_path / "one.txt")), 8)
    n = int(0.9 * len(text))
    assert one.train.tolist() == [BOS, *plain(text[:n]), EOS]
    assert one.val.tolist() == [BOS, *plain(text[n:]), EOS]
    assert one.val_bytes == len(text[n:])
    off = open_dataset(replace(data, text=str(tmp_path / "one.txt")), 8, special=False)
    assert off.train.tolist() == plain(text[:n])
    assert special_tokens.without(off.tokenizer) is off.tokenizer  # its prompts get none either


@pytest.mark.torch
def test_a_run_equals_transformers(bpe: Any, tmp_path: Path, play: str):
    """Logits, loss and greedy text after a prompt; the flag; fine-tuning; the way back."""
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    folder = write_folder(tmp_path / "model", source(bpe, "bos"))
    run = load(import_model(str(folder), str(tmp_path / "run")))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the king and the queen"
    for special in (True, False):
        ids = torch.tensor([theirs(text, add_special_tokens=special).input_ids])
        with torch.no_grad():
            logits = model(ids).logits
            greedy = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        ours = run.logits(text, special_tokens=special)
        assert ours.shape == logits[0].shape
        np.testing.assert_allclose(ours, logits[0].numpy(), atol=1e-4)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        assert abs(run.loss(text, special_tokens=special) - float(loss)) < 1e-5
        pieces = run.generate(text, 20, temperature=0, special_tokens=special)
        assert "".join(pieces) == theirs.decode(greedy[0, ids.shape[1] :])
    for prompt in (None, "king"):  # which changes without them
        with_, without = (
            "".join(run.generate(prompt, 20, temperature=0, special_tokens=special))
            for special in (True, False)
        )
        assert with_ != without
    assert message(next, run.generate("", 20)).startswith("the prompt '' has no tokens")
    refused = message(train, run.config, run.directory, resume=True, special_tokens=False)
    assert refused.startswith(f"{run.directory} was trained with its tokenizer's special tokens;")
    (tmp_path / "play.txt").write_text(play)
    data = DataConfig(text=str(tmp_path / "play.txt"))
    config = replace(CONFIG, steps=1, init=str(folder), data=data)
    train(config, tmp_path / "tuned", report=QUIET, special_tokens=False)
    for name, special in (("run", True), ("tuned", False)):
        tokenizer = load(tmp_path / name).tokenizer
        assert special_tokens.of(tokenizer)[0].tolist() == [BOS] * special
        out = tmp_path / f"exported {name}"
        export(tmp_path / name, out)
        bos = json.loads((out / "config.json").read_text())["bos_token_id"]
        assert bos == (BOS if special else tokenizer.end_of_text)
        ids = special_tokens.around(tokenizer, tokenizer.encode(text)).tolist()
        assert transformers.AutoTokenizer.from_pretrained(out)(text).input_ids == ids
        again: Any = hf_tokenizer.read(out)
        assert special_tokens.of(again)[0].tolist() == [BOS] * special
