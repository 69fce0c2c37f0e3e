"""The standard streams of a command, whatever it was started with."""

import io
import os
import sys

RAISING = "strict", "surrogateescape"  # what Python does with characters that it cannot encode


def prepare() -> None:
    """Open the streams that are closed, onto nothing, and let them take any character.

    A closed stream's descriptor would go to the next file that is opened, such as a run's lock,
    into which messages would then be written. What an encoding lacks is written by its escape.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in RAISING:
            stream.reconfigure(errors="backslashreplace")
