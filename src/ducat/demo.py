"""Train, attack and compare four networks on real data, offline: the same budget, blind and recovery-aware attacks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, TrainConfig
from ducat.evaluation.runs import evaluate_run
from ducat.reporting import page
from ducat.reporting.compare import Comparison, Run, compare
from ducat.training import Listener, train

EPOCHS = 60
NETWORKS: dict[str, tuple[str, DummyConfig]] = {
    "natural": ("natural", DummyConfig("off")),
    "PGD-AT": ("pgd-at", DummyConfig("off")),
    "DUCAT, published": ("pgd-at", DummyConfig("published", start_epoch=0.5)),
    "DUCAT, recovery-aware": ("pgd-at", DummyConfig("recovery-aware", start_epoch=0.75)),
}


@dataclass
class Demo:
    """What the demo made.

    Attributes:
        folder: where it is.
        evaluations: the contents of evaluation.json by name of the method.
        paths: the run folders, likewise.
        sentences: what the reader is looking at.
    """

    folder: Path
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)

    @property
    def comparison(self) -> Comparison:
        """The runs side by side."""
        return compare([Run.read(path, name) for name, path in self.paths.items()])

    @property
    def sentences(self) -> Sequence[str]:
        """Two sentences that say what the measured numbers show, whatever they are."""
        base, published, aware = list(self.evaluations.values())[1:]
        lost = 100 * published["sink_gap"]
        return (
            f"Dummy classes as published are {_against(published['blind'], base['blind'])} while the attacker does not "
            f"know that predictions are recovered (blind); one who knows takes {lost:.1f} points away, which leaves "
            f"them {_against(published['robust'], base['robust'])} (robust).",
            f"Trained against an attacker who knows, dummy classes are {_against(aware['robust'], base['robust'])} "
            "(robust).",
        )


def _against(accuracy: float, base: float) -> str:
    points = 100 * (accuracy - base)
    return f"{abs(points):.1f} points {'above' if points >= 0 else 'below'} PGD-AT"


def run(
    folder: Path,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    listener: Callable[[str], Listener] | None = None,
    attacks: Callable[[str], Callable[[str], None]] | None = None,
) -> Demo:
    """Train and evaluate the four networks on scikit-learn's digits, and write plot and page.

    Args:
        folder: where the runs, the plot and the page go; it must not exist.
        seed: of everything random.
        epochs: length of each training; dummy classes begin after half of it (published) or three quarters.
        listener: makes the listener to a training from its name.
        attacks: makes, from the name of a method, what is called with each attack on it.

    Raises:
        FileExistsError: if the folder is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists, and nothing is overwritten: give another --out")
    demo = Demo(folder)
    for title, (method, dummy) in NETWORKS.items():
        config = Config(
            data=DataConfig("digits"),
            method=MethodConfig(method),
            dummy=dummy,
            train=TrainConfig(
                epochs=epochs,
                learning_rate=0.3,
                schedule="one-cycle",
                seed=seed,
                validate_every=max(1, epochs // 6),
            ),
        )
        made = train(config, folder / "runs", listener(title) if listener else None)
        demo.evaluations[title] = evaluate_run(
            made, "light", which="last", seed=seed, progress=attacks(title) if attacks else None
        )
        demo.paths[title] = made.path
    comparison = demo.comparison
    page.draw(comparison.sections[0], folder / "trade-off.svg")
    page.page(
        folder / "report.html",
        "Dummy classes on digits: what they do and what they hide",
        comparison,
        text=demo.sentences,
        command=f"ducat demo --out {folder} --seed {seed} --epochs {epochs}",
    )
    return demo
