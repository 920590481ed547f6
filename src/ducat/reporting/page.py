"""The page: one self-contained HTML file for one run or several. Blind and robust accuracy always stand together."""

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ducat import checkpoint
from ducat.config import Config
from ducat.evaluation.kept import curves
from ducat.records import VALIDATION
from ducat.reporting import compare as comparing
from ducat.reporting import plots
from ducat.reporting.compare import Comparison, Run, Section

KINDS = {"benign": "Benign images", "adversarial": "Adversarial images"}


def page(
    path: Path, title: str, comparison: Comparison, *, text: Sequence[str] = (), command: str | None = None
) -> None:
    """Write one HTML file that needs nothing else: no network, no script.

    Args:
        path: where to; a page there is replaced.
        title: heading of the page.
        comparison: the runs, from `compare.compare`; it may be of one.
        text: paragraphs above the results.
        command: the command that makes all of it again, if there is one beside those of the runs.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = resources.files("ducat.reporting").joinpath("page.html.jinja").read_text(encoding="utf-8")
    figures = {name: Markup(svg) for name, svg in _figures(comparison).items()}  # ours, from matplotlib
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    html = environment.from_string(template).render(
        title=title,
        text=text,
        comparison=comparison,
        comparing=comparing,
        figures=figures,
        descriptions={run.name: _describe(run) for run in comparison.runs},
        commands={run.name: reproduce(run) for run in comparison.runs},
        manifests={run.name: json.dumps(run.manifest, indent=2) for run in comparison.runs},
        others={run.name: [one for one in run.kept if one != run.evaluation] for run in comparison.runs},
        kinds=KINDS,
        command=command,
    )
    checkpoint.write_text(path, html)


def _figures(comparison: Comparison) -> dict[str, str]:
    """Return the figures that there are data for, by a name that is unique on the page."""
    figures = {}
    for number, section in enumerate(comparison.sections):
        for name, wide in ((f"trade-off-{number}", True), (f"trade-off-narrow-{number}", False)):
            figures[name] = plots.inline(plots.trade_off(points(section), section.title, wide=wide), name)
    for number, run in enumerate(comparison.runs):
        seen = run.behaviour or {}
        for place, alike in enumerate(curves(filter(run.is_current, run.kept))):
            name, title = f"curve-{number}-{place}", comparing.setting(alike[0], eps=False)
            title += f", {alike[0]['checkpoint']}" if alike[0].get("checkpoint") else ""
            figures[name] = plots.inline(plots.curve(alike, title), name)
        if run.metrics and run.path is not None:
            config = Config.from_yaml(run.path / "config.yaml", whole=True)
            start = config.start_epoch if config.dummy.kind != "off" else None
            name = f"training-{number}"
            figures[name] = plots.inline(plots.training_curves(run.metrics, start), name)
        if seen.get("mass"):
            figures[f"mass-{number}"] = plots.inline(plots.mass(seen["mass"]), f"mass-{number}")
        if seen.get("features"):
            figures[f"features-{number}"] = plots.inline(plots.features(seen["features"]), f"features-{number}")
        if seen.get("signal"):
            figures[f"signal-{number}"] = plots.inline(plots.reliability(seen["signal"]), f"signal-{number}")
        refused = (run.evaluation.get("rejection") or {"signals": []})["signals"]
        if any(row["right_refused"] for each in refused for row in each["rows"]):
            name = f"refusing-{number}"
            figure = plots.refusing(refused, at_most=comparing.refusing_at_most(run.evaluation))
            figures[name] = plots.inline(figure, name)
    return figures


def draw(section: Section, path: Path) -> None:
    """Draw the trade-off of a section into an .svg or .png file, titled by how it was measured."""
    plots.save(plots.trade_off(points(section), section.title), path)


def points(section: Section) -> dict[str, list[Mapping[str, Any]]]:
    """Return what `plots.trade_off` draws of a section."""
    return {group.name: [run.evaluation for run in group.runs] for group in section.groups}


def _describe(run: Run) -> dict[str, str]:
    """Return in words what the figures of a run show, for those who do not see them."""
    texts = {}
    validated = [row for row in run.metrics if "robust" in row]
    if validated:
        first, last = validated[0], validated[-1]
        changes = ", ".join(f"{name} {100 * first[name]:.1f} to {100 * last[name]:.1f} %" for name in VALIDATION)
        texts["training"] = (
            f"Training loss and validation accuracy by epoch. From epoch {first['epoch'] + 1} to {last['epoch'] + 1}: "
            f"loss {first['loss']:.2f} to {last['loss']:.2f}, {changes}."
        )
    seen = run.behaviour or {}
    if seen.get("mass"):
        texts["mass"] = " ".join(f"{KINDS[kind]}: {_shares(parts)}." for kind, parts in seen["mass"].items())
    if seen.get("features"):
        counts = ", ".join(
            f"{len(places)} {kind} seen as {'a dummy class' if part == 'dummy' else 'real'}"
            for kind, parts in seen["features"]["points"].items()
            for part, places in parts.items()
        )
        texts["features"] = f"Images by the two main axes of their features: {counts}."
    if seen.get("signal"):
        pairs = ", ".join(
            f"{100 * row['signal']:.0f} % and {100 * row['adversarial']:.0f} %" for row in seen["signal"]["bins"]
        )
        texts["signal"] = f"Signal and share of adversarial images, by bin: {pairs}."
    if run.evaluation.get("rejection"):
        parts = (
            f"{each['signal']} "
            + ", ".join(f"{100 * row['robust']['share']:.1f} % at {100 * row['reject']:g} %" for row in each["rows"])
            for each in run.evaluation["rejection"]["signals"]
        )
        bound = "At most: " if comparing.refusing_at_most(run.evaluation) else ""
        texts["refusing"] = f"Robust with rejection by share of benign images refused. {bound}{'; '.join(parts)}."
    return texts


def _shares(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {100 * parts[part]:.1f} %" for part, label, *_ in plots.PARTS if part in parts)


def reproduce(run: Run) -> list[str]:
    """Return the commands that make a run and its evaluation again, under another name."""
    source = (run.evaluation.get("origin") or {}).get("source")
    refused = run.evaluation.get("rejection") or {"signals": []}
    shares = [f"{row['reject']:g}" for each in refused["signals"][:1] for row in each["rows"]]
    extra = ["--reject", *shares] if shares else []
    asked = run.evaluation.get("origin") or {}
    # Of surrogates the names of the folders are known, and the first digits of their weights' digests.
    surrogates = [name.rpartition("-")[0] for name in asked.get("surrogates") or []]
    extra += ["--surrogates", *surrogates] if surrogates else []
    if asked.get("second_round_seconds") is not None:
        extra += ["--second-round-seconds", f"{asked['second_round_seconds']:g}"]
    if source is not None:
        chosen = {**source, **{name: run.evaluation[name] for name in ("suite", "samples", "seed")}}
        chosen |= {name: run.evaluation["threat"][name] for name in ("norm", "eps")}
        options = {name: value for name, value in chosen.items() if value is not None}
        words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [shlex.join(["ducat", "evaluate", *words, *extra])]
    if run.path is None and not run.manifest:  # a file, which does not say what was trained
        return []
    name = f"{run.name if run.path is None else run.path.name}-again"
    if "initial" in run.manifest:
        # Its beginning is a file that only the command line of the time names.
        program, *arguments = run.manifest["command"]
        train = shlex.join([Path(program).name, *arguments])
        target = run.path
    else:
        train = shlex.join(["ducat", "train", *_flags(run.settings), "--name", name])
        target = Path("runs") / name
    evaluation = run.evaluation
    options = {name: evaluation[name] for name in ("suite", "samples", "seed")}
    options["which"] = evaluation.get("checkpoint") or "best"
    ball = evaluation["threat"]
    if (ball["norm"], ball["eps"]) != (run.settings["threat.norm"], run.settings["threat.eps"]):
        options |= {"norm": ball["norm"], "eps": ball["eps"]}
    flags = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    return [train, shlex.join(["ducat", "evaluate", str(target), *flags, *extra])]


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Return the options whose values are not the default's."""
    usual = Config().flat()
    return [
        part
        for option, value in settings.items()
        if option != "name" and value is not None and value != usual[option]
        for part in (f"--{option}", json.dumps(value) if isinstance(value, list) else str(value))
    ]
