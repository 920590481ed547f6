"""Weights from files, ours or other people's, read without running any code in them."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ducat import checkpoint, zoo
from ducat.architecture import Architecture
from ducat.models import MODELS
from ducat.runs import RunFolder

# Where a file keeps its state_dict; of two, the first.
NESTINGS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module"),
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema"),
)
NORMALISATIONS = (("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std"))  # last parts of two buffers' names
SHOWN = 3  # keys of each kind that an error names
MOST_GLOBALS = 50  # other classes that a file may name
RUNS_CODE = ("os", "posix", "nt", "sys", "subprocess", "runpy", "importlib")


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

    def apply(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights by our names."""
        kept = [name for name in weights if not (self.dropped and re.search(self.dropped, name))]
        return {self._renamed(name): weights[name] for name in kept}

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


NAMINGS = (
    Naming(marker="", renames=()),
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
    # Wide and pre-activation residual networks of the code of Gowal et al. 2020, which RobustBench has for those that
    # were trained with generated data.
    Naming(marker=r"^layer\.0\.block\.", renames=((r"^layer\.(\d)\.block\.", r"layer_\1."),)),
    Naming(
        marker=r"^layer_0\.0\.conv_2d_1\.",
        renames=((r"^conv_2d\.", "init_conv."), (r"\.conv_2d_1\.", ".conv_0."), (r"\.conv_2d_2\.", ".conv_1.")),
    ),
)


