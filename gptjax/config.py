"""The description of a run: frozen dataclasses, whose strings are the text of `--help`.

Standard library only, so that `--help` answers at once. `None` means off. A new field's default
must reproduce what was done before it existed, for an old run's `config.json` keeps its meaning.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from gptjax.errors import (
    UserError,
    above_zero,
    multiple,
    not_negative,
    pattern,
    positive,
    stretch,
    text_encoding,
    within,
)

LARGEST_BPE = 2**20  # tokens; memory is taken for all of them before the training begins

# The fields of a model that do not come with its weights.
OF_A_LOADED_MODEL = "block_size dropout attn_dropout attention dtype remat remat_saves".split()


@dataclass(frozen=True)
class ModelConfig:
    """The network, with GPT-2's names for its sizes."""

    n_layer: int = 4
    """Number of transformer blocks."""
    n_head: int = 4
    """Number of attention heads; n_embd must be a multiple unless head_dim is given."""
    n_kv_head: int | None = None
    """Key and value heads, shared by query heads (grouped-query attention). None means n_head."""
    head_dim: int | None = None
    """Size of a head. None means n_embd / n_head."""
    n_embd: int = 128
    """Width of the residual stream."""
    n_inner: int | None = None
    """Width of the MLP. None means 4 n_embd."""
    block_size: int = 64
    """Context length in tokens."""
    vocab_size: int | None = None
    """Rows of the embedding table. None means the tokenizer's vocabulary size."""
    dropout: float = 0.0
    """Dropout rate in training, on attention weights and on the outputs of attention and MLP."""
    attn_dropout: float | None = None
    """Dropout rate of the attention weights. None means the value of dropout."""
    bias: bool = True
    """Use biases in linear layers and layer norms, as GPT-2 does."""
    attn_bias: bool | None = None
    """Use biases for queries, keys and values (Qwen 2 has only these). None means as bias says."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalisation of the residual stream: layer is GPT-2's layer norm, rms is Llama's."""
    norm_eps: float = 1e-5
    """Constant added to the variance or the mean square in every norm."""
    qk_norm: bool = False
    """Divide each head's queries and keys by their root mean square (QK-norm)."""
    qk_norm_scale: bool = False
    """Multiply what qk_norm gives by a learned scale, shared by the heads (Qwen 3)."""
    position: Literal["learned", "rotary", "none"] = "learned"
    """Position encoding: learned is a table added to the embeddings (GPT-2), rotary turns queries
    and keys by their position (RoPE, Llama)."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies: the longest wavelength over 2 pi, in tokens."""
    rope_scaling: tuple[float, ...] | None = None
    """Stretch of the rotary wavelengths: FACTOR for all; or Llama 3's FACTOR LOW HIGH ORIGINAL, in
    full below LOW turns per ORIGINAL tokens, and not at all above HIGH. None means no stretch."""
    nope_every: int | None = None
    """One of so many layers has no rotary positions (SmolLM3: 4). None means that all have them."""
    window: int | None = None
    """Sliding-window size in tokens. None means full causal attention."""
    activation: Literal["gelu", "gelu_erf", "relu", "relu2", "swiglu"] = "gelu"
    """Activation of the MLP. gelu is GPT-2's tanh form, gelu_erf the exact one, relu2 is squared
    ReLU, swiglu is Llama's gate (a third matrix; an n_inner of 8/3 n_embd keeps the size)."""
    tie_head: bool = True
    """Use the embedding table as output head (GPT-2) instead of a matrix of its own."""
    softcap: float | None = None
    """Squash logits smoothly into +-softcap, as Gemma 2 does. None means no soft-capping."""
    init: Literal["gpt2", "zero"] = "gpt2"
    """Initialisation. gpt2 is normal with std 0.02, residual projections / sqrt(2 n_layer); zero
    is the same with residual projections and an untied head at 0."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters, softmax, norms and loss stay float32."""
    attention: Literal["plain", "auto", "cudnn", "splash"] = "plain"
    """Attention kernel for training and evaluation. plain is compiled by XLA; cudnn is flash
    attention on NVIDIA GPUs; splash is Pallas' kernel on TPUs; auto picks by the device, and plain
    where no kernel fits (on a CPU, or with attention dropout)."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    remat_saves: Literal["nothing", "dots"] = "nothing"
    """What remat keeps of a block: nothing but its input, or its linear layers' outputs too."""

    def __post_init__(self) -> None:
        sizes = "n_layer n_head n_embd block_size vocab_size n_kv_head head_dim n_inner window"
        for name in (*sizes.split(), "nope_every"):
            positive(f"model.{name}", getattr(self, name))
        within("model.dropout", self.dropout, 0.0, 1.0)
        within("model.attn_dropout", self.dropped_attention, 0.0, 1.0)
        if self.softcap is not None:
            above_zero("model.softcap", self.softcap)
        above_zero("model.norm_eps", self.norm_eps)
        above_zero("model.rope_base", self.rope_base)
        if self.head_dim is None:
            shared = " (heads share the width equally)"
            multiple("model.n_embd", self.n_embd, "model.n_head", self.n_head, shared)
        if (G := self.n_kv_head) is not None:
            served = " (each serves the same number of query heads)"
            multiple("model.n_head", self.n_head, "model.n_kv_head", G, served)
        if self.remat_saves != "nothing" and not self.remat:
            raise UserError(
                "model.remat_saves=dots needs model.remat, which is off; add --model.remat"
            )
        if self.position == "rotary" and self.head_size % 2:
            what = "n_embd / n_head" if self.head_dim is None else "model.head_dim"
            raise UserError(
                f"rotary positions need an even head size, and {what} = {self.head_size} is odd; "
                f"change model.n_embd or model.n_head"
            )
        if self.qk_norm_scale and not self.qk_norm:
            raise UserError("model.qk_norm_scale needs model.qk_norm; add --model.qk-norm")
        stretch("model.rope_scaling", self.rope_scaling)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def dropped_attention(self) -> float:
        """Dropout rate of the attention weights."""
        return self.dropout if self.attn_dropout is None else self.attn_dropout


