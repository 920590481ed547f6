"""What is said without a command: which commands there are, that one is unknown, and what is wrong with the input."""

import sys
from difflib import get_close_matches

import ducat
from ducat.cli.completion import SHELLS

BAD_INPUT = 2
# What each command is for; the functions behind it are in `commands.COMMANDS`.
SUMMARIES = {
    "zoo": "list networks that come with ducat, or attack them in seconds",
    "demo": "train, attack and compare four networks on digits, offline, in minutes",
    "train": "train a network and leave a run folder",
    "adapt": "give a trained network dummy classes and train it on",
    "sweep": "train and evaluate every combination of settings",
    "evaluate": "attack a run, blind and recovery-aware",
    "calibrate": "let a run refuse what it is unsure of",
    "compare": "put evaluated runs side by side",
    "analyze": "what several evaluated runs say together",
    "export": "write a run for ONNX, a model hub and other tools",
    "serve": "a local page to try a run on",
    "data": "list, prepare and verify data sets",
}
OTHERS = {
    "help": "explain a command: ducat help COMMAND, ducat help COMMAND all",
    "completion": f"print what makes a shell complete options and their values: {', '.join(SHELLS)}",
}


def check(command: str) -> None:
    """Raise ValueError if there is no such command."""
    if command not in SUMMARIES:
        known = (*SUMMARIES, *OTHERS)
        close = get_close_matches(command, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
        raise ValueError(f"command {command!r} is unknown: {hint}")


def overview() -> str:
    """Return the help of `ducat`."""
    lines = ["usage: ducat COMMAND [options]", "", (ducat.__doc__ or "").strip(), ""]
    lines += [f"  {name:10} {text}" for name, text in {**SUMMARIES, **OTHERS}.items()]
    lines += ["", "`ducat COMMAND --help` explains a command's options; `ducat --version` prints the version."]
    lines += [
        "Every command takes --traceback, which shows where an error comes from, and --allow-code FILE.py:FUNCTION,",
        "which lets the function run that a run's network was made by.",
    ]
    return "\n".join(lines)


def complain(message: str) -> None:
    """Say in one line what is wrong."""
    print(f"ducat: {' '.join(message.split())}", file=sys.stderr)
