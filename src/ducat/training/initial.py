"""Where a training begins: random weights, a file's, the publisher's, or a network that was given."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ducat import checkpoint, weights
from ducat.architecture import GIVEN, GIVEN_NETWORK, OURS, Architecture
from ducat.config import Config
from ducat.data import Dataset
from ducat.dummy import add_dummy_classes
from ducat.models import allow_code
from ducat.models.doors import is_foreign, is_function
from ducat.models.heads import forward, returns_tensor
from ducat.models.outputs import as_classifier, logits_of
from ducat.runs import RunFolder
from ducat.seeding import seeded


@dataclass(frozen=True)
class Initial:
    """A network to begin with.

    Attributes:
        build: makes the network and its description from the description that the settings and the data ask for, in
            which what only somebody else's network can say is not filled in yet (`Config.described`).
        source: what the manifest says of where the weights are from; empty for random ones.
    """

    build: Callable[[Architecture], tuple[Architecture, nn.Module]]
    source: Mapping[str, object]

    def learnt(self, dataset: Dataset) -> int:
        """Return how many validation images are among those that the weights were trained on, in runs that are here."""
        before: list[Tensor] = []
        run = run_of(self.source.get("file"))
        while run is not None and run.config.data.name == dataset.spec.name and len(before) < ANCESTORS:
            try:
                known = run.dataset()
            except (OSError, ValueError):  # its data are gone, or are others now
                break
            if torch.isin(known.validation.ids, known.train.ids).any():
                break  # the publisher's own validation images, which are numbered by themselves
            before.append(known.train.ids)
            run = run_of((run.manifest.get("initial") or {}).get("file"))
        return int(torch.isin(dataset.validation.ids, torch.cat(before)).sum()) if before else 0

    @classmethod
    def of_settings(cls, config: Config) -> "Initial":
        """Begin as `config.model` says, with random numbers from the run's seed.

        A function that it names may run from then on: whoever makes settings has asked for it.
        """
        assert config.model.name is not None
        if is_function(config.model.name):
            allow_code(config.model.name)
        asked = config.model.weights
        # What is trained already keeps its recovered prediction; the published way begins with random rows.
        dummies = "copy" if config.dummy.kind == "recovery-aware" else "random"
        if asked in (None, "pretrained"):
            pretrained = asked == "pretrained"

            def build(architecture: Architecture) -> tuple[Architecture, nn.Module]:
                architecture = config.described(architecture)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(config.train.seed)
                    if not (pretrained and architecture.dummy_classes):
                        return architecture, architecture.build(pretrained=pretrained, init=config.model.init)
                    plain = replace(architecture, dummy_classes=False)
                    return plain.doubled(plain.build(pretrained=True), dummies)

            return cls(build, {"weights": f"{config.model.name}, pretrained"} if pretrained else {})
        assert asked is not None
        found = weights.read(asked)

        def load(architecture: Architecture) -> tuple[Architecture, nn.Module]:
            if found.architecture is None:
                architecture = config.described(architecture)
            elif found.architecture.name != config.model.name:
                raise ValueError(
                    f"model.weights: {found.file} holds a {found.architecture.name}: choose that model.name"
                )
            else:
                _check_own(config, architecture, found.architecture, found.file)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.train.seed)
                ours, model = found.network(replace(architecture, dummy_classes=False), new_head=True)
                if ours.dummy_classes and not architecture.dummy_classes:
                    raise ValueError(
                        f"model.weights: {found.file} has dummy classes, which dummy.kind=off would train as plain "
                        "ones: choose dummy.kind published or recovery-aware, or weights without dummy classes"
                    )
                if architecture.dummy_classes and not ours.dummy_classes:
                    return ours.doubled(model, dummies)
                return ours, model

        return cls(load, source_of(found.file))

    @classmethod
    def of(cls, model: nn.Module) -> "Initial":
        """Begin with a network as it is, be it the one that the settings describe or another."""

        def build(architecture: Architecture) -> tuple[Architecture, nn.Module]:
            name = f"{GIVEN}{type(model).__module__}.{type(model).__qualname__}"
            described = replace(architecture, name=name, width=None, stem_stride=1)
            network = given(model, described)
            if not is_foreign(architecture.name):
                with torch.random.fork_rng(devices=[]):
                    asked = architecture.build()
                side = architecture.image_size or OURS
                shape = architecture.channels, side, side
                described = architecture if _is_as_built(network, asked, shape) else described
            return described, network

        return cls(build, {"file": GIVEN_NETWORK})


def _check_own(config: Config, asked: Architecture, ours: Architecture, file: Path) -> None:
    """Raise ValueError if settings ask for another network than a checkpoint of ours brings along."""
    normalised = [[tuple(network.mean), tuple(network.std)] for network in (ours, asked)]
    differ = {
        "model.width": config.model.width not in (None, ours.width),
        "model.normalization": config.model.normalization != "auto" and normalised[0] != normalised[1],
    }
    for name, differs in differ.items():
        if differs:
            value = config.flat()[name]
            raise ValueError(f"{name}={value} is not that of the network in model.weights: leave it out ({file})")


def _is_as_built(model: nn.Module, built: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Tell whether a network that was given is the one that its description builds, whatever its weights."""
    states = built.state_dict(), model.state_dict()
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if shapes[0] != shapes[1]:
        return False
    built.load_state_dict(states[1])
    example = next(iter(model.parameters()), torch.zeros(1))
    images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0)).to(example)
    built.to(example)
    # Statistics of batch norm may be new ones: passes in training mode tell what those hide. A GPU adds in any order.
    pairs = ((_outputs(model, images, mode), _outputs(built, images, mode)) for mode in MODES)
    try:
        return all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in pairs)
    except Exception:  # what hooks and the like of other people hold may be no copy of
        return False


