"""What a network makes of benign and adversarial images: where probability goes, and what the pairs give away."""

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ducat import checkpoint, data, records
from ducat.data import spooled
from ducat.dummy import dummy_head
from ducat.evaluation.result import Evaluation
from ducat.models.heads import find_heads
from ducat.runs import RunFolder

Samples = Float[Tensor, "samples channels height width"]
Labels = Int[Tensor, " samples"]

BINS = 10
EXAMPLES = 8
SHOWN = 150  # images whose features are drawn, benign and attacked


def measure(
    model: nn.Module, x: Samples, adversarial: Samples, y: Labels, classes: Sequence[str], *, batch_size: int = 500
) -> dict[str, Any]:
    """Look at a network's outputs on benign images and on the adversarial images made of them.

    Images that were not attacked, because they are classified wrongly as they are, are left out.

    Args:
        model: images in [0, 1] to 2C logits, or to C logits; in evaluation mode.
        x: benign images, shape (samples, channels, H, W).
        adversarial: what an attack made of each, like `x`; equal to `x` where it was not attacked.
        y: labels in [0, C).
        classes: the C names.
        batch_size: images in one pass.

    Returns:
        The content of behaviour.json: "attacked", the number of images; "mass", where probability goes on average, by
        kind of image; "signal", how well the pairs tell adversarial images from benign ones (None without dummy
        classes); "features", the last layer's inputs on their two main axes (None where no layer gives the logits);
        "examples", a few images with predictions.
    """
    pairs = zip(spooled.chunks(x, batch_size), spooled.chunks(adversarial, batch_size), strict=True)
    attacked = torch.cat([(one != other).flatten(1).any(1) for one, other in pairs]).nonzero().squeeze(1)
    count = len(attacked)
    if not count:
        return {"attacked": 0, "mass": None, "signal": None, "features": None, "examples": []}
    y = y[attacked]
    benign, attacks = (
        _probabilities(model, (spooled.take(images, rows) for rows in attacked.split(batch_size)))
        for images in (x, adversarial)
    )
    paired = benign.shape[1] == 2 * len(classes)
    outputs = {"benign": benign, "adversarial": attacks}
    return {
        "attacked": count,
        "mass": {kind: _mass(p, y, len(classes)) for kind, p in outputs.items()},
        "signal": _reliability(_signal(benign), _signal(attacks)) if paired else None,
        "features": _features(model, x[attacked[:SHOWN]], adversarial[attacked[:SHOWN]], len(classes)),
        "examples": _examples(x, adversarial, attacked, y, benign, attacks, classes),
    }


@torch.no_grad()
def _probabilities(model: nn.Module, chunks: Iterable[Tensor]) -> Tensor:
    device = next(model.parameters()).device
    return torch.cat([model(chunk.to(device)).double().softmax(1).cpu() for chunk in chunks])


def _features(model: nn.Module, x: Tensor, adversarial: Tensor, num_classes: int) -> dict[str, Any] | None:
    """Project what the last layer is given of benign and of adversarial images onto the main axes of both together.

    "points" has for each kind of image a list for those whose largest output is real, and one for those where it is a
    dummy class; "explained" is the share of the variance along each axis.
    """
    device = next(model.parameters()).device
    images = torch.cat([x, adversarial]).to(device)
    try:
        head = dummy_head(model) or next(iter(find_heads(model, images[:2]).values()))
    except ValueError:
        return None
    given: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    try:
        with torch.no_grad():
            dummy = (model(images).argmax(1) >= num_classes).cpu()
    finally:
        hook.remove()
    features = given[-1].double().cpu()
    # A convolution that gives the logits has features at every position, whose mean counts.
    features = features.flatten(2).mean(2) if features.ndim > 2 else features
    if len(features) != len(images) or min(features.shape) < 2:
        return None
    centred = features - features.mean(0)
    left, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    # The sign of an axis is arbitrary: its largest part points up.
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).squeeze(1).sign()
    places = (left * sizes * signs)[:, :2]
    half = len(images) // 2
    kinds = {"benign": slice(0, half), "adversarial": slice(half, None)}
    return {
        "explained": [round(float(share), 4) for share in (sizes.square() / sizes.square().sum().clamp_min(1e-12))[:2]],
        "points": {
            kind: {
                part: [[round(value, 3) for value in row] for row in places[rows][chosen[rows]].tolist()]
                for part, chosen in (("real", ~dummy), ("dummy", dummy))
            }
            for kind, rows in kinds.items()
        },
    }


def _mass(p: Tensor, y: Tensor, num_classes: int) -> dict[str, float]:
    """Return the mean probability of the image's own class and of the others, real and dummy."""
    rows = torch.arange(len(y))
    shares = {"real": p[rows, y], "other real": p[:, :num_classes].sum(1) - p[rows, y]}
    if p.shape[1] > num_classes:
        own = p[rows, y + num_classes]
        shares |= {"dummy": own, "other dummy": p[:, num_classes:].sum(1) - own}
    return {name: round(float(values.mean()), 6) for name, values in shares.items()}


def _recovered(p: Tensor, num_classes: int) -> Tensor:
    """Return the deployed decision, argmax mod C."""
    return p.argmax(1) % num_classes


