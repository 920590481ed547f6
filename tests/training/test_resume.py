"""Runs are stopped by real signals to real processes, and go on as if they had not been."""

import multiprocessing
import os
import random
import signal
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ducat import checkpoint
from ducat.cli import main
from ducat.config import Config, DataConfig, DummyConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.runs import RunFolder
from ducat.training import Interrupted, resume, train
from tests import support
from tests.support import Watcher, unvalidated

pytestmark = pytest.mark.slow

CONFIG = Config(
    name="run",
    data=DataConfig("digits", samples=200),
    model=ModelConfig(width=4),
    dummy=DummyConfig("recovery-aware", start_epoch=1),
    threat=ThreatConfig(eps=0.05, steps=2),
    train=TrainConfig(
        epochs=4,
        batch_size=64,
        learning_rate=0.2,
        schedule="constant",
        validate_every=2,
        tracker="none",
        checkpoint_minutes=1e-9,  # a checkpoint after every step, however fast the machine
    ),
)
STEPS = 3  # of an epoch
PATIENCE = 300  # seconds for what takes three on an idle machine

# Processes are forked from one that has done its imports, so that each starts at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["ducat.cli.commands", "accelerate", "filelock", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"]
)


class Run:
    """A `ducat` command in a process of its own.

    Args:
        arguments: the command line.
        before: Python to run first, for example to make a fault; its `tell()` is what `told` waits for.
        output: the file for what it prints; by default beside what the last argument names.
    """

    def __init__(self, *arguments: object, before: str = "", output: Path | None = None) -> None:
        line = [str(argument) for argument in arguments]
        self.output = output or Path(line[-1]).parent / f"output-{time.monotonic_ns()}"
        # Whoever started the tests in the background may have had SIGINT ignored.
        code = f"""
import os, signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
os.dup2(os.open({str(self.output)!r}, os.O_CREAT | os.O_WRONLY), 2)
os.dup2(2, 1)
{before}
from ducat.cli import main
sys.exit(main({line!r}))
"""
        self.heard, said = PROCESSES.Pipe(duplex=False)
        # A daemon: one that hangs does not keep pytest, which waits for all others, from its end.
        self.process = PROCESSES.Process(target=exec, args=(code, {"tell": partial(said.send, None)}), daemon=True)
        self.process.start()
        said.close()

    def told(self) -> None:
        """Wait until the process tells that it has come to the moment it was to tell of."""
        assert self.heard.poll(PATIENCE), "the process hangs"
        try:
            self.heard.recv()
        except EOFError:
            pytest.fail(f"the process ended before its moment: {self.end()}")

    def end(self) -> tuple[int, str]:
        """Wait for it; return its exit code, negative for a signal, and what it printed."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"the process hangs; it printed: {self.output.read_text()}")
        return self.process.exitcode, self.output.read_text()


def start(folder: Path, config: Config = CONFIG, before: str = "") -> Run:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(config.to_yaml())
    return Run("train", "--config", path, "--runs", folder, before=before)


def outcome(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return everything that a run's stops must not change: both checkpoints' tensors, and metrics but for times."""
    folder = RunFolder.open(path)
    assert folder.manifest["status"] == "finished"
    tensors = {
        f"{which}.{name}": tensor
        for which in ("best", "last")
        for name, tensor in checkpoint.read(folder.checkpoint_path(which))[0].items()
        # The random states of the two processes were never the same.
        if not name.startswith("random")
    }
    rows = [{key: row[key] for key in row.keys() - {"seconds", "images_per_s"}} for row in folder.metrics]
    return tensors, rows


