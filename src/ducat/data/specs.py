"""What `ducat` knows about each data set: one row a data set."""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

Layout = Literal["digits", "cifar", "idx", "tiny-imagenet", "folder", "corruptions"]


@dataclass(frozen=True)
class Source:
    """A file that the publisher offers.

    Attributes:
        url: where to download it.
        hashes: "sha256:..." or "md5:...", any of which proves it genuine; the first is the downloaded file's.
    """

    url: str
    hashes: tuple[str, ...]

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class DataSpec:
    """One data set, and the settings that fit it.

    Attributes:
        name: what `--data.name` takes.
        title: what tables and figures call it.
        layout: how its files are arranged, a row of `ducat.data.readers.READERS`.
        shape: channels, height and width of an image.
        mean: mean of each channel over the training images, in [0, 1]; for the model's normalisation layer.
        std: standard deviation of each channel, likewise.
        classes: the class names, in the order of the labels; None where the files say.
        words: file of this package that names the classes whose folders are called by WordNet ids.
        sizes: how many training and test images the publisher offers; None where that is open.
        validation: how many training images are held out for choosing checkpoints, at most a tenth of them.
        eps: the L-inf budget an attacker is given unless told otherwise, in [0, 1].
        model: the network trained on it unless told otherwise.
        crop_padding: pixels of black added on each side before the random crop; 0 is no crop.
        flip: whether a mirrored image is still an image of its class.
        resized_crop: smallest share of the area that a random resized crop keeps, which then takes the place of the
            padded one; 0 is none.
        shorter: pixels that the shorter side is brought to before the middle is cut out for evaluation; None cuts the
            largest part of the wanted shape.
        resample: how images are resized, "bicubic" or "bilinear".
        sources: the files to download, all of them needed.
        system_folder: where an operating system's package puts the same files.
        corruption_of: the data set whose test images these are, corrupted.
    """

    name: str
    title: str
    layout: Layout
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = None
    words: str | None = None
    sizes: tuple[int, int] | None = None
    validation: int = 1000
    eps: float = 8 / 255
    model: str = "resnet18"
    crop_padding: int = 4
    flip: bool = True
    resized_crop: float = 0.0
    shorter: int | None = None
    resample: str = "bicubic"
    sources: tuple[Source, ...] = ()
    system_folder: str | None = None
    corruption_of: str | None = None


_CIFAR10 = DataSpec(
    name="cifar10",
    title="CIFAR-10",
    layout="cifar",
    shape=(3, 32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    sizes=(50_000, 10_000),
    sources=(
        Source(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            ("sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",),
        ),
    ),
)
_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
_CIFAR100 = replace(
    _CIFAR10,
    name="cifar100",
    title="CIFAR-100",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    classes=tuple(_CIFAR100_CLASSES.split()),
    sources=(
        Source(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            ("sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",),
        ),
    ),
)
_FASHION_MNIST = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"

SPECS = {
    spec.name: spec
    for spec in (
        DataSpec(
            name="digits",
            title="Digits",
            layout="digits",
            shape=(1, 8, 8),
            mean=(0.305,),
            std=(0.376,),
            classes=tuple("0123456789"),
            sizes=(1297, 500),
            validation=200,
            eps=0.2,
            model="small",
            crop_padding=0,
            flip=False,
        ),
        DataSpec(
            name="fashion-mnist",
            title="Fashion-MNIST",
            layout="idx",
            shape=(1, 28, 28),
            mean=(0.2860,),
            std=(0.3530,),
            classes=(
                "T-shirt/top",
                "trouser",
                "pullover",
                "dress",
                "coat",
                "sandal",
                "shirt",
                "sneaker",
                "bag",
                "ankle boot",
            ),
            sizes=(60_000, 10_000),
            eps=0.1,
            model="small",
            crop_padding=2,
            # The second hash of each is of the file in Debian's dataset-fashion-mnist, which is compressed anew.
            sources=(
                Source(
                    f"{_FASHION_MNIST}train-images-idx3-ubyte.gz",
                    ("md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d", "md5:cf8536b0aa1a6ac5fa3f23001093305c"),
                ),
                Source(
                    f"{_FASHION_MNIST}train-labels-idx1-ubyte.gz",
                    ("md5:25c81989df183df01b3e8a0aad5dffbe", "md5:10bea18fdb374794d4bb42e356e600c9"),
                ),
                Source(
                    f"{_FASHION_MNIST}t10k-images-idx3-ubyte.gz",
                    ("md5:bef4ecab320f06d8554ea6380940ec79", "md5:f78720b4224f21cce2f2ccf2d7a94c9a"),
                ),
                Source(
                    f"{_FASHION_MNIST}t10k-labels-idx1-ubyte.gz",
                    ("md5:bb300cfdad3c16e7a12a480ee83cd310", "md5:0d30e22e447f3c33dab9ed536400ac01"),
                ),
            ),
            system_folder="/usr/share/datasets/fashion-mnist",
        ),
        _CIFAR10,
        _CIFAR100,
        replace(
            _CIFAR10, name="cifar10-jpeg", title="CIFAR-10 (JPEG)", layout="folder", sizes=(50_000, 8_000), sources=()
        ),
        DataSpec(
            name="tiny-imagenet",
            title="Tiny-ImageNet",
            layout="tiny-imagenet",
            shape=(3, 64, 64),
            mean=(0.4802, 0.4481, 0.3975),
            std=(0.2770, 0.2691, 0.2821),
            sizes=(100_000, 10_000),
            validation=2000,
            crop_padding=8,
            sources=(
                Source(
                    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                    ("sha256:6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",),
                ),
            ),
        ),
        # O. Russakovsky et al. (2015), arXiv 1409.0575; evaluated as usual: shorter side 256, the middle 224.
        DataSpec(
            name="imagenet",
            title="ImageNet",
            layout="folder",
            shape=(3, 224, 224),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            words="imagenet.txt",
            sizes=(1_281_167, 50_000),
            eps=4 / 255,
            crop_padding=0,
            resized_crop=0.08,
            shorter=256,
            resample="bilinear",
        ),
        replace(
            _CIFAR10,
            name="cifar10-c",
            title="CIFAR-10-C",
            layout="corruptions",
            sources=(
                Source(
                    "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar",
                    ("md5:56bf5dcef84df0e2308c6dcbcbbd8499",),
                ),
            ),
            sizes=None,
            corruption_of="cifar10",
        ),
        replace(
            _CIFAR100,
            name="cifar100-c",
            title="CIFAR-100-C",
            layout="corruptions",
            sources=(
                Source(
                    "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar",
                    ("md5:11f0ed0f1191edbf9fa23466ae6021d3",),
                ),
            ),
            sizes=None,
            corruption_of="cifar100",
        ),
    )
}


def known_names(name: str) -> str:
    """Return what a message says of a name that is in no row: perhaps what was meant, and the rows."""
    close = get_close_matches(name, SPECS, n=1)
    return f"{f'did you mean {close[0]}? ' if close else ''}known: {', '.join(SPECS)}"
