"""The PyTorch sides of the comparisons: GPT-2, trained and sampled as in nanoGPT.

Two models: a plain one with PyTorch's fused attention, and that of transformers. PyTorch gets its
fastest options: all cores or the GPU, fused AdamW and tanh GELU, batches cut on the device, losses
read while it works; on a GPU also autocast to bfloat16 where gptjax computes in it, TF32 elsewhere,
and a static cache for sampling.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from benchmarks import measure
from gptjax.config import Config, ModelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_head, self.dropout, self.attn_dropout = c.n_head, c.dropout, c.dropped_attention
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x: Any) -> Any:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        drop = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.dropout = c.dropout
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x: Any) -> Any:
        y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.n_embd, bias=c.bias), Attention(c)
        self.ln_2, self.mlp = nn.LayerNorm(c.n_embd, bias=c.bias), MLP(c)

    def forward(self, x: Any) -> Any:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with the usual parameter names and GPT-2's initialisation."""

    def __init__(self, c: ModelConfig, vocab_size: int):
        super().__init__()
        self.dropout = c.dropout
        self.wte = nn.Embedding(vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                shrunk = math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=0.02 / shrunk)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Any) -> Any:
        """(B, T) ids -> (B, T, V) logits."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def build(kind: str, config: Config, vocab_size: int) -> tuple[Any, Callable[[Any], Any]]:
    """The "plain" or "transformers" model on the device, and its function from (B, T) ids to
    (B, T, V) logits."""
    c = config.model
    torch.set_num_threads(measure.cores())
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as JAX's default

    def computed(forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(tokens: Any) -> Any:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=c.dtype == "bfloat16"):
                return forward(tokens)

        return run

    if kind == "plain":
        model = GPT(c, vocab_size).to(DEVICE)
        return model, computed(model)
    from transformers import (  # pyright: ignore[reportMissingImports]
        GPT2Config,
        GPT2LMHeadModel,
    )

    others: Any = dict.fromkeys(("resid_pdrop", "embd_pdrop"), c.dropout)
    others["attn_pdrop"] = c.dropped_attention
    others["attn_implementation"] = "sdpa"
    made: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=c.block_size,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            layer_norm_epsilon=c.norm_eps,
            activation_function="gelu_pytorch_tanh",  # the default's function in one kernel
            bos_token_id=None,
            eos_token_id=None,
            **others,
        )
    )
    model = made.to(DEVICE)
    return model, computed(lambda tokens: model(tokens, use_cache=False).logits)


def load(model: Any, arrays: Any) -> None:
    """Load gptjax's parameters, from `jax_gpt.flat`."""
    plain = isinstance(model, GPT)
    state = {}
    for name, array in arrays.items():
        if name == "batches":
            continue
        *path, leaf = [*name.split("/"), "table"] if name == "wpe" else name.split("/")
        stacked = path[0] == "h"
        for i, value in enumerate(array if stacked else [array]):
            names = ["h", str(i), *path[1:]] if stacked else path
            if leaf == "kernel":  # gptjax keeps separate axes for heads
                out = path[-1] == "c_proj"
                value = value.reshape((-1, value.shape[-1]) if out else (len(value), -1))
                value = value.T if plain else value
            if leaf == "bias":
                value = value.reshape(-1)
            key = ".".join([*names, "bias" if leaf == "bias" else "weight"])
            state[key] = torch.from_numpy(value.copy())
    (model if plain else model.transformer).load_state_dict(state)


