"""`gptjax train` and `train.py`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptjax.cli import budget
from gptjax.cli.flags import HIDDEN, INLINE, given, parse, peek, wants_help
from gptjax.cli.recipe import (
    Recipe,
    base_name,
    changes,
    fitted,
    lecture_model,
    starting_point,
    stored,
)
from gptjax.config import OF_A_LOADED_MODEL, Config, differences
from gptjax.errors import UserError, note
from gptjax.presets import PRESETS
from gptjax.runs import folders

STOPPED = 75  # exit code of a run to be continued (EX_TEMPFAIL of sysexits.h)
# The fields of a model that the lecture's models read.
OF_A_LECTURE_MODEL = "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout"


@dataclass(frozen=True)
class TrainCommand:
    """Train a GPT on a text. Any field of the config can be set."""

    config: str = "small"
    """Preset to start from; or a Python file that defines `config` and optionally your own model,
    optimizer, loss_fn, batches or metrics; or a run (its name, folder or config.json), whose
    settings a new run then takes. A preset comes before a run of the same name."""
    run: str | None = None
    """Name of the run's folder in runs/; None: the name of the preset or file."""
    resume: bool = False
    """Continue that run, or the newest one, from its last checkpoint."""
    resume_or_start: bool = False
    """Continue the run of that name if there is one, else start it: for schedulers, which repeat a
    command. The exit code is 75 if a signal stopped the run before its last step."""
    tokens: int | None = None
    """Length of the run in tokens, in place of steps: as many steps as have at most so many."""
    flops: float | None = None
    """Length of the run in FLOPs, in place of steps, by the estimate of the model's arithmetic that
    MFU uses: 6 FLOPs for each parameter of a matrix, and attention's, for each token."""
    replay: int | None = None
    """Recompute this step of a run and show its loss, gradient and batch; nothing is written."""
    plan: str | None = None
    """Do not train: estimate memory, time and the bottleneck on v5e:4x4, h100:8, ... or here; if it
    does not fit, say what does."""
    special_tokens: bool = True
    """Put around each document the tokens that a pretrained tokenizer itself puts around a text,
    such as a BOS; prompts of the run get them too. The run keeps which ones."""
    profile: bool = False
    """Trace a few steps into the run's folder profile/, for XProf or TensorBoard."""
    deterministic: bool = False
    """On a GPU, use only kernels that give the same bits each time, so that a run repeats and
    resumes exactly; slower. Give it again with --resume. On a CPU nothing changes."""
    distributed: str | None = None
    """Join a multi-process run: auto detects SLURM, Open MPI, Kubernetes or a TPU pod;
    RANK/WORLD@HOST:PORT gives this process's rank, the number of processes and the coordinator."""
    distributed_wait: int = 300
    """Timeout in seconds for all processes to join."""
    settings: Config = field(default=PRESETS["small"], metadata=INLINE)
    recipe: Recipe | None = field(default=None, metadata=HIDDEN)
    fitted: str = field(default="", metadata=HIDDEN)
    budget: str = field(default="", metadata=HIDDEN)

    def directory(self) -> Path:
        """The folder of the run: an existing one if it is resumed or replayed, else a new one.

        Raises:
            UserError: no such run, or the folder of a new run is not empty.
        """
        name = base_name(self.config)
        if self.resume or self.replay is not None:
            return folders.find(self.run, like=name)
        return folders.new_directory(self.run, name)


