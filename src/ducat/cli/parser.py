"""A parser of one command's arguments: help on two levels, and errors that say what to change."""

import re
import shutil
import textwrap
from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ducat.config import CHOICES, OPEN_CHOICES

# What `--help` shows where there are many options; `--help all` shows the others too.
COMMON = (
    *("config", "name", "runs", "resume", "checkpoint", "grid", "suite", "samples", "which"),
    *("data.name", "data.samples", "model.name", "method.name", "method.attack", "dummy.kind", "dummy.start_epoch"),
    *("threat.norm", "threat.eps", "threat.steps", "train.epochs", "train.batch_size", "train.learning_rate"),
    *("train.schedule", "train.seed", "train.precision", "train.device", "train.threads"),
)
MANY = 30  # options
NAMES = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", tuple: "LIST", dict: "MAPPING"}
EVERY_COMMAND = "Every command takes --traceback and --allow-code, see `ducat --help`."

# What the parser of arguments says, and how to say it to those who do not know Python's types.
ARGUMENT_ERRORS = {
    r"Does not validate against any of the Union subtypes.*?(Expected an? .*?)\n.*Given value: ": r"\1. Got value: ",
    r"Expected an? <class '(\w+)'>": r"expected \1",
    r"^argument ([\w-]+): invalid choice: '?(.*?)'? \(choose from (.*)\)$": r"\1: choose from \3. Got value: \2",
    r"Expected a typing\.Literal\[([^\]]+)\]": r"choose from \1",
}


@dataclass(frozen=True)
class Option:
    """An option of a command, or an argument without a name.

    Attributes:
        name: "--train.epochs", or "run" for an argument without a name.
        section: the group of settings that it is of, as its title; empty for the command's own.
        values: what is written after it, empty for a switch.
        choices: the values to complete; there may be others where `values` does not list them.
        default: as text, empty where the help says what happens without it.
        help: what it does, with units.
        required: whether it must be given.
        common: whether the short help shows it.
    """

    name: str
    section: str
    values: str
    choices: tuple[str, ...]
    default: str
    help: str
    required: bool
    common: bool

    @property
    def is_named(self) -> bool:
        return self.name.startswith("-")


