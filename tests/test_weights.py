"""Tests of import and export: parity with transformers and nanoGPT, round trips, refusals."""

import json
import math
import os
import pickle
import re
import shutil
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import close, random_params

from gptjax.assembly import assemble, make_model
from gptjax.config import Config, DataConfig, ModelConfig, OptimConfig
from gptjax.errors import UserError
from gptjax.generation.slots import generate
from gptjax.interop import hf, hf_config, hf_tokenizer, nanogpt, pretrained
from gptjax.interop.export import export
from gptjax.interop.import_ import import_model
from gptjax.model import GPT
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.sampling import Sampling
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer
from gptjax.training import train

V, BLOCK = 61, 256
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"
GPT2 = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=BLOCK, vocab_size=V)
LLAMA = ModelConfig(
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=32,
    n_inner=40,
    block_size=BLOCK,
    vocab_size=V,
    bias=False,
    norm="rms",
    position="rotary",
    activation="swiglu",
)
MISTRAL = replace(LLAMA, window=8)


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch", reason="needs torch and transformers")
    library = pytest.importorskip("transformers", reason="needs torch and transformers")
    library.utils.logging.set_verbosity_error()
    return library


def write_folder(folder: Path, config: ModelConfig, seed: int = 0) -> Any:
    """Write a model with random weights as a transformers folder; returns its parameters."""
    params = jax.tree.map(np.asarray, random_params(make_model(config, V), seed))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config.write_config(config, None)))
    tensors = hf.to_tensors(params, config)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return params


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_agrees(model: GPT, params: Any, theirs: Any, text: np.ndarray) -> dict[str, float]:
    """Check logits to 1e-4, the loss on a text to 1e-5, and 200 greedy tokens exactly."""
    import torch  # pyright: ignore[reportMissingImports]

    T, theirs = model.config.block_size, theirs.eval()
    rows = text[: (len(text) - 1) // T * T].reshape(-1, T)[:4]
    logits = np.asarray(model.apply({"params": params}, jnp.asarray(rows))[0], np.float64)
    with torch.no_grad():
        other = theirs(torch.tensor(rows)).logits.double().numpy()
    difference = np.abs(logits - other).max()
    assert difference < 1e-4 and np.abs(other).max() > 0.1
    loss = lambda x: (
        -np.take_along_axis(
            x[:, :-1] - np.log(np.exp(x[:, :-1]).sum(-1, keepdims=True)), rows[:, 1:, None], -1
        ).mean()
    )
    assert abs(loss(logits) - loss(other)) < 1e-5
    prompt, n = rows[0, :8].astype(np.int32), min(200, T - 8)
    sampling = Sampling(temperature=0)
    chunks = generate(model, params, prompt, jax.random.key(0), n, sampling)
    ours = np.concatenate(list(chunks), axis=1)[0]
    with torch.no_grad():
        ids = theirs.generate(
            torch.tensor(prompt[None].astype(np.int64)),
            attention_mask=torch.ones((1, 8), dtype=torch.int64),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    np.testing.assert_array_equal(ours, ids[0, 8:].numpy())
    return {"logits": difference, "loss": abs(loss(logits) - loss(other)), "tokens": n}


def shake(theirs: Any) -> Any:
    """Randomise every parameter, biases and norms too, so that no term keeps a neutral init."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if value.ndim == 1:
                value += 0.3 * torch.randn_like(value)
            else:
                value.copy_(0.15 * torch.randn_like(value))
            assert value.requires_grad, name
    return theirs


# ---------------------------------------------------------------------------------------------
# Against transformers

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
IMPORTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("GPT2", {}, {}),
    "gpt2, exact gelu, wide": (
        "GPT2",
        {"activation_function": "gelu", "n_inner": 48, "layer_norm_epsilon": 1e-3},
        {"max_shard_size": "20KB"},
    ),
    "llama": ("Llama", {"num_key_value_heads": 2}, {"max_shard_size": "20KB"}),
    "llama, tied, not grouped": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3e4},
        },
        {},
    ),
    "llama 3, stretched": ("Llama", {"head_dim": 16, "rope_parameters": LLAMA3}, {}),
    "llama, linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {},
    ),
    "mistral": (
        "Mistral",
        {"num_key_value_heads": 2, "sliding_window": 5},
        {"max_shard_size": "20KB"},
    ),
    "mistral, wide heads": (
        "Mistral",
        {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 16, "hidden_size": 34},
        {},
    ),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}, {}),
    "qwen2, not grouped, windows": (
        "Qwen2",
        {
            "num_key_value_heads": None,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 0,
        },
        {},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-3}, {}),
    "smollm3": (
        "SmolLM3",
        {"num_key_value_heads": 2, "num_hidden_layers": 5, "no_rope_layer_interval": 2},
        {},
    ),
    "smollm3, all rotary but the last": (
        "SmolLM3",
        {"num_key_value_heads": 4, "num_hidden_layers": 3, "no_rope_layers": [1, 1, 0]},
        {},
    ),
    # The text is longer than the windows, so that layers differ in what they see.
    "gemma2": (
        "Gemma2",
        {
            **{"num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 3},
            **{"query_pre_attn_scalar": 20, "sliding_window": 7, "rms_norm_eps": 1e-3},
            **{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        },
        {"max_shard_size": "20KB"},
    ),
    "gemma2, no caps, stretched, untied, not grouped, layers by name": (
        "Gemma2",
        {
            **{"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": False},
            **{"query_pre_attn_scalar": 8, "sliding_window": 5},
            **{"attn_logit_softcapping": None, "final_logit_softcapping": None},
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        },
        {},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **{"num_key_value_heads": 1, "head_dim": 12, "num_hidden_layers": 4},
            **{"query_pre_attn_scalar": 30, "sliding_window": 9, "sliding_window_pattern": 3},
            **{"rope_theta": 2000.0, "rope_local_base_freq": 40.0},
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {},
    ),
    "gemma3, two bases, a cap, layers by name": (
        "Gemma3Text",
        {
            **{"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3},
            **{"sliding_window": 6, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
        {},
    ),
}


def make_theirs(transformers: Any, family: str, settings: dict[str, Any]) -> Any:
    shared = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family == "GPT2":
        sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": BLOCK}
        config = transformers.GPT2Config(**sizes, **shared, **settings)
        return shake(transformers.GPT2LMHeadModel(config))
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "max_position_embeddings": BLOCK,
    }
    config = getattr(transformers, f"{family}Config")(**{**sizes, **shared, **settings})
    return shake(getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config))


@pytest.mark.torch
@pytest.mark.parametrize("name", IMPORTS)
def test_import_equals_transformers(
    name: str, transformers: Any, tmp_path: Path, play: str, record_property: Any
):
    import torch  # pyright: ignore[reportMissingImports]

    family, settings, how = IMPORTS[name]
    theirs = make_theirs(transformers, family, settings)
    theirs.save_pretrained(tmp_path / "theirs", **how)
    loaded = pretrained.load(str(tmp_path / "theirs"))
    model = make_model(loaded.config, V, loaded.model)
    assert isinstance(model, GPT)
    text = CharTokenizer.fit(play).encode(play) % V
    figures = assert_agrees(model, loaded.params, theirs, text)
    print(name, figures)
    # Exporting gives the original tensors back.
    tensors = hf.to_tensors(loaded.params, loaded.config, loaded.gemma)
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    if loaded.config.tie_head:
        state.pop("lm_head.weight")
    for name in [name for name in state if loaded.gemma and "norm" in name]:
        close(tensors.pop(name), state.pop(name), 1e-7)  # 1 was added, and taken off again
    assert_same(tensors, state)
    # The exported config makes the same model there, and here again.
    about = hf_config.write_config(loaded.config, None, loaded.gemma)
    assert about["architectures"] == [type(theirs).__name__]
    again = type(theirs)(type(theirs.config).from_dict(about))
    again.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        x = torch.tensor(text[None, :BLOCK])
        assert_same(again.eval()(x).logits.numpy(), theirs(x).logits.numpy())
    assert hf_config.read_config(about) == (loaded.config, loaded.gemma)


@pytest.mark.torch
def test_half_precision_weights(transformers: Any, tmp_path: Path):
    import torch  # pyright: ignore[reportMissingImports]

    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        theirs = make_theirs(transformers, "Llama", {}).to(dtype)
        theirs.save_pretrained(folder)
        params = pretrained.load(str(folder)).params
        expected = theirs.model.norm.weight.float().detach().numpy()
        np.testing.assert_array_equal(params["ln_f"]["scale"], expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, play: str) -> Run:
    """A GPT-2-like model, trained for 20 steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "play.txt").write_text(play)
    config = Config(
        steps=20,
        batch_size=4,
        eval_every=20,
        save_every=20,
        model=ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=BLOCK, bias=False),
        data=DataConfig(text=str(folder / "play.txt")),
        optim=OptimConfig(learning_rate=1e-2),
    )
    train(config, folder / "run")
    return Run(folder / "run")


