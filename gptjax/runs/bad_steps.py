"""States and batches of steps that were skipped, kept to be looked at (`tools/replay.py`).

runs/NAME/bad/N             the state after N updates, as in checkpoints/
              step-N+1.json the batch of the step that was not finite
"""

import json
from typing import Any

import jax
import numpy as np

from gptjax.batches import Batch
from gptjax.parallel import distributed
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.files import write_atomically
from gptjax.runs.run import Run
from gptjax.step import TrainState

KEPT = 3  # newest states of skipped steps


def keep(run: Run, state: TrainState, step: int, batch: Any) -> None:
    """Keep the state before a step, and its batch.

    Raises:
        UserError: no space or no permission.
    """
    kept = Checkpoints(run.bad_path, lambda steps: {*steps[-KEPT:]})
    distributed.first_does(kept.clean)
    kept.save(step - 1, state, {"step": step - 1})
    kept.finish_save()
    values: dict[str, Any] = {"step": step}
    if isinstance(batch, Batch):
        rows = token_rows(batch)
        values |= {"tokens": rows.tolist(), "text": [run.tokenizer.decode(row) for row in rows]}
    else:
        values["batch"] = jax.tree.map(lambda x: np.asarray(x).tolist(), batch)
    path, text = run.bad_path / f"step-{step}.json", json.dumps(values)
    distributed.first_does(lambda: write_atomically(path, text))


def token_rows(batch: Batch) -> np.ndarray:
    """(B, T + 1) int32: the inputs of each row, and its last target."""
    last = np.asarray(batch.targets)[:, -1:]
    return np.concatenate([np.asarray(batch.inputs), last], axis=1).astype(np.int32)
