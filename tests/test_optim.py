"""Tests of the optimizer against plain numpy, and that every field of the configs has an effect."""

import math
import re
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import abstract_params, by_path

from gptjax import assembly
from gptjax.assembly import assemble
from gptjax.config import Config, MeshConfig, ModelConfig, OptimConfig
from gptjax.lecture.models import Bigram
from gptjax.model import GPT
from gptjax.optim import decay_mask, make_optimizer, make_schedule

core = pytest.mark.core

VOCAB = 11
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=4)
OPTIM = OptimConfig(learning_rate=0.01, warmup_steps=4, weight_decay=0.1, grad_clip=0.5)
MUON = replace(OPTIM, kind="muon", muon_weight_decay=0.1, schedule="wsd")
STEPS = 20


def rates(optim: OptimConfig, steps: int = STEPS) -> np.ndarray:
    schedule = make_schedule(optim, steps)
    return np.array([schedule(step) for step in range(steps + 3)], np.float32)


# ---------------------------------------------------------------------------------------------
# Schedule


@core
def test_cosine_schedule():
    rate = rates(OPTIM)
    # The first update moves already.
    assert rate[:4] == pytest.approx([0.002, 0.004, 0.006, 0.008])
    assert rate[4] == np.float32(0.01)
    assert rate[12] == pytest.approx(0.01 * (0.1 + 0.9 / 2))  # halfway down
    for step in range(4, 21):
        cosine = (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        assert rate[step] == pytest.approx(0.01 * (0.1 + 0.9 * cosine)), step
    assert rate[20:] == pytest.approx(0.01 * 0.1)  # and it stays there


@core
def test_warm_up_stable_decay():
    rate = rates(replace(OPTIM, schedule="wsd", decay_share=0.4))
    assert rate[:4] == pytest.approx([0.002, 0.004, 0.006, 0.008])
    assert rate[4:13] == pytest.approx(0.01)  # the last 8 of 20 steps decay
    for step in range(12, 21):
        assert rate[step] == pytest.approx(0.01 - 0.009 * (step - 12) / 8), step
    assert rate[20:] == pytest.approx(0.001)


@core
def test_a_schedule_of_its_own_length():
    """A run that ends early or is extended has the rates of the schedule, whatever its steps."""
    own = replace(OPTIM, schedule_steps=STEPS)
    assert rates(own, steps=STEPS + 20)[: STEPS + 3] == pytest.approx(rates(OPTIM))
    assert rates(own, steps=8)[:9] == pytest.approx(rates(OPTIM)[:9])
    wsd = replace(own, schedule="wsd")
    assert rates(wsd, steps=8)[:9] == pytest.approx(rates(replace(OPTIM, schedule="wsd"))[:9])


@core
def test_the_decay_never_overlaps_the_warm_up():
    rate = rates(replace(OPTIM, schedule="wsd", decay_share=1.0))
    assert rate[[4, 12, 20]] == pytest.approx([0.01, 0.0055, 0.001])


@core
def test_constant_schedule():
    rate = rates(replace(OPTIM, schedule="constant"))
    assert rate[:4] == pytest.approx(rates(OPTIM)[:4])
    assert set(rate[4:]) == {np.float32(0.01)}


@core
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_without_warm_up_the_first_rate_is_the_peak(schedule):
    assert rates(replace(OPTIM, schedule=schedule, warmup_steps=0))[0] == np.float32(0.01)


@core
def test_a_run_that_is_all_warm_up():
    rate = rates(OPTIM, steps=4)
    assert rate[0] == pytest.approx(0.002) and rate[4] == np.float32(0.01)
    assert np.all(np.diff(rate[:5]) > 0)


# ---------------------------------------------------------------------------------------------
# Decay mask


@core
def test_decay_mask_of_a_gpt():
    """Leaf by leaf: those of a stack have an axis more, so that norms look like matrices."""
    untied = replace(MODEL, tie_head=False)
    assert by_path(decay_mask(abstract_params(GPT(untied, VOCAB)))) == {
        "wte/embedding": True,
        "wpe": True,
        "h/ln_1/scale": False,
        "h/ln_1/bias": False,
        "h/attn/c_attn/kernel": True,
        "h/attn/c_attn/bias": False,
        "h/attn/c_proj/kernel": True,
        "h/attn/c_proj/bias": False,
        "h/ln_2/scale": False,
        "h/ln_2/bias": False,
        "h/mlp/c_fc/kernel": True,
        "h/mlp/c_fc/bias": False,
        "h/mlp/c_proj/kernel": True,
        "h/mlp/c_proj/bias": False,
        "ln_f/scale": False,
        "ln_f/bias": False,
        "lm_head/kernel": True,
        "lm_head/bias": False,
    }


@core
def test_decay_mask_of_a_bigram():
    bigram = Bigram(MODEL, VOCAB)
    assert by_path(decay_mask(abstract_params(bigram))) == {"wte/embedding": True}


# ---------------------------------------------------------------------------------------------
# AdamW


def random_trees(count: int) -> list[Any]:
    """Trees with a decayed leaf and one that is not, the norm well above any grad_clip here."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    return [
        {"layer": {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}}
        for _ in range(count)
    ]


def numpy_adamw(
    o: OptimConfig, params: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Loshchilov and Hutter 2019, algorithm 2, after clipping; in float64."""
    params = {name: p.astype(np.float64) for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for t, grads in enumerate(gradients, start=1):
        norm = math.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in grads.values()))
        shrink = 1.0 if o.grad_clip is None else min(1.0, o.grad_clip / norm)
        rate = float(np.asarray(make_schedule(o, STEPS)(t - 1)))
        for name, p in params.items():
            g = grads[name] * shrink
            m[name] = o.beta1 * m[name] + (1 - o.beta1) * g
            v[name] = o.beta2 * v[name] + (1 - o.beta2) * g**2
            step = m[name] / (1 - o.beta1**t) / (np.sqrt(v[name] / (1 - o.beta2**t)) + 1e-8)
            decay = o.weight_decay if name == "kernel" else 0.0
            params[name] = p - rate * (step + decay * p)
    return params


