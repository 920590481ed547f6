"""What the attacks of other libraries leave of the zoo's networks on digits, beside what ours leave.

    python -m benchmarks.others --out results/others.md [--samples 500] [--seed 0]

Every attack is tried twice: on the classifier that is deployed, recovered to C classes, and blind, on the network as a
plain classifier of its 2C outputs. Its images are then drawn into the ball, and all are counted alike: by whether the
deployed classifier is right on them. foolbox and AutoAttack (`pyautoattack`) come with ducat. torchattacks is measured
where it is installed: `pip install --no-deps torchattacks==3.5.1`.
"""

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.training_step import table
from ducat import RecoveredClassifier, ThreatModel, checkpoint, zoo
from ducat.attacks import external
from ducat.attacks.adaptive import SilentDummies, adaptive
from ducat.attacks.pgd import attackable
from ducat.data import load_test
from ducat.dummy import dummy_head
from ducat.reporting.zoo import at_hand
from ducat.runs import RunFolder

DISTRIBUTIONS = {"ducat": "ducat-robust"}
Perturb = Callable[[nn.Module, Tensor, Tensor, ThreatModel, int], Tensor]


class Row(NamedTuple):
    """An attack of a library: of a classifier, images, labels, the ball and a seed it makes images."""

    library: str
    attack: str
    perturb: Perturb


def _foolbox(name: str, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
    import foolbox

    classifier = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, images, _ = getattr(foolbox.attacks, name)()(classifier, x, y, epsilons=threat.eps)
    return images


def _torchattacks_pgd(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
    import torchattacks

    return torchattacks.PGD(model, eps=threat.eps, alpha=threat.eps / 4, steps=20)(x, y)


def _torchattacks_autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
    import torchattacks

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    return torchattacks.AutoAttack(model, eps=threat.eps, n_classes=classes, seed=seed)(x, y)


def _autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
    return external.autoattack(model, x, y, threat, torch.Generator().manual_seed(seed))


def _ours(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
    # A network that is not recovered stands for all of its outputs as classes.
    view = model if isinstance(model, RecoveredClassifier) else SilentDummies(model)
    return adaptive(view, x, y, threat, "standard", torch.Generator().manual_seed(seed))


ROWS = (
    Row("foolbox", "LinfPGD, its own 40 steps", partial(_foolbox, "LinfPGD")),
    Row("foolbox", "LinfDeepFoolAttack", partial(_foolbox, "LinfDeepFoolAttack")),
    Row("torchattacks", "PGD, 20 steps of eps/4", _torchattacks_pgd),
    Row("torchattacks", "AutoAttack, standard", _torchattacks_autoattack),
    Row("pyautoattack", "AutoAttack, standard", _autoattack),
    Row("ducat", 'ensemble, "standard"', _ours),
)


def measure(name: str, samples: int | None, seed: int) -> list[dict[str, Any]]:
    """Return a row for each attack that is installed, with what it leaves of a network of the zoo."""
    folder = RunFolder.open(zoo.folder(name))
    network, threat = folder.load("best").eval(), folder.config.threat.build(None)
    x, y = load_test(folder.config.data.name, samples, folder.config.data.root)
    deployed = RecoveredClassifier(network) if dummy_head(network) is not None else network
    views = {"recovered": deployed} if deployed is network else {"blind": network, "recovered": deployed}
    standing = dict.fromkeys(views, torch.ones(len(y), dtype=torch.bool))
    found = []
    for library, attack, perturb in ROWS:
        if importlib.util.find_spec(library) is None:
            continue
        importlib.import_module(library)  # before the clock runs
        row = {
            "network": name,
            "library": f"{library} {version(DISTRIBUTIONS.get(library, library))}",
            "attack": attack,
        }
        for knowledge in ("blind", "recovered"):
            if knowledge not in views:
                row |= {knowledge: "", f"seconds, {knowledge}": ""}
                continue
            with attackable(views[knowledge]), torch.random.fork_rng():
                torch.manual_seed(seed)
                began = time.process_time()
                images = threat.project(perturb(views[knowledge], x.clone(), y, threat, seed).detach().float(), x)
                seconds = time.process_time() - began
            with torch.no_grad():
                right = deployed(images).argmax(1) == y
            standing[knowledge] = standing[knowledge] & right
            row |= {knowledge: _percent(right), f"seconds, {knowledge}": f"{seconds:.1f}"}
        found.append(row)
        print(row, flush=True)
    worst = {
        knowledge: _percent(standing[knowledge]) if knowledge in views else "" for knowledge in ("blind", "recovered")
    }
    blank = dict.fromkeys(found[0], "")
    return [*found, {**blank, "network": name, "library": "all of them", "attack": "worst case of each image", **worst}]


def _percent(right: Tensor) -> str:
    return f"{100 * float(right.float().mean()):.1f}"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--samples", type=int, help="test images; all 500 by default")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in at_hand() for row in measure(name, arguments.samples, arguments.seed)]
    samples = arguments.samples or 500
    text = f"""# Attacks of other libraries on the networks of the zoo

Made by `python -m benchmarks.others --out {arguments.out}`: {samples} test images of digits, L-inf 0.2, seed
{arguments.seed}, float32, PyTorch {torch.__version__.partition("+")[0]}, one thread of a CPU. The numbers are what the
*deployed* classifier still gets right, in %, after an attack that was aimed at the network as a plain classifier of 2C
outputs (blind) or at the deployed classifier itself (recovered). Seconds are of a processor. Every attack has the
settings that its library gives it, but for torchattacks' PGD, whose own (10 steps of 2/255) do not fit eps 0.2, and
for the number of classes, which AutoAttack has to be told: of 2C outputs torchattacks' tries all, `pyautoattack` 9.

{table(rows)}
"""
    checkpoint.write_text(arguments.out, text)


if __name__ == "__main__":
    main()
