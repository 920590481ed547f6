"""What a terminal shows of trainings and attacks while they run."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from ducat.evaluation.parts import Stage
from ducat.training import Plan

RECENT = 200  # steps that the time of a step is the mean of


class Live:
    """Progress of trainings and attacks: a live line each on a terminal, a plain line per validation elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_interactive,
            transient=True,
        )

    def __enter__(self) -> "Live":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def training(self, title: str) -> "Training":
        """Return a listener for one training."""
        return Training(self, title)

    def attacks(self, title: str) -> "Attacks":
        """Return a function to call with the name of each attack on one network as it starts."""
        return Attacks(self, title)

    def notice(self, text: str) -> None:
        """Say what the user should know."""
        self.console.print(f"[bold]note[/bold] {text}", highlight=False, soft_wrap=True)


def told(seconds: float) -> str:
    """Return how long is left, as 0:07 or 1:02:03."""
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}"
    return f"{f'{whole // 3600}:' if whole >= 3600 else ''}{minutes}:{whole % 60:02} left"


class Training:
    """A listener that shows one training: its phase, its epoch, and the time left with the validations to come."""

    def __init__(self, live: Live, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.live, self.title, self.clock = live, title, clock
        self.task = live.progress.add_task(title, total=None, left="")
        self.plan: Plan | None = None
        self.epochs_done, self.measured = 0, ""
        self.began = self.at = clock()
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of each step
        self.validation: float | None = None  # seconds of the last one
        self.validation_began: float | None = None

    def begin(self, plan: Plan) -> None:
        self.plan, self.epochs_done = plan, plan.epoch
        self.began = self.at = self.clock()
        self._show(0)

    def step(self, done: int, total: int) -> None:
        now = self.clock()
        self.recent.append(now - self.at)
        self.at = now
        self._show(total - done)

    def validating(self, attack: str) -> None:
        if self.validation_began is None:
            self.validation_began = self.at
        assert self.plan is not None
        self._show((self.plan.epochs - self.epochs_done - 1) * self.plan.steps, f"validation, attack {attack}")

    def epoch(self, row: dict[str, Any]) -> None:
        self.epochs_done = row["epoch"] + 1
        now = self.clock()
        if "robust" in row:
            self.validation = now - (self.at if self.validation_began is None else self.validation_began)
        self.validation_began, self.at = None, now
        self.measured = f", loss {row['loss']:.3f}"
        if "robust" in row:
            shares = ", ".join(f"{name} {100 * row[name]:.1f}" for name in ("clean", "blind", "robust"))
            self.measured += f", validation {shares}"
            if not self.live.console.is_interactive:
                of = "" if self.plan is None else f" of {self.plan.epochs}"
                text = f"{self.title}: epoch {self.epochs_done}{of}{self.measured}"
                self.live.console.print(text, highlight=False, soft_wrap=True)
        if self.plan is not None:
            self._show((self.plan.epochs - self.epochs_done) * self.plan.steps)

    def warning(self, text: str) -> None:
        self.live.console.print(f"[bold]warning[/bold] {self.title}: {text}", highlight=False, soft_wrap=True)

    def seconds_left(self, steps: int) -> float | None:
        """Return the seconds that so many steps and the validations between and after them will take."""
        if self.plan is None or not self.recent:
            return None
        a_step = sum(self.recent) / len(self.recent)
        whole = self.plan.validation_steps * a_step if self.validation is None else self.validation
        ahead = sum(epoch >= self.epochs_done for epoch in self.plan.validated)
        left = a_step * steps + whole * ahead
        if self.validation_began is not None:
            left -= min(whole, self.clock() - self.validation_began)
        return left

    def _show(self, steps_left: int, phase: str = "") -> None:
        if self.plan is None:
            return
        epoch = min(self.epochs_done + 1, self.plan.epochs)
        with_dummies = self.epochs_done >= self.plan.dummy_from
        phase = phase or ("dummy classes" if with_dummies else "training")
        left = self.seconds_left(steps_left)
        spent = self.clock() - self.began
        self.live.progress.update(
            self.task,
            description=f"{self.title}: {phase}, epoch {epoch} of {self.plan.epochs}{self.measured}",
            completed=spent if left is not None else 0,
            total=spent + left if left is not None else None,
            left="" if left is None else told(left),
        )


class Attacks:
    """Shows the attacks on one network: which, how many images are done, and how many are left standing."""

    def __init__(self, live: Live, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.live, self.title, self.clock = live, title, clock
        self.task = live.progress.add_task(title, total=None, left="")
        self.first: tuple[float, int] | None = None  # when, and with how many images done already

    def __call__(self, attack: str) -> None:
        text, left = f"{self.title}: attack {attack}", None
        if isinstance(attack, Stage):
            now = self.clock()
            self.first = self.first or (now, attack.done)
            began, before = self.first
            text += f", {attack.done} of {attack.samples} images done, {attack.standing} of {attack.seen} left standing"
            if attack.done > before:
                left = (now - began) / (attack.done - before) * (attack.samples - attack.done)
            self.live.progress.update(self.task, completed=attack.done, total=attack.samples)
        self.live.progress.update(self.task, description=text, left="" if left is None else told(left))
