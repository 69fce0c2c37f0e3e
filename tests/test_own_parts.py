"""Tests of training with one's own model, optimizer, loss, batches and metrics."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import by_path
from run_helpers import (
    CONFIG,
    QUIET,
    MeanOfThePast,
    SignalAt,
    arrays,
    assert_same,
    assert_same_run,
    contents,
    message,
    records,
    text_file,
)

import gptjax
from gptjax.assembly import assemble
from gptjax.batches import Batch
from gptjax.cli import verify as verify_command
from gptjax.config import Config
from gptjax.interop.export import export
from gptjax.lecture.models import Bigram
from gptjax.loss import next_token_loss
from gptjax.model import GPT
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.tools.replay import replay
from gptjax.tools.verify import verify
from gptjax.training import train


@pytest.fixture(scope="module")
def config(play: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return replace(CONFIG, data=text_file(tmp_path_factory.mktemp("text"), play))


@pytest.fixture(scope="module")
def plain(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any part of one's own."""
    directory = tmp_path_factory.mktemp("plain") / "run"
    train(config, directory, report=QUIET)
    return directory


def resumes_bit_for_bit(config: Config, folder: Path, **own: Any) -> Path:
    """Train with parts of one's own, whole and stopped half-way; the folder of the whole run."""
    train(config, folder / "whole", report=QUIET, **own)
    stopped = train(config, folder / "parts", report=SignalAt(3), **own)
    assert stopped["step"] < config.steps
    train(config, folder / "parts", resume=True, report=QUIET, **own)
    assert_same_run(folder / "whole", folder / "parts", config.steps)
    return folder / "whole"


