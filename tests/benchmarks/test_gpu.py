"""The script for a GPU runs from end to end at toy size, and goes on where it was stopped."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(archive: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--toy",
        "--data",
        str(archive),
        "--out",
        str(out),
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_script_for_a_gpu_goes_on_and_measures_everything(cifar10_jpeg: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)  # a preparation that was killed
    stopped = run(cifar10_jpeg, out, "--stage", "2", "--minutes", "0")
    assert stopped.returncode == 3, stopped.stderr
    assert "time is up in stage 'train pgd-at'; the same command goes on" in stopped.stdout
    assert json.loads((out / "runs" / "pgd-at" / "manifest.json").read_text())["status"] == "interrupted"
    done = run(cifar10_jpeg, out)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "results.json").read_text())
    assert [network["name"] for network in found["networks"]] == ["pgd-at", "published", "recovery-aware"]
    for network in found["networks"]:
        assert network["manifest"]["status"] == "finished"
        knows = {row["name"] for row in network["autoattack"]["attacks"]}
        assert knows == {"autoattack", "autoattack-recovered"}
        assert network["evaluation"]["robust"] <= network["evaluation"]["blind"]
    assert len(found["networks"][0]["manifest"]["resumed"]) == 1
    measured = {(row["attack"], row["research_precision"]) for row in found["steps"]}
    assert {("float32", "float32"), ("TF32", "TF32"), ("bf16", "float32"), ("bf16", "TF32")} <= measured
    page = (out / "results.md").read_text()
    assert "Toy sizes" in page
    assert page.count("| finished |") == 3


def test_what_is_measured_is_written_when_a_stage_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_steps(place: gpu.Place, clock: gpu.Clock) -> None:
        place.write("steps.json", [])
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "STAGES", [("the training step", measure_steps)])
    monkeypatch.setattr(gpu, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["gpu", "--toy", "--data", "none.zip", "--out", str(tmp_path)])
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu.main()
    assert json.loads((tmp_path / "results.json").read_text())["toy"]
    assert "Toy sizes" in (tmp_path / "results.md").read_text()


def test_toy_results_are_not_taken_for_real_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text('{"toy": true}')
    monkeypatch.setattr(gpu, "STAGES", [])
    monkeypatch.setattr(gpu, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["gpu", "--data", "none.zip", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "holds results with --toy: choose another" in capsys.readouterr().err


# Of what the package needs, what a machine with PyTorch, accelerate and scikit-learn had not.
ABSENT = {"platformdirs", "jsonargparse", "docstring-parser", "typeshed-client", "pyautoattack", "pooch"}


def test_the_packages_that_are_named_are_all_that_a_bare_machine_lacks() -> None:
    named = re.search(r"-t site (.*)", gpu.__doc__ or "")
    assert named is not None
    brought = {package.partition("==")[0] for package in named[1].split()}
    hidden = sorted(name.replace("-", "_") for name in ABSENT - brought)
    code = f"""
import importlib.util, sys
hidden, find_spec = {hidden}, importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in hidden else find_spec(name, *more)
sys.modules.update(dict.fromkeys(hidden))
from benchmarks.gpu import __main__
from ducat.attacks import external
from ducat.config import Config
import pyautoattack
Config.from_yaml("recipes/cifar10-paper.yaml")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