@core
@pytest.mark.parametrize("grad_clip", [0.5, 100.0, None])
def test_adamw_equals_numpy(grad_clip):
    optim = replace(OPTIM, grad_clip=grad_clip)
    params, *gradients = random_trees(4)
    # The second gradient is small, so that clipping changes the mean, not just the scale.
    gradients[1] = jax.tree.map(lambda g: g * np.float32(0.01), gradients[1])
    optimizer = make_optimizer(optim, STEPS)
    new: Any = params
    state = optimizer.init(new)
    for grads in gradients:
        updates, state = optimizer.update(grads, state, new)
        new = optax.apply_updates(new, updates)
    expected = numpy_adamw(optim, params["layer"], [g["layer"] for g in gradients])
    for name, value in expected.items():
        np.testing.assert_allclose(new["layer"][name], value, atol=1e-6, rtol=0)


@core
def test_clipping_and_decay_change_the_reference():
    """Else the comparison above could not fail."""
    params, *gradients = (tree["layer"] for tree in random_trees(4))
    gradients[1] = {name: g * 0.01 for name, g in gradients[1].items()}
    answers = [
        numpy_adamw(optim, params, gradients)["kernel"]
        for optim in (OPTIM, replace(OPTIM, grad_clip=None), replace(OPTIM, weight_decay=0.0))
    ]
    assert np.abs(answers[0] - answers[1]).max() > 1e-5
    assert np.abs(answers[0] - answers[2]).max() > 1e-5


# ---------------------------------------------------------------------------------------------
# Muon


def numpy_orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Five steps of the quintic iteration, applied to the singular values: it changes no others."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ vt


def by_hand(name: str, kernel: np.ndarray) -> list[np.ndarray]:
    """A stacked kernel's matrices, each (input, output), as views."""
    match name, kernel.ndim:
        case (("c_attn" | "c_kv"), 5):
            parts = [layer[:, i] for layer in kernel for i in range(kernel.shape[2])]
        case "c_fc", 4:
            parts = [layer[:, i] for layer in kernel for i in range(2)]
        case "c_proj", 4:
            return [layer.reshape(-1, kernel.shape[-1]) for layer in kernel]
        case _:
            parts = list(kernel)
    return [part.reshape(kernel.shape[1], -1) for part in parts]


@pytest.mark.parametrize(
    "model", [MODEL, replace(MODEL, n_kv_head=1, activation="swiglu", tie_head=False)]
)
def test_muon_equals_svd(model):
    """Two updates of the blocks' kernels; everything else moves as AdamW alone would move it."""
    o, rng = replace(MUON, grad_clip=None), np.random.default_rng(0)
    shapes = abstract_params(GPT(model, VOCAB))
    draw = lambda: jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    start, gradients = draw(), [draw(), draw()]

    def after(o: OptimConfig) -> dict[str, np.ndarray]:
        optimizer, params = make_optimizer(o, STEPS), jax.tree.map(jnp.asarray, start)
        state = optimizer.init(params)
        for grads in gradients:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return by_path(jax.tree.map(np.asarray, params))

    muon, adamw = after(o), after(replace(o, kind="adamw"))
    kernels = 0
    for path, new in muon.items():
        if not (path.startswith("h/") and path.endswith("/kernel")):
            np.testing.assert_allclose(new, adamw[path], atol=1e-7)
            continue
        kernels += 1
        name = path.split("/")[2]
        old = by_hand(name, by_path(start)[path].astype(np.float64))
        grads = [by_hand(name, by_path(g)[path].astype(np.float64)) for g in gradients]
        for i, matrix in enumerate(old):
            momentum = np.zeros_like(matrix)
            for t in (1, 2):
                momentum = 0.95 * momentum + 0.05 * grads[t - 1][i]
                # Nesterov: the mean as it would be after this gradient once more.
                ahead = 0.95 * momentum / (1 - 0.95 ** (t + 1))
                ahead += 0.05 * grads[t - 1][i] / (1 - 0.95**t)
                n_in, n_out = matrix.shape
                step = numpy_orthogonal(ahead) * math.sqrt(max(1, n_out / n_in))
                rate = float(np.asarray(make_schedule(o, STEPS, o.muon_learning_rate)(t - 1)))
                matrix = matrix - rate * (step + o.muon_weight_decay * matrix)
            np.testing.assert_allclose(by_hand(name, new)[i], matrix, atol=2e-5)
    assert kernels == (5 if model.n_kv_head else 4)


