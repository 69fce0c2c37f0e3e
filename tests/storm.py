"""Kill storm: training is killed at random moments, and must end as if never interrupted.

    python tests/storm.py --kills 200

Each session runs the real `train.py` in a process forked from this one, so that the libraries are
imported only once. It is ended by SIGKILL, SIGTERM, SIGINT or a simulated power cut (stop the
process, copy the folder, kill the process, continue with the copy), at a random time or during a
save, a removal or a write of metrics. The folder is checked after each kill. A finished run is
compared bit for bit with an uninterrupted one: parameters, optimizer state, metrics (except the
seconds) and samples.
"""

import argparse
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COMMON = (
    "--config tiny --steps 40 --save-every 4 --eval-every 6 --eval-batches 1 --batch-size 4 "
    "--steps-per-dispatch 3 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 "
    "--model.block-size 16 --model.dropout 0.1 --mesh.data 1 --optim.accumulate 2"
).split()
VARIANTS = {
    "adamw": [],
    "muon": "--optim.kind muon --optim.ema 0.9 --optim.schedule wsd".split(),
}
SIGNALS = ["SIGKILL"] * 5 + ["SIGTERM", "SIGINT", "power cut"]
MOMENTS = ["any time"] * 2 + ["orbax writes", "before the name", "a removal", "a line of metrics"]
LIMIT = 300  # longest session, in seconds


@dataclass
class Tally:
    """Counts so far."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    survived: int = 0
    runs: int = 0


class Lost(Exception):
    """A guarantee was violated."""


def command(text: Path, directory: Path, variant: str) -> list[str]:
    """The command line that starts or resumes the run."""
    if (directory / "config.json").exists():
        return ["train.py", "--run", str(directory), "--resume"]
    options = ["--run", str(directory), "--data.text", str(text)]
    return ["train.py", *COMMON, *VARIANTS[variant], *options]


def spawn(work: Callable[[], object], log: Path) -> int:
    """Run `work` in a forked child with its output in `log`; returns the process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def live(text: Path, directory: Path, variant: str) -> None:
    """One session of `train.py`."""
    sys.argv = command(text, directory, variant)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def wait(child: int) -> int:
    """The exit code, or the negative signal number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_ended(child: int) -> bool:
    """Whether the child has exited; its exit code can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def moment_has_come(moment: str, directory: Path, lines: int) -> bool:
    """Whether the operation to interrupt is in progress."""
    folder = directory / "checkpoints"
    if moment == "orbax writes":
        return any(folder.glob("*.orbax-checkpoint-tmp"))
    if moment == "before the name":
        return any(folder.glob("*.unsealed"))
    if moment == "a removal":
        return any(folder.glob("*.dropped"))
    return size(directory / "metrics.jsonl") > lines


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill(child: int, how: str, directory: Path) -> None:
    """End a session."""
    if how != "power cut":
        os.kill(child, getattr(signal, how))
        return
    os.kill(child, signal.SIGSTOP)
    copy = directory.with_suffix(".copy")
    shutil.copytree(directory, copy)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    shutil.rmtree(directory)
    copy.rename(directory)


def check(directory: Path, before: int) -> int:
    """Check after a kill that metrics and checkpoints are consistent and nothing was lost.

    Args:
        directory: the run's folder.
        before: step of the newest checkpoint after the previous kill.

    Returns:
        The step of the newest intact checkpoint.
    """
    from gptjax.runs import records
    from gptjax.runs.checkpoint import Checkpoints

    metrics = directory / "metrics.jsonl"
    found, damage = records.read(metrics) if metrics.exists() else ([], None)
    if damage:
        raise Lost(damage)
    checkpoints = Checkpoints(directory / "checkpoints")
    newest = checkpoints.newest_sound() or 0
    if newest != max(checkpoints.steps(), default=0):
        raise Lost(f"the newest checkpoint of {checkpoints.steps()} is damaged")
    if newest < before:
        raise Lost(f"checkpoint {before} existed before, but now the newest is {newest}")
    if newest and found and found[-1]["step"] < newest - 1:
        raise Lost(f"checkpoint {newest} exists, but the metrics end at {found[-1]['step']}")
    return newest


