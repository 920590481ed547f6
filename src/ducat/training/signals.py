"""SIGINT and SIGTERM: a run finishes its step, saves, and leaves by the signal that asked for it."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ducat.runs import RunFolder

ECHO = 10.0  # seconds within which a launcher passes a signal on


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after a whole step; `signum` is the signal, and the run is saved."""

    def __init__(self, signum: int, folder: RunFolder, *, finished: bool = False) -> None:
        rest = f"{folder.path} is finished" if finished else f"continue with: ducat train --resume {folder.quoted}"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {rest}")
        self.signum = signum


@contextmanager
def collected(launched: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying in the middle of a step; a second one acts at once.

    Of several processes, each may get one signal twice, from the cluster and from the launcher that passes it on. So
    there a second one within `ECHO` seconds counts as the first.
    """
    received: list[int] = []
    first: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: FrameType | None) -> None:
        if not received:
            received.append(signum)
            first.append(time.monotonic())
            if not launched:
                restore()
        elif time.monotonic() - first[0] > ECHO:
            restore()
            signal.raise_signal(signum)

    for signum in handlers:
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        restore()