def weights(run: Run, step: int) -> Any:
    """The parameters of a checkpoint, on the host."""
    model = make_model(run.config.model, run.tokenizer.vocab_size)
    params = Checkpoints(run.checkpoints_path).load_params(step, model)
    return jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module")
def exported(run: Run) -> Path:
    folder = run.directory.parent / "exported"
    assert export(run.directory, folder) == "GPT2LMHeadModel"
    return folder


@pytest.mark.torch
def test_an_exported_run_equals_transformers(
    run: Run, exported: Path, transformers: Any, play: str
):
    import torch  # pyright: ignore[reportMissingImports]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = run.tokenizer.encode(play)
    assert tokenizer(play)["input_ids"] == ids.tolist()
    assert tokenizer.decode(ids) == play
    model = make_model(run.config.model, run.tokenizer.vocab_size)
    assert isinstance(model, GPT)
    print("trained run", assert_agrees(model, weights(run, 20), theirs, ids))
    # The logged validation loss equals transformers' loss on the validation split.
    val = torch.tensor(ids[int(0.9 * len(ids)) :].astype(np.int64))
    losses = []
    for start in range(0, len(val) - 1, BLOCK):
        window = val[start : start + BLOCK + 1][None]
        with torch.no_grad():
            logits = theirs(window[:, :-1]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
    logged = run.metrics()[-1]["val_loss"]
    assert abs(float(torch.stack(losses).double().mean()) - logged) < 1e-5


def test_export_import_export(run: Run, exported: Path, tmp_path: Path):
    """Exporting an imported export gives the same files, byte for byte."""
    directory = import_model(str(exported), str(tmp_path / "imported"))
    export(directory, tmp_path / "again")
    for path in exported.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    adopted = Run(directory)
    assert adopted.tokenizer == run.tokenizer
    assert adopted.config.init == str(exported)
    setup = assemble(adopted.config, run.tokenizer.vocab_size)
    moments = [leaf for leaf in jax.tree.leaves(setup.layout.opt_state) if leaf.size > 1]
    assert moments == []  # because everything is frozen


@pytest.mark.parametrize("config", [GPT2, replace(LLAMA, tie_head=False)], ids=["gpt2", "llama"])
def test_import_export_import_is_bit_identical(config: ModelConfig, tmp_path: Path):
    params = write_folder(tmp_path / "a", config)
    loaded = pretrained.load(str(tmp_path / "a"))
    assert_same(loaded.params, params)
    assert replace(loaded.config, n_kv_head=None) == replace(config, n_kv_head=None)
    tensors = hf.to_tensors(loaded.params, loaded.config)
    assert_same(tensors, safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors"))


@pytest.mark.torch
@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), ByteTokenizer(256), CharTokenizer("\n !ab", 5)]
)
def test_char_and_byte_tokenizers_in_transformers(
    tokenizer: Any, transformers: Any, tmp_path: Path
):
    for name, content in hf_tokenizer.write(tokenizer, 8).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "a b\n\n b!a" if isinstance(tokenizer, CharTokenizer) else "naïve\r\n 東京\0 \t x  y"
    ids = tokenizer.encode(text)
    assert theirs(text)["input_ids"] == ids.tolist() and theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.end_of_text
    again = hf_tokenizer.read(tmp_path)
    assert again is not None and again.encode(text).tolist() == ids.tolist()


