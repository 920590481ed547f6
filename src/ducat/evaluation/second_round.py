"""The second round: where something may hide the gradients, go on and find the lower number.

It attacks what is still standing: through networks that decide alike and hide nothing, along the gradients of softened
networks, of classifiers inside the network and of their mixtures, of a surrogate distilled from the network's own
answers, and by searches that need no gradient. Every image is judged by the network itself.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ducat.attacks import external
from ducat.attacks.adaptive import SilentDummies, adaptive
from ducat.attacks.guides import Rescaled, Softened, classifiers_inside, mixtures, narrowed
from ducat.attacks.pgd import pgd
from ducat.attacks.queries import decisions
from ducat.attacks.surrogate import distil
from ducat.dummy import RecoveredClassifier
from ducat.evaluation.audit import clean, measure_signs
from ducat.evaluation.result import SecondRound
from ducat.evaluation.subject import Averaged, Measured, spread
from ducat.seeding import generator
from ducat.threat import ThreatModel

STEPS = 50
RANDOM_GUIDES = 5  # of a random network, whose guides cost as many passes as there are draws
SIGNS = 32  # samples that an equal network is examined with
QUERIES = 5000
DECISIONS = 2000
MAXIMISED = ("cross-entropy", "margin")
Judge = Callable[[Tensor, Tensor], Tensor]
Attack = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, labels and what was kept, to images


@dataclass
class Scene:
    """What is still to be attacked, and with what.

    Attributes:
        network: the network as it was given.
        leads: every way in which an image may meet it, 2C or C outputs each.
        deployed: makes of such a view the classifier that is deployed, with C logits.
        guess: the classifier that is deployed in the form that is fastest to ask, C logits.
        judge: `(images, labels)` to whether the network itself classifies each correctly.
        x: benign images of the samples to attack, on the network's device.
        y: their labels.
        kept: for each the image that came closest.
        threat: the ball.
        num_classes: C.
        seed: of the random starts.
        draws: passes that a gradient is averaged over.
        seconds: the time allowed; None for no limit.
    """

    network: Measured
    leads: Sequence[nn.Module]
    deployed: Callable[[nn.Module], nn.Module]
    guess: nn.Module
    judge: Judge
    x: Tensor
    y: Tensor
    kept: Tensor
    threat: ThreatModel
    num_classes: int
    seed: int
    draws: int = 1
    seconds: float | None = None
    began: float = field(default_factory=time.perf_counter)

    def averaged(self, model: nn.Module) -> nn.Module:
        """Return a guide whose gradient is averaged over draws, where the network is random."""
        return Averaged(model, self.draws) if self.draws > 1 else model

    def late(self) -> bool:
        """Tell whether the time is up."""
        return self.seconds is not None and time.perf_counter() - self.began > self.seconds


def guides(scene: Scene) -> list[tuple[str, nn.Module]]:
    """Return networks of C logits whose gradients are tried in place of the network's own."""
    few = scene.x[: scene.network.batch_size or 2]
    parts = classifiers_inside(scene.network, scene.network.model, few, scene.num_classes)
    inside = [(f"inside {name}", narrowed(part, scene.num_classes)) for name, part in parts]
    soft = [("softened", scene.deployed(Softened(lead))) for lead in scene.leads]
    smooth = [("smoothed", scene.deployed(Softened(lead, smooth=True))) for lead in scene.leads]
    soft_inside = [(f"softened {name}", Softened(part, smooth=True)) for name, part in inside]
    found = [*smooth, *inside, *mixtures([part for _, part in inside]), *soft, *soft_inside]
    if scene.draws > 1:
        found = found[:RANDOM_GUIDES]
    return [(name, scene.averaged(guide)) for name, guide in found]