@dataclass(frozen=True)
class DataConfig:
    """The text and how it becomes tokens."""

    text: str = "tiny_shakespeare"
    """Text to train on: a corpus by name; a file, folder or glob (.gz, .zst and .jsonl too); token
    files (.bin); or several with their weights: a.txt=0.7,b.txt=0.3."""
    encoding: str = "utf-8"
    """Text encoding of the files."""
    field: str = "text"
    """JSONL field that contains the text."""
    tokenizer: str = "auto"
    """Tokenizer: auto (chosen by the text's size and alphabet), char, byte, bpe (trained on the
    text), gpt2, or the path of a tokenizer.json or of a SentencePiece model."""
    bpe_vocab_size: int = 4096
    """Vocabulary size of a BPE that is trained."""
    val_fraction: float = 0.1
    """Share held out for validation: the end of a text, or whole documents of several."""
    val_limit: int | None = None
    """Most characters held out (tokens, for token files). None means no limit."""
    val: str | None = None
    """Validation text of your own, read in full; then all of data.text trains, and val_fraction and
    val_limit have no effect. None means that a part of data.text is held out."""
    order: Literal["random", "shuffled"] = "random"
    """Order of the windows: random draws their starts uniformly; shuffled reads consecutive windows
    in a new order every epoch (needs grain; several texts need it)."""
    resident_tokens: int = 2**28
    """Longest training split, in tokens, that is kept on the device (2 bytes each); a longer one is
    streamed from disk. It changes memory and speed, never the numbers."""

    def __post_init__(self) -> None:
        within("data.val_fraction", self.val_fraction, 0.0, 1.0)
        positive("data.val_limit", self.val_limit)
        not_negative("data.resident_tokens", self.resident_tokens)
        if self.bpe_vocab_size < 257:
            raise UserError(
                f"data.bpe_vocab_size={self.bpe_vocab_size} is too small; give 257 or more (256 "
                f"bytes and the end of a text)"
            )
        if self.bpe_vocab_size > LARGEST_BPE:
            raise UserError(
                f"data.bpe_vocab_size={self.bpe_vocab_size} is too large; give {LARGEST_BPE} or "
                f"less"
            )
        text_encoding("data.encoding", self.encoding)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule, and which parameters it trains."""

    kind: Literal["adamw", "muon"] = "adamw"
    """Optimizer; muon uses Muon for the matrices of the blocks and AdamW for the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, after warm-up."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon, on the same schedule."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    muon_weight_decay: float = 0.0
    """Weight decay of Muon, multiplied by its learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine decay to the last step; wsd is constant, then decays
    linearly over the last decay_share of the steps; or constant."""
    schedule_steps: int | None = None
    """Length of the schedule; a run may end before it, or continue at its last learning rate. None
    means the steps of the run."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_share: float = 0.5
    """Share of all steps in which wsd decays."""
    final_lr_ratio: float = 0.1
    """Learning rate at the end of the decay, as a share of the peak."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings (not of biases, norms), times the learning rate."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.99
    """Decay rate of AdamW's second moment."""
    ema: float | None = None
    """EMA decay; the averaged weights are evaluated, saved and sampled. None means no EMA."""
    grad_clip: float | None = 1.0
    """Clip gradients to this global norm. None means no clipping."""
    accumulate: int = 1
    """Micro-batches per batch (gradient accumulation), to save memory; the update is the same."""
    freeze: str | None = None
    """Parameters to keep fixed: a regular expression of names in their paths, such as
    "wte|wpe|h/attn" (the paths of gptjax/model.py)."""
    lora_rank: int | None = None
    """Train only low-rank updates (LoRA) of this rank. None means full training."""
    lora_targets: str = "attn|mlp"
    """Matrices that get a low-rank update, named as in freeze."""

    def __post_init__(self) -> None:
        above_zero("optim.learning_rate", self.learning_rate)
        positive("optim.schedule_steps", self.schedule_steps)
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
        positive("optim.lora_rank", self.lora_rank)
        if self.lora_rank is not None and self.freeze is not None:
            raise UserError(
                f"optim.freeze={self.freeze!r} and optim.lora_rank={self.lora_rank} exclude each "
                f"other (LoRA freezes everything but its updates); leave one of them out"
            )


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh."""

    data: int | None = None
    """Data parallelism: copies of the model, each with its share of the batch. None means as many
    as the devices and the batch allow."""
    fsdp: int = 1
    """Fully sharded data parallelism: shards of parameters and optimizer state, which split the
    batch too."""
    tensor: int = 1
    """Tensor parallelism: shards of the heads and of the MLP's width."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            positive(f"mesh.{name}", getattr(self, name))


