"""Completion for shells, from `options.json`: what the parsers know, written down so that no parser has to be built.

`python docs/commands.py` writes that file, and `docs/commands.md`; `tests/test_commands.py` compares both.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

SWITCHES = {"--help": "explain the command", "--traceback": "show where an error comes from"}


def bash(commands: Mapping[str, str]) -> str:
    """Return a script for bash; `commands` has what each is for."""
    return f"""# Completion of ducat for bash: eval "$(ducat completion bash)" in ~/.bashrc
_ducat() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    local command="${{COMP_WORDS[1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{" ".join(commands)}"
    else
        case "$command $before" in
{_bash_values()}
        esac
        case "$word" in -*)
            case "$command" in
{_bash_options()}
            esac
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _ducat ducat
"""


def zsh(commands: Mapping[str, str]) -> str:
    """Return a script for zsh, which reads that for bash."""
    first = '# Completion of ducat for zsh: eval "$(ducat completion zsh)" in ~/.zshrc, after compinit'
    return "\n".join([first, "autoload -U +X bashcompinit && bashcompinit", *bash(commands).splitlines()[1:], ""])


def fish(commands: Mapping[str, str]) -> str:
    """Return a script for fish."""
    lines = [
        "# Completion of ducat for fish: ducat completion fish > ~/.config/fish/completions/ducat.fish",
        "function __ducat_is",
        "    set -l words (commandline -opc)",
        "    test (count $words) -gt 1; and test $words[2] = $argv[1]",
        "end",
    ]
    first = "test (count (commandline -opc)) -eq 1"
    lines += [f"complete -c ducat -n '{first}' -f -a {name} -d {_quoted(text)}" for name, text in commands.items()]
    for command, values in _arguments():
        second = f"__ducat_is {command}; and test (count (commandline -opc)) -eq 2"
        lines.append(f"complete -c ducat -n '{second}' -f -a '{' '.join(values)}'")
    for command, options in read().items():
        for option in options:
            if option["name"].startswith("--"):
                takes = " -r" if option["values"] else ""
                if option["choices"]:
                    takes = f" -x -a '{' '.join(option['choices'])}'"
                told = f"-l {option['name'].removeprefix('--')}{takes} -d {_quoted(option['help'])}"
                lines.append(f"complete -c ducat -n '__ducat_is {command}' {told}")
    return "\n".join([*lines, ""])


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def read() -> dict[str, list[dict[str, Any]]]:
    """Return the options of each command."""
    found: dict[str, list[dict[str, Any]]] = json.loads(
        resources.files("ducat.cli").joinpath("options.json").read_text(encoding="utf-8")
    )
    return found


def _arguments() -> Iterator[tuple[str, list[str]]]:
    """Yield what can stand in the first place after a command, where that is a name of ours."""
    yield "help", list(read())
    yield "completion", list(SHELLS)
    for command, options in read().items():
        for option in options[:1]:
            if option["choices"] and not option["name"].startswith("--"):
                yield command, option["choices"]


def _bash_values() -> str:
    rows = [(f"{command} {command}", values) for command, values in _arguments()]
    for command, options in read().items():
        named = [option for option in options if option["name"].startswith("--")]
        rows += [(f"{command} {option['name']}", option["choices"]) for option in named if option["choices"]]
    return "\n".join(f'            "{key}") words="{" ".join(values)}" ;;' for key, values in rows)


def _bash_options() -> str:
    lines = []
    for command, options in read().items():
        names = [option["name"] for option in options if option["name"].startswith("--")]
        lines.append(f'                {command}) words="{" ".join([*names, *SWITCHES])}" ;;')
    return "\n".join(lines)


def _quoted(text: str) -> str:
    first = text.split(". ")[0].split("; ")[0]
    return '"' + re.sub(r'([\\"$])', r"\\\1", first) + '"'
