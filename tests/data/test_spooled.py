import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ducat
from ducat import checkpoint
from ducat.attacks.suites import Attack, Suite, fgsm
from ducat.data import spooled

MEGABYTES = 96


def peak(of: str = "VmHWM") -> int:
    found = re.search(rf"{of}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) // 1024


def forget_the_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system does not let a process forget its peak")


def noise(rows: int, side: int) -> torch.Tensor:
    x = spooled.empty((rows, 3, side, side))
    for part in spooled.chunks(x, 50):
        part.uniform_(generator=torch.Generator().manual_seed(0))
    return x


def test_values_stay_and_memory_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooled, "LARGE", 2**20)
    forget_the_peak()
    before, rows = peak("VmRSS"), MEGABYTES
    x = spooled.empty((rows, 2**18), folder=tmp_path)
    for number, part in enumerate(spooled.chunks(x, 1)):
        part.fill_(number)
    assert [float(part.sum()) / 2**18 for part in spooled.chunks(x, 1)] == list(range(rows))
    assert peak() < before + MEGABYTES // 4
    assert torch.equal(spooled.take(x, torch.tensor([5, 3]))[:, 7], torch.tensor([5.0, 3.0]))
    assert torch.equal(torch.cat([part.clone() for part in spooled.slices(x)]), x.flatten())
    assert spooled.is_on_disk(x)
    assert not spooled.is_on_disk(x[:3])
    assert not spooled.is_on_disk(torch.zeros(3))
    assert not list(tmp_path.iterdir())


def test_what_is_small_is_in_memory() -> None:
    assert not spooled.is_on_disk(spooled.empty((3, 4)))
    assert spooled.empty((0, 3)).shape == (0, 3)


def test_a_lack_of_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"needed in {re.escape(str(tmp_path))}"):
        spooled.empty((2**50,), folder=tmp_path)
    with pytest.raises(OSError, match="TMPDIR names another folder"):
        spooled.empty((2**50,))


def test_large_tensors_are_saved_and_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(100, 8)
    checkpoint.save(tmp_path / "memory.safetensors", {"x": x, "y": torch.arange(3), "z": torch.ones(7) > 0}, {})
    monkeypatch.setattr(spooled, "LARGE", 1)
    monkeypatch.setattr(spooled, "SLICE", 1000)
    copy = noise(100, 8)
    assert spooled.is_on_disk(copy)
    checkpoint.save(tmp_path / "disk.safetensors", {"x": copy, "y": torch.arange(3), "z": torch.ones(7) > 0}, {})
    for name in ("memory", "disk"):
        tensors, _ = checkpoint.read(tmp_path / f"{name}.safetensors")
        assert spooled.is_on_disk(tensors["x"])
        assert torch.equal(tensors["x"], x)
        assert torch.equal(tensors["y"], torch.arange(3))
        assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["x"], x)


def test_test_images_on_disk_are_those_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, y = ducat.data.load_test("digits", samples=60, root=tmp_path)
    monkeypatch.setattr(spooled, "LARGE", 1)
    again, labels = ducat.data.load_test("digits", samples=60, root=tmp_path)
    assert spooled.is_on_disk(again)
    assert torch.equal(again, x)
    assert torch.equal(labels, y)


@pytest.mark.slow
def test_an_evaluation_of_ten_times_the_images_takes_no_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooled, "LARGE", 2**20)
    monkeypatch.setattr(spooled, "SLICE", 2**20)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Flatten(), torch.nn.Linear(256, 4))
    suite = Suite((Attack("fgsm", False, fgsm), Attack("fgsm", True, fgsm)), audit=False)
    peaks = {}
    for rows in (200, 200, 2000):  # the first time is for what is loaded once
        x = noise(rows, 64)
        y = torch.cat([model(part).argmax(1) for part in spooled.chunks(x, 50)])
        forget_the_peak()
        parts = tmp_path / str(rows)
        found = ducat.evaluate(model, x, y, ducat.ThreatModel(), suite, num_classes=4, batch_size=50, parts=parts)
        found.save(tmp_path / "evaluation.json", replace=True)
        ducat.Evaluation.load(tmp_path / "evaluation.json")
        peaks[rows] = peak()
    assert found.robust.float().mean() < found.clean.float().mean() == 1
    assert peaks[2000] < 1.1 * peaks[200], peaks
