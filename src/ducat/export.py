"""A trained run in the formats of other tools: images in [0, 1] go in, C logits come out.

Normalisation and recovery are inside every format. Each is loaded back as soon as it is written, and compared with the
network it came from.
"""

import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from ducat import checkpoint, data
from ducat import compare as comparing
from ducat.dummy import recover
from ducat.models.architecture import Architecture
from ducat.runs import RunFolder, Which

COMPARED = 64  # images that a written file is compared on
TOLERANCE = 1e-4  # of logits: other libraries add in another order

Images = Float[Tensor, "batch channels height width"]
Logits = Float[Tensor, "batch classes"]
Outputs = Logits | tuple[Logits, Float[Tensor, " batch"]]


class Classifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ducat",
    coders={Architecture: (asdict, lambda fields: Architecture(**fields))},
):
    """The deployed classifier, with all that is needed to build it again.

    Maps images in [0, 1], shape (B, channels, H, W), to C logits, shape (B, C). With `detector` it returns a second
    tensor, shape (B,): the probability that the image is adversarial, by the within-pair classifier that dummy classes
    train on the side, s = p_{y+C} / (p_y + p_{y+C}) for the predicted class y. It was trained on the attacks that
    training met; whoever knows of it can attack it too.

    Args:
        architecture: of the network.
        classes: the names of the C classes, in the order of the logits.
        detector: whether to return the probability as well.

    Raises:
        ValueError: if a detector is asked of a network without dummy classes.
    """

    def __init__(self, architecture: Architecture, classes: Sequence[str], detector: bool = False) -> None:
        super().__init__()
        if detector and not architecture.dummy_classes:
            raise ValueError("detector: the network has no dummy classes, so nothing in it tells adversarial images")
        self.architecture, self.classes, self.detector = architecture, tuple(classes), detector
        with torch.random.fork_rng(devices=[]):
            self.model = architecture.build()

    def forward(self, images: Images) -> Outputs:
        logits = self.model(images)
        if not self.architecture.dummy_classes:
            return logits
        recovered = recover(logits)
        if not self.detector:
            return recovered
        real, dummy = logits.chunk(2, dim=1)
        predicted = recovered.argmax(1, keepdim=True)
        return recovered, torch.sigmoid((dummy - real).gather(1, predicted)).squeeze(1)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> "Classifier":
        # The library would fill missing weights with random ones in silence.
        return super()._from_pretrained(strict=strict, **kwargs)


class Format(NamedTuple):
    """A row of the table of formats.

    `write(source, path)` makes a file or a folder; `read(path)` returns a function of images to one output or a tuple.
    """

    write: Callable[["Source", Path], None]
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


@dataclass(frozen=True)
class Source:
    """A run's deployed classifier, and what is known of it.

    Attributes:
        folder: the run.
        which: the checkpoint.
        classifier: in evaluation mode; its classes are numbers if the data are not at hand.
        evaluated: None where this checkpoint has not been evaluated.
        images: a few in [0, 1], shape (n, channels, H, W): test images, or random ones if the data are not at hand.
        images_name: what they are.
    """

    folder: RunFolder
    which: Which
    classifier: Classifier
    evaluated: comparing.Run | None
    images: Tensor
    images_name: str

    @classmethod
    def read(cls, run: Path | str, which: Which = "best", *, detector: bool = False) -> "Source":
        """Read a run.

        Raises:
            FileNotFoundError: if there is no such run or checkpoint.
            ValueError: if the checkpoint is damaged, or a detector is asked of a network without dummy classes.
        """
        folder = RunFolder.open(run)
        tensors, state = folder.read(which)
        architecture = Architecture(**state["model"])
        settings = folder.config.data
        try:
            dataset = data.load(settings.name, root=settings.root)
            classes, images = dataset.classes, dataset.test.floats()[:COMPARED]
            name = f"{dataset.spec.title} test images"
        except FileNotFoundError:  # The run may have come from another machine.
            spec = data.SPECS.get(settings.name)
            side = 32 if spec is None else spec.shape[1]
            shape = COMPARED, architecture.channels, side, side
            images, name = torch.rand(shape, generator=torch.Generator().manual_seed(0)), "random images"
            classes = tuple(map(str, range(architecture.num_classes)))
        classifier = Classifier(architecture, classes, detector)
        classifier.model.load_state_dict(checkpoint.part("model", tensors))
        return cls(folder, which, classifier.eval(), _evaluated(folder, which), images, name)

    @property
    def evaluation(self) -> Mapping[str, Any] | None:
        return self.evaluated.evaluation if self.evaluated is not None else None

    @property
    def program(self) -> torch.export.ExportedProgram:
        """The classifier as a graph, for batches of any size."""
        batch = {0: torch.export.Dim("batch")}
        return torch.export.export(self.classifier, (self.images[:2],), dynamic_shapes={"images": batch})


