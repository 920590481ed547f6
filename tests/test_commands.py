"""The reference of the command line and the completion of shells are made from the parsers."""

import importlib.util
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from ducat.cli import completion
from ducat.cli.overview import OTHERS, SUMMARIES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_and_the_completion_are_those_of_the_parsers(script: ModuleType) -> None:
    for path, made in script.FILES.items():
        assert path.read_text(encoding="utf-8") == made(), f"{path.name} is old: run `python docs/commands.py`"


def test_the_reference_has_every_option(script: ModuleType) -> None:
    text = script.page()
    for name, options in script.options().items():
        assert f"## ducat {name}\n" in text
        assert all(f"| `{option.name}` |" in text for option in options)
        assert not [option.name for option in options if not option.help]
    assert "| `--train.epochs` | `INTEGER` | `130` | Passes over the training images. |" in text
    assert "| `--out` | `PATH` | required | new file or folder to write |" in text


BASH = """
source /dev/stdin <<'END'
{script}
END
COMP_WORDS=({words}) COMP_CWORD={last}
_ducat
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(*words: str) -> list[str]:
    """Return what bash offers for the last word."""
    script = completion.bash({**SUMMARIES, **OTHERS})
    quoted = " ".join(shlex.quote(word) for word in words)
    text = BASH.format(script=script, words=quoted, last=len(words) - 1)
    done = subprocess.run(["bash", "--norc"], input=text, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_values() -> None:
    assert completed("ducat", "") == [*SUMMARIES, *OTHERS]
    assert completed("ducat", "tr") == ["train"]
    assert completed("ducat", "help", "ex") == ["export"]
    assert completed("ducat", "data", "pre") == ["prepare"]
    assert completed("ducat", "train", "--train.epo") == ["--train.epochs"]
    assert completed("ducat", "train", "--method.name", "") == [
        *("natural", "mixed", "pgd-at", "trades", "mart", "consistency")
    ]
    assert completed("ducat", "evaluate", "runs/x", "--suite", "st") == ["standard"]
    assert completed("ducat", "evaluate", "--dummy") == []
    assert completed("ducat", "train", "--config", "") == [], "files are the shell's to complete"
    assert completed("ducat", "data", "list", "di") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_can_read_their_scripts(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    path = tmp_path / "script"
    path.write_text(completion.SHELLS[shell]({**SUMMARIES, **OTHERS}))
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_fish_is_told_every_option() -> None:
    text = completion.fish({**SUMMARIES, **OTHERS})
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("complete ")]  # as fish splits them
    for command, options in completion.read().items():
        of_it = [line for line in lines if line[4] == f"__ducat_is {command}"]
        named = [option for option in options if option["name"].startswith("--")]
        assert [line[line.index("-l") + 1] for line in of_it] == [one["name"].removeprefix("--") for one in named]
        for line, option in zip(of_it, named, strict=True):
            assert ("-a" in line) == bool(option["choices"])


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_commands_options_and_values(tmp_path: Path) -> None:
    path = tmp_path / "ducat.fish"
    path.write_text(completion.fish({**SUMMARIES, **OTHERS}))

    def offered(line: str) -> list[str]:
        command = ["fish", "--no-config", "-c", f"source {path}; complete -C {shlex.quote(line)}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return [text.split("\t")[0] for text in done.stdout.splitlines()]

    assert set(offered("ducat ")) == {*SUMMARIES, *OTHERS}
    assert offered("ducat train --train.epo") == ["--train.epochs"]
    assert set(offered("ducat evaluate runs/x --suite ")) == {"quick", "single-step", "light", "standard", "full"}
    assert set(offered("ducat data pre")) == {"prepare"}
