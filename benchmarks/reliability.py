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
import multiprocessing
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image
from safetensors import safe_open

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


def _export(form: str, run: str, other: str, out: str) -> Sequence[str]:
    return "export", run, "--format", form, "--out", f"{out}/made"


COMMANDS = (
    Command("train --resume", lambda run, other, out: ("train", "--resume", run)),
    Command("adapt", lambda run, other, out: ("adapt", run, "--runs", out, "--name", "made", "--train.epochs", "1")),
    Command("evaluate", lambda run, other, out: ("evaluate", run, *EVALUATE, "--json", f"{out}/made.json")),
    Command("evaluate --surrogates", lambda run, other, out: ("evaluate", other, *EVALUATE, "--surrogates", run)),
    Command("calibrate", lambda run, other, out: ("calibrate", run, "--reject", "0.1")),
    Command(
        "compare",
        lambda run, other, out: ("compare", other, run, "--csv", f"{out}/made.csv", "--html", f"{out}/made.html"),
    ),
    Command("analyze always-failed", lambda run, other, out: ("analyze", "always-failed", other, run)),
    Command(
        "analyze transfer", lambda run, other, out: ("analyze", "transfer", other, run, "--json", f"{out}/made.json")
    ),
    Command("analyze targeted", lambda run, other, out: ("analyze", "targeted", run, "--samples", "8")),
    *(
        Command(
            f"export {form}",
            partial(_export, form),
        )
        for form in ("safetensors", "hub", "robustbench")
    ),
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
    content: bytes | None = field(default=None, repr=False)
    key: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.way}" if self.file else self.way


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
        middle, eighth = len(content) // 2, len(content) // 8
        whole: dict[str, bytes | None] = {
            "missing": None,
            "empty": b"",
            "cut in half": content[:middle],
            "cut by two bytes": content[:-2],
            "random bytes": noise,
            "random bytes in the middle": content[:middle] + noise[:eighth] + content[middle + eighth :],
        }
        others: tuple[Any, ...] = ([], {}, "text", None, 7)
        for other in others:
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
        first, *lines = content.decode().splitlines()
        for key, way, value in _changed(json.loads(first)):
            yield key, way, "\n".join([json.dumps(value), *lines, ""]).encode()


