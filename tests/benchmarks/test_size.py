"""The table at a size that shows the paper's pattern is made from end to end, a row at a time, at toy size."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.size import __main__ as size
from benchmarks.size import tables
from ducat import checkpoint
from ducat.cli import commands
from ducat.data.images import Images, stratified_subset
from ducat.runs import RunFolder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_rows_are_made_once_from_one_base_and_told_with_both_numbers(
    cifar10_jpeg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--setting", "toy", "--work", str(tmp_path)]

    def run(*more: str) -> str:
        """Run it here, which saves the imports."""
        monkeypatch.setattr(sys, "argv", ["size", *options, *more])
        size.main()
        return capsys.readouterr().out

    train = ["--archive", str(cifar10_jpeg), "--only", "published", "recovery-aware", "--train"]
    command = [sys.executable, "-m", "benchmarks.size", *options, *train]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "toy" / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["base-s0", "longer-s0", "published-s0", "recovery-aware-s0"]
    begins = [json.loads((path / "manifest.json").read_text())["initial"] for path in sorted(runs.iterdir())[1:]]
    assert [Path(each["file"]).relative_to(runs).parts[0] for each in begins] == ["base-s0", "longer-s0", "longer-s0"]
    assert begins[1] == begins[2]
    for path in runs.iterdir():
        weights = checkpoint.part("model", checkpoint.read(path / "checkpoints" / "last" / "checkpoint.safetensors")[0])
        assert all(torch.equal(value.half().to(value.dtype), value) for value in weights.values())
    assert "ducat adapt" not in run("--only", "recovery-aware")
    assert "recovery-aware" not in run("--only", "recovery-aware")
    run("--table", str(tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "size.json").read_text())["toy"]["dummy classes, recovery-aware"]
    assert len(content["evaluations"]) == 4
    for measured in content["evaluations"].values():
        assert measured["robust"] <= measured["blind"]
    page = (tmp_path / "out" / "size-tables.md").read_text()
    assert "dummy classes, recovery-aware, by logsumexp | 20 |" in page
    assert "autoattack-recovered" in page
    assert "second-opinion" not in page
    monkeypatch.setattr(sys, "argv", ["size", "--work", str(tmp_path), "--table", "out", "--base-seed", "1"])
    with pytest.raises(SystemExit):
        size.main()
    assert "has no evaluated row from a base of seed 1: see --base-seed" in capsys.readouterr().err


def test_tables_of_another_base_leave_those_of_the_first_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"suite": "light", "threat": {"norm": "linf"}, "samples": 3, "fingerprint": "one"}
    for name in ("base-s1", "published-s1", "published-s1-2", "base-s0", "base-s11"):
        file = tmp_path / "toy" / "runs" / name / "evaluations" / "light.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    rows = size.Table(tmp_path, "toy", base_seed=1).measured()
    assert [(row.seed, row.alike) for row in rows] == [("1", True), ("1", True), ("1-2", False)]
    assert size.Table(tmp_path, "toy", light=7).setting.light == 7
    monkeypatch.setattr(tables, "section", lambda *_: "")
    tables.write({"toy": []}, tmp_path / "out")
    tables.write({"toy": []}, tmp_path / "out", 1)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["size-seed-1.json", "size-tables-seed-1.md", "size-tables.md", "size.json"]
    assert "--table results --base-seed 1`" in (tmp_path / "out" / "size-tables-seed-1.md").read_text()


def test_a_figure_is_of_rows_that_were_attacked_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(tables, "section", lambda *_: "")
    monkeypatch.setattr(tables.plots, "trade_off", lambda shown, title: shown)
    monkeypatch.setattr(tables.plots, "save", lambda figure, path: drawn.append(list(figure)))
    folder: Any = SimpleNamespace(manifest={}, metrics=[], config_path=SimpleNamespace(read_text=str))

    def row(kind: str, images: str) -> tables.Measured:
        content = {"suite": "light", "threat": {"norm": "linf"}, "samples": 3, "fingerprint": images}
        return tables.Measured(kind, "0", folder, {"light": content})

    tables.write({"toy": [row("one", "few"), row("other", "few")]}, tmp_path)
    tables.write({"toy": [row("one", "few"), row("other", "all")]}, tmp_path)
    assert drawn == [["one", "other"]]


def test_of_many_images_those_are_told_that_an_evaluation_on_fewer_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.arange(40) % 4
    images = Images(torch.zeros(40, 1, 2, 2, dtype=torch.uint8), labels, torch.arange(40))
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(RunFolder, "dataset", lambda folder: SimpleNamespace(test=images))
    folder.evaluations_path.mkdir()
    few = torch.isin(torch.arange(40), stratified_subset(images, 8).ids)
    kept = stratified_subset(images, 20).ids
    save_file({"clean": few[kept], "robust": ~few[kept]}, folder.evaluations_path / "light-20.safetensors")
    content = {"suite": "light", "threat": {"norm": "linf"}, "samples": 20}
    row = tables.Measured("one", "1", folder, {"light-20": content})
    assert tables.fewer([row], 8).endswith("| one, seed 1 | 8 | 100.0 | 0.0 |\n")
    assert tables.fewer([row], 20) == ""


@pytest.mark.parametrize("setting", size.SETTINGS)
def test_a_setting_is_made_of_options_that_there_are(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[tuple[str, ...]] = []
    monkeypatch.setattr(size, "run", lambda *words: lines.append(words))
    monkeypatch.setattr(size, "_round", lambda folder: None)
    size.Table(tmp_path, setting).train("recovery-aware")  # after what it begins at
    assert (lines[0][0], lines[-1][0]) == ("train", "adapt")
    for command, *words in lines:
        options = words[command == "adapt" :]
        commands._train_parser(options).parse_args(options)


def test_a_row_that_a_setting_lacks_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["size", "--work", str(tmp_path), "--setting", "cpu", "--only", "longer"])
    with pytest.raises(SystemExit):
        size.main()
    assert "setting cpu has no row longer: choose from base, pgd-at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_of_one_suite_the_evaluation_on_most_images_is_shown_and_rows_on_other_images_are_no_pair(
    tmp_path: Path,
) -> None:
    def row(kind: str, *samples: int) -> tables.Measured:
        folder, contents = RunFolder(tmp_path / kind), {}
        folder.evaluations_path.mkdir(parents=True)
        for number in samples:
            flags = {name: torch.ones(number, dtype=torch.bool) for name in ("clean", "robust")}
            save_file(flags, folder.evaluations_path / f"light-{number}.safetensors")
            measured = {"suite": "light", "threat": {"norm": "linf"}, "samples": number, "fingerprint": f"{number}"}
            contents[f"light-{number}"] = measured
        return tables.Measured(kind, "0", folder, contents)

    rows = [row("one", 200, 1000), row("two", 1000, 200), row("three", 200)]
    assert [each.by("light", "linf") for each in rows[:2]] == [{"one": "light-1000"}, {"two": "light-1000"}]
    assert [line.split(" | ")[:2] for line in tables.paired(rows).splitlines()[2:]] == [["| two", "one"]]
