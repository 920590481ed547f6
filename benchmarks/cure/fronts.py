"""What was measured, as a table and a plot: the rows against the front of the baselines."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.cure.rows import ROWS
from ducat import checkpoint, plots

BASELINES = ("PGD-AT", "mixed", "TRADES")
DRAWN = (
    "recovery-aware",
    "recovery-aware, by sum",
    "two-soft targets",
    "one head, two teachers",
    "two experts, split late",
)


@dataclass(frozen=True)
class Point:
    """A row's accuracies in %, means over its seeds."""

    name: str
    front: str
    seeds: Sequence[int]
    clean: float
    blind: float
    robust: float
    samples: int

    @property
    def error(self) -> float:
        """Standard error of the robust accuracy from the number of test images, in points."""
        share = self.robust / 100
        return 100 * math.sqrt(share * (1 - share) / self.samples)


def read(folder: Path) -> tuple[list[Point], list[dict[str, Any]]]:
    """Return the points, in the order of the table of rows, and the files' contents."""
    contents = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    points = []
    for name, row in ROWS.items():
        mine = [content for content in contents if content["name"] == name]
        if not mine:
            continue
        measured = [content["evaluation"] for content in mine]
        points.append(
            Point(
                name,
                row.front,
                [content["seed"] for content in mine],
                100 * statistics.fmean(each["clean"]["accuracy"] for each in measured),
                100 * statistics.fmean(each["attacks"][0]["accuracy"] for each in measured),
                statistics.fmean(100 * each["robust"] for each in measured),
                measured[0]["samples"],
            )
        )
    return points, contents


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


def write(folder: Path, out: Path) -> None:
    """Write cure-rows.md, cure.json and cure.svg."""
    points, contents = read(folder)
    hull = front([point for point in points if point.front in BASELINES])
    lines = [
        "| row | expected | seeds | clean | PGD-20, blind | robust | against the front |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for point in points:
        distance = above(point, hull)
        shown = "beyond its end" if distance is None else f"{distance:+.1f}"
        lines.append(
            f"| {point.name} | {ROWS[point.name].expected} | {', '.join(map(str, point.seeds))} | {point.clean:.1f} | "
            f"{point.blind:.1f} | {point.robust:.1f} ± {point.error:.1f} | "
            f"{'on it' if point.front in BASELINES and distance is not None and abs(distance) < 0.05 else shown} |"
        )
    out.mkdir(exist_ok=True)
    checkpoint.write_text(out / "cure-rows.md", "\n".join(lines) + "\n")
    checkpoint.write_text(out / "cure.json", json.dumps(contents, indent=1) + "\n")
    plots.save(plots.fronts({name: _places(points, name) for name in (*BASELINES, *DRAWN)}), out / "cure.svg")


def _places(points: Sequence[Point], name: str) -> list[tuple[float, float]]:
    return sorted((point.clean, point.robust) for point in points if point.front == name)