def _changed(value: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield a value with each of its keys removed, null, or of another type; of a list the first entry is changed."""
    entries = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value[:1]))
        if isinstance(value, list)
        else []
    )
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


def _train(config: Config, root: Path) -> str:
    return str(training.train(config, root).path)


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


def product(run: Path, other: Path, commands: Sequence[Command] = COMMANDS) -> Iterator[Try]:
    """Yield every damage under every command, without the keys of files that a command does not read.

    A command that ends well whether a file is gone, empty or noise does not read it.
    """
    everything = damages(run)
    for command in commands:
        for file in sorted({damage.file for damage in everything}):
            whole = [damage for damage in everything if damage.file == file and not damage.key]
            tries = [attempt(command, damage, run, other) for damage in whole]
            yield from tries
            if all(each.outcome == "done" for each in tries):
                continue
            for damage in everything:
                if damage.file == file and damage.key:
                    yield attempt(command, damage, run, other)


def side_by_side(run: Path, other: Path, commands: Sequence[Command], jobs: int) -> Iterator[Try]:
    """Yield what `product` does, with commands in several processes."""
    places = [COMMANDS.index(command) for command in commands]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for tries in pool.map(partial(_all_of, run, other), places):
            yield from tries


def _all_of(run: Path, other: Path, place: int) -> list[Try]:
    return list(product(run, other, [COMMANDS[place]]))


def forked(do: Callable[[], Any], *, limit: int | None = None, kill_after: float | None = None) -> Any:
    """Return what a function returns in a fork of this process; None if the fork was killed.

    Args:
        do: returns what JSON can hold.
        limit: bytes that a file may have at most, as on a disk that is full.
        kill_after: seconds after which the fork is killed.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receive)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            result = do()
            os.write(send, json.dumps(result).encode())
        finally:
            os._exit(0)
    os.close(send)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with open(receive, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return json.loads(content) if content else None


# Commands that write, besides those above.
WRITERS = (
    *(command for command in COMMANDS if command.name not in ("serve", "analyze always-failed", "analyze targeted")),
    Command(
        "train", lambda run, other, out: ("train", "--config", f"{other}/config.yaml", "--runs", out, "--name", "made")
    ),
    Command("demo", lambda run, other, out: ("demo", "--out", f"{out}/made", "--epochs", "1")),
    *(
        Command(
            f"export {form}",
            partial(_export, form),
        )
        for form in ("onnx", "torch-export")
    ),
    Command(
        "data prepare",
        lambda run, other, out: ("data", "prepare", "mine", "--from", f"{Path(run).parents[1]}/images", "--root", out),
    ),
)
SIZES = (0, 200, 2_000, 12_000, 30_000, 120_000)


def full_disk(run: Path, other: Path) -> Iterator[Try]:
    """Yield what commands do whose files may have a few bytes only."""
    _pictures(run.parent / "images")
    for command in WRITERS:
        for size in SIZES:
            damage = Damage("", f"files of at most {size} bytes")
            with tempfile.TemporaryDirectory(dir=run.parent) as place:
                folder = Path(place)
                copies = [str(shutil.copytree(each, folder / each.name)) for each in (run, other)]
                (folder / "out").mkdir()
                before = _digests(folder)
                line = command.line(copies[0], copies[1], f"{folder}/out")
                outcome, said = forked(partial(_outcome, line), limit=size) or ("died", "nothing")
                new = [folder / name for name, digest in _digests(folder).items() if before.get(name) != digest]
                hidden = [path for path in (folder / "out").rglob(".*") if path.name != ".lock"]
                left = [*hidden, *(path for path in new if ".tmp" in str(path) or not _whole(path))]
                if left:
                    outcome, said = (
                        "half-written",
                        ", ".join(str(path.relative_to(folder)) for path in left) + " after: " + said,
                    )
                yield Try(command.name, damage, outcome, said.replace(f"{place}/", ""))


def _whole(path: Path) -> bool:
    """Tell whether a file can be read to its end."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return bool(file.keys())
        content = path.read_bytes()
        if path.suffix in (".json", ".yaml"):
            return bool(yaml.safe_load(content))
        if path.suffix in (".html", ".svg"):
            return content.rstrip().endswith((b"</html>", b"</svg>"))
    except Exception:
        return False
    return len(content) > 0


def _pictures(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for kind in ("a", "b"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(20):
                pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / split / kind / f"{number}.png")


def kills(root: Path, tries: int) -> Iterator[Try]:
    """Yield what is left of a training that is killed at any time, and taken up again until it is finished."""
    settings = replace(SETTINGS, name="whole", train=replace(SETTINGS.train, epochs=6, keep=2))
    began = time.monotonic()
    whole = training.train(settings, root)
    seconds = time.monotonic() - began
    expected = {which: _tensors(whole, which) for which in whole.checkpoints}
    for number in range(tries):
        folder = root / f"killed-{number}"
        config = replace(settings, name=folder.name)
        forked(partial(_train, config, root), kill_after=seconds * (number + 0.5) / tries)
        damage = Damage("", f"killed after {(number + 0.5) / tries:.0%} of its time")
        if not folder.exists():
            yield Try("train", damage, "done", "killed before there was a run")
            continue
        outcome, said = _outcome(("train", "--resume", str(folder)))
        made = RunFolder.open(folder)
        if outcome == "done":
            same = made.checkpoints == whole.checkpoints and all(
                _tensors(made, which) == digests for which, digests in expected.items()
            )
            outcome = "done" if same else "not the same"
            said = said if same else f"{made.checkpoints} and not {whole.checkpoints}, or other weights"
        if left := [path.name for path in made.path.rglob("*.tmp")]:
            outcome, said = "half-written", ", ".join(left)
        yield Try("train", damage, outcome, said)


def _tensors(folder: RunFolder, which: str) -> str:
    """Return a digest of a checkpoint's weights and moments; the random generators are this process's own."""
    tensors, _ = folder.read(which)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}
    return hashlib.sha256(b"".join(kept[name].numpy().tobytes() for name in sorted(kept))).hexdigest()


class Grown(NamedTuple):
    """What a training of 200 epochs takes after some of them."""

    epoch: int
    megabytes: float
    open_files: int


def memory(root: Path, epochs: int = 200) -> list[Grown]:
    """Return memory and open files of a long training, in a fork of its own."""
    found: list[Grown] = []

    class Measure:
        def step(self, done: int, total: int) -> None: ...

        def warning(self, text: str) -> None: ...

        def epoch(self, row: dict[str, Any]) -> None:
            if (row["epoch"] + 1) % (epochs // 4) == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                megabytes = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
                found.append(Grown(row["epoch"] + 1, megabytes, len(os.listdir("/proc/self/fd"))))

    settings = replace(SETTINGS.train, epochs=epochs, validate_every=10, tracker="auto")

    def train() -> list[Grown]:
        training.train(replace(SETTINGS, name="long", train=settings), root, Measure())
        return found

    return [Grown(*row) for row in forked(train)]


def table(tries: Sequence[Try]) -> list[str]:
    """Return the lines of a Markdown table of how many tries of each command ended how."""
    bad = sorted({each.outcome for each in tries} - set(GOOD))
    columns = ["command", "tries", "did its work", "refused in one line", *bad]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    commands = list(dict.fromkeys(each.command for each in tries))
    for name in [*commands, "all"]:
        counts = Counter(each.outcome for each in tries if name in ("all", each.command))
        lines.append(f"| {name} | {counts.total()} | {' | '.join(str(counts[kind]) for kind in (*GOOD, *bad))} |")
    if not bad:
        lines += ["", "Nothing else: no traceback, no hang, nothing half-written, nothing changed by a refusal."]
    return lines


PARTS = {
    "damage": "Damaged files: every file x every way x every command",
    "disk": "Full disks: files of at most 0 to 120,000 bytes (RLIMIT_FSIZE)",
    "kills": "Trainings that are killed (SIGKILL) at any time and resumed, compared bit by bit with one never stopped",
}


def report(tries: Mapping[str, Sequence[Try]], grown: Sequence[Grown]) -> str:
    """Return results/reliability.md."""
    lines = [
        "# Damaged files, full disks, kills",
        "",
        "Made by `python -m benchmarks.reliability --out results/reliability.md` (one thread, CPU). A try is one",
        "command on a copy of a small run on digits. *Refused*: one line that names the file, exit code 2, no file",
        "written or changed. *Did its work*: exit code 0, and no temporary file is left; the command does not need",
        "what was damaged, or a damaged `last` checkpoint was replaced by the one before it, with a warning.",
    ]
    for part, title in PARTS.items():
        if tries.get(part):
            lines += ["", f"## {title}", "", *table(tries[part])]
            lines += [
                f"- {each.command}, {each.damage}: {each.outcome}: {each.said}"
                for each in tries[part]
                if each.outcome not in GOOD
            ]
    if grown:
        lines += ["", "## A training of 200 epochs", "", "| epoch | memory, MB | open files |", "| --- | --- | --- |"]
        lines += [f"| {row.epoch} | {row.megabytes} | {row.open_files} |" for row in grown]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try everything, or some of it, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the .md file to write")
    parser.add_argument("--parts", nargs="*", default=[*PARTS, "memory"], choices=[*PARTS, "memory"])
    parser.add_argument("--commands", nargs="*", default=[command.name for command in COMMANDS], help="of `damage`")
    parser.add_argument("--log", type=Path, help="a .jsonl file that each try is added to")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="processes of `damage`, a command each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tries: dict[str, list[Try]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as place, short():
        run, other = make(Path(place))
        commands = [command for command in COMMANDS if command.name in arguments.commands]
        sources = {
            "damage": side_by_side(run, other, commands, arguments.jobs),
            "disk": full_disk(run, other),
            "kills": kills(Path(place), arguments.kills),
        }
        for part in (part for part in PARTS if part in arguments.parts):
            for each in sources[part]:
                tries[part].append(each)
                if arguments.log is not None:
                    with arguments.log.open("a") as log:
                        row = {"part": part, "command": each.command, "damage": str(each.damage)}
                        log.write(json.dumps({**row, "outcome": each.outcome, "said": each.said}) + "\n")
        grown = memory(Path(place)) if "memory" in arguments.parts else []
    text = report(tries, grown)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
