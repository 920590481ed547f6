"""Every file of a run folder, damaged in every way, under every command; training that is killed; disks that are full.

    python -m benchmarks.reliability --out results/reliability.md

A try is one command in this process (or, where it is killed or may write little, in a fork of it) on a copy of a small
run. It is good if the command does its work, or says in one line which file is at fault, ends with exit code 2, and
leaves everything as it was.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from ducat import cli, training
from ducat.config import Config, DataConfig, DummyConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.evaluation.runs import calibrate_run, evaluate_run
from ducat.runs import RunFolder

SECONDS = 60  # after which a command counts as hanging
SETTINGS = Config(
    name="run",
    data=DataConfig("digits", samples=64, held_out=10),
    model=ModelConfig(width=2),
    dummy=DummyConfig("recovery-aware", 0),
    threat=ThreatConfig(steps=1),
    train=TrainConfig(epochs=2, batch_size=32, precision="float32", tracker="none", keep=1),
)
EVALUATE = ("--suite", "quick", "--samples", "8")


class Command(NamedTuple):
    """A row of the table of commands: what is asked of a run, with another run and a new place to write to."""

    name: str
    line: Callable[[str, str, str], Sequence[str]]


COMMANDS = (
    Command("train --resume", lambda run, other, out: ("train", "--resume", run)),
    Command("adapt", lambda run, other, out: ("adapt", run, "--runs", out, "--name", "made", "--train.epochs", "1")),
    Command("evaluate", lambda run, other, out: ("evaluate", run, *EVALUATE, "--json", f"{out}/made.json")),
    Command("evaluate --surrogates", lambda run, other, out: ("evaluate", other, *EVALUATE, "--surrogates", run)),
    Command("calibrate", lambda run, other, out: ("calibrate", run, "--reject", "0.1")),
    Command("compare", lambda run, other, out: ("compare", other, run, "--csv", f"{out}/made.csv", "--html", f"{out}/made.html")),
    Command("analyze always-failed", lambda run, other, out: ("analyze", "always-failed", other, run)),
    Command("analyze transfer", lambda run, other, out: ("analyze", "transfer", other, run, "--json", f"{out}/made.json")),
    Command("analyze targeted", lambda run, other, out: ("analyze", "targeted", run, "--samples", "8")),
    Command("export safetensors", lambda run, other, out: ("export", run, "--format", "safetensors", "--out", f"{out}/made")),
    Command("export hub", lambda run, other, out: ("export", run, "--format", "hub", "--out", f"{out}/made")),
    Command("export robustbench", lambda run, other, out: ("export", run, "--format", "robustbench", "--out", f"{out}/made")),
    Command("serve", lambda run, other, out: ("serve", run, "--port", "0")),
)


@dataclass(frozen=True)
class Damage:
    """One way in which one file is not what it should be.

    Attributes:
        file: its path in the run folder.
        way: what was done to it.
        content: what it holds instead; None where it is gone.
        key: the key that was removed or changed; empty for damage of the whole file.
    """

    file: str
    way: str
    content: bytes | None = field(repr=False)
    key: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.way}"


class Try(NamedTuple):
    """A command on a damaged run: what came of it ("done", "refused", or what is wrong) and the first line it said."""

    command: str
    damage: Damage
    outcome: str
    said: str


GOOD = ("done", "refused")


def make(root: Path) -> tuple[Path, Path]:
    """Return a run that was stopped after its first of two epochs, evaluated and calibrated, and a finished copy."""

    class Stop:
        def step(self, done: int, total: int) -> None: ...

        def epoch(self, row: dict[str, Any]) -> None:
            raise KeyboardInterrupt

        def warning(self, text: str) -> None: ...

    with contextlib.suppress(KeyboardInterrupt):
        training.train(SETTINGS, root, Stop())
    folder = RunFolder.open(root / "run")
    evaluate_run(folder, "quick", samples=8, reject=[0.1])
    calibrate_run(folder, 0.1)
    other = shutil.copytree(folder.path, root / "other")
    RunFolder.open(other).update_manifest({"status": "finished"})
    return folder.path, other


def damages(run: Path, seed: int = 0) -> list[Damage]:
    """Return every damage of every file that commands read."""
    found = []
    for path in sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock"):
        name, content = str(path.relative_to(run)), path.read_bytes()
        noise = random.Random(seed).randbytes(len(content))
        middle = len(content) // 2
        whole: dict[str, bytes | None] = {
            "missing": None,
            "empty": b"",
            "cut in half": content[:middle],
            "cut by a byte": content[:-2],
            "random bytes": noise,
            "random bytes in the middle": content[:middle] + noise[: len(content) // 8] + content[middle + len(content) // 8 :],
        }
        for other in ([], {}, "text", None, 7):
            whole[f"{json.dumps(other)} instead"] = json.dumps(other).encode()
        found += [Damage(name, way, changed) for way, changed in whole.items()]
        found += [Damage(name, way, changed, key) for key, way, changed in _keys(path, content)]
    return found


def _keys(path: Path, content: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Yield a file with each key removed, null, and of another type."""
    if path.suffix == ".safetensors":
        length = struct.unpack("<Q", content[:8])[0]
        header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
        for key, way, state in _changed(json.loads(header["__metadata__"]["ducat"])):
            header["__metadata__"]["ducat"] = json.dumps(state)
            raw = json.dumps(header).encode()
            raw += b" " * (-len(raw) % 8)
            yield key, way, struct.pack("<Q", len(raw)) + raw + rest
    elif path.suffix == ".yaml":
        for key, way, value in _changed(yaml.safe_load(content)):
            yield key, way, yaml.safe_dump(value, sort_keys=False).encode()
    elif path.suffix == ".json":
        for key, way, value in _changed(json.loads(content)):
            yield key, way, json.dumps(value).encode()
    elif path.suffix == ".jsonl":
        first, *rest = content.decode().splitlines()
        for key, way, value in _changed(json.loads(first)):
            yield key, way, "\n".join([json.dumps(value), *rest, ""]).encode()


