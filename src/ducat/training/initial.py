"""Where a training begins: random weights, a file's, the publisher's, or a network that was given."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ducat import weights
from ducat.architecture import GIVEN, Architecture
from ducat.config import Config
from ducat.dummy import add_dummy_classes
from ducat.models import allow_code
from ducat.models.doors import is_foreign, is_function
from ducat.models.heads import forward, returns_tensor
from ducat.models.outputs import as_classifier


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

    @classmethod
    def of_settings(cls, config: Config) -> "Initial":
        """Begin as `config.model` says, with random numbers from the run's seed.

        A function that it names may run from then on: whoever makes settings has asked for it.
        """
        assert config.model.name is not None
        if is_function(config.model.name):
            allow_code(config.model.name)
        asked = config.model.weights
        if asked in (None, "pretrained"):
            pretrained = asked == "pretrained"

            def build(architecture: Architecture) -> tuple[Architecture, nn.Module]:
                architecture = config.described(architecture)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(config.train.seed)
                    return architecture, architecture.build(pretrained=pretrained, init=config.model.init)

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
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.train.seed)
                ours, model = found.network(replace(architecture, dummy_classes=False), new_head=True)
                if architecture.dummy_classes and not ours.dummy_classes:
                    return ours.doubled(model)
                return ours, model

        return cls(load, source_of(found.file))

    @classmethod
    def of(cls, model: nn.Module) -> "Initial":
        """Begin with a network as it is, be it the one that the settings describe or another."""

        def build(architecture: Architecture) -> tuple[Architecture, nn.Module]:
            name = f"{GIVEN}{type(model).__module__}.{type(model).__qualname__}"
            described = replace(architecture, name=name, width=None, stem_stride=1)
            if not is_foreign(architecture.name):
                with torch.random.fork_rng(devices=[]):
                    asked = architecture.build().state_dict()
                shapes = [{k: v.shape for k, v in state.items()} for state in (asked, model.state_dict())]
                described = architecture if shapes[0] == shapes[1] else described
            return described, given(model, described)

        return cls(build, {"file": "a network given to train"})


def source_of(file: Path) -> dict[str, str]:
    """Return what a manifest says of a file that weights are from."""
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
