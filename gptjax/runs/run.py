"""A run's folder: the unit of exchange between training, sampling and you.

    runs/NAME/config.json     its settings, and which parts were the caller's own
              tokenizer.json  how text becomes ids
              chat.json       a pretrained model's chat template and stop tokens, if it has any
              metrics.jsonl   one JSON object for each step, in order
              environment.json  command line, code, versions, devices: of each start and resume
              checkpoints/    see checkpoint.py
              bad/            states and batches of skipped steps, if any

No pickle, and nothing outside the folder.
"""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gptjax.config import Config, differences
from gptjax.errors import UserError
from gptjax.runs import config_json, files, records
from gptjax.runs.files import Damaged
from gptjax.runs.folders import CHAT, CONFIG, METRICS, TEXT, TOKENIZER, copies, taken, unwritable
from gptjax.runs.records import Record
from gptjax.text import tokenizers as tokenizer_module
from gptjax.text.tokenizers import Tokenizer

TEXTS = "data.text", "data.val"  # may lie elsewhere: `use_text` tells whether they are the same
SPEED_ONLY = "model.dtype", "model.remat", "data.resident_tokens"  # may change while resuming


def read_config(directory: Path) -> Config:
    """The run's config.

    Raises:
        UserError: missing or damaged.
    """
    return _read(directory, CONFIG, config_json.from_json).config


