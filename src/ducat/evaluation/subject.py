"""What is measured: images, labels and a network as people bring them, and what kind of function the network is.

An evaluation needs one function of one image. Before the first attack this room makes one of whatever was given, or
says in a line why it cannot; and it finds out whether the network is random, remembers, lets the images of a batch
meet, or minds how PyTorch runs it.
"""

import collections
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat.attacks.guides import has_hard_steps
from ducat.attacks.pgd import OVERSHOOT
from ducat.data import spooled
from ducat.models.outputs import NoLogitsError, logits_of
from ducat.threat import ThreatModel

PROBED = 16  # benign images that the network is examined with, and as many of each kind of disturbed ones
REPEATS = 8  # passes that a random network's noise is measured with
CHANGED = {torch.float32: 0.01, torch.float64: 0.01}  # of a row's spread of logits; rounding stays far below
CHANGED_HALF = 0.1
DRAWS = (4, 24)
COMPANY = 3  # benign images that each image is judged with, where the images of a batch meet
ROWS = 64  # images that are looked at at once before the first attack
MODES = ("recording", "inference")  # beside the usual, in which gradients are not recorded
CAPTURED = 10_000  # entries of one container that are looked into

Network = nn.Module | Callable[[Tensor], Any]


def images_and_labels(
    x: Any, y: Any, num_classes: int, folder: Path | None = None
) -> tuple[Float[Tensor, "samples channels height width"], Int[Tensor, " samples"]]:
    """Return images as float32 in [0, 1] and labels as int64, from what other libraries hold.

    Args:
        x: floating point tensor or array in [0, 1], shape (samples, channels, H, W).
        y: whole numbers in [0, C) as tensor, array or sequence, shape (samples,) or (samples, 1).
        num_classes: C.
        folder: where many large images take their room on disk.

    Raises:
        ValueError: if they are something else; the message says what to change.
    """
    x = torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x)
    if not x.is_floating_point():
        raise ValueError(f"the images are {x.dtype}: give floating point numbers in [0, 1], as x.float() / 255 does")
    if x.ndim != 4:
        raise ValueError(f"the images have shape {tuple(x.shape)}: it must be (samples, channels, height, width)")
    try:
        y = torch.as_tensor(np.asarray(y) if not isinstance(y, Tensor) else y)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the labels are no array of numbers: {error}") from None
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        hint = "; one-hot labels become whole numbers by y.argmax(1)" if y.ndim == 2 else ""
        raise ValueError(f"the labels have shape {tuple(y.shape)}: it must be (samples,){hint}")
    if y.dtype == torch.bool or y.is_complex() or (y.is_floating_point() and not bool((y == y.round()).all())):
        raise ValueError(f"the labels are {y.dtype} and not all whole numbers in [0, {num_classes})")
    if not len(x):
        raise ValueError("there are no samples to evaluate on")
    if len(x) != len(y):
        raise ValueError(f"{len(x)} images but {len(y)} labels")
    ends = torch.stack([torch.stack(part.aminmax()) for part in spooled.chunks(x, ROWS)])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise ValueError(f"the images run from {low:g} to {high:g}: they must be in [0, 1]; normalise inside the model")
    if not (int(y.min()) >= 0 and int(y.max()) < num_classes):
        raise ValueError(f"labels run from {int(y.min())} to {int(y.max())}, outside num_classes={num_classes}")
    # Copies: tensors made in inference mode take part in no gradient, and the caller's own are never changed.
    if not spooled.is_large(x):
        return x.detach().float().clamp(0, 1).clone(), y.detach().long().clone()
    copy = spooled.empty(x.shape, folder=folder)
    for given, part in zip(spooled.chunks(x, ROWS), spooled.chunks(copy, ROWS), strict=True):
        part.copy_(given.detach().float().clamp(0, 1))
    return copy, y.detach().long().clone()


