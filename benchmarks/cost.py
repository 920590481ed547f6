"""What a training step's time depends on: batch size, classes, attack steps, and processes.

    python -m benchmarks.cost [--model resnet20] [--batch 64] [--rounds 5] [--json FILE]

One thing is varied at a time around a step of PGD-AT with recovery-aware dummy classes. Every step is measured in turn,
round after round, and compared with the base of its own round, so that other work on the machine counts for all alike.
Images are random: their content does not matter to the time.

Processes share the global batch, as `accelerate launch` has it, with a thread each: their gradients and the statistics
of batch norm are exchanged. Processes that have a core each divide the time; on one core the ratio is what they add.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.training_step import THREAT, Ours, Recipe, environment, seconds, table

BATCHES = (0.25, 0.5, 2)  # of the base's
CLASSES = (100, 200, 1000)
STEPS = (1, 5, 20)
PROCESSES = (1, 2, 4)


def measure(model: str, batch_size: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Return a row for each step: the ratio is the median over the rounds of its time to the base's.

    Args:
        model: a row of `models.MODELS`.
        batch_size: benign images of the base.
        rounds: how often each is measured.
        device: "cpu" or "cuda".
    """
    make = partial(Ours, Recipe(), "pgd-at", "recovery-aware", model=model, device=device)
    cases = [("base", f"{batch_size} images, 10 classes, {THREAT.steps} steps", make(batch_size=batch_size))]
    cases += [("images", str(size), make(batch_size=size)) for size in (max(2, int(batch_size * f)) for f in BATCHES)]
    cases += [("classes", str(count), make(batch_size=batch_size, num_classes=count)) for count in CLASSES]
    for steps in STEPS:
        cases.append(("attack steps", str(steps), make(batch_size=batch_size, threat=replace(THREAT, steps=steps))))
    for _, _, step in cases:
        step.warm_up()
    times = [[seconds(step) for _, _, step in cases] for _ in range(rounds)]
    return [
        _row(varied, value, [row[place] for row in times], [row[0] for row in times], len(step.y))
        for place, (varied, value, step) in enumerate(cases)
    ]


def _row(varied: str, value: str, times: list[float], base: list[float], images: int) -> dict[str, Any]:
    return {
        "varied": varied,
        "value": value,
        "seconds": round(median(times), 4),
        "to the base": round(median(time / other for time, other in zip(times, base, strict=True)), 3),
        "ms an image": round(1000 * median(times) / images, 3),
    }


class World:
    """Processes that share a global batch, and do a step of it when they are told.

    Args:
        count: how many.
        model: a row of `models.MODELS`.
        batch_size: of the global batch.
    """

    def __init__(self, count: int, model: str, batch_size: int) -> None:
        meeting = Path(tempfile.mkdtemp()) / "meeting"  # a file, since a port that is free now may soon be another's
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, count, meeting, model, batch_size // count)
            context.Process(target=_process, args=arguments, daemon=True).start()
            self.pipes.append(ours)

    def __call__(self) -> None:
        """Do one step, and wait for all."""
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            pipe.recv()

    def end(self) -> None:
        """Let the processes go."""
        for pipe in self.pipes:
            pipe.send(False)


def _process(pipe: Connection, rank: int, count: int, meeting: Path, model: str, batch_size: int) -> None:
    torch.set_num_threads(1)
    # What a launcher tells accelerate; one process alone needs no other.
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in names.items()}, ACCELERATE_USE_CPU="true")
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=count)
    step = Ours(Recipe(), "pgd-at", "recovery-aware", model=model, batch_size=batch_size)
    while pipe.recv():
        step()
        pipe.send(True)
    dist.destroy_process_group()


def measure_processes(
    model: str, batch_size: int, rounds: int, counts: Sequence[int] = PROCESSES
) -> list[dict[str, Any]]:
    """Return a row for each number of processes on the CPU; the ratio is to the first number."""
    worlds = [World(count, model, batch_size) for count in counts]
    for world in worlds:
        world()
    times = [[seconds(world) for world in worlds] for _ in range(rounds)]
    for world in worlds:
        world.end()
    return [
        _row("processes", str(count), [row[place] for row in times], [row[0] for row in times], batch_size)
        for place, count in enumerate(counts)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", help="a network of ducat.models")
    parser.add_argument("--batch", type=int, default=64, help="benign images of the base")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each step, in turn")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = measure(arguments.model, arguments.batch, arguments.rounds, device)
    if device == "cpu":
        rows += measure_processes(arguments.model, arguments.batch, arguments.rounds)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{arguments.model}; {environment(device)}; cores of this process: {cores}\n")
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
