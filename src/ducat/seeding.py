"""Randomness as a pure function of named keys, so that nothing random has a state to save, resume or synchronise."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose stream depends on the key alone.

    The same key gives the same numbers in any process, at any time: `generator(seed, "attack", epoch, step)` makes a
    run that is stopped in the middle of an epoch continue as if it had not been.

    Args:
        key: integers and strings that name the use, for example `(0, "attack", 3, 17)`.
        device: where the numbers are drawn; a CPU and a GPU generator of one key draw different numbers.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)


@contextlib.contextmanager
def seeded(*key: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed the global generators of Python, NumPy and PyTorch by a key, and put them back as they were.

    Args:
        key: as for `generator`.
        device: a GPU whose generator is seeded as well; the CPU's alone is, where none is named.
    """
    seed, device = generator(*key).initial_seed(), torch.device(device)
    python, numpy = random.getstate(), np.random.get_state()
    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # `torch.manual_seed` would set every device's, which a process of a loader must not touch.
        torch.random.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
