"""Tests of what is trained: frozen leaves, low-rank updates, and their checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from gptjax import trainable
from gptjax.build import build_model
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from gptjax.errors import UserError
from gptjax.optim import make_optimizer
from gptjax.parallel import sharding
from gptjax.programs import Programs
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.step import init_state, make_train_steps
from gptjax.tools.replay import replay
from gptjax.tools.verify import verify
from gptjax.training import train

V = 17
GPT2 = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8)
LLAMA = replace(
    GPT2, n_head=4, n_kv_head=2, bias=False, norm="rms", position="rotary", activation="swiglu"
)
TOKENS = np.random.default_rng(0).integers(0, V, 400).astype(np.uint16)


def config_of(model: ModelConfig = GPT2, **optim: Any) -> Config:
    optim = {"learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.5, **optim}
    return Config(steps=8, batch_size=4, model=model, optim=OptimConfig(**optim))


def after(config: Config, steps: int = 3, params: Any = None) -> tuple[Any, Any]:
    """The state at step 0, on the host, and after some steps."""
    model, optimizer = build_model(config.model, V), make_optimizer(config)
    key = jax.random.key(0)
    init = jax.jit(lambda: init_state(model, optimizer, key, config.optim, params))
    state = init()
    first = jax.tree.map(np.asarray, state)
    train_steps = jax.jit(make_train_steps(model, optimizer, config))
    return first, train_steps(state, jnp.asarray(TOKENS), key, steps)[0]


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def changed(before: Any, after: Any) -> set[str]:
    old, new = leaves(before), leaves(after)
    assert old.keys() == new.keys()
    return {name for name in old if (old[name] != new[name]).any()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_leaves_stay_as_they_are_and_cost_nothing(kind: str):
    config = config_of(freeze="wte|wpe|h/attn|ln_.", kind=kind, ema=0.9)
    first, state = after(config)
    moved = {f"h/mlp/{layer}/{leaf}" for layer in ("c_fc", "c_proj") for leaf in ("kernel", "bias")}
    assert changed(first.params, state.params) == moved
    assert changed(first.average, state.average) == moved  # bit for bit, in the mean too
    # AdamW has two moments for each number that is trained, Muon one for those of matrices.
    count = {name: leaf.size for name, leaf in leaves(first.params).items() if name in moved}
    matrices = sum(size for name, size in count.items() if name.endswith("kernel"))
    expected = 2 * sum(count.values()) - (matrices if kind == "muon" else 0)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1)
    assert moments == expected


def test_what_is_left_trains_as_if_nothing_was_frozen():
    """The first step of plain AdamW moves each leaf by its own gradient alone."""
    model = replace(GPT2, n_layer=1)
    _, all_moved = after(config_of(model, grad_clip=None), steps=1)
    _, some_moved = after(config_of(model, grad_clip=None, freeze="wte"), steps=1)
    a, b = leaves(all_moved.params), leaves(some_moved.params)
    for name in a.keys() - {"wte/embedding"}:
        np.testing.assert_allclose(b[name], a[name], rtol=0, atol=1e-6, err_msg=name)


def numpy_merged(params: Any) -> dict[str, np.ndarray]:
    """Each update added to its matrix, slice by slice."""
    flat = leaves(params)
    result = {name: x for name, x in flat.items() if "lora" not in name}
    for name in flat:
        if name.endswith("lora_a"):
            at = name.removesuffix("lora_a")
            a, b = flat[name].astype(np.float64), flat[f"{at}lora_b"].astype(np.float64)
            kernel, r = flat[f"{at}kernel"].astype(np.float64), a.shape[-1]
            layer = at.split("/")[-2]
            for i in range(len(kernel)):
                if layer in ("c_attn", "c_kv") or (kernel.ndim == 4 and layer == "c_fc"):
                    for j in range(kernel.shape[2]):  # queries, keys, values; or gate and up
                        kernel[i, :, j] += (a[i, :, j] @ b[i, j].reshape(r, -1)).reshape(
                            kernel[i, :, j].shape
                        )
                else:
                    product = a[i].reshape(-1, r) @ b[i].reshape(r, -1)
                    kernel[i] += product.reshape(kernel[i].shape)
            result[f"{at}kernel"] = kernel
    return result


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_low_rank_updates(model: ModelConfig):
    config = config_of(model, lora_rank=2)
    params = jax.tree.map(np.asarray, random_params(build_model(model, V)))
    first, state = after(config, params=params)
    # At first the model is the one that was loaded, exactly.
    assert changed(trainable.merged(first.params), params) == set()
    # Only updates are trained, and AdamW keeps moments of nothing else.
    lora = {name for name in leaves(first.params) if "lora" in name}
    assert changed(first.params, state.params) == lora
    n_lora = sum(leaves(first.params)[name].size for name in lora)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * n_lora
    # What is sampled is the base and the updates, added by hand.
    merged, by_hand = leaves(state.weights), numpy_merged(state.params)
    assert merged.keys() == by_hand.keys() == leaves(params).keys()
    for name, x in merged.items():
        np.testing.assert_allclose(x, by_hand[name], rtol=0, atol=1e-6, err_msg=name)
    kernels = {name for name in merged if name.startswith("h/") and name.endswith("kernel")}
    assert changed(params, state.weights) == kernels
    ranks = [
        np.linalg.matrix_rank(
            (merged[name] - leaves(params)[name])[0, :, 0].reshape(16, -1), tol=1e-6
        )
        for name in kernels & {"h/attn/c_attn/kernel", "h/attn/c_kv/kernel"}
    ]
    assert ranks == [2]


def test_targets_of_low_rank_updates():
    config = config_of(lora_rank=3, lora_targets="attn/c_attn")
    params = jax.tree.map(np.asarray, random_params(build_model(GPT2, V)))
    first = trainable.add_lora(params, config.optim, jax.random.key(0))
    shapes = {name: x.shape for name, x in leaves(first).items() if "lora" in name}
    assert shapes == {
        "h/attn/c_attn/lora_a": (2, 16, 3, 3),
        "h/attn/c_attn/lora_b": (2, 3, 3, 2, 8),
    }
    a = leaves(first)["h/attn/c_attn/lora_a"]
    assert a.std() == pytest.approx(1 / 4, rel=0.2)  # 1 / sqrt(C)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"freeze": "wtf"}, "optim.freeze='wtf' fits no parameter; there are h/attn/c_attn/bias, "),
        ({"lora_rank": 2, "lora_targets": "x"}, "optim.lora_targets='x' fits no parameter; there "),
        (
            {"lora_rank": 2, "lora_targets": "wte"},
            "optim.lora_targets='wte' fits no matrix of a block; there are h/attn/c_attn/kernel, "
            "h/attn/c_proj/kernel, h/mlp/c_fc/kernel, h/mlp/c_proj/kernel",
        ),
    ],
)
def test_a_pattern_that_fits_nothing(optim: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        Programs(config_of(**optim), V)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"freeze": "wte", "lora_rank": 2},
            "optim.freeze='wte' and optim.lora_rank=2 exclude each other (LoRA freezes all but its "
            "updates); leave one of them out",
        ),
        ({"lora_rank": 0}, "optim.lora_rank=0 is too small; give 1 or more"),
        (
            {"freeze": "("},
            "optim.freeze='(' is not a regular expression: missing ), unterminated subpattern at "
            "position 0",
        ),
    ],
)
def test_a_config_that_cannot_be(optim: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        OptimConfig(**optim)
    assert str(error.value) == message


def test_updates_have_rules_of_their_own():
    model = replace(LLAMA, n_layer=1)
    config = replace(config_of(model, lora_rank=2), mesh=MeshConfig(fsdp=2, tensor=2))
    programs = Programs(config, V)
    names = leaves(jax.tree.map(lambda x: np.zeros(()), programs.abstract.params))
    for name in names:
        fitting = [p for p, _ in sharding.RULES if sharding.re.search(rf"(^|/){p}$", name)]
        assert fitting, name
    # The same steps on a mesh as on one device.
    one, tokens = Programs(replace(config, mesh=MeshConfig(data=1)), V), jnp.asarray(TOKENS)
    results = []
    for p in (programs, one):
        state, out = p.train_steps(p.start(), p.put(tokens), p.seed_key, 3)
        results.append((np.asarray(out.loss), leaves(state.weights)))
    np.testing.assert_allclose(results[0][0][:3], results[1][0][:3], rtol=0, atol=1e-5)
    for name, x in results[0][1].items():
        np.testing.assert_allclose(x, results[1][1][name], rtol=0, atol=1e-4, err_msg=name)


def test_a_run_with_low_rank_updates(tmp_path: Path, play: str):
    """Saved, resumed bit for bit, verified, replayed; nothing is left to train refuses."""
    (tmp_path / "play.txt").write_text(play)
    config = replace(
        config_of(replace(GPT2, n_layer=1), lora_rank=2, ema=0.5),
        steps=6,
        eval_every=3,
        save_every=3,
        data=DataConfig(text=str(tmp_path / "play.txt")),
    )
    train(config, tmp_path / "whole")
    train(replace(config, steps=3), tmp_path / "parts")
    run = Run(tmp_path / "parts")
    train(replace(run.config, steps=6), run.directory, resume=True)
    whole = Run(tmp_path / "whole")
    programs = Programs(config, run.tokenizer.vocab_size)
    states = [programs.restore(Checkpoints(r.checkpoints_path), 6) for r in (whole, run)]
    assert changed(*states) == set()
    assert changed(states[0].weights, trainable.merged(states[0].params))  # for it is the average
    losses = lambda r: [record.get("loss") for record in r.metrics()]
    # The rate is constant, so that the parts are those of the whole.
    assert losses(run) == losses(whole)
    assert all(check.sound for check in verify(str(whole.directory)))
    assert replay(whole.directory, 5)["loss"] == whole.metrics()[5]["loss"]
    with pytest.raises(UserError) as error:
        train(replace(config, optim=OptimConfig(freeze=".*")), tmp_path / "none")
    assert str(error.value) == (
        "optim.freeze='.*' leaves nothing to train; give a narrower one, or start a new run from "
        "this one with --init"
    )
