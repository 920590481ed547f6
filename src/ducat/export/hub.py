"""A run as a folder that Hugging Face's hub takes, with a card that says what was measured."""

import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from torch import Tensor

from ducat import checkpoint
from ducat.evaluation.rejection import SIGNALS
from ducat.export.classifier import Classifier, Deployed
from ducat.installing import DISTRIBUTION
from ducat.reporting import compare as comparing


def write(source: Deployed, path: Path) -> None:
    path.mkdir()
    checkpoint.write_text(path / "README.md", _card(source))
    source.classifier.save_pretrained(path)


def read(path: Path) -> Callable[[Tensor], Any]:
    # The library prints a line.
    with redirect_stdout(io.StringIO()):
        return Classifier.from_pretrained(path)


def _card(source: Deployed) -> str:
    classifier, manifest = source.classifier, source.folder.manifest
    front = {
        "library_name": "ducat",
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "adversarial-training", "ducat"],
    }
    call = "logits = model(images)  # images in [0, 1], (batch, channels, height, width), to (batch, classes)"
    if classifier.detector:
        call = "logits, adversarial = model(images)  # and the probability that each image is adversarial, (batch,)"
    if classifier.threshold is not None:
        call = f"{', '.join(classifier.names)} = model(images)  # accepted: whether each prediction is more than a hint"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        f"# {source.folder.name}",
        "",
        f"An image classifier trained with ducat {manifest['ducat']}: "
        f"{classifier.architecture.name}, {len(classifier.classes)} classes, {_method(source)}.",
        f"Training data: {manifest['data']['title']}, {manifest['data']['train']} images{_more(manifest)}.",
        "",
        "## Use",
        "",
        f"In an environment with `pip install {DISTRIBUTION}`:",
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
        *accuracy(source),
        *_refusing(source),
    ]
    return "\n".join(lines) + "\n"


def _more(manifest: Mapping[str, Any]) -> str:
    extra = manifest["data"].get("extra")
    return "" if extra is None else f", and {extra['images']:,} more of {Path(extra['file']).name}"


def _refusing(source: Deployed) -> list[str]:
    classifier = source.classifier
    if classifier.threshold is None:
        return []
    lines = [
        "",
        "## Refusing",
        "",
        f"A prediction is accepted where `{classifier.signal}` ({SIGNALS[classifier.signal].about}) is at least "
        f"{classifier.threshold:.4g}; otherwise the class is only a hint.",
    ]
    if source.reject not in _shares_attacked(source):
        lines += [
            "",
            "**Not attacked.** No evaluation above measured what refusing withstands at this threshold: run `ducat "
            f"evaluate --reject {source.reject:g}`, on as many images and by as hard a suite at least.",
        ]
    return lines


def _shares_attacked(source: Deployed) -> list[float]:
    """Return the shares of refused images at which the classifier's own signal was attacked."""
    measured = (source.evaluation or {}).get("rejection") or {"signals": []}
    own = [each for each in measured["signals"] if each["signal"] == source.classifier.signal]
    return [row["reject"] for each in own for row in each["rows"]]


def _has_dummies(source: Deployed) -> bool:
    return source.classifier.architecture.dummy_classes


def _method(source: Deployed) -> str:
    config = source.folder.config
    kind = config.dummy.kind
    return config.method.name + ("" if kind == "off" else f" with {kind} dummy classes")


def accuracy(source: Deployed) -> list[str]:
    """Return the lines of a card that say what was measured."""
    if source.evaluated is None:
        return [
            "**Not evaluated.** Nothing has been measured of this checkpoint, neither its clean accuracy nor its "
            f"robustness: run `ducat evaluate` with `--which {source.which}` on its run folder, and export again."
        ]
    measured = source.evaluated.evaluation
    lines = [
        comparing.to_markdown(comparing.compare([source.evaluated])),
        "`blind` is the worst case over attacks that do not know that predictions are recovered, `robust` over all "
        "attacks, those that know included. Only `robust` is robustness.",
        "",
        "| attack | knows recovery | accuracy (%) |",
        "| --- | --- | --- |",
        *(
            f"| {row['name']} | {'yes' if row['knows_recovery'] else 'no'} | {comparing.reached(row, measured)} |"
            for row in measured["attacks"]
        ),
    ]
    return lines + [line for warning in measured["warnings"] for line in ("", f"**Warning**: {warning}.")]
