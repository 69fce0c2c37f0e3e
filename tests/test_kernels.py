"""Tests of the attention kernels: equality with plain attention, and selection."""

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.attention import Kernel, attention, causal_attention, causal_mask
from gptjax.batches import Batch
from gptjax.config import MeshConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.loss import next_token_loss
from gptjax.model import GPT, CausalSelfAttention
from gptjax.parallel import kernels
from gptjax.parallel.sharding import make_mesh

CONFIG = ModelConfig(
    n_layer=1, n_head=4, n_kv_head=2, n_embd=32, block_size=128, position="rotary", attention="auto"
)
interpreted = functools.partial(kernels.splash, interpret=True)


def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attention(q, k, v, causal_mask(q.shape[1], q.shape[1]))


def value_and_gradients(attend: Any, q: Any, k: Any, v: Any) -> Any:
    """The output, and the gradients of a weighted sum of it."""
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = attend(q, k, v)
        return (y.astype(jnp.float32) * weights).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [y, *gradients]


def drawn(B: int, T: int, H: int, G: int, D: int, dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, heads, D)), dtype) for heads in (H, G, G)]


# ---------------------------------------------------------------------------------------------
# Equality with plain attention


@pytest.mark.parametrize(
    ("sizes", "dtype", "tolerance"),
    [
        ((2, 128, 2, 2, 16), "float32", 1e-5),
        ((1, 384, 4, 2, 64), "float32", 1e-5),  # three blocks; queries share keys
        ((2, 256, 2, 2, 64), "bfloat16", 2e-2),
    ],
)
def test_splash_equals_plain_attention_and_its_gradients(sizes, dtype, tolerance):
    inputs = drawn(*sizes, dtype=dtype)
    expected = value_and_gradients(plain, *inputs)
    for x, y in zip(value_and_gradients(interpreted, *inputs), expected, strict=True):
        assert x.dtype == y.dtype == dtype
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        assert np.abs(x - y).max() < tolerance * max(1, np.abs(y).max())


@pytest.mark.parametrize("n_kv_head", [4, 1])
def test_each_device_computes_its_rows_and_heads(monkeypatch, n_kv_head):
    """As if the devices were TPUs; a single key head is repeated for the tensor axis."""
    shapes = set()

    def splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        shapes.update({q.shape, k.shape, v.shape})
        return interpreted(q, k, v)

    monkeypatch.setattr(kernels, "splash", splash)
    monkeypatch.setattr(kernels, "_unfit", lambda *_: None)
    model = replace(CONFIG, n_kv_head=n_kv_head, attention="splash")
    kernel = kernels.make_kernel(model, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), rows=4))
    assert kernel is not None
    shapes.clear()  # of the trial on one row and head
    inputs = drawn(4, 128, 4, n_kv_head, 8)
    for x, y in zip(*(value_and_gradients(a, *inputs) for a in (kernel, plain)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert shapes == {(1, 128, 2, 8)}


def test_a_gpt_with_the_kernel_equals_the_plain_gpt():
    """The loss and its gradient."""
    rows = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 129)), jnp.int32)
    batch, key = Batch.of_windows(rows), jax.random.key(0)
    models = [GPT(CONFIG, 11), GPT(CONFIG, 11, kernel=Kernel(interpreted))]
    params = jax.jit(models[0].init)(key, batch.inputs)["params"]
    results = [
        jax.jit(jax.value_and_grad(functools.partial(next_token_loss, m), has_aux=True))(
            params, batch, key
        )
        for m in models
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *results)


class Called(Exception):
    pass


def refuse(*_: Any) -> Any:
    raise Called


def test_the_kernel_runs_in_training_and_evaluation_only():
    """Not with attention dropout, with a cache, with a window or while weights are captured."""
    tokens = jnp.zeros((1, 128), jnp.int32)

    def trace(model: GPT, **options: Any) -> Any:
        params = jax.eval_shape(GPT(CONFIG, 11).init, jax.random.key(0), tokens)["params"]
        rngs = {"dropout": jax.random.key(1)}
        apply = lambda params: model.apply({"params": params}, tokens, rngs=rngs, **options)
        return jax.eval_shape(apply, params)

    model = GPT(CONFIG, 11, kernel=Kernel(refuse))
    for train in (True, False):
        with pytest.raises(Called):
            trace(model, train=train)
    with pytest.raises(Called):  # init takes the same path
        jax.eval_shape(model.init, jax.random.key(0), tokens)
    trace(model, cache=model.init_cache(1))
    trace(model, mutable=["attention"])
    for config in (replace(CONFIG, attn_dropout=0.1), replace(CONFIG, window=32)):
        trace(GPT(config, 11, kernel=Kernel(refuse)), train=True)


def test_an_own_attention_goes_before_the_kernel():
    class Own(CausalSelfAttention):
        def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, start: Any) -> jax.Array:
            return self.weigh(q, k, v, start)

    model = GPT(CONFIG, 11, attention=Own, kernel=Kernel(refuse))
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 128), jnp.int32))


# ---------------------------------------------------------------------------------------------
# Selection


def mesh_of(platform: str, kind: str) -> Any:
    device = SimpleNamespace(platform=platform, device_kind=kind)
    shape = {"data": 1, "fsdp": 1, "tensor": 1}
    return SimpleNamespace(devices=np.array([device], object), size=1, shape=shape)


