"""The deployed classifier of a run: images in [0, 1] go in, C logits come out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ducat import checkpoint, data
from ducat.architecture import Architecture
from ducat.attacks.adaptive import with_silent_dummies
from ducat.data.specs import DataSpec
from ducat.dummy import recover
from ducat.evaluation import kept
from ducat.evaluation.rejection import accepted, check_signal
from ducat.evaluation.runs import read_calibration
from ducat.reporting import compare as comparing
from ducat.runs import RunFolder, Which

COMPARED = 64  # images that a written file is compared on

Batch = Float[Tensor, "batch channels height width"]
Logits = Float[Tensor, "batch classes"]
Outputs = Logits | tuple[Logits | Float[Tensor, " batch"] | Bool[Tensor, " batch"], ...]


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
    training met; whoever knows of it can attack it too. With a `threshold` the last output, bool of shape (B,), says
    whether the prediction is accepted or only a hint, see `ducat.SelectiveClassifier`.

    Args:
        architecture: of the network.
        classes: the names of the C classes, in the order of the logits.
        detector: whether to return the probability as well.
        signal: what acceptance goes by, a name in `ducat.evaluation.rejection.SIGNALS`.
        threshold: its lowest value that is accepted; None for a classifier that never refuses.

    Raises:
        ValueError: if a detector, or a signal that needs them, is asked of a network without dummy classes.
    """

    def __init__(
        self,
        architecture: Architecture,
        classes: Sequence[str],
        detector: bool = False,
        signal: str = "confidence",
        threshold: float | None = None,
    ) -> None:
        super().__init__()
        if detector and not architecture.dummy_classes:
            raise ValueError("detector: the network has no dummy classes, so nothing in it tells adversarial images")
        self.architecture, self.classes, self.detector = architecture, tuple(classes), detector
        with torch.random.fork_rng(devices=[]):
            self.model = architecture.build()
        self.signal, self.threshold = signal, threshold
        check_signal(signal, dummy_classes=architecture.dummy_classes)

    def forward(self, images: Batch) -> Outputs:
        logits = self.model(images)
        recovered = recover(logits) if self.architecture.dummy_classes else logits
        outputs: list[Tensor] = [recovered]
        if self.detector:
            real, dummy = logits.chunk(2, dim=1)
            predicted = recovered.argmax(1, keepdim=True)
            outputs.append(torch.sigmoid((dummy - real).gather(1, predicted)).squeeze(1))
        if self.threshold is not None:
            full = logits if self.architecture.dummy_classes else with_silent_dummies(logits)
            outputs.append(accepted(full, self.signal, self.threshold))
        return tuple(outputs) if len(outputs) > 1 else recovered

    @property
    def names(self) -> list[str]:
        """The names of the outputs."""
        return ["logits", *["adversarial"] * self.detector, *["accepted"] * (self.threshold is not None)]

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> "Classifier":
        # The library would fill missing weights with random ones in silence.
        return super()._from_pretrained(strict=strict, **kwargs)


@dataclass(frozen=True)
class Deployed:
    """A run's deployed classifier, and what is known of it.

    Attributes:
        folder: the run.
        which: the checkpoint.
        classifier: in evaluation mode; its classes are numbers if the data are not at hand.
        evaluated: None where this checkpoint has not been evaluated.
        images: a few in [0, 1], shape (n, channels, H, W): test images, or random ones if the data are not at hand.
        images_name: what they are.
        labels: the names of their classes; none of random images.
        reject: the share of benign images that the classifier's threshold was set for; None without one.
        spec: what the data's images are like; None if that is not known here.
    """

    folder: RunFolder
    which: Which
    classifier: Classifier
    evaluated: comparing.Run | None
    images: Tensor
    images_name: str
    labels: Sequence[str] = ()
    reject: float | None = None
    spec: DataSpec | None = None

    @classmethod
    def read(
        cls, run: Path | str, which: Which = "best", *, detector: bool = False, selective: bool = True
    ) -> "Deployed":
        """Read a run, and with `selective` the threshold that `ducat calibrate` set for it, where it has.

        Raises:
            FileNotFoundError: if there is no such run or checkpoint.
            ValueError: if the checkpoint is damaged, or a detector is asked of a network without dummy classes.
        """
        folder = RunFolder.open(run)
        tensors, state = folder.read(which)
        architecture = Architecture(**state["model"])
        settings = folder.config.data
        spec = data.SPECS.get(settings.name)
        try:
            dataset = folder.dataset()
            classes, spec = dataset.classes, dataset.spec
            some = dataset.test.select(torch.arange(min(COMPARED, len(dataset.test))))
            images, labels = some.floats(), [classes[label] for label in some.labels.tolist()]
            name = f"{spec.title} test images"
        except FileNotFoundError:  # The run may have come from another machine.
            side = architecture.image_size or (32 if spec is None else spec.shape[1])
            shape = COMPARED, architecture.channels, side, side
            images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            name = f"random images of {side} x {side}"
            classes, labels = tuple(map(str, range(architecture.num_classes))), []
        calibrated = read_calibration(folder, which) if selective else None
        choice = {key: calibrated[key] for key in ("signal", "threshold")} if calibrated else {}
        reject = calibrated["reject"] if calibrated else None
        classifier = Classifier(architecture, classes, detector, **choice)
        checkpoint.load_weights(classifier.model, checkpoint.part("model", tensors), folder.checkpoint_path(which))
        return cls(folder, which, classifier.eval(), _evaluated(folder, which), images, name, labels, reject, spec)

    @property
    def evaluation(self) -> Mapping[str, Any] | None:
        return self.evaluated.evaluation if self.evaluated is not None else None

    @property
    def program(self) -> torch.export.ExportedProgram:
        """The classifier as a graph, for batches of any size."""
        batch = {0: torch.export.Dim("batch")}
        return torch.export.export(self.classifier, (self.images[:2],), dynamic_shapes={"images": batch})


def save(source: Deployed, path: Path) -> None:
    """Write weights and their description as safetensors, which `load` reads."""
    classifier = source.classifier
    state = {
        "model": asdict(classifier.architecture),
        "classes": classifier.classes,
        "detector": classifier.detector,
        "signal": classifier.signal,
        "threshold": classifier.threshold,
    }
    checkpoint.save(path, checkpoint.named("model", classifier.model.state_dict()), state)


def load(path: Path | str) -> Classifier:
    """Load what `export` wrote as safetensors, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or another kind of file.
    """
    tensors, state = checkpoint.read(Path(path))
    if "classes" not in state:
        raise ValueError(f"{path} is a checkpoint of a run: ducat.load takes the run folder")
    # Files of earlier versions have no threshold.
    choice = {key: state[key] for key in ("signal", "threshold") if key in state}
    classifier = Classifier(Architecture(**state["model"]), state["classes"], state["detector"], **choice)
    classifier.model.load_state_dict(checkpoint.part("model", tensors))
    return classifier.eval()


def _evaluated(folder: RunFolder, which: Which) -> comparing.Run | None:
    if not folder.evaluation_path.is_file():
        return None
    run = comparing.Run.read(folder.path)
    # Numbers of another checkpoint, or of what has been trained on since, say nothing of this one.
    own = [one for one in run.candidates if one.get("checkpoint") == which and kept.is_current(folder, one)]
    threat = folder.config.threat
    return run.seen_by(own[kept.strongest(own, (threat.norm, threat.build(None).eps))]) if own else None
