"""What is measured on the validation split after an epoch, and what its numbers warn of."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ducat.data import Dataset, Images
from ducat.evaluation import evaluate
from ducat.training.step import Step

COLLAPSE = 0.05  # a smaller fall of PGD accuracy is noise of the validation split
CHUNK = 500  # samples that validation attacks at a time, at most
PIECE_BYTES = 2**26  # float32 pixels that validation holds at a time, at most


Validate = Callable[[nn.Module, Images], Mapping[str, float]]
"""What may stand in for `validate`: from the deployed network and the whole validation split to shares in [0, 1] by
name, "clean", "blind" and "robust" among them. Where several processes train, each calls it and the mean counts."""


def validate(model: nn.Module, step: Step, dataset: Dataset, progress: Callable[[str], None]) -> dict[str, float]:
    """Measure the deployed network on the validation split, of which each process attacks its share.

    Args:
        model: the network that is deployed.
        step: of the training: its ball, and the processes that share the work.
        dataset: the data with the split.
        progress: called with the name of each attack before each chunk of samples.
    """
    accelerator = step.accelerator
    split, processes = dataset.validation, accelerator.num_processes
    # As many pieces and chunks in every process, since all agree on stopping before each.
    share = -(-len(split) // processes)
    pieces = min(-(-share * math.prod(split.shape) * 4 // PIECE_BYTES), len(split) // processes) or 1
    share = -(-share // pieces)
    chunk = -(-share // -(-share // CHUNK))
    single_step = step.objective(0).inner.single_step
    counts: dict[str, Tensor] = {}
    for rows in torch.arange(accelerator.process_index, len(split), processes).tensor_split(pieces):
        mine = split.select(rows).to(accelerator.device)
        measured = evaluate(
            model,
            mine.floats(),
            mine.labels,
            step.config.threat.ball,
            "single-step" if single_step else "quick",
            num_classes=len(dataset.classes),
            seed=step.config.train.seed,
            batch_size=chunk,
            progress=progress,
        )
        standing = {"clean": measured.clean, "blind": measured.blind, "robust": measured.robust}
        if single_step:
            attacks = {attack.name: attack.correct for attack in measured.attacks}
            standing.update(fgsm=attacks["fgsm-recovered"], pgd=attacks["pgd-10-recovered"])
        counts = {name: counts.get(name, 0) + flags.sum() for name, flags in standing.items()}
    everyones = accelerator.reduce(torch.stack(list(counts.values())).to(accelerator.device), "sum").tolist()
    return {name: count / len(split) for name, count in zip(counts, everyones, strict=True)}


def catastrophic_overfitting(history: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether training with a single-step attack has collapsed by the last of these lines of metrics.jsonl.

    It has where PGD accuracy is below half of its best, and by no less than `COLLAPSE`, while FGSM accuracy is higher
    than it was then: the network resists the single step by bending the loss around it, and nothing else (Wong et al.
    2020, arXiv 2001.03994). Both accuracies are of the deployed classifier, under attacks that know recovery.

    Args:
        history: lines in order; those without "fgsm" and "pgd", shares in [0, 1], are skipped.
    """
    measured = [row for row in history if "pgd" in row]
    if not measured:
        return False
    last, best = measured[-1], max(measured, key=lambda row: row["pgd"])
    fallen = last["pgd"] < best["pgd"] / 2 and best["pgd"] - last["pgd"] >= COLLAPSE
    return fallen and last["fgsm"] > best["fgsm"]
