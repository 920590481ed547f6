"""Draw docs/images/augmented-NAME.png for every prepared data set: images as stored, and as training sees them.

python docs/augmented_batches.py [NAME ...]
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from ducat import data

IMAGES = 10
FOLDER = Path(__file__).parent / "images"


def draw(name: str) -> None:
    dataset = data.load(name)
    spec = dataset.spec
    rows = {
        "as stored": None,
        "training": data.Augmentation.base(spec),
        "Consistency-AT": data.Augmentation.strong(spec),
    }
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    figure.suptitle(f"{spec.title}: a batch, augmented")
    for row, (axes, (title, augment)) in enumerate(zip(figure.subplots(3, IMAGES), rows.items(), strict=True)):
        # The seed and epoch decide which images these are, so the three rows show the same ones.
        images, labels = next(data.Batches(dataset.train, IMAGES, seed=0, augment=augment).epoch(0))
        for column, (axis, image, label) in enumerate(zip(axes, images, labels.tolist(), strict=True)):
            axis.imshow(image.permute(1, 2, 0).squeeze(2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(dataset.classes[label], fontsize=8)
            if column == 0:
                axis.set_ylabel(title, fontsize=8)
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"augmented-{name}.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    prepared = [status.name for status in data.list_datasets() if status.prepared and "train" in status.sizes]
    for name in sys.argv[1:] or prepared:
        draw(name)
