"""Tests of Gemma 2 and 3: its layers, its settings, and a run of one, which opens by itself.

`test_weights.py` compares with transformers: logits, greedy text, export.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import by_path, close, quick_jit, random_params, random_tokens
from run_helpers import QUIET, message

from gptjax.assembly import assemble
from gptjax.cli.plan import show
from gptjax.cli.recipe import lecture_model, starting_point
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from gptjax.errors import UserError
from gptjax.interop import hf, hf_config, hf_tokenizer, pretrained
from gptjax.interop.export import export
from gptjax.interop.gemma import Gemma, GemmaConfig
from gptjax.interop.import_ import import_model
from gptjax.layers import cast
from gptjax.model import GPT
from gptjax.parallel import sharding
from gptjax.runs import parts
from gptjax.runs.loaded import load
from gptjax.runs.run import Run
from gptjax.text.tokenizers import ByteTokenizer
from gptjax.tools.replay import replay
from gptjax.tools.verify import verify
from gptjax.training import train

V, BLOCK, WINDOW = 256, 32, 5
CONFIG = ModelConfig(
    n_layer=3,
    n_head=4,
    n_kv_head=2,
    head_dim=6,
    n_embd=16,
    n_inner=20,
    block_size=BLOCK,
    vocab_size=V,
    bias=False,
    norm="rms",
    norm_eps=1e-6,
    position="rotary",
    activation="gelu",
    softcap=4.0,
)
GEMMA2 = GemmaConfig((True, False, True), WINDOW, None, 10, 2.0)
CONFIG3 = replace(
    CONFIG, n_layer=2, qk_norm=True, qk_norm_scale=True, rope_base=900.0, rope_scaling=(4.0,)
)
GEMMA3 = GemmaConfig((True, False), WINDOW, 30.0, 10, None)


@pytest.fixture(scope="module")
def model() -> Gemma:
    return Gemma(CONFIG, V, gemma=GEMMA2)


@pytest.fixture(scope="module")
def params(model: Gemma) -> Any:
    return random_params(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 as transformers would write it, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("gemma") / "theirs"
    folder.mkdir()
    params = random_params(Gemma(CONFIG3, V, gemma=GEMMA3))
    tensors = hf.to_tensors(jax.tree.map(np.asarray, params), CONFIG3, GEMMA3)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    about = hf_config.write_config(CONFIG3, None, GEMMA3)
    (folder / "config.json").write_text(json.dumps(about))
    for name, content in hf_tokenizer.write(ByteTokenizer(), BLOCK).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def imported(folder: Path) -> Path:
    return import_model(str(folder), str(folder.parent / "imported"), block_size=16)


# ---------------------------------------------------------------------------------------------
# The model

TOKENS = random_tokens(2, 20, V)


@pytest.fixture(scope="module")
def exact(model: Gemma, params: Any) -> np.ndarray:
    """The (2, 20, V) logits of TOKENS in float32, without a cache."""
    return np.asarray(quick_jit(model.apply)({"params": params}, TOKENS)[0])


def test_local_layers_see_a_window_and_the_others_everything(model: Gemma, params: Any):
    apply = quick_jit(partial(model.apply, mutable=["attention"]))
    _, kept = apply({"params": params}, TOKENS)
    [weights] = jax.tree.leaves(kept["attention"])
    assert weights.shape == (3, 2, 4, 20, 20)
    back = np.arange(20)[:, None] - np.arange(20)[None]
    for layer, local in enumerate(GEMMA2.local):
        seen = (back >= 0) & ((back < WINDOW) | (not local))
        np.testing.assert_array_equal(weights[layer] > 0, np.broadcast_to(seen, (2, 4, 20, 20)))
    close(weights.sum(-1), np.ones((3, 2, 4, 20)))


def test_weights_that_were_cast_before_give_the_same_embeddings(params: Any):
    """Sampling casts once, training in every step."""
    model = Gemma(replace(CONFIG, dtype="bfloat16"), V, gemma=GEMMA2)
    embed = lambda params: model.apply({"params": params}, TOKENS, None, method="embed")[0]
    found = embed(params)
    np.testing.assert_array_equal(found, embed(cast(params, "bfloat16")), strict=True)
    assert found.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_changes_nothing_beyond_the_window(dtype: Any, exact: np.ndarray, params: Any):
    model = Gemma(replace(CONFIG, dtype=dtype), V, gemma=GEMMA2)
    apply = quick_jit(lambda tokens, cache: model.apply({"params": params}, tokens, cache))
    first, cache = apply(TOKENS[:, :11], model.init_cache(2))
    logits = np.concatenate([first, apply(TOKENS[:, 11:], cache)[0]], axis=1)
    assert logits.dtype == np.float32 and np.abs(exact).max() > 0.5
    difference = np.abs(logits - exact).max()
    assert difference < 1e-5 if dtype == "float32" else 1e-4 < difference < 0.1


def test_a_mesh_changes_nothing(model: Gemma, params: Any, exact: np.ndarray):
    mesh = sharding.mesh_of(MeshConfig(data=1, fsdp=2, tensor=2))
    placed = sharding.shardings(mesh, params)
    specs = {path: place.spec for path, place in by_path(placed).items()}
    assert "tensor" in specs["h/mlp/c_fc/kernel"] and "tensor" in specs["h/attn/c_q/kernel"]
    assert all(not any(spec) for path, spec in specs.items() if path.endswith("scale"))
    applied = sharding.on_mesh(model, mesh)
    close(quick_jit(applied.apply)({"params": jax.device_put(params, placed)}, TOKENS)[0], exact)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Gemma(CONFIG, V), "a Gemma takes a GemmaConfig"),
        (lambda: Gemma(replace(CONFIG, n_layer=2), V, gemma=GEMMA2), "a Gemma of 2 layers has 3"),
        (lambda: Gemma(CONFIG, V, gemma=GEMMA2, block=GPT), "a Gemma has a block and an attention"),
        (
            lambda: Gemma(replace(CONFIG, attention="cudnn"), V, gemma=GEMMA2),
            "model.attention=cudnn has no capped or partly local scores",
        ),
    ],
)
def test_what_a_gemma_cannot_be(make: Callable[[], Gemma], said: str):
    with pytest.raises(UserError) as error:
        jax.eval_shape(make().init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert str(error.value).startswith(said)


# ---------------------------------------------------------------------------------------------
# Its config.json

SIZES = {
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "hidden_size": 16,
    "intermediate_size": 20,
    "max_position_embeddings": BLOCK,
    "vocab_size": V,
}


def read(kind: str, **values: Any) -> hf_config.Described:
    return hf_config.read_config({"model_type": kind, **SIZES, **values})


def test_what_a_gemma_takes_for_granted():
    config, gemma = read("gemma2")
    assert gemma == GemmaConfig((True, False) * 3 + (True,), 4096, None, 256, 50.0)
    assert (config.n_kv_head, config.head_size, config.softcap) == (4, 256, 30.0)
    assert config.tie_head and config.rope_base == 1e4 and not config.qk_norm
    config, gemma = read("gemma3_text")
    assert gemma == GemmaConfig((True,) * 5 + (False, True), 4096, 1e4, 256, None)
    assert config.tie_head and config.rope_base == 1e6 and config.qk_norm_scale
    assert config.softcap is None and config.window is None


TYPES = ["sliding_attention", "full_attention"]
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "names of a pattern": (
        "gemma2",
        {"layer_types": TYPES * 3 + TYPES[:1], "sliding_window_pattern": 6},
        {"sliding_window_pattern": 2, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "storage": (
        "gemma3_text",
        {
            "sliding_window_pattern": 3,
            "_sliding_window_pattern": 3,
            "cache_implementation": "hybrid",
        },
        {"layer_types": ([TYPES[0]] * 2 + [TYPES[1]]) * 2 + [TYPES[0]]},
    ),
    "rotary settings of transformers 5": (
        "gemma3_text",
        {
            "rope_parameters": {
                TYPES[0]: {"rope_type": "default", "rope_theta": 7.0},
                TYPES[1]: {"rope_type": "linear", "factor": 8.0, "rope_theta": 9.0},
            }
        },
        {
            **{"rope_local_base_freq": 7.0, "rope_theta": 9.0},
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "a window that no layer has": (
        "gemma2",
        {"layer_types": [TYPES[1]] * 7, "sliding_window": None},
        {"layer_types": [TYPES[1]] * 7, "use_bidirectional_attention": False},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_two_files_of_one_model(name: str):
    kind, one, other = SAME[name]
    assert read(kind, **one) == read(kind, **other)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("gemma3", {}, "model_type='gemma3' is a model of texts and images"),
        ("gemma2", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation='silu' is not supported"),
        ("gemma2", {"hidden_act": "silu"}, "hidden_act='silu' contradicts hidden_activation="),
        ("gemma2", {"layer_types": TYPES}, "layer_types=['sliding_attention', 'full_attention']"),
        ("gemma2", {"layer_types": ["chunked"] * 7}, "layer_types=['chunked', "),
        ("gemma2", {"sliding_window_pattern": 3}, "a sliding window pattern of 3 has no effect"),
        ("gemma3_text", {"_sliding_window_pattern": 3}, "a sliding window pattern of 6 has no"),
        ("gemma2", {"sliding_window": None}, "sliding_window=None is not a positive integer"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 is not a positive"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_softcap=0.0 is out of range"),
        ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping='30' is not a fin"),
        ("gemma2", {"rope_local_base_freq": 1e4}, "rope_local_base_freq=10000.0 is not a setting"),
        ("gemma2", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers=2147483647 is too large"),
        ("gemma2", {"altup_num_inputs": 4}, "altup_num_inputs=4 is not a setting of a gemma2"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not sup"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters={'rope_theta'"),
        ("gemma3_text", {"rope_parameters": [1]}, "rope_parameters=[1] is not an object"),
        (
            "gemma3_text",
            {"rope_parameters": {TYPES[0]: {"rope_type": "linear", "factor": 2.0}}},
            "rotary scaling of 'sliding_attention' layers is not supported",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {TYPES[0]: {"rope_theta": 7.0}}, "rope_local_base_freq": 8.0},
            "rope_theta=8.0 contradicts rope_theta=7.0",
        ),
        (
            "gemma3_text",
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling={'type': 'linear', 'factor': 8.0} has a type, which has no effect",
        ),
    ],
)
def test_a_setting_that_is_not_understood(kind: str, values: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        read(kind, **values)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "gemma", "said"),
    [
        (replace(CONFIG, window=4), GEMMA2, "model.window=4 is not supported by transformers' Gem"),
        (replace(CONFIG, activation="swiglu"), GEMMA2, "model.activation=swiglu is not supported"),
        (replace(CONFIG, qk_norm=True), GEMMA3, "model.qk_norm_scale=False is not supported"),
        (CONFIG3, replace(GEMMA3, attn_softcap=2.0), "a Gemma's attn_softcap=2.0 is not supported"),
        (CONFIG, GEMMA3, "a Gemma's local_rope_base=30.0 is not supported by transformers' Gemma2"),
        (CONFIG, None, "model.softcap=4.0 is not supported by transformers' LlamaForCausalLM"),
    ],
)
def test_what_transformers_has_no_gemma_for(config: ModelConfig, gemma: Any, said: str):
    with pytest.raises(UserError) as error:
        hf_config.write_config(config, None, gemma)
    assert str(error.value).startswith(said)


# ---------------------------------------------------------------------------------------------
# A run


def test_an_imported_run_opens_by_itself(folder: Path, imported: Path, tmp_path: Path):
    run = load(imported)
    assert run.model == Gemma(replace(CONFIG3, block_size=16, attention="auto"), V, gemma=GEMMA3)
    expected = pretrained.load(str(folder))
    jax.tree.map(np.testing.assert_array_equal, run.params, expected.params)
    assert export(imported, tmp_path / "again") == "Gemma3ForCausalLM"
    again = pretrained.load(str(tmp_path / "again"))
    assert again.gemma == GEMMA3 and again.config == replace(CONFIG3, block_size=16)
    jax.tree.map(lambda a, b: close(a, b, 1e-7), again.params, expected.params)


def test_a_fine_tuned_run_resumes_repeats_and_seeds_another(
    imported: Path, play: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gptjax.model.UNROLL_UP_TO", 1)  # compiles in half the time
    place = imported.parent
    (place / "play.txt").write_text(play)
    config = Config(
        init=str(imported),
        steps=2,
        batch_size=4,
        eval_every=2,
        save_every=2,
        steps_per_dispatch=1,
        sample_tokens=None,
        model=ModelConfig(block_size=16),
        data=DataConfig(text=str(place / "play.txt"), val_limit=200),
        optim=OptimConfig(lora_rank=2),
    )
    train(config, place / "tuned", report=QUIET)
    run = Run(place / "tuned")
    assert run.parts == Run(imported).parts == parts.describe(model=load(imported).model)
    train(replace(run.config, steps=3), place / "tuned", resume=True, report=QUIET)
    losses = [record["loss"] for record in run.metrics() if "loss" in record]
    assert len(losses) == 3
    assert replay(place / "tuned", 3, report=QUIET)["loss"] == losses[-1]
    assert all(check.sound for check in verify(str(place / "tuned")))
    # A new run like it, or from it, is a Gemma too.
    settings, _ = starting_point(str(place / "tuned"))
    assert settings.init == str(imported) and lecture_model(str(place / "tuned")) is None
    assert pretrained.load(str(place / "tuned")).gemma == GEMMA3
    with pytest.raises(UserError, match=r"^only a GPT can be planned, and .* trains none"):
        show(str(place / "tuned"), settings, "here", None)


def test_weights_are_not_planned_as_the_preset_that_they_replace(folder: Path):
    settings, _ = starting_point("finetune")
    text = message(show, "finetune", replace(settings, init=str(folder)), "here", None)
    assert text.startswith("a plan takes the model's sizes from the config, and those of --init")


def test_what_is_trained_is_chosen_by_name():
    optim = OptimConfig(kind="muon", lora_rank=2)
    shapes = lambda o: (
        assemble(
            Config(batch_size=2, model=CONFIG, optim=o), V, model=Gemma(CONFIG, V, gemma=GEMMA2)
        ).layout
    )
    names = {path for path in by_path(shapes(optim).params) if path.endswith("lora_a")}
    assert names == {f"h/{name}/lora_a" for name in ("attn/c_q", "attn/c_kv", "attn/c_proj")} | {
        f"h/mlp/{name}/lora_a" for name in ("c_fc", "c_proj")
    }
    frozen = by_path(shapes(OptimConfig(freeze="ln_1_post|mlp")).frozen)
    assert frozen.keys() == {"h/ln_1_post/scale", "h/mlp/c_fc/kernel", "h/mlp/c_proj/kernel"}


RECORD = {**vars(GEMMA3), "local": list(GEMMA3.local)}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "expected an object with attn_softcap, local, local_rope_base, query_scale, window"),
        (json.dumps({**RECORD, "more": 1}), "expected an object with attn_softcap, local,"),
        (json.dumps({k: v for k, v in RECORD.items() if k != "window"}), "expected an object with"),
        (json.dumps({**RECORD, "window": 5.5}), "window: expected int or null, got 5.5"),
        (json.dumps({**RECORD, "window": None}), "window=None is not the size of a window"),
        (json.dumps({**RECORD, "local": [1, 0]}), "local[0]: expected bool, got 1"),
        (json.dumps({**RECORD, "local": [True]}), "local has 1 values, one for each layer"),
        (json.dumps({**RECORD, "local_rope_base": float("inf")}), "local_rope_base=inf is out of"),
        (json.dumps(RECORD)[:-1] + ', "window": 4}', "the key 'window' is there twice"),
    ],
)
def test_a_damaged_record_is_one_line(record: str, said: str, imported: Path):
    run = Run(imported)
    run.parts["model"] = f"Gemma {record}"
    text = message(parts.run_model, run)
    start = f"{imported}/config.json is damaged: the settings of its Gemma: {said}"
    assert text.startswith(start) and "\n" not in text


def test_a_record_that_is_not_the_checkpoints(imported: Path):
    path = imported / "config.json"
    whole = path.read_text()
    try:
        path.write_text(whole.replace('\\"window\\": 5', '\\"window\\": 6'))
        assert path.read_text() != whole
        text = message(load, imported)
        assert (
            text.startswith(f"{path} is damaged: of the parts that the che")
            and "an intact copy" in text
        )
        assert not all(check.sound for check in verify(str(imported)))
    finally:
        path.write_text(whole)
