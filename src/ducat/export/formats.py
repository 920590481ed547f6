"""A trained run in the formats of other tools.

Normalisation and recovery are inside every format. Each is loaded back as soon as it is written, and compared with the
network it came from.
"""

import errno
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ducat.export import hub, robustbench
from ducat.export.classifier import Classifier, Deployed, load, save
from ducat.installing import install
from ducat.runs import Which

FLIPPED = 0.05  # of the images
TOLERANCE = 1e-4  # of logits: other libraries add in another order


class Format(NamedTuple):
    """A row of the table of formats.

    `write(source, path)` makes a file or a folder; `read(path)` returns a function of images to one output or a tuple.
    """

    write: Callable[[Deployed, Path], None]
    read: Callable[[Path], Callable[[Tensor], Any]]


@dataclass(frozen=True)
class Exported:
    """What `export` made, and how well it agrees with the network it came from.

    Attributes:
        path: the file or folder.
        difference: largest difference of any output on the images compared.
        images: which images were compared.
    """

    path: Path
    difference: float
    images: str


def export(run: Path | str, format: str, out: Path | str, *, which: Which = "best", detector: bool = False) -> Exported:
    """Write a run's deployed model for another tool, load it back, and compare it with the network.

    Args:
        run: the run folder.
        format: a row of `FORMATS`: "onnx", "safetensors" and "torch-export" are files, "hub" and "robustbench" folders.
        out: the file or folder to make.
        which: the checkpoint, "best" or "last".
        detector: whether there is a second output, see `Classifier`. A run that `ducat calibrate` has given a threshold
            has one more output, last, except for RobustBench, which takes one output.

    Raises:
        FileNotFoundError: if there is no such run or checkpoint.
        FileExistsError: if there is something at `out`; nothing is overwritten.
        ValueError: if the format is unknown or needs packages that are not installed, or a detector is asked of a
            network without dummy classes or of a format with one output.
        RuntimeError: if what was written does not agree with the network; it is then not left at `out`.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: choose from {', '.join(FORMATS)}")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"out: {out} exists, and nothing is overwritten")
    if detector and format == "robustbench":
        raise ValueError("detector: RobustBench takes classifiers with one output")
    source = Deployed.read(run, which, detector=detector, selective=format != "robustbench")
    with _making(out) as part:
        FORMATS[format].write(source, part)
        difference = _compare(source.classifier, FORMATS[format].read(part), source.images)
    return Exported(out, difference, f"{len(source.images)} {source.images_name}")


@contextmanager
def _making(out: Path) -> Iterator[Path]:
    """Yield a path to write to; a file or folder there appears at `out` whole, or not at all."""
    hidden = out.with_name(f".{os.getpid()}.tmp.{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield hidden
        hidden.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace(str(hidden), str(out))
        raise OSError(getattr(error, "errno", None) or errno.EIO, f"cannot write {out}: {reason}") from error
    finally:
        if hidden.is_dir():
            shutil.rmtree(hidden)
        hidden.unlink(missing_ok=True)


def _compare(classifier: Classifier, other: Callable[[Tensor], Any], images: Tensor) -> float:
    difference = 0.0
    # Of two sizes, so that a file that takes only one size of batch does not pass.
    for batch in (images, images[:1]):
        with torch.no_grad():
            pairs = zip(_outputs(classifier(batch)), _outputs(other(batch)), strict=True)
        for number, (ours, theirs) in enumerate(pairs):
            if ours.dtype == np.bool_:
                # At the threshold itself rounding decides.
                if ours.shape != theirs.shape or np.mean(ours != theirs) > FLIPPED:
                    raise RuntimeError("the exported model accepts other images than the network: this is a defect")
                continue
            if ours.shape != theirs.shape or (number == 0 and not np.array_equal(ours.argmax(1), theirs.argmax(1))):
                raise RuntimeError("the exported model predicts other classes than the network: this is a defect")
            difference = max(difference, float(np.abs(ours - theirs).max()))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the exported model differs from the network by {difference:.2g}: this is a defect")
    return difference


def _outputs(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(output) for output in (outputs if isinstance(outputs, tuple | list) else [outputs])]


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Keep PyTorch's exporters from talking about their own insides."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _need(extra: str, *modules: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: {install(extra)}")


def _write_onnx(source: Deployed, path: Path) -> None:
    _need("onnx", "onnx", "onnxscript", "onnxruntime")
    names = source.classifier.names
    with _quiet("torch.onnx"):
        program = torch.onnx.export(
            source.program, (), dynamo=True, verbose=False, input_names=["images"], output_names=names
        )
    assert program is not None
    described: dict[str, Any] = {"classes": source.classifier.classes}
    if source.classifier.threshold is not None:
        described |= {"signal": source.classifier.signal, "threshold": source.classifier.threshold}
    program.model.metadata_props.update({name: json.dumps(value) for name, value in described.items()})
    program.save(str(path))


def _read_onnx(path: Path) -> Callable[[Tensor], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: tuple(session.run(None, {"images": images.numpy()}))


def _write_torch_export(source: Deployed, path: Path) -> None:
    made = io.BytesIO()  # PyTorch's own writer says of a full disk that it is a defect
    with _quiet("torch.export"):
        torch.export.save(source.program, made)
    path.write_bytes(made.getbuffer())


def _read_torch_export(path: Path) -> Callable[[Tensor], Any]:
    with _quiet("torch.export"), open(path, "rb") as file:
        return torch.export.load(file).module()


FORMATS: dict[str, Format] = {
    "onnx": Format(_write_onnx, _read_onnx),
    "safetensors": Format(save, load),
    "torch-export": Format(_write_torch_export, _read_torch_export),
    "hub": Format(hub.write, hub.read),
    "robustbench": Format(robustbench.write, robustbench.read),
}
