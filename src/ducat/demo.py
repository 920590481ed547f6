"""Train, attack and compare four networks on real data, offline: the same budget, blind and recovery-aware attacks."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, TrainConfig
from ducat.evaluation.runs import evaluate_run
from ducat.reporting import page
from ducat.reporting.compare import Comparison, Run, compare
from ducat.runs import RunFolder
from ducat.training import Listener, Plan, train

EPOCHS = 20
NETWORKS: dict[str, tuple[str, DummyConfig]] = {
    "natural": ("natural", DummyConfig("off")),
    "PGD-AT": ("pgd-at", DummyConfig("off")),
    "DUCAT, published": ("pgd-at", DummyConfig("published", start_epoch=0.5)),
    "DUCAT, recovery-aware": ("pgd-at", DummyConfig("recovery-aware", start_epoch=0.75)),
}


@dataclass
class Demo:
    """What the demo made.

    Attributes:
        folder: where it is.
        evaluations: the contents of evaluation.json by name of the method.
        paths: the run folders, likewise.
        sentences: what the reader is looking at.
    """

    folder: Path
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def comparison(self) -> Comparison:
        """The runs side by side."""
        return compare([Run.read(path, name) for name, path in self.paths.items()])

    @property
    def sentences(self) -> Sequence[str]:
        """Two sentences that say what the measured numbers show, whatever they are."""
        base, published, aware = list(self.evaluations.values())[1:]
        lost = 100 * published["sink_gap"]
        return (
            f"Dummy classes as published are {_against(published['blind'], base['blind'])} while the attacker does not "
            f"know that predictions are recovered (blind); one who knows takes {lost:.1f} points away, which leaves "
            f"them {_against(published['robust'], base['robust'])} (robust).",
            f"Trained against an attacker who knows, dummy classes are {_against(aware['robust'], base['robust'])} "
            "(robust).",
        )


def _against(accuracy: float, base: float) -> str:
    points = 100 * (accuracy - base)
    return f"{abs(points):.1f} points {'above' if points >= 0 else 'below'} PGD-AT"


def processes() -> int:
    """Return how many networks are worked on side by side: one for each core, of which each needs one, 3 at most."""
    return min(3, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def run(
    folder: Path,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    workers: int = 1,
    listener: Callable[[str], Listener] | None = None,
    attacks: Callable[[str], Callable[[str], None]] | None = None,
    finished: Callable[[str, dict[str, Any]], None] = lambda title, measured: None,
) -> Demo:
    """Train and evaluate the four networks on scikit-learn's digits, and write plot and page.

    Args:
        folder: where the runs, the plot and the page go; it must not exist.
        seed: of everything random.
        epochs: length of each training; dummy classes begin after half of it (published) or three quarters.
        workers: processes that work side by side; the numbers are the same for any, since each computes with one
            thread. With more than 1 a script must call this under `if __name__ == "__main__"`; on Linux a process of
            300 MB, from which they are begun, then stays until the script ends.
        listener: makes the listener to a training from its name.
        attacks: makes, from the name of a method, what is called with each attack on it.
        finished: told of each network's evaluation as soon as it is known.

    Raises:
        FileExistsError: if the folder is there already.
        ValueError: if fewer than 1 process is asked for.
    """
    if workers < 1:
        raise ValueError(f"processes={workers} must be at least 1")
    if folder.exists():
        raise FileExistsError(f"{folder} exists, and nothing is overwritten: give another --out")
    demo = Demo(folder)
    measured: dict[str, dict[str, Any]] = {}

    def ended(title: str, path: Path, evaluation: dict[str, Any]) -> None:
        demo.paths[title], measured[title] = path, evaluation
        finished(title, evaluation)

    configs = {title: config(title, seed, epochs) for title in NETWORKS}
    if workers == 1:
        for title, settings in configs.items():
            path = train(settings, folder / "runs", listener(title) if listener else None).path
            ended(title, path, _attacked(path, seed, attacks(title) if attacks else None))
    else:
        _side_by_side(configs, folder / "runs", seed, workers, _Told(listener, attacks), ended)
    demo.evaluations = {title: measured[title] for title in NETWORKS}
    demo.paths = {title: demo.paths[title] for title in NETWORKS}
    comparison = demo.comparison
    page.draw(comparison.sections[0], folder / "trade-off.svg")
    page.page(
        folder / "report.html",
        "Dummy classes on digits: what they do and what they hide",
        comparison,
        text=demo.sentences,
        command=f"ducat demo --out {folder} --seed {seed} --epochs {epochs}",
    )
    return demo


def config(title: str, seed: int, epochs: int) -> Config:
    """Return the settings of one of `NETWORKS`."""
    method, dummy = NETWORKS[title]
    return Config(
        data=DataConfig("digits"),
        method=MethodConfig(method, attack="pgd-cosine"),
        dummy=dummy,
        train=TrainConfig(
            epochs=epochs,
            batch_size=64,
            learning_rate=0.2,
            schedule="one-cycle",
            seed=seed,
            threads=1,
            validate_every=epochs,
            tracker="none",
        ),
    )


def _attacked(path: Path, seed: int, progress: Callable[[str], None] | None) -> dict[str, Any]:
    return evaluate_run(RunFolder.open(path), "demo", which="last", seed=seed, progress=progress, num_threads=1)


class _Told:
    """Hands what happens in the processes to the listeners, which live in this one."""

    def __init__(
        self,
        listener: Callable[[str], Listener] | None,
        attacks: Callable[[str], Callable[[str], None]] | None,
    ) -> None:
        self.make_listener, self.make_attacks = listener, attacks
        self.listeners: dict[str, Listener] = {}
        self.attacks: dict[str, Callable[[str], None]] = {}

    def __call__(self, title: str, what: str, *arguments: Any) -> None:
        if what == "attack":
            if self.make_attacks is not None:
                if title not in self.attacks:
                    self.attacks[title] = self.make_attacks(title)
                self.attacks[title](*arguments)
        elif self.make_listener is not None:
            if title not in self.listeners:
                self.listeners[title] = self.make_listener(title)
            tell = getattr(self.listeners[title], what, None)  # plain listeners take no plan
            if tell is not None:
                tell(*arguments)


class _Telling:
    """The listener of a training in a process of its own."""

    def __init__(self, title: str) -> None:
        self.tell = partial(_tell, title)

    def begin(self, plan: Plan) -> None:
        self.tell("begin", plan)

    def step(self, done: int, total: int) -> None:
        self.tell("step", done, total)

    def validating(self, attack: str) -> None:
        self.tell("validating", str(attack))

    def epoch(self, row: dict[str, Any]) -> None:
        self.tell("epoch", row)

    def warning(self, text: str) -> None:
        self.tell("warning", text)


_events: SimpleQueue[Any] | None = None  # of this process, where it is one of several


def _tell(title: str, what: str, *arguments: Any) -> None:
    assert _events is not None
    _events.put((title, what, *arguments))


def _begin(events: SimpleQueue[Any], stop: Event, environment: dict[str, str]) -> None:
    global _events
    _events = events
    os.environ.clear()  # of when the first process was begun, which may have been long ago
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that began this one ends it
    parent = multiprocessing.parent_process()

    def watch() -> None:
        while not stop.wait(0.2) and (parent is None or parent.is_alive()):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _trained(title: str, settings: Config, root: Path) -> Path:
    return train(settings, root, _Telling(title)).path


def _evaluated(title: str, path: Path, seed: int) -> tuple[str, Path, dict[str, Any]]:
    return title, path, _attacked(path, seed, partial(_tell, title, "attack"))


def _whole(title: str, settings: Config, root: Path, seed: int) -> tuple[str, Path, dict[str, Any]]:
    return _evaluated(title, _trained(title, settings, root), seed)


def _context() -> BaseContext:
    """Return how processes are begun: where that can be, from one that has imported all that they need."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "accelerate", "scipy.special", "torch._dynamo"])
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # it would import what lies in the working folder
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before
    return context


def _side_by_side(
    configs: dict[str, Config],
    root: Path,
    seed: int,
    workers: int,
    told: _Told,
    ended: Callable[[str, Path, dict[str, Any]], None],
) -> None:
    """Train and evaluate in processes: natural training, which is short, whole; then trainings before evaluations."""
    context = _context()
    events, stop = context.SimpleQueue(), context.Event()
    with ProcessPoolExecutor(workers, context, _begin, (events, stop, dict(os.environ))) as pool:
        first, *others = configs
        pending: dict[Future[Any], str] = {pool.submit(_whole, first, configs[first], root, seed): first}
        pending.update({pool.submit(_trained, title, configs[title], root): title for title in others})
        try:
            while pending:
                done, _ = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                while not events.empty():
                    told(*events.get())
                for future in done:
                    title, result = pending.pop(future), future.result()
                    if isinstance(result, Path):
                        pending[pool.submit(_evaluated, title, result, seed)] = title
                    else:
                        ended(*result)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            for left in root.glob(".*.tmp"):  # what a process was writing as it was ended
                shutil.rmtree(left, ignore_errors=True)
            raise
