"""Warnings that an experienced person would give, from the records of a run alone."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from gptjax.runs import records as metrics_file
from gptjax.runs.records import Record

FAR = 1.0  # nats between the loss before training and that of a uniform guess
RISE = 0.01  # relative rise of the validation loss that is more than noise
AVERAGED = 3  # evaluations on samples
JUMP = 0.1  # relative rise of the training loss's mean that no batch explains
ALWAYS, HARD = 0.99, 5.0  # share of steps; the gradients' median norm over their limit
ENOUGH = 20  # steps that a mean is taken over, at least


class Facts(NamedTuple):
    """What the records of a run do not say.

    Attributes:
        chance: loss of a uniform guess, ln(vocabulary size), if the run starts from random weights
            and its loss is the cross-entropy of tokens; else None.
        grad_clip: norm that gradients are clipped to, if they are.
        warmup_steps: of the learning rate.
    """

    chance: float | None = None
    grad_clip: float | None = None
    warmup_steps: int = 0


class Stretch(NamedTuple):
    """The steps since the last evaluation, up to the next one.

    Attributes:
        step: of the evaluation at its end.
        val: validation loss, or None.
        sampled: whether that is a sample's, which has noise.
        steps: how many of its steps have a training loss.
        loss: mean of the training losses, or None.
        norm: median of the gradients' norms, or None.
        clipped: share of the steps after the warm-up whose gradient was clipped, or None.
    """

    step: int
    val: float | None
    sampled: bool = False
    steps: int = 0
    loss: float | None = None
    norm: float | None = None
    clipped: float | None = None


class Watch:
    """Gives each warning about a run once, after an evaluation.

    Args:
        facts: of the run.
        say: prints a line.
        path: of its metrics.jsonl, with what was logged before.
    """

    def __init__(self, facts: Facts, say: Callable[[str], None], path: Path):
        self._facts, self._say = facts, say
        self._steps: list[Record] = []  # since the last evaluation
        self._found: list[Stretch] = []
        self._told: set[str] = set()
        self._add(record for record, _, _ in metrics_file.scan(path) if record is not None)

    def see(self, records: Iterable[Record]) -> None:
        """Take the next records, and say what is new about the run."""
        if self._add(records):
            for about, warning in diagnose(self._found, self._facts).items():
                if about not in self._told:
                    self._told.add(about)
                    self._say(f"warning: {warning}")

    def _add(self, records: Iterable[Record]) -> bool:
        """Whether there was an evaluation among them."""
        before = len(self._found)
        for record in records:
            self._steps.append(record)
            if any(name.startswith("val_") for name in record):
                self._found.append(stretch(self._steps, self._facts))
                self._steps = []
        return len(self._found) > before


def stretch(records: Sequence[Record], facts: Facts) -> Stretch:
    """Sum up records, of which the last one has an evaluation."""
    losses = [r["loss"] for r in records if r.get("loss") is not None]
    norms = [r for r in records if r.get("grad_norm") is not None]
    clip, last = facts.grad_clip, records[-1]
    late = [r["grad_norm"] > clip for r in norms if clip and r["step"] > facts.warmup_steps]
    return Stretch(
        step=last["step"],
        val=last.get("val_sampled_loss", last.get("val_loss")),
        sampled="val_sampled_loss" in last,
        steps=len(losses),
        loss=fmean(losses) if losses else None,
        norm=median(r["grad_norm"] for r in norms) if norms else None,
        clipped=fmean(late) if late else None,
    )


def diagnose(found: Sequence[Stretch], facts: Facts) -> dict[str, str]:
    """Warnings by what they are about, each a line; none for a run that looks well.

    Args:
        found: the run's stretches, from its first one on.
        facts: of the run.
    """
    warnings = {
        "start": _far_from_chance(found, facts),
        "overfitting": _overfitting(found),
        "divergence": _divergence(found),
        "clipping": _always_clipped(found, facts),
    }
    return {about: warning for about, warning in warnings.items() if warning}


def _far_from_chance(found: Sequence[Stretch], facts: Facts) -> str | None:
    loss, chance = (found[0].val if found and found[0].step == 0 else None), facts.chance
    if loss is None or chance is None or abs(loss - chance) < FAR:
        return None
    start = f"the validation loss before training is {loss:.2f}, a uniform guess has {chance:.2f}"
    if loss > chance:
        return (
            f"{start}: the model begins with large logits, which the first steps only shrink; "
            f"initialise its output layer smaller"
        )
    return f"{start}: check that the model cannot see the tokens it is to predict"


def _overfitting(found: Sequence[Stretch]) -> str | None:
    both = [(s.val, s.loss, s.step) for s in found if s.val is not None and s.loss is not None]
    # Means over so many evaluations, without which a sample's noise would look like a rise.
    width = AVERAGED if any(s.sampled for s in found) else 1
    means = [fmean(val for val, _, _ in both[i : i + width]) for i in range(len(both) - width + 1)]
    if not means:
        return None
    best = means.index(min(means))
    after = means[best + width :]
    (_, before, step), (_, now, _) = both[best + width // 2], both[-1]
    if len(after) < 2 or min(after[-2:]) <= means[best] * (1 + RISE) or now >= before:
        return None
    return (
        f"the model overfits: the validation loss has risen since about step {step} "
        f"({means[best]:.4f} then, {means[-1]:.4f} now) while the training loss fell; more text, a "
        f"smaller model, more --model.dropout or fewer --steps help; the best checkpoint is kept"
    )


def _divergence(found: Sequence[Stretch]) -> str | None:
    losses = [(s.loss, s.step) for s in found if s.loss is not None and s.steps >= ENOUGH]
    if found and found[0].step == 0 and found[0].val is not None:
        losses.insert(0, (found[0].val, 0))
    if len(losses) < 2:
        return None
    (best, step), (now, last) = min(losses), losses[-1]
    if now <= best * (1 + JUMP):
        return None
    return (
        f"the mean loss has risen from {best:.3f} (up to step {step}) to {now:.3f} (up to step "
        f"{last}): the learning rate is probably too high; lower --optim.learning-rate, or "
        f"lengthen --optim.warmup-steps"
    )


def _always_clipped(found: Sequence[Stretch], facts: Facts) -> str | None:
    last = [s for s in found if s.steps >= ENOUGH and s.clipped is not None][-2:]
    if len(last) < 2 or min(s.clipped or 0.0 for s in last) < ALWAYS:
        return None
    if not all(s.norm and facts.grad_clip and s.norm > HARD * facts.grad_clip for s in last):
        return None
    since = last[0].step - last[0].steps + 1
    return (
        f"nearly every gradient since step {since} was clipped (median norm {last[1].norm:.3g}, "
        f"--optim.grad-clip {facts.grad_clip:g}): the learning rate is probably too high, or the "
        f"limit too low"
    )