# ---------------------------------------------------------------------------------------------
# nanoGPT


def nanogpt_logits(state: Any, x: Any, n_layer: int, n_head: int) -> Any:
    """nanoGPT's forward pass on the tensors of its checkpoint, written from its formulas."""
    import torch  # pyright: ignore[reportMissingImports]

    F = torch.nn.functional
    layer = lambda y, name: F.linear(y, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(y: Any, name: str) -> Any:
        return F.layer_norm(y, y.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"))

    T = x.shape[1]
    y = state["transformer.wte.weight"][x] + state["transformer.wpe.weight"][:T]
    for i in range(n_layer):
        at = f"transformer.h.{i}"
        q, k, v = layer(norm(y, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, dim=-1)
        heads = lambda z: z.unflatten(-1, (n_head, -1)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
        y = y + layer(seen.transpose(1, 2).flatten(2), f"{at}.attn.c_proj")
        y = y + layer(F.gelu(layer(norm(y, f"{at}.ln_2"), f"{at}.mlp.c_fc")), f"{at}.mlp.c_proj")
    return norm(y, "transformer.ln_f") @ state["lm_head.weight"].T


def nanogpt_checkpoint(path: Path, bias: bool, vocab_size: int, prefix: str = "") -> Any:
    """Write a nanoGPT checkpoint with random weights; returns its state without `prefix`."""
    import torch  # pyright: ignore[reportMissingImports]

    C, L, T = 32, 2, 16
    torch.manual_seed(1)
    shapes: dict[str, Any] = {WTE: (vocab_size, C), WPE: (T, C)}
    for i in range(L):
        at = f"transformer.h.{i}"
        shapes |= {f"{at}.{n}.weight": (C,) for n in ("ln_1", "ln_2")}
        shapes |= {f"{at}.attn.c_attn.weight": (3 * C, C), f"{at}.attn.c_proj.weight": (C, C)}
        shapes |= {f"{at}.mlp.c_fc.weight": (4 * C, C), f"{at}.mlp.c_proj.weight": (C, 4 * C)}
    shapes["transformer.ln_f.weight"] = (C,)
    if bias:
        named = list(shapes.items())
        shapes |= {
            name.replace("weight", "bias"): (shape[0],)
            for name, shape in named
            if ".w" not in name[11:15]
        }
    state = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, T, T).tril()  # causal mask
    state["lm_head.weight"] = state["transformer.wte.weight"]
    args = dict(n_layer=L, n_head=4, n_embd=C, block_size=T, bias=bias, vocab_size=vocab_size)
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": {**args, "dropout": 0.0},
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(checkpoint, path)
    return state


@pytest.mark.torch
@pytest.mark.parametrize(("bias", "prefix"), [(True, ""), (False, "_orig_mod.")])
def test_a_nanogpt_checkpoint(bias: bool, prefix: str, tmp_path: Path, play: str):
    torch = pytest.importorskip("torch", reason="needs torch")
    vocab_size = len(set(play))
    state = nanogpt_checkpoint(tmp_path / "ckpt.pt", bias, vocab_size, prefix)
    loaded = pretrained.load(str(tmp_path / "ckpt.pt"))
    assert loaded.tokenizer is None and loaded.config.bias == bias
    x = np.random.default_rng(0).integers(0, vocab_size, (3, 16))
    model = make_model(loaded.config, vocab_size)
    logits, _ = model.apply({"params": loaded.params}, jnp.asarray(x))
    expected = nanogpt_logits(state, torch.tensor(x), 2, 4).numpy()
    print("nanoGPT", np.abs(logits - expected).max())
    assert np.abs(logits - expected).max() < 1e-5 < np.abs(expected).max()
    # Its vocabulary is not in the checkpoint: it is made from the text.
    names = str(tmp_path / "ckpt.pt"), str(tmp_path / "run")
    with pytest.raises(UserError) as error:
        import_model(*names)
    assert str(error.value).startswith(f"{tmp_path}/ckpt.pt ") and "--text" in str(error.value)
    (tmp_path / "play.txt").write_text(play)
    (tmp_path / "other.txt").write_text("abc")
    with pytest.raises(UserError) as error:
        import_model(*names, text=str(tmp_path / "other.txt"))
    assert str(error.value).startswith(f"{tmp_path}/ckpt.pt has no tokenizer and a vocabulary of")
    assert f" {vocab_size}," in str(error.value) and " 3 tokens" in str(error.value)
    directory = import_model(*names, text=str(tmp_path / "play.txt"))
    assert Run(directory).tokenizer == CharTokenizer.fit(play)


# ---------------------------------------------------------------------------------------------
# Refusals name what is wrong


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")

    return edit


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


AT, EMBED = "model.layers.0.self_attn", "model.embed_tokens.weight"
REFUSED: dict[str, tuple[ModelConfig, Callable[[Path], Any], str]] = {
    "kind": (
        GPT2,
        edit_config(model_type="mamba"),
        "{}/config.json: model_type='mamba' is not supported",
    ),
    "setting": (
        GPT2,
        edit_config(scale_attn_by_inverse_layer_idx=True),
        "{}/config.json: scale_attn_by_inverse_layer_idx=True is not supported; expected False",
    ),
    "untied": (
        GPT2,
        edit_config(tie_word_embeddings=False),
        "{}/config.json: tie_word_embeddings=False is not supported; expected True",
    ),
    "activation": (
        GPT2,
        edit_config(activation_function="silu"),
        "{}/config.json: activation_function='silu' is not supported",
    ),
    "size": (
        GPT2,
        edit_config(n_layer="2"),
        "{}/config.json: n_layer='2' is not a positive integer",
    ),
    "head size": (
        LLAMA,
        edit_config(head_dim=4),
        "{}: the tensor model.layers.0.self_attn.k_proj.weight has shape (16, 32), expected",
    ),
    "bias": (
        LLAMA,
        edit_config(attention_bias=True),
        "{}/config.json: attention_bias=True is not supported; expected False",
    ),
    "scaled positions": (
        LLAMA,
        edit_config(rope_scaling={"type": "yarn", "factor": 2.0}),
        "{}/config.json: rope_type='yarn' is not supported",
    ),
    "partial positions": (
        LLAMA,
        edit_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "{}/config.json: partial_rotary_factor=0.5 is not supported; expected 1.0",
    ),
    "positions of a wrong type": (
        LLAMA,
        edit_config(rope_parameters=["default"]),
        "{}/config.json: rope_parameters=['default'] is not an object",
    ),
    "contradicting positions": (
        LLAMA,
        edit_config(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "linear"}),
        "{}/config.json: rope_scaling: rope_type='linear' contradicts rope_type='default'",
    ),
    "unknown rotary setting": (
        LLAMA,
        edit_config(rope_parameters={"rope_type": "default", "mrope_section": [1]}),
        "{}/config.json: the rotary setting mrope_section=[1] is not understood",
    ),
    "other constants of a stretch": (
        LLAMA,
        edit_config(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        "{}/config.json: high_freq_factor=None is not a finite number",
    ),
    "a stretch without bounds": (
        LLAMA,
        edit_config(rope_scaling={"rope_type": "linear", "factor": 0}),
        "{}/config.json: the rotary scaling=(0.0,) is not FACTOR",
    ),
    "two bases": (
        LLAMA,
        edit_config(rope_parameters={"rope_theta": 5e5}),
        "{}/config.json: rope_theta=10000.0 contradicts rope_theta=500000.0",
    ),
    "layers that differ": (
        MISTRAL,
        edit_config(layer_types=["full_attention", "sliding_attention"]),
        "{}/config.json: layer_types=['full_attention', 'sliding_attention'] with sliding_window=8",
    ),
    "windows in some layers": (
        replace(MISTRAL, attn_bias=True),
        edit_config(max_window_layers=1),
        "{}/config.json: max_window_layers=1 is not supported; expected 0 or 2",
    ),
    "a window that transformers would ignore": (
        LLAMA,
        edit_config(sliding_window=8),
        "{}/config.json: sliding_window=8 is not supported; expected None",
    ),
    "layers without positions, but not at intervals": (
        replace(LLAMA, n_layer=3, nope_every=3),
        edit_config(no_rope_layers=[0, 1, 0]),
        "{}/config.json: no_rope_layers=[0, 1, 0] is not supported; expected a 0 at intervals",
    ),
    "flags of too few layers": (
        replace(LLAMA, nope_every=2),
        edit_config(no_rope_layers=[1]),
        "{}/config.json: no_rope_layers has 1 values for 2 layers",
    ),
    "biases that the family lacks": (
        replace(LLAMA, attn_bias=True),
        edit_config(model_type="mistral"),
        "{}/config.json: use_sliding_window=False is not a setting of a mistral",
    ),
    "unknown setting": (
        LLAMA,
        edit_config(residual_multiplier=0.2),
        "{}/config.json: residual_multiplier=0.2 is not a setting of a llama that is understood",
    ),
    "another name of a size": (
        GPT2,
        edit_config(num_hidden_layers=1),
        "{}/config.json: num_hidden_layers=1 is not a setting of a gpt2 that is understood",
    ),
    "base beyond every float": (
        LLAMA,
        edit_config(rope_theta=10**400),
        "{}/config.json: rope_theta=1000",
    ),
    "a flag that is none": (
        LLAMA,
        edit_config(tie_word_embeddings="false"),
        "{}/config.json: tie_word_embeddings='false' is not true or false",
    ),
    "a key twice": (
        GPT2,
        lambda folder: (folder / "config.json").write_text('{"n_head": 2, "n_head": 4}'),
        "{}/config.json is damaged: the key 'n_head' is there twice",
    ),
    "another tied head": (
        LLAMA,
        edit_tensors(lambda x: x.update({"lm_head.weight": x[EMBED] + 1e-6})),
        "{}: lm_head.weight differs from model.embed_tokens.weight, and the config says that they",
    ),
    "a tensor by both of its names": (
        GPT2,
        edit_tensors(lambda x: x.update({"wte.weight": x[WTE] + 1})),
        "{}/model.safetensors: there are two tensors transformer.wte.weight",
    ),
    "a mask that is not causal": (
        GPT2,
        edit_tensors(lambda x: x.update({"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)})),
        "{}: the tensor transformer.h.0.attn.bias is not the constant that the model",
    ),
    "other rotary frequencies": (
        LLAMA,
        edit_tensors(lambda x: x.update({f"{AT}.rotary_emb.inv_freq": np.ones(4, np.float32)})),
        "{}: the tensor model.layers.0.self_attn.rotary_emb.inv_freq is not the constant",
    ),
    "more layers than any file holds": (
        GPT2,
        edit_config(n_layer=2**31 - 1),
        "{}: the tensor transformer.h.",
    ),
    "an adapter that is not merged": (
        GPT2,
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "{} has an adapter beside the weights; merge it into them first",
    ),
    "heads": (
        GPT2,
        edit_config(n_head=5),
        "{}/config.json: model.n_embd=32 is not divisible by model.n_head=5",
    ),
    "vocabulary": (
        GPT2,
        edit_config(vocab_size=60),
        "{}: the tensor transformer.wte.weight has shape (61, 32), expected (60, 32)",
    ),
    "tokenizer": (
        GPT2,
        lambda folder: [
            (folder / name).write_bytes(content)
            for name, content in hf_tokenizer.write(ByteTokenizer(), 8).items()
        ],
        "{}: its tokenizer has 256 tokens, more than the model's vocabulary size 61",
    ),
    "shape": (
        GPT2,
        edit_tensors(lambda x: x.update({WPE: x[WPE][:, :-1].copy()})),
        "{}: the tensor transformer.wpe.weight has shape (256, 31), expected (256, 32)",
    ),
    "missing": (
        GPT2,
        edit_tensors(lambda x: x.pop("transformer.h.1.ln_2.bias")),
        "{}: the tensor transformer.h.1.ln_2.bias is missing",
    ),
    "extra": (
        LLAMA,
        edit_tensors(lambda x: x.update({f"{AT}.q_norm.weight": x["model.norm.weight"].copy()})),
        "{}: unexpected tensor model.layers.0.self_attn.q_norm.weight",
    ),
    "not finite": (
        GPT2,
        edit_tensors(lambda x: x[WTE].fill(np.nan)),
        "{}: the tensor transformer.wte.weight has non-finite values",
    ),
    "integers": (
        GPT2,
        edit_tensors(lambda x: x.update({WTE: x[WTE].astype(np.int8)})),
        "{}/model.safetensors: the tensor transformer.wte.weight has dtype I8",
    ),
    "pickle": (
        GPT2,
        as_pickle,
        "{}/pytorch_model.bin is a pickle",
    ),
    "no weights": (
        GPT2,
        lambda folder: (folder / "model.safetensors").unlink(),
        "{} has no model.safetensors",
    ),
    "no config": (
        GPT2,
        lambda folder: (folder / "config.json").unlink(),
        "cannot read {}/config.json: No such file or directory",
    ),
    "config is a list": (
        GPT2,
        lambda folder: (folder / "config.json").write_text("[]"),
        "{}/config.json is damaged: expected a JSON object",
    ),
    "index leaves the folder": (
        GPT2,
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {WTE: "../model.safetensors"}})
            ),
        ),
        "{}/model.safetensors.index.json refers to files outside its folder",
    ),
    "shard is missing": (
        GPT2,
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {WTE: "model-1.safetensors"}})
            ),
        ),
        "{}/model-1.safetensors is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_folder_is_refused(name: str, tmp_path: Path):
    config, spoil, message = REFUSED[name]
    folder = tmp_path / "model"
    write_folder(folder, config)
    spoil(folder)
    with pytest.raises(UserError) as error:
        pretrained.load(str(folder))
    assert str(error.value).startswith(message.format(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000}, "rope_scaling": None},
        {"partial_rotary_factor": 1.0, "rope_interleaved": False, "is_llama_config": True},
        {"layer_types": ["full_attention"] * 2, "original_max_position_embeddings": None},
        {"use_cache": False, "torch_dtype": "bfloat16", "max_length": 20, "new_setting": None},
    ],
)
def test_settings_that_change_nothing_are_accepted(changes: dict[str, Any], tmp_path: Path):
    params = write_folder(tmp_path / "model", LLAMA)
    before = pretrained.load(str(tmp_path / "model")).config
    edit_config(**changes)(tmp_path / "model")
    loaded = pretrained.load(str(tmp_path / "model"))
    assert loaded.config == before
    assert_same(loaded.params, params)