def assert_same(path: Path, expected: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    tensors, rows = outcome(path)
    assert rows == expected[1]
    assert tensors.keys() == expected[0].keys()
    assert all(torch.equal(tensors[name], expected[0][name]) for name in tensors)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("unbroken")
    code, output = start(folder).end()
    assert code == 0, output
    return outcome(folder / "run")


def tell_at_step(number: int) -> str:
    """Let a process tell when it comes to a step, counted from where it starts, and never end the step after it."""
    return f"""
step, done = torch.optim.SGD.step, []
def telling(self, *arguments, **options):
    if len(done) == {number}:
        tell()
    elif len(done) > {number}:
        time.sleep({2 * PATIENCE})
    done.append(step(self, *arguments, **options))
torch.optim.SGD.step = telling
"""


def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(tmp_path: Path, unbroken: Any) -> None:
    # Each process waits for its kill before it ends a second step, so none can end first. What the kill falls into is
    # chance: a step, the checkpoint after it, the validation of an epoch, the next attack.
    moments, path = random.Random(6), tmp_path / "run"
    run = start(tmp_path, before=f"tell()\n{tell_at_step(1)}")
    for kill in range(6):
        run.told()
        time.sleep(moments.uniform(0, 0.08))
        run.process.kill()
        assert run.end()[0] == -signal.SIGKILL
        before = tell_at_step(kill % 2) if kill < 5 else ""
        run = Run("train", "--resume", path, before=before) if path.exists() else start(tmp_path, before=before)
    code, output = run.end()
    assert code == 0, output
    assert len(RunFolder(path).manifest["resumed"]) >= 5
    assert_same(path, unbroken)
    assert not list(path.rglob("*.tmp"))


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def kill_at_step(number: int) -> str:
    return f"""
import torch
step, left = torch.optim.SGD.step, [{number}]
def dying(self, *arguments, **options):
    left[0] -= 1
    if left[0] < 0:
        {KILL}
    return step(self, *arguments, **options)
torch.optim.SGD.step = dying
"""


def kill_at_rename(number: int) -> str:
    return f"""
replace, left = os.replace, [{number}]
def dying(*arguments):
    left[0] -= 1
    if left[0] < 0:
        {KILL}
    replace(*arguments)
os.replace = dying
"""


def kill_while_writing(number: int) -> str:
    return f"""
import ducat.checkpoint as checkpoint
save_file, left = checkpoint.save_file, [{number}]
def dying(tensors, path, metadata):
    save_file(tensors, path, metadata)
    left[0] -= 1
    if left[0] < 0:
        os.truncate(path, 1000)
        {KILL}
checkpoint.save_file = dying
"""


@pytest.mark.parametrize(
    "before",
    [
        kill_at_step(2 * STEPS),  # the first step of epoch 2
        kill_at_step(3 * STEPS - 1),  # the last
        kill_at_rename(12),
        kill_at_rename(13),
        kill_while_writing(5),
    ],
    ids=["first step", "last step", "rename", "next rename", "write"],
)
def test_a_run_killed_at_a_chosen_moment_ends_as_an_unbroken_one(tmp_path: Path, before: str, unbroken: Any) -> None:
    code, output = start(tmp_path, before=before).end()
    assert code == -signal.SIGKILL, output
    assert len(RunFolder.open(tmp_path / "run").metrics) < 4
    code, output = Run("train", "--resume", tmp_path / "run").end()
    assert code == 0, output
    assert_same(tmp_path / "run", unbroken)


def signal_at(place: str, signum: signal.Signals, times: int = 1) -> str:
    """Let a process send itself a signal in its fifth step, or in its first validation."""
    return f"""
import ducat.training.validation as room
from ducat import methods
left = [5 if {place!r} == "step" else 1]
def sending(function):
    def send(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            for _ in range({times}):
                os.kill(os.getpid(), {int(signum)})
        return function(*arguments, **options)
    return send
if {place!r} == "step":
    methods.Objective.attack = sending(methods.Objective.attack)
else:
    room.evaluate = sending(room.evaluate)
"""


@pytest.mark.parametrize(
    ("place", "signum", "epoch", "step"),
    [
        ("step", signal.SIGTERM, 1, 2),
        ("step", signal.SIGINT, 1, 2),
        ("validation", signal.SIGTERM, 1, STEPS),
    ],
)
def test_a_signal_finishes_the_step_saves_and_has_its_own_exit_code(
    tmp_path: Path, place: str, signum: signal.Signals, epoch: int, step: int, unbroken: Any
) -> None:
    code, output = start(tmp_path, before=signal_at(place, signum)).end()
    path = tmp_path / "run"
    assert code == 128 + signum
    assert output == f"ducat: stopped by {signum.name}; continue with: ducat train --resume {path}\n"
    position = checkpoint.read(RunFolder(path).checkpoint_path("last"))[1]["position"]
    assert (position["epoch"], position["step"]) == (epoch, step)
    assert RunFolder(path).manifest["status"] == "interrupted"
    code, output = Run("train", "--resume", path).end()
    assert code == 0, output
    assert_same(path, unbroken)
    assert [(entry["epoch"], entry["step"]) for entry in RunFolder(path).manifest["resumed"]] == [(epoch, step)]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 128 + signal.SIGINT)])
