"""What the numbers of a config may be: each function raises a `UserError` that names the field."""

import re

from gptjax.errors import UserError

LARGEST = 2**31 - 1  # of a count: sizes and steps are int32 on the devices


def positive(name: str, value: int) -> None:
    """1 or more."""
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
    """Of the number that the field `of` holds."""
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


def within(name: str, value: float, low: float, high: float, closed: bool = False) -> None:
    """low <= value < high, or up to high too if closed."""
    if not (low <= value < high or (closed and value == high)):
        bound = "<=" if closed else "<"
        raise UserError(f"{name}={value} is out of range; give {low} <= {name} {bound} {high}")
