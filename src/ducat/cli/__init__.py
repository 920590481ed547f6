"""The command line. What is here imports no PyTorch: help, version, completion and wrong commands answer at once."""

import io
import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches

import ducat
from ducat.cli.completion import SHELLS
from ducat.cli.overview import BAD_INPUT, OTHERS, SUMMARIES, check, complain, overview

HELP, VERSION = ("-h", "--help", "help"), ("-V", "--version")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a letter that cannot be shown is no failure of the work
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        if arguments[:1] == ["help"] and len(arguments) > 1:
            arguments = [arguments[1], "--help", *arguments[2:]]
        if not arguments or arguments[0] in HELP:
            print(overview())
        elif arguments[0] in VERSION:
            print(f"ducat {ducat.__version__}")
        elif arguments[0] == "completion":
            print(_completion(arguments[1:]))
        else:
            return _command(arguments, traceback)
    except ValueError as error:
        if traceback:
            raise
        complain(str(error))
        return BAD_INPUT
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _command(arguments: list[str], traceback: bool) -> int:
    # An option that every command takes may come first.
    first = 2 if arguments[0] == "--allow-code" else int(arguments[0].startswith("--allow-code="))
    check(" ".join(arguments[first : first + 1]))
    from ducat.cli.commands import run

    return run(arguments, traceback)


def _completion(arguments: Sequence[str]) -> str:
    if len(arguments) == 1 and arguments[0] in SHELLS:
        return SHELLS[arguments[0]]({**SUMMARIES, **OTHERS})
    if arguments[:1] in (["-h"], ["--help"], []):
        return (
            "usage: ducat completion SHELL\n\n"
            '  bash  put eval "$(ducat completion bash)" into ~/.bashrc\n'
            '  zsh   put eval "$(ducat completion zsh)" into ~/.zshrc, after compinit\n'
            "  fish  ducat completion fish > ~/.config/fish/completions/ducat.fish"
        )
    close = get_close_matches(arguments[0], SHELLS, n=1)
    hint = f"did you mean {close[0]}?" if close and len(arguments) == 1 else f"give one of {', '.join(SHELLS)}"
    raise ValueError(f"ducat completion {' '.join(arguments)}: {hint}")
