"""Evaluate a run or a checkpoint on its test images, and write down what came of it."""

import hashlib
import inspect
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import ducat
from ducat import checkpoint, records, threads, weights
from ducat.architecture import Architecture
from ducat.attacks.suites import Suite, find_suite
from ducat.config import Config
from ducat.data import Dataset, load, load_test
from ducat.evaluation import behaviour, kept
from ducat.evaluation.engine import evaluate
from ducat.evaluation.rejection import calibrate
from ducat.evaluation.result import check_free
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
    again: bool = False,
    batch_size: int = 500,
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
    num_threads: int | None = None,
    notice: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """Evaluate a run on its test images, keep what was found under a name of its own, and return it.

    It lies in `evaluations/`, see `evaluation.kept`; the strongest one becomes evaluation.json, and what the network
    makes of its images is written to behaviour.json, see `behaviour.measure_run`. What has been measured before, of the
    same weights in the same way, is returned as it is kept.

    Finished chunks are kept in the run folder until the end, so an evaluation that was interrupted continues when it is
    asked for again with the same settings, and `accelerate launch` shares it among processes.

    Args:
        folder: the run.
        suite: which attacks, a row of `attacks.suites.SUITES` or a `Suite`.
        samples: how many test images, a fixed stratified subset; all by default.
        seed: of the attacks.
        which: "best" or "last" checkpoint.
        threat: the ball; by default the one that the run was trained in, with the usual attack step.
        reject: shares of benign images that may be refused, see `ducat.evaluate`; the thresholds are set on validation
            images.
        surrogates: run folders of other networks, whose adversarial images are tried too.
        second_round_seconds: the longest that the second round may take, see `ducat.evaluate`; None for no limit.
        again: measure anew what has been measured, and replace it.
        batch_size: samples attacked at a time.
        device: "auto", "cpu" or "cuda".
        progress: told of each attack and chunk as it starts.
        num_threads: threads of a CPU; by default as many as the network's passes are worth, see `ducat.threads`.
        notice: told where more threads are asked for than that, and what a user must know who has evaluations of
            earlier versions; a warning by default.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or the data are gone.
        ValueError: if the data are not those that the run was trained on, or a `Suite` of one's own has the name of one
            by which the run has been measured.
    """
    config, manifest = folder.config, folder.manifest
    dataset = folder.dataset()
    model, weights_digest = folder.load_with_digest(which)
    test = load_test(config.data.name, samples, config.data.root)
    threat = threat or config.threat.ball
    origin = {
        "weights": weights_digest,
        "code": _code(model),
        **_asked(reject, surrogates, second_round_seconds),
    }
    adopted = kept.adopt(folder) if _is_main_process(device) else None
    # A card of the zoo has no flags and images beside it, and is of no earlier version.
    if adopted is not None and folder.evaluation_path.with_suffix(".safetensors").is_file():
        notice(f"{folder.evaluation_path} is of an earlier version, and was kept as {adopted} as well")
    path = kept.path_for(folder.evaluations_path, find_suite(suite).name, threat, len(test[1]), seed, which, origin)
    measured = None if again else _kept(path, suite, origin, notice)
    if measured is None:
        kept.check(folder)
        measured = _evaluate_and_save(
            model,
            test,
            threat,
            path,
            device,
            which,
            origin,
            suite=suite,
            num_classes=folder.read(which)[1]["model"]["num_classes"],
            seed=seed,
            reject=reject,
            held_out=_held_out(dataset, folder) if reject else None,
            surrogates=[RunFolder.open(Path(run)).load("best") for run in surrogates],
            second_round_seconds=second_round_seconds,
            batch_size=batch_size,
            data=manifest["data"]["title"],
            progress=progress or (lambda attack: None),
            num_threads=num_threads,
            notice=notice,
        )
    if _is_main_process(device):
        kept.promote(folder, origin["code"])
        # An evaluation of the zoo comes without its images.
        if folder.evaluation_path.with_suffix(".safetensors").is_file() and not behaviour.is_current(folder):
            behaviour.measure_run(folder, dataset)
    _processes(device).wait_for_everyone()  # each may read what the first has written
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
    keep: Path | None = None,
    again: bool = False,
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
        keep: in place of `path` a folder where the result is kept under a name of its own; what has been measured
            before, of the same weights in the same way, is returned as it is kept there.
        again: measure anew what is in `keep`, and replace it.
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
        check_free(path)
    dataset = load(config.data.name, root=config.data.root)
    classes = len(dataset.classes)
    if num_classes not in (None, classes):
        raise ValueError(
            f"num_classes={num_classes}, but {config.data.name} has {classes} classes: a network is measured on data "
            "of its own classes, so choose another data set (--data)"
        )
    config = config.resolve(dataset.spec)
    if config.model.name is not None and is_function(config.model.name):
        allow_code(config.model.name)  # whoever makes settings has asked for it
    architecture, model = weights.read(source).network(config.described(config.architecture(dataset)))
    test, threat = load_test(config.data.name, samples, config.data.root), config.threat.ball
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    origin = {
        "weights": checkpoint.digest(tensors),
        "measured": _measured(tensors, architecture, test),
        "code": _code(model),
        **_asked(reject, surrogates, second_round_seconds),
        "source": {
            "checkpoint": str(source),
            "data": config.data.name,
            "model": config.model.name,
            "width": config.model.width,
            "normalization": config.model.normalization,
        },
    }
    if keep is not None:
        title = find_suite(suite).name
        path = kept.path_for(
            keep, title, threat, len(test[1]), seed, None, origin, f"{source.stem}-{config.data.name}-"
        )
        if not again and (measured := _kept(path, suite, origin, notice)) is not None:
            return measured
    return _evaluate_and_save(
        model,
        test,
        threat,
        path,
        device,
        None,
        origin,
        suite=suite,
        num_classes=classes,
        seed=seed,
        reject=reject,
        held_out=_held_out(dataset) if reject else None,
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
        ValueError: if share or signal do not fit, or the data are not those that the run was trained on.
    """
    x, y = _held_out(folder.dataset(), folder)
    model, weights_digest = folder.load_with_digest(which)
    content = {
        "schema": 1,
        "signal": signal,
        "threshold": calibrate(model, x, y, share, signal),
        "reject": share,
        "checkpoint": which,
        "weights": weights_digest,
        "images": len(y),
    }
    checkpoint.write_text(folder.rejection_path, json.dumps(content, indent=2) + "\n")
    return content


def read_calibration(folder: RunFolder, which: Which) -> dict[str, Any] | None:
    """Return what `calibrate_run` wrote for a checkpoint, or None if there is nothing.

    Raises:
        ValueError: if the checkpoint has been trained on since, or the file is damaged.
    """
    if not folder.rejection_path.is_file():
        return None
    remedy = f"run `ducat calibrate {folder.quoted}` again, or delete it"
    content: dict[str, Any] = records.read(folder.rejection_path, records.Calibration, remedy)
    if content["checkpoint"] != which:
        return None
    if content.get("weights") not in (None, kept.weights_of(folder, which)):
        raise ValueError(f"{folder.rejection_path} is of weights that have been trained on since: {remedy}")
    return content


def _held_out(dataset: Dataset, folder: RunFolder | None = None) -> tuple[Tensor, Tensor]:
    """Return the images that a network was not trained on, and by which thresholds may be set.

    Raises:
        ValueError: if none were held out, or the run began with weights that have learnt them.
    """
    validation = dataset.validation
    initial = (folder.manifest.get("initial") or {}) if folder is not None else {}
    if learnt := initial.get("validation_learnt"):
        raise ValueError(
            f"{learnt} of {len(validation)} validation images are among those that {initial['file']} was trained on: "
            "thresholds would be set on images that the network has learnt; train with the data.held_out of that run"
        )
    if not len(validation):
        raise ValueError(
            "no images were held out of training: thresholds would be set on images that the network has learnt; "
            "train with data.held_out above 0"
        )
    return validation.floats(), validation.labels


def _asked(
    reject: Sequence[float], surrogates: Sequence[Path | str], second_round_seconds: float | None
) -> dict[str, Any]:
    """Return what tells two evaluations of a network apart beside suite, ball, samples and seed."""
    named = []
    for run in surrogates:
        folder = RunFolder.open(Path(run))
        named.append(f"{folder.path.resolve().name}-{(kept.weights_of(folder, 'best') or '')[:8]}")
    return {
        "reject": list(reject),
        "surrogates": named,
        "second_round_seconds": second_round_seconds,
        "ducat": ducat.__version__,
    }


def _measured(tensors: Mapping[str, Tensor], architecture: Architecture, test: tuple[Tensor, Tensor]) -> str:
    """Return a digest of all that makes the numbers of a network from elsewhere: weights, network and test images."""
    images, labels = test
    described = json.dumps(asdict(architecture), sort_keys=True, default=str)
    made = checkpoint.digest({**tensors, "test images": images, "test labels": labels})
    return hashlib.blake2b(f"{described} {made}".encode(), digest_size=16).hexdigest()


def _code(model: nn.Module) -> str | None:
    """Return a digest of the files that the network's own classes, and those that they derive from, come from.

    None where all are Python's or installed packages', or in no file of their own.
    """
    files: set[Path] = set()
    for kind in {kind for module in model.modules() for kind in type(module).__mro__}:
        if kind.__module__.partition(".")[0] not in {"__main__", *sys.stdlib_module_names}:
            with suppress(TypeError):  # its module is in no file, or gone
                files.add(Path(inspect.getsourcefile(kind) or ""))
    own = [file for file in files if file.is_file() and "site-packages" not in file.parts]
    own = [file for file in own if not file.is_relative_to(Path(ducat.__file__).parent)]
    contents = b"".join(sorted(hashlib.blake2b(file.read_bytes()).digest() for file in own))
    return hashlib.blake2b(contents, digest_size=16).hexdigest() if own else None


def _kept(
    path: Path, suite: str | Suite, origin: Mapping[str, Any], notice: Callable[[str], None]
) -> dict[str, Any] | None:
    """Return the evaluation that is kept at `path`, or None if there is none of this code by this version's attacks."""
    if not path.is_file():
        return None
    if isinstance(suite, Suite):
        raise ValueError(
            f"{path} is there, by a suite called {suite.name} as well: give the suite another name=, or again=True"
        )
    if not path.with_suffix(".safetensors").is_file():
        return None  # a card of the zoo, which came without flags and images
    found = kept.read(path)
    version = (found.get("origin") or {}).get("ducat", "0.1.0")  # the first ones do not say
    if version != ducat.__version__:
        notice(f"{path} was measured by ducat {version}, whose attacks may be others: it is measured anew")
        return None
    if (found.get("origin") or {}).get("code") != origin["code"]:
        notice(f"{path} was measured with other code of the network's modules: it is measured anew")
        return None
    return found


def _evaluate_and_save(
    model: nn.Module,
    test: tuple[Tensor, Tensor],
    threat: ThreatModel,
    path: Path | None,
    device: str,
    which: Which | None,
    origin: Mapping[str, Any],
    num_threads: int | None,
    notice: Callable[[str], None],
    **settings: Any,
) -> dict[str, Any]:
    processes = _processes(device)
    parts = path.with_suffix(".parts") if path is not None else None
    others = [other.to(processes.device) for other in settings.pop("surrogates")]
    model, example = model.to(processes.device), test[0][:1].to(processes.device)
    with threads.chosen(model, example, min(settings["batch_size"], len(test[1])), num_threads, notice):
        evaluation = evaluate(model, *test, threat, parts=parts, surrogates=others, **settings)
    evaluation = replace(evaluation, checkpoint=which, origin=origin)
    processes.wait_for_everyone()
    if path is not None and parts is not None and processes.is_main_process:
        evaluation.save(path, replace=True)  # whether it may be replaced was settled before hours of work
        shutil.rmtree(parts, ignore_errors=True)  # another one, which took the chunks up, may have done it
    processes.wait_for_everyone()
    return evaluation.to_dict()


def _processes(device: str) -> Any:
    from accelerate import PartialState

    processes = PartialState(cpu=device == "cpu" or threads.launched())
    if device == "cuda" and processes.device.type != "cuda":
        raise ValueError("device=cuda: PyTorch finds no GPU here; choose cpu or auto")
    return processes


def _is_main_process(device: str) -> bool:
    return bool(_processes(device).is_main_process)
