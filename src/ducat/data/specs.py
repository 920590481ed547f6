"""What `ducat` knows about each data set: one row a data set."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSpec:
    """One data set, and the settings that fit it.

    Attributes:
        name: what `--data.name` takes.
        title: what tables and figures call it.
        shape: channels, height and width of an image.
        classes: the class names, in the order of the labels.
        mean: mean of each channel over the training images, in [0, 1]; for the model's normalisation layer.
        std: standard deviation of each channel, likewise.
        validation: how many training images are held out for choosing checkpoints.
        eps: the L-inf budget an attacker is given unless told otherwise, in [0, 1].
        model: the network trained on it unless told otherwise.
        crop_padding: pixels of black added on each side before the random crop; 0 is no crop.
        flip: whether a mirrored image is still an image of its class.
    """

    name: str
    title: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: int
    eps: float = 8 / 255
    model: str = "resnet18"
    crop_padding: int = 4
    flip: bool = True


SPECS = {
    spec.name: spec
    for spec in (
        DataSpec(
            name="digits",
            title="Digits",
            shape=(1, 8, 8),
            classes=tuple("0123456789"),
            mean=(0.305,),
            std=(0.376,),
            validation=200,
            eps=0.2,
            model="small",
            crop_padding=0,
            flip=False,
        ),
    )
}
