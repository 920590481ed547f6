"""Networks of the zoo as cards and as a table: as they were measured, or attacked here."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ducat import data, zoo
from ducat.config import Config
from ducat.evaluation import evaluate
from ducat.reporting.compare import Comparison, Run, compare
from ducat.runs import RunFolder

AT_HAND = "digits"  # data that need no preparing: scikit-learn brings them


def _names(names: Sequence[str]) -> list[str]:
    """Return the names without "zoo:"; where none is given, those that come with the package."""
    chosen = [name.removeprefix(zoo.PREFIX) for name in names]
    return chosen or [name for name, entry in zoo.NETWORKS.items() if entry.repository is None]


def at_hand() -> list[str]:
    """Return the names of the networks that come with the package and can be evaluated on any machine."""
    return [name for name in _names(()) if zoo.card(name)["manifest"]["data"]["name"] == AT_HAND]


def cards(names: Sequence[str]) -> Iterator[str]:
    """Yield a paragraph for each network: what it is, what it was trained on, and the commands that make it.

    Raises:
        ValueError: if there is no network of a name.
        OSError: if one is not here and cannot be fetched.
    """
    for name in _names(names):
        known = zoo.card(name)
        manifest = known["manifest"]
        lines = [
            f"{zoo.PREFIX}{name}: {zoo.find(name).about}; {manifest['data']['title']}, "
            f"{manifest['data']['train']} training images, data {manifest['data']['fingerprint'][:19]}..., "
            f"file sha256:{zoo.find(name).sha256[:12]}...",
        ]
        if names:
            lines += [f"  {command}" for command in known["made_by"]]
        yield "\n".join(lines)


def _run(name: str, evaluation: dict[str, Any] | None = None) -> Run:
    known = zoo.card(name)
    settings = Config.from_yaml(_config(name)).flat()
    return Run(name, None, settings, known["manifest"], known["metrics"], evaluation or known["evaluation"])


def _config(name: str) -> Path:
    return RunFolder(zoo.folder(name)).config_path


def comparison(names: Sequence[str]) -> Comparison:
    """Return networks side by side with the numbers that they come with."""
    return compare([_run(name) for name in _names(names)])


def attacked(
    names: Sequence[str],
    suite: str = "quick",
    samples: int | None = None,
    progress: Callable[[str], Callable[[str], None]] | None = None,
) -> Comparison:
    """Attack networks, and return them side by side; nothing is written.

    Args:
        names: of the networks, with or without "zoo:"; those `at_hand` where there is none.
        suite: which attacks.
        samples: how many test images, a fixed stratified subset; all by default.
        progress: makes, from a name, what is called with each attack on that network.
    """
    runs = []
    for name in _names(names) if names else at_hand():
        folder = RunFolder.open(zoo.PREFIX + name)
        config = folder.config
        folder.dataset()  # refuses other images under the name of those that it was trained on
        x, y = data.load_test(config.data.name, samples, config.data.root)
        classes = folder.read("best")[1]["model"]["num_classes"]
        told = progress(name) if progress else None
        found = evaluate(
            folder.load(),
            x,
            y,
            config.threat.ball,
            suite,
            num_classes=classes,
            data=folder.manifest["data"]["title"],
            progress=told or (lambda attack: None),
        )
        measured = dataclasses.replace(found, checkpoint="best")
        runs.append(_run(name, measured.to_dict()))
    return compare(runs)
