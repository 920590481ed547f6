"""Evaluate a run or a checkpoint on its test images, and write down what came of it."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ducat import checkpoint, threads, weights
from ducat.attacks.suites import Suite
from ducat.config import Config
from ducat.data import load, load_test
from ducat.evaluation import behaviour
from ducat.evaluation.engine import evaluate
from ducat.evaluation.rejection import calibrate
from ducat.models import allow_code
from ducat.models.doors import is_function
from ducat.runs import RunFolder, Which
from ducat.threat import ThreatModel


def evaluate_run(
    folder: RunFolder,
    suite: str | Suite = "standard",
    *,
    samples: int | None = None,
    seed: int = 0,
    which: Which = "best",
    threat: ThreatModel | None = None,
    reject: Sequence[float] = (),
    surrogates: Sequence[Path | str] = (),
    second_round_seconds: float | None = None,
    batch_size: int = 500,
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
    num_threads: int | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate a run on its test images, write evaluation.json and evaluation.safetensors, and return the former.

    What the network makes of these images is written to behaviour.json as well, see `behaviour.measure_run`.

    Finished chunks are kept in the run folder until the end, so an evaluation that was interrupted continues when it is
    asked for again with the same settings, and `accelerate launch` shares it among processes.

    Args:
        folder: the run.
        suite: which attacks, a row of `attacks.suites.SUITES` or a `Suite`.
        samples: how many test images, a fixed stratified subset; all by default.
        seed: of the attacks.
        which: "best" or "last" checkpoint.
        threat: the ball; by default the one that the run was trained in.
        reject: shares of benign images that may be refused, see `ducat.evaluate`; the thresholds are set on validation
            images.
        surrogates: run folders of other networks, whose adversarial images are tried too.
        second_round_seconds: the longest that the second round may take, see `ducat.evaluate`; None for no limit.
        batch_size: samples attacked at a time.
        device: "auto", "cpu" or "cuda".
        progress: told of each attack and chunk as it starts.
        num_threads: threads of a CPU; by default as many as the network's passes are worth, see `ducat.threads`.
        notice: told where more threads are asked for than that.
    """
    config = folder.config
    model = folder.load(which)
    measured = _evaluate_and_save(
        model,
        load_test(config.data.name, samples, config.data.root),
        threat or config.threat.build(None),
        folder.evaluation_path,
        device,
        which,
        suite=suite,
        num_classes=folder.read(which)[1]["model"]["num_classes"],
        seed=seed,
        reject=reject,
        held_out=_held_out(config) if reject else None,
        surrogates=[RunFolder.open(Path(run)).load("best") for run in surrogates],
        second_round_seconds=second_round_seconds,
        batch_size=batch_size,
        data=folder.manifest["data"]["title"],
        progress=progress or (lambda attack: None),
        num_threads=num_threads,
        notice=notice,
    )
    if _is_main_process():
        behaviour.measure_run(folder)
    return measured


