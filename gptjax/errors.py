"""The one error a user can cause, and how a command reports it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 1500  # characters of a message


class UserError(ValueError):
    """Bad input: the message is one line saying what was expected, what was given, what to do.

    What a stranger's file puts into a message stays on that line: control characters are shown by
    their escapes, and it ends somewhere.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[:LONGEST])
        super().__init__(line + "..." * (len(message) > LONGEST))


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2; everything else is a bug."""
    try:
        yield
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # before or after the time in which a run ends in order
        print(f"{command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
