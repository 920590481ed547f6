"""What was measured, as tables and curves: each row against PGD-AT with confidence, at equal refusals."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rejection.rows import ROWS
from benchmarks.rejection.settings import SETTINGS
from ducat import checkpoint
from ducat.reporting import plots

MEASURE = ("pgd-at", "confidence")
BASELINES = ("pgd-at", "trades", "mixed", "ccat", "cpr-pgd-at", "cpr-mixed")
SHARES = (0.02, 0.05)
OUTCOMES = ("refused", "right", "wrong")
DRAWN = 6  # lines of a figure
HEAD = """# Refusing: the rows

Written by `python -m benchmarks.rejection --table results`. [rejection.md](rejection.md): how they were measured, and
what they say.
"""


@dataclass(frozen=True)
class Line:
    """A row with one of its signals; everything in % and by seed."""

    name: str
    signal: str
    robust: Mapping[float, Mapping[int, float]]  # by share of refusals
    served: Mapping[int, float]  # at 5 %
    benign: Mapping[int, tuple[float, ...]]  # refused, right, wrong at 5 %
    denied: Mapping[int, tuple[float, ...]]  # at 5 %
    half: Mapping[int, float]
    curves: Sequence[Sequence[Mapping[str, float]]]

    @property
    def seeds(self) -> list[int]:
        return sorted(self.served)


def lines(contents: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return the lines of one setting from its rows' files, in the order of the table of rows."""
    made = []
    for name in ROWS:
        mine = [content for content in contents if content["name"] == name]
        for signal in dict.fromkeys(each["signal"] for one in mine for each in one["rejection"]["signals"]):
            found = {
                one["seed"]: next(each for each in one["rejection"]["signals"] if each["signal"] == signal)
                for one in mine
            }
            rows = {seed: {row["reject"]: row for row in each["rows"]} for seed, each in found.items()}
            made.append(
                Line(
                    name,
                    signal,
                    {
                        share: {seed: 100 * row[share]["robust"]["share"] for seed, row in rows.items()}
                        for share in SHARES
                    },
                    {seed: 100 * row[SHARES[-1]]["served"]["share"] for seed, row in rows.items()},
                    {
                        seed: tuple(100 * row[SHARES[-1]][f"clean_{each}"]["share"] for each in OUTCOMES)
                        for seed, row in rows.items()
                    },
                    {
                        seed: tuple(100 * denial["share"] for denial in row[SHARES[-1]]["denial"])
                        for seed, row in rows.items()
                    },
                    {one["seed"]: 100 * one["rejection"]["robust_at_half_eps"]["share"] for one in mine},
                    [each["curve"] for each in found.values()],
                )
            )
    return made


def against(line: Line, measure: Line, share: float) -> str:
    """Return the mean difference to the measure over common seeds, with its standard error over them."""
    common = sorted(set(line.seeds) & set(measure.seeds))
    if line is measure or not common:
        return ""
    differences = [line.robust[share][seed] - measure.robust[share][seed] for seed in common]
    mean = f"{statistics.fmean(differences):+.1f}"
    if len(differences) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(differences) / math.sqrt(len(differences)):.1f}"


