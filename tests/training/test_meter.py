import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ducat.training.meter import Meter

CPU = torch.device("cpu")


def package(folder: Path, number: int, microjoules: int, wraps_at: int = 1_000_000_000) -> Path:
    """Make a processor package as Linux's power capping framework shows it."""
    zone = folder / f"intel-rapl:{number}"
    zone.mkdir()
    (zone / "name").write_text(f"package-{number}\n")
    (zone / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    return zone / "energy_uj"


def test_energy_is_the_sum_of_what_the_counters_rose_by(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 5_000_000), package(tmp_path, 1, 0)
    part = tmp_path / "intel-rapl:0:0"  # a part of package 0, which would be counted twice
    part.mkdir()
    (part / "name").write_text("core")
    meter = Meter(CPU, powercap=tmp_path)
    first.write_text("7500000")
    meter.sample()
    first.write_text("8000000")
    second.write_text("1000000")
    assert meter.read()["energy_joules"] == {"package-0": 3.0, "package-1": 1.0}


def test_a_counter_that_overflows_goes_on(tmp_path: Path) -> None:
    counter = package(tmp_path, 0, 990_000_000)
    meter = Meter(CPU, powercap=tmp_path)
    counter.write_text("20000000")
    assert meter.read()["energy_joules"] == {"package-0": 30.0}


def test_what_was_spent_before_a_stop_is_added(tmp_path: Path) -> None:
    counter = package(tmp_path, 0, 0)
    first = Meter(CPU, powercap=tmp_path)
    counter.write_text("2000000")
    earlier = {**first.read(), "seconds": 100.0, "peak_memory_bytes": 1 << 60}
    second = Meter(CPU, earlier, powercap=tmp_path)
    counter.write_text("5000000")
    total = second.read()
    assert total["energy_joules"] == {"package-0": 5.0}
    assert total["seconds"] >= 100
    assert total["peak_memory_bytes"] == 1 << 60


def test_what_the_machine_does_not_tell_is_left_out(tmp_path: Path) -> None:
    read = Meter(CPU, powercap=tmp_path / "none").read()
    assert read.keys() == {"seconds", "peak_memory_bytes"}
    # An energy of a part of the run would pass for that of the whole.
    package(tmp_path, 0, 0)
    assert "energy_joules" not in Meter(CPU, read, powercap=tmp_path).read()


def test_peak_memory_is_what_the_process_had_at_most() -> None:
    before = Meter(CPU).read()["peak_memory_bytes"]
    assert 50e6 < before < 100e9, "an interpreter with PyTorch takes some 100 MB"
    held = torch.ones(60_000_000)
    assert Meter(CPU).read()["peak_memory_bytes"] == pytest.approx(max(before, held.nbytes), abs=before)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage is all there is")
def test_peak_memory_is_not_that_of_the_process_that_began_this_one() -> None:
    held = torch.ones(250_000_000)
    code = "from ducat.training import meter; print(meter._peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < held.nbytes