@dataclass(frozen=True)
class Config:
    """A training run."""

    seed: int = 1337
    """Random seed of initialisation, batches and dropout; the same seed gives the same run."""
    init: str | None = None
    """Weights to start from, with their tokenizer: gpt2, gpt2-medium, gpt2-large or gpt2-xl from
    the Hugging Face hub; hf:OWNER/NAME; either with @REVISION (the run records the commit); a
    folder with model.safetensors; a .gguf file; nanoGPT's ckpt.pt; or a run. The model's shape then
    comes with the weights. None means random initialisation."""
    steps: int = 1000
    """Optimizer updates."""
    batch_size: int = 32
    """Sequences of block_size tokens in one update."""
    eval_every: int = 250
    """Steps between evaluations; the last step is evaluated too."""
    eval_batches: int | None = None
    """Random batches per split in an evaluation, as in the lecture; the last evaluation always
    reads the whole validation split. None means the whole validation split every time."""
    save_every: int = 250
    """Steps between checkpoints; the last step is saved too."""
    keep_last: int = 2
    """Newest checkpoints to keep, besides the best one."""
    sample_tokens: int | None = 300
    """Tokens of the sample after each evaluation, kept in samples.jsonl. None means no samples."""
    norms_every: int | None = None
    """Steps between norms of each layer's parameters, gradients, updates. None means no norms."""
    track: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Trackers to feed, offline unless they are set up otherwise; --track alone means none."""
    stop_after_skips: int = 3
    """Stop after this many consecutive non-finite steps (each is skipped)."""
    steps_per_dispatch: int = 8
    """Updates per call of the device; it changes speed, never the numbers."""
    loss_chunk: int | None = None
    """Chunk size, in positions, of the chunked cross-entropy: the full logits never exist at once,
    and the head is computed once more. It must divide block_size. None means no chunking."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is out of range; give 0 <= seed < 2**32")
        counts = "steps batch_size eval_every save_every keep_last steps_per_dispatch loss_chunk"
        for name in (*counts.split(), *"stop_after_skips eval_batches sample_tokens".split()):
            positive(name, getattr(self, name))
        positive("norms_every", self.norms_every)
        if self.loss_chunk is not None:
            block = self.model.block_size
            multiple("model.block_size", block, "loss_chunk", self.loss_chunk)
        multiple("batch_size", self.batch_size, "optim.accumulate", self.optim.accumulate)
        if self.optim.warmup_steps > (length := self.optim.schedule_steps or self.steps):
            name = "optim.schedule_steps" if self.optim.schedule_steps else "steps"
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps} is more than {name}={length}; lower "
                f"--optim.warmup-steps"
            )

    @property
    def micro_batch_size(self) -> int:
        """Sequences that go through the model at once."""
        return self.batch_size // self.optim.accumulate


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
