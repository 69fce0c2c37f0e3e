"""Render a chat template. `chat.py` runs this file as a process of its own: a template is a
stranger's program, and only a process can be bounded in time and memory.

stdin: {"template": Jinja, "values": {...}}; stdout: {"text": ...} or {"error": ...}
"""

import json
import re
import sys
from datetime import datetime
from typing import Any

import minijinja

try:
    import resource
except ImportError:  # Windows, where only the fuel and the parent's clock are limits
    resource = None

SECONDS = 5  # of CPU time; a template takes milliseconds
BYTES = 2**30  # of address space, the interpreter's included
FUEL = 20_000_000  # minijinja's steps; it also counts the characters of text that it makes
# transformers marks the answers by these tags, which change no text.
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def limit() -> None:
    """Bound what this process may take."""
    if resource is None:
        return
    for what, most in (("AS", BYTES), ("CPU", SECONDS), ("CORE", 0), ("FSIZE", 0)):
        kind = getattr(resource, f"RLIMIT_{what}")
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS knows no limit of address space
            pass


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON without the escapes that HTML needs, as transformers' filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def raise_exception(message: str) -> None:
    """How a template refuses a conversation."""
    raise minijinja.TemplateError(message)


def render(template: str, values: dict[str, Any]) -> str:
    """The text of a template, in an environment like transformers'.

    Raises:
        minijinja.TemplateError: it is not valid, runs too long, or refuses the messages.
    """
    tag = lambda found: f"{{%{found[1]} {'endif' if found[2] else 'if true'} {found[3]}%}}"
    environment = minijinja.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        fuel=FUEL,
        filters={"tojson": tojson},
        globals={
            "raise_exception": raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        },
        debug=False,
    )
    return environment.render_str(GENERATION.sub(tag, template), **values)


def main() -> None:
    """Answer one request."""
    limit()
    try:
        answer = {"text": render(**json.load(sys.stdin))}
    except minijinja.TemplateError as error:
        what = error.detail or re.sub(r" \(in <string>:\d+\)$", "", error.message)
        answer = {"error": f"{what} (line {error.line})" if error.line else what}
    except Exception as error:  # of a function that the template calls with other arguments
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
