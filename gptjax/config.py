"""What a run is: frozen dataclasses; `config_json.py` has their JSON form.

Standard library only, so that `train.py --help` answers at once. One field has one reader; `None`
means off; a new field's default must reproduce what was done before it existed, so that the
`config.json` of an old run keeps its meaning. The strings below the fields are the `--help` text.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from gptjax.errors import UserError
from gptjax.limits import above_zero, multiple, not_negative, pattern, positive, within

# The fields of a model that do not come with its weights.
OF_A_LOADED_MODEL = (
    *("block_size", "dropout", "attn_dropout", "attention", "dtype", "remat", "remat_saves"),
)


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
    n_kv_head: int | None = None
    """Heads of keys and values, each shared by as many queries; None: n_head (no sharing)."""
    n_embd: int = 128
    """Width of the residual stream."""
    n_inner: int | None = None
    """Width of the MLP; None: 4 n_embd."""
    block_size: int = 64
    """Longest context in tokens."""
    vocab_size: int | None = None
    """Rows of the embedding table; None: as many as the tokenizer has tokens."""
    dropout: float = 0.0
    """Share of activations dropped (attention weights, both projections) while training."""
    attn_dropout: float | None = None
    """Share of attention weights dropped; None: as dropout."""
    bias: bool = True
    """Biases in linear layers and layer norms, as GPT-2."""
    qkv_bias: bool = True
    """Biases on queries, keys and values too (the lecture has none there)."""
    norm: Literal["layer", "rms", "none"] = "layer"
    """Before attention, before the MLP and at the end; none: nothing there. rms is Llama's."""
    norm_eps: float = 1e-5
    """Added to the variance or mean square in every norm."""
    qk_norm: bool = False
    """Divide each head's queries and keys by their root mean square."""
    position: Literal["learned", "rotary", "none"] = "learned"
    """A table added to the embeddings (GPT-2), or queries and keys turned by position (Llama)."""
    rope_base: float = 10_000.0
    """Rotary positions: longest wavelength / 2 pi, in tokens."""
    window: int | None = None
    """Positions that each one sees, itself and those right before it; None: all before it."""
    ngram: int = 1
    """Tokens that a position sees at once: 1: its own (GPT-2); n: n - 1 before it too, their
    embeddings added from tables of their own."""
    pair_rows: int | None = None
    """Rows of a table for pairs of a token and the one before it, whose embeddings are added; pairs
    with the same number modulo this share a row. None: no such table."""
    recall: int | None = None
    """n: a position sees what followed the last n tokens when they stood in the context before,
    embedded in a table of its own (an n-gram head); None: it does not."""
    activation: Literal["gelu", "gelu_erf", "relu", "relu2", "swiglu"] = "gelu"
    """The MLP's non-linearity; gelu is GPT-2's tanh form, gelu_erf the exact one, relu2 a squared
    relu, swiglu Llama's gate (a third matrix: n_inner of 8/3 n_embd has as many parameters)."""
    tie_head: bool = True
    """Read logits off the embedding table (GPT-2) instead of a matrix of their own (lecture)."""
    softcap: float | None = None
    """Squash logits smoothly into +-softcap; None: leave them."""
    init: Literal["gpt2", "torch", "zero"] = "gpt2"
    """gpt2: normal 0.02, residual projections / sqrt(2 n_layer). torch: PyTorch's layer defaults,
    which the recorded lecture uses. zero: gpt2, residual projections and an untied head at 0."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matmuls and activations; parameters, softmax, norms and loss are always float32."""
    attention: Literal["plain", "auto", "cudnn", "splash"] = "plain"
    """Of training and evaluation. plain: as the lecture writes it, compiled by XLA. cudnn: flash
    attention on NVIDIA GPUs. splash: Pallas' kernel on TPUs. auto: the one for the devices, or
    plain where none fits (on a CPU; with attention weights dropped)."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    remat_saves: Literal["nothing", "dots"] = "nothing"
    """With remat, what a block keeps all the same: nothing but its input; or what its linear
    layers gave, which are the dear part (attention's weights are made again)."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "ngram"):
            positive(f"model.{name}", getattr(self, name))
        within("model.dropout", self.dropout, 0.0, 1.0)
        for name in ("vocab_size", "n_kv_head", "n_inner", "window", "pair_rows", "recall"):
            if getattr(self, name) is not None:
                positive(f"model.{name}", getattr(self, name))
        if self.attn_dropout is not None:
            within("model.attn_dropout", self.attn_dropout, 0.0, 1.0)
        if self.softcap is not None:
            above_zero("model.softcap", self.softcap)
        above_zero("model.norm_eps", self.norm_eps)
        above_zero("model.rope_base", self.rope_base)
        shared = " (heads share the width equally)"
        multiple("model.n_embd", self.n_embd, "model.n_head", self.n_head, shared)
        if (G := self.n_kv_head) is not None:
            served = " (each serves as many queries)"
            multiple("model.n_head", self.n_head, "model.n_kv_head", G, served)
        if self.remat_saves != "nothing" and not self.remat:
            raise UserError(
                f"model.remat_saves={self.remat_saves} says what rematerialisation keeps, and "
                f"model.remat is off; add --model.remat"
            )
        if self.position == "rotary" and self.head_size % 2:
            raise UserError(
                f"rotary positions turn pairs, and a head's size n_embd / n_head = "
                f"{self.head_size} is odd; change model.n_embd or model.n_head"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def dropped_attention(self) -> float:
        return self.dropout if self.attn_dropout is None else self.attn_dropout

    @property
    def looks_back(self) -> bool:
        """Whether embeddings depend on the tokens before."""
        return self.ngram > 1 or self.pair_rows is not None or self.recall is not None


@dataclass(frozen=True)
class DataConfig:
    """The text and how it becomes tokens."""

    text: str = "tiny_shakespeare"
    """A corpus named in data/; a file, folder or glob of texts (.gz, .zst, .jsonl too); token files
    (.bin); or several with their weights: a.txt=0.7,b.txt=0.3."""
    encoding: str = "utf-8"
    """Of the texts."""
    field: str = "text"
    """Of a JSONL line, that holds its text."""
    tokenizer: str = "auto"
    """auto (by size and alphabet, and says why), char, byte, bpe (trained on the text), gpt2, or
    the path of a tokenizer.json or of a SentencePiece model."""
    bpe_vocab_size: int = 4096
    """Tokens of a BPE that is trained."""
    val_fraction: float = 0.1
    """The last part of a text, or whole documents of many, held out for validation."""
    val_limit: int | None = None
    """Most characters held out (of token files: tokens); None: no limit."""
    order: Literal["random", "shuffled"] = "random"
    """random: windows begin anywhere. shuffled: each window once in a pass, in another order each
    time (needs grain); several texts need this."""
    resident_tokens: int = 2**28
    """A longer training split stays on disk, and batches are read from there: less memory, the
    same numbers. (As many take 512 MB of each device.)"""

    def __post_init__(self) -> None:
        within("data.val_fraction", self.val_fraction, 0.0, 1.0)
        if self.val_limit is not None:
            positive("data.val_limit", self.val_limit)
        not_negative("data.resident_tokens", self.resident_tokens)
        if self.bpe_vocab_size < 257:
            raise UserError(
                f"data.bpe_vocab_size={self.bpe_vocab_size} is too small; give 257 or more (256 "
                f"bytes and the end of a text)"
            )
        try:
            "".encode(self.encoding)
        except LookupError:
            raise UserError(
                f"data.encoding={self.encoding!r} is no text encoding that Python knows; give e.g. "
                f"utf-8, latin-1, cp1252, utf-16"
            ) from None


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for the rest."""
    learning_rate: float = 1e-3
    """Peak of AdamW's rate, after warm-up."""
    muon_learning_rate: float = 0.02
    """Peak of Muon's rate, on the same schedule."""
    muon_momentum: float = 0.95
    """Decay of Muon's running mean of the gradient."""
    muon_weight_decay: float = 0.0
    """Muon's own; multiplied by its rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine decay over the rest of the steps; or constant, then a linear
    decay over the last decay_share of them; or constant."""
    warmup_steps: int = 0
    """Steps of linear rise from 0."""
    decay_share: float = 0.5
    """wsd: share of all steps in which the rate decays."""
    final_lr_ratio: float = 0.1
    """What the decay ends at, as a share of the peak."""
    weight_decay: float = 0.1
    """Applied to matrices and embeddings, not to biases and norms; multiplied by the rate."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.99
    """Decay of its running square."""
    ema: float | None = None
    """Decay of a running mean of the parameters, which is then evaluated, saved and sampled; None:
    the last parameters are."""
    grad_clip: float | None = 1.0
    """Largest global norm of a gradient; None: no clipping."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, to fit memory; the update is the same."""
    freeze: str | None = None
    """Parameters that are not trained: a regular expression of names in their paths, such as
    "wte|wpe|h/attn" (paths as in gptjax/model.py)."""
    lora_rank: int | None = None
    """Train only low-rank updates of the blocks' matrices, of this rank; None: train them whole."""
    lora_targets: str = "attn|mlp"
    """The matrices that have such an update, as freeze names them."""

    def __post_init__(self) -> None:
        above_zero("optim.learning_rate", self.learning_rate)
        not_negative("optim.warmup_steps", self.warmup_steps)
        not_negative("optim.weight_decay", self.weight_decay)
        above_zero("optim.muon_learning_rate", self.muon_learning_rate)
        within("optim.muon_momentum", self.muon_momentum, 0.0, 1.0)
        not_negative("optim.muon_weight_decay", self.muon_weight_decay)
        within("optim.decay_share", self.decay_share, 0.0, 1.0, closed=True)
        within("optim.final_lr_ratio", self.final_lr_ratio, 0.0, 1.0, closed=True)
        within("optim.beta1", self.beta1, 0.0, 1.0)
        within("optim.beta2", self.beta2, 0.0, 1.0)
        if self.ema is not None:
            within("optim.ema", self.ema, 0.0, 1.0)
        if self.grad_clip is not None:
            above_zero("optim.grad_clip", self.grad_clip)
        positive("optim.accumulate", self.accumulate)
        for name in ("freeze", "lora_targets"):
            pattern(f"optim.{name}", getattr(self, name))
        if self.lora_rank is not None:
            positive("optim.lora_rank", self.lora_rank)
            if self.freeze is not None:
                raise UserError(
                    f"optim.freeze={self.freeze!r} and optim.lora_rank={self.lora_rank} exclude "
                    f"each other (LoRA freezes all but its updates); leave one of them out"
                )


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
                positive(f"mesh.{name}", getattr(self, name))


@dataclass(frozen=True)
class Config:
    """All that decides a run's numbers."""

    seed: int = 1337
    """Of parameters, batches, dropout; the same seed gives the same run."""
    init: str | None = None
    """Weights to start from, with their tokenizer: gpt2, gpt2-medium, gpt2-large or gpt2-xl, from
    the Hugging Face hub; hf:OWNER/NAME; a folder with model.safetensors; a .gguf file; nanoGPT's
    ckpt.pt; a run. The model is then that one; of its fields here, those that weights do not
    decide are kept (block_size, dropout, dtype, ...). None: drawn from the seed."""
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
    stop_after_skips: int = 3
    """A step whose loss or gradient is not finite is skipped; so many in a row end the run."""
    steps_per_dispatch: int = 8
    """Updates that the device runs per call from the host; changes speed, never the numbers."""
    loss_chunk: int | None = None
    """Positions of a window whose logits exist at once, a divisor of block_size: a large vocabulary
    then takes little memory, and the head is computed once more; None: all positions."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is out of range; give 0 <= seed < 2**32")
        for name in (
            *("steps", "batch_size", "eval_every", "save_every", "keep_last"),
            *("steps_per_dispatch", "stop_after_skips"),
        ):
            positive(name, getattr(self, name))
        if self.eval_batches is not None:
            positive("eval_batches", self.eval_batches)
        if self.loss_chunk is not None:
            positive("loss_chunk", self.loss_chunk)
            if self.model.kind != "gpt":
                raise UserError(
                    f"loss_chunk={self.loss_chunk} needs model.kind=gpt, and it is "
                    f"{self.model.kind}; leave --loss-chunk out"
                )
            block = self.model.block_size
            multiple("model.block_size", block, "loss_chunk", self.loss_chunk)
        multiple("batch_size", self.batch_size, "optim.accumulate", self.optim.accumulate)
        if self.optim.warmup_steps > self.steps:
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps} is more than steps={self.steps}; "
                f"lower --optim.warmup-steps"
            )


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
