from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

# One thread: the networks of the tests are too small to share, and results then do not depend on the machine's cores.
torch.set_num_threads(1)
settings.register_profile("ducat", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ducat")


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


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits of a few seconds, with recovery-aware dummy classes, evaluated."""
    from ducat import behaviour, train
    from ducat.config import Config, DataConfig, DummyConfig, TrainConfig
    from ducat.evaluate import evaluate_run

    settings = TrainConfig(epochs=4, batch_size=32, learning_rate=0.1, schedule="constant", precision="float32")
    config = Config("tiny", DataConfig("digits", 400), dummy=DummyConfig("recovery-aware", 1), train=settings)
    folder = train.train(config, tmp_path_factory.mktemp("tiny"))
    evaluate_run(folder, "quick", samples=50, which="best")
    behaviour.measure_run(folder, "best")
    return folder.path