def test_a_second_signal_quits_at_once(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    before = signal_at("step", signum, times=2)
    run = start(tmp_path, replace(CONFIG, train=replace(CONFIG.train, checkpoint_minutes=0)), before)
    assert run.end()[0] == code
    position = checkpoint.read(RunFolder(tmp_path / "run").checkpoint_path("last"))[1]["position"]
    assert (position["epoch"], position["step"]) == (1, 0), "it went on to save the step"


def together(*arguments: object, before: str = "") -> list[tuple[int, str]]:
    """Run a command in two processes that train together, as `accelerate launch` starts them.

    They meet at a file: a port that is free now may be another's when they come to it, and then one waits for ever.
    """
    meeting = Path(str(arguments[-1])).parent / f"meeting-{time.monotonic_ns()}"
    ranks = []
    for rank in range(2):
        launched = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"ACCELERATE_USE_CPU": "true"},
        }
        joining = f"""
os.environ.update({launched})
torch.distributed.init_process_group("gloo", init_method="file://{meeting}", rank={rank}, world_size=2)
{before}
"""
        ranks.append(Run(*arguments, before=joining))
    return [rank.end() for rank in ranks]


def test_processes_that_train_together_stop_together_and_continue_bit_by_bit(tmp_path: Path) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, device="cpu"))
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config.to_yaml())
    whole, path = tmp_path / "unbroken", tmp_path / "stopped" / "run"
    ended = together("train", "--config", whole / "config.yaml", "--runs", whole)
    assert [code for code, _ in ended] == [0, 0], ended
    # The second process gets the signal alone, and twice: from the cluster, and from the launcher.
    signalled = f'if os.environ["RANK"] == "1":\n{textwrap.indent(signal_at("step", signal.SIGTERM, times=2), "    ")}'
    ended = together("train", "--config", path.parent / "config.yaml", "--runs", path.parent, before=signalled)
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert RunFolder(path).manifest["status"] == "interrupted"
    ended = together("train", "--resume", path)
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same(path, outcome(whole / "run"))


@pytest.mark.parametrize(
    ("settings", "stop_at"),
    [
        ({"averaging": "ema"}, STEPS + 1),
        ({"averaging": "swa"}, STEPS + 1),
        ({"averaging": "swa"}, 2 * STEPS),  # the average has taken the epoch, its validation is to come
        ({"precision": "bf16"}, STEPS + 1),
    ],
)
def test_whatever_is_trained_continues_bit_by_bit(tmp_path: Path, settings: dict[str, Any], stop_at: int) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, epochs=2, averaging_start_epoch=0, **settings))
    train(config, tmp_path / "unbroken")

    with pytest.raises(Interrupted):
        train(config, tmp_path, Watcher(signal_after=stop_at, signum=signal.SIGTERM))
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", outcome(tmp_path / "unbroken" / "run"))


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path, unbroken: Any) -> None:
    start(tmp_path, before=signal_at("step", signal.SIGTERM)).end()
    path = tmp_path / "run"
    last = RunFolder(path).checkpoint_path("last")
    last.write_bytes(last.read_bytes()[:500])
    with pytest.warns(UserWarning, match="took the checkpoint before it"):
        RunFolder(path).load("last")
    code, output = Run("train", "--resume", path).end()
    assert code == 0, output
    assert "took the checkpoint before it" in output
    assert_same(path, unbroken)


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_whole_one(tmp_path: Path) -> None:
    config = replace(support.TINY, train=replace(support.TINY.train, tracker="none"))
    with pytest.raises(Interrupted):
        train(config, tmp_path, Watcher(signal_after=3, signum=signal.SIGTERM), validate=unvalidated)
    last = RunFolder(tmp_path / "run").checkpoint_path("last")
    last.write_bytes(last.read_bytes()[:500])
    whole = checkpoint.read(checkpoint.previous_of(last))[1]
    with pytest.raises(Interrupted):
        resume(tmp_path / "run", Watcher(signal_after=3, signum=signal.SIGTERM), validate=unvalidated)
    assert checkpoint.read(checkpoint.previous_of(last))[1] == whole
    assert checkpoint.read(last)[1]["position"]["step"] == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(CONFIG, train=replace(CONFIG.train, epochs=2))
    return train(config, tmp_path_factory.mktemp("finished")).path