@pytest.mark.parametrize(
    ("kind", "changes", "window"),
    [
        ("mistral", {"sliding_window": 8}, 8),
        ("mistral", {"sliding_window": BLOCK}, None),
        ("mistral", {}, None),  # 4096 tokens by transformers' default, more than the context
        ("mistral", {"max_position_embeddings": 8192}, 4096),
        ("qwen2", {"sliding_window": 8}, None),  # not in use
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, None),  # from layer 28 on
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        (
            "qwen3",
            {
                **{"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
                "layer_types": ["sliding_attention"] * 2,
            },
            8,
        ),
    ],
)
def test_the_window_that_transformers_would_take(
    kind: str, changes: dict[str, Any], window: int | None
):
    values = {**hf_config.write_config(LLAMA, None), "model_type": kind, **changes}
    assert hf_config.read_config(values).config.window == window


def test_what_a_family_takes_for_granted():
    """Where a file says nothing, each family has defaults of its own."""
    values = hf_config.write_config(replace(LLAMA, n_head=32, n_embd=64), None)
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings"):
        del values[key]
    expected = {
        "llama": (None, 2, 1e4, False, None),
        "mistral": (8, 2, 1e4, False, None),
        "qwen2": (32, 2, 1e4, False, None),
        "qwen3": (32, 128, 1e4, False, None),
        "smollm3": (4, 2, 2e6, True, 4),
    }
    for kind, wanted in expected.items():
        c, _ = hf_config.read_config({**values, "model_type": kind, "num_hidden_layers": 4})
        assert (c.n_kv_head, c.head_size, c.rope_base, c.tie_head, c.nope_every) == wanted


