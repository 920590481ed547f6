import errno
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from ducat import runs
from ducat.config import Config, DataConfig
from ducat.data.specs import SPECS
from ducat.reporting.compare import Run
from ducat.runs import RunFolder, environment
from ducat.training import Interrupted

DATA = {"name": "digits", "title": "Digits", "fingerprint": "f", "train": 1, "validation": 1, "test": 1}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    with RunFolder.making(tmp_path / "run") as made:
        made.write_config(Config(name="run"))
        made.update_manifest({"status": "running", "data": DATA, **environment()})
    return RunFolder.open(tmp_path / "run")


def test_a_run_folder_appears_whole(tmp_path: Path) -> None:
    with RunFolder.making(tmp_path / "deep" / "run") as made:
        assert not (tmp_path / "deep" / "run").exists()
        made.write_config(Config())
    assert (tmp_path / "deep" / "run" / "config.yaml").is_file()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]


def test_a_run_folder_that_cannot_be_filled_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), RunFolder.making(tmp_path / "run"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_overwritten_even_if_it_came_meanwhile(tmp_path: Path) -> None:
    def make() -> None:
        with RunFolder.making(tmp_path / "run") as made:
            made.write_config(Config())
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run" / "mine").touch()

    for _ in range(2):
        with pytest.raises(FileExistsError, match="never overwritten"):
            make()
        assert [path.name for path in tmp_path.rglob("*")] == ["run", "mine"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            DataConfig("mine", root=Path("cache")),
            r"not prepared in cache .* --root cache .*; data\.root in .* is cache,",
        ),
        (DataConfig("folder:photos"), r"photos is not a folder.*; data\.name in .* is photos, which counts from"),
    ],
)
def test_data_whose_place_counts_from_another_folder_are_told_of(
    folder: RunFolder, data: DataConfig, message: str
) -> None:
    folder.write_config(Config(name="run", data=data).resolve(SPECS["digits"]))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        folder.dataset()


def test_commands_in_messages_are_as_a_shell_takes_them(folder: RunFolder, tmp_path: Path) -> None:
    spaced = RunFolder(folder.path.rename(tmp_path / "my run"))
    typed = re.escape(shlex.quote(str(spaced.path)))
    with pytest.raises(Interrupted, match=f"ducat train --resume {typed}$"):
        raise Interrupted(2, spaced)
    with pytest.raises(FileExistsError, match=f"--resume {typed}$"), RunFolder.making(spaced.path):
        pass
    with pytest.raises(FileNotFoundError, match=f"`ducat evaluate {typed}`"):
        Run.read(spaced.path)


def test_a_line_of_metrics_that_was_cut_short_is_left_out(folder: RunFolder) -> None:
    for epoch in range(3):
        folder.append_metrics({"epoch": epoch, "loss": 1.0})
    path = folder.path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert [row["epoch"] for row in folder.metrics] == [0, 1]
    folder.clean(from_epoch=1)
    folder.append_metrics({"epoch": 1, "loss": 1.0})
    assert [row["epoch"] for row in folder.metrics] == [0, 1]


def test_the_manifest_says_what_is_needed_to_do_it_again(folder: RunFolder) -> None:
    manifest = folder.manifest
    assert manifest["packages"]["torch"].startswith("2.")
    assert {"ducat", "python", "platform", "processor", "gpu", "cuda", "threads", "command", "git"} <= manifest.keys()


def test_a_resumption_notes_what_is_different(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    same = environment()
    monkeypatch.setattr(runs, "environment", lambda: {**same, "threads": 64})
    folder.note_resumption(3, 7, "2026-01-01")
    assert folder.manifest["resumed"] == [{"time": "2026-01-01", "epoch": 3, "step": 7, "threads": 64}]


def test_the_commit_is_that_of_this_code_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*command: str) -> None:
        identity = "-c user.name=a -c user.email=a@example.org -c init.defaultBranch=main"
        assert os.system(f"git {identity} -C {tmp_path} {' '.join(command)} >/dev/null 2>&1") == 0

    code = tmp_path / "ducat" / "runs.py"
    code.parent.mkdir()
    code.write_text("1")
    monkeypatch.setattr(runs, "__file__", str(code))
    git("init")
    (tmp_path / "theirs").touch()
    git("add", "theirs")
    git("commit", "-m", "theirs")
    assert environment()["git"] is None, "an installed copy took the commit of the checkout around it"
    git("add", "ducat")
    git("commit", "-m", "ours")
    found = environment()["git"]
    assert len(found["commit"]) == 40
    assert found["changed"] is False
    (tmp_path / "theirs").write_text("no code of ours")
    assert environment()["git"]["changed"] is False
    code.write_text("2")
    assert environment()["git"] == {"commit": found["commit"], "changed": True}


def test_a_damaged_manifest_is_named(folder: RunFolder) -> None:
    (folder.path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        folder.manifest  # noqa: B018


def test_a_folder_that_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        RunFolder.open(tmp_path)


def test_the_manifest_survives_a_failed_update(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (folder.path / "manifest.json").read_text()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"cannot write .*manifest\.json: No space left on device"):
        folder.update_manifest({"status": "finished"})
    assert json.loads(before) == folder.manifest
