"""Figures. Colours and marks are told apart without colour vision, and on light and dark pages."""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ducat import checkpoint
from ducat.records import VALIDATION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito
# For as many lines as a table of methods has; from the seventh on Tol's muted ones, and a grey.
MANY = (*COLOURS, "#882255", "#332288", "#117733", "#AA4499", "#999933", "#777777")
PHONE = 4.6  # inches
MARKS = ("o", "s", "D", "^", "v", "P")
INK = "#1a1b1c"  # text and lines; inside a page it gives way to the page's own colour
# Parts of the probability: name in behaviour.json, legend, colour, hatching.
PARTS = (
    ("real", "own class, real", "#0072B2", ""),
    ("dummy", "own class, dummy", "#56B4E9", "////"),
    ("other real", "other classes, real", "#D55E00", ""),
    ("other dummy", "other classes, dummy", "#E69F00", "////"),
)
SPAN = 10  # points of clean accuracy that a figure shows at least


def trade_off(points: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "", *, wide: bool = True) -> Figure:
    """Draw clean accuracy against accuracy under attack, blind (hollow) and robust (filled) joined by a line.

    Args:
        points: contents of evaluation.json, one for each training seed, by the name to show. Several give their mean,
            with the sample standard deviation as a cross; a single one its 95 % intervals.
        title: of the figure.
        wide: names stand beside the axes, joined to their points; otherwise below them, for a phone.
    """
    rows = math.ceil(len(points) / (1 if max(map(len, points)) > 24 else 2))
    height = max(4.2, 0.24 * len(points) + 1.2) if wide else 3.9 + 0.22 * rows
    figure, axes = _figure(height=height, width=7.6 if wide else PHONE, title=title)
    looks = [look for look, _ in zip(_looks(), points, strict=False)]
    ends = []
    for (given, evaluations), (colour, mark) in zip(points.items(), looks, strict=True):
        name = given + " (robust: at most)" * any(each.get("at_most", False) for each in evaluations)
        clean, blind, robust = (_measured(evaluations, quantity) for quantity in VALIDATION)
        axes.plot([blind[0], robust[0]], [clean[0], clean[0]], color=colour, linewidth=1.5, zorder=1)
        ends.append((clean[0], max(blind[0], robust[0]), name, colour))
        for under_attack, face, label in ((blind, "white", None), (robust, colour, name)):
            axes.errorbar(
                under_attack[0],
                clean[0],
                xerr=[[reach] for reach in under_attack[1]],
                yerr=[[reach] for reach in clean[1]],
                fmt=mark,
                markersize=7,
                markerfacecolor=face if face == colour else "none",
                color=colour,
                elinewidth=0.7,
                zorder=3,
                label=label,
            )
    axes.set_xlabel("accuracy under attack (%)")
    axes.set_ylabel("clean accuracy (%)")
    axes.margins(x=0.04, y=0.08)
    low, high = axes.get_ylim()
    if high - low < SPAN:
        # Networks that hardly differ must not look far apart; accuracy ends at 100.
        low = min((low + high - SPAN) / 2, 101 - SPAN)
        axes.set_ylim(low, low + SPAN)
    kinds = [_key("none", "blind: attackers who do not know recovery"), _key(INK, "robust: all attackers")]
    if wide:
        _name(axes, ends)
        figure.legend(handles=kinds, loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=9)
    else:
        handles, labels = axes.get_legend_handles_labels()
        columns = 1 if max(map(len, points)) > 24 else 2
        figure.legend(
            [*handles, *kinds],
            [*labels, "blind", "robust"],
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            labelcolor=INK,
        )
    return figure


