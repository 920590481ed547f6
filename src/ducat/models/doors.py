"""Other people's networks by name: `timm/NAME`, `hf:REPO_OR_FOLDER`, `file.py:function`, `package.module:function`.

What has to be the same for a network to be built again is recorded when it is first asked for: the library's version,
the whole configuration, the SHA-256 of the file. Building it again needs no network access. A function is code, so it
is only called where this process has been told to (`allow_code`), whatever a run folder says.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ducat.installing import install
from ducat.models.outputs import LogitsOnly

__all__ = ["Fit", "allow_code", "door", "is_foreign", "is_function"]

Options = Mapping[str, Any]

NO_OPTIONS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
# Of a configuration of transformers: what names code or kernels to fetch.
NO_SETTINGS = {
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "quantization_config",
}


class Door(NamedTuple):
    """One way to networks of others.

    Attributes:
        record: `(name, channels, options, pretrained)` to what has to be kept to build the network again; plain values.
        build: `(name, num_outputs, channels, options, record)` to the network with new weights.
        pretrained: the same with the weights that its publisher trained and a new head; None where there are none.
        normalisation: `(name, record)` to the publisher's mean and deviation per channel, for images in [0, 1], or
            None.
    """

    record: Callable[[str, int, Options, bool], dict[str, Any]]
    build: Callable[[str, int, int, Options, Options], nn.Module]
    pretrained: Callable[[str, int, int, Options, Options], nn.Module] | None
    normalisation: Callable[[str, Options], tuple[Any, Any] | None]


class Fit(nn.Module):
    """Bring images to the size and the number of channels that a network takes.

    Args:
        size: pixels a side, by bilinear interpolation; None leaves the size.
        channels: a grey image is repeated so many times; None leaves the channels.
    """

    def __init__(self, size: int | None, channels: int | None) -> None:
        super().__init__()
        self.size, self.channels = size, channels

    def forward(self, images: Tensor) -> Tensor:
        if self.channels is not None:
            images = images.expand(-1, self.channels, -1, -1)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", align_corners=False)
        return images

    def extra_repr(self) -> str:
        return f"size={self.size}, channels={self.channels}"


def is_foreign(name: str) -> bool:
    """Tell whether a name is of somebody else's network."""
    return name.startswith("timm/") or ":" in name


def is_function(name: str) -> bool:
    """Tell whether a name is of a function, which is code to run."""
    return is_foreign(name) and door(name)[0] is FUNCTION


def door(name: str) -> tuple[Door, str]:
    """Return the door of a name, and the name behind it."""
    for start, row in DOORS.items():
        if name.startswith(start):
            return row, name.removeprefix(start)
    return FUNCTION, name


def _library(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"model.name={name} needs {package}: {install(package)} ({error})") from error


def _called(function: Callable[..., nn.Module], what: str, *arguments: Any, **options: Any) -> nn.Module:
    """Call what makes a network, and say in one line what it does not like."""
    try:
        network = function(*arguments, **options)
    except Exception as error:  # other people's code fails in any way there is
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{what} cannot be made ({type(error).__name__}: {told}): look at model.options") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{what} returns a {type(network).__name__}: it must return an nn.Module")
    return network


# timm


def _timm_library(name: str) -> Any:
    timm = _library("timm", f"timm/{name}")
    if not timm.is_model(name):  # which also keeps out names that stand for a download
        close = get_close_matches(name, timm.list_models(), n=1)
        hint = f": did you mean timm/{close[0]}?" if close else ""
        raise ValueError(f"model.name=timm/{name} is no network of timm {timm.__version__}{hint}")
    return timm


def _timm_record(name: str, channels: int, options: Options, pretrained: bool) -> dict[str, Any]:
    return {"timm": _timm_library(name).__version__}


def _timm(
    name: str, num_outputs: int, channels: int, options: Options, record: Options, pretrained: bool = False
) -> nn.Module:
    timm = _timm_library(name)
    made = record["timm"]
    other = f", made with timm {made}, here is {timm.__version__}," if made != timm.__version__ else ""
    for option in NO_OPTIONS & options.keys():  # which a run folder from elsewhere may hold
        raise ValueError(f"model.options: {option} cannot be given: model.weights says where weights are from")
    settings = {"pretrained": pretrained, "num_classes": num_outputs, "in_chans": channels, **options}
    return _called(timm.create_model, f"timm/{name}{other}", name, **settings)


def _timm_normalisation(name: str, record: Options) -> tuple[Any, Any] | None:
    described = _library("timm", f"timm/{name}").get_pretrained_cfg(name)
    return (described.mean, described.std) if described is not None else None


# transformers


