import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ducat.evaluation.studies import STUDIES
from ducat.reporting import plots


def evaluation(clean: float, blind: float, robust: float) -> dict:
    return {"clean": {"accuracy": clean}, "blind": blind, "robust": robust}


POINTS = {"one": [evaluation(0.9, 0.7, 0.2)], "two": [evaluation(0.8, 0.5, 0.5), evaluation(0.9, 0.6, 0.4)]}
METRICS = [
    {"epoch": 0, "loss": 2.0},
    {"epoch": 1, "loss": 1.0, "clean": 0.5, "blind": 0.4, "robust": 0.3},
    {"epoch": 2, "loss": 0.5, "clean": 0.6, "blind": 0.5, "robust": 0.4},
]
MASS = {"benign": {"real": 0.7, "dummy": 0.2, "other real": 0.1, "other dummy": 0.0}}
SIGNAL = {"bins": [{"count": 3, "signal": 0.2, "adversarial": 0.0}, {"count": 9, "signal": 0.9, "adversarial": 1.0}]}
FIGURES = {
    "trade-off": lambda: plots.trade_off(POINTS),
    "training": lambda: plots.training_curves(METRICS, start_epoch=1),
    "mass": lambda: plots.mass(MASS),
    "signal": lambda: plots.reliability(SIGNAL),
}
figures = pytest.mark.parametrize("name", FIGURES)


def test_every_study_has_a_figure() -> None:
    assert set(plots.FIGURES) == set(STUDIES)


def test_the_trade_off_stands_where_the_numbers_say() -> None:
    axes = plots.trade_off(POINTS).axes[0]
    drawn = {
        (round(x), round(y)) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    # The second's means over its two seeds are 85 clean, 55 blind and 45 robust.
    assert drawn >= {(70, 90), (20, 90), (55, 85), (45, 85)}


def test_figures_tell_an_upper_bound() -> None:
    bound = {**evaluation(0.9, 0.7, 0.2), "at_most": True, "threat": {"norm": "linf", "eps": 0.1}}
    labels = plots.trade_off({**POINTS, "three": [bound]}, wide=False).legends[0].get_texts()
    assert [text.get_text() for text in labels][:3] == ["one", "two", "three (robust: at most)"]
    labels = plots.curve([{**bound, "threat": {"norm": "linf", "eps": 0.2}, "at_most": False}, bound]).legends[0]
    assert [text.get_text() for text in labels.get_texts()] == ["clean", "blind", "robust (at most)"]


def test_a_trade_off_of_many_keeps_room_for_its_axes_and_no_two_look_alike() -> None:
    evaluation = next(iter(POINTS.values()))[0]
    figure = plots.trade_off({f"a method with a name of some length {number}": [evaluation] for number in range(12)})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_position().height * figure.get_figheight() > 2
    filled = [
        line
        for line in axes.lines
        if line.get_markerfacecolor() == line.get_color() and line.get_marker() in plots.MARKS
    ]
    assert len({(line.get_color(), line.get_marker()) for line in filled}) == 12


def test_fronts_stand_where_the_numbers_say_and_no_two_look_alike() -> None:
    lines = {f"way {number}": [(50.0 + number, 30.0), (60.0 + number, 20.0)] for number in range(9)}
    axes = plots.fronts({**lines, "nothing": []}).axes[0]
    drawn = {line.get_label(): (list(line.get_ydata()), list(line.get_xdata())) for line in axes.lines}
    assert drawn == {name: tuple(map(list, zip(*places, strict=True))) for name, places in lines.items()}
    looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in axes.lines}
    assert len(looks) == 9


def test_curves_are_drawn_at_the_epochs_that_were_validated() -> None:
    loss, accuracy = plots.training_curves(METRICS, start_epoch=None).axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3]]
    assert {line.get_label(): list(line.get_ydata()) for line in accuracy.lines} == {
        "clean": [50, 60],
        "blind": [40, 50],
        "robust": [30, 40],
    }
    assert all(list(line.get_xdata()) == [2, 3] for line in accuracy.lines)


def test_bars_of_mass_add_up_to_all() -> None:
    bars = plots.mass(MASS).axes[0].patches
    assert [round(bar.get_width()) for bar in bars] == [70, 20, 10, 0]
    assert [round(bar.get_x()) for bar in bars] == [0, 70, 90, 100]


@figures
def test_an_inline_figure_takes_the_colour_of_its_page(name: str) -> None:
    svg = plots.inline(FIGURES[name](), name)
    root = ElementTree.fromstring(svg.replace("xlink:", ""))
    assert root.tag.endswith("svg")
    assert plots.INK not in svg
    assert "currentColor" in svg
    assert "<text" in svg, "text was drawn as shapes"
    texts = re.findall(r'<text[^>]*style="([^"]*)', svg)
    assert all("fill: currentColor" in style for style in texts), "text would be black on a dark page"
    background = root.find(f".//*[@id='{name}-patch_1']")
    assert background is not None
    assert "fill: none" in ElementTree.tostring(background, encoding="unicode")


@figures
def test_ids_of_an_inline_figure_are_its_own(name: str) -> None:
    svg = plots.inline(FIGURES[name](), name)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert len(set(ids)) == len(ids)
    assert all(each.startswith(f"{name}-") for each in ids)
    used = re.findall(r'(?:url\(#|href="#)([^")]*)', svg)
    assert set(used) <= set(ids)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_numbers_give_the_same_file(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / "first" / f"figure.{suffix}", tmp_path / "second" / f"figure.{suffix}"]
    for path in paths:
        path.parent.mkdir()
        plots.save(plots.trade_off(POINTS), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
