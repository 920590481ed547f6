"""Figures, as self-contained SVG. Colours and marks are told apart without colour vision, and in black and white."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ducat import checkpoint

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito
MARKS = ("o", "s", "D", "^", "v", "P")


def trade_off(evaluations: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw clean accuracy against accuracy under attack, blind and robust joined by a line per run.

    Args:
        evaluations: contents of evaluation.json by the name to show; at least one.
        path: the .svg or .png file to write; a file there is replaced.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, evaluation) in enumerate(evaluations.items()):
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        clean, blind, robust = (100 * value for value in (evaluation["clean"]["accuracy"], *_ends(evaluation)))
        axes.plot([blind, robust], [clean, clean], color=colour, linewidth=1.5, zorder=1)
        axes.plot(blind, clean, mark, markersize=8, markerfacecolor="white", markeredgecolor=colour, zorder=2)
        axes.plot(robust, clean, mark, markersize=8, color=colour, zorder=3, label=name)
    axes.set_xlabel("accuracy under attack (%)")
    axes.set_ylabel("clean accuracy (%)")
    axes.set_title("Filled: attackers know recovery (robust). Hollow: they do not (blind).", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.2)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    buffer = io.BytesIO()
    # Without these two, every drawing of the same numbers gives another file.
    figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})
    checkpoint.write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _ends(evaluation: Mapping[str, Any]) -> tuple[float, float]:
    return evaluation["blind"], evaluation["robust"]
