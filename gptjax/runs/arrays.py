"""How a train state is laid out in a checkpoint: weights to sample with, and the rest."""

from functools import partial
from typing import Any

import jax

from gptjax import optim
from gptjax.step import TrainState


def training_part(state: TrainState) -> Any:
    """What a checkpoint stores besides the weights to sample with: the optimizer state, and the
    trained parameters where they differ from those weights (EMA, LoRA, schedule-free)."""
    if not state.separate_weights:
        return state.opt_state
    params = optim.unite(state.params, state.frozen)
    rest = [params, state.opt_state]
    if state.ema is not None and optim.has_lora(state.params):
        rest.append(optim.unite(state.ema, state.frozen))
    return rest


def train_state(weights: Any, training: Any, layout: TrainState) -> TrainState:
    """The train state of loaded weights and a loaded `training_part`, in the form of `layout`."""
    split = partial(optim.separate, trained=layout.params, frozen=layout.frozen)
    rest, ema = training["opt_state"], None
    if layout.separate_weights:
        united, rest, *average = rest
        params, frozen = split(united)
        if layout.ema is not None:
            ema, _ = split(average[0] if average else weights)
    else:
        params, frozen = split(weights)
    return layout._replace(
        step=training["step"], params=params, opt_state=rest, ema=ema, frozen=frozen
    )


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(getattr(leaf, "shape", ()))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
