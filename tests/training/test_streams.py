"""Training from a stream is training from the prepared file: the same batches, losses and weights."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ducat import checkpoint, data
from ducat.cli import main
from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.data.encoded import Encoded
from ducat.runs import RunFolder
from ducat.training import Interrupted, resume, train
from ducat.training.adapt import settings
from tests.support import Watcher, unvalidated
from tests.training.test_parallel import PROCESSES, join, together

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder of two classes, prepared as `decoded` and as the stream `streamed`."""
    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10)):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "insects" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 128, (8, 8, 3), np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    data.prepare("decoded", tmp_path / "insects", root=tmp_path)
    data.prepare("streamed", f"folder:{tmp_path}/insects", root=tmp_path)
    return tmp_path


def config(name: str, root: Path) -> Config:
    return Config(
        name=name,
        data=DataConfig(name, samples=64, root=root, workers=1),
        model=ModelConfig("small", 4),
        dummy=DummyConfig("recovery-aware", start_epoch=1),
        threat=ThreatConfig("l2", eps=0.5, steps=2),
        train=TrainConfig(
            epochs=2, batch_size=16, learning_rate=0.1, schedule="constant", tracker="none", precision="float32"
        ),
    )


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.read(folder.checkpoint_path("last"))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("random")}


def assert_equal(one: RunFolder, other: RunFolder) -> None:
    assert [row["loss"] for row in one.metrics] == [row["loss"] for row in other.metrics]
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stream_trains_as_the_prepared_file_and_goes_on_in_the_middle_of_an_epoch(root: Path) -> None:
    decoded = train(config("decoded", root), root / "runs")
    streamed = train(config("streamed", root), root / "runs")
    assert_equal(streamed, decoded)
    assert [row["robust"] for row in streamed.metrics] == [row["robust"] for row in decoded.metrics]
    assert streamed.manifest["data"]["fingerprint"] == data.load("streamed", samples=64, root=root).fingerprint
    with pytest.raises(Interrupted):
        train(replace(config("streamed", root), name="stopped"), root / "runs", Watcher(signal_after=6))
    assert_equal(resume(root / "runs" / "stopped"), decoded)


def test_adapting_a_stream_with_another_method_augments_as_that_method_does(root: Path) -> None:
    for name in ("streamed", f"folder:{root}/insects"):
        chosen = replace(config("streamed", root), name=None, dummy=DummyConfig("off"))
        chosen = replace(chosen, data=replace(chosen.data, name=name, workers=0))
        run = train(chosen, root / "runs", validate=unvalidated)
        begun = replace(settings(run.path), method=MethodConfig("consistency"))
        assert run.config.data.augmentation == "base"
        assert begun.resolve(run.dataset().spec).data.augmentation == "strong"


def test_a_run_on_another_stream_is_not_resumed(root: Path) -> None:
    with pytest.raises(Interrupted):
        train(config("streamed", root), root / "runs", Watcher(signal_after=2), validate=unvalidated)
    (root / "insects" / "train" / "ant" / "00.png").unlink()
    data.prepare("streamed", f"folder:{root}/insects", root=root, replace=True)
    with pytest.raises(ValueError, match="are not those that"):
        resume(root / "runs" / "streamed")


def test_a_run_whose_worker_dies_says_so_and_can_be_resumed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(replace(config("streamed", root), name="whole"), root / "runs", validate=unvalidated)
    original, trainer = Encoded.read, os.getpid()

    def dying(self: Encoded, rows: torch.Tensor) -> torch.Tensor:
        if os.getpid() != trainer:
            os.kill(os.getpid(), 9)
        return original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Encoded, "read", dying)
        with pytest.raises(OSError, match="a process that decodes images has died"):
            train(config("streamed", root), root / "runs", validate=unvalidated)
    assert_equal(resume(root / "runs" / "streamed", validate=unvalidated), whole)


def test_two_processes_on_a_stream_agree_with_one(root: Path) -> None:
    one = train(config("streamed", root), root / "runs")
    settings = config("streamed", root)
    # The processes of the tests are daemons, which can have no workers.
    together([replace(settings, data=replace(settings.data, workers=0))], root)
    two = RunFolder(root / "streamed")
    assert [row["loss"] for row in two.metrics] == pytest.approx([row["loss"] for row in one.metrics], rel=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-5, atol=1e-5)


def _one_of_two(rank: int, root: Path) -> None:
    """Train on the stream by the command, as one of two processes, of which the second dies in its second epoch."""
    sys.stderr = (root / f"errors-{rank}").open("w", buffering=1)
    original, batches = Encoded.read, 0

    def dying(self: Encoded, rows: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += len(rows) == 8  # of training: half of 16
        if batches == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, rows)

    if rank == 1:
        Encoded.read = dying  # type: ignore[method-assign]
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate says that it should be set
    join(rank, 2, root / "meeting")
    settings = config("streamed", root)
    settings = replace(settings, data=replace(settings.data, workers=0))
    file = root / f"settings-{rank}.yaml"
    file.write_text(settings.to_yaml())
    sys.exit(main(["train", "--config", str(file), "--runs", str(root), "--train.device", "cpu"]))


def test_a_process_that_dies_ends_the_other_within_a_minute_and_the_run_goes_on(root: Path) -> None:
    one = train(config("streamed", root), root / "runs")
    processes = [PROCESSES.Process(target=_one_of_two, args=(rank, root), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    processes[1].join(240)
    processes[0].join(60)
    ended = [process.exitcode for process in processes]
    processes[0].kill()
    assert ended == [2, -signal.SIGKILL]
    assert len((root / "errors-0").read_text().splitlines()) == 1
    two = resume(root / "streamed")
    assert [row["loss"] for row in two.metrics] == pytest.approx([row["loss"] for row in one.metrics], rel=1e-5)


def test_own_data_train_in_the_same_loop(root: Path) -> None:
    prepared = data.load("decoded", root=root)
    spec = prepared.spec
    parts = [
        (part.images.numpy(), part.labels.numpy()) for part in (prepared.train, prepared.test, prepared.validation)
    ]
    own = data.own(*parts, classes=prepared.classes, crop_padding=spec.crop_padding, flip=spec.flip)
    settings = replace(config("decoded", root), data=DataConfig("decoded", root=root))
    decoded = train(settings, root / "runs", validate=unvalidated)
    mine = train(replace(settings, name="own"), root / "runs", data=own, validate=unvalidated)
    # The mean is of other images, those that were held out among them.
    assert [row["loss"] for row in mine.metrics] == pytest.approx([row["loss"] for row in decoded.metrics], rel=0.01)
    assert mine.manifest["data"]["fingerprint"] == own.fingerprint == prepared.fingerprint