# ---------------------------------------------------------------------------------------------
# Every field of the configs has an effect

OTHER_OPTIM: dict[str, Any] = {
    "kind": "adamw",
    "learning_rate": 0.02,
    "muon_learning_rate": 0.03,
    "muon_momentum": 0.9,
    "muon_weight_decay": 0.2,
    "decay_share": 0.3,
    "schedule": "constant",
    "warmup_steps": 2,
    "schedule_steps": 77,
    "final_lr_ratio": 0.2,
    "weight_decay": 0.2,
    "beta1": 0.8,
    "beta2": 0.98,
    "ema": 0.99,
    "grad_clip": None,
    "accumulate": 2,
    "freeze": "wte",
    "lora_rank": 2,
    "lora_targets": "attn",
}
OTHER_MODEL: dict[str, Any] = {
    "n_layer": 3,
    "n_head": 4,
    "n_kv_head": 1,
    "n_embd": 16,
    "head_dim": 6,
    "n_inner": 5,
    "block_size": 8,
    "vocab_size": 16,
    "dropout": 0.1,
    "attn_dropout": 0.1,
    "bias": False,
    "attn_bias": False,
    "norm": "rms",
    "norm_eps": 1e-6,
    "qk_norm": True,
    "qk_norm_scale": True,
    "position": "learned",
    "rope_base": 100.0,
    "rope_scaling": (2.0,),
    "nope_every": 2,
    "activation": "swiglu",
    "window": 2,
    "softcap": 10.0,
    "tie_head": False,
    "init": "zero",
    "dtype": "bfloat16",
    "remat": True,
    "remat_saves": "dots",
}
NEEDS: dict[str, dict[str, Any]] = {  # another field without which one has no effect
    "lora_targets": {"lora_rank": 2},
    "remat_saves": {"remat": True},
    "qk_norm_scale": {"qk_norm": True},
}
# A config in which every field has an effect.
EVERYTHING = Config(
    steps=STEPS,
    batch_size=4,
    model=replace(MODEL, position="rotary"),
    optim=MUON,
    mesh=MeshConfig(data=1),
)


def fingerprint(config: Config) -> str:
    """The programs that a config makes, as text: how it starts, and how it steps."""
    setup = assemble(config, VOCAB)
    programs = jax.make_jaxpr(setup.start)(), assembly.trace(setup, 100).jaxpr
    return re.sub(r"0x[0-9a-f]+", "", "\n".join(map(str, programs)))  # addresses vary


@pytest.fixture(scope="module")
def base() -> str:
    text = fingerprint(EVERYTHING)
    assert text == fingerprint(EVERYTHING)  # or every comparison below would hold for no reason
    return text


@core
def test_every_field_has_a_test():
    assert set(OTHER_OPTIM) == {f.name for f in fields(OptimConfig)}
    # attention chooses a kernel for the devices: tests/test_kernels.py
    assert {*OTHER_MODEL, "attention"} == {f.name for f in fields(ModelConfig)}


@pytest.mark.parametrize("name", OTHER_OPTIM)
def test_every_field_of_the_optimizer_has_an_effect(name, base):
    optim = replace(EVERYTHING.optim, **NEEDS.get(name, {}))
    if name in NEEDS:
        base = fingerprint(replace(EVERYTHING, optim=optim))
    optim = replace(optim, **{name: OTHER_OPTIM[name]})
    assert fingerprint(replace(EVERYTHING, optim=optim)) != base


@pytest.mark.parametrize("name", OTHER_MODEL)
def test_every_field_of_the_model_has_an_effect(name, base):
    model = replace(EVERYTHING.model, **NEEDS.get(name, {}))
    if name in NEEDS:
        base = fingerprint(replace(EVERYTHING, model=model))
    model = replace(model, **{name: OTHER_MODEL[name]})
    assert fingerprint(replace(EVERYTHING, model=model)) != base


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"steps": 21}, {"steps_per_dispatch": 3}])
def test_every_field_of_the_step_has_an_effect(change, base):
    assert fingerprint(replace(EVERYTHING, **change)) != base
