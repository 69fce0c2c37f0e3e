"""What a run computes with: its model and optimizer, its devices, its compiled programs."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax import trainable
from gptjax.build import build_model
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.feed import Feed, OnDisk, Resident, gather, in_a_row
from gptjax.optim import make_optimizer
from gptjax.parallel import sharding
from gptjax.parallel.kernels import make_attend
from gptjax.runs.checkpoint import Checkpoints
from gptjax.step import (
    TrainState,
    eval_starts,
    init_state,
    make_evaluate,
    make_gradient,
    make_train_steps,
)
from gptjax.text.dataset import Dataset


class Programs:
    """The pure functions of `step.py`, jitted for a run and for the devices of this machine.

    Attributes:
        train_steps: see `make_train_steps`; the state that goes in is gone.
        gradient: see `make_gradient`.
        abstract: shapes and dtypes of the train state.
        placed: the sharding of each of its leaves.
        model_here: the model, as it is to be applied on these devices.

    Args:
        config: of the run.
        vocab_size: the tokenizer's.
        model: your own, of the contract in `model.py`; None: the config's.
        optimizer: your own; None: the config's.
        devices: to compile for, be they here or not; None: this machine's.

    Raises:
        UserError: sizes that the mesh does not divide, or a kernel that its devices do not have.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        model: nn.Module | None = None,
        optimizer: optax.GradientTransformation | None = None,
        devices: Sequence[Any] | None = None,
    ):
        self.config = config
        self.mesh = sharding.make_mesh(
            config.mesh, config.batch_size // config.optim.accumulate, devices
        )
        self.model = model or build_model(
            config.model, vocab_size, make_attend(config.model, self.mesh)
        )
        self.optimizer = optimizer or make_optimizer(config)
        self._everywhere = sharding.replicated(self.mesh)
        self._init = partial(init_state, self.model, self.optimizer, config=config.optim)
        self.abstract = jax.eval_shape(self._init, jax.random.key(config.seed))
        self.placed = sharding.shardings(self.mesh, self.abstract)
        self.model_here = sharding.on_mesh(self.model, self.mesh)
        here, rows = self.model_here, sharding.batch_sharding(self.mesh)
        self.train_steps = jax.jit(
            make_train_steps(here, self.optimizer, config, rows),
            donate_argnums=0,
            out_shardings=(self.placed, self._everywhere),
        )
        self.gradient = jax.jit(make_gradient(here, config))
        self._is_finite = jax.jit(_all_finite)
        self._evaluate = jax.jit(make_evaluate(here, config, rows))

    @cached_property
    def seed_key(self) -> jax.Array:
        """All randomness of the run follows from it."""
        # Made there, for a key of this process alone cannot be put on other processes' devices.
        make = jax.jit(jax.random.key, static_argnums=0, out_shardings=self._everywhere)
        return make(self.config.seed)

    def trace(self, n_tokens: int) -> jax.stages.Traced:
        """`train_steps` for shapes alone, to be lowered and compiled: nothing is allocated.

        Args:
            n_tokens: of the training split.
        """
        shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        rest = jax.eval_shape(
            lambda: (jnp.zeros(n_tokens, jnp.uint16), jax.random.key(0), jnp.int32(0))
        )
        state = jax.tree.map(shape, self.abstract, self.placed)
        return self.train_steps.trace(state, *(shape(x, self._everywhere) for x in rest))

    def start(self, params: Any = None) -> TrainState:
        """The train state before the first step, each leaf on its devices from the start.

        Args:
            params: to start from, on the host; None: drawn from the seed.

        Raises:
            UserError: they are not those of this model.
        """
        if params is not None:
            shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
            if shapes(params) != shapes(trainable.without_lora(self.abstract.params)):
                raise UserError(
                    f"the weights of init={self.config.init} are of another shape than this "
                    f"model's; leave model= out, or start from weights of its kind"
                )
            params = jax.device_put(params, sharding.shardings(self.mesh, params))
        return jax.jit(self._init, out_shardings=self.placed)(self.seed_key, params=params)

    def restore(self, checkpoints: Checkpoints, step: int) -> TrainState:
        """The train state of a checkpoint, whatever devices it was saved on.

        Raises:
            UserError: damaged, or of other shapes.
        """
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract,
            self.placed,
        )
        weights = trainable.without_lora(state.params)
        items = checkpoints.load(
            step,
            {"params": weights, "training": {"step": state.step, "opt_state": self._rest(state)}},
        )
        weights, training = items["params"], items["training"]
        params, average, rest = weights, None, training["opt_state"]
        if self._apart:
            params, rest, *more = rest
            if state.average is not None:
                average = more[0] if more else weights
        return TrainState(training["step"], params, rest, average)

    def stored(self, state: TrainState) -> tuple[Any, Any]:
        """The two parts of a checkpoint: the weights to sample with, and what training needs."""
        return state.weights, self._rest(state)

    @property
    def _apart(self) -> bool:
        """Whether the weights to sample with are not the ones that are trained."""
        o = self.config.optim
        return o.ema is not None or o.lora_rank is not None

    def _rest(self, state: TrainState) -> Any:
        """What training needs beside the weights to sample with."""
        if not self._apart:
            return state.opt_state
        both = self.config.optim.lora_rank is not None and state.average is not None
        return [state.params, state.opt_state] + ([state.average] if both else [])

    def is_finite(self, state: TrainState) -> bool:
        """Whether all of it is finite numbers: a state worth keeping."""
        return bool(self._is_finite(state))

    def skip(self, state: TrainState) -> TrainState:
        """The state after a step that was not made: its batch is left out."""
        return state._replace(step=jax.device_put(state.step + 1, self.placed.step))

    def training(self, dataset: Dataset) -> Feed:
        """The training tokens, as `train_steps` takes them."""
        config = self.config
        fits = dataset.n_train <= config.data.resident_tokens
        if config.data.order == "random" and fits:
            return Resident(config, self.put(dataset.train), self.seed_key)
        placed = sharding.batches_sharding(self.mesh)
        shape = config.steps_per_dispatch, config.batch_size, config.model.block_size + 1

        def put(make: Callable[[slice], np.ndarray]) -> jax.Array:
            at = lambda index: make(index[1])  # each device asks for its rows
            return jax.make_array_from_callback(shape, placed, at)

        return OnDisk(config, dataset.parts, put)

    def put(self, tokens: Any) -> jax.Array:
        """Tokens for every device: each cuts its own rows of a batch."""
        if isinstance(tokens, jax.Array) and tokens.sharding == self._everywhere:
            return tokens
        if self._everywhere.is_fully_addressable:
            return jax.device_put(tokens, self._everywhere)
        tokens = np.asarray(tokens)
        return jax.make_array_from_callback(tokens.shape, self._everywhere, lambda at: tokens[at])

    def hold(self, tokens: np.ndarray) -> jax.Array | np.ndarray:
        """Tokens for `mean_loss`: on the devices, if they are not too many."""
        return self.put(tokens) if len(tokens) <= self.config.data.resident_tokens else tokens

    def mean_loss(
        self, params: Any, tokens: jax.Array | np.ndarray, step: int, whole: bool
    ) -> float:
        """Nats per token: of the whole split, or of the random batches that follow from `step`."""
        starts = eval_starts(self.config, tokens.shape[0], self.seed_key, step, whole)
        if isinstance(tokens, jax.Array):
            return self.loss_at(params, tokens, starts)
        if not whole and self.config.eval_batches is not None:
            windows = gather(tokens, np.asarray(starts), self.config.model.block_size)
            return self.loss_at(params, *in_a_row(windows))
        size = self.config.batch_size * self.config.model.block_size
        size *= max(1, self.config.data.resident_tokens // size)
        slabs = [tokens[i : i + size + 1] for i in range(0, len(tokens) - 1, size)]
        losses = [self.mean_loss(params, self.put(slab), step, True) for slab in slabs]
        return float(np.average(losses, weights=[len(slab) - 1 for slab in slabs]))

    def loss_at(self, params: Any, tokens: Any, starts: Any) -> float:
        """Nats per token of the windows that begin at the (n, B) starts."""
        return float(self._evaluate(params, self.put(tokens), self.put(starts)))


def _all_finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()
