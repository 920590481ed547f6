"""What was measured, as tables and curves."""

from pathlib import Path


def write(work: Path, out: Path) -> None:
    raise NotImplementedError
