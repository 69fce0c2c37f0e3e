"""`gptjax completion`: scripts that ask `gptjax completion -- WORDS` for the candidates."""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

from gptjax.cli.flags import POSITIONAL, Flag, flags_of, parse
from gptjax.cli.main import COMMANDS, module_name
from gptjax.presets import PRESETS
from gptjax.runs import folders

SCRIPTS = {
    "bash": """\
_gptjax() {
    local IFS=$'\\n'
    COMPREPLY=($(gptjax completion -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _gptjax gptjax
""",
    "zsh": """\
#compdef gptjax
_gptjax() {
    local -a found
    found=(${(f)"$(gptjax completion -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
if [[ $funcstack[1] == _gptjax ]]; then _gptjax "$@"; else compdef _gptjax gptjax; fi
""",
    "fish": """\
complete -c gptjax -a '(gptjax completion -- (commandline -opc)[2..] (commandline -ct))'
""",
}


@dataclass(frozen=True)
class CompletionCommand:
    """Print a completion script for a shell. In bash: eval "$(gptjax completion bash)"; in zsh the
    same after compinit; in fish: gptjax completion fish | source."""

    shell: Literal["bash", "zsh", "fish"] = field(metadata=POSITIONAL)
    """The shell."""


def candidates(words: list[str]) -> list[str]:
    """What the last word may become.

    Args:
        words: those after `gptjax`, the last one as far as it is typed.
    """
    *before, current = words or [""]
    if not before:
        found = [*COMMANDS, "--help", "--version"]
    elif before[0] not in COMMANDS:
        found = []
    else:
        module = import_module(module_name(before[0]))
        flags = list(flags_of(getattr(module, f"{before[0].capitalize()}Command")))
        named = {flag.name: flag for flag in flags}
        last = before[-2] if before[-1] == "=" and len(before) > 2 else before[-1]
        if current.startswith("-"):
            switches = [flag.negative for flag in flags if flag.type is bool]
            found = ["--help", *named, *switches]
        elif last in named and named[last].type is not bool:
            found = values(named[last])
        else:
            found = [value for flag in flags if flag.positional for value in values(flag)]
    return [word for word in found if word.startswith(current)]


def values(flag: Flag) -> list[str]:
    """Values that are known beforehand; none: the shell offers files."""
    if flag.path[-1] in ("run", "other"):
        return sorted(path.parent.name for path in folders.RUNS.glob("*/config.json"))
    if flag.name == "--config":
        return [*PRESETS, *sorted(str(path) for path in Path().glob("*.py"))]
    return list(flag.choices)


def main(argv: list[str], prog: str) -> None:
    """Print a script, or the candidates for the words after `--`."""
    if argv[:1] == ["--"]:
        print("\n".join(candidates(argv[1:])))
        return
    print(SCRIPTS[parse(CompletionCommand, None, argv, prog).shell], end="")
