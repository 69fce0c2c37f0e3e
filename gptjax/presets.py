"""Configs by name.

Each comment: command, hardware, time, loss; "cited" is somebody else's figure, not ours.
"""

from dataclasses import replace

from gptjax.config import Config, DataConfig, ModelConfig, OptimConfig

# ---------------------------------------------------------------------------------------------
# The lecture, stage by stage: each is the one before and one thing more (gptjax/lecture/models.py).
# Losses are of gptjax ladder: whole validation split, mean of three seeds; times on 2 cores
# (Intel Xeon).

# python train.py --config lecture/1-bigram: the lecture's first model. 1 s, val 2.489.
BIGRAM = Config(
    steps=3000,
    batch_size=32,
    eval_every=300,
    eval_batches=200,
    save_every=1000,
    model=ModelConfig(n_layer=1, n_head=1, block_size=8),
    # torch.optim.AdamW as the lecture calls it: its default decay and betas, no clipping.
    optim=OptimConfig(
        learning_rate=1e-2, schedule="constant", weight_decay=0.01, beta2=0.999, grad_clip=None
    ),
)

# python train.py --config lecture/2-averaging: embeddings, and the plain mean of the past.
# 2 s, val 2.826: worse, for the mean drowns the last character.
AVERAGING = replace(
    BIGRAM,
    steps=5000,
    eval_every=500,
    save_every=500,
    model=replace(BIGRAM.model, n_embd=32),
    optim=replace(BIGRAM.optim, learning_rate=1e-3),
)

# python train.py --config lecture/3-head: the mean gets data-dependent weights.
# 3 s, val 2.402.
HEAD = AVERAGING

# python train.py --config lecture/4-heads: four heads of 8 instead of one of 32.
# 4 s, val 2.279.
HEADS = replace(HEAD, model=replace(HEAD.model, n_head=4))

# python train.py --config lecture/5-feedforward: then each position computes on its own.
# 5 s, val 2.261.
FEEDFORWARD = HEADS

# python train.py --config lecture/6-residual: both as a block with residual connections, thrice.
# 14 s, val 2.084.
RESIDUAL = replace(FEEDFORWARD, model=replace(FEEDFORWARD.model, n_layer=3))

# python train.py --config lecture/7-layernorm: layer norms, and the transformer is complete.
# 16 s, val 2.064.
LAYERNORM = RESIDUAL

# python train.py --config lecture, or lecture/8-scale: the same, scaled up, with dropout.
# Cited: val 1.4873, from 500-step estimates on random windows; hours on 2 cores, so not run here.
LECTURE = replace(
    LAYERNORM,
    batch_size=64,
    model=ModelConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2),
    optim=replace(LAYERNORM.optim, learning_rate=3e-4),
)

# The class in gptjax/lecture/models.py that a preset trains; all others train a GPT.
LECTURE_MODELS = {
    "bigram": "Bigram",
    "lecture": "Transformer",
    "lecture/1-bigram": "Bigram",
    "lecture/2-averaging": "Averaging",
    "lecture/3-head": "Attention",
    "lecture/4-heads": "Attention",
    "lecture/5-feedforward": "FeedForward",
    "lecture/6-residual": "Residual",
    "lecture/7-layernorm": "Transformer",
    "lecture/8-scale": "Transformer",
}

# ---------------------------------------------------------------------------------------------
# Beyond the lecture

# python train.py --config tiny: for tests and first looks.
# 10 s with its compilation on 2 busy cores (AMD EPYC), val 3.19: it only has to start learning.
TINY = Config(
    steps=60,
    batch_size=8,
    eval_every=20,
    eval_batches=4,
    save_every=20,
    model=ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, dropout=0.1),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=5),
)

# python train.py --config small: the main job.
# 1.5 minutes on 2 cores (AMD EPYC), up to 2.5 on busy ones; val 1.740 over the whole split (1.7381
# to 1.7423 over seeds 1337, 1, 2).
SMALL = Config(
    steps=1000,
    batch_size=32,
    eval_every=250,
    save_every=250,
    model=ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64),
    optim=OptimConfig(learning_rate=6e-3, warmup_steps=50),
)

# python train.py --config shakespeare: nanoGPT's character model, for one GPU. In bfloat16, as
# there, and without dropout of attention weights, which the fused attention kernel lacks.
# Cited: val 1.4697 on random windows, about 3 minutes on one A100 (nanoGPT's README).
SHAKESPEARE = Config(
    steps=5000,
    batch_size=64,
    eval_every=250,
    eval_batches=200,
    save_every=250,
    model=ModelConfig(
        n_layer=6,
        n_head=6,
        n_embd=384,
        block_size=256,
        dropout=0.2,
        attn_dropout=0.0,
        bias=False,
        dtype="bfloat16",
        attention="auto",
    ),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=100),
)

