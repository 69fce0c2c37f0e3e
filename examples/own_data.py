"""A task of your own through `batches=`: addition, with the loss on the answer alone.

    python train.py --config examples/own_data.py

A row is such as "27+58=580\\n": the sum is written backwards, as one adds, so each digit depends
on what stands before it. Of 1,024 sums that are held out, 99 % are right after 500 steps and all
after 1,000 (val_exact). Then

    print("".join(gptjax.load("own_data").generate("27+58=", 4, temperature=0.0)))
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

import gptjax


class Additions:
    """Random sums of two numbers of two digits, some of which are held out for validation."""

    tokenizer = gptjax.CharTokenizer("\n+0123456789=")

    def __init__(self, rows: int = 64):
        pairs = np.random.default_rng(0).permutation(100 * 100)
        self._rows, self._train = rows, pairs[1024:]
        self.validation = [self._make(pairs[i : i + rows]) for i in range(0, 1024, rows)]

    def batch(self, step: int) -> gptjax.Batch:
        """The batch of a step: a function of the step alone, so that a run can be resumed."""
        random = np.random.default_rng(step)
        return self._make(random.choice(self._train, self._rows))

    def _make(self, pairs: np.ndarray) -> gptjax.Batch:
        sums = [(int(pair) // 100, int(pair) % 100) for pair in pairs]
        texts = [f"{a:02}+{b:02}={f'{a + b:03}'[::-1]}\n" for a, b in sums]
        ids = np.stack([self.tokenizer.encode(text) for text in texts]).astype(np.int32)
        mask = np.broadcast_to(np.arange(ids.shape[1] - 1) >= texts[0].index("="), ids[:, 1:].shape)
        return gptjax.Batch(ids[:, :-1], ids[:, 1:], mask.astype(np.float32))


def metrics(model: nn.Module, params: Any, batch: gptjax.Batch) -> dict[str, jax.Array]:
    """Share of the answers whose every digit is the likeliest one; logged as "val_exact"."""
    logits: Any = model.apply({"params": params}, batch.inputs)[0]
    right = (logits.argmax(axis=-1) == batch.targets) | (batch.mask == 0)
    return {"exact": right.all(axis=1).mean()}


config = gptjax.Config(
    steps=1000,
    batch_size=64,
    eval_every=250,
    save_every=500,
    model=gptjax.ModelConfig(n_layer=2, n_embd=64, block_size=16),
    optim=gptjax.OptimConfig(learning_rate=5e-3, warmup_steps=50),
)
batches = Additions()