@dataclass(frozen=True)
class Weights:
    """Weights in a file, and the description of the network if the file has one; `read` makes them."""

    file: Path
    weights: Mapping[str, Tensor]
    architecture: Architecture | None = None

    def network(self, architecture: Architecture, *, new_head: bool = False) -> tuple[Architecture, nn.Module]:
        """Return the network with these weights, and its description.

        Args:
            architecture: what the settings and the data ask for. It describes a bare state_dict, whose head may have
                dummy classes or not; our own checkpoints describe themselves, and only have to fit the data. A bare
                state_dict's names may begin with anything and be those of other code (`NAMINGS`); normalisation that
                is among the weights takes the place of the architecture's.
            new_head: whether a head for another number of classes is replaced by a new one, drawn from PyTorch's
                global generator, instead of being refused.

        Raises:
            ValueError: if the weights do not fit; the message names the keys at fault.
        """
        if self.architecture is None:
            return self._load_bare(architecture, new_head)
        ours = self.architecture
        if new_head and ours.num_classes != architecture.num_classes:
            return self._load_bare(replace(ours, num_classes=architecture.num_classes, dummy_classes=False), new_head)
        for field in ("num_classes", "channels"):
            if getattr(ours, field) != getattr(architecture, field):
                raise ValueError(
                    f"{self.file} has {field}={getattr(ours, field)}, but the data have {getattr(architecture, field)}:"
                    " choose another data.name"
                )
        model = _built(ours)
        self._check(_shapes(model.state_dict()), _shapes(self.weights), ours)
        model.load_state_dict(dict(self.weights))
        return ours, model.eval()

    def _load_bare(self, architecture: Architecture, new_head: bool) -> tuple[Architecture, nn.Module]:
        model = _built(architecture) if not new_head else architecture.build()
        expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("normalize.")}
        prefix = _common_prefix(expected)
        found, unused = self._fitted({name.removeprefix(prefix): tensor for name, tensor in expected.items()})
        found = {prefix + name: tensor for name, tensor in found.items()}
        for name in expected.keys() - found.keys():
            if name.endswith(".num_batches_tracked"):  # which evaluation does not use
                found[name] = expected[name]
        heads = [name for name in found if name in expected and _differs_in_outputs(found[name], expected[name])]
        if new_head:
            found.update({name: expected[name] for name in heads})
        elif heads:
            # Twice or half as many outputs as asked for: the file's network has dummy classes, or has none.
            asked, has = (sum(len(weights[name]) for name in heads) for weights in (expected, found))
            if has == (asked / 2 if architecture.dummy_classes else 2 * asked):
                return self._load_bare(replace(architecture, dummy_classes=not architecture.dummy_classes), False)
        self._check(_shapes(expected), _shapes(found), architecture)
        mean, std = self._normalisation(unused, architecture)
        normalize = {f"normalize.{name}": torch.tensor(values) for name, values in (("mean", mean), ("std", std))}
        state = model.state_dict()
        model.load_state_dict(
            {**state, **found, **{name: value.view_as(state[name]) for name, value in normalize.items()}}
        )
        return replace(architecture, mean=mean, std=std), model.eval()

    def _fitted(self, expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights by the expected names as far as they can be told, and those that belong to no network."""
        best: tuple[int, dict[str, Tensor], str] = (-1, {}, "")
        rival = None
        for start in _starts(self.weights, len(expected)):
            inside = {name[len(start) :]: tensor for name, tensor in self.weights.items() if name.startswith(start)}
            for naming in NAMINGS:
                if any(re.search(naming.marker, name) for name in inside):
                    renamed = _with_head(naming.apply(inside), expected)
                    score = len(renamed.keys() & expected.keys())
                    if score > best[0]:
                        best, rival = (score, renamed, start), None
                    elif score == best[0] and start != best[2] and not (_averaged(start) or _same(renamed, best[1])):
                        rival = start
        score, renamed, start = best
        if rival is not None and 2 * score > len(expected):
            raise ValueError(
                f"{self.file} holds more than one network that fits, under {start or 'no prefix'} and {rival}: save "
                "the state_dict() of the one that is meant alone"
            )
        outside = {name: tensor for name, tensor in self.weights.items() if not name.startswith(start)}
        normalising = {
            name: tensor for name, tensor in renamed.items() if name not in expected and _normalises(name) is not None
        }
        return {k: v for k, v in renamed.items() if k not in normalising}, {**outside, **normalising}

    def _normalisation(
        self, unused: Mapping[str, Tensor], architecture: Architecture
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation per channel: those among the weights, or else the architecture's."""
        found = set()
        for name, mean in unused.items():
            if (pair := _normalises(name)) is not None and name.endswith(pair[0]):
                std = unused.get(name.removesuffix(pair[0]) + pair[1])
                if std is not None and mean.numel() == std.numel() == architecture.channels:
                    found.add((tuple(mean.float().flatten().tolist()), tuple(std.float().flatten().tolist())))
        if len(found) > 1:
            raise ValueError(f"{self.file} normalises its images in {len(found)} ways: remove those that are not used")
        if not found:
            return tuple(architecture.mean), tuple(architecture.std)
        means, stds = found.pop()
        if not all(0 <= value <= 1 for value in means) or not all(0 < value <= 1 for value in stds):
            raise ValueError(
                f"{self.file} normalises by mean {means} and deviation {stds}, which is not for images in [0, 1]: "
                "divide both by 255"
            )
        return means, stds

    def _check(
        self, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], architecture: Architecture
    ) -> None:
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
            what = f"{architecture.name} for {architecture.num_classes} classes"
            listed = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in faults.items() if names)
            fitting = _fitting(found, architecture)
            hint = f"; it fits model.name={', '.join(fitting)}" if fitting else ""
            wrong = [name for name in expected if name in found and found[name] != expected[name]]
            if len(faults["of another shape"]) == sum(map(len, faults.values())) and all(
                found[name][1:] == expected[name][1:] for name in wrong
            ):
                outputs = found[wrong[0]][0]
                hint = f"; all but the head fits, which has {outputs} outputs: choose data of its classes (data.name)"
            raise ValueError(f"{self.file} does not fit {what} (model.name, model.width, data.name){hint}: {listed}")