# python train.py --config gpt2: GPT-2's four shapes with nanoGPT's recipe (batch of 0.5 M tokens,
# validation on 2.4 M). Micro-batches fit one GPU of 80 GB; the vocabulary is padded to a multiple
# of 128, which matmuls like.
# Cited: nanoGPT reaches 2.85 on OpenWebText in 4 days on 8 A100s. Not run here: no accelerator. The
# text must be prepared and given as --data.text FOLDER, with nanoGPT's train.bin and val.bin.
GPT2 = Config(
    steps=600_000,
    batch_size=480,
    eval_every=1000,
    eval_batches=5,
    save_every=1000,
    steps_per_dispatch=1,
    data=DataConfig(text="openwebtext", tokenizer="gpt2"),
    model=ModelConfig(
        n_layer=12,
        n_head=12,
        n_embd=768,
        block_size=1024,
        vocab_size=50304,
        dtype="bfloat16",
        attention="auto",
    ),
    optim=OptimConfig(learning_rate=6e-4, warmup_steps=2000, beta2=0.95, accumulate=15),
)

# python train.py --config finetune-shakespeare: GPT-2 on Tiny Shakespeare, by nanoGPT's recipe (20
# steps of 32,768 tokens, about two epochs; there with gpt2-xl). Not run here: the hub cannot be
# reached. As "finetune" it is where --init without --config starts from.
FINETUNE = Config(
    init="gpt2",
    steps=20,
    batch_size=32,
    eval_every=5,
    save_every=5,
    steps_per_dispatch=1,
    model=replace(GPT2.model, vocab_size=50257, dtype="float32"),
    optim=OptimConfig(learning_rate=3e-5, schedule="constant", beta2=0.95, accumulate=32),
)


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> Config:
    shape = replace(GPT2.model, n_layer=n_layer, n_head=n_head, n_embd=n_embd, remat=True)
    return replace(GPT2, model=shape)


# python train.py --config 7b: Llama 2's smallest shape and recipe (Touvron et al.
# 2023: batch of 4 M tokens, 2 T tokens). Not run here: no accelerator.
LLAMA_7B = Config(
    steps=500_000,
    batch_size=1024,
    eval_every=1000,
    eval_batches=20,
    save_every=1000,
    steps_per_dispatch=1,
    loss_chunk=1024,
    model=ModelConfig(
        n_layer=32,
        n_head=32,
        n_embd=4096,
        n_inner=11008,
        block_size=4096,
        vocab_size=32000,
        bias=False,
        norm="rms",
        position="rotary",
        activation="swiglu",
        tie_head=False,
        dtype="bfloat16",
        attention="auto",
        remat=True,
    ),
    optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95, accumulate=8),
)


# Validating on more characters than this takes long and adds no information.
VAL_LIMIT = 1_000_000

_PRESETS: dict[str, Config] = {
    "bigram": BIGRAM,
    "tiny": TINY,
    "small": SMALL,
    "lecture": LECTURE,
    "shakespeare": SHAKESPEARE,
    "gpt2": GPT2,
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "7b": LLAMA_7B,
    "finetune": FINETUNE,
    "finetune-shakespeare": FINETUNE,
    "lecture/1-bigram": BIGRAM,
    "lecture/2-averaging": AVERAGING,
    "lecture/3-head": HEAD,
    "lecture/4-heads": HEADS,
    "lecture/5-feedforward": FEEDFORWARD,
    "lecture/6-residual": RESIDUAL,
    "lecture/7-layernorm": LAYERNORM,
    "lecture/8-scale": LECTURE,
}
PRESETS = {
    name: replace(config, data=replace(config.data, val_limit=VAL_LIMIT))
    for name, config in _PRESETS.items()
}

# Parameters (with the 65 characters of Tiny Shakespeare, or GPT-2's or Llama's vocabulary), and
# what a preset is for. Times are on 2 CPU cores; the comments above name the machine.
PURPOSES = {
    "bigram": (4_225, "the lecture's first model; 1 s"),
    "tiny": (28_064, "tests and first looks; 10 s"),
    "small": (809_856, "a character model on a laptop; 1.5 minutes, val 1.740"),
    "lecture": (10_788_929, "the lecture's last model; hours"),
    "shakespeare": (10_745_088, "nanoGPT's character model, on one GPU"),
    "gpt2": (124_475_904, "GPT-2 by nanoGPT's recipe, on GPUs; a text as --data.text"),
    "gpt2-medium": (354_871_296, "the same, medium"),
    "gpt2-large": (774_090_240, "the same, large"),
    "gpt2-xl": (1_557_686_400, "the same, XL"),
    "7b": (6_738_415_616, "Llama 2's 7B shape and recipe, on many accelerators"),
    "finetune": (124_439_808, "where --init starts: pretrained weights on a text of your own"),
    "finetune-shakespeare": (124_439_808, "GPT-2 fine-tuned on Tiny Shakespeare"),
    "lecture/1-bigram": (4_225, "a table of the next character; 1 s, val 2.489"),
    "lecture/2-averaging": (4_481, "embeddings, and the mean of the past; 2 s, val 2.826"),
    "lecture/3-head": (7_553, "one head of attention; 3 s, val 2.402"),
    "lecture/4-heads": (7_553, "four heads; 4 s, val 2.279"),
    "lecture/5-feedforward": (8_609, "an MLP after them; 5 s, val 2.261"),
    "lecture/6-residual": (41_921, "three residual blocks; 14 s, val 2.084"),
    "lecture/7-layernorm": (42_369, "with layer norms: a transformer; 16 s, val 2.064"),
    "lecture/8-scale": (10_788_929, "the same, scaled up, with dropout; hours"),
}
