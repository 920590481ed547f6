"""What a run's files may be like: a fixed part of what `python -m benchmarks.reliability` tries in full."""

import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import reliability
from benchmarks.reliability import COMMANDS, GOOD, WRITERS, Command, Damage, attempt, damages
from ducat import checkpoint, records
from ducat.cli import commands
from ducat.runs import RunFolder

TRIES = 24
QUICK = ("calibrate", "analyze always-failed", "analyze transfer", "export hub", "serve", "train --resume")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    with reliability.short():
        yield reliability.make(tmp_path_factory.mktemp("runs"))


def row(name: str) -> Command:
    return next(command for command in (*COMMANDS, *WRITERS) if command.name == name)


def test_damaged_files_are_refused_in_one_line_and_left_alone(runs: tuple[Path, Path]) -> None:
    everything = damages(runs[0])
    assert len(everything) > 500
    chosen = random.Random(0)
    for command in map(row, QUICK):
        for damage in chosen.sample(everything, TRIES // len(QUICK)):
            tried = attempt(command, damage, *runs)
            assert tried.outcome in GOOD, tried


@pytest.mark.parametrize(
    ("file", "way", "name"),
    [
        ("config.yaml", "train.epochs removed", "train --resume"),
        ("config.yaml", "data.name is null", "train --resume"),
        ("config.yaml", "threat.eps is null", "calibrate"),
        ("manifest.json", "data.fingerprint is of another type", "train --resume"),
        ("metrics.jsonl", "epoch removed", "train --resume"),
        ("metrics.jsonl", "clean removed", "compare"),
        ("evaluation.json", "robust is of another type", "compare"),
        ("evaluation.json", "attacks.0.accuracy removed", "export robustbench"),
        ("evaluation.json", "origin.weights is of another type", "compare"),
        ("behaviour.json", "examples.0.images.benign removed", "compare"),
        ("rejection.json", "threshold is null", "serve"),
        ("evaluation.safetensors", "evaluation.suite is null", "analyze always-failed"),
        ("checkpoints/best/checkpoint.safetensors", "model.num_classes is of another type", "calibrate"),
    ],
)
def test_the_key_at_fault_is_named(runs: tuple[Path, Path], file: str, way: str, name: str) -> None:
    damage = next(one for one in damages(runs[0]) if (one.file, one.way) == (file, way))
    tried = attempt(row(name), damage, *runs)
    assert tried.outcome == "refused", tried
    if not file.endswith(".safetensors"):  # a digest finds those
        assert damage.key.removeprefix("attacks.0.") in tried.said


def test_what_follows_from_an_evaluation_is_made_again_and_its_images_are_looked_at_before_another(
    runs: tuple[Path, Path],
) -> None:
    tried = attempt(row("evaluate"), Damage("behaviour.json", "[] instead", b"[]"), *runs)
    assert tried.outcome == "done", tried
    images = next(path for path in runs[0].glob("evaluations/*.safetensors"))
    cut = Damage(str(images.relative_to(runs[0])), "cut in half", images.read_bytes()[:-100])
    tried = attempt(row("evaluate"), cut, *runs)
    assert tried.outcome == "refused", tried
    assert "delete it and the .json beside it" in tried.said


def test_faults_are_caught_by_the_harness(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Damage("rejection.json", "[] instead", b"[]")
    with monkeypatch.context() as patched:
        patched.setattr(records, "conform", lambda value, expected, key="": value)
        assert attempt(row("serve"), broken, *runs).outcome == "traceback"
    with monkeypatch.context() as patched:
        patched.setattr(commands, "complain", lambda text: print(f"ducat: {text}\nmore", file=sys.stderr))
        assert attempt(row("serve"), broken, *runs).outcome == "not one line"
    with monkeypatch.context() as patched:
        patched.setattr(commands, "told", lambda error: "something is wrong")
        assert attempt(row("serve"), broken, *runs).outcome == "does not name the file"

    def careless(folder: RunFolder) -> dict[str, object]:
        (folder.path / "manifest.json").write_text("{")
        raise ValueError("manifest.json is damaged")

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "manifest", property(careless))
        gone = Damage("manifest.json", "missing")
        assert attempt(row("train --resume"), gone, *runs).outcome == "written to"


def test_full_disks_leave_nothing_half_written(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("calibrate", "export hub", "export torch-export", "data prepare", "train")
    monkeypatch.setattr(reliability, "WRITERS", tuple(map(row, chosen)))
    monkeypatch.setattr(reliability, "SIZES", (100, 12_000))
    tries = list(reliability.full_disk(*runs))
    assert len(tries) == 10
    assert all(tried.outcome in GOOD for tried in tries), tries
    assert {tried.command for tried in tries if tried.outcome == "refused"} == set(chosen)


def test_a_command_that_dies_on_a_full_disk_is_a_row_of_the_table(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reliability, "WRITERS", (row("calibrate"),))
    monkeypatch.setattr(reliability, "SIZES", (100,))
    monkeypatch.setattr(reliability, "_pictures", lambda folder: None)
    monkeypatch.setattr(reliability, "_outcome", lambda line: os.kill(os.getpid(), signal.SIGKILL))
    (tried,) = reliability.full_disk(*runs)
    assert tried.outcome == "died"
    assert "died" in "".join(reliability.table([tried]))


def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    tries = list(reliability.kills(tmp_path, 4))
    assert all(tried.outcome in GOOD for tried in tries), tries


def test_the_state_of_a_checkpoint_is_covered_by_a_digest(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    path = runs[0] / "checkpoints" / "best" / "checkpoint.safetensors"
    found = [one for one in damages(runs[0]) if one.file.startswith("checkpoints/best") and one.key == "position.epoch"]
    for damage in found:
        (tmp_path / "x.safetensors").write_bytes(damage.content or b"")
        with pytest.raises(ValueError, match="its header is not the one that was saved"):
            checkpoint.read(tmp_path / "x.safetensors")
    assert len(found) == 3
    tensors, state = checkpoint.read(path)
    assert json.loads(json.dumps(state)) == state
    assert tensors
