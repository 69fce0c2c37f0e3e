"""Scores beside those of transformers on the same weights, and of its lm-evaluation-harness."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from helpers import random_params
from run_helpers import CONFIG, message

from gptjax.assembly import make_model
from gptjax.config import MeshConfig, ModelConfig
from gptjax.interop import hf, hf_config, hf_tokenizer
from gptjax.parallel import sharding
from gptjax.runs.loaded import LoadedRun
from gptjax.score.score import score_text
from gptjax.text import special_tokens
from gptjax.text.tokenizers import ByteTokenizer

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
V, END, T = 258, 256, 32
TEXT = "the king has to see the prince"
GPT2 = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=T, vocab_size=V)
LLAMA = replace(
    GPT2, n_kv_head=1, n_inner=24, bias=False, norm="rms", position="rotary", activation="swiglu",
    tie_head=False,
)  # fmt: skip


@pytest.fixture(scope="module", params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRun, Path]:
    """A random model as a run, and as a folder for transformers; the Llama has a BOS."""
    pytest.importorskip("tokenizers", reason="needs the extra text")
    config, folder = request.param, tmp_path_factory.mktemp("model")
    source = json.loads(hf_tokenizer.write(ByteTokenizer(END), T)["tokenizer.json"])
    bos = {"id": 257, "content": "<s>", "special": True, "normalized": False}
    bos |= {"single_word": False, "lstrip": False, "rstrip": False}
    source["added_tokens"].append(bos)
    if config is LLAMA:
        source["post_processor"] = special_tokens.template({"<s>": 257}, {})
    run = object.__new__(LoadedRun)
    run.tokenizer = special_tokens.hf(json.dumps(source))
    run.model = make_model(config, V)
    run.params, run.config, run.step = random_params(run.model), replace(CONFIG, model=config), 1
    run._mesh, run._kept = sharding.mesh_of(MeshConfig(data=1)), None
    about = hf_config.write_config(config, END)
    if config is LLAMA:
        about["bos_token_id"] = 257
    (folder / "config.json").write_text(json.dumps(about))
    tensors = hf.to_tensors(run.params, config)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, content in hf_tokenizer.write(run.tokenizer, T).items():
        (folder / name).write_bytes(content)
    return run, folder


def test_log_probabilities_are_those_of_transformers(exported: Any):
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    run, folder = exported
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    scored = score_text(run, TEXT)
    assert scored.ids.tolist() == ids[0].tolist()
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0]
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(len(ids[0]) - 1), ids[0, 1:]]
    np.testing.assert_allclose(scored.logprobs[1:], expected.numpy(), atol=2e-5)


def asked(*arguments: tuple[Any, ...]) -> Any:
    """Requests as the harness makes them."""
    return [SimpleNamespace(args=args, task_name=None) for args in arguments]


@pytest.fixture(scope="module")
def ours(exported: Any) -> Any:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from gptjax.score.harness import GptjaxLM

    return GptjaxLM(exported[0])


@pytest.fixture(scope="module")
def theirs(exported: Any) -> Any:
    pytest.importorskip("torch", reason="needs torch and transformers")
    pytest.importorskip("accelerate", reason="transformers' model of lm_eval needs accelerate")
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs the extra eval")
    return huggingface.HFLM(str(exported[1]), device="cpu", dtype="float32", batch_size=4)


def test_the_harness_gets_the_log_likelihoods_of_transformers(ours: Any, theirs: Any):
    run, ids = ours.run, ours.tok_encode(TEXT[:9])
    best = run.tokenizer.decode([int(run.logits(TEXT[:9])[-1, :256].argmax())])
    pairs = asked((TEXT[:9], " is"), (TEXT[:9], best), ("", "king"), (TEXT * 2, " and"))
    for a, b in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]
    assert ids[:1] == [257] * (len(ids) == 10) + [ord("t")] * (len(ids) == 9)
    texts = asked((TEXT,), (TEXT * 3,), ("k",))
    rolling = ours.loglikelihood_rolling(texts)
    assert rolling == pytest.approx(theirs.loglikelihood_rolling(texts), abs=5e-4)


@pytest.mark.parametrize("exported", [LLAMA], indirect=True, ids=["llama"])
def test_the_harness_gets_the_texts_of_transformers(ours: Any, theirs: Any):
    settings = {"until": ["e", "\n\n"], "max_gen_toks": 12}
    contexts = asked((TEXT, settings), ("a king", settings), (TEXT * 2, settings))
    assert ours.generate_until(contexts) == theirs.generate_until(contexts)


def test_the_harness_is_refused_what_gptjax_has_not(ours: Any):
    generate = lambda **settings: ours.generate_until(asked((TEXT, settings)))
    assert "sets num_beams" in message(generate, num_beams=2)
    assert "context length is 32" in message(generate, max_gen_toks=32)
    assert "allows 1 to 32" in message(ours.loglikelihood, asked(("a", TEXT * 2)))