class Parser(ArgumentParser):
    """A parser of one command's arguments; `Parser.of` makes one.

    Attributes:
        every: whether the help shows every option.
        check: is given what was written, without defaults, and raises ValueError where it does not go together.
    """

    every = False
    needed: frozenset[str] = frozenset()  # what is required: jsonargparse forgets it while it parses
    check: Callable[[Namespace], None]

    @classmethod
    def of(cls, prog: str, check: Callable[[Namespace], None] = lambda given: None) -> "Parser":
        """Return a parser without arguments for the command `prog`, as "ducat train"."""
        parser = cls(prog=prog, exit_on_error=False, allow_abbrev=False)
        parser.check = check
        return parser

    def read(self, words: Sequence[str]) -> Namespace:
        """Parse the words after the command.

        Raises:
            ArgumentError: if one is wrong; the message says which, and what was meant perhaps.
            ValueError: if a value is out of its range, or some do not go together.
        """
        words = list(words)
        self.needed = frozenset(action.dest for action in self._actions if action.required and action.nargs != "*")
        for place, word in enumerate(words[:-1]):
            if word in ("-h", "--help") and words[place + 1] == "all":
                self.every = True
        try:
            parsed = self.instantiate(self.parse_args(words))
        except (ArgumentError, ValueError) as error:
            raise ArgumentError(None, self._explained(error, words)) from error
        self.check(self.parse_args(words, defaults=False))
        return parsed

    def options(self) -> list[Option]:
        """Return what the command takes, the arguments without a name first."""
        found = [self._option(action, group.title or "") for group in self._action_groups for action in _own(group)]
        return sorted(found, key=lambda option: option.is_named)

    def _option(self, action: Action, section: str) -> Option:
        name = action.option_strings[-1] if action.option_strings else action.dest
        hint = getattr(action, "_typehint", None) or action.type
        choices = tuple(map(str, action.choices or CHOICES.get(action.dest) or _literals(hint)))
        values = "|".join(choices) if choices else _named(hint)
        if action.dest in OPEN_CHOICES:
            values += "|..."
        if action.nargs == 0:
            values = ""
        elif isinstance(action.metavar, str) and not choices:
            values = action.metavar
        if action.nargs in ("+", "*"):
            values += " ..."
        return Option(
            name=name,
            section="" if section in ("options", "positional arguments") or "." not in action.dest else section,
            values=values,
            choices=choices,
            default=_default(action.default) if action.nargs != 0 else "",
            help=" ".join((action.help or "").split()),
            required=(action.required and action.nargs != "*") or action.dest in self.needed,
            common=action.dest in COMMON,
        )

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Return the help: where there are many options the common ones, or every one after `--help all`."""
        options = self.options()
        few = len(options) > MANY and not self.every
        shown = [option for option in options if option.common or not option.is_named] if few else options
        unnamed = [option for option in options if not option.is_named]
        usage = [option.name if option.required else f"[{option.name}]" for option in unnamed]
        usage += [f"{option.name} {option.values}" for option in options if option.required and option.is_named]
        lines = [" ".join(["usage:", self.prog, *usage, "[options]"]), ""]
        width = min(shutil.get_terminal_size().columns, 120)
        for section in dict.fromkeys(option.section for option in shown):
            if section and not few:
                lines += ["", f"{section}:"]
            for option in shown:
                if option.section == section:
                    lines += _told(option, width)
        if few:
            lines += [
                "",
                f"The {len(shown)} most used of {len(options)}: `{self.prog} --help all` explains the others.",
            ]
        return "\n".join([*lines, "", EVERY_COMMAND, ""])

    def _explained(self, error: Exception, words: list[str]) -> str:
        message = self._suggesting(str(error))
        for place, word in enumerate(words):
            option, equals, value = word.partition("=")
            if option != "--config":
                continue
            file = value if equals else " ".join(words[place + 1 : place + 2])
            others = words[:place] + words[place + (1 if equals else 2) :]
            if file and Path(file).is_file() and self._complaint(others) != str(error):
                return message if file in message else f"{file}: {message}"
        return message

    def _complaint(self, words: Sequence[str]) -> str:
        try:
            self.instantiate(self.parse_args(list(words)))
        except (ArgumentError, ValueError) as error:
            return str(error)
        return ""

    def _suggesting(self, message: str) -> str:
        options = {option.name: option for option in self.options()}
        unknown = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown:
            words = unknown[1].split()
            word = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
            if not word.startswith("-"):
                return f"{word!r} is one argument too many: options begin with --, see `{self.prog} --help`"
            meant = _meant(word, [name for name in options if name.startswith("--")])
            return f"option {word} is unknown{meant or f': see `{self.prog} --help`'}"
        group = re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        if group:
            names = [name.removeprefix("--") for name in options]
            return f"{group[1]}.{group[2]} is unknown{_meant(f'{group[1]}.{group[2]}', names)}"
        key = re.match(r"(?:Key|Option) '([\w.]+)' is not expected", message)
        if key:
            return f"{key[1]} is unknown{_meant(key[1], [name.removeprefix('--') for name in options])}"
        missing = re.match(r"the following arguments are required: (.*)", message)
        if missing:
            needed = [options.get(f"--{name}") or options.get(name) for name in missing[1].split(", ")]
            told = [f"{option.name} is missing: {option.help}" for option in needed if option is not None]
            return "; ".join(told) or message
        return message.replace(' in "<unicode string>",', " at")


def _own(group: Any) -> Iterator[Action]:
    """Yield what a user may write: not the files for a group of settings, which `--config` is for."""
    for action in group._group_actions:
        kind = type(action).__name__
        if (
            action.dest != "help"
            and action.help != SUPPRESS
            and kind not in ("_ActionConfigLoad", "_ActionPrintConfig")
        ):
            yield action


def _meant(word: str, names: Iterable[str]) -> str:
    """Return ": did you mean ...?" of the name that is nearest to a word, or nothing."""
    ends: dict[str, str] = {}
    for name in names:
        ends.setdefault(name, name)
        ends.setdefault("--" * name.startswith("--") + name.split(".")[-1].removeprefix("--"), name)
    close = get_close_matches(word.replace("-", "_"), [name.replace("-", "_") for name in ends], n=1)
    found = next((name for end, name in ends.items() if close and end.replace("-", "_") == close[0]), None)
    return f": did you mean {found}?" if found else ""


def _parts(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def _literals(hint: Any) -> tuple[str, ...]:
    return tuple(str(value) for part in _parts(hint) if get_origin(part) is Literal for value in get_args(part))


def _named(hint: Any) -> str:
    parts = [get_origin(part) or part for part in _parts(hint) if part is not NoneType]
    if float in parts:
        return "NUMBER"
    return next((NAMES[part] for part in parts if part in NAMES), "TEXT")


def _default(value: Any) -> str:
    if value is None or value == SUPPRESS or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _told(option: Option, width: int) -> list[str]:
    after = "required" if option.required and option.is_named else option.default and f"default: {option.default}"
    text = option.help + (f" ({after})" if after else "")
    head = f"  {option.name} {option.values if option.is_named else ''}".rstrip().replace("|", "| ")
    indent = " " * 6
    lines = textwrap.wrap(head, width, subsequent_indent=indent, break_on_hyphens=False)
    told = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    return [*(line.replace("| ", "|") for line in lines), *told]


def told(error: BaseException) -> str:
    """Return an error's message in the words of the command line, without those of Python."""
    message = str(error)
    if isinstance(error, OSError):
        message = re.sub(r"^\[Errno \d+\] ", "", message)
    if isinstance(error, ArgumentError):
        message = re.sub(r'Parser key "([^"]+)"', r"\1", message, count=1)
        for pattern, plain in ARGUMENT_ERRORS.items():
            message = re.sub(pattern, plain, message, flags=re.DOTALL)
        wrong = re.search(r"choose from (.*?)\. Got value: (\S+)$", message, re.DOTALL)
        close = get_close_matches(wrong[2], re.findall(r"'([^']+)'", wrong[1]), n=1) if wrong else []
        message += f": did you mean {close[0]}?" if close else ""
    return message