def _changed(value: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield a value with each of its keys removed, null, or of another type; of a list the first entry is changed."""
    entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value[:1])) if isinstance(value, list) else []
    for key, inner in entries:
        name = f"{prefix}{key}"
        others = {"is null": None, "is of another type": 7 if isinstance(inner, str | list | dict | None) else "text"}
        for way, other in others.items():
            if other != inner:
                yield name, f"{name} {way}", _with(value, key, other)
        if isinstance(value, dict):
            yield name, f"{name} removed", {each: kept for each, kept in value.items() if each != key}
        for below, way, changed in _changed(inner, f"{name}."):
            yield below, way, _with(value, key, changed)


def _with(value: Any, key: Any, inner: Any) -> Any:
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = inner
    return copy


def attempt(command: Command, damage: Damage | None, run: Path, other: Path) -> Try:
    """Do one try on copies."""
    with tempfile.TemporaryDirectory(dir=run.parent) as place:
        folder = Path(place)
        copies = [shutil.copytree(each, folder / each.name) for each in (run, other)]
        (folder / "out").mkdir()
        if damage is not None:
            (copies[0] / damage.file).unlink()
            if damage.content is not None:
                (copies[0] / damage.file).write_bytes(damage.content)
        before = _digests(folder)
        outcome, said = _outcome(command.line(str(copies[0]), str(copies[1]), f"{folder}/out"))
        after = _digests(folder)
        if outcome == "refused":
            if after != before:
                changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
                outcome, said = "written to", f"{', '.join(changed)} after: {said}"
            elif damage is not None and not _names(said, damage):
                outcome = "does not name the file"
        if outcome == "done" and (left := [name for name in after if ".tmp" in name or ".parts" in name]):
            outcome, said = "half-written", ", ".join(left)
    nothing = Damage("", "whole", None)
    return Try(command.name, damage or nothing, outcome, said.replace(f"{place}/", ""))


def _names(said: str, damage: Damage) -> bool:
    file = Path(damage.file)
    # A checkpoint that is missing is missed by its name.
    return file.name in said or (damage.content is None and file.parent.name in said)


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class _Hangs(BaseException):
    """The time of a try is over."""


def _outcome(line: Sequence[str]) -> tuple[str, str]:
    """Run a command line here, and return what came of it and what it said."""

    def hang(*_: object) -> None:
        raise _Hangs

    out, err = io.StringIO(), io.StringIO()
    handler = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main(line)
    except _Hangs:
        return "hang", "nothing for a minute"
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    said = err.getvalue().strip().splitlines()
    if code == 0:
        return "done", (said or [""])[0]
    if code != cli.BAD_INPUT or len(said) != 1 or not said[0].startswith("ducat: "):
        return "not one line", f"exit code {code}, {len(said)} lines: {' / '.join(said)}"
    return "refused", said[0]


@contextlib.contextmanager
def short() -> Iterator[None]:
    """Leave out what takes long and reads no file: waiting for requests, and turning figures into SVG."""
    import uvicorn

    from ducat.reporting import plots

    serve, inline = uvicorn.Server.run, plots.inline
    uvicorn.Server.run = lambda self, sockets=None: None  # type: ignore[method-assign]
    plots.inline = lambda figure, name: ""
    try:
        yield
    finally:
        uvicorn.Server.run, plots.inline = serve, inline  # type: ignore[method-assign]


def product(run: Path, other: Path) -> Iterator[Try]:
    """Yield every damage under every command, without the keys of files that a command does not read.

    A command that ends well whether a file is gone, empty or noise does not read it.
    """
    everything = damages(run)
    for command in COMMANDS:
        for file in sorted({damage.file for damage in everything}):
            whole = [damage for damage in everything if damage.file == file and not damage.key]
            tries = [attempt(command, damage, run, other) for damage in whole]
            yield from tries
            if all(each.outcome == "done" for each in tries):
                continue
            for damage in everything:
                if damage.file == file and damage.key:
                    yield attempt(command, damage, run, other)


def main() -> None:
    """Try everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="commands to try; default: all")
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    global COMMANDS
    COMMANDS = tuple(c for c in COMMANDS if not arguments.only or c.name in arguments.only)
    with tempfile.TemporaryDirectory() as place, short():
        run, other = make(Path(place))
        for c in COMMANDS if arguments.log is None else ():
            t = time.time(); r = attempt(c, None, run, other); print(c.name, r.outcome, r.said, round(time.time() - t, 2), flush=True)
            t = time.time(); r = attempt(c, None, run, other); print(c.name, r.outcome, r.said, round(time.time() - t, 2), flush=True)
        if arguments.log is None: return
        counts: Counter = Counter()
        with arguments.log.open("w") as log:
            for each in product(run, other):
                counts[each.outcome] += 1
                print(each.outcome, "|", each.command, "|", each.damage, "|", each.said, file=log, flush=True)
        print(counts)


if __name__ == "__main__":
    main()