def evaluate_checkpoint(
    source: Path,
    config: Config,
    suite: str | Suite = "standard",
    *,
    num_classes: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    path: Path | None = None,
    reject: Sequence[float] = (),
    surrogates: Sequence[Path | str] = (),
    second_round_seconds: float | None = None,
    batch_size: int = 500,
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
    num_threads: int | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate any network on a data set's test images, and return the content of an evaluation.json.

    Args:
        source: file of weights, as `weights.read` takes it.
        config: its `data`, `model` and `threat` say what to evaluate and how; the rest of it is not used. A head with
            twice as many outputs as the data have classes has dummy classes.
        suite: which attacks, a row of `attacks.suites.SUITES` or a `Suite`.
        num_classes: C, checked against the data; None does not check.
        samples: how many test images, a fixed stratified subset; all by default.
        seed: of the attacks.
        path: the .json file to write, with a .safetensors beside it; nothing is written by default.
        reject: shares of benign images that may be refused, see `ducat.evaluate`; the thresholds are set on validation
            images.
        surrogates: run folders of other networks, whose adversarial images are tried too.
        second_round_seconds: the longest that the second round may take, see `ducat.evaluate`; None for no limit.
        batch_size: samples attacked at a time.
        device: "auto", "cpu" or "cuda".
        progress: told of each attack and chunk as it starts.
        num_threads: threads of a CPU; by default as many as the network's passes are worth, see `ducat.threads`.
        notice: told where more threads are asked for than that.

    Raises:
        FileNotFoundError: if there are no such weights or data.
        FileExistsError: if `path` or the .safetensors beside it is there already.
        ValueError: if the weights do not fit the network, or the data have another number of classes.
    """
    if path is not None:
        for file in (path, path.with_suffix(".safetensors")):
            if file.exists():
                raise FileExistsError(
                    f"{file} exists, and nothing is overwritten: choose another name than {path.name}"
                )
    dataset = load(config.data.name, root=config.data.root)
    classes = len(dataset.classes)
    if num_classes not in (None, classes):
        raise ValueError(f"num_classes={num_classes}, but {config.data.name} has {classes} classes")
    config = config.resolve(dataset.spec)
    if config.model.name is not None and is_function(config.model.name):
        allow_code(config.model.name)  # whoever makes settings has asked for it
    _, model = weights.read(source).network(config.described(config.architecture(dataset)))
    return _evaluate_and_save(
        model,
        load_test(config.data.name, samples, config.data.root),
        config.threat.build(None),
        path,
        device,
        None,
        suite=suite,
        num_classes=classes,
        seed=seed,
        reject=reject,
        held_out=_held_out(config) if reject else None,
        surrogates=[RunFolder.open(Path(run)).load("best") for run in surrogates],
        second_round_seconds=second_round_seconds,
        batch_size=batch_size,
        data=dataset.spec.title,
        progress=progress or (lambda attack: None),
        num_threads=num_threads,
        notice=notice,
    )


def calibrate_run(
    folder: RunFolder, share: float, signal: str = "confidence", *, which: Which = "best"
) -> dict[str, Any]:
    """Set the threshold of a run on its validation images, write rejection.json, and return what was written.

    What was written before is replaced. `ducat serve` and `ducat export` go by it.

    Args:
        folder: the run.
        share: of the correctly classified benign images, how many may be refused, in [0, 1).
        signal: a name in `evaluation.rejection.SIGNALS`.
        which: "best" or "last" checkpoint.

    Raises:
        FileNotFoundError: if there is no such run or checkpoint, or the data are gone.
        ValueError: if share or signal do not fit.
    """
    x, y = _held_out(folder.config)
    content = {
        "schema": 1,
        "signal": signal,
        "threshold": calibrate(folder.load(which), x, y, share, signal),
        "reject": share,
        "checkpoint": which,
        "images": len(y),
    }
    checkpoint.write_text(folder.rejection_path, json.dumps(content, indent=2) + "\n")
    return content


def read_calibration(folder: RunFolder, which: Which) -> dict[str, Any] | None:
    """Return what `calibrate_run` wrote for a checkpoint, or None if there is nothing."""
    if not folder.rejection_path.is_file():
        return None
    content: dict[str, Any] = json.loads(folder.rejection_path.read_text(encoding="utf-8"))
    return content if content["checkpoint"] == which else None


def _held_out(config: Config) -> tuple[Tensor, Tensor]:
    validation = load(config.data.name, root=config.data.root).validation
    return validation.floats(), validation.labels


def _evaluate_and_save(
    model: nn.Module,
    test: tuple[Tensor, Tensor],
    threat: ThreatModel,
    path: Path | None,
    device: str,
    which: Which | None,
    num_threads: int | None,
    notice: Callable[[str], None],
    **settings: Any,
) -> dict[str, Any]:
    from accelerate import PartialState

    processes = PartialState(cpu=device == "cpu")
    if device == "cuda" and processes.device.type != "cuda":
        raise ValueError("device=cuda: PyTorch finds no GPU here; choose cpu or auto")
    parts = path.with_suffix(".parts") if path is not None else None
    others = [other.to(processes.device) for other in settings.pop("surrogates")]
    model, example = model.to(processes.device), test[0][:1].to(processes.device)
    with threads.chosen(model, example, min(settings["batch_size"], len(test[1])), num_threads, notice):
        evaluation = evaluate(model, *test, threat, parts=parts, surrogates=others, **settings)
    evaluation = replace(evaluation, checkpoint=which)
    processes.wait_for_everyone()
    if path is not None and parts is not None and processes.is_main_process:
        evaluation.save(path)
        shutil.rmtree(parts)
    return evaluation.to_dict()


def _is_main_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
