"""What was measured, as tables and a figure."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.size.settings import SETTINGS, Setting
from ducat import checkpoint
from ducat.data.images import stratified_order
from ducat.evaluation.engine import FOLLOWING
from ducat.evaluation.statistics import holm, mcnemar
from ducat.evaluation.studies import always_failed
from ducat.reporting import plots
from ducat.runs import RunFolder

HEAD = """# The paper's table, larger: its rows

Written by `python -m benchmarks.size --table results{options}`. [size.md](size.md): how they were measured, and what
they say. Accuracies in %, with 95 % intervals.
"""
FIRST = "0"  # the seed that goes without saying
BY_SUM = "by-sum"  # name of the evaluation with the other recovery
SUITES = {
    ("light", "linf"): "The suite `light`",
    ("standard", "linf"): "The suite `standard`: with AutoAttack, blind and knowing recovery",
    ("light", "l2"): "The suite `light` in L2, a ball that no network was trained in",
}


@dataclass(frozen=True)
class Measured:
    """A row, and the contents of its evaluations by the names of their files.

    Attributes:
        kind: what it was trained with.
        seed: of base and row, in one word.
        folder: of the run.
        evaluations: the contents.
    """

    kind: str
    seed: str
    folder: RunFolder
    evaluations: Mapping[str, Mapping[str, Any]]

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.kind + (f", seed {self.seed}" if self.seed != FIRST else "")

    @property
    def alike(self) -> bool:
        """Whether its seed is that of its base."""
        return "-" not in self.seed

    def by(self, suite: str, norm: str) -> Mapping[str, str]:
        """Return names of the evaluations of a suite in a ball, by title: of one title the one on most images."""
        found: dict[str, str] = {}
        for name, content in sorted(self.evaluations.items(), key=lambda pair: pair[1]["samples"]):
            if (content["suite"], content["threat"]["norm"]) == (suite, norm):
                found[self.title + (", by logsumexp" if name == BY_SUM else "")] = name
        return found


def table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return evaluations of one suite as a table in Markdown, in %, with what each attack leaves by itself."""
    # An attack that a network without dummy classes has once, another has twice. What follows attacks few images.
    names = (attack["name"] for _, content in rows for attack in content["attacks"])
    attacks = [name for name in dict.fromkeys(names) if name.removesuffix("-recovered") not in FOLLOWING]
    text = [
        f"| network | images | clean | blind | robust | sink gap | {' | '.join(attacks)} |",
        "| --- | ---: | ---: | ---: | --- | ---: |" + " ---: |" * len(attacks),
    ]
    for title, content in rows:
        left = {attack["name"]: f"{100 * attack['accuracy']:.1f}" for attack in content["attacks"]}
        low, high = content["robust_ci95"]
        robust = f"{'at most ' * content['at_most']}{100 * content['robust']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        text.append(
            f"| {title} | {content['samples']} | {100 * content['clean']['accuracy']:.1f} | "
            f"{100 * content['blind']:.1f} | {robust} | {100 * content['sink_gap']:.1f} | "
            + " | ".join(left.get(name, "") for name in attacks)
            + " |"
        )
    return "\n".join(text) + "\n"


def paired(rows: Sequence[Measured]) -> str:
    """Return differences between rows on the same images, of the suite `light` in L-inf, as a table; "" of one row."""
    right, alike = {}, {}
    for row in rows:
        name = row.by("light", "linf").get(row.title)
        if name is not None:
            right[row.title] = load_file(row.folder.evaluations_path / f"{name}.safetensors")
            alike[row.title] = row.seed, row.evaluations[name]["fingerprint"]
    pairs = [(one, other) for one, other in combinations(right, 2) if alike[one] == alike[other]]
    if not pairs:
        return ""
    cells: list[list[str]] = [[other, one] for one, other in pairs]
    for kind in ("clean", "robust"):
        more = [int((right[other][kind] & ~right[one][kind]).sum()) for one, other in pairs]
        fewer = [int((right[one][kind] & ~right[other][kind]).sum()) for one, other in pairs]
        sure = holm([mcnemar(*counts) for counts in zip(more, fewer, strict=True)])
        for line, gained, lost, p_value, (one, _) in zip(cells, more, fewer, sure, pairs, strict=True):
            line += [f"{100 * (gained - lost) / len(right[one][kind]):+.1f}", f"{p_value:.2g}"]
    head = "| network | against | clean | p | robust | p |\n| --- | --- | ---: | ---: | ---: | ---: |\n"
    return head + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def fewer(rows: Sequence[Measured], samples: int) -> str:
    """Return what is left of the first `samples` images of those that rows were attacked on, as a table; "" of none.

    An evaluation on fewer images takes just these: the subset of the same test images.
    """
    text = []
    for row in rows:
        name = row.by("light", "linf").get(row.title)
        if name is not None and row.evaluations[name]["samples"] > samples:
            flags = load_file(row.folder.evaluations_path / f"{name}.safetensors")
            order = stratified_order(row.folder.dataset().test.labels)
            attacked = order[: row.evaluations[name]["samples"]].sort().values
            these = torch.isin(attacked, order[:samples])
            shares = [f"{100 * flags[kind][these].double().mean():.1f}" for kind in ("clean", "robust")]
            text.append(f"| {row.title} | {int(these.sum())} | {' | '.join(shares)} |\n")
    head = "| network | images | clean | robust |\n| --- | ---: | ---: | ---: |\n"
    return head + "".join(text) if text else ""