def _built(architecture: Architecture) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return architecture.build()


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _fitting(found: Mapping[str, tuple[int, ...]], ours: Architecture) -> list[str]:
    """Return the names of the networks that weights of these shapes fit."""
    shapes = {name.removeprefix("network."): shape for name, shape in found.items() if "normalize." not in name}
    names = []
    for (name, builder), halves in itertools.product(MODELS.items(), (1, 2)):
        with torch.device("meta"):
            network = builder(
                num_outputs=halves * ours.num_classes, channels=ours.channels, stem_stride=ours.stem_stride
            )
        if _shapes(network.state_dict()) == shapes:
            names.append(name)
    return names


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _common_prefix(names: Mapping[str, Tensor]) -> str:
    """Return the beginning, up to a dot, that all names share."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while parts and all(len(part) > shared and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared]) if parts else ""


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys())


def _averaged(start: str) -> bool:
    return not {"ema", "swa", "average", "averaged", "avg"}.isdisjoint(re.split(r"[._]", start.lower()))


def _starts(weights: Mapping[str, Tensor], expected: int) -> list[str]:
    """Return what the names of one network in a file may begin with: averaged ones last, else the shortest first."""
    counts: dict[str, int] = {"": len(weights)}
    for name in weights:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            start = ".".join(parts[:depth]) + "."
            counts[start] = counts.get(start, 0) + 1
    likely = [start for start, count in counts.items() if not start or 2 * count >= expected]
    return sorted(likely, key=lambda start: (_averaged(start), len(start)))


def _with_head(weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a head with another name the expected one, where there is only one that it can be."""
    missing = [name for name in expected if name not in weights and name.endswith(".weight")]
    others = [name for name in weights if name not in expected and name.endswith(".weight")]
    if len(missing) != 1 or len(others) != 1 or weights[others[0]].shape[1:] != expected[missing[0]].shape[1:]:
        return weights
    old, new = others[0].removesuffix("weight"), missing[0].removesuffix("weight")
    renamed = {f"{old}{last}": f"{new}{last}" for last in ("weight", "bias")}
    return {renamed.get(name, name): tensor for name, tensor in weights.items()}


def _differs_in_outputs(found: Tensor, expected: Tensor) -> bool:
    return found.ndim == expected.ndim >= 1 and found.shape[1:] == expected.shape[1:] and len(found) != len(expected)


def _normalises(name: str) -> tuple[str, str] | None:
    """Return the pair of last parts of names that a mean's or a deviation's name is of."""
    last = name.rpartition(".")[2]
    return next((pair for pair in NORMALISATIONS if last in pair), None)


def read(source: Path | str) -> Weights:
    """Read weights of ours or of other people. No code in a file is run.

    Args:
        source: a run folder, of which the best checkpoint is taken, a network of the zoo by its name, such as
            "zoo:digits-pgd-at", or a file: one of our checkpoints, or a state_dict as torch.save or safetensors writes
            it, or a Lightning checkpoint. A state_dict may be nested (`NESTINGS`), beside other things, which are not
            read.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if the file is damaged, or holds no weights; the message says what it is.
    """
    source = zoo.place(source)
    if source.is_dir():
        run = RunFolder.open(source)
        source = run.checkpoint_path("best" if run.manifest["data"]["validation"] else "last")
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: give a run folder, or a file of weights")
    with open(source, "rb") as opened:
        start = opened.read(1024)
    if not _is_safetensors(start, source):
        _refuse_other_files(start, source)
        return Weights(source, _state_dict(source, _unpickle(source)))
    try:
        with safe_open(source, framework="pt") as file:
            ours = "ducat" in (file.metadata() or {})
        if ours:
            tensors, state = checkpoint.read(source)
            return Weights(source, checkpoint.part("model", tensors), Architecture(**state["model"]))
        return Weights(source, load_file(source))
    except SafetensorError as error:
        raise ValueError(f"{source} is not a whole safetensors file: {error}") from error