def test_a_header_with_a_tensor_twice_is_refused(tmp_path: Path):
    write_folder(tmp_path / "model", GPT2)
    path = tmp_path / "model" / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length].rstrip(b" "), raw[8 + length :]
    [entry] = re.findall(rb'"transformer.ln_f.bias":(\{[^}]*\})', header)
    header = header[:-1] + b',"transformer.ln_f.bias":' + entry.replace(b"F32", b"I32") + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(UserError) as error:
        pretrained.load(str(tmp_path / "model"))
    assert "the key 'transformer.ln_f.bias' is there twice" in str(error.value)


def test_an_index_that_names_another_shard_is_refused(tmp_path: Path):
    write_folder(tmp_path / "model", GPT2)
    path = tmp_path / "model" / "model.safetensors"
    path.rename(tmp_path / "model" / "model-1.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}}))
    with pytest.raises(UserError) as error:
        pretrained.load(str(tmp_path / "model"))
    assert str(error.value) == (
        f"{index} says that lm_head.weight is in model-1.safetensors, which lacks it"
    )


def test_a_truncated_file_is_refused(tmp_path: Path):
    write_folder(tmp_path / "model", GPT2)
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"^{path} is not a valid safetensors file: [^\n]*$"):
        pretrained.load(str(tmp_path / "model"))