TPU = mesh_of("tpu", "TPU v5 lite")
H100 = mesh_of("gpu", "NVIDIA H100 80GB HBM3")
AMD = mesh_of("gpu", "AMD Instinct MI300X")
CPU = mesh_of("cpu", "cpu")
BF16 = replace(CONFIG, dtype="bfloat16")


@pytest.mark.parametrize(
    ("config", "mesh", "kernel"),
    [
        (BF16, TPU, "splash"),
        (CONFIG, TPU, "splash"),
        (BF16, H100, "cudnn"),
        (CONFIG, H100, None),  # float32
        (BF16, AMD, None),
        (BF16, CPU, None),
        (replace(BF16, dropout=0.1), TPU, None),
        (replace(BF16, dropout=0.1, attn_dropout=0.0), TPU, "splash"),
        (replace(BF16, block_size=100), TPU, None),
        (replace(BF16, window=32), TPU, None),
        (replace(BF16, attention="plain"), TPU, None),
    ],
)
def test_auto_selects_a_kernel_that_fits(monkeypatch, config, mesh, kernel):
    called: list[str] = []
    for name in ("splash", "cudnn"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: called.append(name))
    made = kernels.make_kernel(config, mesh)
    if made is not None:
        assert isinstance(made, Kernel)
        made(*drawn(1, 128, 4, 2, 8))
    assert called == ([kernel] if kernel else [])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A mesh of a GPU that is present, on which cuDNN's attention does not compile."""

    def refuse(*inputs: jax.Array) -> jax.Array:
        raise RuntimeError("cuDNN 9.1 is too old\nfor this")

    monkeypatch.setattr(kernels, "cudnn", refuse)
    monkeypatch.setattr(jax, "devices", lambda: list(H100.devices))
    return H100


def test_auto_falls_back_and_says_so(broken, caplog):
    assert kernels.make_kernel(replace(BF16, attention="auto"), broken) is None
    [record] = caplog.records
    assert record.getMessage() == (
        "cudnn attention does not work here, so plain attention is used: "
        "RuntimeError: cuDNN 9.1 is too old"
    )


def test_a_requested_kernel_that_does_not_work_is_refused(broken):
    with pytest.raises(UserError, match=r"does not work on this NVIDIA H100.*; give plain or auto"):
        kernels.make_kernel(replace(BF16, attention="cudnn"), broken)


def test_a_kernel_that_works_is_tried_once(monkeypatch):
    tried: list[Any] = []

    def works(*inputs: jax.Array) -> jax.Array:
        tried.append(inputs)
        return causal_attention(*inputs)

    monkeypatch.setattr(kernels, "cudnn", works)
    monkeypatch.setattr(jax, "devices", lambda: list(H100.devices))
    for _ in range(2):
        assert kernels.make_kernel(replace(BF16, attention="auto"), H100) is not None
    assert len(tried) == 1


def test_sizes_that_the_kernel_does_not_divide_use_plain_attention():
    """Init uses one row of one token."""
    kernel = kernels.make_kernel(BF16, TPU)
    assert kernel is not None
    inputs = drawn(1, 5, 4, 2, 8)
    np.testing.assert_array_equal(kernel(*inputs), plain(*inputs))


@pytest.mark.parametrize(
    ("name", "config", "mesh", "reason"),
    [
        ("splash", BF16, CPU, "runs on TPUs, and this is a cpu"),
        ("cudnn", BF16, TPU, "runs on NVIDIA GPUs, and this is a TPU v5 lite"),
        ("cudnn", CONFIG, H100, "needs model.dtype=bfloat16, and it is float32"),
        (
            "cudnn",
            replace(BF16, n_head=1, n_kv_head=1, n_embd=136),
            H100,
            "multiple of 8 up to 128, and it is 136",
        ),
        (
            "splash",
            replace(BF16, block_size=100),
            TPU,
            "model.block_size that is a multiple of 128, and it is 100",
        ),
        ("splash", replace(BF16, window=32), TPU, "no sliding window, and model.window is 32"),
        (
            "splash",
            replace(BF16, dropout=0.1),
            TPU,
            "attention dropout, and it is 0.1",
        ),
    ],
)
def test_a_requested_kernel_that_does_not_fit_is_refused(name, config, mesh, reason):
    with pytest.raises(UserError) as caught:
        kernels.make_kernel(replace(config, attention=name), mesh)
    message = str(caught.value)
    assert message.startswith(f"model.attention={name} ") and reason in message
    assert message.endswith("give plain or auto")


# ---------------------------------------------------------------------------------------------
# Lowering for absent devices


def lowered(attend: Any, platform: str) -> str:
    inputs = drawn(1, 128, 2, 2, 64, "bfloat16")
    total = lambda *inputs: attend(*inputs).astype(jnp.float32).sum()
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*inputs)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_splash_lowers_for_tpus():
    assert lowered(kernels.splash, "tpu").count("tpu_custom_call") >= 3  # forward, dq, dkv


def test_cudnn_lowers_for_nvidia_gpus(monkeypatch):
    """With JAX's checks for cuDNN patched, which it makes before lowering."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)
    text = lowered(kernels.cudnn, "cuda")
    assert "fmhaSoftmax" in text and "fmhaSoftmaxBackward" in text
