"""A bar for what takes a while, on the error stream of a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHORT = 5000
"""Images that are done before a bar would be read."""

Advance = Callable[[int], None]
"""Notes that so many more images are done."""


@contextmanager
def shown_progress(description: str, total: int) -> Iterator[Advance]:
    """Show a bar over `total` images, with the time left, unless that is over at once."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=total < SHORT) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
