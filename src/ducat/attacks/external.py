"""Attacks of other libraries, behind the signature of ours: AutoAttack, Square, and the L2 attacks C&W and DDN.

They attack a plain classifier, images to one logit per class. For a network with dummy classes that is either
`RecoveredClassifier(network)`, the classifier that is deployed, or the network itself, when the attacker is blind.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat.attacks.pgd import attackable, recordable
from ducat.threat import ThreatModel

if TYPE_CHECKING:
    from foolbox.attacks.base import MinimizationAttack
    from pyautoattack import AutoAttack

Batch = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]

TARGETED_DLR = 4  # classes: the targeted loss of AutoAttack divides by a difference of the first, third and fourth
SQUARE_L1 = 5  # pixels: in l1 Square begins with a grid of five tiles a side


def autoattack(
    model: nn.Module,
    x: Batch,
    y: Labels,
    threat: ThreatModel,
    generator: torch.Generator | None = None,
) -> Batch:
    """AutoAttack in its standard version (Croce & Hein 2020, arXiv 2003.01690), from `pyautoattack`.

    It runs APGD on cross-entropy, targeted APGD, targeted FAB and Square, each on the samples that withstood the ones
    before. With fewer than 4 classes targeted APGD is left out, since its loss needs 4; in l1 and images of less than 5
    pixels a side Square is, since it needs 5.

    Args:
        model: maps images in [0, 1], shape (B, channels, H, W), to logits, shape (B, K).
        x: benign images.
        y: labels, shape (B,).
        threat: the ball; its steps and step size are not used.
        generator: source of the seed; PyTorch's global one by default.

    Returns:
        Images in the ball, of x's shape: one that fools the model where one was found, else the benign image.
    """
    if not len(x):
        return x.clone()
    with _guarded(model, generator) as seed:
        x, y = recordable(x), recordable(y)
        attack = _autoattack(model, x, threat, seed)
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        if classes < TARGETED_DLR:
            attack.attacks_to_run.remove("apgd-t")
        if threat.norm == "l1" and min(x.shape[-2:]) < SQUARE_L1:
            attack.attacks_to_run.remove("square")
        found, _ = attack.run_standard_evaluation(x.float().contiguous(), y, batch_size=len(x))
    return threat.project(found.to(x), x)


def square(
    model: nn.Module,
    x: Batch,
    y: Labels,
    threat: ThreatModel,
    generator: torch.Generator | None = None,
    *,
    queries: int = 1000,
) -> Batch:
    """Square, a random search that uses no gradients (Andriushchenko et al. 2020, arXiv 1912.00049).

    Where it does better than gradients, the gradients mislead. Arguments and result as for `autoattack`; `queries` is
    the number of passes through the model.

    Raises:
        ValueError: if the threat model is l1 and the images have less than 5 pixels a side.
    """
    if threat.norm == "l1" and min(x.shape[-2:]) < SQUARE_L1:
        raise ValueError(f"Square in l1 needs images of at least {SQUARE_L1} pixels a side, not {tuple(x.shape[-2:])}")
    if not len(x):
        return x.clone()
    with _guarded(model, generator) as seed:
        x, y = recordable(x), recordable(y)
        attack = _autoattack(model, x, threat, seed).square
        attack.n_queries = queries
        found = attack.perturb(x.float().contiguous(), y)
    return threat.project(found.to(x), x)


def carlini_wagner(
    model: nn.Module,
    x: Batch,
    y: Labels,
    threat: ThreatModel,
    generator: torch.Generator | None = None,
    *,
    steps: int = 200,
    searches: int = 6,
) -> Batch:
    """The L2 attack of Carlini & Wagner (2017, arXiv 1608.04644), from `foolbox`.

    It looks for the closest image that fools the model. Arguments and result as for `autoattack`; `steps` is the
    number of Adam steps in each of the `searches` rounds of the search for its constant.

    Raises:
        ValueError: if the threat model is not l2.
    """
    from foolbox.attacks import L2CarliniWagnerAttack

    attack = L2CarliniWagnerAttack(binary_search_steps=searches, steps=steps, initial_const=1.0)
    return _closest(attack, model, x, y, threat, generator)


def ddn(
    model: nn.Module,
    x: Batch,
    y: Labels,
    threat: ThreatModel,
    generator: torch.Generator | None = None,
    *,
    steps: int = 100,
) -> Batch:
    """Decoupled direction and norm, a fast search for the closest image in L2 (Rony et al. 2019, arXiv 1811.09600).

    From `foolbox`. Arguments and result as for `autoattack`.

    Raises:
        ValueError: if the threat model is not l2.
    """
    from foolbox.attacks import DDNAttack

    return _closest(DDNAttack(init_epsilon=threat.eps, steps=steps), model, x, y, threat, generator)


def _autoattack(model: nn.Module, x: Tensor, threat: ThreatModel, seed: int) -> "AutoAttack":
    from pyautoattack import AutoAttack

    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm]
    attack = AutoAttack(Apart(model, x.device), norm=norm, eps=threat.eps, seed=seed, device=x.device)
    # What AutoAttack has to say about the model, `ducat.evaluate` says in its own warnings.
    silent = logging.Logger("autoattack", level=logging.CRITICAL + 1)
    attack.logger = attack.apgd.logger = attack.apgd_targeted.logger = silent
    return attack


class Apart(nn.Module):
    """A network whose random numbers are a stream apart from that of who asks it.

    Libraries draw from PyTorch's global generators. A network that seeds these whenever it is asked, so that its noise
    is always the same, would let a random search try one step again and again.

    Args:
        model: the network.
        device: where it is.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # its own alone: layers inside may be in another mode than what holds them
        self.generators = [torch.random.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.generators.append(torch.cuda.default_generators[index])
        self.states = self._states()

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _go_on(self, states: list[Tensor]) -> list[Tensor]:
        """Go on with other streams, and return where those are that are left."""
        left = self._states()
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
        return left

    def forward(self, x: Tensor) -> Tensor:
        others = self._go_on(self.states)
        try:
            logits: Tensor = self.model(x)
            return logits
        finally:
            self.states = self._go_on(others)


def _closest(
    attack: "MinimizationAttack",
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the closest image that the attack finds, drawn into the ball, where it still fools the model there.

    The search ends a little beyond the closest image. Where that is a little outside the ball, the way back to it
    usually costs nothing.
    """
    from foolbox import PyTorchModel
    from foolbox.criteria import Misclassification

    if threat.norm != "l2":
        raise ValueError(f"{type(attack).__name__} measures distances in l2, but the threat model is {threat.norm}")
    if not len(x):
        return x.clone()
    with _guarded(model, generator):
        x, y = recordable(x), recordable(y)
        classifier = PyTorchModel(model, bounds=(0, 1), device=x.device)
        with torch.enable_grad():
            found = attack.run(classifier, x, Misclassification(y))
        found = threat.project(found, x)
        with torch.no_grad():
            fooled = model(found).argmax(1) != y
    return torch.where(fooled.view(-1, *[1] * (x.ndim - 1)), found, x)


@contextmanager
def _guarded(model: nn.Module, generator: torch.Generator | None) -> Iterator[int]:
    """Keep the libraries from leaving anything changed: the model, the global generator, the tracing of Python.

    They also take it for granted that new tensors are float32.
    """
    device = generator.device if generator is not None else "cpu"
    seed = int(torch.randint(2**31, (), generator=generator, device=device))
    trace, dtype = sys.gettrace(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with attackable(model), torch.random.fork_rng():
            torch.manual_seed(seed)
            yield seed
    finally:
        torch.set_default_dtype(dtype)
        sys.settrace(trace)