def refused(directory: Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message with which a call is refused; not a byte of the run has changed."""
    before = contents(directory)
    said = message(function, *args, **kwargs)
    assert contents(directory) == before
    return said


def resume_refused(directory: Path, config: Config, **own: Any) -> str:
    return refused(directory, train, config, directory, resume=True, report=QUIET, **own)


# ---------------------------------------------------------------------------------------------
# Losses and metrics


def penalised_loss(model: nn.Module, params: Any, batch: Any, key: jax.Array) -> Any:
    loss, _ = next_token_loss(model, params, batch, key)
    penalty = 0.1 * (params["wte"]["embedding"] ** 2).sum()
    return loss + penalty, {"penalty": penalty, "unpenalised": loss, "rows": len(batch.inputs)}


def test_a_loss_of_ones_own_with_more_metrics(config: Config, plain: Path, tmp_path: Path):
    run = resumes_bit_for_bit(config, tmp_path, loss_fn=penalised_loss)
    found = records(run)
    for record in found[1:]:
        assert record["loss"] == pytest.approx(record["unpenalised"] + record["penalty"], rel=1e-5)
        assert record["rows"] == 4.0
    # The first step starts from the same parameters and batch; then the penalty tells.
    assert found[1]["unpenalised"] == pytest.approx(records(plain)[1]["loss"], rel=1e-6)
    assert found[8]["unpenalised"] != records(plain)[8]["loss"]
    assert list(found[1]) == ["step", "loss", "grad_norm", "lr", "penalty", "rows", "unpenalised"]
    # Evaluation is of the text, without the penalty.
    assert found[0]["val_loss"] == records(plain)[0]["val_loss"]
    again = replay(run, 6, loss_fn=penalised_loss, report=QUIET)
    assert again == {name: found[6][name] for name in again} and "penalty" in again
    assert Run(run).parts == {"loss_fn": "penalised_loss"}
    assert "was trained with a loss_fn" in resume_refused(run, config)
    assert "was trained with a loss_fn" in refused(run, replay, run, 6, report=QUIET)


def test_accumulated_metrics_are_means(config: Config, tmp_path: Path):
    config = replace(config, steps=2, optim=replace(config.optim, accumulate=2))
    train(config, tmp_path / "run", loss_fn=penalised_loss, report=QUIET)
    for record in records(tmp_path / "run")[1:]:
        assert record["rows"] == 2.0
        assert record["loss"] == pytest.approx(record["unpenalised"] + record["penalty"], rel=1e-5)


def loss_with(**metrics: Any) -> Any:
    return lambda model, params, batch, key: (
        next_token_loss(model, params, batch, key)[0],
        metrics,
    )


RESERVED = ("step", "seconds", "skipped", "loss", "grad_norm", "lr", "finite")


@pytest.mark.parametrize("name", RESERVED)
def test_a_metric_with_a_name_of_the_log_is_refused(config: Config, tmp_path: Path, name: str):
    loss_fn = loss_with(**{name: jnp.float32(1)})
    said = message(train, config, tmp_path / "run", loss_fn=loss_fn, report=QUIET)
    assert "loss_fn" in said and name in said


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (loss_with(many=jnp.zeros(3)), "many"),
        (lambda model, params, batch, key: jnp.float32(0), "(loss, "),
        (lambda model, params, batch, key: (jnp.zeros(3), {}), "loss"),
    ],
    ids=["a metric that is no scalar", "no metrics", "a loss that is no scalar"],
)
def test_what_a_loss_returns_is_checked(config: Config, tmp_path: Path, loss_fn, expected: str):
    said = message(train, config, tmp_path / "run", loss_fn=loss_fn, report=QUIET)
    assert "loss_fn" in said and expected in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def accuracy(model: nn.Module, params: Any, batch: Batch) -> dict[str, jax.Array]:
    guesses = model.apply({"params": params}, batch.inputs)[0].argmax(-1)
    mask = jnp.ones(guesses.shape) if batch.mask is None else batch.mask
    return {"accuracy": ((guesses == batch.targets) * mask).sum() / jnp.maximum(mask.sum(), 1)}


def test_metrics_of_ones_own_at_evaluations(config: Config, plain: Path, tmp_path: Path):
    config = replace(config, eval_batches=2)
    train(config, tmp_path / "run", metrics=accuracy, report=QUIET)
    found = records(tmp_path / "run")
    assert {"val_sampled_accuracy", "train_sampled_accuracy"} <= set(found[4])
    assert 0 <= found[8]["val_accuracy"] <= 1 and "val_loss" in found[8]
    assert all("accuracy" not in name for name in found[1])
    # By hand, over the whole split.
    run = gptjax.load(tmp_path / "run", "last")
    text = Path(config.data.text).read_text()
    ids = run.tokenizer.encode(text[int(0.9 * len(text)) :])
    right = 0
    apply = jax.jit(run.model.apply)
    for start in range(0, len(ids) - 1, 8):
        window = ids[start : start + 9]
        logits, _ = apply({"params": run.params}, window[None, :-1])
        right += int((logits[0].argmax(-1) == window[1:]).sum())
    assert found[8]["val_accuracy"] == pytest.approx(right / (len(ids) - 1), abs=1e-6)
    # Metrics are no part: they change nothing that a run computes.
    assert Run(tmp_path / "run").parts == {}
    assert_same(arrays(tmp_path / "run", 8), arrays(plain, 8))


def test_a_metric_that_would_hide_the_loss_is_refused(config: Config, tmp_path: Path):
    metrics = lambda model, params, batch: {"loss": jnp.float32(0)}
    said = message(train, config, tmp_path / "run", metrics=metrics, report=QUIET)
    assert "metrics" in said and "loss" in said


# ---------------------------------------------------------------------------------------------
# Optimizers

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "reduce_on_plateau": lambda: optax.chain(
        optax.adamw(1e-2), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.9)
    ),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2, warmup_steps=2),
    "momo": lambda: optax.contrib.momo(1.0),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 2e-3, 8)
    ),
    "sgd": lambda: optax.sgd(0.1),
}


@pytest.fixture(scope="module")
def optimized(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run with each optimizer, which resumes bit for bit."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = resumes_bit_for_bit(config, folder, optimizer=OPTIMIZERS[name]())
        return made[name]

    return run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_ones_own_trains_and_resumes(optimized, config: Config, name: str):
    run = optimized(name)
    found = records(run)
    assert found[8]["val_loss"] < found[0]["val_loss"]
    assert set(Run(run).parts) == {"optimizer"}
    assert "was trained with a optimizer" in resume_refused(run, config).replace("an opt", "a opt")
    assert ("lr" in found[1]) == (name == "inject_hyperparams")
    assert "".join(gptjax.load(run, "last").generate(max_new_tokens=20))


def test_reduce_on_plateau_sees_the_loss(optimized):
    state = arrays(optimized("reduce_on_plateau"), 8)
    [scale] = [x for name, x in state.items() if name.endswith("/scale") and not x.ndim]
    assert float(scale) < 1


def test_schedule_free_saves_and_samples_its_evaluation_weights(optimized, config: Config):
    run, optimizer = optimized("schedule_free"), OPTIMIZERS["schedule_free"]()
    opened = Run(run)
    setup = assemble(config, opened.tokenizer.vocab_size, optimizer=optimizer)
    state = Checkpoints(opened.checkpoints_path).restore(8, setup.layout)
    inner = next(
        x
        for x in jax.tree.leaves(
            state.opt_state, is_leaf=lambda x: isinstance(x, optax.contrib.ScheduleFreeState)
        )
        if isinstance(x, optax.contrib.ScheduleFreeState)
    )
    expected = optax.contrib.schedule_free_eval_params(inner, state.params)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert_same(jax.device_get(gptjax.load(run, "last").params), jax.device_get(expected))
    # They are what was evaluated: the loss that was logged is that of what is stored.
    [loss] = [check for check in verify(str(run), optimizer=optimizer) if check.name == "loss"]
    assert loss.sound


def test_the_rate_of_inject_hyperparams_is_the_one_that_is_logged(optimized):
    found = [record["lr"] for record in records(optimized("inject_hyperparams"))[1:]]
    assert found == pytest.approx(np.linspace(1e-2, 2e-3, 9)[:8], rel=1e-5)


def test_verify_without_the_optimizer_is_sound_and_says_what_it_skipped(optimized, capsys):
    run = optimized("sgd")
    checks = {check.name: check for check in verify(str(run))}
    assert all(check.sound is not False for check in checks.values())
    assert checks["optimizer"].sound is None and "not checked" in checks["optimizer"].found
    assert checks["loss"].sound and checks["checkpoint 8"].sound
    verify_command.main([str(run)], "gptjax verify")  # exits with 0
    assert "not checked" in " ".join(capsys.readouterr().out.split())
    given = verify(str(run), optimizer=optax.sgd(0.1))
    assert all(check.sound for check in given) and "optimizer" not in {c.name for c in given}


# ---------------------------------------------------------------------------------------------
# Batches

V = 11


class Sums:
    """Sums modulo V as sequences a b a+b ...: the prompt is masked out."""

    tokenizer = None

    def __init__(self, seed: int = 0, rows: int = 4):
        self._seed, self._rows = seed, rows

    def batch(self, step: int) -> Batch:
        random = np.random.default_rng((self._seed, step))
        tokens = random.integers(0, V, (self._rows, 9))
        for t in range(2, 9):
            tokens[:, t] = (tokens[:, t - 1] + tokens[:, t - 2]) % V
        mask = np.ones((self._rows, 8), np.float32)
        mask[:, 0] = 0  # the second number cannot be known
        return Batch(tokens[:, :-1], tokens[:, 1:], mask)

    @property
    def validation(self) -> list[Batch]:
        return [self.batch(10**6 + i) for i in range(2)]


def sums_config(config: Config, **changes: Any) -> Config:
    return replace(config, model=replace(config.model, vocab_size=V), **changes)


def test_batches_of_ones_own_with_a_mask(config: Config, tmp_path: Path):
    config = sums_config(config, optim=replace(config.optim, accumulate=2))
    run = resumes_bit_for_bit(config, tmp_path, batches=Sums())
    found = records(run)
    assert set(found[8]) == {"step", "loss", "grad_norm", "lr", "val_loss"}
    assert Run(run).parts == {"batches": "Sums"}
    loaded = gptjax.load(run, "last")
    assert loaded.tokenizer.vocab_size == V
    # The logged validation loss counts the targets under the mask, and no other.
    total = weight = 0.0
    apply = jax.jit(loaded.model.apply)
    for batch in Sums().validation:
        logits, _ = apply({"params": loaded.params}, batch.inputs)
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        losses = -np.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0]
        total, weight = total + (losses * batch.mask).sum(), weight + batch.mask.sum()
    assert found[8]["val_loss"] == pytest.approx(total / weight, rel=1e-5)
    again = replay(run, 6, batches=Sums(), report=QUIET)
    assert again == {name: found[6][name] for name in again}


def test_another_source_of_batches_is_refused(config: Config, tmp_path: Path):
    config, run = sums_config(config), tmp_path / "run"
    train(replace(config, steps=4), run, batches=Sums(), report=QUIET)
    said = resume_refused(run, config, batches=Sums(seed=1))
    assert "batches" in said and str(run) in said
    for text in (config.data.text, str(tmp_path / "nowhere.txt")):
        moved = replace(config, data=replace(config.data, text=text))
        assert "was trained with a batches" in resume_refused(run, moved)
    said = refused(run, replay, run, 2, batches=Sums(seed=1), report=QUIET)
    assert "batches" in said
    checks = {check.name: check for check in verify(str(run))}
    assert all(check.sound is not False for check in checks.values())
    assert checks["loss"].sound is None and "batches" in checks["loss"].found
    assert train(config, run, resume=True, batches=Sums(), report=QUIET)["step"] == 8


class WithoutValidation:
    def batch(self, step: int) -> Batch:
        return Sums().batch(step)


def test_without_validation_nothing_is_evaluated(config: Config, tmp_path: Path):
    config, run = sums_config(config), tmp_path / "run"
    train(config, run, batches=WithoutValidation(), report=QUIET)
    assert all(not name.startswith("val") for record in records(run) for name in record)
    assert gptjax.load(run).step == 8  # with nothing to tell the best by, the last


def test_batches_of_ones_own_need_a_vocabulary(config: Config, tmp_path: Path):
    said = message(train, config, tmp_path / "run", batches=Sums(), report=QUIET)
    assert "model.vocab_size" in said
    assert not (tmp_path / "run").exists()


def test_batches_with_another_number_of_rows_are_refused(config: Config, tmp_path: Path):
    batches = Sums(rows=3)
    said = message(train, sums_config(config), tmp_path / "run", batches=batches, report=QUIET)
    assert "batch_size=4" in said and "3" in said


class Labelled:
    """Batches of another structure, for a loss of one's own: which number comes twice?"""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(step)
        tokens = np.stack([random.permutation(V)[:8] for _ in range(4)]).astype(np.uint16)
        tokens[:, 7] = tokens[:, 0]
        return {"tokens": tokens, "label": tokens[:, 0].copy()}

    @property
    def validation(self) -> list[dict[str, np.ndarray]]:
        return [self.batch(-step % 1000 + 1000) for step in (1, 2)]


def label_loss(model: nn.Module, params: Any, batch: Any, key: jax.Array) -> Any:
    logits, _ = model.apply({"params": params}, batch["tokens"], train=True, rngs={"dropout": key})
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, -1], batch["label"]).mean()
    return loss, {"correct": (logits[:, -1].argmax(-1) == batch["label"]).mean()}


