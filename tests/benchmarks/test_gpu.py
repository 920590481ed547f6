"""The script for a GPU runs from end to end at toy size, and goes on where it was stopped."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ducat.data.specs import SPECS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive of CIFAR-10 (JPEG)'s layout, with 10 training and 2 test images a class."""
    path, pixels = tmp_path / "cifar10-jpeg.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for name in SPECS["cifar10-jpeg"].classes or ():
            for split, count in (("train", 10), ("test", 2)):
                for number in range(count):
                    content = io.BytesIO()
                    Image.fromarray(pixels.integers(0, 256, (32, 32, 3), np.uint8)).save(content, "JPEG")
                    file.writestr(f"{split}/{name}/{number}.jpg", content.getvalue())
    return path


def run(archive: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--data", str(archive), "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_script_for_a_gpu_goes_on_where_it_stopped_and_measures_everything(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = run(archive, out, "--stage", "2", "--minutes", "0")
    assert stopped.returncode == 3, stopped.stderr
    assert "time is up in stage 'train pgd-at'; the same command goes on" in stopped.stdout
    assert json.loads((out / "runs" / "pgd-at" / "manifest.json").read_text())["status"] == "interrupted"
    done = run(archive, out)
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