def test_a_finished_run_is_left_as_it_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["train", "--resume", str(finished)]) == 0
    assert "is finished: nothing was left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("others", [["--train.epochs", "130"], ["--name", "x"], ["--runs", "runs"]])
def test_resume_takes_no_other_setting(finished: Path, others: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(finished), *others]) == 2
    assert capsys.readouterr().err == (
        f"ducat: --resume takes the settings of the run, so {others[0]} cannot be given with it\n"
    )


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    start(tmp_path, before=signal_at("step", signal.SIGTERM)).end()
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        code, output = Run("train", "--resume", folder.path).end()
    assert (code, output) == (2, f"ducat: {folder.path} is being trained by another process: wait for it, or stop it\n")


def test_other_data_are_told(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, tmp_path, Watcher(leave_after=1))
    folder = RunFolder(tmp_path / "run")
    folder.update_manifest({"data": {**folder.manifest["data"], "fingerprint": "sha256:0"}})
    with pytest.raises(ValueError, match="the data digits are not those"):
        resume(folder.path)


def test_an_interrupted_run_can_be_used(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(replace(CONFIG, dummy=DummyConfig("published", start_epoch=3)), tmp_path, Watcher(leave_after=1))
    folder = RunFolder.open(tmp_path / "run")
    assert folder.load("last")(torch.rand(2, 1, 8, 8)).shape == (2, 20)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint best .*status: interrupted.*: choose from last"):
        folder.load("best")


def test_the_checkpoints_of_the_newest_epochs_are_kept(tmp_path: Path) -> None:
    folder = train(replace(CONFIG, train=replace(CONFIG.train, keep=2)), tmp_path)
    assert folder.checkpoints == ["best", "last", "epoch-4", "epoch-3"]
    newest, last = folder.load("epoch-4").state_dict(), folder.load("last").state_dict()
    assert all(torch.equal(newest[name], last[name]) for name in last)
    older = folder.load("epoch-3").state_dict()
    assert not all(torch.equal(older[name], last[name]) for name in last)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint epoch-1 .*choose from best, last, epoch-4, epoch-3"):
        folder.load("epoch-1")
    with pytest.raises(ValueError, match="which='newest' is unknown"):
        folder.load("newest")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 90 kB, for the tests of a full disk, where the system lets us have one."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.system(f"mount -t tmpfs -o size=90k none {path} 2>/dev/null"):
        pytest.skip("mounting a small disk is not allowed here")
    yield path
    os.system(f"umount {path}")


def test_a_disk_that_is_full_is_told_and_the_run_goes_on_when_there_is_room(small_disk: Path, unbroken: Any) -> None:
    # Room for the first checkpoint, not for the third.
    code, output = start(small_disk).end()
    path = small_disk / "run"
    assert code == 2
    assert "No space left on device" in output
    assert f"the checkpoint before it is whole: ducat train --resume {path}" in output
    assert output.count("\n") == 1
    os.system(f"mount -o remount,size=8m {small_disk}")
    code, output = Run("train", "--resume", path).end()
    assert code == 0, output
    assert_same(path, unbroken)


def test_a_disk_that_has_become_read_only_is_told_and_the_run_goes_on_when_it_is_not(
    small_disk: Path, tmp_path: Path, unbroken: Any
) -> None:
    path = small_disk / "run"
    os.system(f"mount -o remount,size=8m {small_disk}")
    assert start(small_disk, before=signal_at("step", signal.SIGTERM)).end()[0] == 128 + signal.SIGTERM
    os.system(f"mount -o remount,ro {small_disk}")
    code, output = Run("train", "--resume", path, output=tmp_path / "output").end()
    assert code == 2, output
    assert "Read-only file system" in output
    assert output.count("\n") == 1
    os.system(f"mount -o remount,rw {small_disk}")
    code, output = Run("train", "--resume", path).end()
    assert code == 0, output
    assert_same(path, unbroken)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    (tmp_path / "config.yaml").write_text(CONFIG.to_yaml())
    code, output = Run("train", "--config", tmp_path / "config.yaml", "--runs", tmp_path / "runs").end()
    assert code == 2
    assert output.count("\n") == 1
    assert str(tmp_path / "runs") in output
