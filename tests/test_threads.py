from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ducat import models, threads, training
from tests import support


@pytest.fixture
def four() -> Iterator[None]:
    """A PyTorch that has 4 threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_threads_are_worth_what_the_work_is() -> None:
    digits, photographs = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 32, 32)
    small, resnet = models.build("small", 20, channels=1), models.build("resnet18", 20)
    assert threads.worth(small, digits, 128) == 1
    assert threads.worth(small, digits, 500) == 1
    assert threads.worth(models.build("resnet8", 20), photographs, 128) >= 8
    assert threads.worth(resnet, photographs, 128) > 100
    layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # 640 multiply-adds an image
    assert threads.worth(layer, digits, 3 * threads.WORK // 640 + 1) == 3
    assert layer.training


def test_no_more_threads_compute_than_the_work_is_worth(four: None) -> None:
    small, digits = models.build("small", 20, channels=1), torch.rand(2, 1, 8, 8)
    with threads.chosen(small, digits, 128) as number:
        assert number == torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4
    with threads.chosen(models.build("resnet8", 20), torch.rand(2, 3, 32, 32), 128) as number:
        assert number == 4, "no more than PyTorch has"
    with pytest.raises(ValueError, match="threads=0 must be at least 1"), threads.chosen(small, digits, 128, 0):
        pass
    with pytest.raises(RuntimeError), threads.chosen(small, digits, 128):
        raise RuntimeError
    assert torch.get_num_threads() == 4


def test_more_threads_than_that_get_a_hint(four: None) -> None:
    small, digits, said = models.build("small", 20, channels=1), torch.rand(2, 1, 8, 8), []
    with threads.chosen(small, digits, 128, 2, said.append) as number:
        assert number == 2
    assert said == [
        "threads=2: batches of 128 images of this network are worth 1; more slow it down where other programs run"
    ]
    said.clear()
    with threads.chosen(small, digits, 128, 1, said.append):
        pass
    assert said == []


@pytest.mark.slow
def test_a_training_takes_and_notes_them(four: None, tmp_path: Path) -> None:
    settings = replace(support.TINY.train, epochs=1)
    listener = support.Watcher()
    run = training.train(replace(support.TINY, train=settings), tmp_path, listener, validate=support.unvalidated)
    assert (run.manifest["threads"], listener.warnings) == (1, [])
    config = replace(support.TINY, name="two", train=replace(settings, threads=2))
    run = training.train(config, tmp_path, listener, validate=support.unvalidated)
    assert run.manifest["threads"] == 2
    assert listener.warnings[0].startswith("threads=2: batches of 32 images of this network are worth 1")
    assert torch.get_num_threads() == 4
