"""The flags that names stand for: `--n_layer` is `--model.n-layer`; `--lr` gets a hint."""

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.cli.flags import Flag

# What nanoGPT, nanochat, Hugging Face's Trainer and habit call our flags.
SYNONYMS = {
    "--run": "out-dir output-dir out output name run-name model-tag save-dir exp-name",
    "--resume": "resume-from-checkpoint resume-from continue",
    "--init": "init-from model model-name-or-path model-name pretrained load finetune-from",
    "--config": "preset",
    "--steps": "max-iters max-steps num-steps n-steps iters iterations num-iterations "
    "train-steps total-steps",
    "--batch-size": "device-batch-size per-device-train-batch-size train-batch-size batch bs "
    "total-batch-size",
    "--eval-every": "eval-interval eval-steps eval-freq val-every",
    "--eval-batches": "eval-iters",
    "--save-every": "save-steps save-interval checkpoint-every ckpt-every",
    "--keep-last": "save-total-limit",
    "--track": "wandb-log wandb report-to tensorboard logger",
    "--special-tokens": "add-special-tokens add-bos-token add-bos bos",
    "--model.n-layer": "num-layers n-layers layers depth num-hidden-layers",
    "--model.n-head": "heads num-heads n-heads num-attention-heads",
    "--model.n-kv-head": "num-kv-heads n-kv-heads num-key-value-heads",
    "--model.n-embd": "d-model embed-dim n-embed hidden-size width dim emb-dim",
    "--model.n-inner": "d-ff mlp-dim intermediate-size ffn-dim",
    "--model.block-size": "context-length seq-len seq-length max-seq-len max-seq-length context "
    "ctx sequence-length max-length",
    "--model.position": "pos pos-emb position-embedding",
    "--model.rope-base": "rope-theta",
    "--model.window": "sliding-window window-size window-pattern",
    "--model.dtype": "precision mixed-precision",
    "--model.dtype bfloat16": "bf16",
    "--model.dtype float32": "fp32",
    "--model.attention": "flash flash-attn attn-implementation",
    "--model.remat": "gradient-checkpointing activation-checkpointing",
    "--data.text": "data dataset dataset-name data-path data-dir train-file input input-file file "
    "corpus",
    "--data.val": "validation-file val-file eval-file val-data val-text",
    "--data.tokenizer": "tok tokenizer-name",
    "--optim.kind": "optim optimizer",
    "--optim.learning-rate": "lr max-lr peak-lr embedding-lr",
    "--optim.muon-learning-rate": "matrix-lr muon-lr",
    "--optim.schedule": "lr-scheduler-type lr-scheduler scheduler lr-schedule",
    "--optim.schedule-steps": "lr-decay-iters lr-decay-steps",
    "--optim.warmup-steps": "warmup-iters warmup num-warmup-steps",
    "--optim.decay-share": "warmdown-ratio",
    "--optim.final-lr-ratio": "final-lr-frac min-lr-ratio",
    "--optim.weight-decay": "wd",
    "--optim.beta1": "adam-beta1",
    "--optim.beta2": "adam-beta2",
    "--optim.ema": "ema-decay",
    "--optim.grad-clip": "clip max-grad-norm clip-grad gradient-clip max-norm",
    "--optim.accumulate": "gradient-accumulation-steps grad-accum accum accumulate-grad-batches",
    "--mesh.data": "gpus num-gpus devices num-devices",
    "--distributed": "backend ddp",
    # Sampling.
    "--prompt": "start input text input-text",
    "--max-new-tokens": "max-tokens tokens num-tokens length max-length n-tokens",
    "--num-samples": "n n-samples samples num-return-sequences",
    "--temperature": "temp t",
    "--top-k": "topk",
    "--top-p": "topp nucleus",
    "--min-p": "minp",
    "--repetition-penalty": "repeat-penalty rep-penalty",
    "--stop": "stop-strings stop-sequences reverse-prompt",
    "--ignore-eos": "no-eos no-stop",
    "--interactive": "repl conversation i",
    "--system": "system-prompt sys",
    "--prompts": "prompts-file prompt-file",
    "--json": "jsonl",
    "--logprobs": "log-probs top-logprobs alternatives",
    "--checkpoint": "ckpt step",
}

# Names without a flag of the same meaning, and what to do.
ABSENT = {
    "epochs num-epochs num-train-epochs max-epochs": "training length is --steps, in optimizer "
    "updates",
    "decay-lr": "--optim.schedule constant switches the decay off",
    "min-lr final-lr": "give --optim.final-lr-ratio, a share of the peak",
    "warmup-ratio": "give --optim.warmup-steps, a number of steps",
    "compile torch-compile": "leave it out: everything is compiled",
    "device gpu cuda use-cuda no-cuda cpu": "JAX takes the accelerator that it finds; set "
    "JAX_PLATFORMS=cpu in the environment for the CPU",
    "fp16 amp": "give --model.dtype bfloat16",
    "log-interval logging-steps log-every": "leave it out: every step is in metrics.jsonl",
    "wandb-project wandb-run-name": "set WANDB_PROJECT in the environment, and give --track wandb",
    "num-workers workers dataloader-num-workers": "leave it out: batches are prefetched",
}


def resolve(typed: str, flags: Mapping[str, "Flag"]) -> tuple["Flag", bool]:
    """The flag that a name stands for, and False if it is the `no-` form of a bool.

    A name may have underscores, and its section left out if no other flag ends alike.

    Raises:
        UserError: it stands for none, or for several.
    """
    name = typed.lstrip("-").replace("_", "-")
    spelled = {flag.name[2:]: (flag, True) for flag in flags.values() if not flag.positional}
    spelled |= {f.negative[2:]: (f, False) for f, _ in spelled.values() if f.type is bool}
    if name in spelled:
        return spelled[name]
    same_leaf = [full for full in spelled if full.rpartition(".")[2] == name]
    if len(same_leaf) == 1 and name not in {flag.section for flag in flags.values()}:
        return spelled[same_leaf[0]]
    if len(same_leaf) > 1:
        listed = " or ".join(f"--{full}" for full in same_leaf)
        raise UserError(f"{typed} is ambiguous; give {listed}")
    leaf = name.rpartition(".")[2]
    for full, synonyms in SYNONYMS.items():
        if leaf in synonyms.split() and full.partition(" ")[0] in flags:
            raise UserError(f"{typed} is {full} here")
    for synonyms, advice in ABSENT.items():
        if leaf in synonyms.split() and all(
            flag in flags for flag in re.findall(r"--[a-z.-]+", advice)
        ):
            raise UserError(f"there is no {typed}: {advice}")
    leaves = {full.rpartition(".")[2]: full for full in spelled}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
    hint = f" (did you mean --{leaves[close[0]]}?)" if close else ""
    raise UserError(f"unknown flag {typed}{hint}")
