"""Tables and the page, made from the contents of evaluation.json. Blind and robust accuracy always stand together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ducat import checkpoint

HEADERS = ("run", "clean", "blind", "robust", "sink gap")
CAPTION = "Accuracy in % with 95 % intervals; sink gap in points = blind - robust."


@dataclass(frozen=True)
class Row:
    """A line of the table, as text."""

    name: str
    clean: str
    blind: str
    robust: str
    sink_gap: str

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, self.clean, self.blind, self.robust, self.sink_gap


def rows(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return the table's lines for evaluations by name."""
    return [
        Row(
            name,
            _share(evaluation["clean"]["accuracy"], evaluation["clean"]["ci95"]),
            _share(evaluation["blind"], evaluation["blind_ci95"]),
            _share(evaluation["robust"], evaluation["robust_ci95"]),
            f"{100 * evaluation['sink_gap']:.1f}",
        )
        for name, evaluation in evaluations.items()
    ]


def _share(accuracy: float, ci95: Sequence[float]) -> str:
    return f"{100 * accuracy:.1f} [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


def markdown(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = [HEADERS, ("---",) * len(HEADERS), *(row.cells for row in rows(evaluations))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def setting(evaluation: Mapping[str, Any]) -> str:
    """Return in one line what an evaluation measured: data, samples, budget, suite, seed."""
    threat = evaluation["threat"]
    return (
        f"{evaluation['data']}, {evaluation['samples']} test images, {threat['norm']} eps {threat['eps']:.4g} on "
        f"images in [0, 1], suite {evaluation['suite']}, seed {evaluation['seed']}"
    )


def page(
    path: Path,
    title: str,
    evaluations: Mapping[str, Mapping[str, Any]],
    *,
    text: Sequence[str] = (),
    figure: Path | None = None,
    command: str = "",
) -> None:
    """Write one HTML file that needs nothing else: no network, no script.

    Args:
        path: where to; a page there is replaced.
        title: heading of the page.
        evaluations: contents of evaluation.json by name.
        text: paragraphs above the table.
        figure: an .svg file to put into the page.
        command: the command that makes the same again.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    template = resources.files("ducat").joinpath("report.html.jinja").read_text(encoding="utf-8")
    svg = figure.read_text(encoding="utf-8") if figure is not None else ""
    html = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            title=title,
            text=text,
            headers=HEADERS,
            rows=rows(evaluations),
            caption=CAPTION,
            evaluations=evaluations,
            settings={name: setting(evaluation) for name, evaluation in evaluations.items()},
            # Ours, from matplotlib; the XML declaration before <svg> has no place inside HTML.
            figure=Markup(svg[svg.index("<svg") :]) if svg else "",
            command=command,
        )
    )
    checkpoint.write_text(path, html)