def _hf_record(name: str, channels: int, options: Options, pretrained: bool) -> dict[str, Any]:
    transformers = _library("transformers", f"hf:{name}")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # no such repository, no network access, code of its own
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"model.name=hf:{name} has no configuration that can be read: {told}") from error
    settings = config.to_diff_dict()
    if not pretrained and "num_channels" in config.to_dict():
        settings["num_channels"] = channels
    for labels in ("id2label", "label2id", "num_labels"):
        settings.pop(labels, None)
    settings["model_type"] = config.model_type
    described = {} if (found := _hf_processor(transformers, name)) is None else {"processor": found}
    return {"transformers": transformers.__version__, "config": _plain(settings), **described}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _hf_processor(transformers: Any, name: str) -> dict[str, Any] | None:
    try:
        described, _ = transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return None
    mean, std = described.get("image_mean"), described.get("image_std")
    return {"mean": list(mean), "std": list(std)} if mean and std else None


def _hf_config(name: str, num_outputs: int, record: Options) -> Any:
    transformers = _library("transformers", f"hf:{name}")
    settings = {key: value for key, value in record["config"].items() if key not in NO_SETTINGS}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.num_labels = num_outputs
    return config


def _hf(name: str, num_outputs: int, channels: int, options: Options, record: Options) -> nn.Module:
    transformers = _library("transformers", f"hf:{name}")
    config = _hf_config(name, num_outputs, record)
    make = transformers.AutoModelForImageClassification.from_config
    return LogitsOnly(_called(make, f"hf:{name}", config, trust_remote_code=False))


def _hf_pretrained(name: str, num_outputs: int, channels: int, options: Options, record: Options) -> nn.Module:
    transformers = _library("transformers", f"hf:{name}")
    config = _hf_config(name, num_outputs, record)
    make = transformers.AutoModelForImageClassification.from_pretrained
    settings = {"config": config, "ignore_mismatched_sizes": True, "trust_remote_code": False, "dtype": torch.float32}
    return LogitsOnly(_called(make, f"hf:{name}", name, **settings))


def _hf_normalisation(name: str, record: Options) -> tuple[Any, Any] | None:
    described = record.get("processor")
    return (described["mean"], described["std"]) if described else None


# Functions

_allowed: list[str] = []


def allow_code(name: str) -> None:
    """Allow this process to run `name`, a file.py:function or package.module:function, to build networks.

    A run whose network was made by that function can then be loaded, if the file is the one that the run recorded.
    """
    _split(name)
    if name not in _allowed:
        _allowed.append(name)


def _split(name: str) -> tuple[str, str]:
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise ValueError(f"{name!r} is no name of a function: give file.py:function or package.module:function")
    return place, function


def _file(name: str) -> Path:
    """Return the file that a function is in; of a module, this imports the packages that it is in."""
    place, _ = _split(name)
    if place.endswith(".py"):
        file = Path(place).expanduser().resolve()
        if not file.is_file():
            raise ValueError(f"model.name={name}: {file} does not exist")
        return file
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ValueError(f"model.name={name}: there is no Python module {place} here")
    return Path(spec.origin)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _function_record(name: str, channels: int, options: Options, pretrained: bool) -> dict[str, Any]:
    _refuse_unless_allowed(name, name in _allowed)
    file = _file(name)
    return {"file": str(file), "sha256": _sha256(file)}


def _refuse_unless_allowed(name: str, allowed: bool) -> None:
    if not allowed:
        raise ValueError(
            f"the network is made by {name}, which is code, and nothing of it was run: read it, and if it may run, add "
            f"--allow-code {name} (in Python: ducat.models.allow_code)"
        )


def _function(name: str, num_outputs: int, channels: int, options: Options, record: Options) -> nn.Module:
    _, function = _split(name)
    named = [other for other in _allowed if _split(other)[1] == function]
    _refuse_unless_allowed(f"{record['file']}:{function}" if name.endswith(f".py:{function}") else name, bool(named))
    for other in named:
        file = _file(other)
        if _sha256(file) == record["sha256"]:
            break
    else:
        raise ValueError(
            f"{named[0]} is not the file that the network was made by: that one has the SHA-256 {record['sha256']}"
        )
    module = _module(_split(other)[0], file, record["sha256"])
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function}")
    return _called(getattr(module, function), other, num_outputs, **options)


def _module(place: str, file: Path, sha256: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(f"{re.sub(r'[^a-zA-Z0-9_]', '_', file.stem)}_{sha256[:12]}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # other people's code fails in any way there is
        raise ValueError(f"{file} cannot be imported ({type(error).__name__}: {error})") from error
    return module


def _none(name: str, record: Options) -> None:
    return None


DOORS = {
    "timm/": Door(_timm_record, _timm, partial(_timm, pretrained=True), _timm_normalisation),
    "hf:": Door(_hf_record, _hf, _hf_pretrained, _hf_normalisation),
}
FUNCTION = Door(_function_record, _function, None, _none)