def export(run: Path | str, format: str, out: Path | str, *, which: Which = "best", detector: bool = False) -> Exported:
    """Write a run's deployed model for another tool, load it back, and compare it with the network.

    Args:
        run: the run folder.
        format: a row of `FORMATS`: "onnx", "safetensors" and "torch-export" are files, "hub" and "robustbench" folders.
        out: the file or folder to make.
        which: the checkpoint, "best" or "last".
        detector: whether there is a second output, see `Classifier`.

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
    source = Source.read(run, which, detector=detector)
    with _making(out) as part:
        FORMATS[format].write(source, part)
        difference = _compare(source.classifier, FORMATS[format].read(part), source.images)
    return Exported(out, difference, f"{len(source.images)} {source.images_name}")


def load(path: Path | str) -> Classifier:
    """Load what `export` wrote as safetensors, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or another kind of file.
    """
    tensors, state = checkpoint.read(Path(path))
    if "classes" not in state:
        raise ValueError(f"{path} is a checkpoint of a run: ducat.load takes the run folder")
    classifier = Classifier(Architecture(**state["model"]), state["classes"], state["detector"])
    classifier.model.load_state_dict(checkpoint.part("model", tensors))
    return classifier.eval()


def _evaluated(folder: RunFolder, which: Which) -> comparing.Run | None:
    if not folder.evaluation_path.is_file():
        return None
    evaluated = comparing.Run.read(folder.path)
    # Numbers of another checkpoint say nothing of this one.
    return evaluated if evaluated.evaluation.get("checkpoint") == which else None


@contextmanager
def _making(out: Path) -> Iterator[Path]:
    """Yield a path to write to; a file or folder there appears at `out` whole, or not at all."""
    hidden = out.with_name(f".{os.getpid()}.tmp.{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield hidden
        hidden.rename(out)
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
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'ducat[{extra}]'")


def _write_onnx(source: Source, path: Path) -> None:
    _need("onnx", "onnx", "onnxscript", "onnxruntime")
    names = ["logits", "adversarial"] if source.classifier.detector else ["logits"]
    with _quiet("torch.onnx"):
        program = torch.onnx.export(
            source.program, (), dynamo=True, verbose=False, input_names=["images"], output_names=names
        )
    assert program is not None
    program.model.metadata_props["classes"] = json.dumps(source.classifier.classes)
    program.save(str(path))


def _read_onnx(path: Path) -> Callable[[Tensor], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: tuple(session.run(None, {"images": images.numpy()}))


def _write_torch_export(source: Source, path: Path) -> None:
    with _quiet("torch.export"), open(path, "wb") as file:
        torch.export.save(source.program, file)


def _read_torch_export(path: Path) -> Callable[[Tensor], Any]:
    with _quiet("torch.export"), open(path, "rb") as file:
        return torch.export.load(file).module()


def _write_safetensors(source: Source, path: Path) -> None:
    classifier = source.classifier
    state = {
        "model": asdict(classifier.architecture),
        "classes": classifier.classes,
        "detector": classifier.detector,
    }
    checkpoint.save(path, checkpoint.named("model", classifier.model.state_dict()), state)


def _write_hub(source: Source, path: Path) -> None:
    path.mkdir()
    checkpoint.write_text(path / "README.md", _card(source))
    source.classifier.save_pretrained(path)


def _read_hub(path: Path) -> Callable[[Tensor], Any]:
    # The library prints a line.
    with redirect_stdout(io.StringIO()):
        return Classifier.from_pretrained(path)


def _card(source: Source) -> str:
    classifier, manifest = source.classifier, source.folder.manifest
    front = {
        "library_name": "ducat",
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "adversarial-training", "ducat"],
    }
    call = "logits = model(images)  # images in [0, 1], (batch, channels, height, width), to (batch, classes)"
    if classifier.detector:
        call = "logits, adversarial = model(images)  # and the probability that each image is adversarial, (batch,)"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        f"# {source.folder.name}",
        "",
        f"An image classifier trained with ducat {manifest['ducat']}: "
        f"{classifier.architecture.name}, {len(classifier.classes)} classes, {_method(source)}.",
        f"Training data: {manifest['data']['title']}, {manifest['data']['train']} images.",
        "",
        "## Use",
        "",
        "```python",
        "from ducat.export import Classifier",
        "",
        'model = Classifier.from_pretrained("PATH OR REPOSITORY")  # in evaluation mode',
        call,
        "```",
        "",
        "Normalisation is inside. "
        + ("So is recovery: each logit is the larger of a class's real and dummy output. " * _has_dummies(source))
        + f"Classes, in the order of the logits: {', '.join(classifier.classes)}.",
        "",
        "## Accuracy",
        "",
        *_accuracy(source),
    ]
    return "\n".join(lines) + "\n"


def _has_dummies(source: Source) -> bool:
    return source.classifier.architecture.dummy_classes


def _method(source: Source) -> str:
    config = source.folder.config
    kind = config.dummy.kind
    return config.method.name + ("" if kind == "off" else f" with {kind} dummy classes")


def _accuracy(source: Source) -> list[str]:
    if source.evaluated is None:
        return [
            "**Not evaluated.** Nothing has been measured of this checkpoint, neither its clean accuracy nor its "
            f"robustness: run `ducat evaluate` with `--which {source.which}` on its run folder, and export again."
        ]
    lines = [
        comparing.to_markdown(comparing.compare([source.evaluated])),
        "`blind` is the worst case over attacks that do not know that predictions are recovered, `robust` over all "
        "attacks, those that know included. Only `robust` is robustness.",
        "",
        "| attack | knows recovery | accuracy (%) |",
        "| --- | --- | --- |",
        *(
            f"| {attack['name']} | {'yes' if attack['knows_recovery'] else 'no'} | {100 * attack['accuracy']:.1f} |"
            for attack in source.evaluated.evaluation["attacks"]
        ),
    ]
    return lines + [
        line for warning in source.evaluated.evaluation["warnings"] for line in ("", f"**Warning**: {warning}.")
    ]


_LOADER = '''"""The model of this folder for RobustBench: images in [0, 1] to logits, one deterministic forward pass."""

from pathlib import Path

from ducat.export import Classifier, load


def load_model() -> Classifier:
    """Return the model in evaluation mode."""
    return load(Path(__file__).with_name("weights.safetensors"))
'''

NOT_MEASURED = "not measured"
_PAPERS = {
    "natural": ("", ""),
    "pgd-at": ("Towards Deep Learning Models Resistant to Adversarial Attacks", "https://arxiv.org/abs/1706.06083"),
    "trades": (
        "Theoretically Principled Trade-off between Robustness and Accuracy",
        "https://arxiv.org/abs/1901.08573",
    ),
    "mart": ("Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ""),
    "consistency": ("Consistency Regularization for Adversarial Robustness", "https://arxiv.org/abs/2103.04623"),
}
_DUMMY_PAPER = (
    "New Paradigm of Adversarial Training: Breaking Inherent Trade-Off between Accuracy and Robustness via Dummy "
    "Classes",
    "https://arxiv.org/abs/2410.12671",
)


def _write_robustbench(source: Source, path: Path) -> None:
    path.mkdir()
    _write_safetensors(source, path / "weights.safetensors")
    (path / "model.py").write_text(_LOADER)
    (path / "claim.md").write_text(_claim(source))
    (path / "model_info.json").write_text(json.dumps(_model_info(source), indent=2) + "\n")


def _read_robustbench(path: Path) -> Callable[[Tensor], Any]:
    spec = spec_from_file_location("robustbench_model", path / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_model()


def _paper(source: Source) -> tuple[str, str]:
    """Return title and address of the paper of the method, each empty where there is none."""
    config = source.folder.config
    return _DUMMY_PAPER if config.dummy.kind != "off" else _PAPERS.get(config.method.name, ("", ""))


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.2f}"


def _eps(evaluation: Mapping[str, Any]) -> str:
    """Write eps as RobustBench does, in 255ths where it is a whole number of them."""
    eps = evaluation["threat"]["eps"]
    return f"{round(255 * eps)}/255" if abs(255 * eps - round(255 * eps)) < 1e-6 else f"{eps:g}"


def _autoattack(evaluation: Mapping[str, Any], knows_recovery: bool) -> float | None:
    found = [
        attack["accuracy"]
        for attack in evaluation["attacks"]
        if attack["name"].startswith("autoattack") and attack["knows_recovery"] == knows_recovery
    ]
    return min(found, default=None)


def _claim(source: Source) -> str:
    """Fill RobustBench's issue form for new models, with what was measured and nothing else."""
    evaluation, manifest = source.evaluation, source.folder.manifest
    title, address = _paper(source)
    fill_in = "(to fill in)"
    if evaluation is None:
        norm, eps, clean, robust, method = "", "", NOT_MEASURED, NOT_MEASURED, f"{NOT_MEASURED}: run `ducat evaluate`"
    else:
        norm, eps = evaluation["threat"]["norm"].capitalize(), _eps(evaluation)
        clean, robust = _percent(evaluation["clean"]["accuracy"]), _percent(evaluation["robust"])
        method = (
            f"per-sample worst case over {len(evaluation['attacks'])} attacks, blind and recovery-aware, on "
            f"{evaluation['samples']} of {manifest['data']['test']} test images (`ducat evaluate --suite "
            f"{evaluation['suite']}`)"
        )
    initial = manifest.get("initial")
    extra = "false" if initial is None else f"not known: training began with the weights of {initial['file']}"
    lines = [
        "# Paper Information",
        "",
        f"- **Paper Title**: {title or fill_in}",
        f"- **Paper URL**: {address or fill_in}",
        f"- **Paper authors**: {fill_in}",
        "",
        "# Leaderboard Claim(s)",
        "",
        "## Model 1",
        "",
        f"- **Architecture**: {source.classifier.architecture.name}",
        f"- **Dataset**: {manifest['data']['title']}",
        f"- **Threat Model**: {norm or NOT_MEASURED}",
        f"- **eps**: {eps or NOT_MEASURED}",
        f"- **Clean accuracy**: {clean}",
        f"- **Robust accuracy**: {robust}",
        f"- **Additional data**: {extra}",
        f"- **Evaluation method**: {method}",
        f"- **Checkpoint and code**: {fill_in}; `model.py` and `weights.safetensors` in this folder",
        "",
    ]
    if evaluation is not None:
        rows = {
            "blind worst case (the attacker does not know recovery)": evaluation["blind"],
            "robust worst case (all attacks)": evaluation["robust"],
            "AutoAttack, blind, on the raw outputs": _autoattack(evaluation, knows_recovery=False),
            "AutoAttack, recovery-aware, on the logits of `model.py`": _autoattack(evaluation, knows_recovery=True),
        }
        lines += ["| measured | accuracy (%) |", "| --- | --- |"]
        lines += [f"| {name} | {_percent(share)} |" for name, share in rows.items()]
        lines += [""]
    lines += [
        "# Model Zoo:",
        "",
        "- [ ] I want to add my models to the Model Zoo (check if true)",
        "- [ ] I use an architecture that is **not** included among those of the Model Zoo (check if true)",
        "- [ ] I agree to release my model(s) under MIT license (check if true) **OR**",
        f"- [ ] I want my models to be released under a custom license, located here: {fill_in}",
    ]
    return "\n".join(lines) + "\n"


def _model_info(source: Source) -> dict[str, Any]:
    """Return RobustBench's record of a model; null is what was not measured or is not known."""
    evaluation, manifest = source.evaluation, source.folder.manifest
    title, address = _paper(source)
    aware = None if evaluation is None else _autoattack(evaluation, knows_recovery=True)
    return {
        "link": address or None,
        "name": title or None,
        "authors": None,
        "venue": None,
        "additional_data": False if manifest.get("initial") is None else None,
        "number_forward_passes": 1,
        "dataset": source.folder.config.data.name,
        "architecture": source.classifier.architecture.name,
        "eps": None if evaluation is None else _eps(evaluation),
        "clean_acc": None if evaluation is None else _percent(evaluation["clean"]["accuracy"]),
        "reported": None if evaluation is None else _percent(evaluation["robust"]),
        "autoattack_acc": None if aware is None else _percent(aware),
        "unreliable": None,
    }


FORMATS: dict[str, Format] = {
    "onnx": Format(_write_onnx, _read_onnx),
    "safetensors": Format(_write_safetensors, load),
    "torch-export": Format(_write_torch_export, _read_torch_export),
    "hub": Format(_write_hub, _read_hub),
    "robustbench": Format(_write_robustbench, _read_robustbench),
}
