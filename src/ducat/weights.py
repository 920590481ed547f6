"""Weights from files, ours or other people's, read without running any code in them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ducat import checkpoint
from ducat.models import MODELS
from ducat.models.architecture import Architecture
from ducat.runs import RunFolder

NESTINGS = ("state_dict", "model_state_dict", "model", "net", "network")
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
SHOWN = 3  # keys of each kind that an error names


@dataclass(frozen=True)
class Naming:
    """How other code names the layers of a network of ours.

    Attributes:
        marker: pattern of a key that tells this naming from the others.
        renames: pairs of a pattern and what takes its place.
        dropped: pattern of keys that no forward pass uses.
    """

    marker: str
    renames: tuple[tuple[str, str], ...]
    dropped: str | None = None


NAMINGS = (
    # Wide residual networks of the code of TRADES and of much that builds on it; its first block is there twice.
    Naming(
        marker=r"^block1\.layer\.0\.",
        renames=(
            (r"^block(\d)\.layer\.", r"layer\1."),
            (r"\.convShortcut\.", ".shortcut.0."),
            (r"^bn1\.", "bn."),
            (r"^fc\.", "linear."),
        ),
        dropped=r"^sub_block1\.",
    ),
    # Residual networks named as in torchvision.
    Naming(marker=r"^fc\.", renames=((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear."))),
)


@dataclass(frozen=True)
class Weights:
    """Weights in a file, by our names, and the description of the network if the file has one; `read` makes them."""

    file: Path
    weights: Mapping[str, Tensor]
    architecture: Architecture | None = None

    def network(self, architecture: Architecture) -> tuple[Architecture, nn.Module]:
        """Return the network with these weights, and its description.

        Args:
            architecture: what the settings and the data ask for. It describes a bare state_dict, whose head may have
                dummy classes or not; our own checkpoints describe themselves, and only have to fit the data.

        Raises:
            ValueError: if the weights do not fit; the message names the keys at fault.
        """
        ours = self.architecture or replace(architecture, dummy_classes=self._has_dummy_classes(architecture))
        for field in ("num_classes", "channels"):
            if getattr(ours, field) != getattr(architecture, field):
                raise ValueError(
                    f"{self.file} has {field}={getattr(ours, field)}, but the data have {getattr(architecture, field)}:"
                    " choose another data.name"
                )
        with torch.random.fork_rng(devices=[]):
            model = ours.build()
        weights = dict(self.weights)
        if "normalize.mean" not in weights:
            weights = {f"network.{name}": tensor for name, tensor in weights.items()}
            weights.update({name: tensor for name, tensor in model.state_dict().items() if "normalize." in name})
        self._load(model, weights, ours)
        mean, std = (tuple(weights[f"normalize.{name}"].flatten().tolist()) for name in ("mean", "std"))
        return replace(ours, mean=mean, std=std), model.eval()

    def _has_dummy_classes(self, architecture: Architecture) -> bool:
        heads = [tensor for tensor in self.weights.values() if tensor.ndim == 2]
        return bool(heads) and len(heads[-1]) == 2 * architecture.num_classes

    def _load(self, model: nn.Module, weights: dict[str, Tensor], ours: Architecture) -> None:
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        faults = {
            "missing": [name for name in expected if name not in found],
            "unexpected": [name for name in found if name not in expected],
            "of another shape": [
                f"{name} {found[name]} instead of {expected[name]}"
                for name in expected
                if name in found and found[name] != expected[name]
            ],
        }
        if any(faults.values()):
            listed = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in faults.items() if names)
            fitting = _fitting(found, ours)
            hint = f"; it fits model.name={', '.join(fitting)}" if fitting else ""
            raise ValueError(
                f"{self.file} does not fit {ours.name} for {ours.num_classes} classes (model.name, model.width, "
                f"data.name){hint}: {listed}"
            )
        model.load_state_dict(weights)


def _fitting(found: Mapping[str, tuple[int, ...]], ours: Architecture) -> list[str]:
    """Return the names of the networks that weights of these shapes fit."""
    outputs = (2 if ours.dummy_classes else 1) * ours.num_classes
    shapes = {name.removeprefix("network."): shape for name, shape in found.items() if "normalize." not in name}
    names = []
    for name, builder in MODELS.items():
        with torch.device("meta"):
            network = builder(num_outputs=outputs, channels=ours.channels, stem_stride=ours.stem_stride)
        if {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} == shapes:
            names.append(name)
    return names


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def read(source: Path) -> Weights:
    """Read weights of ours or of other people. No code in a file is run.

    Args:
        source: a run folder, of which the best checkpoint is taken, or a file: one of our checkpoints, or a state_dict
            as .pt, .pth or .safetensors. A state_dict may be nested (`NESTINGS`), its names may have a prefix
            (`PREFIXES`) or be those of other code (`NAMINGS`).

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if the file is damaged, or holds no weights.
    """
    if source.is_dir():
        run = RunFolder.open(source)
        source = run.checkpoint_path("best" if run.manifest["data"]["validation"] else "last")
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: give a run folder, or a file of weights")
    if source.suffix != ".safetensors":
        return Weights(source, _our_names(_state_dict(source, _unpickle(source))))
    try:
        with safe_open(source, framework="pt") as file:
            ours = "ducat" in (file.metadata() or {})
        if ours:
            tensors, state = checkpoint.read(source)
            return Weights(source, checkpoint.part("model", tensors), Architecture(**state["model"]))
        return Weights(source, _our_names(load_file(source)))
    except SafetensorError as error:
        raise ValueError(f"{source} is not a whole safetensors file: {error}") from error


def _unpickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle fail in any way there is
        raise ValueError(
            f"{file} is damaged, or holds more than tensors, which only running its code would show: save the "
            "network's state_dict() alone, with torch.save or as safetensors"
        ) from error


def _state_dict(file: Path, content: Any) -> dict[str, Tensor]:
    """Find the state_dict in what a file holds."""
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
        nested = [content[name] for name in NESTINGS if isinstance(content.get(name), Mapping)]
        content = nested[0] if nested else None
    raise ValueError(f"{file} holds no state_dict, neither as such nor as {', '.join(NESTINGS)}")


def _our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict by the names of our networks."""
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    for naming in NAMINGS:
        if any(re.search(naming.marker, name) for name in weights):
            kept = [name for name in weights if not (naming.dropped and re.search(naming.dropped, name))]
            return {_renamed(name, naming): weights[name] for name in kept}
    return weights


def _renamed(name: str, naming: Naming) -> str:
    for pattern, replacement in naming.renames:
        name = re.sub(pattern, replacement, name)
    return name
