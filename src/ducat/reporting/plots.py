"""Figures. Colours and marks are told apart without colour vision, and on light and dark pages."""

from __future__ import annotations

import io
import itertools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ducat import checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito
MARKS = ("o", "s", "D", "^", "v", "P")
INK = "#1a1b1c"  # text and lines; inside a page it gives way to the page's own colour
CURVES = ("clean", "blind", "robust")
# Parts of the probability: name in behaviour.json, legend, colour, hatching.
PARTS = (
    ("real", "own class, real", "#0072B2", ""),
    ("dummy", "own class, dummy", "#56B4E9", "////"),
    ("other real", "other classes, real", "#D55E00", ""),
    ("other dummy", "other classes, dummy", "#E69F00", "////"),
)
SPAN = 10  # points of clean accuracy that a figure shows at least


def trade_off(points: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw clean accuracy against accuracy under attack, blind and robust joined by a line.

    Args:
        points: contents of evaluation.json, one for each training seed, by the name to show. Several give their mean,
            with the sample standard deviation as a cross.
    """
    columns = 1 if max(map(len, points)) > 24 else 2
    figure, axes = _figure(height=max(3.9, 3.0 + 0.22 * len(points) / columns))  # a long legend leaves the axes room
    for index, (name, evaluations) in enumerate(points.items()):
        # Colours begin again with other marks.
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[(index + index // len(COLOURS)) % len(MARKS)]
        clean = _mean([evaluation["clean"]["accuracy"] for evaluation in evaluations])
        blind, robust = (_mean([evaluation[key] for evaluation in evaluations]) for key in ("blind", "robust"))
        axes.plot([blind[0], robust[0]], [clean[0], clean[0]], color=colour, linewidth=1.5, zorder=1)
        for under_attack, face, label in ((blind, "none", None), (robust, colour, name)):
            axes.errorbar(
                under_attack[0],
                clean[0],
                xerr=under_attack[1],
                yerr=clean[1],
                fmt=mark,
                markersize=8,
                markerfacecolor=face,
                color=colour,
                linewidth=1,
                zorder=3,
                label=label,
            )
    axes.set_xlabel("accuracy under attack (%)")
    axes.set_ylabel("clean accuracy (%)")
    axes.margins(x=0.08, y=0.2)
    low, high = axes.get_ylim()
    if high - low < SPAN:
        # Networks that hardly differ must not look far apart; accuracy ends at 100.
        low = min((low + high - SPAN) / 2, 101 - SPAN)
        axes.set_ylim(low, low + SPAN)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK)
    return figure


def fronts(lines: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Draw clean accuracy against robust accuracy, a line for each way of trading one for the other.

    Args:
        lines: pairs of clean and robust accuracy in %, in the order in which they are joined, by the name to show.
    """
    figure, axes = _figure(height=4.4)
    for index, (name, places) in enumerate((name, places) for name, places in lines.items() if places):
        clean, robust = zip(*places, strict=True)
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        face, style = (colour, "-") if index < len(COLOURS) else ("none", "--")  # colours begin again, hollow
        look = {"color": colour, "marker": mark, "markersize": 6, "markerfacecolor": face, "linewidth": 1.2}
        axes.plot(robust, clean, style, label=name, **look)
    axes.set_xlabel("robust accuracy (%)")
    axes.set_ylabel("clean accuracy (%)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=8)
    return figure


def refusing(signals: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw robust accuracy with rejection by the share of correctly classified benign images refused, a line a signal.

    Args:
        signals: "signals" of the "rejection" of an evaluation.json.
    """
    figure, axes = _figure(height=3.4 + 0.25 * len(signals) / 2)
    for index, each in enumerate(signals):
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        places = [(100 * point["right_refused"], 100 * point["robust"]) for point in each["curve"]]
        axes.plot(*zip(*places, strict=True), color=colour, linewidth=1.2, zorder=1)
        marked = [
            (100 * row["right_refused"]["share"], 100 * row["robust"]["share"])
            for row in each["rows"]
            if row["right_refused"]
        ]
        axes.plot(*zip(*marked, strict=True), mark, color=colour, markersize=6, label=each["signal"])
    axes.set_xlabel("correctly classified benign images refused (%)")
    axes.set_ylabel("robust with rejection (%)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
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
    for quantity, colour, mark in zip(CURVES, COLOURS, MARKS, strict=False):
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
    figure, axes = _figure(height=1.2 + 0.28 * len(classes))
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
    figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    return figure


def transfer(matrix: Mapping[str, Any]) -> Figure:
    """Draw how far attacks on each model fool each other; `matrix` is `Transfer.to_dict()`."""
    runs, cells = matrix["runs"], matrix["success"]
    figure, axes = _figure(height=1.8 + 0.5 * len(runs))
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
    figure, axes = _figure(height=4.5)
    for index, (name, accuracy) in enumerate(measured["accuracy"].items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index // len(COLOURS) % len(MARKS)]}
        axes.plot(range(1, len(accuracy) + 1), [100 * value for value in accuracy], label=name, markersize=4, **style)
    axes.set_xlabel("severity")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=7)
    return figure


def targeted(measured: Mapping[str, Any]) -> Figure:
    """Draw how many samples withstand attackers who want one class; `measured` is `Targeted.to_dict()`."""
    figure, axes = _figure(height=1.4 + 0.6 * len(measured["withstood"]))
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
    figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=INK)
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


def _figure(height: float, rows: int = 1) -> tuple[Figure, Any]:
    """Return a figure of the width of a phone, in inches, and its axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {**dict.fromkeys(inked, INK), "font.size": 10, "hatch.linewidth": 0.6}
    with rc_context(settings):
        figure = Figure(figsize=(4.6, height), layout="constrained")
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