def test_original_gpt2_files(tmp_path: Path):
    """Their tensor names lack `transformer.`, and they contain the causal mask."""
    params = write_folder(tmp_path / "model", GPT2)
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    old = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    old["h.0.attn.bias"] = np.tri(8, dtype=np.uint8)[None, None]
    old["h.0.attn.masked_bias"] = np.full(1, -1e9, np.float32)
    old["lm_head.weight"] = tensors[WTE].copy()
    safetensors.numpy.save_file(old, path)
    assert_same(pretrained.load(str(tmp_path / "model")).params, params)


@pytest.mark.torch
def test_a_malicious_pickle_is_not_executed(tmp_path: Path):
    pytest.importorskip("torch", reason="needs torch")
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    import torch  # pyright: ignore[reportMissingImports]

    for write in (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))):
        path = tmp_path / "ckpt.pt"
        write({"model": Evil(), "model_args": {}}, path)
        with pytest.raises(UserError) as error:
            pretrained.load(str(path))
        assert str(error.value).startswith(f"{path} is not a checkpoint of plain tensors")
        assert "\n" not in str(error.value) and not marker.exists()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ([1], "{} is not a nanoGPT checkpoint"),
        (
            {"model": {}, "model_args": {"n_layer": 2}},
            "{}: model_args n_head=None is not an integer",
        ),
        (
            {
                "model": {},
                "model_args": dict.fromkeys(nanogpt.SIZES, 2),
            },
            "{}: the tensor transformer.h.0.attn.c_attn.bias is missing",
        ),
    ],
)
def test_an_invalid_nanogpt_checkpoint_is_refused(checkpoint: Any, message: str, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs torch")
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(UserError) as error:
        pretrained.load(str(tmp_path / "ckpt.pt"))
    assert str(error.value).startswith(message.format(tmp_path / "ckpt.pt"))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.to_sparse(), "the tensor {} has layout torch.sparse_coo"),
        (
            lambda x: x.to("meta"),
            "the tensor {} has layout torch.strided, dtype float32 and device",
        ),
        (lambda x: x.int(), "the tensor {} has dtype int32, expected one of float64"),
        (lambda x: x + 1j, "the tensor {} has dtype complex64"),
        (lambda x: x[None], "the tensor {} has shape"),
        (lambda x: 3, "{} is not a tensor"),
    ],
)
def test_odd_tensors_of_a_checkpoint_are_refused(spoil: Any, message: str, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs torch")
    nanogpt_checkpoint(tmp_path / "ckpt.pt", True, 10)
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    name = WTE
    checkpoint["model"][name] = spoil(checkpoint["model"][name])
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert (tmp_path / "ckpt.pt").stat().st_size < 2**20
    with pytest.raises(UserError) as error:
        pretrained.load(str(tmp_path / "ckpt.pt"))
    assert str(error.value).startswith(f"{tmp_path}/ckpt.pt: " + message.format(name))


@pytest.mark.torch
def test_tensors_without_strides_cannot_fill_the_memory(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs torch")
    sizes: Any = {"n_layer": 2, "n_head": 1, "n_embd": 2**16, "block_size": 16, "vocab_size": 2**14}
    config = ModelConfig(**sizes)
    shapes = dict(hf._wanted(hf._table(config), config))
    state = {
        name: torch.ones(1).expand(shape[::-1] if name.endswith(nanogpt.TRANSPOSED) else shape)
        for name, shape in shapes.items()
    }
    torch.save({"model": state, "model_args": sizes}, tmp_path / "ckpt.pt")
    size = (tmp_path / "ckpt.pt").stat().st_size
    with pytest.raises(UserError) as error:
        pretrained.load(str(tmp_path / "ckpt.pt"))
    claimed = sum(map(math.prod, shapes.values()))
    assert f"its tensors claim {claimed} values, which {size} bytes cannot" in str(error.value)


@pytest.mark.torch
def test_weights_that_require_gradients_are_read(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs torch")
    state = nanogpt_checkpoint(tmp_path / "ckpt.pt", True, 10)
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    checkpoint["model"][WTE] = torch.nn.Parameter(checkpoint["model"][WTE])
    del checkpoint["model"]["lm_head.weight"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    loaded = pretrained.load(str(tmp_path / "ckpt.pt"))
    assert_same(loaded.params["wte"]["embedding"], state[WTE].numpy())
    checkpoint["model"]["_orig_mod." + WTE] = checkpoint["model"][WTE]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"there are two tensors transformer\.wte\.weight"):
        pretrained.load(str(tmp_path / "ckpt.pt"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes")
def test_a_pipe_or_a_name_too_long_is_refused(tmp_path: Path):
    for name in ("m.gguf", "ckpt.pt", "model"):
        os.mkfifo(tmp_path / name)  # to open it would wait for a writer
        with pytest.raises(UserError) as error:
            pretrained.load(str(tmp_path / name))
        assert str(error.value).startswith(f"{tmp_path / name} is not a regular file")
    write_folder(tmp_path / "folder", GPT2)
    (tmp_path / "folder" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UserError) as error:
        pretrained.load(str(tmp_path / "folder"))
    assert str(error.value) == f"{tmp_path}/folder/model.safetensors is missing"
    with pytest.raises(UserError, match=r"File name too long$"):
        pretrained.load("x" * 5000)


def test_other_files_are_refused(tmp_path: Path):
    for name in ("model.bin", "meta.pkl", "model.pth"):
        with pytest.raises(UserError, match=f"^{tmp_path / name} is a pickle"):
            pretrained.load(str(tmp_path / name))
    with pytest.raises(UserError) as error:
        pretrained.load(str(tmp_path / "nothing"))
    assert str(error.value).startswith(f"no model {tmp_path / 'nothing'}: ")
    for accepted in ("gpt2-xl", "hf:OWNER/NAME", "model.safetensors", ".gguf", "ckpt.pt"):
        assert accepted in str(error.value)


@pytest.mark.parametrize(
    ("change", "found", "family", "needed"),
    [
        ({"qk_norm": True}, "qk_norm=True", "GPT2LMHeadModel", "qk_norm=False"),
        ({"tie_head": False}, "tie_head=False", "GPT2LMHeadModel", "tie_head=True"),
        ({"n_kv_head": 2}, "n_kv_head=2", "GPT2LMHeadModel", "n_kv_head=None"),
        ({"activation": "swiglu"}, "activation=swiglu", "GPT2LMHeadModel", "activation=gelu"),
        ({"position": "rotary"}, "norm=layer", "LlamaForCausalLM", "norm=rms"),
        ({"head_dim": 4}, "head_dim=4", "GPT2LMHeadModel", "head_dim=None"),
    ],
)
def test_export_names_the_unsupported_option(
    change: dict[str, Any], found: str, family: str, needed: str
):
    with pytest.raises(UserError) as error:
        hf_config.write_config(replace(GPT2, **change), None)
    assert str(error.value).startswith(f"model.{found} is not supported by transformers' {family}")
    assert str(error.value).endswith(f"model.{needed}")


def test_export_does_not_overwrite(run: Run, exported: Path):
    with pytest.raises(UserError) as error:
        export(run.directory, exported)
    assert str(error.value).startswith(f"{exported} ") and "empty" in str(error.value)


# ---------------------------------------------------------------------------------------------
# The hub, and runs that start from pretrained weights


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A stand-in for the hub with one model, in a folder with the name that the library gives it;
    what is asked of it."""
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra hf")
    folder = tmp_path / "snapshots" / COMMIT
    write_folder(folder, replace(GPT2, block_size=16))
    letters = "".join(sorted(f"\n ,.:;!?{string.ascii_letters}"))
    for name, content in hf_tokenizer.write(CharTokenizer(letters), 16).items():
        (folder / name).write_bytes(content)
    found: list[tuple[str, str | None]] = []

    def snapshot_download(
        repository: str, *, revision: str | None, allow_patterns: list[str]
    ) -> str:
        found.append((repository, revision))
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return found


def test_gpt2_names_are_downloaded_from_the_hub(requested: list[Any]):
    assert pretrained.load("gpt2-xl").name == f"gpt2-xl@{COMMIT}"
    smollm = "hf:HuggingFaceTB/SmolLM2-135M"
    assert pretrained.load(smollm).name == f"{smollm}@{COMMIT}"
    assert pretrained.load(f"{smollm}@v1.0").name == f"{smollm}@{COMMIT}"
    pretrained.load(f"gpt2@{COMMIT}")
    assert requested == [
        ("openai-community/gpt2-xl", None),
        ("HuggingFaceTB/SmolLM2-135M", None),
        ("HuggingFaceTB/SmolLM2-135M", "v1.0"),
        ("openai-community/gpt2", COMMIT),
    ]
    with pytest.raises(UserError, match=r"^gpt2@ names no revision; give one after the @"):
        pretrained.load("gpt2@")
    assert pretrained.on_hub("folder@v1") == ()


def test_a_run_records_the_commit(requested: list[Any], play: str, tmp_path: Path):
    """And takes it again, also if the command says less."""
    imported = Run(import_model("hf:a/b-1.5", str(tmp_path / "run")))
    assert imported.config.init == f"hf:a/b-1.5@{COMMIT}"
    (tmp_path / "play.txt").write_text(play)
    config = Config(
        init="gpt2",
        steps=1,
        batch_size=4,
        model=ModelConfig(block_size=16),
        data=DataConfig(text=str(tmp_path / "play.txt")),
    )
    train(config, tmp_path / "tuned")
    recorded = Run(tmp_path / "tuned").config
    assert recorded.init == f"gpt2@{COMMIT}"
    del requested[:]
    train(replace(recorded, init="gpt2", steps=2), tmp_path / "tuned", resume=True)
    assert Run(tmp_path / "tuned").config == replace(recorded, steps=2)
    pretrained.initial(recorded)
    assert requested == [("openai-community/gpt2", COMMIT)]
    for other in ("gpt2-xl", f"gpt2@{COMMIT[::-1]}", "gpt2@main"):
        with pytest.raises(UserError, match=rf"^cannot resume .* with init={other}: "):
            train(replace(recorded, init=other, steps=3), tmp_path / "tuned", resume=True)


def test_no_network_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra hf")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        pretrained.load("gpt2")
    before, reason = str(error.value).split("(", 1)
    assert before == "openai-community/gpt2 could not be downloaded from the Hugging Face hub "
    assert reason.endswith("give the folder of a copy")
    assert "\n" not in reason


def test_every_model_field_belongs_to_the_weights_or_to_the_run():
    """Add a new field to `OF_A_LOADED_MODEL` or, if the weights determine it, here."""
    from dataclasses import fields

    from gptjax.config import OF_A_LOADED_MODEL

    fixed_by_weights = (
        "n_layer n_head n_kv_head head_dim n_embd n_inner vocab_size bias attn_bias norm norm_eps "
        "qk_norm qk_norm_scale position rope_base rope_scaling nope_every window activation "
        "tie_head softcap init"
    ).split()
    names = {field.name for field in fields(ModelConfig)}
    assert names == {*fixed_by_weights, *OF_A_LOADED_MODEL}


def test_a_run_starts_from_pretrained_weights(run: Run, exported: Path, play: str, tmp_path: Path):
    (tmp_path / "play.txt").write_text(play)
    config = Config(
        init=str(exported),
        steps=2,
        batch_size=4,
        eval_every=2,
        save_every=2,
        model=ModelConfig(n_layer=7, block_size=64, dropout=0.1),
        data=DataConfig(text=str(tmp_path / "play.txt")),
        optim=OptimConfig(learning_rate=1e-4),
    )
    train(config, tmp_path / "run")
    fine = Run(tmp_path / "run")
    expected = replace(run.config.model, vocab_size=run.tokenizer.vocab_size, block_size=64)
    # Exporting added GPT-2's biases, as zeros.
    assert fine.config.model == replace(expected, dropout=0.1, bias=True)
    first = weights(fine, 0)  # checkpoint 0 has the initial weights
    params = pretrained.load(str(exported)).params
    assert_same(first, {**params, "wpe": params["wpe"][:64]})
    records = fine.metrics()
    assert records[2]["val_loss"] < records[0]["val_loss"] < 4
    assert fine.tokenizer == run.tokenizer
    # Resuming reads only the run's own weights, and `init` cannot be changed.
    shutil.move(exported, tmp_path / "gone")
    try:
        train(replace(fine.config, steps=3), tmp_path / "run", resume=True)
        with pytest.raises(UserError) as error:
            train(replace(fine.config, init="gpt2"), tmp_path / "run", resume=True)
        assert str(error.value).startswith(f"cannot resume {tmp_path}/run with init=gpt2")
        assert f"init={exported}" in str(error.value)
    finally:
        shutil.move(tmp_path / "gone", exported)


def test_context_length_from_pretrained_weights():
    params = {"wpe": np.arange(8.0)[:, None]}
    loaded = pretrained.Pretrained("m", ModelConfig(block_size=8), params, None)
    for requested, block, note in (
        (4, 4, ", context cropped from 8 to 4 tokens"),
        (8, 8, ""),
        (16, 8, ", whose context is 8 tokens, not 16"),
    ):
        config = Config(init="m", model=ModelConfig(block_size=requested))
        assert pretrained.origin(config, loaded) == f"starting from m{note}"
        fitted, own = pretrained.fit(config, loaded)
        assert fitted.model.block_size == block
        np.testing.assert_array_equal(own["wpe"], params["wpe"][:block])