class Function(nn.Module):
    """A function of images that is no module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Measured(nn.Module):
    """Any network as a function from float32 images in [0, 1], shape (B, channels, H, W), to float32 logits (B, K).

    Args:
        model: the network; what it returns may be anything that `logits_of` takes.
        batch_size: the only size of batch that it takes; None for any.

    Attributes:
        origin: what the network held before its first pass here.
        state: the same, where every pass is to begin with it; else None.
    """

    def __init__(self, model: nn.Module, batch_size: int | None = None) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.origin = State(model)
        self.state: State | None = None
        floats = [tensor.dtype for tensor in _tensors(model) if tensor.is_floating_point()]
        self.dtype = floats[0] if floats else torch.float32
        self.coarse = self.dtype not in CHANGED

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in _tensors(self.model)), torch.device("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        logits = self._batches(x) if self.batch_size else self._pass(x)
        if x.requires_grad and torch.is_grad_enabled():
            # Attacks see a gradient of zero where there is none: weights may need one though the images get none.
            logits = logits + 0 * x.flatten(1).sum(1, keepdim=True)
        return logits

    def _batches(self, x: Tensor) -> Tensor:
        size = self.batch_size or len(x)
        missing = -len(x) % size
        filled = torch.cat([x, x[:1].expand(missing, *x.shape[1:])])
        return torch.cat([self._pass(part) for part in filled.split(size)])[: len(x)]

    def _pass(self, x: Tensor) -> Tensor:
        if self.state is not None:
            self.state.restore()
        given = x.to(self.dtype).clone()  # networks that normalise in place change a copy
        try:
            output = self.model(given)
        except RuntimeError as error:
            # NumPy takes no tensor that needs a gradient.
            if "requires grad" not in str(error) or not x.requires_grad:
                raise
            with torch.no_grad():
                output = self.model(given.detach())
        logits = logits_of(output)
        self.coarse |= logits.dtype not in CHANGED
        return logits.float()


@contextmanager
def given_back(*networks: Measured) -> Iterator[None]:
    """Leave what networks hold as it was before their first pass here, whatever happens."""
    try:
        yield
    finally:
        for network in networks:
            network.origin.restore(unnoted=True)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def classifier(model: Network, x: Float[Tensor, "samples channels height width"], batch_size: int) -> Measured:
    """Make a classifier of a network, and see that it takes the images.

    Args:
        model: a module, or any function of images.
        x: the benign images.
        batch_size: how many of them are attacked at a time.

    Raises:
        ValueError: if the network fails on the images or returns no logits; or if some are not finite.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise ValueError(f"the model is a {type(model).__name__}: it must be a module or a function of images")
        model = Function(model)
    size = min(len(x), batch_size)
    found = Measured(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            try:
                for few in {1, min(2, len(x))}:
                    found(x[:few].to(found.device))
            except NoLogitsError:
                raise
            except Exception as first:
                found.batch_size = size
                try:
                    found(x[:size].to(found.device))
                except Exception:
                    raise ValueError(
                        f"the model fails on images of shape {tuple(x.shape[1:])}: "
                        f"{type(first).__name__}: {str(first).strip().splitlines()[0] if str(first).strip() else ''}"
                    ) from first
            for number, part in enumerate(spooled.chunks(x, size)):
                logits = found(part.to(found.device))
                finite = logits.isfinite().all(1)
                if not finite.all():
                    place = int((~finite).nonzero()[0])
                    raise ValueError(
                        f"the model's outputs are not finite, first on benign image {number * size + place}: "
                        + _not_finite(logits[place])
                    )
    finally:
        for module in training:
            module.training = True
    return found


def _not_finite(logits: Float[Tensor, " outputs"]) -> str:
    if bool((logits.isfinite() | logits.isneginf()).all()) and not bool(logits.isneginf().all()):
        return "some classes are at minus infinity, so that margins are no numbers; mask classes by -1e4 instead"
    return "such a network makes no prediction there, and no accuracy of it can be measured"


@dataclass(frozen=True)
class Nature:
    """What kind of function a network is.

    Attributes:
        random: the same batch twice gives other outputs.
        batch_dependent: an image's output depends on the other images of its batch.
        stateful: what it answers depends on what it was asked before.
        mode_dependent: an image's output depends on whether gradients are recorded, or on inference mode.
        remembers: it changes something in itself when it is asked, whether that shows in its answers or not.
        gradient: whether its outputs pass any gradient to the images.
        draws: passes that a gradient is averaged over; 1 unless it is random.
    """

    random: bool = False
    batch_dependent: bool = False
    stateful: bool = False
    mode_dependent: bool = False
    remembers: bool = False
    gradient: bool = True
    draws: int = 1

    @property
    def names(self) -> Sequence[str]:
        """What a reader must know of it, in words."""
        kinds = {
            "random": self.random,
            "batch-dependent": self.batch_dependent,
            "stateful": self.stateful,
            "mode-dependent": self.mode_dependent,
        }
        return [name for name, applies in kinds.items() if applies]


def spread(count: int, most: int) -> Int[Tensor, " rows"]:
    """Return at most `most` of `count` rows, evenly spread over all: data may be sorted by class."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def differs(first: Tensor, second: Tensor, coarse: bool = False) -> Tensor:
    """Tell which rows of logits differ by more than rounding does, relative to each row's spread."""
    same = (first.isfinite() == second.isfinite()).all(1)
    first, second = first.nan_to_num(), second.nan_to_num()
    spread = (first.amax(1) - first.amin(1)).clamp_min(1e-30)
    change = (first - second).abs().amax(1) / spread
    return ~(same & (change <= (CHANGED_HALF if coarse else CHANGED[torch.float32])))


@torch.no_grad()
def examine(
    network: Measured,
    x: Float[Tensor, "samples channels height width"],
    found: Float[Tensor, "samples channels height width"] | None,
    threat: ThreatModel,
    generator: torch.Generator,
    batch_size: int,
    known: Nature | None = None,
) -> Nature:
    """Repeat, permute, split and copy a batch, run it in every mode, and see whether the network minds.

    What it remembers is put back before every pass from then on (`Measured.state`).

    Args:
        network: in evaluation mode.
        x: benign images.
        found: adversarial images to look at as well, the more telling the better; None to disturb the benign ones.
        threat: the ball, for the disturbed ones.
        generator: source of the disturbance and the order.
        batch_size: the largest batch that the network is to be asked.
        known: what an earlier look has found; what was found stays found.
    """
    known = known or Nature()
    rows = spread(len(x), PROBED)
    x = spooled.take(x, rows).to(network.device)
    disturbed = [threat.random_start(x, generator), threat.project(x + threat.eps * threat.direction(x - 0.5), x)]
    if found is not None:
        moved = spooled.take(found, rows).to(network.device)
        disturbed.insert(0, moved)
    else:
        disturbed.append(_one_step(network, x, threat))
    probe = torch.cat([x, *disturbed])
    remembers, stateful = known.remembers, known.stateful
    first, second = network(probe), network(probe)
    if remembers or network.origin.changed():
        remembers, network.state = True, None
        network.origin.restore()
        used = [network(x), network(probe), network(probe)]
        network.state = network.origin
        first, second = network(probe), network(probe)
        if not bool(differs(first, second, network.coarse).any()):
            stateful |= any(bool(differs(first, late, network.coarse).any()) for late in used[1:])
    noisy = bool(differs(first, second, network.coarse).any()) or known.random
    draws = known.draws
    if noisy:
        draws = max(draws, _draws(torch.stack([network(probe) for _ in range(REPEATS)])))
    batch = known.batch_dependent or (not noisy and _meet(network, probe, len(x), first, generator, batch_size))
    mode = known.mode_dependent or (not noisy and any(_minds_mode(network, part) for part in probe.split(batch_size)))
    remembers = network.state is not None
    return Nature(noisy, batch, stateful, mode, remembers, known.gradient and _passes(network, x), draws)


def takes_hard_steps(network: Measured, x: Float[Tensor, "samples channels height width"]) -> bool:
    """Tell whether a network compares, rounds or picks what depends on its images; one that cannot be watched may."""
    try:
        return has_hard_steps(network, x)
    except Exception:  # it fails in any way there is
        return True
    finally:
        network.origin.restore(unnoted=True)


def _one_step(network: Measured, x: Tensor, threat: ThreatModel) -> Tensor:
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        logits = network(point)
        loss = nn.functional.cross_entropy(logits, logits.argmax(1).detach(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
    return threat.project(x + threat.eps * threat.direction(gradient.nan_to_num()), x)


def _passes(network: Measured, x: Tensor) -> bool:
    with torch.enable_grad():
        point = x[:1].detach().clone().requires_grad_()
        if network.batch_size:
            point = x[: network.batch_size].detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(point).abs().sum(), point)
    return bool((gradient != 0).any())


def _draws(outputs: Float[Tensor, "draws rows classes"]) -> int:
    """Choose how many draws a gradient is averaged over, by how the margin's noise compares to the margin."""
    outputs = outputs.nan_to_num()
    top = outputs.mean(0).topk(min(2, outputs.shape[2]), dim=1)
    lead = outputs.gather(2, top.indices.expand(len(outputs), -1, -1))
    margin = lead[..., 0] - lead[..., -1]
    noise = margin.std(0) / margin.mean(0).abs().clamp_min(1e-12)
    return int(min(DRAWS[1], max(DRAWS[0], round(8 * float(noise.median())))))


def _meet(
    network: Measured, probe: Tensor, benign: int, together: Tensor, generator: torch.Generator, batch_size: int
) -> bool:
    """Tell whether images of a batch meet."""
    order = torch.randperm(len(probe), generator=generator, device=generator.device).to(probe.device)
    half = len(probe) // 2
    some = 4 if network.batch_size else 24  # each costs a whole batch where the network takes no less
    rows = torch.arange(0, len(probe), max(1, len(probe) // some), device=probe.device)
    company = probe[: min(COMPANY, benign)]
    others = [
        (network(probe[order]), together[order]),
        (torch.cat([network(probe[:half]), network(probe[half:])]), together),
        (torch.cat([network(probe[row : row + 1]) for row in rows]), together[rows]),
        (torch.cat([network(probe[row.repeat(3)])[:1] for row in rows]), together[rows]),
        (torch.cat([network(torch.cat([company, probe[row : row + 1]]))[-1:] for row in rows]), together[rows]),
    ]
    if batch_size > len(probe) and not network.batch_size:
        crowd = torch.arange(batch_size, device=probe.device) % len(probe)
        others.append((network(probe[crowd]), together[crowd]))
    return any(bool(differs(expected, other, network.coarse).any()) for other, expected in others)


def _minds_mode(network: Measured, probe: Tensor) -> bool:
    """Tell whether the network answers otherwise where gradients are recorded, or in inference mode."""
    expected = network(probe)
    return any(bool(differs(expected, other, network.coarse).any()) for other in _answers(network, probe).values())


def _answers(network: Measured, probe: Tensor) -> dict[str, Tensor]:
    """Return what the network says in each of the other modes, without those in which it fails."""
    found = {}
    for mode in MODES:
        with suppress(Exception):  # a network that takes gradients itself answers nothing in inference mode
            found[mode] = InMode(network, mode)(probe)
    if network.origin.changed():  # tensors that are kept in inference mode take part in no gradient
        network.state = network.origin
        network.origin.restore()
    return found


class InMode(nn.Module):
    """The network run with gradients recorded, or in inference mode; its outputs pass none."""

    def __init__(self, network: nn.Module, mode: str) -> None:
        super().__init__()
        self.network, self.mode = network, mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "recording":
            with torch.enable_grad():
                logits: Tensor = self.network(x.detach().clone().requires_grad_())
            return logits.detach()
        with torch.inference_mode():
            logits = self.network(x)
        return logits.clone()


class Alone(nn.Module):
    """Each image as a batch of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.network(row[None]) for row in x]) if len(x) else self.network(x)


class InCompany(nn.Module):
    """Each image as the last one of a batch of benign images."""

    def __init__(self, network: nn.Module, company: Tensor) -> None:
        super().__init__()
        self.network, self.company = network, company

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.network(torch.cat([self.company, row[None]]))[-1:] for row in x]
        return torch.cat(rows) if rows else self.network(x)


class Averaged(nn.Module):
    """A random network's mean log-probabilities over several draws, whose gradient is that of the expected loss.

    Expectation over transformation (Athalye et al. 2018, arXiv 1802.00420).
    """

    def __init__(self, network: nn.Module, draws: int) -> None:
        super().__init__()
        self.network, self.draws = network, draws

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.network(x).log_softmax(1) for _ in range(self.draws)]).mean(0)


def views(network: Measured, nature: Nature, x: Tensor) -> list[nn.Module]:
    """Return every company in which an image may meet the network: it has to withstand all of them."""
    # Where a network takes whole batches alone, a batch for each image would take too long.
    if not nature.batch_dependent or network.batch_size:
        return [network]
    return [Alone(network), InCompany(network, x[:COMPANY].to(network.device))]


def modes(network: Measured, nature: Nature, x: Tensor) -> list[nn.Module]:
    """Return the other modes that an image has to withstand the network in; attacks get no gradient of them."""
    if not nature.mode_dependent:
        return []
    return [InMode(network, mode) for mode in _answers(network, x[: network.batch_size or 1].to(network.device))]


_SOURCES = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_PLAIN = (int, float, complex, str, bytes, bool, type(None), frozenset, torch.dtype, torch.device)
_MISSING = object()
_INTERNAL = {"_parameters", "_modules", "_buffers", "training", "_non_persistent_buffers_set"}
_DEPTH = 20


def _internal(name: str) -> bool:
    return name in _INTERNAL or (name.startswith("_") and "hooks" in name)


class State:
    """What a network holds, as it was when this was made.

    Parameters and buffers, of which it keeps copies, and what plain attributes, containers, objects and closures of its
    modules hold, also of modules that a function names as globals. Sources of random numbers are left to run on. What
    is kept elsewhere (any other global, a file) is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[int, Any] = {}
        self._holders: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, int]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._look(model, _DEPTH)

    def changed(self) -> bool:
        """Tell whether anything is not as it was."""
        return (
            any(_identities(holder) != _identities(kept) for holder, kept in self._holders)
            or any(not _same_items(container, kept) for container, kept in self._containers)
            or any(cell.cell_contents is not kept for cell, kept in self._cells)
            or any(tensor._version != version for tensor, _, version in self._tensors)
            or any(not np.array_equal(array, kept) for array, kept in self._arrays)
        )

    @torch.no_grad()
    def restore(self, *, unnoted: bool = False) -> None:
        """Put everything back.

        Args:
            unnoted: also look at the numbers of tensors that say that they are unchanged: batch norm writes its
                running statistics without a note. What it computes meanwhile does not depend on them.
        """
        for holder, kept in self._holders:
            for name in [name for name in holder if name not in kept and not _internal(name)]:
                del holder[name]
            holder.update(kept)
        for container, items in self._containers:
            if not _same_items(container, items):
                container.clear()
                container.update(items) if isinstance(container, dict | set) else container.extend(items)
        for cell, value in self._cells:
            cell.cell_contents = value
        for index, (tensor, copy, version) in enumerate(self._tensors):
            if tensor.requires_grad and not tensor.is_leaf:  # a pass that cut nothing off has written a graph into it
                tensor.detach_()
            if tensor._version != version or (unnoted and not _same_numbers(tensor, copy)):
                tensor.copy_(copy)
                self._tensors[index] = tensor, copy, tensor._version
        for array, numbers in self._arrays:
            array[...] = numbers

    def _look(self, thing: Any, depth: int) -> None:
        """Note what `thing` holds, and what is in it."""
        skipped = isinstance(thing, (*_SOURCES, *_PLAIN, type, ModuleType))
        if skipped or id(thing) in self._seen or not depth:
            return
        self._seen[id(thing)] = thing
        inside: list[Any] = []
        if isinstance(thing, Tensor):
            if not thing.is_inference():
                self._tensors.append((thing, thing.detach().clone(), thing._version))
        elif isinstance(thing, np.ndarray):
            if thing.flags.writeable and thing.dtype != object:
                self._arrays.append((thing, thing.copy()))
        elif isinstance(thing, tuple):
            inside = list(thing)
        elif isinstance(thing, dict | list | set | collections.deque):
            if len(thing) <= CAPTURED:
                self._containers.append((thing, thing.copy()))
                inside = list(thing.values() if isinstance(thing, dict) else thing)
        elif isinstance(thing, MethodType):
            inside = [thing.__self__]
        elif isinstance(thing, FunctionType):
            for cell in thing.__closure__ or ():
                try:
                    value = cell.cell_contents
                except ValueError:  # a variable that has no value yet
                    continue
                self._cells.append((cell, value))
                inside.append(value)
            # Networks, and functions of the same file that may use some: other globals are not only the network's.
            named = [thing.__globals__.get(name) for name in thing.__code__.co_names]
            inside += [one for one in named if isinstance(one, nn.Module) or _beside(one, thing)]
        elif isinstance(getattr(thing, "__dict__", None), dict):
            holder = vars(thing)
            kept = {name: value for name, value in holder.items() if not _internal(name)}
            self._holders.append((holder, kept))
            inside = list(kept.values())
            if isinstance(thing, nn.Module):
                inside += [thing._parameters, thing._buffers, *thing._modules.values()]
        for one in inside:
            self._look(one, depth - 1)


def _beside(thing: Any, function: FunctionType) -> bool:
    return isinstance(thing, FunctionType) and thing.__globals__ is function.__globals__


def _identities(holder: dict[str, Any]) -> dict[str, int]:
    return {name: id(value) for name, value in holder.items() if not _internal(name)}


def _same_numbers(now: Tensor, kept: Tensor) -> bool:
    if not now.is_floating_point() or now.layout != torch.strided:
        return True
    return torch.equal(now.nan_to_num(), kept.nan_to_num())


def _same_items(now: Any, kept: Any) -> bool:
    if len(now) != len(kept):
        return False
    if isinstance(kept, dict):
        return all(now.get(key, _MISSING) is value for key, value in kept.items())
    if isinstance(kept, set):
        return bool(now == kept)
    return all(a is b for a, b in zip(now, kept, strict=True))
