"""Look inside a trained run: the residual stream of every block, and where its heads look.

    python examples/probe.py [RUN]

Of `small`, the residual stream grows from 2.5 after the first block to 5.5 after the last (root
mean square), the MLPs write more than the heads, and one head of the first block puts 78 % of its
attention on the previous token.
"""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import gptjax

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak."


def main(run: str | Path | None = None, text: str = TEXT) -> dict[str, np.ndarray]:
    """Print and return, for each block, RMS values, and for each head, shares of attention."""
    loaded = gptjax.load(run)
    ids = jnp.asarray(loaded.tokenizer.encode(text))[None, : loaded.config.model.block_size]
    _, captured = loaded.model.apply(
        {"params": loaded.params},
        ids,
        capture_intermediates=True,
        mutable=["intermediates", "attention"],
    )
    blocks: Any = captured["intermediates"]["h"]  # each (L, B, T, C), stacked over the blocks
    rms = lambda x: np.asarray(jnp.sqrt(jnp.square(x).mean(axis=(1, 2, 3))))
    weights: Any = captured["attention"]["h"]["attn"]["weights"][0]  # (L, B, H, T, T)
    found = {
        "residual": rms(blocks["__call__"][0][0]),
        "attn": rms(blocks["attn"]["__call__"][0][0]),
        "mlp": rms(blocks["mlp"]["__call__"][0]),
        "itself": np.asarray(jnp.diagonal(weights, 0, 3, 4).mean(axis=(1, 3))),
        "previous": np.asarray(jnp.diagonal(weights, -1, 3, 4).mean(axis=(1, 3))),
    }
    print("block  residual  attn   mlp    on itself, on the previous token (each head)")
    for i, (x, a, m) in enumerate(zip(found["residual"], found["attn"], found["mlp"], strict=True)):
        heads = zip(found["itself"][i], found["previous"][i], strict=True)
        shares = "  ".join(f"{a:3.0%}, {b:3.0%}" for a, b in heads)
        print(f"{i:5d}  {x:8.2f}  {a:5.2f}  {m:5.2f}  {shares}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