def parse_train(argv: list[str], prog: str = "train.py") -> TrainCommand:
    """Read the arguments; defaults are the preset's or file's or, resuming, those of the run.

    Raises:
        UserError: an unknown preset, flag or value, or no run to resume.
    """
    config, name = peek(argv, "--config"), peek(argv, "--run")
    settings, recipe = starting_point(config) if config else (None, None)
    again = any(word.replace("_", "-") == "--resume-or-start" for word in argv)
    if again and (name is None or "--resume" in argv):
        raise UserError(
            "--resume-or-start needs --run NAME, for a repeated command must find the run of the "
            "first one, and no --resume"
        )
    resume = "--resume" in argv or (name is not None and again and folders.is_run(name))
    old = resume or peek(argv, "--replay") is not None
    if config is None:
        config = "small" if old or peek(argv, "--init") is None else "finetune"
    if old and not wants_help(argv):
        from gptjax.runs.run import read_config  # not for `--help`

        like = base_name(config)
        if "--resume" in argv and peek(argv, "--config") and stored(config) is not None:
            raise UserError(
                f"--config {config} is a run; to continue it give --run {config} --resume, or for "
                f"a new run like it leave --resume out"
            )
        directory = folders.find(name, like=like if settings else None)
        settings, name = read_config(directory), str(directory)
        argv = [*argv, f"--run={name}"]
    settings = settings or PRESETS[config]
    default = TrainCommand(config, name, settings=settings, recipe=recipe)
    if not old:
        fit = fitted(settings, given(TrainCommand, default, argv))
        default = replace(default, settings=fit, fitted=changes(settings, fit))
    elif not wants_help(argv):
        budget.check_warm_up(settings, given(TrainCommand, default, argv), name)
    command = parse(TrainCommand, default, argv, prog, f"Presets: {', '.join(PRESETS)}.")
    values = given(TrainCommand, default, argv)
    budget.check(command, values)
    limits = {"data.val_fraction", "data.val_limit"} & values.keys()
    if limits and values.get("data.val") is not None:
        flag = f"--{min(limits).replace('_', '-')}"
        raise UserError(f"{flag} has no effect with --data.val, all of which is read; leave it out")
    if command.settings.init is not None and not old:
        changed = differences(settings.model, command.settings.model)
        if fixed := [name for name in changed if name not in OF_A_LOADED_MODEL]:
            flag = f"--model.{fixed[0].replace('_', '-')}"
            raise UserError(
                f"{flag} cannot be set with --init, for the model comes with its weights; what "
                f"can be set: {', '.join(OF_A_LOADED_MODEL)}"
            )
    if not old and lecture_model(config):
        changed = differences(settings.model, command.settings.model)
        if ignored := [name for name in changed if name not in OF_A_LECTURE_MODEL]:
            flag = f"--model.{ignored[0].replace('_', '-')}"
            raise UserError(
                f"{flag} has no effect on the lecture's models, which {config} trains; what can be "
                f"set: {', '.join(OF_A_LECTURE_MODEL)}"
            )
    if (command.resume and not old) or command.resume_or_start is not again:
        flag = "--resume" if command.resume else "--resume-or-start"
        raise UserError(f"give {flag} alone, without a value")
    if command.replay is not None and command.distributed is not None:
        raise UserError("--replay runs in one process; leave --distributed out")
    if command.distributed_wait < 1:
        raise UserError(
            f"--distributed-wait {command.distributed_wait} is too small; give 1 or more seconds"
        )
    return budget.for_tokens(replace(command, resume=resume), argv)


def _say(command: TrainCommand, prog: str) -> None:
    """Note what the command's settings came out of."""
    if command.budget:
        note(f"{prog}: {command.budget}")
    if command.fitted:
        note(f"{prog}: to fit what was given, {command.config} trains with {command.fitted}")


def main(argv: list[str], prog: str) -> None:
    """Train, replay a step or plan; jax is imported once the arguments are understood."""
    command = parse_train(argv, prog)
    if command.deterministic:
        from gptjax.parallel.switches import use_deterministic_kernels

        use_deterministic_kernels()
    if command.plan is not None and command.flops is not None:
        command = budget.for_flops(command, argv, budget.vocab_size(command, None))
    if command.flops is None:
        _say(command, prog)
    if command.plan is not None:
        from gptjax.cli.plan import show

        return show(command.config, command.settings, command.plan, command.recipe)
    directory = command.directory() if command.distributed is None else None
    from gptjax.cli.compilation_cache import use_compilation_cache
    from gptjax.parallel import distributed

    use_compilation_cache()
    with distributed.joined(command.distributed, command.distributed_wait, prog):
        # Of several processes the first one chooses the name of a new folder.
        directory = directory or Path(distributed.first_does(lambda: str(command.directory())))
        if command.flops is not None:
            size = distributed.first_does(lambda: budget.vocab_size(command, directory))
            command = budget.for_flops(command, argv, size)
            _say(command, prog)
        if command.replay is not None:
            from gptjax.cli.replay import replay_step

            return replay_step(directory, command.replay, command.recipe)
        from gptjax.training import train

        own: dict[str, Any] = {"special_tokens": command.special_tokens}
        if command.recipe:
            own |= {**command.recipe.parts(command.settings), "recipe": command.recipe.path}
        elif not command.resume and (stage := lecture_model(command.config)):
            from gptjax.lecture.models import STAGES

            own |= {"model": STAGES[stage]}
        options = {"resume": command.resume, "profile": command.profile, **own}
        record = train(command.settings, directory, **options)
    if command.resume_or_start and record["step"] < command.settings.steps:
        raise SystemExit(STOPPED)
