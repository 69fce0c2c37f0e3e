"""A run in a few rows: what is about to happen, what to know before, what came of it."""

import jax

from gptjax import trainable
from gptjax.parallel.flops import count_params, matmul_peak, will_memorise
from gptjax.programs import Programs
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.records import Record
from gptjax.runs.run import Run
from gptjax.text.dataset import Dataset


def before(programs: Programs, dataset: Dataset, start: int) -> dict[str, str]:
    """What is about to happen, from step `start` on."""
    config, mesh, params = programs.config, programs.mesh, programs.abstract.params
    m, n_train = config.model, dataset.n_train
    count = count_params(params)
    moved = count_params(trainable.trained(params, config.optim))
    some = f" ({moved:,} of them trained)" if moved < count else ""
    tokens = config.steps * config.batch_size * m.block_size
    leaves = jax.tree.leaves((programs.abstract, params))  # the gradient is as large as these
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    heads = f"{m.n_head} heads, {m.n_embd} wide, context {m.block_size}"
    shapes = {"gpt": f"{m.n_layer} layers, {heads}", "bigram": "bigram table"}
    shape = shapes.get(m.kind, f"the lecture's {m.kind}, {heads}")
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return {
        "text": f"{config.data.text}: {n_train:,} training and {len(dataset.val):,} validation "
        f"tokens, {dataset.tokenizer.vocab_size} kinds",
        **dataset.notes,
        "model": f"{shape}: {count:,} parameters{some}, {n_train / count:,.2f} training tokens for "
        f"each",
        "training": f"{config.steps - start:,} steps of {config.batch_size} x {m.block_size} "
        f"tokens: {tokens / n_train:.1f} times the training text in all",
        "memory": f"{state / 2**20:,.0f} MB for parameters, their gradient and the optimizer; "
        f"activations come on top",
        "devices": f"{mesh.size} of {jax.device_count()} {jax.devices()[0].device_kind}"
        + (f" ({axes})" if axes else ""),
    }


def warning(programs: Programs, dataset: Dataset) -> str | None:
    """What to know before it starts, if anything."""
    config, count = programs.config, count_params(programs.abstract.params)
    passes = config.steps * config.batch_size * config.model.block_size / dataset.n_train
    if not will_memorise(dataset.n_train, count, passes):
        return None
    return (
        f"this model will memorise its text: it has more parameters than the text has tokens and "
        f"reads it {passes:.0f} times (rule of thumb: over 16); the best checkpoint is kept; more "
        f"text, a smaller model, fewer --steps or more --model.dropout help"
    )


def after(programs: Programs, run: Run, record: Record, flops: int) -> dict[str, str]:
    """What came of it, with the share of the matmul peak that training used.

    Args:
        programs: of the run.
        run: its folder.
        record: of its last step.
        flops: for each token; 0: not known.
    """
    config = programs.config
    seconds = record["seconds"]
    tokens_per_second = config.steps * config.batch_size * config.model.block_size / seconds
    best = run.best_step(Checkpoints(run.checkpoints_path).steps())
    rows = {
        "validation loss": f"{record['val_loss']:.4f} over the whole split, "
        f"{record['val_bits_per_byte']:.4f} bits per byte",
        "training": f"{seconds / 60:.2f} minutes, {seconds / config.steps * 1e3:.3g} ms a step, "
        f"{tokens_per_second:,.0f} tokens/s, compilation included",
        "kept": f"{run.directory}, best checkpoint at step {best}",
    }
    if flops:
        rate = flops * tokens_per_second
        peak = matmul_peak(config.model.dtype) * programs.mesh.size
        rows["arithmetic"] = (
            f"{rate / 1e9:,.0f} GFLOP/s, {rate / peak:.0%} of the {peak / 1e9:,.0f} that a large "
            f"matmul reaches here"
        )
    return rows
