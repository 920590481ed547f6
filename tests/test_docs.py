"""Every command and every Python block of the README and of the pages in docs/ is run, page by page, in order.

What would take long is run in short: `REDUCTIONS` says how. What cannot run inside a test is in `ELSEWHERE`, with where
it is run instead.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import ducat
from ducat.cli import main
from ducat.cli.commands import COMMANDS
from ducat.cli.overview import OTHERS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# The other prose; what scripts write is not.
MADE = {"reproduction.md", "batch-norm.md", "defences.md"}
WRITTEN = [
    path
    for path in sorted([*ROOT.glob("C*.md"), *(ROOT / "results").glob("*.md")])
    if path.name not in MADE and "-tables" not in path.name
]

# Options that take the place of a command's own, or are added to it.
SHORT_TRAINING = {"--train.epochs": "3", "--data.samples": "200", "--train.batch_size": "64", "--threat.steps": "2"}
REDUCTIONS: dict[str, dict[str, str]] = {
    "demo": {"--epochs": "2"},
    "train": SHORT_TRAINING,
    "sweep": {**SHORT_TRAINING, "--samples": "30"},
    "adapt": {**SHORT_TRAINING, "--train.epochs": "1"},
    "evaluate": {"--suite": "quick", "--samples": "30"},
}
ELSEWHERE = {
    "python3 -m venv": "CI installs in fresh environments and runs the commands after it",
    ".venv/bin/": "CI installs in fresh environments and runs the commands after it",
    "accelerate launch": "starts processes: tests/training/test_parallel.py trains in two",
    "torchrun": "starts processes: tests/training/test_parallel.py trains in two",
    "python -m benchmarks": "measures for minutes or hours: tests/benchmarks runs the parts of it",
    ":/data/": "data sets that are not here: tests/data streams folders and shards that they make",
    "ducat serve": "runs until it is stopped: tests/serve serves a run, and clicks through the page",
}
# Too large for a test, or to be downloaded: tests/data prepares them from archives of their layout.
DOWNLOADED = re.compile(r"\b(cifar10|cifar100|tiny-imagenet|cifar10-c|fashion-mnist)\b")
PYTHON_REDUCTIONS = {"epochs=30": "epochs=2"}
EXTRAS = {"onnx": "onnx", "onnxruntime": "onnx"}


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(text[: match.start()].count("\n") + 2, match[1], match[2]) for match in found]


def commands(text: str) -> list[str]:
    """Return the commands of a block, without comments, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*$|^#.*$", "", line).strip() for line in lines) if line]


def reduced(arguments: list[str]) -> list[str]:
    kept = list(arguments)
    if "--resume" in kept:  # It takes the settings of the run.
        return kept
    for option, value in REDUCTIONS.get(arguments[0], {}).items():
        if option in kept:
            kept[kept.index(option) + 1] = value
        else:
            kept += [option, value]
    if "photos" in kept and arguments[0] == "train":  # 320 images, of which no 200 need be asked for.
        position = kept.index("--data.samples")
        del kept[position : position + 2]
    return kept


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUCAT_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return tmp_path


# What the reader of a page has before its first command, made by Python.
BEFORE = {
    "data.md": """
from pathlib import Path
from PIL import Image
for name in ("cats", "dogs"):
    Path("photos/train", name).mkdir(parents=True)
    for number in range(15):
        Image.new("RGB", (8, 8), (number, 9 * number, 17 * number)).save(f"photos/train/{name}/{number}.png")
""",
}
RUN = [page for page in PAGES if any(block.language for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_page_tells_to_do_works(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [
        module for module, extra in EXTRAS.items() if f"import {module}\n" in text or f"--format {extra}" in text
    ]
    if any(find_spec(module) is None for module in missing):
        pytest.skip(f"the extra {EXTRAS[missing[0]]} is not installed")
    exec(BEFORE.get(page.name, ""), {})
    namespace: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            source = block.text
            for long, short in PYTHON_REDUCTIONS.items():
                source = source.replace(long, short)
            exec(compile("\n" * (block.line - 1) + source, str(page), "exec"), namespace)
            continue
        for command in commands(block.text):
            if any(part in command for part in ELSEWHERE) or DOWNLOADED.search(command):
                continue
            program, *arguments = shlex.split(command)
            assert program == "ducat", f"{page.name}: {command}: say in ELSEWHERE where this is run"
            assert main(reduced(arguments)) == 0, f"{page.name}: {command}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", [*PAGES, *WRITTEN], ids=lambda page: page.name)
def test_prose_wraps_at_120(page: Path) -> None:
    # Tables and links to images cannot be wrapped.
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language_and_so_is_run(page: Path) -> None:
    fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= {"sh", "python"}
    assert set(fences[1::2]) <= {""}


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of each command."""
    parsers = {name: command.parser([]) for name, command in COMMANDS.items()}
    found = {
        name: {text for action in parser._actions for text in action.option_strings} for name, parser in parsers.items()
    }
    own = {name: {*texts, "--traceback", "--allow-code"} for name, texts in found.items()}
    return {**own, **{name: set() for name in OTHERS}}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_named_in_the_text_exist(page: Path, options: dict[str, set[str]]) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", text):
        if code.startswith(("python ", "twine ")):
            continue
        command = re.match(r"ducat ([a-z][a-z-]*)", code)
        assert command is None or command[1] in {*COMMANDS, *OTHERS, "COMMAND"}, code
        known = options.get(command[1], set()) if command else {"--version"}.union(*options.values())
        assert set(re.findall(r"(?<!\S)--[a-z][\w.-]*", code)) <= known, code


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"tutorial", "evaluation", "api", "commands"} <= {path.parent.name for path in pages}
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    shown = set(re.findall(r'id="(ducat\.[\w.]+)"', api))
    for name in (*ducat.__all__, "methods.METHODS", "attacks.objectives.Goal", "data.Dataset", "training.Initial"):
        assert any(each.endswith(f".{name}") for each in shown) or name in {"attacks", "data", "models"}, name
    assert not [name for name in shown if name.split(".")[-1] == "drop_metrics"]
    signature = re.sub(r"<[^>]+>", "", api)
    assert "train(\n    config: Config,\n" in signature, "signatures are not formatted: is Ruff there?"
    for path in pages:
        loaded = re.findall(
            r"""<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?://[^"]+)""", path.read_text()
        )
        assert not loaded, f"{path.name} loads {loaded[0]}"