def label_metrics(model: nn.Module, params: Any, batch: Any) -> dict[str, jax.Array]:
    logits, _ = model.apply({"params": params}, batch["tokens"])
    return {"correct": (logits[:, -1].argmax(-1) == batch["label"]).mean()}


def test_batches_and_a_loss_of_ones_own(config: Config, tmp_path: Path):
    own = {"batches": Labelled(), "loss_fn": label_loss, "metrics": label_metrics}
    run = resumes_bit_for_bit(sums_config(config), tmp_path, **own)
    found = records(run)
    assert set(found[8]) == {"step", "loss", "grad_norm", "lr", "correct", "val_correct"}
    assert Run(run).parts == {"batches": "Labelled", "loss_fn": "label_loss"}
    again = replay(run, 6, batches=Labelled(), loss_fn=label_loss, report=QUIET)
    assert again == {name: found[6][name] for name in again}


# ---------------------------------------------------------------------------------------------
# Models


class Softened(GPT):
    """A GPT with the parameters of the plain one, and other logits."""

    def head(self, x: jax.Array) -> jax.Array:
        return super().head(x) / 3


class Otherwise(MeanOfThePast):
    """Another model with the same parameters."""


OWN_MODELS: dict[str, Any] = {"own": MeanOfThePast, "softened": Softened}