def adamw(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices and embeddings, none for biases and norms."""
    o, params = config.optim, list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), fused=True)


def random_batch(tokens: Any, batch: int, block: int) -> tuple[Any, Any]:
    """x, y: (batch, block) ids at random positions of (N,) ids on the device."""
    starts = torch.randint(len(tokens) - block, (batch, 1), device=DEVICE)
    windows = tokens[starts + torch.arange(block + 1, device=DEVICE)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def cross_entropy(logits: Any, targets: Any, reduction: str = "mean") -> Any:
    logits = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(logits, targets.reshape(-1), reduction=reduction)


def make_update(
    model: nn.Module, forward: Callable[[Any], Any], config: Config, compiled: bool
) -> tuple[Callable[[Any, Any], Any], torch.optim.Optimizer]:
    """`update(x, y) -> loss` (forward, backward, clip, AdamW), and its optimizer. The loss is still
    being computed when it returns."""
    optimizer, clip = adamw(model, config), config.optim.grad_clip
    model.train()

    def loss_fn(x: Any, y: Any) -> Any:
        return cross_entropy(forward(x), y)

    loss_of = torch.compile(loss_fn) if compiled else loss_fn

    def update(x: Any, y: Any) -> Any:
        loss = loss_of(x, y)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return update, optimizer


def training(
    kind: str,
    compiled: bool,
    config: Config,
    vocab_size: int,
    tokens: np.ndarray,
    start: Path,
) -> Callable[..., Any]:
    """A side that trains from the weights and first batches of `jax_gpt.training`.

    Returns:
        The same interface.
    """
    model, forward = build(kind, config, vocab_size)
    with np.load(start, allow_pickle=False) as arrays:
        load(model, arrays)
        batches = on_device(arrays["batches"])
    update, _ = make_update(model, forward, config, compiled)
    began, losses = time.perf_counter(), []
    for batch in batches:
        losses.append(update(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).item())
        if len(losses) == 1:
            compile_seconds = time.perf_counter() - began
    B, T = config.batch_size, config.model.block_size
    text = on_device(tokens)
    pending: Any = None

    def step() -> int:
        nonlocal pending
        before, pending = pending, update(*random_batch(text, B, T))
        if before is not None:
            before.item()
        return 1

    def ask(what: str, seconds: float = 0.0) -> Any:
        if what == "work":
            return measure.work(step, seconds, lambda: pending.item())
        if what == "peak":
            return matmul_peak(config.model.dtype)
        return {
            "first_losses": losses,
            "compile_seconds": compile_seconds,
            "peak_memory": torch.cuda.max_memory_allocated()
            if DEVICE == "cuda"
            else measure.peak_memory(),
        }

    return ask


def on_device(ids: np.ndarray) -> Any:
    return torch.from_numpy(ids.astype(np.int64)).to(DEVICE)


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large square matmul of random numbers, as `parallel.flops.matmul_peak`."""
    n, calls = (1024, 1) if DEVICE == "cpu" else (8192, 20)
    a = torch.randn(n, n, device=DEVICE, dtype=getattr(torch, dtype))

    def some() -> None:
        for _ in range(calls):
            result = a @ a
        result[0, 0].item()

    return calls * 2 * n**3 / measure.best_seconds(some)


def time_to_loss(
    config: Config, vocab_size: int, train: np.ndarray, val: np.ndarray
) -> Callable[[int], list[dict[str, float]]]:
    """A side that trains the plain model: in eager mode on a CPU, as nanoGPT does there, and
    compiled on a GPU.

    Returns:
        `run(seed)`: a record for each evaluation of the whole validation split, with the seconds of
        training so far.
    """
    B, T, o = config.batch_size, config.model.block_size, config.optim
    text = on_device(train)

    def run(seed: int) -> list[dict[str, float]]:
        model, forward = build("plain", replace(config, seed=seed), vocab_size)
        update, optimizer = make_update(model, forward, config, compiled=DEVICE == "cuda")
        seconds, records = 0.0, []
        for step in range(config.steps + 1):
            if step % config.eval_every == 0 or step == config.steps:
                loss = whole_split_loss(model, forward, val, T)
                records.append({"step": step, "val_loss": loss, "seconds": round(seconds, 3)})
            if step == config.steps:
                return records
            began = time.perf_counter()
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = update(*random_batch(text, B, T))
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                loss.item()  # the device may lag behind until then
            seconds += time.perf_counter() - began
        return records

    def learning_rate(step: int, config: Config) -> float:
        """nanoGPT's schedule: linear warm-up, then a cosine down to a fraction of the peak."""
        if step < o.warmup_steps:
            return o.learning_rate * (step + 1) / (o.warmup_steps + 1)
        share = (step - o.warmup_steps) / max(1, config.steps - o.warmup_steps)
        low = o.final_lr_ratio
        return o.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))

    return run


@torch.no_grad()
def whole_split_loss(
    model: nn.Module, forward: Callable[[Any], Any], val: np.ndarray, T: int
) -> float:
    """Mean loss over `val`, in windows that predict each token except the first once."""
    model.eval()
    padded = on_device(np.pad(val, (0, T + 1)))
    starts, total = np.arange(0, len(val) - 1, T), 0.0
    for some in np.array_split(starts, max(1, len(starts) // 32)):
        windows = torch.stack([padded[i : i + T + 1] for i in some.tolist()])
        inside = (some[:, None] + np.arange(T) < len(val) - 1).reshape(-1)
        losses = cross_entropy(forward(windows[:, :-1]), windows[:, 1:].reshape(-1), "none")
        total += losses[torch.from_numpy(inside).to(DEVICE)].sum().item()
    model.train()
    return total / (len(val) - 1)


def sampling(
    kind: str, cache: bool, config: Config, vocab_size: int, weights: Path
) -> Callable[..., Any]:
    """A side that samples: the plain model as in nanoGPT, without a cache and with cropped context;
    or transformers' `generate`, with or without a cache.

    Returns:
        The interface of `jax_gpt.sampling` without the floor; "warm" chooses between one thread and
        all.
    """
    model, forward = build(kind, config, vocab_size)
    with np.load(weights, allow_pickle=False) as arrays:
        load(model, arrays)
    model.eval()
    window = config.model.block_size

    @torch.no_grad()
    def tokens(batch: int, length: int, greedy: bool) -> Any:
        ids = torch.zeros((batch, 1), dtype=torch.int64, device=DEVICE)
        if kind == "transformers":
            how: Any = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
            if cache and DEVICE == "cuda":
                how["cache_implementation"] = "static"  # compiled, without a wait for each token
            mask = torch.ones_like(ids)
            return model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=length,
                use_cache=cache,
                pad_token_id=0,
                **how,
            )[:, 1:]
        for _ in range(length):
            logits = forward(ids[:, -window:])[:, -1]
            if greedy:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                drawn = torch.multinomial(F.softmax(logits, dim=-1), 1)
            ids = torch.cat([ids, drawn], dim=1)
        return ids[:, 1:]

    def ask(what: str, *args: Any) -> Any:
        if what == "warm":
            batch, length = args
            seconds = {}
            for threads in (1, measure.cores()) if DEVICE == "cpu" else (measure.cores(),):
                torch.set_num_threads(threads)
                one = lambda: tokens(batch, min(length, window // 4), False)
                seconds[threads] = measure.best_seconds(one, 2)
            return torch.set_num_threads(min(seconds, key=lambda n: seconds[n]))
        if what == "work":
            batch, length, seconds = args
            # `cpu` waits for the device, so that a GPU's time counts.
            return measure.work(lambda: tokens(batch, length, False).cpu().numel(), seconds)
        return tokens(1, args[0], True)[0].tolist()

    return ask
