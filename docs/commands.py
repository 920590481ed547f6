"""Write the reference of the command line from its parsers: docs/commands.md, and what completion reads.

Run it as `python docs/commands.py` after an option has changed; a test says when.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ducat.cli.commands import COMMANDS
from ducat.cli.overview import OTHERS, SUMMARIES
from ducat.cli.parser import Option

ROOT = Path(__file__).parents[1]
KEPT = ("name", "values", "choices", "help")
TOP = """# The command line

Made from the parsers by `python docs/commands.py`. `ducat COMMAND --help` shows the same in a terminal; where there are
many options it shows the common ones, and `ducat COMMAND --help all` every one. Each setting, such as `--train.epochs`,
can also stand in a YAML file for `--config`. `ducat --version` or `-V` prints the version.

Every command takes `--traceback`, which shows where an error comes from, and `--allow-code FILE.py:FUNCTION`, which
lets the function run that a run's network was made by. Exit code 2 and one line is bad input, 128 + N is signal N.
"""
COMPLETION = """
```sh
ducat completion bash
```

prints what makes bash complete commands, options and their values; put `eval "$(ducat completion bash)"` into
`~/.bashrc`, `eval "$(ducat completion zsh)"` into `~/.zshrc` after `compinit`, or for fish write
`ducat completion fish` into `~/.config/fish/completions/ducat.fish`. Settings inside YAML files, names of runs and
names of prepared data sets of your own are not completed.
"""


def options() -> dict[str, list[Option]]:
    """Return the options of each command."""
    return {name: command.parser([]).options() for name, command in COMMANDS.items()}


def table(rows: Sequence[Option]) -> list[str]:
    """Return options as lines of a table."""
    lines = ["| option | values | default | |", "| --- | --- | --- | --- |"]
    for row in rows:
        values = " &#124; ".join(f"`{value}`" for value in row.values.split("|")) if row.values else ""
        default = "required" if row.required else f"`{row.default}`" if row.default else ""
        text = row.help.replace("|", "&#124;")
        lines.append(f"| `{row.name}` | {values if row.is_named or row.choices else ''} | {default} | {text} |")
    return lines


def page() -> str:
    """Return docs/commands.md."""
    found = options()
    lines = [TOP]
    shared = {option.name for option in found["train"] if option.section}
    for name, rows in found.items():
        lines += [f"## ducat {name}", "", f"{SUMMARIES[name][0].upper()}{SUMMARIES[name][1:]}.", ""]
        own = [row for row in rows if name == "train" or row.name not in shared]
        for section in dict.fromkeys(row.section for row in own):
            if section:
                lines += [f"### {section}", ""]
            lines += [*table([row for row in own if row.section == section]), ""]
        if name != "train" and len(own) < len(rows):
            lines += ["And every setting of `ducat train`.", ""]
    for name, text in OTHERS.items():
        lines += [f"## ducat {name}", "", f"{text[0].upper()}{text[1:]}.", ""]
    return "\n".join(lines).rstrip() + "\n" + COMPLETION


def completed() -> str:
    """Return what completion reads, as JSON."""
    kept = {name: [{key: asdict(row)[key] for key in KEPT} for row in rows] for name, rows in options().items()}
    lines = ",\n".join(
        f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for name, rows in kept.items()
    )
    return "{\n" + lines + "\n}\n"


FILES = {ROOT / "docs" / "commands.md": page, ROOT / "src" / "ducat" / "cli" / "options.json": completed}

if __name__ == "__main__":
    for path, made in FILES.items():
        path.write_text(made(), encoding="utf-8")