def _looks() -> Iterator[tuple[str, str]]:
    """Yield colours and marks: no colour comes twice before all have been used, and then with another mark."""
    for number in itertools.count():
        yield MANY[number % len(MANY)], MARKS[(number + number // len(MANY)) % len(MARKS)]


def _key(face: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", linestyle="none", color=INK, markerfacecolor=face, markersize=7, label=label)


def _name(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside the axes, at the height of their points where there is room, and join them by thin lines."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda end: (end[0], end[1]))
    room = (high - low) / max(len(ends), 14)
    places: list[float] = []
    for clean, *_ in order:
        places.append(max(clean, places[-1] + room) if places else max(clean, low))
    over = max(0.0, places[-1] - high)
    for number in range(len(places) - 1, -1, -1):
        ceiling = high if number == len(places) - 1 else places[number + 1] - room
        places[number] = min(places[number], ceiling) if over else places[number]
    for place, (clean, across, name, colour) in zip(places, order, strict=True):
        axes.annotate(
            name,
            xy=(across, clean),
            xytext=(1.03, (place - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=INK,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "alpha": 0.7,
                "shrinkA": 1,
                "shrinkB": 5,
                "relpos": (0, 0.5),
            },
        )


def curve(evaluations: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Draw clean, blind and robust accuracy against eps, with 95 % intervals.

    Args:
        evaluations: contents of evaluation.json that differ in eps alone.
        title: of the figure.
    """
    figure, axes = _figure(height=3.9, title=title)
    ordered = sorted(evaluations, key=lambda each: each["threat"]["eps"])
    radii = [each["threat"]["eps"] for each in ordered]
    for quantity, colour, mark in zip(VALIDATION, COLOURS, MARKS, strict=False):
        values = [_measured([each], quantity) for each in ordered]
        reaches = [[each[1][side] for each in values] for side in (0, 1)]
        face = "none" if quantity == "blind" else colour
        axes.errorbar(
            radii,
            [each[0] for each in values],
            yerr=reaches,
            color=colour,
            marker=mark,
            markerfacecolor=face,
            markersize=6,
            linewidth=1.2,
            elinewidth=0.8,
            label=quantity + " (at most)" * (quantity == "robust" and any(each.get("at_most") for each in ordered)),
        )
    axes.set_xlabel(f"eps ({ordered[0]['threat']['norm']}, on images in [0, 1])")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(-3, 103)
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
    return figure


def _measured(evaluations: Sequence[Mapping[str, Any]], quantity: str) -> tuple[float, tuple[float, float]]:
    """Return a share in %, and how far it reaches down and up: by a standard deviation over seeds, or its interval."""
    shares = [each["clean"]["accuracy"] if quantity == "clean" else each[quantity] for each in evaluations]
    mean, spread = _mean(shares)
    if spread is not None:
        return mean, (spread, spread)
    (only,) = evaluations
    interval = only["clean"].get("ci95") if quantity == "clean" else only.get(f"{quantity}_ci95")
    if interval is None:
        return mean, (0.0, 0.0)
    return mean, (max(0.0, mean - 100 * interval[0]), max(0.0, 100 * interval[1] - mean))


def fronts(lines: Mapping[str, Sequence[tuple[float, float]]], title: str = "") -> Figure:
    """Draw clean accuracy against robust accuracy, a line for each way of trading one for the other.

    Args:
        lines: pairs of clean and robust accuracy in %, in the order in which they are joined, by the name to show.
        title: of the figure.
    """
    figure, axes = _figure(height=4.6 if title else 4.4, title=title)
    for index, (name, places) in enumerate((name, places) for name, places in lines.items() if places):
        clean, robust = zip(*places, strict=True)
        colour, mark = MANY[index % len(MANY)], MARKS[index % len(MARKS)]
        face, style = (colour, "-") if index < len(COLOURS) else ("none", "--")  # the less distinct ones are hollow
        look = {"color": colour, "marker": mark, "markersize": 6, "markerfacecolor": face, "linewidth": 1.2}
        axes.plot(robust, clean, style, label=name, **look)
    axes.set_xlabel("robust accuracy (%)")
    axes.set_ylabel("clean accuracy (%)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=8)
    return figure


def refusing(signals: Sequence[Mapping[str, Any]], title: str = "", *, at_most: bool = False) -> Figure:
    """Draw robust accuracy with rejection by the share of correctly classified benign images refused, a line a signal.

    Args:
        signals: "signals" of the "rejection" of an evaluation.json, of images some of which are classified correctly.
        title: of the figure.
        at_most: whether all are upper bounds only.
    """
    columns = 1 if max(len(each["signal"]) for each in signals) > 24 else 2
    figure, axes = _figure(height=3.4 + 0.25 * len(signals) / columns, title=title)
    for index, each in enumerate(signals):
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        places = [(100 * point["right_refused"], 100 * point["robust"]) for point in each["curve"]]
        axes.plot(*zip(*places, strict=True), color=colour, linewidth=1.2, zorder=1)
        marked = [(100 * row["right_refused"]["share"], 100 * row["robust"]["share"]) for row in each["rows"]]
        axes.plot(*zip(*marked, strict=True), mark, color=colour, markersize=6, label=each["signal"])
    axes.set_xlabel("correctly classified benign images refused (%)")
    axes.set_ylabel("robust with rejection, at most (%)" if at_most else "robust with rejection (%)")
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK)
    return figure


def training_curves(metrics: Sequence[Mapping[str, Any]], start_epoch: int | None) -> Figure:
    """Draw the loss, and the validation accuracies, over the epochs.

    Args:
        metrics: lines of metrics.jsonl.
        start_epoch: the first epoch with dummy classes in use, marked by a line; None for none.
    """
    figure, (above, below) = _figure(height=4.2, rows=2)
    above.plot([row["epoch"] + 1 for row in metrics], [row["loss"] for row in metrics], color=INK, linewidth=1.2)
    above.set_ylabel("training loss")
    validated = [row for row in metrics if "robust" in row]
    for quantity, colour, mark in zip(VALIDATION, COLOURS, MARKS, strict=False):
        epochs, values = [row["epoch"] + 1 for row in validated], [100 * row[quantity] for row in validated]
        below.plot(epochs, values, color=colour, marker=mark, markersize=4, linewidth=1.2, label=quantity)
    below.set_ylabel("validation (%)")
    below.set_xlabel("epochs done")
    below.set_ylim(-3, 103)
    for axes in (above, below):
        axes.set_xlim(0, max(row["epoch"] for row in metrics) + 1.5)
        if start_epoch is not None:
            axes.axvline(start_epoch, color=INK, linewidth=1, linestyle=":")
    figure.legend(loc="outside lower center", frameon=False, labelcolor=INK, ncols=3)
    return figure


def mass(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw where probability goes, a bar for each kind of image; `shares` is "mass" of behaviour.json."""
    figure, axes = _figure(height=2.2)
    for row, (_, parts) in enumerate(shares.items()):
        left = 0.0
        for part, label, colour, hatch in PARTS:
            if part in parts:
                width = 100 * parts[part]
                axes.barh(row, width, left=left, color=colour, hatch=hatch, edgecolor="white", label=label, height=0.6)
                left += width
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("mean probability (%)")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=2, frameon=False, labelcolor=INK)
    return figure


def features(measured: Mapping[str, Any]) -> Figure:
    """Draw benign and adversarial images by their features on two axes; `measured` is "features" of behaviour.json."""
    figure, axes = _figure(height=4.4)
    for (kind, parts), colour in zip(measured["points"].items(), COLOURS, strict=False):
        for (part, places), mark in zip(parts.items(), ("o", "x"), strict=True):
            if places:
                across, up = zip(*places, strict=True)
                label = f"{kind}: {part} class"
                axes.scatter(across, up, s=18, color=colour, marker=mark, linewidths=1.2, alpha=0.7, label=label)
    for name, share, label in zip("xy", measured["explained"], ("first", "second"), strict=True):
        getattr(axes, f"set_{name}label")(f"{label} axis ({100 * share:.0f} % of the variance)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
    return figure


def reliability(signal: Mapping[str, Any]) -> Figure:
    """Draw how often an image is adversarial against what the pairs say; `signal` is that of behaviour.json."""
    figure, axes = _figure(height=3.2)
    bins = signal["bins"]
    largest = max(row["count"] for row in bins)
    axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=":", label="perfectly calibrated")
    axes.plot(
        [100 * row["signal"] for row in bins], [100 * row["adversarial"] for row in bins], color=COLOURS[0], linewidth=1
    )
    axes.scatter(
        [100 * row["signal"] for row in bins],
        [100 * row["adversarial"] for row in bins],
        s=[12 + 110 * row["count"] / largest for row in bins],
        color=COLOURS[0],
        zorder=3,
        label="images (area: how many)",
    )
    axes.set_xlabel("signal: the dummy class's share of its pair (%)")
    axes.set_ylabel("of these adversarial (%)")
    axes.set_xlim(-4, 104)
    axes.set_ylim(-4, 104)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=INK)
    return figure


def always_failed(study: Mapping[str, Any]) -> Figure:
    """Draw, for each class, the samples that fail on some and on every model; `study` is `AlwaysFailed.to_dict()`."""
    classes = study["classes"]
    least = "at least " if study["bounds"] else ""
    title = (
        f"{least}{study['failed_on_every']} of {study['samples']} test images fail on all {len(study['runs'])} models"
    )
    figure, axes = _figure(height=1.5 + 0.28 * len(classes), title=title)
    places = range(len(classes))
    for key, colour, label in (
        ("samples", "#BBBBBB", "test images"),
        ("failed_on_some", "#E69F00", "fail on some model"),
        ("failed_on_every", "#D55E00", "fail on every model"),
    ):
        axes.barh(places, [row[key] for row in classes.values()], color=colour, label=label, height=0.7)
    axes.set_yticks(places, list(classes))
    axes.invert_yaxis()
    axes.set_xlabel("test images")
    axes.set_ylabel("class")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    return figure


def transfer(matrix: Mapping[str, Any]) -> Figure:
    """Draw how far attacks on each model fool each other; `matrix` is `Transfer.to_dict()`."""
    runs, cells = matrix["runs"], matrix["success"]
    figure, axes = _figure(height=2.1 + 0.5 * len(runs), title="How far the images made for one model fool the others")
    axes.grid(visible=False)
    shares = [[100 * cell if cell is not None else float("nan") for cell in row] for row in cells]
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for row, column in itertools.product(range(len(runs)), repeat=2):
        share = shares[row][column]
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="black" if share > 55 else "white")
    axes.set_xticks(range(len(runs)), runs, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(runs)), runs, fontsize=8)
    axes.set_xlabel("target: images that it loses (%)")
    axes.set_ylabel("source of the attack")
    return figure


def corruption(measured: Mapping[str, Any]) -> Figure:
    """Draw accuracy against severity, a line for each corruption; `measured` is `Corruption.to_dict()`."""
    figure, axes = _figure(height=4.8, title=f"{measured['run']} on corrupted images ({measured['data']})")
    for index, (name, accuracy) in enumerate(measured["accuracy"].items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index // len(COLOURS) % len(MARKS)]}
        axes.plot(range(1, len(accuracy) + 1), [100 * value for value in accuracy], label=name, markersize=4, **style)
    axes.set_xlabel("severity")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=7)
    return figure


def targeted(measured: Mapping[str, Any]) -> Figure:
    """Draw how many samples withstand attackers who want one class; `measured` is `Targeted.to_dict()`."""
    title = f"{measured['run']}: PGD-{measured['steps']} towards a class, {measured['samples']} test images"
    figure, axes = _figure(height=1.8 + 0.6 * len(measured["withstood"]), title=title)
    for offset, colour, key, label in (
        (-0.2, COLOURS[0], "withstood", "the wanted class does not win"),
        (0.2, COLOURS[1], "correct", "the true class wins"),
    ):
        places = [row + offset for row in range(len(measured[key]))]
        axes.barh(places, [100 * share for share in measured[key].values()], color=colour, label=label, height=0.35)
    axes.set_yticks(range(len(measured["withstood"])), list(measured["withstood"]))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("test images (%)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
    return figure


# By the name of the study.
FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "always-failed": always_failed,
    "transfer": transfer,
    "corruption": corruption,
    "targeted": targeted,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure on a white ground as an .svg or .png file; a file there is replaced."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Without these, every drawing of the same numbers gives another file.
    with rc_context({"svg.hashsalt": path.stem}):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata=metadata, facecolor="white")
    checkpoint.write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def inline(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element for a page: text stays text, in the page's colour, on no ground of its own.

    Args:
        figure: the figure.
        name: unique on the page; it starts the ids of the element's parts.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
    return svg.replace(INK, "currentColor")


def _figure(height: float, rows: int = 1, width: float = PHONE, title: str = "") -> tuple[Figure, Any]:
    """Return a figure of a height and a width in inches, by default that of a phone, and its axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {**dict.fromkeys(inked, INK), "font.size": 10, "hatch.linewidth": 0.6}
    with rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        if title:
            figure.suptitle("\n".join(textwrap.wrap(title, round(15 * width))), fontsize=9.5)
        made = figure.subplots(rows, sharex=rows > 1)
        for axes in made if rows > 1 else [made]:
            _plain(axes)
    return figure, made


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25, color=INK)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mean(shares: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation in %; no deviation of a single one."""
    spread = 100 * statistics.stdev(shares) if len(shares) > 1 else None
    return 100 * statistics.fmean(shares), spread
