"""Tests of the configs: values are checked, and JSON is validated as untrusted."""

import json
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import pytest
from helpers import by_path
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.assembly import make_model
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, differences
from gptjax.errors import UserError
from gptjax.lecture.models import STAGES
from gptjax.optim import make_optimizer
from gptjax.presets import LECTURE_MODELS, PRESETS, PURPOSES
from gptjax.runs.config_json import FORMAT, REMOVED, Stored, from_json, to_json

pytestmark = pytest.mark.core

VOCAB = 65  # of Tiny Shakespeare


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.n_layer": 4, ...}`: every field that is not itself a config."""
    found: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        nested = is_dataclass(value)
        found |= leaves(value, f"{prefix}{f.name}.") if nested else {prefix + f.name: value}
    return found


def refusal(text: str) -> str:
    """What `from_json` says about a text it must not accept."""
    with pytest.raises(UserError) as caught:
        from_json(text)
    return str(caught.value)


def with_format(**values: Any) -> str:
    return json.dumps({"format": FORMAT, **values})


# ---------------------------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = PRESETS[name]
    assert from_json(to_json(config)) == Stored(config, {})
    assert json.loads(to_json(config))["format"] == FORMAT


def test_a_key_that_is_there_twice_is_refused():
    text = '{"format": 2, "model": {"n_head": 2, "n_head": 4}}'
    assert refusal(text) == "not JSON: the key 'n_head' is there twice"


def test_several_numbers_round_trip():
    config = Config(model=ModelConfig(rope_scaling=(8.0, 1.0, 4.0, 8192.0)))
    assert from_json(to_json(config)).config == config
    assert from_json(with_format(model={"rope_scaling": [4]})).config.model.rope_scaling == (4.0,)
    for wrong in (["8"], [[8]], [True]):
        assert refusal(with_format(model={"rope_scaling": wrong})).startswith(
            f"model.rope_scaling[0]: expected float, got {wrong[0]!r}"
        )
    assert refusal(with_format(model={"rope_scaling": 8})).startswith(
        "model.rope_scaling: expected "
    )


def test_parts_round_trip():
    parts = {"model": "NGramHead(n=4)", "config": "examples/fast.py"}
    assert from_json(to_json(Config(), parts)) == Stored(Config(), parts)


def test_missing_fields_keep_their_defaults():
    """An old run's config.json lacks the fields that came after it."""
    assert from_json(with_format()) == Stored(Config(), {})
    partial = from_json(with_format(model={"n_layer": 2})).config
    assert partial == Config(model=ModelConfig(n_layer=2))


def test_an_int_counts_as_a_float():
    rate = from_json(with_format(optim={"learning_rate": 1})).config.optim.learning_rate
    assert rate == 1.0 and type(rate) is float