def second_round(scene: Scene, settle: bool, progress: Callable[[str], None]) -> tuple[SecondRound, Tensor]:
    """Attack what is still standing.

    Args:
        scene: what to attack.
        settle: whether an equal network without signs settles the number: the network is neither random nor
            batch-dependent nor stateful nor mode-dependent.
        progress: told of each guide and search as it starts.

    Returns:
        What was done, and the images: for each sample one that the network classifies wrongly, or the one kept before.
    """
    standing = scene.judge(scene.kept, scene.y) & scene.judge(scene.x, scene.y)
    samples, kept = int(standing.sum()), scene.kept.clone()
    broken: dict[str, int] = {}

    def attack(name: str, run: Attack) -> None:
        """Let `run(x, y, kept)` attack the standing samples, and note which of them the network gets wrong."""
        rows = standing.nonzero().squeeze(1)
        if not len(rows):
            return
        progress(f"second round, {name}")
        found = run(scene.x[rows], scene.y[rows], kept[rows]).detach()
        fooled = ~scene.judge(found, scene.y[rows]) & scene.threat.allows(found, scene.x[rows])
        kept[rows[fooled]] = found[fooled]
        standing[rows[fooled]] = False
        broken[name] = broken.get(name, 0) + int(fooled.sum())

    def noise(name: str) -> torch.Generator:
        return generator(scene.seed, "second round", name)

    through = None
    if settle and samples:
        for name, equal in _equals(scene):
            ensemble = _ensemble(equal, scene.threat, noise(name))
            attack(f"through {name}", ensemble)
            if _alike(equal, scene.guess, torch.cat([scene.x, kept])):
                through = name
                break
    shallow = sum(broken.values())
    rest: list[tuple[str, Attack]] = []
    if samples:
        rest = [(name, partial(_follow, guide, scene, noise(name))) for name, guide in guides(scene)]
        rest += _searches(scene, noise)
    for name, run in rest:
        if scene.late():
            break
        attack(name, run)
    # An equal network settles the number only if nothing else broke more: what showed the sign may be a search.
    settled = through if not scene.late() and sum(broken.values()) == shallow else None
    return SecondRound(samples, broken, time.perf_counter() - scene.began, settled, scene.late()), kept


def _equals(scene: Scene) -> Iterator[tuple[str, nn.Module]]:
    """Yield networks of C logits that decide as the network does, of every image there is, and show no sign."""
    few = scene.x[: scene.network.batch_size or 2]
    parts = classifiers_inside(scene.network, scene.network.model, few, scene.num_classes)
    choices = [
        ("the network itself", scene.guess),
        ("its logits, rescaled", Rescaled(scene.guess)),
        *((f"the logits of {name}", narrowed(part, scene.num_classes)) for name, part in parts),
    ]
    images = torch.cat([scene.x, scene.kept, scene.threat.random_start(scene.x, generator(scene.seed, "equal"))])
    right = scene.judge(scene.x, scene.y).nonzero().squeeze(1)
    right = right[spread(len(right), SIGNS)]
    for name, choice in choices:
        if scene.late():
            return
        if not _alike(choice, scene.guess, images):
            continue
        nothing = torch.zeros(len(right), dtype=torch.bool, device=scene.x.device)
        view = SilentDummies(choice)
        signs, _ = measure_signs(
            view, [], scene.x[right], scene.y[right], scene.threat, nothing, nothing, scene.seed, queries=0
        )
        if clean(signs):
            yield name, choice


@torch.no_grad()
def _alike(first: nn.Module, second: nn.Module, images: Tensor) -> bool:
    return all(bool((first(part).argmax(1) == second(part).argmax(1)).all()) for part in images.split(500))


def _ensemble(model: nn.Module, threat: ThreatModel, noise: torch.Generator) -> Callable[..., Tensor]:
    return lambda x, y, kept: adaptive(RecoveredClassifier(SilentDummies(model)), x, y, threat, "standard", noise)


def _follow(guide: nn.Module, scene: Scene, noise: torch.Generator, x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """Go along a guide's gradient from a random point and from the image that came closest, on two objectives."""
    found, standing = kept.clone(), torch.arange(len(x), device=x.device)
    ball = replace(scene.threat, steps=STEPS)
    for objective in MAXIMISED:
        for start in (None, found):
            if not len(standing):
                return found
            images = pgd(
                guide,
                x[standing],
                y[standing],
                ball,
                objective,
                generator=noise,
                start=None if start is None else start[standing],
                # Of a random network the image counts that is wrong most often, not the first that is wrong once.
                keep="first" if scene.draws == 1 else "best",
                adaptive_steps=True,
                judge=scene.guess,
            )
            fooled = ~scene.judge(images, y[standing])
            found[standing[fooled]] = images[fooled]
            standing = standing[~fooled]
    return found


def _searches(scene: Scene, noise: Callable[[str], torch.Generator]) -> Iterator[tuple[str, Attack]]:
    """Yield what needs no gradient of the network."""

    def surrogate(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
        student = distil(scene.guess, scene.x, scene.y, scene.threat, noise("surrogate"), extra=scene.kept)
        return _follow(student, scene, noise("transfer"), x, y, kept)

    def score(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
        return external.square(scene.guess, x, y, scene.threat, noise("square"), queries=QUERIES)

    def decision(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
        return decisions(scene.guess, x, y, scene.threat, noise("decisions"), queries=DECISIONS)

    yield "surrogate", surrogate
    if scene.draws > 1:  # searches are led astray by luck
        return
    yield f"Square with {QUERIES} queries", score
    yield f"decisions alone, {DECISIONS} queries", decision