def _signal(p: Tensor) -> Tensor:
    """Return the dummy class's share of the recovered pair: what the network says of the image being adversarial."""
    num_classes = p.shape[1] // 2
    rows, predicted = torch.arange(len(p)), _recovered(p, num_classes)
    real, dummy = p[rows, predicted], p[rows, predicted + num_classes]
    return dummy / (real + dummy)


def _reliability(benign: Tensor, adversarial: Tensor) -> dict[str, Any]:
    """Compare the signal with how often it is right, over as many benign as adversarial images.

    "auroc" is the chance that an adversarial image has the higher signal of a random pair (ties count half), "error"
    the expected calibration error (Guo et al. 2017): the mean distance of signal and frequency over the bins.
    """
    signal = torch.cat([benign, adversarial])
    truth = torch.cat([torch.zeros_like(benign), torch.ones_like(adversarial)])
    bins = (signal * BINS).long().clamp(max=BINS - 1)
    filled = []
    for number in range(BINS):
        members = bins == number
        if members.any():
            mean, share = float(signal[members].mean()), float(truth[members].mean())
            filled.append({"count": int(members.sum()), "signal": round(mean, 6), "adversarial": round(share, 6)})
    error = sum(row["count"] * abs(row["signal"] - row["adversarial"]) for row in filled) / len(signal)
    order = torch.sort(benign).values
    below = torch.searchsorted(order, adversarial) + torch.searchsorted(order, adversarial, right=True)
    return {"bins": filled, "error": round(error, 6), "auroc": round(float(below.double().mean()) / 2 / len(benign), 6)}


def _examples(
    x: Tensor,
    adversarial: Tensor,
    attacked: Tensor,
    y: Tensor,
    benign: Tensor,
    attacks: Tensor,
    classes: Sequence[str],
) -> list[dict[str, Any]]:
    withstood = _recovered(attacks, len(classes)) == y
    chosen = _some_of_each(withstood)
    examples = []
    for index in chosen.tolist():
        before, after = x[attacked[index]], adversarial[attacked[index]]
        change = after - before
        factor = 0.5 / float(change.abs().max())
        examples.append(
            {
                "label": classes[int(y[index])],
                "withstood": bool(withstood[index]),
                "magnified": round(factor, 1),
                "images": {
                    "benign": png(before),
                    "perturbation": png(0.5 + factor * change),
                    "adversarial": png(after),
                },
                "benign": _predictions(benign[index], classes),
                "adversarial": _predictions(attacks[index], classes),
            }
        )
    return examples


def _some_of_each(flags: Bool[Tensor, " samples"]) -> Int[Tensor, " chosen"]:
    """Return positions of the first few of either kind, as many of each as there are."""
    first, second = (kind.nonzero().squeeze(1) for kind in (~flags, flags))
    half = EXAMPLES // 2
    first = first[: max(half, EXAMPLES - len(second))]
    return torch.cat([first, second[: EXAMPLES - len(first)]])


def _predictions(p: Tensor, classes: Sequence[str]) -> dict[str, list[Any]]:
    """Return the likeliest real class, dummy class and recovered class of one image, each with its probability."""
    count = len(classes)
    real = p[:count]
    found = {"real": real}
    if len(p) == 2 * count:
        found |= {"dummy": p[count:], "recovered": real + p[count:]}
    predictions = {
        name: [classes[int(values.argmax())], round(float(values.max()), 4)] for name, values in found.items()
    }
    if len(p) == 2 * count:
        # The deployed decision compares single outputs, not the sums of pairs.
        winner = int(_recovered(p[None], count))
        predictions["recovered"] = [classes[winner], round(float(found["recovered"][winner]), 4)]
    return predictions


def png(image: Float[Tensor, "channels height width"]) -> str:
    """Return an image in [0, 1] as a PNG file in a data URI; 8 bits are enough to look at."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).squeeze(2).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def measure_run(folder: RunFolder, dataset: data.Dataset | None = None) -> dict[str, Any]:
    """Measure a run on the images of its evaluation, write behaviour.json, and return what was written.

    Args:
        folder: the run, evaluated by `evaluate_run`; the checkpoint is the one that was evaluated.
        dataset: its data, where they are at hand.

    Raises:
        FileNotFoundError: if there is no evaluation, no such checkpoint, or the data are gone.
        ValueError: if the data are not those that the run was trained on.
    """
    evaluation, settings = Evaluation.load(folder.path), folder.config.data
    classes = (dataset or folder.dataset()).classes
    x, y = data.load_test(settings.name, len(evaluation.labels), settings.root)
    content = {
        "schema": 1,
        "evaluation": _digest(folder.evaluation_path),
        **measure(folder.load(evaluation.checkpoint or "best"), x, evaluation.adversarial, y, classes),
    }
    checkpoint.write_text(_path(folder), json.dumps(content, indent=1) + "\n")
    return content


def read(folder: RunFolder) -> dict[str, Any] | None:
    """Return what `measure_run` wrote, or None if there is nothing of the run's evaluation."""
    path = _path(folder)
    if not path.is_file():
        return None
    content = records.read(path, records.Behaviour, f"run `ducat evaluate {folder.quoted}` again")
    return content if content["evaluation"] == _digest(folder.evaluation_path) else None


def is_current(folder: RunFolder) -> bool:
    """Tell whether there is a behaviour.json of the run's evaluation; one that is damaged is to be made again."""
    try:
        return read(folder) is not None
    except ValueError:
        return False


def _path(folder: RunFolder) -> Path:
    return folder.path / "behaviour.json"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
