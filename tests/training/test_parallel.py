"""Several processes that train one network do what one process does on the same global batch."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ducat import checkpoint
from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.runs import RunFolder
from ducat.training import Interrupted, resume, train
from ducat.training.parallel import LocalRows
from tests.support import Watcher

pytestmark = pytest.mark.slow

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["ducat.training", "accelerate", "filelock", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"]
)

CONFIG = Config(
    name="pgd-at",
    data=DataConfig("digits", samples=200),
    model=ModelConfig(width=4),
    dummy=DummyConfig("recovery-aware", start_epoch=1),
    threat=ThreatConfig(eps=0.1, steps=3),
    train=TrainConfig(
        epochs=2,
        batch_size=64,
        learning_rate=0.2,
        schedule="constant",
        validate_every=2,
        tracker="none",
        precision="float32",
        device="cpu",
    ),
)


def variant(name: str, **changes: Any) -> Config:
    training = replace(CONFIG.train, **changes.pop("train", {}))
    return replace(CONFIG, name=name, train=training, **changes)


# Steps along the gradient itself carry rounding on as it is.
L2 = ThreatConfig("l2", eps=0.5, step_size=0.125, steps=3)
SMOOTH = [
    variant("pgd-at", threat=L2),
    variant("mart", threat=L2, method=MethodConfig("mart")),
    variant("two-views", threat=L2, method=MethodConfig("consistency"), dummy=DummyConfig("published", start_epoch=1)),
    variant("perturbed-weights", threat=L2, train={"awp": 0.01, "averaging": "ema", "averaging_start_epoch": 0}),
    variant("mean-of-weights", threat=L2, train={"averaging": "swa", "averaging_start_epoch": 0}),
]
# A pixel whose gradient is all rounding steps by its sign, a whole step either way; where TRADES starts all are small.
SIGNED = [
    variant("linf"),
    variant("n-fgsm", method=MethodConfig(attack="n-fgsm"), threat=ThreatConfig(eps=0.1)),
    variant("trades", method=MethodConfig("trades")),
]


def join(rank: int, world_size: int, meeting: Path) -> None:
    """Make this process one of several, as `accelerate launch` does, that meet at a file."""
    os.environ.update(
        {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
            **{"LOCAL_WORLD_SIZE": str(world_size), "ACCELERATE_USE_CPU": "true"},
        }
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)


def _train_all(rank: int, world_size: int, meeting: Path, runs: list[Config | Path], root: Path) -> None:
    join(rank, world_size, meeting)
    for run in runs:
        resume(run) if isinstance(run, Path) else train(run, root)


def together(runs: Sequence[Config | Path], root: Path, world_size: int = 2) -> None:
    """Train, or go on with a run, in several processes, as `accelerate launch` starts them.

    They meet at a file: a port that is free now may be another's when they come to it, and then one waits for ever.
    """
    meeting = root / f"meeting-{time.monotonic_ns()}"
    processes = [
        PROCESSES.Process(target=_train_all, args=(rank, world_size, meeting, list(runs), root), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * world_size


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    together([*SMOOTH, *SIGNED], root)
    return root


def weights(path: Path) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.read(RunFolder(path).checkpoint_path("last"))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("random")}


def assert_close(one: RunFolder, two: RunFolder) -> None:
    """The weights, batch-norm statistics, momenta and losses of two runs agree to 1e-5."""
    first, second = weights(one.path), weights(two.path)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-5, atol=1e-5, msg=f"{name} differs")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    # Each process attacks its share of the validation images, from other random starts.
    assert two.metrics[-1]["clean"] == one.metrics[-1]["clean"]
    assert two.metrics[-1]["robust"] == pytest.approx(one.metrics[-1]["robust"], abs=0.05)


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in folder.metrics]


@pytest.mark.parametrize("config", SMOOTH, ids=lambda config: config.name)
def test_two_processes_agree_with_one(config: Config, of_two: Path, tmp_path: Path) -> None:
    one, two = train(config, tmp_path), RunFolder(of_two / config.name)
    assert (one.manifest["processes"], two.manifest["processes"]) == (1, 2)
    assert_close(one, two)


@pytest.mark.parametrize("config", SIGNED, ids=lambda config: config.name)
def test_two_processes_agree_with_one_but_for_signs_of_rounding(config: Config, of_two: Path, tmp_path: Path) -> None:
    first, later = losses(train(config, tmp_path))
    assert losses(RunFolder(of_two / config.name)) == [pytest.approx(first, rel=1e-4), pytest.approx(later, rel=1e-3)]


def test_a_run_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    config = variant("run", threat=L2)
    whole = train(config, tmp_path / "whole")

    with pytest.raises(Interrupted):
        train(config, tmp_path, Watcher(signal_after=4, signum=signal.SIGTERM))
    together([tmp_path / "run"], tmp_path)
    assert_close(whole, RunFolder(tmp_path / "run"))


@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"],
        ["torch.distributed.run", "--nproc-per-node", "2"],
    ],
    ids=["accelerate launch", "torchrun"],
)
def test_the_commands_of_the_documentation_train_and_evaluate_in_two_processes(
    launcher: list[str], tmp_path: Path
) -> None:
    # Without a word on the device: it is for the run to see that there are no GPUs.
    config = variant("run", threat=L2, train={"device": "auto" if not torch.accelerator.is_available() else "cpu"})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", *launcher, "-m", "ducat", "train", "--config", "config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next: ducat evaluate") == 1
    two = RunFolder(tmp_path / "runs" / "run")
    assert two.manifest["processes"] == 2
    assert_close(train(config, tmp_path), two)
    command[command.index("train") :] = ["evaluate", "runs/run", "--suite", "quick", "--samples", "40"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Page: runs/run/report.html") == 1
    assert [path.suffix for path in sorted((two.path / "evaluations").iterdir())] == [".json", ".safetensors"]


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
@pytest.mark.parametrize("views", [1, 2])
def test_processes_draw_the_rows_that_one_process_draws(draw: Any, views: int) -> None:
    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    everyones = draw((views * 12, 1, 5, 5), generator=noise()).unflatten(0, (views, 12))
    for rank, form in itertools.product(range(3), (lambda *shape: (shape,), lambda *shape: shape)):
        with LocalRows(rank, 3, views):
            mine = draw(*form(views * 4, 1, 5, 5), generator=noise()).unflatten(0, (views, 4))
        assert torch.equal(mine, everyones[:, 4 * rank : 4 * rank + 4])


def _told(rank: int, world_size: int, meeting: Path, root: Path) -> None:
    join(rank, world_size, meeting)
    told: list[str] = []
    for config in (
        variant("uneven", data=DataConfig("digits", samples=195), train={"drop_last": False}),
        variant("unvalidated", data=DataConfig("digits", samples=195, held_out=1)),
    ):
        with pytest.raises(ValueError, match="processes cannot share") as raised:
            train(config, root)
        told.append(str(raised.value))
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    watcher = Watcher()
    train(variant("vectors", dummy=DummyConfig(), train={"epochs": 1}), root, watcher, model=vectors)
    (root / f"told-{rank}.json").write_text(json.dumps([*told, *watcher.warnings]))


def test_what_processes_cannot_share_is_said(tmp_path: Path) -> None:
    processes = [PROCESSES.Process(target=_told, args=(rank, 2, tmp_path / "meeting", tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    uneven, unvalidated, apart = told[0]
    assert uneven.startswith("the last batch of an epoch has 3 images, which 2 processes cannot share evenly: choose")
    assert unvalidated.startswith("2 processes cannot share 1 validation images: hold out more (data.held_out)")
    assert apart.startswith("2, a BatchNorm1d, takes batch statistics over each process's own images")
    assert not {"uneven", "unvalidated"} & {path.name for path in tmp_path.iterdir()}


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path: Path) -> None:
    config = variant("run", train={"learning_rate": 1e30})
    with pytest.raises(AssertionError, match=r"\[1, 1\]"):
        together([config], tmp_path)
    assert RunFolder(tmp_path / "run").manifest["status"] == "failed"