def trained(rows: Sequence[Measured]) -> str:
    """Return what each training took, as a table in Markdown."""
    text = [
        "| network | epochs | training loss, last epoch | minutes | threads | number format |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        manifest, last = row.folder.manifest, row.folder.metrics[-1]
        text.append(
            f"| {row.title} | {row.folder.config.train.epochs} | {last['loss']:.3f} | {manifest['seconds'] / 60:.0f} | "
            f"{manifest['threads']} | {manifest['precision']} |"
        )
    return "\n".join(text) + "\n"


def _measured_by(folder: RunFolder) -> tuple[str, int]:
    content = json.loads(folder.evaluation_path.read_text())
    return content["suite"], content["samples"]


def section(name: str, setting: Setting, rows: Sequence[Measured]) -> str:
    """Return all tables of one setting in Markdown."""
    text = [f"## Setting `{name}`\n", f"{setting.about}.\n", trained(rows)]
    for (suite, norm), title in SUITES.items():
        found = [(heading, row.evaluations[name]) for row in rows for heading, name in row.by(suite, norm).items()]
        if found:
            text += [f"### {title}\n", table(found)]
    few = fewer(rows, setting.light)
    if few:
        text += [f"### Of these images, the {setting.light} that the setting itself attacks\n", few]
    differences = paired(rows)
    if differences:
        title = "### Differences on the same images\n"
        test = "p by McNemar's exact test, by Holm's method for the number of pairs"
        text += [title, f"In points, suite `light`; {test}.\n", differences]
    # The evaluation that speaks for a run is its strongest; not all rows may have it yet.
    first = [row for row in rows if row.alike]
    counts = Counter(_measured_by(row.folder) for row in first)
    several = [how for how, number in counts.items() if number > 1]
    text += ["### Samples that always fail\n"] * bool(several)
    for how in several:
        alike = [row for row in first if _measured_by(row.folder) == how]
        study = always_failed([row.folder.path for row in alike])
        text.append(f"{study.sheet().title}. Suite `{how[0]}`: {'; '.join(row.title for row in alike)}.\n")
    return "\n".join(text)


def write(made: Mapping[str, Sequence[Measured]], out: Path, seed: int = 0) -> None:
    """Write the tables and figures of the settings, all rows from bases of one seed, and everything that was measured.

    The first seed's files have plain names: `size-tables.md`, `size.json`. Those of others end in `-seed-N`.
    """
    out.mkdir(exist_ok=True)
    ending, options = (f"-seed-{seed}", f" --base-seed {seed}") if str(seed) != FIRST else ("", "")
    text, content = [HEAD.format(options=options)], {}
    for name, rows in made.items():
        text.append(section(name, SETTINGS[name], rows))
        firsts = (row for row in rows if row.alike)
        shown = {title: [row.evaluations[one]] for row in firsts for title, one in row.by("light", "linf").items()}
        images = {content["fingerprint"] for (content,) in shown.values()}
        if len(shown) > 1 and len(images) == 1:  # the images differ in how hard they are
            figure = plots.trade_off(shown, SETTINGS[name].about.partition(";")[0])
            plots.save(figure, out / f"size-{name}{ending}.svg")
        content[name] = {
            row.title: {
                "evaluations": row.evaluations,
                "manifest": row.folder.manifest,
                "metrics": row.folder.metrics,
                "config": row.folder.config_path.read_text(),
            }
            for row in rows
        }
    checkpoint.write_text(out / f"size{ending}.json", json.dumps(content) + "\n")
    checkpoint.write_text(out / f"size-tables{ending}.md", "\n".join(text))
