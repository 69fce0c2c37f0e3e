"""Tests of freezing and LoRA: what is trained, what is sampled, and the checkpoints of both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import by_path, random_params
from run_helpers import QUIET, assert_same, message, records, text_file

from gptjax import optim
from gptjax.assembly import assemble
from gptjax.config import Config, MeshConfig, ModelConfig, OptimConfig
from gptjax.model import GPT
from gptjax.parallel import sharding
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.tools.replay import replay
from gptjax.tools.verify import verify
from gptjax.training import train

V = 17
GPT2 = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8)
LLAMA = replace(
    GPT2, n_head=4, n_kv_head=2, bias=False, norm="rms", position="rotary", activation="swiglu"
)
TOKENS = np.random.default_rng(0).integers(0, V, 400).astype(np.uint16)


def config_of(model: ModelConfig = GPT2, **settings: Any) -> Config:
    settings = {"learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.5, **settings}
    mesh = MeshConfig(data=1)
    return Config(steps=8, batch_size=4, model=model, optim=OptimConfig(**settings), mesh=mesh)


def after(config: Config, steps: int = 3, params: Any = None) -> tuple[Any, Any]:
    """The state at step 0, on the host, and after some steps."""
    setup = assemble(config, V)
    state = setup.start(params)
    first = jax.tree.map(np.asarray, state)
    return first, setup.steps(state, jnp.asarray(TOKENS), setup.seed_key(), 0, steps)[0]


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in by_path(tree).items()}


def changed(before: Any, after: Any) -> set[str]:
    old, new = leaves(before), leaves(after)
    assert old.keys() == new.keys()
    return {name for name in old if (old[name] != new[name]).any()}


def united(state: Any) -> Any:
    """All parameters, trained or frozen, low-rank updates beside their matrices."""
    return optim.unite(state.params, state.frozen)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_leaves_stay_as_they_are_and_cost_nothing(kind: str):
    config = config_of(freeze="wte|wpe|h/attn|ln_.", kind=kind, ema=0.9)
    first, state = after(config)
    moved = {f"h/mlp/{layer}/{leaf}" for layer in ("c_fc", "c_proj") for leaf in ("kernel", "bias")}
    assert changed(united(first), united(state)) == moved
    assert changed(first.weights, state.weights) == moved  # bit for bit, in the EMA too
    assert set(leaves(state.params)) == set(leaves(state.ema)) == moved
    # AdamW has two moments for each number that is trained, Muon one for those of matrices.
    count = {name: leaf.size for name, leaf in leaves(first.params).items()}
    matrices = sum(size for name, size in count.items() if name.endswith("kernel"))
    expected = 2 * sum(count.values()) - (matrices if kind == "muon" else 0)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1)
    assert moments == expected


def test_the_rest_trains_as_if_nothing_was_frozen():
    """The first step of plain AdamW moves each leaf by its own gradient alone."""
    model = replace(GPT2, n_layer=1)
    _, all_moved = after(config_of(model, grad_clip=None), steps=1)
    _, some_moved = after(config_of(model, grad_clip=None, freeze="wte"), steps=1)
    a, b = leaves(all_moved.params), leaves(united(some_moved))
    assert a.keys() == b.keys()
    for name in a.keys() - {"wte/embedding"}:
        np.testing.assert_allclose(b[name], a[name], rtol=0, atol=1e-6, err_msg=name)


def test_split_and_join_undo_each_other():
    params = jax.tree.map(np.asarray, random_params(GPT(GPT2, V)))
    options: list[dict[str, Any]] = [{}, {"freeze": "wte|mlp"}, {"lora_rank": 2}]
    for settings in options:
        trained, frozen = optim.split(params, OptimConfig(**settings), jax.random.key(0))
        whole = optim.unite(trained, frozen)
        assert_same(optim.join(trained, frozen), params)
        assert_same(optim.without_lora(whole), params)
        assert_same(optim.separate(whole, trained, frozen), (trained, frozen))
    assert optim.split(params, OptimConfig(), jax.random.key(0)) == (params, None)


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
    params = jax.tree.map(np.asarray, random_params(GPT(model, V)))
    first, state = after(config, params=params)
    # At first the model is the one that was loaded, exactly.
    assert changed(first.weights, params) == set()
    # Only updates are trained, and AdamW keeps moments of nothing else.
    lora = {name for name in leaves(united(first)) if "lora" in name}
    assert set(leaves(state.params)) == lora
    assert changed(united(first), united(state)) == lora
    n_lora = sum(leaves(first.params)[name].size for name in lora)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * n_lora
    # What is sampled is the base and the updates, added by hand.
    merged, by_hand = leaves(state.weights), numpy_merged(united(state))
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
    params = jax.tree.map(np.asarray, random_params(GPT(GPT2, V)))
    first = optim.add_lora(params, 3, "attn/c_attn", jax.random.key(0))
    shapes = {name: x.shape for name, x in leaves(first).items() if "lora" in name}
    assert shapes == {
        "h/attn/c_attn/lora_a": (2, 16, 3, 3),
        "h/attn/c_attn/lora_b": (2, 3, 3, 2, 8),
    }
    a = leaves(first)["h/attn/c_attn/lora_a"]
    assert a.std() == pytest.approx(1 / 4, rel=0.2)  # 1 / sqrt(C)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"freeze": "wtf"}, "optim.freeze='wtf' matches no parameter; there are h/attn/c_attn/"),
        ({"lora_rank": 2, "lora_targets": "x"}, "optim.lora_targets='x' matches no parameter; "),
        (
            {"lora_rank": 2, "lora_targets": "wte"},
            "optim.lora_targets='wte' matches no matrix of a block; there are "
            "h/attn/c_attn/kernel, h/attn/c_proj/kernel, h/mlp/c_fc/kernel, h/mlp/c_proj/kernel",
        ),
    ],
)
def test_a_pattern_that_matches_nothing(settings: dict[str, Any], expected: str):
    assert message(assemble, config_of(**settings), V).startswith(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"freeze": "wte", "lora_rank": 2},
            "optim.freeze='wte' and optim.lora_rank=2 exclude each other",
        ),
        ({"lora_rank": 0}, "optim.lora_rank=0 is too small; give 1 or more"),
        ({"freeze": "("}, "optim.freeze='(' is not a regular expression: missing )"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], expected: str):
    assert message(OptimConfig, **settings).startswith(expected)


def test_low_rank_updates_on_a_mesh():
    model = replace(LLAMA, n_layer=1)
    config = replace(config_of(model, lora_rank=2), mesh=MeshConfig(fsdp=2, tensor=2))
    setup = assemble(config, V)
    for name in by_path(united(setup.layout)):
        matching = [p for p, _ in sharding.RULES if sharding.re.search(rf"(^|/){p}$", name)]
        assert matching, name
    # The same steps on a mesh as on one device.
    one = assemble(replace(config, mesh=MeshConfig(data=1)), V)
    results = []
    for made in (setup, one):
        tokens = sharding.put(made.mesh, TOKENS)
        state, out = made.steps(made.start(), tokens, made.seed_key(), 0, 3)
        results.append((np.asarray(out["loss"]), leaves(state.weights)))
    np.testing.assert_allclose(results[0][0][:3], results[1][0][:3], rtol=0, atol=1e-5)
    for name, x in results[0][1].items():
        np.testing.assert_allclose(x, results[1][1][name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("ema", [0.5, None])
def test_a_run_with_low_rank_updates(tmp_path: Path, play: str, ema: float | None):
    """Saved, resumed bit for bit, verified and replayed."""
    config = replace(
        config_of(replace(GPT2, n_layer=1), lora_rank=2, ema=ema),
        steps=6,
        eval_every=3,
        save_every=3,
        data=text_file(tmp_path, play),
    )
    train(config, tmp_path / "whole", report=QUIET)
    train(replace(config, steps=3), tmp_path / "parts", report=QUIET)
    run = Run(tmp_path / "parts")
    train(replace(run.config, steps=6), run.directory, resume=True, report=QUIET)
    whole = Run(tmp_path / "whole")
    setup = assemble(config, run.tokenizer.vocab_size)
    states = [Checkpoints(r.checkpoints_path).restore(6, setup.layout) for r in (whole, run)]
    assert_same(*states)
    averaged = changed(states[0].weights, optim.join(states[0].params, states[0].frozen))
    assert bool(averaged) == (ema is not None)
    # The rate is constant, so that the parts are those of the whole; step 3 was the last of one.
    losses = lambda r: [record.get("loss") for record in records(r.directory)]
    assert losses(run) == losses(whole)
    assert all(check.sound for check in verify(str(whole.directory)))
    assert replay(whole.directory, 5, report=QUIET)["loss"] == whole.metrics()[5]["loss"]


def test_freezing_everything_is_refused(tmp_path: Path, play: str):
    config = replace(config_of(freeze=".*"), data=text_file(tmp_path, play))
    refused = message(train, config, tmp_path / "none", report=QUIET)
    assert refused.startswith("optim.freeze='.*' leaves nothing to train; ")
    assert not (tmp_path / "none").exists()
