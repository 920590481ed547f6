"""What a terminal shows of trainings and attacks while they run."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Live:
    """Progress of trainings and attacks: a live line each on a terminal, a plain line per validation elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(),
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

    def attacks(self, title: str) -> Callable[[str], None]:
        """Return a function to call with the name of each attack on one network as it starts."""
        task = self.progress.add_task(title, total=None)
        return lambda attack: self.progress.update(task, description=f"{title}: attack {attack}")


class Training:
    """A listener that shows one training."""

    def __init__(self, live: Live, title: str) -> None:
        self.live, self.title = live, title
        self.task = live.progress.add_task(title, total=None)

    def step(self, done: int, total: int) -> None:
        self.live.progress.update(self.task, completed=done, total=total)

    def epoch(self, row: dict[str, Any]) -> None:
        text = f"{self.title}: epoch {row['epoch'] + 1}, loss {row['loss']:.3f}"
        if "robust" in row:
            shares = ", ".join(f"{name} {100 * row[name]:.1f}" for name in ("clean", "blind", "robust"))
            text += f", validation {shares}"
            if not self.live.console.is_interactive:
                self.live.console.print(text, highlight=False, soft_wrap=True)
        self.live.progress.update(self.task, description=text)

    def warning(self, text: str) -> None:
        self.live.console.print(f"[bold]warning[/bold] {self.title}: {text}", highlight=False, soft_wrap=True)