class Run:
    """An open run folder: `config`, `parts`, `tokenizer`, and the metrics.

    Args:
        directory: that holds config.json and tokenizer.json.

    Attributes:
        chat: the text of chat.json (see generation/chat.py); None: there is none.
        changed: settings that differ from those of the newest checkpoint: {"steps": (old, new)}.

    Raises:
        UserError: a file that is missing or damaged, or something that leads out of the folder.
    """

    def __init__(self, directory: Path):
        files.refuse_links(directory)
        self.directory = directory
        self.config, self.parts = _read(directory, CONFIG, config_json.from_json)
        self._place = directory.stat()
        self.tokenizer: Tokenizer = _read(directory, TOKENIZER, tokenizer_module.from_json)
        self._tokenizer_text: str = _read(directory, TOKENIZER, str)
        has_chat = (directory / CHAT).exists() or any(copies(directory, CHAT))
        self.chat: str | None = _read(directory, CHAT, str) if has_chat else None
        self.changed = self._compare_with_copies()
        self._text: str | None = None
        # By step, once asked for; ranges of steps without a record; the first step yet to come.
        self._val_losses: dict[int, float] | None = None
        self._gaps: list[range] = []
        self._due = 0

    def _compare_with_copies(self) -> dict[str, tuple[Any, Any]]:
        """Settings that changed since the newest checkpoint.

        Raises:
            UserError: something has that never may.
        """
        for name, own in ((TOKENIZER, self._tokenizer_text), (CHAT, self.chat)):
            for place, text in copies(self.directory, name):
                if text != own:
                    raise Damaged(
                        f"{self.directory / name} is damaged: it is not the one that the "
                        f"checkpoints were made with; an intact copy is {place}"
                    )
                break
        for place, text in copies(self.directory, CONFIG):
            try:
                stored, parts = config_json.from_json(text)
            except UserError as error:
                raise Damaged(f"{place} is damaged: {error}") from None
            if parts != self.parts:
                names = dict(sorted(parts.items() ^ self.parts.items()))
                raise Damaged(
                    f"{self.directory / CONFIG} is damaged: of the parts that the checkpoints were "
                    f"made with it says otherwise: {', '.join(names)}; an intact copy is {place}"
                )
            changed = differences(stored, self.config)
            for name, (old, new) in changed.items():
                if _is_fixed(name) and name not in TEXTS:  # a text may have moved
                    raise Damaged(
                        f"{self.directory / CONFIG} is damaged: it says {name}={new}, and the "
                        f"checkpoints were made with {name}={old}; an intact copy is {place}"
                    )
            return changed
        return {}

    @property
    def texts(self) -> dict[str, str]:
        """The small files that each checkpoint keeps copies of, by name.

        Raises:
            UserError: another folder lies where the run's was.
        """
        self._check_place()
        return {
            CONFIG: config_json.to_json(self.config, self.parts),
            TOKENIZER: self._tokenizer_text,
            METRICS: records.digest_json(self.metrics_path),
            **({} if self._text is None else {TEXT: self._text}),
            **({} if self.chat is None else {CHAT: self.chat}),
        }

    def use_text(self, name: str, fingerprint: str) -> None:
        """Set the fingerprint of the training data.

        Raises:
            UserError: its checkpoints were trained on something else.
        """
        for _, text in copies(self.directory, TEXT):
            if text != fingerprint:
                raise UserError(
                    f"the text {name} is not the one that {self.directory} was trained on; bring "
                    f"that one back, or start a new run"
                )
            break
        self._text = fingerprint

    @classmethod
    def create(
        cls,
        directory: Path,
        config: Config,
        tokenizer: Tokenizer,
        parts: dict[str, str] | None = None,
        chat: str | None = None,
    ) -> "Run":
        """Make the folder of a new run.

        Args:
            directory: new or empty.
            config: of the run.
            tokenizer: of the run.
            parts: those that are the caller's own, as `parts.describe` tells.
            chat: the text of chat.json; None: no such file.

        Raises:
            UserError: no permission, a disk that takes no more, or a run that is there already.
        """
        if (directory / CONFIG).exists():
            raise taken(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(directory, error) from None
        files.write_atomically(directory / TOKENIZER, tokenizer.to_json())
        (directory / CHAT).unlink(missing_ok=True)  # left by a killed process
        if chat is not None:
            files.write_atomically(directory / CHAT, chat)
        files.write_atomically(directory / CONFIG, config_json.to_json(config, parts))
        return cls(directory)

    def check_config(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """Compare with the settings to continue with; nothing is written.

        Returns:
            What would change: {"steps": (old, new)}.

        Raises:
            UserError: the model or the data would be others.
        """
        changed = differences(self.config, config)
        for name, (old, new) in changed.items():
            # A text may have moved, where `use_text` can tell that it is the same.
            moved = name in TEXTS and any(copies(self.directory, TEXT))
            if _is_fixed(name) and not moved:
                raise UserError(
                    f"cannot resume {self.directory} with {name}={new}: it was trained with "
                    f"{name}={old}; start a new run for that"
                )
        return changed

    def change_config(self, config: Config) -> None:
        """Continue with other settings, which `check_config` has accepted."""
        if config != self.config:
            text = config_json.to_json(config, self.parts)
            files.write_atomically(self.directory / CONFIG, text)
        self.config = config

    @property
    def checkpoints_path(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def bad_path(self) -> Path:
        """States and batches of steps that were skipped."""
        return self.directory / "bad"

    @property
    def metrics_path(self) -> Path:
        return self.directory / "metrics.jsonl"

    def log(self, lines: list[Record]) -> None:
        """Append one line for each record; every record has its "step".

        Raises:
            UserError: the disk takes no more, or another folder lies where the run's was.
        """
        self._check_place()
        records.append(self.metrics_path, lines)
        if self._val_losses is not None:
            self._note_losses(lines)

    def _check_place(self) -> None:
        """See that nothing is written into another run of the same name."""
        try:
            same = os.path.samestat(self._place, self.directory.stat())
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self.directory} was moved, deleted or replaced while it was trained; nothing "
                f"more is written; put the folder back, then continue with --resume"
            )

    def metrics(self) -> list[Record]:
        """The records, in order; malformed lines are left out."""
        return records.read(self.metrics_path)[0]

    def metrics_have_changed(self) -> bool:
        """Whether lines that existed at the newest checkpoint have changed."""
        for _, text in copies(self.directory, METRICS):
            return records.has_changed(self.metrics_path, text)
        return False

    def rewind_metrics(self, step: int) -> tuple[list[Record], str | None]:
        """Drop the records after `step`, which a resumed run will write again.

        Returns:
            Of the rest, the last and the skipped ones before it, back to one that was not; and
            what is wrong with the file, if anything.

        Raises:
            UserError: the disk takes no more.
        """
        self._val_losses = None
        return records.rewind(self.metrics_path, step, self.metrics_have_changed())

    def _note_losses(self, lines: Iterable[Record]) -> None:
        """Index the validation losses of these records, to find the best checkpoint."""
        key = "val_loss" if self.config.eval_batches is None else "val_sampled_loss"
        losses = self._val_losses = self._val_losses or {}
        for record in lines:
            step, loss = record["step"], record.get(key)
            if step > self._due:
                self._gaps.append(range(self._due, step))
            self._due = step + 1
            if loss is not None and math.isfinite(loss):
                losses[step] = loss

    def best_step(self, steps: list[int]) -> int | None:
        """Which of `steps` has the lowest validation loss; None if none was evaluated."""
        if self._val_losses is None:
            self._val_losses, self._gaps, self._due = {}, [], 0
            found = (record for record, _, _ in records.scan(self.metrics_path))
            self._note_losses(record for record in found if record is not None)
        losses = [(self._val_losses[step], step) for step in steps if step in self._val_losses]
        return min(losses)[1] if losses else None

    def keep(self, steps: list[int]) -> set[int]:
        """The checkpoints to keep: the newest `keep_last`, the best, and those without metrics,
        because one of them may have been the best."""
        best = self.best_step(steps)
        kept = {*steps[-self.config.keep_last :]} | ({best} if best is not None else set())
        return kept | {step for step in steps if any(step in gap for gap in self._gaps)}

    def choose(self, which: str, steps: list[int]) -> int:
        """The checkpoint that "best", "last" or a number names, by the metrics as they are now.

        Raises:
            UserError: no checkpoint yet, or not that one.
        """
        if not steps:
            raise UserError(
                f"{self.directory} has no checkpoint yet; the first is saved after step "
                f"{min(self.config.save_every, self.config.steps)}"
            )
        if which == "last":
            return steps[-1]
        if which == "best":
            self._val_losses = None  # a training process may have logged more
            best = self.best_step(steps)
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise UserError(
            f"{self.directory} has no checkpoint {which!r}; give best, last, or one of "
            f"{', '.join(map(str, steps))}"
        )


def _read(directory: Path, name: str, parse: Callable[[str], Any]) -> Any:
    """A small file of the run; if it is damaged, the error names an intact copy."""
    try:
        return files.read_file(directory / name, parse)
    except UserError as error:
        for place, _ in copies(directory, name):
            raise type(error)(f"{error}; an intact copy is {place}") from None
        raise


def _is_fixed(setting: str) -> bool:
    """Whether a run must keep this setting to its end."""
    fixed = setting.startswith(("model.", "data.", "init", "optim.freeze", "optim.lora"))
    return fixed and setting not in SPEED_ONLY
