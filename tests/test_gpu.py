"""What the train steps of the GPU presets are compiled to for an H100, which need not be present.

The counts hold what was gained: each of them was higher once, and costs time on the device.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptjax.parallel.switches import DETERMINISTIC
from gptjax.plan import aot

ROOT = Path(__file__).resolve().parents[1]

# In a process of its own: tests/conftest.py sets the precision of matmuls and more.
COUNT = """
import json, sys
from dataclasses import replace
from gptjax.plan import aot, hlo
from gptjax.plan.chips import read_target
from gptjax.presets import PRESETS

texts = []
class Kept(hlo.Program):
    def __init__(self, text):
        super().__init__(text)
        texts.append(self)
hlo.Program = Kept

config = PRESETS[sys.argv[1]]
vocab_size = config.model.vocab_size or 65
layers = int(sys.argv[2])
config = replace(config, steps_per_dispatch=1, model=replace(config.model, n_layer=layers))
compiled = aot.compile_step(config, vocab_size, aot.topology(read_target("h100:1")))
program = texts[-1]
size = lambda i: hlo._bytes(i.shape)
large = lambda found: [i.shape for i, _ in found if "s32" not in i.shape and size(i) > 2**20]
shapes = {i.name: i.shape for c in program.computations.values() for i in c}
dots = [[shapes[name] for name in i.operands] for i, _ in program.executed("dot")]
print(json.dumps({
    "refused": compiled.refused,
    "by": compiled.by,
    "transposes": large(program.executed("transpose")),
    "scatters": [i.shape for i, _ in program.executed("scatter")],
    "scatters in any order": [
        i.shape
        for i, _ in program.executed("scatter")
        if "unique_indices=true" not in i.attributes
    ],
    "copies": large(program.executed("copy")),
    "attention": sum("fmha" in i.attributes for i, _ in program.executed("custom-call")),
    "float32 matmuls": [d for d in dots if all(shape.startswith("f32") for shape in d)],
    "conditionals": len(program.executed("conditional")),
    "kernels": program.kernels(),
    "traffic": compiled.traffic,
    "temporaries": compiled.temporaries,
}))
"""


# What the loop of a call of `decode` does for each token, of one stream.
COUNT_DECODE = """
import json, sys
from dataclasses import replace
import jax, jax.numpy as jnp, numpy as np
from gptjax.generation import decoding
from gptjax.model import GPT
from gptjax.plan import aot, hlo
from gptjax.plan.chips import read_target
from gptjax.presets import PRESETS
from gptjax.sampling import Sampling, stacked

devices = aot.topology(read_target("h100:1"))
config = replace(PRESETS[sys.argv[1]].model, attention="plain", n_layer=int(sys.argv[2]))
model, V = GPT(config, config.vocab_size), config.vocab_size
place = jax.sharding.SingleDeviceSharding(devices[0])

def absent(tree):
    shaped = lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place)
    return jax.tree.map(shaped, tree)

def start():
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return decoding.prepare(model, params), decoding.blank(model, 1, V)

integers = lambda *shape: np.zeros(shape, np.int32)
sampling = stacked([Sampling(vocab_size=50257)], V)
streams = (np.zeros((1, 2), np.uint32), integers(1), integers(1), integers(1, 1), sampling, None)
streams = decoding.Streams(*streams)
given = absent((*jax.eval_shape(start), streams, integers()))
traced = decoding.decode.trace(model, *given, fixed=True)
program = hlo.Program(traced.lower().compile().as_text())
[(loop, _)] = program.executed("while")
once = program.traffic()
[body] = [name for name in loop.called if program.computations[name][-1].opcode == "tuple"]
program.times[body] += 1
print(json.dumps({
    "traffic": program.traffic() - once,
    "conditionals": len(program.executed("conditional")),
    "whiles": len(program.executed("while")),
    "iterations known": "known_trip_count" in loop.attributes,
}))
"""


def counts(preset: str, layers: int, flags: str = "", code: str = COUNT) -> dict[str, Any]:
    if aot.compiler("gpu") is None:
        pytest.skip("needs a CUDA plug-in of JAX: pip install -e '.[plan]'")
    words = [sys.executable, "-c", code, preset, str(layers)]
    env = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: len(x) if isinstance(x, list) else x for name, x in found.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "layers", "kernels", "traffic", "temporaries"),
    [("shakespeare", 2, 165, 4.0e9, 0.60e9), ("gpt2", 2, 2000, 590e9, 6.0e9)],
)
def test_a_step_on_an_h100(preset, layers, kernels, traffic, temporaries):
    found = counts(preset, layers)
    assert found["refused"] is None and found["by"] == aot.compiler("gpu")
    assert found["attention"] == 2 * layers  # cuDNN's, forward and backward
    assert found["transposes"] == []  # the batch stays first
    assert len(found["scatters"]) == 1  # into the embedding table, and none over the logits
    assert found["scatters in any order"] == found["scatters"]  # see --deterministic
    assert found["float32 matmuls"] == []
    assert found["copies"] == []  # of parameters or the optimizer's state
    assert found["conditionals"] == 0  # the host would wait for each
    assert found["kernels"] <= kernels
    assert found["traffic"] <= traffic
    assert found["temporaries"] <= temporaries


@pytest.mark.slow
def test_deterministic_kernels_add_up_the_embedding_in_order():
    """They sort first what the scatter adds up in any order; these are its price in bytes."""
    found = counts("shakespeare", 1, DETERMINISTIC)
    assert found["scatters in any order"] == [] and found["attention"] == 2
    assert found["kernels"] <= 125 and found["traffic"] <= 3.1e9


@pytest.mark.slow
def test_a_token_on_an_h100_reads_the_weights_once():
    """In bfloat16, as they were cast before the loop; the rest is the cache, logits and copies."""
    found = counts("gpt2", 2, code=COUNT_DECODE)
    weights = 2 * (50304 * 768 + 2 * 12 * 768**2)
    assert weights <= found["traffic"] <= 1.35 * weights
    assert found["whiles"] == 1 and found["conditionals"] == 0
    assert found["iterations known"]  # else the host reads before each token whether to stop
