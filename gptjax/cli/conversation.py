"""`gptjax sample --interactive`: a conversation in the terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from gptjax.cli.draw import interruptible, open_run, request_for, template_for
from gptjax.errors import UserError, note, visible

if TYPE_CHECKING:
    from gptjax.cli.sample import SampleCommand
    from gptjax.generation.chat import ChatTemplate
    from gptjax.generation.engine import Engine
    from gptjax.generation.requests import Request
    from gptjax.runs.loaded import LoadedRun

HELP = """\
  /reset          forget everything but the system message
  /system [TEXT]  begin again with this system message, or none
  /help           this list
A line that ends with \\ continues on the next one. To begin a
message with /, type two. Ctrl-C stops an answer, Ctrl-D leaves."""


@dataclass
class Conversation:
    """What was said so far, by user and model.

    Args:
        run: the model.
        command: its settings.
        template: of a chat; None: user and model write one text by turns.
        engine: of one slot.
    """

    run: "LoadedRun"
    command: "SampleCommand"
    template: "ChatTemplate | None"
    engine: "Engine"
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    turns: int = 0
    finish: str | None = None  # of the last answer; None: Ctrl-C
    has_overflowed: bool = False

    def reset(self, system: str | None) -> None:
        """Begin again, with a system message or None."""
        self.system, self.messages, self.ids = system, [], np.zeros(0, np.int32)
        self.has_overflowed = False

    def reply(self, said: str, is_stopped: Callable[[], bool]) -> Iterator[str]:
        """The pieces of the model's answer to a message, or of the text that follows it.

        Args:
            said: by the user.
            is_stopped: asked after each piece.

        Raises:
            UserError: a message that cannot be encoded, or is too long; nothing was said then.
        """
        request = self._chat(said) if self.template else self._text(said)
        id_ = self.engine.add(request)
        pieces, finish = [], None
        try:
            while finish is None and not is_stopped():
                piece = self.engine.step()[id_]
                pieces.append(piece)
                finish = piece.finish
                yield piece.text
        finally:
            if finish is None:
                self.engine.cancel(id_)
        self.turns += 1
        if self.template:
            text = "".join(piece.text for piece in pieces)
            self.messages += [
                {"role": "user", "content": said},
                {"role": "assistant", "content": text},
            ]
        else:
            new = [token.id for piece in pieces for token in piece.tokens]
            self.ids = np.concatenate([request.prompt, np.array(new, np.int32)])
        self.finish = finish

    def _chat(self, said: str) -> "Request":
        """The request for an answer; the oldest messages are left out where the context is full."""
        assert self.template
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        window = self.run.config.model.block_size
        space = window - min(self.command.max_new_tokens, window // 4)  # for the messages
        for first in range(0, len(self.messages) + 1, 2):
            messages = [*system, *self.messages[first:], {"role": "user", "content": said}]
            ids = self.template.encode(messages)
            if len(ids) <= space:
                break
        else:
            raise UserError(
                f"this message has {len(ids):,} tokens with all that the template puts around it, "
                f"and the model's context has room for {space:,}; send a shorter one"
            )
        if first and not self.has_overflowed:
            note(
                f"[the conversation is longer than the model's context of {window:,} tokens: the "
                f"oldest messages are no longer read]"
            )
            self.has_overflowed = True
        return self._request(ids)

    def _text(self, said: str) -> "Request":
        """The request for what follows the text so far."""
        if not len(self.ids):
            return self._request(said or None)
        tokenizer, window = self.run.tokenizer, self.run.config.model.block_size
        new = tokenizer.encode(said, self.command.unknown)
        ids = np.concatenate([self.ids, new])
        if len(ids) > window and not self.has_overflowed:
            note(
                f"[the text is longer than the model's context of {window:,} tokens: only its end "
                f"is read]"
            )
            self.has_overflowed = True
        return self._request(ids)

    def _request(self, prompt: "str | np.ndarray | None") -> "Request":
        return request_for(self.run, self.command, prompt, self.turns)


def converse(command: "SampleCommand") -> None:
    """Read messages and print answers until the input ends.

    Raises:
        UserError: a run that cannot be used, or a chat without a template.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        note("loading the model...")
    run = open_run(command)
    template = template_for(run, command.chat)
    if command.system is not None and template is None:
        raise UserError(f"{run.directory} has no chat template, and --system belongs to a chat")
    from gptjax.parallel.switches import pinned

    with pinned():
        engine = run.engine(1)
        engine.add(request_for(run, replace(command, max_new_tokens=1), None))
        engine.step()  # compiles what a short message needs
        if is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  gives `input` a history and keys for editing
            what = "a chat" if template else "a text that you begin and the model continues"
            note(f"{run.directory}: {what}. /help lists the commands, Ctrl-D leaves.")
        _talk(Conversation(run, command, template, engine, command.system), is_terminal)


def _talk(conversation: Conversation, is_terminal: bool) -> None:
    """Answer messages until the input ends; what cannot be answered is one line."""
    shown = visible if sys.stdout.isatty() else str
    while (said := _read(is_terminal)) is not None:
        try:
            if said.startswith("/") and not said.startswith("//"):
                _obey(conversation, said)
                continue
            if conversation.template and not said.strip():
                continue
            with interruptible() as is_stopped:
                for piece in conversation.reply(said.removeprefix("/"), is_stopped):
                    print(shown(piece), end="", flush=True)
            print(flush=True)
            if conversation.finish == "length":
                most = conversation.command.max_new_tokens
                note(f"[{most} tokens; --max-new-tokens allows more]")
        except UserError as error:
            note(f"error: {error}")


def _obey(conversation: Conversation, line: str) -> None:
    """Do what a line says that begins with a slash.

    Raises:
        UserError: an unknown command, or a system message where there is no chat.
    """
    name, _, text = line[1:].partition(" ")
    match name, text.strip():
        case "help", "":
            note(HELP)
        case "reset", "":
            conversation.reset(conversation.system)
            note("[begun again]")
        case "system", text if conversation.template:
            conversation.reset(text or None)
            note(
                "[begun again, with this system message]" if text else "[begun again, without one]"
            )
        case "system", _:
            raise UserError("there is no system message: this model has no chat template")
        case _:
            raise UserError(f"unknown command {line[:40]!r}; /help lists the commands")


def _read(is_terminal: bool) -> str | None:
    """The next message, of several lines if they end with a backslash; None: the input ends."""
    lines: list[str] = []
    while True:
        prompt = ("... " if lines else "> ") if is_terminal else ""
        try:
            line = input(prompt)
        except EOFError:
            if is_terminal:
                print()
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:  # forget the line, as a shell does
            if not is_terminal:
                raise
            print()
            lines = []
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
