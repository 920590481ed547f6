"""A grid over any settings: every combination is trained and evaluated, one after the other, resumable at any point."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ducat import checkpoint, records, training
from ducat.config import Config, config_parser
from ducat.data.loading import find_spec
from ducat.evaluation import behaviour
from ducat.evaluation.runs import evaluate_run
from ducat.progress import Live
from ducat.reporting import compare as comparing
from ducat.reporting import page
from ducat.reporting.compare import Comparison, Run
from ducat.runs import RunFolder, Which

SEED = "train.seed"


@dataclass(frozen=True)
class Swept:
    """What a sweep left.

    Attributes:
        comparison: of the runs that were trained and evaluated.
        failed: why a run is missing, by its name.
        page: the HTML page.
    """

    comparison: Comparison
    failed: Mapping[str, str]
    page: Path


def read_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read "option=value,value" by option; a value with commas of its own is put in brackets, as [0.5,0.75].

    Raises:
        ValueError: if a text is not of that form, or an option comes twice.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        option, _, values = text.partition("=")
        try:
            read = yaml.load(f"[{values}]", Loader=yaml.BaseLoader)  # texts and lists only
        except yaml.YAMLError as error:
            raise ValueError(f"--grid {text}: the values cannot be read: give option=value,value") from error
        if not option or not read or not all(read):
            raise ValueError(f"--grid {text}: give option=value,value, for example train.seed=0,1,2")
        if option in grid:
            raise ValueError(f"--grid {text}: {option} is given twice")
        grid[option] = [value if isinstance(value, str) else f"[{','.join(value)}]" for value in read]
    return grid


def configs(base: Config, grid: Mapping[str, Sequence[str]]) -> list[Config]:
    """Return the settings of every combination, each with a name made of what the grid changes.

    Raises:
        ValueError: if a combination is not possible, an option is unknown, or two combinations are one.
    """
    parser = config_parser()
    parser.set_defaults(base.flat())
    made = []
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        words = [f"--{option}={value}" for option, value in chosen.items()]
        config = Config(**vars(parser.instantiate(parser.parse_args(words))))
        parts = [f"{option.split('.')[-1]}-{value}" for option, value in chosen.items() if option != SEED]
        name = "-".join([*parts, f"s{config.train.seed}"])
        name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
        made.append(replace(config, name=name))
    names = [config.name for config in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--grid: {twice} comes twice: give each value once")
    return made


def sweep(
    base: Config,
    grid: Mapping[str, Sequence[str]],
    folder: Path,
    *,
    suite: str = "light",
    samples: int | None = None,
    which: Which = "best",
    progress: Live,
) -> Swept:
    """Train and evaluate every combination of a grid, and write table.md, table.csv, trade-off.svg and report.html.

    Called again with the same arguments it goes on where it stopped: finished runs and evaluations are kept, a run in
    the middle is resumed.

    Args:
        base: the settings that all combinations share.
        grid: values, as on the command line, by option.
        folder: where the runs and the results go.
        suite: which attacks, a row of `attacks.suites.SUITES`.
        samples: test images, a fixed stratified subset; all by default.
        which: the checkpoint that is evaluated, "best" or "last".
        progress: shows how far each run is.

    Raises:
        ValueError: if a combination is not possible, or the folder holds another sweep.
        Interrupted: if SIGINT or SIGTERM came; call it again to go on.
    """
    every = configs(base, grid)
    for config in every:
        spec = find_spec(config.data.name, config.data.root)
        if spec is not None and not (folder / str(config.name)).is_dir():
            config.check_read(spec)
    settings = {"config": base.flat(), "grid": dict(grid), "suite": suite, "samples": samples, "which": which}
    noted = folder / "sweep.json"
    if noted.is_file():
        remedy = "choose another --name, or delete it if the runs beside it are of these settings"
        if records.read(noted, dict[str, Any], remedy) != json.loads(json.dumps(settings)):
            raise ValueError(f"{folder} holds a sweep of other settings: choose another --name")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(noted, json.dumps(settings, indent=1) + "\n")
    runs: list[tuple[RunFolder, Mapping[str, Any]]] = []
    failed: dict[str, str] = {}
    for config in every:
        assert config.name is not None
        path = folder / config.name
        try:
            listener = progress.training(config.name)
            run = training.resume(path, listener) if path.is_dir() else training.train(config, folder, listener)
        except FloatingPointError as error:
            failed[config.name] = str(error)
            continue
        # What has been measured in this way is not measured again; other evaluations of the run are not the sweep's.
        measured = evaluate_run(run, suite, samples=samples, which=which, progress=progress.attacks(config.name))
        runs.append((run, measured))
    if not runs:
        raise ValueError(f"no run of {folder} could be trained: {'; '.join(failed.values())}")
    return Swept(_report(runs, folder), failed, folder / "report.html")


def _report(runs: Sequence[tuple[RunFolder, Mapping[str, Any]]], folder: Path) -> Comparison:
    for run, _ in runs:
        if not behaviour.is_current(run):
            behaviour.measure_run(run)
    comparison = comparing.compare([Run.read(run.path).seen_by(measured) for run, measured in runs])
    checkpoint.write_text(folder / "table.md", comparing.to_markdown(comparison))
    checkpoint.write_text(folder / "table.csv", comparing.to_csv(comparison))
    page.draw(comparison.sections[0], folder / "trade-off.svg")
    page.page(folder / "report.html", f"Sweep {folder.name}", comparison)
    return comparison
