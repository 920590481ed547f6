import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

# One thread: the networks of the tests are too small to share, and results then do not depend on the machine's cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
settings.register_profile("ducat", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ducat")


def _declare_torchvision_operators() -> None:
    """Let timm import a torchvision that is built for GPUs with a PyTorch that is not: operators are missing then.

    No test calls them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws from PyTorch's own source does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def timm() -> Any:
    """timm, where it is installed: `.ci/run` installs it after the other tests."""
    _declare_torchvision_operators()
    return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def transformers() -> Any:
    """transformers, where it is installed; the `dev` extra has it."""
    _declare_torchvision_operators()
    return pytest.importorskip("transformers")


@pytest.fixture
def network() -> nn.Sequential:
    """A random network on 3 x 6 x 6 images with 2C = 8 outputs, with modules that behave otherwise in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 8)
        )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(0, 4, (12,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def templates() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A linear classifier of C = 4 random patterns, and noisy images of the patterns with their labels.

    In L-inf, image x of class y withstands exactly the eps below min_k (w_y - w_k) x / ||w_y - w_k||_1, about 0.1.
    """
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randint(0, 2, (4, 64), generator=generator).float() * 2 - 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        model[1].weight.copy_(patterns)
        model[1].bias.zero_()
        model[1].bias.copy_(-model(torch.full((1, 1, 8, 8), 0.5))[0])
    y = torch.arange(40) % 4
    noise = 0.1 * torch.randn(40, 64, generator=generator)
    x = (0.5 + 0.1 * patterns[y] + noise).clamp(0, 1).view(40, 1, 8, 8)
    return model, x, y


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what needs a trained network or a browser, which take seconds to be made, and what measures."""
    for item in items:
        made = {"tiny_run", "browser"} & set(getattr(item, "fixturenames", ()))
        if made or item.path.parent.name == "benchmarks":
            item.add_marker("slow")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits of a few seconds, with recovery-aware dummy classes, evaluated."""
    from ducat import train
    from ducat.config import Config, DataConfig, DummyConfig, TrainConfig
    from ducat.evaluation.runs import evaluate_run

    settings = TrainConfig(epochs=4, batch_size=32, learning_rate=0.1, schedule="constant", precision="float32")
    config = Config("tiny", DataConfig("digits", 400), dummy=DummyConfig("recovery-aware", 1), train=settings)
    folder = train.train(config, tmp_path_factory.mktemp("tiny"))
    evaluate_run(folder, "quick", samples=50, which="best")
    return folder.path


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that fetches nothing of its own, and keeps what pages log."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()
