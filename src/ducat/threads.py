"""How many threads of a CPU a network's passes are worth: small ones lose more by sharing than they gain."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ducat.attacks.pgd import attackable

WORK = 150_000_000
"""Multiply-adds in a batch's forward pass that are worth a thread: below twice that a second thread gained less than a
third on 2 idle cores, and made digits 6 times slower on busy ones (docs/performance.md)."""


def launched() -> bool:
    """Tell whether a launcher started this process for CPUs: each of them would work alone, unless told so."""
    return "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()


def worth(model: nn.Module, example: Tensor, batch_size: int) -> int:
    """Return how many threads a batch is worth, at least 1.

    Args:
        model: maps images to logits; where no multiply-adds can be counted, all threads are worth it.
        example: a few images, shape (B, channels, H, W).
        batch_size: images a batch.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # Whatever the pass draws is drawn beside a training's own numbers.
    forked = torch.random.fork_rng(devices=[])
    with attackable(model), torch.no_grad(), forked, FlopCounterMode(display=False) as counter:
        model(example[:1])
    work = counter.get_total_flops() / 2 * batch_size
    return max(1, int(work / WORK)) if work else torch.get_num_threads()


@contextmanager
def chosen(
    model: nn.Module,
    example: Tensor,
    batch_size: int,
    wanted: int | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Iterator[int]:
    """Compute with as many threads as the work is worth, and put PyTorch's number back at the end.

    Args:
        model: as for `worth`; on another device than a CPU nothing is changed.
        example: a few images on the model's device.
        batch_size: images a batch.
        wanted: a number of the user's own; by default what the work is worth, and no more than PyTorch has already
            (`OMP_NUM_THREADS` is where it has that from).
        notice: told where more threads are wanted than the work is worth.

    Raises:
        ValueError: if fewer threads than 1 are wanted.
    """
    before = torch.get_num_threads()
    if wanted is not None and wanted < 1:
        raise ValueError(f"threads={wanted} must be at least 1")
    if example.device.type != "cpu":
        yield before
        return
    enough = worth(model, example, batch_size)
    if wanted is not None and wanted > enough:
        notice(
            f"threads={wanted}: batches of {batch_size} images of this network are worth {enough}; more slow it down "
            "where other programs run"
        )
    torch.set_num_threads(wanted or min(before, enough))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