MODEL_FIELDS = ", ".join(f.name for f in fields(ModelConfig))
NORMS = get_args(get_type_hints(ModelConfig)["norm"])
CONFIG_FIELDS = ", ".join(f.name for f in fields(Config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object, got list"),
        ("1", "expected a JSON object, got int"),
        ("null", "expected a JSON object, got NoneType"),
        ("{}", "format None is not the format 2 this gptjax reads; update gptjax"),
        ('{"format": 3}', "format 3 is not the format 2 this gptjax reads; update gptjax"),
        ('{"format": "2"}', "format '2' is not the format 2 this gptjax reads; update gptjax"),
        (with_format(stepz=1), f"unknown key 'stepz'; known: {CONFIG_FIELDS}"),
        (
            with_format(model={"n_layr": 1}),
            f"unknown key 'model.n_layr'; known: {MODEL_FIELDS}",
        ),
        (with_format(steps="9"), "steps: expected int, got '9'"),
        (with_format(steps=True), "steps: expected int, got True"),
        (with_format(steps=1.0), "steps: expected int, got 1.0"),
        (with_format(model={"bias": 1}), "model.bias: expected bool, got 1"),
        (with_format(model={"dropout": True}), "model.dropout: expected float, got True"),
        (with_format(model={"vocab_size": 1.5}), "model.vocab_size: expected int or null, got 1.5"),
        (with_format(optim={"grad_clip": "x"}), "optim.grad_clip: expected float or null, got 'x'"),
        (with_format(optim=None), "optim: expected an object, got None"),
        (with_format(data=[1]), "data: expected an object, got [1]"),
        (
            with_format(model={"norm": ["rms"]}),
            f"model.norm: expected one of {NORMS}, got ['rms']",
        ),
        (with_format(parts=["model"]), "parts: expected an object of strings, got ['model']"),
        (with_format(parts={"model": 1}), "parts: expected an object of strings, got {'model': 1}"),
        ("", "not JSON: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_from_json_refuses(text, message):
    assert refusal(text) == message


def test_deep_nesting_is_refused():
    assert refusal("[" * 100_000).startswith("not JSON: ")
    assert refusal('{"model":' * 100_000).startswith("not JSON: ")


def test_values_are_checked_as_anywhere_else():
    assert refusal(with_format(steps=0)) == "steps=0 is too small; give 1 or more"
    infinite = '{"format": 2, "optim": {"learning_rate": Infinity}}'
    assert refusal(infinite) == "optim.learning_rate=inf is out of range; give a number above 0"
    nan = '{"format": 2, "model": {"dropout": NaN}}'
    assert refusal(nan) == "model.dropout=nan is out of range; give 0.0 <= model.dropout < 1.0"


def test_an_int_too_large_for_a_float_is_refused():
    refusal('{"format": 2, "optim": {"learning_rate": 1' + "0" * 400 + "}}")


def test_a_message_is_one_line_whatever_the_key():
    assert "\n" not in refusal(with_format(**{"two\nlines": 1}))


def test_format_must_be_the_number_itself():
    """true == 1 in Python, and yet no gptjax ever wrote it."""
    refusal('{"format": true}')


# Any JSON value, and objects that look like a config, so that the checks behind the keys run too.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**320), 10**320),
    st.floats(),
    st.text(),
    st.sampled_from(["gpt", "bigram", "cosine", "float32"]),
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def objects(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of the keys of a config dataclass, and values of any kind."""
    nested = {
        "model": ModelConfig,
        "data": DataConfig,
        "optim": OptimConfig,
        "mesh": MeshConfig,
    }
    values = {
        f.name: scalars if cls is not Config or f.name not in nested else objects(nested[f.name])
        for f in fields(cls)
    }
    return st.fixed_dictionaries({}, optional=values)


config_like = st.builds(
    lambda version, values, removed: {
        "format": version,
        **values,
        **({"model": {**values["model"], **removed}} if "model" in values else {}),
    },
    st.sampled_from([1, FORMAT]),
    objects(Config),
    st.fixed_dictionaries({}, optional={name: scalars for name in REMOVED}),
)


@given(st.one_of(st.text(), anything.map(json.dumps), config_like.map(json.dumps)))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_config_or_a_user_error(text):
    try:
        stored = from_json(text)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(stored.config, Config) and from_json(to_json(*stored)) == stored


# ---------------------------------------------------------------------------------------------
# config.json of gptjax 0.1 (format 1)

# What its presets wrote for the fields that are gone.
HARMLESS: dict[str, Any] = {
    **{"kind": "gpt", "qkv_bias": True, "ngram": 1, "pair_rows": None, "recall": None},
}


def format_1(**model: Any) -> str:
    return json.dumps({"format": 1, "model": {**HARMLESS, **model}, "steps": 7})


def test_removed_fields_at_their_defaults_are_read():
    assert set(HARMLESS) == set(REMOVED)
    assert from_json(format_1()) == Stored(Config(steps=7), {})
    shape: Any = {"n_layer": 2, "bias": False, "norm": "rms", "init": "zero", "window": 8}
    expected = Config(steps=7, model=ModelConfig(**shape))
    assert from_json(format_1(**shape)) == Stored(expected, {})
    # qkv_bias meant nothing without the other biases.
    assert from_json(format_1(**shape, qkv_bias=False)) == Stored(expected, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("recall", 4), ("pair_rows", 30_000), ("ngram", 2), ("qkv_bias", False)],
        *[("norm", "none"), ("init", "torch"), ("kind", "attention"), ("kind", "averaging")],
    ],
)
def test_removed_settings_are_refused_with_the_version_that_has_them(name, value):
    refused = refusal(format_1(**{name: value}))
    assert refused.startswith(f"model.{name}={value!r} is a setting of gptjax 0.1 ")
    assert "\n" not in refused and "checkout of 0.1" in refused


def test_a_bigram_of_format_1_is_the_lectures():
    """Whatever its other fields said, for a table has none."""
    stored = from_json(format_1(kind="bigram", n_layer=1, norm="none", block_size=8))
    assert stored == Stored(Config(steps=7, model=ModelConfig(block_size=8)), {"model": "Bigram"})
    assert stored.parts["model"] in STAGES
    padded = from_json(format_1(kind="bigram", block_size=8, vocab_size=100)).config
    assert padded.model.vocab_size == 100  # rows of the table


def test_removed_fields_are_unknown_to_the_new_format():
    for name, value in HARMLESS.items():
        assert refusal(with_format(model={name: value})).startswith(f"unknown key 'model.{name}'")


# ---------------------------------------------------------------------------------------------
# Checks


def small(name: str, value: int) -> str:
    return f"{name}={value} is too small; give 1 or more"


def make(cls: Any, name: str, value: Any) -> Any:
    return cls(**{name: value})


CHECKS = [
    *[
        (lambda n=n: make(ModelConfig, n, 0), small(f"model.{n}", 0))
        for n in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    ],
    (
        lambda: Config(steps=2**31),
        "steps=2147483648 is too large; give 2147483647 or less",
    ),
    (
        lambda: ModelConfig(dropout=1.0),
        "model.dropout=1.0 is out of range; give 0.0 <= model.dropout < 1.0",
    ),
    (
        lambda: ModelConfig(dropout=-0.1),
        "model.dropout=-0.1 is out of range; give 0.0 <= model.dropout < 1.0",
    ),
    (
        lambda: ModelConfig(n_embd=128, n_head=5),
        "model.n_embd=128 is not divisible by model.n_head=5; change one of them (heads share the "
        "width equally)",
    ),
    (
        lambda: ModelConfig(remat_saves="dots"),
        "model.remat_saves=dots needs model.remat, which is off; add --model.remat",
    ),
    (lambda: ModelConfig(n_kv_head=0), small("model.n_kv_head", 0)),
    (lambda: ModelConfig(head_dim=0), small("model.head_dim", 0)),
    (lambda: ModelConfig(nope_every=0), small("model.nope_every", 0)),
    (
        lambda: ModelConfig(qk_norm_scale=True),
        "model.qk_norm_scale needs model.qk_norm; add --model.qk-norm",
    ),
    *[
        (
            lambda v=v: ModelConfig(rope_scaling=v),  # pyright: ignore[reportArgumentType]
            f"model.rope_scaling={v} is not FACTOR or FACTOR LOW HIGH ORIGINAL, with FACTOR of at "
            f"least 1, 0 < LOW < HIGH and an integer; give e.g. 8 1 4 8192",
        )
        for v in ((), (1e-320,), (float("nan"),), (8.0, 1.0), (8.0, 4.0, 4.0, 64.0), (None,))
    ],
    (lambda: ModelConfig(window=0), small("model.window", 0)),
    (lambda: Config(loss_chunk=0), small("loss_chunk", 0)),
    (
        lambda: Config(loss_chunk=7),
        "model.block_size=64 is not divisible by loss_chunk=7; change one of them",
    ),
    (
        lambda: DataConfig(val_fraction=1.0),
        "data.val_fraction=1.0 is out of range; give 0.0 <= data.val_fraction < 1.0",
    ),
    *[
        (
            lambda v=v: OptimConfig(learning_rate=v),
            f"optim.learning_rate={v} is out of range; give a number above 0",
        )
        for v in (0.0, float("inf"), float("nan"))
    ],
    (
        lambda: OptimConfig(warmup_steps=-1),
        "optim.warmup_steps=-1 is out of range; give 0 or more",
    ),
    (
        lambda: OptimConfig(weight_decay=-0.1),
        "optim.weight_decay=-0.1 is out of range; give 0 or more",
    ),
    (
        lambda: OptimConfig(final_lr_ratio=1.1),
        "optim.final_lr_ratio=1.1 is out of range; give 0.0 <= optim.final_lr_ratio <= 1.0",
    ),
    *[
        (
            lambda n=n: make(OptimConfig, n, 1.0),
            f"optim.{n}=1.0 is out of range; give 0.0 <= optim.{n} < 1.0",
        )
        for n in ("beta1", "beta2")
    ],
    (
        lambda: OptimConfig(grad_clip=0.0),
        "optim.grad_clip=0.0 is out of range; give a number above 0",
    ),
    (lambda: OptimConfig(accumulate=0), small("optim.accumulate", 0)),
    *[
        (lambda n=n: make(MeshConfig, n, 0), small(f"mesh.{n}", 0))
        for n in ("data", "fsdp", "tensor")
    ],
    (lambda: Config(seed=-1), "seed=-1 is out of range; give 0 <= seed < 2**32"),
    (lambda: Config(seed=2**32), "seed=4294967296 is out of range; give 0 <= seed < 2**32"),
    *[
        (lambda n=n: make(Config, n, 0), small(n, 0))
        for n in (
            *("steps", "batch_size", "eval_every", "eval_batches", "save_every", "keep_last"),
            "steps_per_dispatch",
        )
    ],
    (
        lambda: Config(batch_size=8, optim=OptimConfig(accumulate=3)),
        "batch_size=8 is not divisible by optim.accumulate=3; change one of them",
    ),
    (
        lambda: Config(steps=5, optim=OptimConfig(warmup_steps=6)),
        "optim.warmup_steps=6 is more than steps=5; lower --optim.warmup-steps",
    ),
    (
        lambda: Config(optim=OptimConfig(warmup_steps=6, schedule_steps=5)),
        "optim.warmup_steps=6 is more than optim.schedule_steps=5; lower --optim.warmup-steps",
    ),
]


@pytest.mark.parametrize(("build", "message"), CHECKS, ids=[message[:40] for _, message in CHECKS])
def test_a_bad_value_is_refused(build, message):
    with pytest.raises(UserError) as caught:
        build()
    assert str(caught.value) == message


def test_the_edges_of_the_ranges_are_allowed():
    Config(seed=0, steps=1, optim=OptimConfig(warmup_steps=1, final_lr_ratio=1.0))
    Config(seed=2**32 - 1, optim=OptimConfig(final_lr_ratio=0.0, beta1=0.0, weight_decay=0.0))
    Config(data=DataConfig(val_fraction=0.0), model=ModelConfig(dropout=0.0))


def test_differences():
    assert differences(Config(), Config()) == {}
    other = Config(steps=5, model=ModelConfig(n_layer=2), optim=OptimConfig(grad_clip=None))
    assert differences(Config(), other) == {
        "steps": (1000, 5),
        "model.n_layer": (4, 2),
        "optim.grad_clip": (1.0, None),
    }


def test_every_field_can_differ():
    """A field that `differences` overlooks could change under a resumed run."""
    assert set(differences(Config(), _other(Config()))) == set(leaves(Config()))


def _other(config: Any) -> Any:
    """A config in which every leaf has another value."""
    changed = {}
    for f in fields(config):
        value = getattr(config, f.name)
        changed[f.name] = _other(value) if is_dataclass(value) else object()
    other = object.__new__(type(config))  # the values are nonsense: skip the checks
    for name, value in changed.items():
        object.__setattr__(other, name, value)
    return other


def test_field_cap():
    """Each field is a promise to keep; before adding one, look for one to drop."""
    assert len(leaves(Config())) <= 75


# ---------------------------------------------------------------------------------------------
# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    config = PRESETS[name]
    stage = LECTURE_MODELS.get(name)
    model = make_model(config.model, VOCAB, STAGES[stage] if stage else None)
    tokens = jax.ShapeDtypeStruct((2, config.model.block_size), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    jax.eval_shape(make_optimizer(config.optim, config.steps).init, params)
    assert {leaf.dtype for leaf in by_path(params).values()} == {jnp.dtype("float32")}
    assert PURPOSES[name][0] == sum(leaf.size for leaf in by_path(params).values())
    logits, _ = jax.eval_shape(model.apply, {"params": params}, tokens)
    assert logits.shape == (2, config.model.block_size, config.model.vocab_size or VOCAB)
    assert logits.dtype == jnp.float32


def test_the_lectures_presets_name_its_stages():
    assert set(LECTURE_MODELS) <= set(PRESETS) and set(LECTURE_MODELS.values()) <= set(STAGES)
    stages = [name for name in PRESETS if name.startswith("lecture/")]
    assert len(stages) == 8 and set(stages) <= set(LECTURE_MODELS)