def _is_safetensors(start: bytes, file: Path) -> bool:
    # Eight bytes of length, then JSON; the name may be any.
    return file.suffix == ".safetensors" or (start[8:9] == b"{" and start[:2] != b"PK")


def _refuse_other_files(start: bytes, file: Path) -> None:
    """Say of a file that is no pickle what it is."""
    text = start.lstrip().lower()
    reason = None
    if not start:
        reason = "is empty: fetch it again"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = "is a web page, not the file that it links to: fetch it again, by its direct address"
    elif text.startswith(b"version https://git-lfs"):
        reason = "is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository"
    elif start.startswith(b"PK"):
        if not zipfile.is_zipfile(file):
            reason = "is cut short: fetch it again"
        else:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                reason = (
                    "is TorchScript, a program: save torch.jit.load(...).state_dict() with torch.save, and give that"
                )
            elif not any(name.endswith("data.pkl") for name in names):
                reason = "is a zip archive without weights of PyTorch: unpack it, and give the file inside"
    elif start.startswith(b"\x89HDF"):
        reason = "is an HDF5 file, as Keras writes it: convert it to a state_dict of PyTorch"
    if reason is not None:
        raise ValueError(f"{file} {reason}")


class _StandIn:
    """Takes the place of whatever a file names besides tensors, which is never imported."""

    def __init__(self, *_: object, **__: object) -> None:
        self.state: Any = None

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _unpickle(file: Path) -> Any:
    stand_ins: dict[str, type] = {}
    while True:
        named = [(kind, name) for name, kind in stand_ins.items()]
        try:
            with torch.serialization.safe_globals(named):  # type: ignore[arg-type]
                return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # bytes that are no pickle fail in any way there is
            name = _refused_global(error)
            if name is None or name in stand_ins or len(stand_ins) == MOST_GLOBALS:
                raise ValueError(
                    f"{file} is damaged, or not what torch.save writes ({_cause(error)}): save the network's "
                    "state_dict() alone, with torch.save or as safetensors"
                ) from error
            if "." not in name or name.split(".")[0] in RUNS_CODE:  # without a module: of builtins
                raise ValueError(
                    f"{file} asks for {name} to be run when it is read, which no weights need: it may be malicious; "
                    "nothing was run"
                ) from error
            stand_ins[name] = type("_StandIn", (_StandIn,), {})


def _refused_global(error: Exception) -> str | None:
    """Return the name of what the unpickler refused to import."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL ([\w.]+) (?:was not an allowed global|whose module)", str(error))
    return found[1] if found else None


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if "WeightsUnpickler error" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {said[:100]}".rstrip(": ")


def _state_dict(file: Path, content: Any) -> dict[str, Tensor]:
    """Find the state_dict in what a file holds."""
    while True:
        if isinstance(content, _StandIn) and isinstance(content.state, Mapping) and "_parameters" in content.state:
            return dict(_of_module(content.state))
        if not isinstance(content, Mapping):
            break
        nested = [content[name] for name in NESTINGS if isinstance(content.get(name), Mapping | _StandIn)]
        if nested:
            content = nested[0]
            continue
        found = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if any(tensor.ndim for tensor in found.values()):
            return found
        break
    raise ValueError(f"{file} holds no state_dict, neither as such nor as {', '.join(NESTINGS)}{_held(content)}")


def _held(content: Any) -> str:
    if not isinstance(content, Mapping) or not content:
        return ""
    return f": its keys are {_shortened([json.dumps(str(name)[:30]) for name in content])}"


def _of_module(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a module that was saved whole, from the state that its stand-in took."""
    for group in ("_parameters", "_buffers"):
        for name, tensor in state.get(group, {}).items():
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor
    for name, module in state.get("_modules", {}).items():
        if isinstance(module, _StandIn) and isinstance(module.state, Mapping):
            yield from _of_module(module.state, f"{prefix}{name}.")