@pytest.fixture(scope="module", params=OWN_MODELS)
def own_model(request, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of one's own, by its class, and the folder of a run with it."""
    model = OWN_MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return model, resumes_bit_for_bit(config, folder, model=model)


def test_a_model_of_ones_own_is_used_when_given(own_model, config: Config):
    model, run = own_model
    assert Run(run).parts == {"model": model.__name__}
    loaded = gptjax.load(run, "last", model=model)
    assert type(loaded.model) is model
    text = Path(config.data.text).read_text()
    assert loaded.loss(text[int(0.9 * len(text)) :]) == pytest.approx(
        records(run)[8]["val_loss"], abs=1e-4
    )
    assert len("".join(loaded.generate("the", 20))) == 20
    made = model(config.model, loaded.tokenizer.vocab_size)  # a module does as well as its class
    assert_same(gptjax.load(run, "last", model=made).params, loaded.params)
    assert all(check.sound for check in verify(str(run), model=model))
    found = records(run)
    again = replay(run, 6, model=model, report=QUIET)
    assert again == {name: found[6][name] for name in again}


def test_without_its_model_a_run_is_refused_in_one_line(own_model, config: Config, tmp_path: Path):
    model, run = own_model
    expected = f"{run} was trained with a model that is not part of gptjax, {model.__name__}; "
    assert refused(run, gptjax.load, run).startswith(expected)
    assert resume_refused(run, config).startswith(expected)
    assert refused(run, replay, run, 2, report=QUIET).startswith(expected)
    assert refused(run, export, run, tmp_path / "exported").startswith(expected)
    assert not (tmp_path / "exported").exists()
    said = refused(run, train, replace(config, init=str(run)), tmp_path / "next", report=QUIET)
    assert expected in said and not (tmp_path / "next").exists()


def test_with_another_model_a_run_is_refused_in_one_line(own_model, config: Config):
    model, run = own_model
    for other in (Otherwise, GPT):
        said = refused(run, gptjax.load, run, model=other)
        assert model.__name__ in said and str(run) in said
        assert model.__name__ in resume_refused(run, config, model=other)


def test_verify_without_the_model_is_sound_and_says_what_it_skipped(own_model, capsys):
    model, run = own_model
    before = contents(run)
    checks = {check.name: check for check in verify(str(run))}
    assert all(check.sound is not False for check in checks.values())
    assert checks["model"].sound is None and model.__name__ in checks["model"].found
    assert checks["loss"].sound is None and checks["checkpoint 8"].sound  # its files at least
    verify_command.main([str(run)], "gptjax verify")  # exits with 0
    assert model.__name__ in capsys.readouterr().out
    assert contents(run) == before


def test_export_with_a_model_of_ones_own(own_model, tmp_path: Path):
    """Parameters that GPT does not have cannot be written; they must not become zeros."""
    model, run = own_model
    if model is Softened:
        assert export(run, tmp_path / "exported", model=model) == "GPT2LMHeadModel"
        return
    said = refused(run, export, run, tmp_path / "exported", model=model)
    assert "MeanOfThePast" in said and not (tmp_path / "exported").exists()


def test_a_model_of_the_lecture_needs_not_be_given_and_cannot_be_exported(
    config: Config, tmp_path: Path
):
    run = tmp_path / "run"
    train(config, run, model=Bigram, report=QUIET)
    assert Run(run).parts == {"model": "Bigram"}
    assert type(gptjax.load(run).model) is Bigram
    assert all(check.sound for check in verify(str(run)))
    assert train(replace(config, steps=9), run, resume=True, report=QUIET)["step"] == 9
    said = refused(run, export, run, tmp_path / "exported")
    assert "Bigram" in said and not (tmp_path / "exported").exists()


# ---------------------------------------------------------------------------------------------
# A refused resume changes nothing


def test_a_refused_resume_leaves_the_folder_as_it_was(plain: Path, config: Config, tmp_path: Path):
    other_text = tmp_path / "other.txt"
    other_text.write_text(Path(config.data.text).read_text()[::-1])
    optim, model = config.optim, config.model
    longer = replace(config, steps=12)  # a setting that may change, beside one that may not
    for changed, own, expected in (
        (replace(config, steps=6), {}, "is at step 8 already, past steps=6"),
        (replace(longer, model=replace(model, n_embd=16)), {}, "model.n_embd=16"),
        (replace(longer, model=replace(model, dropout=0.5)), {}, "model.dropout=0.5"),
        (replace(longer, optim=replace(optim, ema=0.9)), {}, "cannot be loaded"),
        (replace(longer, optim=replace(optim, kind="muon")), {}, "cannot be loaded"),
        (replace(longer, optim=replace(optim, lora_rank=2)), {}, "optim.lora_rank=2"),
        (replace(longer, data=replace(config.data, text=str(other_text))), {}, "the text "),
        (replace(longer, init="gpt2"), {}, "init=gpt2"),
        (longer, {"optimizer": optax.sgd(0.1)}, "was trained with the optimizer of its config"),
        (longer, {"model": MeanOfThePast}, "was trained with the model of its config"),
        (longer, {"loss_fn": label_loss}, "was trained with the loss_fn of its config"),
        (longer, {"batches": Labelled()}, "was trained with the batches of its config"),
    ):
        assert expected in resume_refused(plain, changed, **own), expected


def test_the_file_that_parts_come_from_is_named(config: Config, tmp_path: Path):
    run = tmp_path / "run"
    config = replace(config, steps=2)
    train(config, run, model=MeanOfThePast, recipe="examples/mine.py", report=QUIET)
    stored = json.loads((run / "config.json").read_text())
    assert stored["parts"] == {"model": "MeanOfThePast", "config": "examples/mine.py"}
    assert "give --config examples/mine.py" in refused(run, gptjax.load, run)
    copies = [json.loads(p.read_text()) for p in run.glob("checkpoints/*/config.json")]
    assert copies and all(copy["parts"] == stored["parts"] for copy in copies)
    # Where the file is has nothing to say about the run.
    longer = replace(config, steps=3)
    train(longer, run, resume=True, model=MeanOfThePast, recipe="elsewhere.py", report=QUIET)


def test_parts_with_settings_are_told_apart(config: Config, tmp_path: Path):
    class Scaled(MeanOfThePast):
        scale: float = 1.0

    run = tmp_path / "run"
    train(replace(config, steps=2), run, model=lambda c, v: Scaled(c, v, scale=2.0), report=QUIET)
    assert Run(run).parts == {"model": "Scaled(scale=2.0)"}
    assert "Scaled(scale=2.0)" in refused(run, gptjax.load, run, model=Scaled)
    gptjax.load(run, model=lambda c, v: Scaled(c, v, scale=2.0))


def test_parameter_names_of_a_model_of_ones_own(config: Config, tmp_path: Path):
    """Its optimizer is the config's: weight decay and Muon find no name they know, and say no."""
    train(replace(config, steps=2), tmp_path / "run", model=MeanOfThePast, report=QUIET)
    loaded = gptjax.load(tmp_path / "run", model=MeanOfThePast)
    assert set(by_path(loaded.params)) == {
        *("Embed_0/embedding", "Dense_0/kernel", "Dense_0/bias"),
    }
