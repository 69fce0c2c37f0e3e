"""Bad input as one line: `UserError`, the checks that raise it, and how a command reports it."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn, TextIO

LARGEST = 2**31 - 1  # sizes and steps are int32 on the devices
LONGEST = 1500  # characters of a message
UNWRITABLE = errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG  # errors of a stream without a name
# What would move the cursor, paint, or reorder a line of a terminal; line ends and tabs may stay.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Bad input: the message is one line saying what was expected, what was given, what to do.

    What a stranger's file puts into a message stays on that line: control characters are shown by
    their escapes, and of a long one the middle is left out, not what to do.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]}...{message[-LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def visible(text: str) -> str:
    """A stranger's text for a terminal: control characters are shown by their escapes."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text.replace("\r\n", "\n"))


def optional_import(package: str, extra: str = "text") -> Any:
    """Import a package that an optional extra of gptjax installs.

    Args:
        package: dotted name of the module to import.
        extra: the extra that installs it, named in the error.

    Raises:
        UserError: it is not installed; says which extra to install.
    """
    try:
        return import_module(package)
    except ImportError:
        raise UserError(
            f"this needs the package {package.partition('.')[0]}: pip install 'gptjax[{extra}]', "
            f"or from a checkout pip install -e '.[{extra}]'"
        ) from None


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn a `UserError`, or output that cannot be written, into one line on stderr and exit code
    2; everything else is a bug."""
    try:
        with _flushed():
            yield
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _end("", 1)
    except KeyboardInterrupt:  # before or after the time in which a run ends in order
        _end(f"{command}: interrupted", 130)
    except UserError as error:
        _end(f"{command}: error: {error}", 2)
    except (RuntimeError, AssertionError) as error:  # JAX's, which is not imported here
        if (reason := _of_the_device(error)) is None:
            raise
        _end(f"{command}: error: {UserError(reason)}", 2)
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        reason = f"the output cannot be written ({error.strerror})"
        _end(f"{command}: error: {reason}; free disk space, or send it elsewhere", 2)


def _of_the_device(error: Exception) -> str | None:
    """What to say of an error of JAX's that lies with the device, not with gptjax, if it does."""
    message, place = str(error), error.__traceback__
    what = message.partition("\n")[0]
    while place and place.tb_next:
        place = place.tb_next
    if isinstance(error, AssertionError):  # JAX has skipped the one platform that it may use
        wanted = os.environ.get("JAX_PLATFORMS")
        if not (place and wanted and place.tb_frame.f_code.co_filename.endswith("xla_bridge.py")):
            return None
        return (
            f"JAX finds no device of JAX_PLATFORMS={wanted}; install its plug-in "
            f"(pip install 'gptjax[cuda12]', [cuda13] or [tpu]), or unset JAX_PLATFORMS"
        )
    if message.startswith("RESOURCE_EXHAUSTED"):
        return (
            f"the device has too little memory ({what}); lower --batch-size or the model's sizes, "
            f"raise --optim.accumulate, add --model.remat, or see what else is running there; "
            f"--plan here estimates what is needed"
        )
    if message.startswith("Unable to initialize backend"):
        return (
            f"{what}; check the driver (nvidia-smi) and that the plug-in has the version of jax "
            f"(pip list), or unset JAX_PLATFORMS to use the CPU"
        )
    return None


def note(line: str) -> None:
    """Print a line on stderr, if that takes any."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


@contextmanager
def _flushed() -> Iterator[None]:
    """Write what is buffered at the end, where an error can still be told."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _end(line: str, code: int) -> NoReturn:
    if line:
        note(line)
    if _is_stuck(sys.stdout):
        _discard(sys.stdout)
    raise SystemExit(code) from None


def _is_stuck(stream: TextIO) -> bool:
    """Whether a stream holds what it cannot write."""
    try:
        stream.flush()
    except OSError:
        return True
    return False


def _discard(stream: TextIO) -> None:
    """Send a stream to nowhere, or Python would complain about what it holds when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---------------------------------------------------------------------------------------------
# Checks of a setting; each raises a `UserError` that names it


def positive(name: str, value: int | None) -> None:
    """1 or more, or None."""
    if value is None:
        return
    if value < 1:
        raise UserError(f"{name}={value} is too small; give 1 or more")
    if value > LARGEST:
        raise UserError(f"{name}={value} is too large; give {LARGEST} or less")


def not_negative(name: str, value: float) -> None:
    """0 or more, and finite."""
    if not 0 <= value < float("inf"):
        raise UserError(f"{name}={value} is out of range; give 0 or more")


def above_zero(name: str, value: float) -> None:
    """Above 0, and finite."""
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={value} is out of range; give a number above 0")


def multiple(name: str, value: int, of: str, divisor: int, why: str = "") -> None:
    """Divisible by the value of the field `of`."""
    if value % divisor:
        raise UserError(
            f"{name}={value} is not divisible by {of}={divisor}; change one of them{why}"
        )


def pattern(name: str, value: str | None) -> None:
    """A regular expression, or None."""
    try:
        re.compile(value or "")
    except re.error as error:
        raise UserError(f"{name}={value!r} is not a regular expression: {error}") from None


def text_encoding(name: str, value: str) -> None:
    """A text encoding that Python knows."""
    try:
        "".encode(value)
    except (LookupError, ValueError):  # ValueError: a NUL in it, or `undefined`
        raise UserError(
            f"{name}={value!r} is not a text encoding that Python knows; give e.g. utf-8, latin-1, "
            f"cp1252, utf-16"
        ) from None


def within(name: str, value: float, low: float, high: float, closed: bool = False) -> None:
    """low <= value < high, or up to high too if closed."""
    if not (low <= value < high or (closed and value == high)):
        bound = "<=" if closed else "<"
        raise UserError(f"{name}={value} is out of range; give {low} <= {name} {bound} {high}")


def stretch(name: str, value: tuple[float, ...] | None) -> None:
    """One factor, or Llama 3's four numbers, or None."""
    if value is None:
        return
    numbers = all(isinstance(x, int | float) and 0 < x < float("inf") for x in value)
    if not numbers or not (
        (len(value) == 1 or (len(value) == 4 and value[1] < value[2] and value[3] % 1 == 0))
        and value[0] >= 1
    ):
        raise UserError(
            f"{name}={value} is not FACTOR or FACTOR LOW HIGH ORIGINAL, with FACTOR of at least 1, "
            f"0 < LOW < HIGH and an integer; give e.g. 8 1 4 8192"
        )
