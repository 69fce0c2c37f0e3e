"""Tests of the public API: what `import gptjax` offers, and that importing changes nothing."""

import json
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import gptjax

pytestmark = pytest.mark.core

# A change of this list is a change for users: say so in CHANGELOG.md.
PUBLIC = """
    Config ModelConfig DataConfig OptimConfig MeshConfig PRESETS
    train load LoadedRun generate Sampling
    GPT Block CausalSelfAttention MLP attention_weights causal_mask
    TrainState init_state train_step skip_nonfinite with_ema repeat
    next_token_loss cross_entropy make_optimizer
    Batch Batches Tokenizer CharTokenizer ByteTokenizer UserError __version__
""".split()


def test_the_public_names():
    assert sorted(gptjax.__all__) == sorted(PUBLIC)
    assert dir(gptjax) == sorted(PUBLIC)
    for name in PUBLIC:
        found = getattr(gptjax, name)
        assert name == "__version__" or name == "PRESETS" or found.__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        gptjax.no_such_name  # noqa: B018


def test_from_gptjax_import_everything():
    namespace: dict[str, Any] = {}
    exec("from gptjax import *", namespace)
    assert set(PUBLIC) <= set(namespace)


def python(code: str) -> Any:
    """The JSON that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


HEAVY = ("jax", "flax", "optax", "orbax", "numpy", "rich", "matplotlib", "tyro")


def test_importing_gptjax_imports_no_library():
    code = f"""
import sys, json, gptjax
gptjax.__all__, gptjax.__version__
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
    assert python(code) == []


def test_configs_and_errors_need_no_jax():
    code = """
import sys, json, gptjax
gptjax.Config, gptjax.PRESETS["small"], gptjax.UserError
print(json.dumps([name for name in ("jax", "flax", "optax") if name in sys.modules]))
"""
    assert python(code) == []


def modules() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages(gptjax.__path__, "gptjax.")]
    # What lm-eval does when it is imported, which its adapter alone does, is its own.
    return [name for name in found if not name.endswith(("__main__", "score.harness"))]


SNAPSHOT = """
import json, logging, os, random, signal, sys, warnings
import absl.logging, jax, flax, optax, orbax.checkpoint, numpy as np
from orbax.checkpoint import v1  # the libraries may do as they like
try:
    import matplotlib
except ImportError:
    matplotlib = None

def snapshot():
    loggers = {"": logging.getLogger(), **logging.root.manager.loggerDict}
    return {
        "environment": dict(os.environ),
        "loggers": {
            name: [logger.level, len(logger.handlers), len(logger.filters), logger.disabled]
            for name, logger in loggers.items()
            if isinstance(logger, logging.Logger) and not name.startswith("gptjax")
            and (logger.level or logger.handlers or logger.filters or logger.disabled)
        },
        "absl": absl.logging.get_verbosity(),
        "jax": {name: repr(value) for name, value in jax.config.values.items()},
        "numpy": [np.geterr(), repr(np.get_printoptions())],
        "numpy's generator": repr(np.random.get_state()),
        "random": hash(random.getstate()),
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "warnings": len(warnings.filters),
        "folder": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook)],
        "matplotlib": matplotlib and matplotlib.rcParams["backend"] and dict(
            (k, repr(v)) for k, v in matplotlib.rcParams.items()),
    }
"""


def test_importing_any_module_changes_nothing_global():
    names = modules()
    assert {"gptjax.training", "gptjax.runs.checkpoint", "gptjax.cli.main"} <= set(names)
    code = f"""{SNAPSHOT}
import importlib
before = snapshot()
for name in {names}:
    try:
        importlib.import_module(name)
    except Exception as error:  # an extra that is not installed
        assert type(error).__name__ == "UserError" or isinstance(error, ImportError), (name, error)
after = snapshot()
changed = {{key: [repr(before[key])[:300], repr(after[key])[:300]]
           for key in before if before[key] != after[key]}}
print(json.dumps(changed))
"""
    assert python(code) == {}


def test_importing_starts_no_backend():
    """No device is touched, so that a program can still choose its platform."""
    code = f"""
import importlib, json
for name in {modules()}:
    try:
        importlib.import_module(name)
    except Exception:
        pass
from jax._src import xla_bridge
print(json.dumps(list(xla_bridge._backends)))
"""
    assert python(code) == []