def table(made: Sequence[Line]) -> str:
    """Return a setting's lines as a table in Markdown."""
    measure = next(line for line in made if (line.name, line.signal) == MEASURE)
    text = [
        "| row | signal | expected | seeds | benign refused / right / wrong, 5 % | robust, 2 % | robust, 5 % | "
        "against PGD-AT, 2 % | 5 % | served, 5 % | denied at eps/4, eps/2, eps | robust at eps/2 |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for line in made:
        denied = " / ".join(f"{statistics.fmean(each):.0f}" for each in zip(*line.denied.values(), strict=True))
        benign = " / ".join(f"{statistics.fmean(each):.1f}" for each in zip(*line.benign.values(), strict=True))
        text.append(
            f"| {line.name} | {line.signal} | {ROWS[line.name].expected} | {', '.join(map(str, line.seeds))} | {benign}"
            " | "
            + " | ".join(f"{statistics.fmean(line.robust[share].values()):.1f}" for share in SHARES)
            + " | "
            + " | ".join(against(line, measure, share) for share in SHARES)
            + f" | {statistics.fmean(line.served.values()):.1f} | {denied} | "
            f"{statistics.fmean(line.half.values()):.1f} |"
        )
    return "\n".join(text) + "\n"


def verdict(made: Sequence[Line]) -> str:
    """Say which lines are above every baseline at 5 % refused by more than the standard error of the difference.

    Both robust accuracy, which a network can win by being right on few images, and served have to be above, over the
    seeds that both have, of which there must be several.
    """
    share = SHARES[-1]
    rivals = [line for line in made if line.name in BASELINES]
    others = [line for line in made if line.name not in BASELINES and len(line.seeds) > 1]
    above = [
        f"{line.name} by {line.signal}"
        for line in others
        if all(
            _exceeds(line.robust[share], rival.robust[share]) and _exceeds(line.served, rival.served)
            for rival in rivals
        )
    ]
    return (
        f"Above every baseline at 5 % refused, robust and served, by more than the standard error, of {len(others)} "
        f"lines with several seeds: {', '.join(above) or 'none'}. With three seeds one of five equals would be above "
        "one other by chance. Rows that are not in the table have not been made.\n"
    )


def _exceeds(mine: Mapping[int, float], theirs: Mapping[int, float]) -> bool:
    common = sorted(mine.keys() & theirs.keys())
    if len(common) < 2:
        return False
    differences = [mine[seed] - theirs[seed] for seed in common]
    return statistics.fmean(differences) > statistics.stdev(differences) / math.sqrt(len(differences))


def drawn(made: Sequence[Line]) -> list[dict[str, Any]]:
    """Return what `plots.refusing` draws: the measure, and the lines that are best at 5 %, as means over seeds."""
    best = sorted(made, key=lambda line: -statistics.fmean(line.robust[SHARES[-1]].values()))
    measure = next(line for line in made if (line.name, line.signal) == MEASURE)
    chosen = [measure, *(line for line in best if line is not measure)][:DRAWN]
    found = []
    for line in chosen:
        curve = [
            {name: statistics.fmean(point[name] for point in points) for name in ("right_refused", "robust")}
            for points in zip(*line.curves, strict=True)
        ]
        # Beyond the strictest threshold that was attacked a curve is only a hope.
        curve = [point for point in curve if point["right_refused"] <= SHARES[-1]]
        marks = [
            {"right_refused": {"share": share}, "robust": {"share": statistics.fmean(robust.values()) / 100}}
            for share, robust in line.robust.items()
        ]
        found.append({"signal": f"{line.name}, {line.signal}", "curve": curve, "rows": marks})
    return found


def write(work: Path, out: Path) -> None:
    """Write the tables, the figures and everything that was measured of the settings that are in `work`."""
    text, everything = [HEAD], {}
    for name, setting in SETTINGS.items():
        files = sorted((work / name / "rows").glob("*.json"))
        contents = [json.loads(file.read_text()) for file in files if not file.name.startswith("second-")]
        if not any(content["name"] == MEASURE[0] for content in contents):
            continue
        if strays := {content["samples"] for content in contents} - {setting.test}:
            raise ValueError(f"{name}: rows measured on {strays} images, not on {setting.test}: make them again")
        made = lines(contents)
        seconds = {
            file.stem.removeprefix("second-"): json.loads(file.read_text())
            for file in files
            if file.name.startswith("second-")
        }
        everything[name] = {"rows": contents, "second": seconds}
        text += [f"## {setting.about}; {setting.test} test images\n", table(made), verdict(made)]
        plots.save(plots.refusing(drawn(made), setting.about), out / f"rejection-{name}.svg")
        if seconds:
            text += [again(seconds)]
    checkpoint.write_text(out / "rejection-tables.md", "\n".join(text))
    checkpoint.write_text(out / "rejection.json", json.dumps(everything) + "\n")


def again(seconds: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return what the second attack left, beside what the product's left."""
    text = [
        "Attacked once more, robust in % at 5 % refused: by the product's attack with its larger budget and new starts "
        "and by the second attack, which shares no code with it.\n",
        "| row | signal | the table's budget | `standard` | second |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    text += [
        f"| {name} | {each['signal']} | {100 * each['product']:.1f} | {100 * each['standard']:.1f} | "
        f"{100 * each['second']:.1f} |"
        for name, found in seconds.items()
        for each in found
    ]
    return "\n".join(text) + "\n"
