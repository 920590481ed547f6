"""Runs side by side: what can be compared stands in one table, what cannot is told apart and said.

A comparison is of runs that were measured alike: same test images, same ball, same suite and seed of the attacks. Runs
that differ in nothing but the training seed are one line, with the mean and the sample standard deviation over seeds.
"""

import csv
import io
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ducat.architecture import GIVEN_NETWORK
from ducat.config import Config
from ducat.evaluation import behaviour
from ducat.evaluation import kept as keeping
from ducat.evaluation import statistics as statistics_of
from ducat.evaluation.engine import FOLLOWING
from ducat.evaluation.result import Evaluation
from ducat.runs import RunFolder

QUANTITIES = ("clean", "blind", "robust", "sink gap")
# Settings that change where a run is kept and watched, not what it is.
IRRELEVANT = ("name", "data.root", "train.seed", "train.checkpoint_minutes", "train.keep", "train.tracker")


@dataclass(frozen=True)
class Run:
    """An evaluated run, read from its folder.

    Attributes:
        name: what tables call it.
        path: its folder; None for a checkpoint from elsewhere, of which nothing is kept.
        settings: the config by the names of the command line.
        manifest: content of manifest.json.
        metrics: lines of metrics.jsonl.
        evaluation: content of evaluation.json.
        behaviour: content of behaviour.json, if there is one of that evaluation.
        file: the evaluation's own .json; None where it is evaluation.json of the folder.
        kept: contents of all evaluations of the run.
        current: whether the checkpoint still is the one that was evaluated.
    """

    name: str
    path: Path | None
    settings: Mapping[str, Any]
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    behaviour: Mapping[str, Any] | None = None
    file: Path | None = None
    kept: Sequence[Mapping[str, Any]] = ()
    current: bool = True

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> "Run":
        """Read a run folder, or the .json file of one evaluation, of a run or of a network from elsewhere.

        Raises:
            FileNotFoundError: if there is no such run, or it has not been evaluated.
            ValueError: if its evaluation cannot be read.
        """
        if path.suffix == ".json" and path.is_file():
            return cls._of_file(path, name)
        folder = RunFolder.open(path)
        if not folder.evaluation_path.is_file():
            raise FileNotFoundError(f"{path} has no evaluation yet: run `ducat evaluate {folder.quoted}`")
        return cls._of_folder(folder, name, None)

    @classmethod
    def _of_folder(cls, folder: RunFolder, name: str | None, file: Path | None) -> "Run":
        chosen = file or folder.evaluation_path
        evaluation = keeping.read(chosen, f"run `ducat evaluate {folder.quoted}` again")
        seen = behaviour.read(folder) if file is None else None
        return cls(
            name or folder.name,
            folder.path,
            folder.config.flat(),
            folder.manifest,
            folder.metrics,
            evaluation,
            seen,
            file,
            list(keeping.evaluations(folder).values()) or [evaluation],
            keeping.is_current(folder, evaluation),
        )

    @classmethod
    def _of_file(cls, path: Path, name: str | None) -> "Run":
        if path.parent.name == "evaluations" and (path.parent.parent / "config.yaml").is_file():
            return cls._of_folder(RunFolder.open(path.parent.parent), name, path)
        evaluation = keeping.read(path)
        ball = evaluation["threat"]
        settings = {**Config().flat(), "threat.norm": ball["norm"], "threat.eps": ball["eps"], "dummy.kind": "off"}
        return cls(name or path.stem, None, settings, {}, [], evaluation, None, path, [evaluation])

    @property
    def candidates(self) -> list[Mapping[str, Any]]:
        """The evaluations that may speak for it: all of its present checkpoints, or the one that was named."""
        if self.file is not None or self.path is None:
            return [self.evaluation]
        folder = RunFolder(self.path)
        return [
            self.evaluation,
            *(one for one in self.kept if one != self.evaluation and keeping.is_current(folder, one)),
        ]

    def is_current(self, evaluation: Mapping[str, Any]) -> bool:
        """Tell whether one of its evaluations is of the weights that its checkpoint still has."""
        return self.path is None or keeping.is_current(RunFolder(self.path), evaluation)

    def seen_by(self, evaluation: Mapping[str, Any]) -> "Run":
        """Return the run as another of its evaluations shows it."""
        if evaluation == self.evaluation or self.path is None:
            return self
        file = RunFolder(self.path).evaluations_path / f"{keeping.name_of(evaluation)}.json"
        return replace(self, evaluation=evaluation, behaviour=None, file=file)

    @property
    def bounded(self) -> "Run":
        """The run with its numbers as upper bounds, and a warning, where another of its evaluations shows that."""
        kept = [_bounded(one, self.kept) for one in self.kept]
        return replace(self, evaluation=_bounded(self.evaluation, self.kept), kept=kept)

    @property
    def measured_at(self) -> Path | None:
        """Where the flags per sample lie, as `Evaluation.load` takes it."""
        return self.file or self.path

    @property
    def seed(self) -> int:
        return self.settings["train.seed"]

    def share(self, quantity: str) -> float:
        """Return a row of `QUANTITIES`, in [0, 1]."""
        value = self.evaluation["sink_gap" if quantity == "sink gap" else quantity]
        return value["accuracy"] if quantity == "clean" else value

    def ci95(self, quantity: str) -> tuple[float, float]:
        """Return the 95 % interval of a row of `QUANTITIES` other than the sink gap."""
        low, high = self.evaluation["clean"]["ci95"] if quantity == "clean" else self.evaluation[f"{quantity}_ci95"]
        return low, high


