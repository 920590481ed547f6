"""The script for a GPU runs from end to end at toy size, and goes on where it was stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