MODES = (False, True)  # evaluation and training
ANCESTORS = 20  # runs that began with each other's weights, which are looked at


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor, training: bool) -> Tensor:
    """Return what a copy of a network says, and whatever it draws is drawn alike."""
    copied = copy.deepcopy(model).train(training)
    with seeded(0, "as built", device=images.device):
        return logits_of(copied(images))


def run_of(source: object) -> RunFolder | None:
    """Return the run that a path is, or that it is a checkpoint of; None of anything else."""
    if source is None:
        return None
    source = Path(str(source))
    file = source.resolve()
    folder = RunFolder(source if source.is_dir() else file.parent.parent.parent)
    written = folder.checkpoint_path(file.parent.name)
    ours = source.is_dir() or file in (written, checkpoint.previous_of(written))
    return folder if ours and folder.config_path.is_file() else None


def source_of(file: Path) -> dict[str, str]:
    """Return what a manifest says of a file that weights are from; the place is one from any folder."""
    file = file.resolve()
    with open(file, "rb") as opened:
        return {"file": str(file), "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def given(model: nn.Module, architecture: Architecture) -> nn.Module:
    """Return a network that was given, as one that returns logits, with dummy classes if its description has them.

    Raises:
        ValueError: if it does not fit the data; the message says what it returns.
    """
    assert architecture.image_size is not None
    parameter = next(iter(model.parameters()), torch.zeros(1))
    images = torch.zeros(2, architecture.channels, architecture.image_size, architecture.image_size).to(parameter)
    try:
        found = forward(model, images)
    except Exception as error:  # other people's code fails in any way there is
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"model: it does not take the data's images ({type(error).__name__}: {told})") from error
    if not returns_tensor(model, images):
        model = as_classifier(model)
    classes = architecture.num_classes
    if architecture.dummy_classes and found.shape[1] == classes:
        return add_dummy_classes(model, images=images)
    outputs = 2 * classes if architecture.dummy_classes else classes
    if found.shape[1] != outputs:
        raise ValueError(f"model: it has {found.shape[1]} outputs, and {outputs} are needed for {classes} classes")
    return model