def same(reference: Path, directory: Path) -> None:
    """Compare two finished runs, bit for bit."""
    import jax

    import gptjax
    from gptjax.assembly import assemble
    from gptjax.cli.compilation_cache import use_compilation_cache
    from gptjax.runs import records
    from gptjax.runs.checkpoint import Checkpoints
    from gptjax.runs.run import Run

    use_compilation_cache()
    ends = []
    for path in (reference, directory):
        run = Run(path)
        setup = assemble(run.config, run.tokenizer.vocab_size)
        state = Checkpoints(run.checkpoints_path).restore(run.config.steps, setup.layout)
        lines = [{**record, "seconds": 0} for record in records.read(run.metrics_path)[0]]
        text = "".join(gptjax.load(path, "last").generate(max_new_tokens=60))
        ends.append(([jax.device_get(x).tobytes() for x in jax.tree.leaves(state)], lines, text))
    for name, a, b in zip(("arrays", "metrics", "samples"), *ends, strict=True):
        if a != b:
            raise Lost(f"{name} of {directory} differ from {reference}")


def storm(kills: int, seed: int, folder: Path, variants: list[str], say: Callable) -> Tally:
    """Kill and resume runs until `kills` kills are made and the last run is finished.

    Raises:
        Lost: a guarantee was violated; the folder is kept for inspection.
    """

    chance, tally, text = random.Random(seed), Tally(), folder / "play.txt"
    text.write_text("".join(f"{i} {i * i % 97} {i * i * i % 89}\n" for i in range(400)))
    log = folder / "log"
    durations: dict[str, float] = {}
    for variant in variants:
        for name in (f"{variant}-warm", f"{variant}-reference"):  # the first one compiles
            began = time.monotonic()
            child = spawn(lambda v=variant, n=name: live(text, folder / n, v), log)
            if code := wait(child):
                raise Lost(f"the reference ended with {code}: {log.read_text()[-2000:]}")
            durations[variant] = time.monotonic() - began
    say(f"an uninterrupted session takes {durations} s")
    while sum(tally.kills.values()) < kills:
        variant = variants[tally.runs % len(variants)]
        directory, reference = folder / f"{variant}-{tally.runs}", folder / f"{variant}-reference"
        killed, newest = 0, 0
        while True:
            child = spawn(lambda v=variant, d=directory: live(text, d, v), log)
            how, moment = chance.choice(SIGNALS), chance.choice(MOMENTS)
            last = sum(tally.kills.values()) >= kills
            began, lines = time.monotonic(), size(directory / "metrics.jsonl")
            at = began + chance.uniform(0, durations[variant])
            while not has_ended(child) and not last:
                if moment == "any time":
                    due = time.monotonic() > at
                else:
                    due = moment_has_come(moment, directory, lines)
                if due and (how != "power cut" or directory.exists()):
                    time.sleep(chance.choice((0, 0, 0.002, 0.02)))
                    break
                if time.monotonic() - began > LIMIT:
                    raise Lost(f"a session of {directory} took over {LIMIT} s")
                time.sleep(0.0005)
            if has_ended(child) or last:
                code = wait(child)
                if code:
                    raise Lost(f"{directory} ended with {code}: {log.read_text()[-2000:]}")
                break
            kill(child, how, directory)
            code = wait(child)
            tally.kills[how] += 1
            tally.moments[moment] += 1
            killed += 1
            # Clean stop (0), killed, or interrupted before the signal handler was installed (130).
            if code not in (0, -signal.SIGKILL, -signal.SIGTERM, 130):
                raise Lost(f"{how} at {moment}: ended with {code}: {log.read_text()[-2000:]}")
            newest = check(directory, newest)
        if wait(spawn(lambda r=reference, d=directory: same(r, d), log)):
            raise Lost(f"{directory}: {log.read_text()[-2000:]}")
        tally.survived += killed
        tally.runs += 1
        shutil.rmtree(directory)
        say(f"run {tally.runs} ({variant}) equals its reference; kills {sum(tally.kills.values())}")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gptjax-storm-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
    say = lambda line: print(time.strftime("%H:%M:%S"), line, flush=True)
    say(f"in {folder}, seed {arguments.seed}")
    tally = storm(arguments.kills, arguments.seed, folder, arguments.variants, say)
    shutil.rmtree(folder)
    print(f"kills survived of kills tried: {tally.survived} of {sum(tally.kills.values())}")
    print(f"by {dict(tally.kills)}; at {dict(tally.moments)}; {tally.runs} runs, all equal")


if __name__ == "__main__":
    main()
