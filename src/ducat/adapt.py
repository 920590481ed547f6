"""Dummy classes onto a trained C-class network: the last layer is doubled with copied rows, then trained on as always.

Right after the copy every dummy class equals its real class, so that the recovered prediction is the original's; what
is left to learn is which of the pair an image belongs to.
"""

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ducat import checkpoint, methods
from ducat.config import Config, DummyConfig
from ducat.dummy import add_dummy_classes
from ducat.models.architecture import Architecture
from ducat.runs import RunFolder
from ducat.train import Initial, Listener, train

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
class _Source:
    """Weights in a file, by our names, and the description of the network if the file has one."""

    file: Path
    weights: Mapping[str, Tensor]
    architecture: Architecture | None = None

    def build(self, architecture: Architecture) -> tuple[Architecture, nn.Module]:
        """Return the network with dummy classes, each a copy of its real class, and its description."""
        ours = self.architecture or replace(architecture, dummy_classes=False)
        if ours.dummy_classes:
            raise ValueError(f"{self.file} already has dummy classes: adapt takes a network without them")
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
        self._load(model, weights, f"{ours.name} for {ours.num_classes} classes")
        mean, std = (tuple(weights[f"normalize.{name}"].flatten().tolist()) for name in ("mean", "std"))
        return replace(ours, dummy_classes=True, mean=mean, std=std), add_dummy_classes(model, init="copy")

    def _load(self, model: nn.Module, weights: dict[str, Tensor], what: str) -> None:
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
            raise ValueError(f"{self.file} does not fit {what} (model.name, model.width, data.name): {listed}")
        model.load_state_dict(weights)


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def settings(source: Path) -> Config:
    """Return the settings that `ducat adapt` begins with.

    They are those of the run that the checkpoint is from, or else the defaults; dummy classes are recovery-aware, and
    the training is the tail of the paper's recipe: 25 epochs at a learning rate of 0.001.

    Raises:
        FileNotFoundError: if there is no such file or folder.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a run folder, or a file of weights")
    run = _run_of(source)
    config = run.config if run is not None else Config()
    tail = replace(
        config.train,
        epochs=25,
        learning_rate=0.001,
        schedule="constant",
        warmup_epochs=0.0,
        averaging_start_epoch=0.0,
        awp_start_epoch=0.0,
    )
    # A run's config has the defaults written out; here they follow again what they are derived from.
    method, threat = config.method, config.threat
    if method.weight == methods.find(method.name).weight:
        method = replace(method, weight=None)
    if threat.step_size == threat.build(None).radius / 4:
        threat = replace(threat, step_size=None)
    dummy = DummyConfig("recovery-aware", start_epoch=0.0)
    return replace(config, name=None, method=method, dummy=dummy, threat=threat, train=tail)


def adapt(
    source: Path, config: Config | None = None, root: Path = Path("runs"), listener: Listener | None = None
) -> RunFolder:
    """Give a trained network dummy classes, train it on with them, and leave a run folder.

    Args:
        source: a run folder, of which the best checkpoint is taken, or a file: one of our checkpoints, or a state_dict
            as .pt, .pth or .safetensors. A state_dict may be nested (`NESTINGS`), its names may have a prefix
            (`PREFIXES`) or be those of other code (`NAMINGS`). No code in a file is run.
        config: what to train, as for `train`; `settings(source)` by default. Dummy classes are in use from the first
            epoch on, whatever `dummy.start_epoch` says. `model.normalization` says what a bare state_dict was trained
            with: data if its network took normalised images, none if it took images in [0, 1] as they are. Our own
            checkpoints bring their architecture and their normalisation along.
        root: the folder that the run folder is made in.
        listener: told of each step and epoch.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        FileExistsError: if there is a run of that name.
        ValueError: if the file is not what it should be, or does not fit the network that the settings ask for; the
            message names the keys at fault.
    """
    config = settings(source) if config is None else config
    if config.dummy.kind == "off":
        raise ValueError("dummy.kind=off leaves nothing to adapt: choose published or recovery-aware")
    found = _read(source)
    config = replace(config, dummy=replace(config.dummy, start_epoch=0))
    if found.architecture is not None:
        if config.model.name not in (None, found.architecture.name):
            raise ValueError(f"model.name={config.model.name}, but {found.file} holds a {found.architecture.name}")
        model = replace(config.model, name=found.architecture.name, width=found.architecture.width)
        config = replace(config, model=model)
    if config.name is None:
        run = _run_of(source)
        stem = source.stem if run is None else run.name
        config = replace(config, name=f"{stem}-adapted-{config.dummy.kind}")
    with open(found.file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return train(config, root, listener, initial=Initial(found.build, {"file": str(found.file), "sha256": digest}))


def _run_of(source: Path) -> RunFolder | None:
    """Return the run that a path is, or that it is a checkpoint of."""
    folder = RunFolder(source if source.is_dir() else source.resolve().parents[2])
    ours = source.is_dir() or source.resolve() in (folder.checkpoint_path("best"), folder.checkpoint_path("last"))
    return folder if ours and folder.config_path.is_file() else None


def _read(source: Path) -> _Source:
    if source.is_dir():
        source = RunFolder.open(source).checkpoint_path("best")
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: give a run folder, or a file of weights")
    if source.suffix != ".safetensors":
        return _Source(source, _our_names(_state_dict(source, _unpickle(source))))
    try:
        with safe_open(source, framework="pt") as file:
            ours = "ducat" in (file.metadata() or {})
        if ours:
            tensors, state = checkpoint.read(source)
            return _Source(source, checkpoint.part("model", tensors), Architecture(**state["model"]))
        return _Source(source, _our_names(load_file(source)))
    except SafetensorError as error:
        raise ValueError(f"{source} is not a whole safetensors file: {error}") from error


def _unpickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
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
