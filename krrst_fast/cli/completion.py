"""Completion scripts of shells, made of the --help of every command."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence

from krrst_fast.cli.settings import Parser

SHELLS = ("bash", "zsh", "fish")
_FLAG = re.compile(r"^  (?:-\w, )?(--[\w.-]+)(?: \{([^}]*)\})?", re.MULTILINE)

Flags = Mapping[str, tuple[str, ...]]
"""The flags of a command, and the words that each takes, where they are few."""


def run_completion(
    argv: Sequence[str], about: str, commands: Mapping[str, Callable[[list[str]], object]]
) -> None:
    """Print the completion script of a shell.

    Args:
        argv: The words after `krrst completion`.
        about: What it does, for --help.
        commands: Functions of the words after each command; a name of two words, such as
            `baseline kip`, is that of a command with a method.
    """
    parser = Parser(
        prog="krrst completion",
        description=about,
        epilog='bash: eval "$(krrst completion bash)"; zsh: the same, after compinit; '
        "fish: krrst completion fish | source",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS)
    given = parser.parse_args(argv)
    flags = {name: flags_of(command) for name, command in commands.items()}
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[given.shell](flags))


def flags_of(command: Callable[[list[str]], object]) -> Flags:
    """Return the flags in the --help of a command, which its own parser prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        command(["--help"])
    return {
        match[1]: tuple(match[2].split(",")) if match[2] else ()
        for match in _FLAG.finditer(text.getvalue())
    }


def _groups(flags: Mapping[str, Flags]) -> dict[str, list[str]]:
    """Return the methods of each command that has any."""
    groups: dict[str, list[str]] = {}
    for name in flags:
        command, _, method = name.partition(" ")
        if method:
            groups.setdefault(command, []).append(method)
    return groups


def _commands(flags: Mapping[str, Flags]) -> str:
    return " ".join(name for name in flags if " " not in name)


def _bash(flags: Mapping[str, Flags]) -> str:
    lines = [
        "_krrst() {",
        "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=''",
        "  local command=${COMP_WORDS[1]}",
        "  COMPREPLY=()",
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f"    COMPREPLY=($(compgen -W '{_commands(flags)}' -- \"$word\"))",
        "    return",
        "  fi",
    ]
    for name, methods in _groups(flags).items():
        lines += [
            f'  if [ "$command" = \'{name}\' ] && [ "$COMP_CWORD" -eq 2 ]; then',
            f"    COMPREPLY=($(compgen -W '{' '.join(methods)} --help' -- \"$word\"))",
            "    return",
            "  fi",
            f'  [ "$command" = \'{name}\' ] && command="$command ${{COMP_WORDS[2]}}"',
        ]
    lines += ['  case "$command $before" in']
    for name, known in flags.items():
        for flag, words in known.items():
            if words:
                lines.append(f"    '{name} {flag}') words='{' '.join(words)}' ;;")
    lines += ["  esac", '  if [ -z "$words" ] && [[ $word == -* ]]; then']
    lines += ['    case "$command" in']
    lines += [f"      '{name}') words='{' '.join(known)}' ;;" for name, known in flags.items()]
    lines += [
        "    esac",
        "  fi",
        '  [ -n "$words" ] && COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "  return 0",
        "}",
        "complete -o default -F _krrst krrst",
    ]
    return "\n".join(lines)


def _zsh(flags: Mapping[str, Flags]) -> str:
    return "autoload -Uz bashcompinit && bashcompinit\n" + _bash(flags)


def _fish(flags: Mapping[str, Flags]) -> str:
    lines = [f"complete -c krrst -n __fish_use_subcommand -f -a '{_commands(flags)}'"]
    for name, methods in _groups(flags).items():
        where = f"-n '__fish_seen_subcommand_from {name}'"
        lines.append(f"complete -c krrst {where} -f -a '{' '.join(methods)}'")
    for name, known in flags.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        for flag, words in known.items():
            takes = f" -x -a '{' '.join(words)}'" if words else ""
            lines.append(f"complete -c krrst -n '{seen}' -l {flag[2:]}{takes}")
    return "\n".join(lines)
