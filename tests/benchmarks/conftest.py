import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ducat.data.specs import SPECS


@pytest.fixture
def cifar10_jpeg(tmp_path: Path) -> Path:
    """An archive of CIFAR-10 (JPEG)'s layout, with 10 training and 2 test images a class."""
    path, pixels = tmp_path / "cifar10-jpeg.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for name in SPECS["cifar10-jpeg"].classes or ():
            for split, count in (("train", 10), ("test", 2)):
                for number in range(count):
                    content = io.BytesIO()
                    Image.fromarray(pixels.integers(0, 256, (32, 32, 3), np.uint8)).save(content, "JPEG")
                    file.writestr(f"{split}/{name}/{number}.jpg", content.getvalue())
    return path