def _bounded(evaluation: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    bounds = [one for one in kept if keeping.bounds(one, evaluation)]
    if not bounds:
        return evaluation
    least = min(bounds, key=lambda one: one["robust"])
    left = f"leaves {'at most ' if least.get('at_most') else ''}{100 * least['robust']:.1f} %"
    if least["robust"] >= evaluation["robust"]:
        left = "found signs by which its number is an upper bound"
    warning = f"another evaluation of these weights ({setting(least)}) {left}: robust accuracy here is an upper bound"
    warnings = [one for one in evaluation["warnings"] if one != warning]
    return {**evaluation, "at_most": True, "warnings": [warning, *warnings]}


@dataclass(frozen=True)
class Group:
    """Runs that differ in the training seed alone: a line of the table."""

    name: str
    runs: Sequence[Run]

    @property
    def seeds(self) -> list[int]:
        return sorted(run.seed for run in self.runs)

    @property
    def seconds(self) -> float:
        """Mean over seeds of the wall time that training took, without validation; 0 where none was noted."""
        return statistics.fmean(sum(row.get("seconds", 0) for row in run.metrics) for run in self.runs)

    @property
    def at_most(self) -> bool:
        """Whether robust accuracy is an upper bound only, of any of the runs."""
        return any(run.evaluation.get("at_most", False) for run in self.runs)

    def mean(self, quantity: str) -> float:
        return statistics.fmean(run.share(quantity) for run in self.runs)

    def spread(self, quantity: str) -> float | None:
        """Return the sample standard deviation over seeds; None for a single run."""
        return statistics.stdev(run.share(quantity) for run in self.runs) if len(self.runs) > 1 else None


@dataclass(frozen=True)
class Pair:
    """Two lines of a table on the same samples: how far their robust accuracies differ, and how sure that is.

    Single seeds are tested by McNemar's exact test, which speaks of test images alone: another training may turn out
    otherwise. Where one of the two has several seeds, `statistics.difference` counts images and trainings.

    Attributes:
        first: name of a line.
        second: name of the other.
        difference: robust accuracy of the second - of the first.
        ci95: its 95 % interval.
        p_value: two-sided, by itself.
        adjusted: the same by Holm's method for the number of pairs.
        trainings: whether the spread over training seeds is counted.
        bounds: those of the two whose robust accuracy is an upper bound only.
    """

    first: str
    second: str
    difference: float
    ci95: tuple[float, float]
    p_value: float
    adjusted: float
    trainings: bool
    bounds: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """Runs that were measured alike.

    Attributes:
        title: how they were measured, in one line.
        groups: the lines of the table.
        pairs: tests of each two lines, where the evaluations have their flags per sample.
        verdict: which is the most robust, by how much, how sure; empty of a single line.
    """

    title: str
    groups: Sequence[Group]
    pairs: Sequence[Pair] = ()
    verdict: str = ""

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


@dataclass(frozen=True)
class Comparison:
    """Everything that the table, the files and the page say.

    Attributes:
        sections: one for each way of measuring; their numbers must not be compared with each other.
        notes: what a reader must know before comparing.
    """

    sections: Sequence[Section]
    notes: Sequence[str]

    @property
    def runs(self) -> list[Run]:
        return [run for section in self.sections for run in section.runs]


def compare(runs: Sequence[Run]) -> Comparison:
    """Put runs side by side.

    Raises:
        ValueError: if there are none, or two have one name.
    """
    if not runs:
        raise ValueError("there are no runs to compare")
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice")
    runs = [run.bounded for run in runs]
    sections = []
    for alike in _partition(runs, _measured):
        groups = _groups(alike)
        pairs = _pairs(groups)
        sections.append(Section(setting(alike[0].evaluation), groups, pairs, _verdict(groups, pairs)))
    notes = [*_differences(runs), *_seed_notes(sections), *_state_notes(runs), *_time_notes(sections)]
    return Comparison(sections, notes)


def setting(evaluation: Mapping[str, Any], *, eps: bool = True) -> str:
    """Return in one line what an evaluation measured: data, samples, budget, suite, seed."""
    threat = evaluation["threat"]
    radius = f" eps {threat['eps']:.4g}" if eps else ""
    return (
        f"{evaluation['data']}, {evaluation['samples']} test images, {threat['norm']}{radius} on "
        f"images in [0, 1], suite {evaluation['suite']}, seed {evaluation['seed']}"
    )


def read_alike(paths: Sequence[Path]) -> list[Run]:
    """Read runs, each by the strongest evaluation that all of them have; by its own where there is none.

    A run that is given twice is an error, two runs of one name are called by their paths.

    Raises:
        FileNotFoundError: as `Run.read`.
        ValueError: as `Run.read`.
    """
    runs = [Run.read(path) for path in paths]
    repeated = [run.name for run in runs]
    if len({path.resolve() for path in paths}) == len(paths):
        runs = [
            replace(run, name=str(path)) if repeated.count(run.name) > 1 else run
            for run, path in zip(runs, paths, strict=True)
        ]
    if len(_partition(runs, _measured)) == 1:
        return runs
    shared = None
    for run in runs:
        own = {_measured(run.seen_by(content)) for content in run.candidates}
        shared = own if shared is None else shared & own
    if not shared:
        return runs
    ball = (runs[0].settings["threat.norm"], float(runs[0].settings["threat.eps"] or 0))
    first = [content for content in runs[0].candidates if _measured(runs[0].seen_by(content)) in shared]
    chosen = _measured(runs[0].seen_by(first[keeping.strongest(first, ball)]))
    found = []
    for run in runs:
        alike = [content for content in run.candidates if _measured(run.seen_by(content)) == chosen]
        found.append(run.seen_by(alike[keeping.strongest(alike, ball)]))
    return found


def _partition(runs: Iterable[Run], key: Callable[[Run], Any]) -> list[list[Run]]:
    """Return the runs in groups of one key, in the order of their first."""
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return list(found.values())


MEASURES: dict[str, Callable[[Run], Any]] = {
    "data": lambda run: run.evaluation["data"],
    "test images": lambda run: run.evaluation.get("fingerprint") or run.evaluation["samples"],
    "threat model": lambda run: (run.evaluation["threat"]["norm"], round(run.evaluation["threat"]["eps"], 9)),
    "suite": lambda run: run.evaluation["suite"],
    "attacks": lambda run: _attacks(run.evaluation),
    "limits of the second round": lambda run: (run.evaluation.get("origin") or {}).get("second_round_seconds"),
    "seed of the attacks": lambda run: run.evaluation["seed"],
}


def _attacks(evaluation: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the attacks that were asked for, without those that follow where they find something."""
    names = {row.get("strategy") or row["name"].removesuffix("-recovered") for row in evaluation["attacks"]}
    surrogates = (evaluation.get("origin") or {}).get("surrogates") or []
    return (*sorted(name for name in names if name not in FOLLOWING), *surrogates)


def _measured(run: Run) -> tuple[Any, ...]:
    return tuple(key(run) for key in MEASURES.values())


def _groups(runs: Sequence[Run]) -> list[Group]:
    groups, taken = [], {run.name for run in runs}
    for alike in _partition(runs, _identity):
        name = alike[0].name
        short = name.removesuffix(f"-s{alike[0].seed}")
        if len(alike) > 1 and short not in taken:
            name = short
            taken.add(short)
        groups.append(Group(name, alike))
    return groups


def _identity(run: Run) -> str:
    """Return everything but the seed that decides what the run's network is."""
    settings = {name: value for name, value in run.settings.items() if name not in IRRELEVANT}
    manifest = {name: run.manifest.get(name) for name in ("initial", "data", "objective")}
    # What was given to `ducat.training.train` is not told: two such runs may have nothing in common.
    given = (manifest["initial"] or {}).get("file") == GIVEN_NETWORK or manifest["objective"] is not None
    own = run.name if run.path is None or given else ""
    checkpoint = run.evaluation.get("checkpoint") or "best"
    return json.dumps([settings, manifest, checkpoint, own], sort_keys=True, default=str)


def _pairs(groups: Sequence[Group]) -> list[Pair]:
    flags: dict[str, Tensor] = {}
    for group in groups:
        try:
            measured = [Evaluation.load(run.measured_at) for run in group.runs if run.measured_at is not None]
        except FileNotFoundError:
            continue
        # Of a random network the flags are a majority's, while its accuracy is a mean of shares.
        if len(measured) == len(group.runs) and all(one.robust_shares is None for one in measured):
            flags[group.name] = torch.stack([one.robust for one in measured])
    tests = {
        (first, second): statistics_of.difference(flags[first], flags[second])
        for first, second in combinations(flags, 2)
    }
    adjusted = statistics_of.holm([test.p_value for test in tests.values()])
    at_most = {group.name for group in groups if group.at_most}
    return [
        Pair(
            *names,
            test.difference,
            test.ci95,
            test.p_value,
            corrected,
            test.trainings,
            [name for name in names if name in at_most],
        )
        for (names, test), corrected in zip(tests.items(), adjusted, strict=True)
    ]


def told(pair: Pair) -> str:
    """Return a test in one line."""
    low, high = (100 * end for end in pair.ci95)
    return (
        f"{pair.second} against {pair.first}: robust {100 * pair.difference:+.1f} points, 95 % interval {low:+.1f} to "
        f"{high:+.1f}, p = {pair.p_value:.2g} ({pair.adjusted:.2g} by Holm's method), over "
        f"{'images and trainings' if pair.trainings else 'images alone, of one training each'}"
        + (f"; of {' and '.join(pair.bounds)} robust accuracy is an upper bound only" if pair.bounds else "")
    )


def _verdict(groups: Sequence[Group], pairs: Sequence[Pair]) -> str:
    """Say which line is the most robust, by how much and how surely; an upper bound cannot win."""
    if len(groups) < 2:
        return ""
    bounds = [group.name for group in groups if group.at_most]
    aside = f" Not judged, as upper bounds only: {', '.join(bounds)}." if bounds else ""
    measured = [group for group in groups if not group.at_most]
    if len(measured) < 2:
        return f"none: fewer than two lines have more than an upper bound.{aside}"
    best = max(measured, key=lambda group: group.mean("robust"))
    signs = {(pair.second, pair.first): (pair, 1) for pair in pairs} | {
        (pair.first, pair.second): (pair, -1) for pair in pairs
    }
    sure: list[str] = []
    open_: list[str] = []
    untested: list[str] = []
    for other in measured:
        if other is best:
            continue
        if (best.name, other.name) not in signs:
            untested.append(other.name)
            continue
        pair, sign = signs[best.name, other.name]
        low, high = sorted(100 * sign * end + 0.0 for end in pair.ci95)  # + 0.0: -0.0 is shown as such
        points = f"{100 * sign * pair.difference + 0.0:.1f} points ({low:.1f} to {high:.1f}, p = {pair.adjusted:.2g})"
        text = f"{other.name} by {points}"
        (sure if pair.adjusted < 0.05 else open_).append(text)
    head = f"{best.name} has the highest robust accuracy, {100 * best.mean('robust'):.1f} %"
    parts = [f"more robust than {'; '.join(sure)}"] if sure else []
    parts += [f"not surely more than {'; '.join(open_)}"] if open_ else []
    if untested:
        parts += [f"not tested against {', '.join(untested)}: there are no flags per sample, or the network is random"]
    ones = any(not pair.trainings for pair in pairs if best.name in (pair.first, pair.second))
    limits = " With one training each, this is of these networks, not of their methods." if ones else ""
    return f"{head}: {'; '.join(parts)}. Intervals are of 95 %, p by Holm's method.{limits}{aside}"


def reached(attack: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Tell what an attack left, in % with its 95 % interval; of one that follows others, what it broke besides.

    The accuracy of the latter is no measure of anything: they attack some of the samples that were left standing.
    """
    if (attack.get("strategy") or attack["name"].removesuffix("-recovered")) in FOLLOWING:
        broken = round((evaluation["clean"]["accuracy"] - attack["accuracy"]) * evaluation["samples"])
        return f"broke {broken} that others had left"
    low, high = attack["ci95"]
    return f"{100 * attack['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def stops_early(evaluation: Mapping[str, Any]) -> str:
    """Say why a longer blind attack leaves more than a shorter one, where it does; empty where it does not."""
    blind = {row["name"]: row["accuracy"] for row in evaluation["attacks"] if not row["knows_recovery"]}
    shorter = min((share for name, share in blind.items() if name.startswith(("fgsm", "pgd"))), default=1.0)
    above = [name for name, share in blind.items() if share > shorter and not name.startswith(("fgsm", "pgd"))]
    if not above or not evaluation.get("dummy_classes", True):
        return ""
    return (
        f"Why {' and '.join(above)} leaves more than plain PGD: a blind attack of this kind ends at the first image "
        "that leaves the real class, most often for its own dummy class, which recovery undoes, while PGD goes on. "
        "Blind numbers are no measure of strength."
    )


def folded(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the warnings of runs by kind: the names of those that have it, and what it says of the first of them.

    Two warnings are of one kind if they differ in numbers alone, or up to their first colon in nothing.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        for warning in run.evaluation["warnings"]:
            head = re.sub(r"[\d.,]+", "#", warning.partition(":")[0])
            kinds.setdefault(head, []).append((run.name, warning))
    lines = []
    for found in kinds.values():
        name, warning = found[0]
        names = list(dict.fromkeys(each for each, _ in found))
        if len(names) == 1:
            lines += [(name, each) for _, each in found]
        elif len({each for _, each in found}) == 1:
            lines.append((", ".join(names), warning))
        else:
            lines.append((", ".join(names), f"{warning} (numbers of {name})"))
    return lines


def _differences(runs: Sequence[Run]) -> list[str]:
    """Say what was not measured alike, or not made alike."""
    notes = []
    for what, key in MEASURES.items():
        if len(kinds := _partition(runs, key)) > 1:
            notes.append(f"different {what}: {_listed(kinds)}; do not compare numbers across these tables")
    trained: dict[str, Callable[[Run], Any]] = {
        "training data": lambda run: run.manifest.get("data", {}).get("fingerprint"),
        "code": lambda run: json.dumps([run.manifest.get("ducat"), run.manifest.get("git")]),
        "checkpoints": lambda run: run.evaluation.get("checkpoint"),
    }
    for what, key in trained.items():
        if len(kinds := _partition(runs, key)) > 1:
            notes.append(f"made with different {what}: {_listed(kinds)}")
    by_version = _partition([run for run in runs if _version(run)], _version)
    if len(by_version) > 1:
        notes.append(f"measured by different versions of ducat, whose attacks may differ: {_listed(by_version)}")
    return notes


def _version(run: Run) -> str | None:
    return (run.evaluation.get("origin") or {}).get("ducat")


def _seed_notes(sections: Sequence[Section]) -> list[str]:
    notes = []
    groups = [group for section in sections for group in section.groups]
    for group in groups:
        repeated = sorted({seed for seed in group.seeds if group.seeds.count(seed) > 1})
        if repeated:
            seeds = ", ".join(map(str, repeated))
            notes.append(f"{group.name} has training seed {seeds} more than once: its spread is too small")
    if len({tuple(group.seeds) for group in groups}) > 1:
        listed = "; ".join(f"{group.name}: {', '.join(map(str, group.seeds))}" for group in groups)
        notes.append(f"different training seeds: {listed}")
    return notes


def _state_notes(runs: Sequence[Run]) -> list[str]:
    notes = [
        f"{run.name} is not finished: {len(run.metrics)} of {run.settings['train.epochs']} epochs "
        f"({run.manifest.get('status')})"
        for run in runs
        if run.manifest.get("status", "finished") != "finished"
    ]
    notes += [
        f"{run.name} has been trained on since it was evaluated: "
        f"run `ducat evaluate {RunFolder(run.path).quoted}` again"
        for run in runs
        if run.path is not None and not run.current
    ]
    changed = [run.name for run in runs if (run.manifest.get("git") or {}).get("changed")]
    return notes + ([f"made with uncommitted changes to the code: {', '.join(changed)}"] if changed else [])


def _time_notes(sections: Sequence[Section]) -> list[str]:
    """Say how long training with dummy classes took, against the same method without them on the same machine."""
    groups = [group for section in sections for group in section.groups if group.seconds]
    bases = {_base(group): group for group in groups if group.runs[0].settings["dummy.kind"] == "off"}
    return [
        f"training time against {base.name}: {group.name} {group.seconds / base.seconds:.2f} times "
        f"({group.seconds:.0f} s against {base.seconds:.0f} s, without validation)"
        for group in groups
        if group.runs[0].settings["dummy.kind"] != "off" and (base := bases.get(_base(group))) is not None
    ]


def _base(group: Group) -> str:
    """Return everything that a run with dummy classes and its base method have in common."""
    run = group.runs[0]
    settings = {
        name: value for name, value in run.settings.items() if name not in IRRELEVANT and not name.startswith("dummy.")
    }
    machine = {
        name: run.manifest.get(name) for name in ("initial", "data", "platform", "device", "threads", "processes")
    }
    return json.dumps([settings, machine], sort_keys=True, default=str)


def _listed(kinds: Sequence[Sequence[Run]]) -> str:
    return " / ".join(", ".join(run.name for run in runs) for runs in kinds)


CAPTION = "Accuracy in % with 95 % intervals; sink gap in points = blind - robust."
CAPTION_SEEDS = (
    "Accuracy in %: mean ± sample standard deviation over n training seeds, or for one seed with its 95 % interval; "
    "sink gap in points = blind - robust."
)


def caption(section: Section) -> str:
    """Return what the numbers of a table are."""
    return CAPTION_SEEDS if any(len(group.runs) > 1 for group in section.groups) else CAPTION


def headers(section: Section) -> tuple[str, ...]:
    """Return the columns of a table; the number of seeds only where there are several."""
    seeds = ("n",) if caption(section) == CAPTION_SEEDS else ()
    return "run", *seeds, *QUANTITIES


def cells(section: Section) -> list[tuple[str, ...]]:
    """Return the lines of a table, as text."""
    lines = []
    for group in section.groups:
        seeds = (str(len(group.runs)),) if len(headers(section)) > 1 + len(QUANTITIES) else ()
        lines.append((group.name, *seeds, *(_cell(group, quantity) for quantity in QUANTITIES)))
    return lines


def _cell(group: Group, quantity: str) -> str:
    mean, spread = f"{100 * group.mean(quantity):.1f}", group.spread(quantity)
    if quantity == "robust" and group.at_most:
        mean = f"at most {mean}"
    if spread is not None:
        return f"{mean} ± {100 * spread:.1f}"
    if quantity == "sink gap":
        return mean
    low, high = group.runs[0].ci95(quantity)
    return f"{mean} [{100 * low:.1f}, {100 * high:.1f}]"


class Table(NamedTuple):
    """A table as text."""

    caption: str
    headers: Sequence[str]
    cells: Sequence[Sequence[str]]


def tables(section: Section) -> list[Table]:
    """Return the tables of a section: accuracies and, where refusing was measured, what a reject option achieves."""
    accuracies = Table(f"{section.title}. {caption(section)}", headers(section), cells(section))
    refusals = [
        (run.name, *_refusal(each["signal"], row, refusing_at_most(run.evaluation), rejection["held_out"]))
        for run in section.runs
        if (rejection := run.evaluation.get("rejection"))
        for each in rejection["signals"]
        for row in each["rows"]
    ]
    return [accuracies, *([Table(REFUSING, REFUSALS, refusals)] if refusals else [])]


def refusing_at_most(evaluation: Mapping[str, Any]) -> bool:
    """Tell whether what refusing withstands is an upper bound only; what hides gradients of the class hides these."""
    return bool(evaluation.get("at_most") or (evaluation.get("rejection") or {}).get("at_most"))


REFUSING = (
    "A classifier that may refuse, in % of test images, with 95 % intervals. Benign: images that are refused, accepted "
    "with the right class, accepted with a wrong one. Robust: no image in the ball was found that is accepted with a "
    "wrong class. Served: robust, and the benign image accepted with the right class. Denied: an attacker can get the "
    "image refused or wrong, within a quarter of eps, a half of it, all of it. Share: of the correctly classified "
    "held-out images, how many may be refused; 'of these': of the evaluated images themselves, which flatters."
)
REFUSALS = ("run", "signal", "share", "benign", "robust", "served", "denied")


def _refusal(signal: str, row: Mapping[str, Any], at_most: bool, held_out: bool) -> tuple[str, ...]:
    benign = " / ".join(f"{100 * row[f'clean_{outcome}']['share']:.1f}" for outcome in ("refused", "right", "wrong"))
    most, least = ("at most ", "at least ") if at_most else ("", "")
    sure = (
        f"{most}{100 * row[name]['share']:.1f} [{100 * row[name]['ci95'][0]:.1f}, {100 * row[name]['ci95'][1]:.1f}]"
        for name in ("robust", "served")
    )
    denied = " / ".join(f"{100 * denial['share']:.1f}" for denial in row["denial"])
    share = f"{100 * row['reject']:g}" + ("" if held_out else " of these")
    return signal, share, benign, *sure, least + denied


def to_markdown(comparison: Comparison) -> str:
    """Return the tables as Markdown."""
    parts = []
    for table in (table for section in comparison.sections for table in tables(section)):
        lines = [table.headers, ("---",) * len(table.headers), *table.cells]
        text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        parts.append(f"{table.caption}\n\n{text}\n")
    parts += ["".join(f"- {note}\n" for note in comparison.notes)] if comparison.notes else []
    return "\n".join(parts)


LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: f"\\{character}" for character in "&%$#_{}"
}


def to_latex(comparison: Comparison) -> str:
    """Return the tables as LaTeX, for the booktabs package."""

    def line(texts: Sequence[str]) -> str:
        return " & ".join("".join(LATEX.get(character, character) for character in text) for text in texts) + r" \\"

    parts = [r"% needs \usepackage{booktabs}", *(f"% {note}" for note in comparison.notes)]
    for table in (table for section in comparison.sections for table in tables(section)):
        parts += [
            r"\begin{table}",
            rf"\caption{{{line([table.caption])[:-3]}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.headers) - 1)}}}",
            r"\toprule",
            line(table.headers),
            r"\midrule",
            *map(line, table.cells),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(parts) + "\n"


def to_csv(comparison: Comparison) -> str:
    """Return a line per run, shares in [0, 1], with everything that tells how it was measured."""
    rows = []
    for section in comparison.sections:
        for group in section.groups:
            for run in group.runs:
                evaluation = run.evaluation
                row: dict[str, Any] = {"run": run.name, "group": group.name, "training_seed": run.seed}
                row |= {name: evaluation[name] for name in ("data", "samples", "suite", "seed")}
                row |= {name: evaluation.get(name, "") for name in ("checkpoint", "fingerprint")}
                row |= _ball(evaluation)
                for quantity in QUANTITIES[:-1]:
                    low, high = run.ci95(quantity)
                    row |= {quantity: run.share(quantity), f"{quantity}_low": low, f"{quantity}_high": high}
                row |= {"robust_at_most": evaluation.get("at_most", False)}
                row |= {"sink_gap": run.share("sink gap"), "warnings": "; ".join(evaluation["warnings"])}
                rows.append(row | _refusal_columns(evaluation))
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _refusal_columns(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {"refusing_at_most": refusing_at_most(evaluation)} if evaluation.get("rejection") else {}
    for each in (evaluation.get("rejection") or {"signals": []})["signals"]:
        for row in each["rows"]:
            name = f"{each['signal']}_{row['reject']:g}"
            columns[f"{name}_threshold"] = row["threshold"]
            for quantity in ("clean_refused", "clean_right", "clean_wrong", "robust", "served"):
                columns[f"{name}_{quantity}"] = row[quantity]["share"]
            columns |= {f"{name}_denied_{denial['eps']:g}": denial["share"] for denial in row["denial"]}
    return columns


def _ball(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {"norm": evaluation["threat"]["norm"], "eps": evaluation["threat"]["eps"]}


TABLES: dict[str, Callable[[Comparison], str]] = {"csv": to_csv, "markdown": to_markdown, "latex": to_latex}
