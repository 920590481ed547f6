"""What was measured, as a table and a plot: the rows against the front of the baselines."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.cure.rows import ROWS
from benchmarks.cure.settings import SETTINGS
from ducat import checkpoint
from ducat.reporting import plots

BASELINES = ("PGD-AT", "mixed", "TRADES")
DRAWN = (
    "recovery-aware",
    "recovery-aware, by sum",
    "two-soft targets",
    "one head, two teachers",
    "two experts, split late",
)
HEAD = """# The search for dummy classes that hold: its rows

Written by `python -m benchmarks.cure --table results`. [cure.md](cure.md): how they were measured, and what they say.
"""


@dataclass(frozen=True)
class Point:
    """A row's accuracies in %, one for each of its seeds.

    Attributes:
        samples: test images, the same for all seeds.
    """

    name: str
    front: str
    seeds: Sequence[int]
    cleans: Sequence[float]
    blinds: Sequence[float]
    robusts: Sequence[float]
    samples: int

    @property
    def clean(self) -> float:
        """Mean clean accuracy."""
        return statistics.fmean(self.cleans)

    @property
    def robust(self) -> float:
        """Mean robust accuracy."""
        return statistics.fmean(self.robusts)

    @property
    def error(self) -> float:
        """Standard error of the robust accuracy: over seeds, or of one seed over test images, in points."""
        if len(self.robusts) > 1:
            return statistics.stdev(self.robusts) / math.sqrt(len(self.robusts))
        share = self.robust / 100
        return 100 * math.sqrt(share * (1 - share) / self.samples)


def points(contents: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the points of one setting from its rows' files, in the order of the table of rows."""
    made = []
    for name, row in ROWS.items():
        mine = sorted((each for each in contents if each["name"] == name), key=lambda content: content["seed"])
        if mine:
            measured = [content["evaluation"] for content in mine]
            made.append(
                Point(
                    name,
                    row.front,
                    [content["seed"] for content in mine],
                    [100 * each["clean"]["accuracy"] for each in measured],
                    [100 * each["attacks"][0]["accuracy"] for each in measured],
                    [100 * each["robust"] for each in measured],
                    measured[0]["samples"],
                )
            )
    return made


def front(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the upper hull of clean and robust accuracy, from the lowest clean accuracy to the highest."""
    hull: list[tuple[float, float]] = []
    for place in sorted((point.clean, point.robust) for point in points):
        while hull and hull[-1][1] <= place[1]:
            hull.pop()
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], place):
            hull.pop()
        hull.append(place)
    return hull


def _turns_left(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) >= (b[1] - a[1]) * (c[0] - a[0])


def above(point: Point, hull: Sequence[tuple[float, float]]) -> float | None:
    """Return the robust accuracy less the hull's at the same clean one; None beyond the hull's most accurate end."""
    if point.clean <= hull[0][0]:
        return point.robust - hull[0][1]
    for (low, high_robust), (high, low_robust) in pairwise(hull):
        if low <= point.clean <= high:
            share = (point.clean - low) / (high - low)
            return point.robust - (high_robust + share * (low_robust - high_robust))
    return None


def table(rows: Sequence[Point]) -> str:
    """Return a setting's rows as a table in Markdown."""
    hull = front([point for point in rows if point.front in BASELINES])
    lines = [
        "| row | expected | seeds | clean | PGD-20, blind | robust | against the front |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for point in rows:
        distance = above(point, hull)
        shown = "beyond its end" if distance is None else f"{distance:+.1f}"
        bound = "at most " if ROWS[point.name].at_most else ""
        lines.append(
            f"| {point.name} | {ROWS[point.name].expected} | {', '.join(map(str, point.seeds))} | {point.clean:.1f} | "
            f"{statistics.fmean(point.blinds):.1f} | {bound}{point.robust:.1f} ± {point.error:.1f} | "
            f"{'on it' if point.front in BASELINES and distance is not None and abs(distance) < 0.05 else shown} |"
        )
    return "\n".join(lines) + "\n"


def write(work: Path, out: Path) -> None:
    """Write the settings' tables to cure-tables.md, all that was measured to cure.json, and a plot for each setting."""
    out.mkdir(exist_ok=True)
    contents, parts = {}, []
    for name, setting in SETTINGS.items():
        files = sorted((work / name / "rows").glob("*.json"))
        if not files:
            continue
        contents[name] = [json.loads(file.read_text()) for file in files]
        rows = points(contents[name])
        parts.append(f"## {name}\n\n{setting.about}.\n\n{table(rows)}\n![{name}](cure-{name}.svg)\n")
        lines = {line: _places(rows, line) for line in (*BASELINES, *DRAWN)}
        plots.save(plots.fronts(lines, setting.about), out / f"cure-{name}.svg")
    checkpoint.write_text(out / "cure-tables.md", "\n".join([HEAD, *parts]))
    checkpoint.write_text(out / "cure.json", json.dumps(contents, indent=1) + "\n")


def _places(rows: Sequence[Point], name: str) -> list[tuple[float, float]]:
    return sorted((point.clean, point.robust) for point in rows if point.front == name)
