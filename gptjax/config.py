"""What a run is: frozen dataclasses and their JSON form.

Standard library only, so that `train.py --help` answers at once. One field has one reader; `None`
means off; a new field's default must reproduce what was done before it existed, so that the
`config.json` of an old run keeps its meaning. The strings below the fields are the `--help` text.
"""

import json
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from gptjax.errors import UserError

FORMAT = 1  # of config.json; raised when an old program could misread a new file


@dataclass(frozen=True)
class ModelConfig:
    """The network: GPT-2's names, GPT-2's meaning."""

    kind: Literal["gpt", "bigram", "averaging", "attention", "feedforward"] = "gpt"
    """gpt: the transformer. bigram: the lecture's (V, V) table, which reads only block_size.
    averaging, attention, feedforward: the lecture's steps between the two, of one layer."""
    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads; n_embd must be a multiple."""
    n_embd: int = 128
    """Width of the residual stream."""
    block_size: int = 64
    """Longest context in tokens."""
    vocab_size: int | None = None
    """Rows of the embedding table; None: as many as the tokenizer has tokens."""
    dropout: float = 0.0
    """Share of activations dropped (attention weights, both projections) while training."""
    bias: bool = True
    """Biases in linear layers and layer norms, as GPT-2."""
    qkv_bias: bool = True
    """Biases on queries, keys and values too (the lecture has none there)."""
    norm: Literal["layer", "none"] = "layer"
    """Before attention, before the MLP and at the end; none: nothing there, as the lecture before
    it comes to layer norm."""
    activation: Literal["gelu", "relu"] = "gelu"
    """The MLP's non-linearity; gelu is GPT-2's tanh form."""
    tie_head: bool = True
    """Read logits off the embedding table (GPT-2) instead of a matrix of their own (lecture)."""
    init: Literal["gpt2", "torch"] = "gpt2"
    """gpt2: normal 0.02, residual projections / sqrt(2 n_layer). torch: PyTorch's layer defaults,
    which the recorded lecture uses."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matmuls and activations; parameters, softmax, norms and loss are always float32."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            _positive(f"model.{name}", getattr(self, name))
        if self.vocab_size is not None:
            _positive("model.vocab_size", self.vocab_size)
        _within("model.dropout", self.dropout, 0.0, 1.0)
        if self.n_embd % self.n_head:
            raise UserError(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}; "
                f"change one of them (heads share the width equally)"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class DataConfig:
    """The text and how it becomes tokens."""

    text: str = "tiny_shakespeare"
    """A corpus named in data/, or the path of a UTF-8 text file."""
    val_fraction: float = 0.1
    """The last part of the text, held out for validation."""

    def __post_init__(self) -> None:
        _within("data.val_fraction", self.val_fraction, 0.0, 1.0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-3
    """Peak, after warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine decay over the rest of the steps, or constant."""
    warmup_steps: int = 0
    """Steps of linear rise from 0."""
    final_lr_ratio: float = 0.1
    """What the cosine ends at, as a share of the peak."""
    weight_decay: float = 0.1
    """Applied to matrices and embeddings, not to biases and norms; multiplied by the rate."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.99
    """Decay of its running square."""
    grad_clip: float | None = 1.0
    """Largest global norm of a gradient; None: no clipping."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, to fit memory; the update is the same."""

    def __post_init__(self) -> None:
        _above_zero("optim.learning_rate", self.learning_rate)
        _not_negative("optim.warmup_steps", self.warmup_steps)
        _not_negative("optim.weight_decay", self.weight_decay)
        _within("optim.final_lr_ratio", self.final_lr_ratio, 0.0, 1.0, closed=True)
        _within("optim.beta1", self.beta1, 0.0, 1.0)
        _within("optim.beta2", self.beta2, 0.0, 1.0)
        if self.grad_clip is not None:
            _above_zero("optim.grad_clip", self.grad_clip)
        _positive("optim.accumulate", self.accumulate)


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis."""

    data: int | None = None
    """Copies of the model, each with its share of the batch; None: as many as fit."""
    fsdp: int = 1
    """Shards of parameters and optimizer state; these share the batch too."""
    tensor: int = 1
    """Shards of heads and of the MLP's width."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            if getattr(self, name) is not None:
                _positive(f"mesh.{name}", getattr(self, name))


@dataclass(frozen=True)
class Config:
    """All that decides a run's numbers."""

    seed: int = 1337
    """Of parameters, batches, dropout; the same seed gives the same run."""
    steps: int = 1000
    """Optimizer updates."""
    batch_size: int = 32
    """Windows of block_size tokens in one update."""
    eval_every: int = 250
    """Steps between evaluations (and one at the end)."""
    eval_batches: int | None = None
    """None: the whole validation split. N: the mean of N random batches of each split, which the
    lecture prints; the last evaluation is always of the whole split."""
    save_every: int = 250
    """Steps between checkpoints (and one at the end)."""
    keep_last: int = 2
    """Newest checkpoints kept, besides the best."""
    steps_per_dispatch: int = 8
    """Updates that the device runs per call from the host; changes speed, never the numbers."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is out of range; give 0 <= seed < 2**32")
        for name in (
            *("steps", "batch_size", "eval_every", "save_every", "keep_last"),
            "steps_per_dispatch",
        ):
            _positive(name, getattr(self, name))
        if self.eval_batches is not None:
            _positive("eval_batches", self.eval_batches)
        if self.batch_size % self.optim.accumulate:
            raise UserError(
                f"batch_size={self.batch_size} is not divisible by "
                f"optim.accumulate={self.optim.accumulate}; change one of them"
            )
        if self.optim.warmup_steps > self.steps:
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps} is more than steps={self.steps}; "
                f"lower --optim.warmup-steps"
            )


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name}={value} is too small; give 1 or more")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise UserError(f"{name}={value} is out of range; give 0 or more")


def _above_zero(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={value} is out of range; give a number above 0")


def _within(name: str, value: float, low: float, high: float, closed: bool = False) -> None:
    if not (low <= value < high or (closed and value == high)):
        bound = "<=" if closed else "<"
        raise UserError(f"{name}={value} is out of range; give {low} <= {name} {bound} {high}")


# ---------------------------------------------------------------------------------------------
# JSON


def to_json(config: Config) -> str:
    """The text of a run's `config.json`."""
    return json.dumps({"format": FORMAT, **asdict(config)}, indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read a run's `config.json`; fields it lacks keep their defaults.

    Args:
        text: what `to_json` wrote; keys and types are checked, nothing is executed.

    Raises:
        UserError: not JSON, a newer format, an unknown key, a wrong type or value.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"expected a JSON object, got {type(values).__name__}")
    version = values.pop("format", None)
    if type(version) is not int or version != FORMAT:
        raise UserError(
            f"format {version!r} is not the format {FORMAT} this gptjax reads; update gptjax"
        )
    return _build(Config, values, "")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """Make the dataclass `cls` from plain JSON values, checking every key and type."""
    hints = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - hints.keys()):
        raise UserError(f"unknown key {prefix + unknown[0]!r}; known: {', '.join(hints)}")
    checked = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{name}: expected an object, got {value!r}")
            checked[name] = _build(typing.cast(type, hints[name]), value, f"{prefix}{name}.")
        else:
            checked[name] = _check(f"{prefix}{name}", value, hints[name])
    return cls(**checked)


def _check(name: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the declared type; an int counts as a float."""
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise UserError(f"{name}: expected one of {typing.get_args(hint)}, got {value!r}")
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int and abs(value) < 2**53:
            return float(value)
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
    raise UserError(f"{name}: expected {expected}, got {value!r}")


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """`{"model.n_layer": (old, new)}` for each field in which two configs differ."""
    changed = {}
    for name in (f.name for f in fields(old)):
        before, after = getattr(old, name), getattr(new, name)
        if is_dataclass(before):
            changed |= differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changed[prefix + name] = (before, after)
    return changed
