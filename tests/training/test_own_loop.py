"""A loop that is not ours, as docs/your-loop.md has it, ends in the weights that ours ends in."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import ducat
from ducat import weights
from ducat.config import Config, DummyConfig, MethodConfig
from ducat.data import Augmentation, Batches
from ducat.dummy import dummy_heads
from ducat.seeding import generator
from ducat.training import train
from tests.support import TINY, unvalidated

START = 1
CONFIG: Config = replace(TINY, dummy=DummyConfig("recovery-aware", start_epoch=START))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


def own_loop(config: Config, model: nn.Module) -> nn.Module:
    dataset = ducat.data.load("digits", samples=config.data.samples)
    resolved = config.resolve(dataset.spec)
    threat, settings = resolved.threat.build(None), config.train
    batches = Batches(dataset.train, settings.batch_size, seed=settings.seed, augment=Augmentation.base(dataset.spec))
    ducat.add_dummy_classes(model)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    for epoch in range(settings.epochs):
        objective = ducat.objective(config.method.name, "recovery-aware", active=epoch >= START)
        for step, (x, y) in enumerate(batches.epoch(epoch)):
            noise = generator(settings.seed, "attack", epoch, step, 0)
            adversarial = objective.attack(model, x, y, threat, noise)
            optimizer.zero_grad()
            objective.loss(model.train(), x, adversarial, y).backward()
            optimizer.step()
            if objective.reading == "real":
                for head in dummy_heads(model):
                    head.copy_real_rows(optimizer)
    return model


@pytest.mark.parametrize("method", ["pgd-at", "trades", "mart"])
def test_ten_lines_of_ones_own_end_in_the_weights_of_our_loop(tmp_path: Path, method: str) -> None:
    config = replace(CONFIG, method=MethodConfig(method))
    folder = train(config, tmp_path, model=network(), validate=unvalidated)
    ours = weights.read(folder.checkpoint_path("last")).weights
    theirs = own_loop(config, network()).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
