"""What a training costs before it is run: the GPU-hours of the recipes, from forward passes counted by hand.

    python -m benchmarks.cost_model                       # the table; --share and --cards change its assumptions
    python -m benchmarks.cost_model --check resnet20 small   # predicted against measured seconds of a step, here

The unit is the forward pass of one image. The backward pass to the input costs one more, that to the input and the
weights two more. So an attack step is 2, and a training pass 3 for each image that the loss forwards. A network's
forward pass is counted in floating-point operations by PyTorch; the rate at which a machine does them is measured
with --check, or assumed as a share of what its maker says.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.training_step import Ours, Recipe, forward_flops, seconds, table
from ducat.config import Config
from ducat.data.specs import SPECS, DataSpec
from ducat.methods import Objective
from ducat.models.doors import is_foreign
from ducat.schedules import epoch_of
from ducat.threat import ThreatModel

# Dense bf16 operations a second by the makers' data sheets.
CARDS = {"A100": 312e12, "H100": 989e12}
SHARE = 0.2  # of that rate: an assumption, not measured


def per_image(objective: Objective, threat: ThreatModel, awp: bool = False) -> int:
    """Return the forward passes that a training image costs in one epoch."""
    method, step_sizes = objective.method, objective.inner.step_sizes
    steps = threat.steps if step_sizes is None else len(step_sizes)
    attack = 0 if method.objective is None else 2 * steps + (method.objective == "kl")
    image = torch.zeros(1, 1, 1, 1)
    outer = 3 * sum(len(batch) for batch in objective.passes(image, image))
    # Weight perturbation computes the outer loss and its gradient once more.
    return method.views * (attack + outer * (2 if awp else 1))


def passes(config: Config) -> tuple[int, int, int]:
    """Return the forward passes of an image over a whole run, and in its first and its last epoch.

    Args:
        config: resolved.
    """
    train, threat = config.train, config.threat.build(None)
    awp_start = epoch_of(train.awp_start_epoch, train.epochs)
    counts = [
        per_image(config.objective(epoch), threat, bool(train.awp) and epoch >= awp_start)
        for epoch in range(train.epochs)
    ]
    return sum(counts), counts[0], counts[-1]


def training_images(config: Config, spec: DataSpec) -> int:
    """Return how many images an epoch goes through."""
    if config.data.samples is not None:
        return config.data.samples
    assert spec.sizes is not None
    offered, held_out = spec.sizes[0], config.data.held_out
    if held_out is None:
        held_out = 0 if spec.layout == "digits" else min(spec.validation, offered // 10)
    return offered - round(held_out * offered if held_out < 1 else held_out)


def cost(path: Path, share: float, cards: Iterable[str]) -> dict[str, Any] | None:
    """Return a recipe's line of the table; None for other people's networks, whose passes are not counted here."""
    config = Config.from_yaml(path)
    spec = SPECS[config.data.name]
    config = config.resolve(spec)
    assert config.model.name is not None
    if is_foreign(config.model.name):
        return None
    flops = forward_flops(config.model.name, spec.shape[1], spec.shape[0], config.model.width)
    whole, first, last = passes(config)
    operations = whole * training_images(config, spec) * flops
    return {
        "recipe": path.stem,
        "network": config.model.name,
        "GFLOP forward": round(flops / 1e9, 4),
        "passes, first epoch": first,
        "passes, last epoch": last,
        "dummy phase, whole run": f"+{100 * (whole / (first * config.train.epochs) - 1):.1f} %",
        "PFLOP": round(operations / 1e15, 2 if operations > 1e15 else 5),
        **{f"{card}, hours": f"{operations / (share * CARDS[card]) / 3600:.2g}" for card in cards},
    }


def check(model: str, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Predict the seconds of a step from those of its network's forward pass, and measure both in turn."""
    rows = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for method, dummy in (("pgd-at", "off"), ("pgd-at", "recovery-aware"), ("trades", "off")):
        step = Ours(Recipe(), method, dummy, model=model, batch_size=batch_size, device=device)
        attacked = step.step.attacked

        def forward(step: Ours = step, attacked: torch.nn.Module = attacked) -> None:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                attacked(step.x)
                if device == "cuda":
                    torch.cuda.synchronize()

        forward()
        step.warm_up()
        times = [(seconds(forward), seconds(step)) for _ in range(rounds)]
        unit, measured = (median(column) for column in zip(*times, strict=True))
        count = per_image(step.objective, step.threat)
        rows.append(
            {
                "network": model,
                "method": method,
                "dummy": dummy,
                "GFLOP/s forward": round(batch_size * forward_flops(model, 32) / unit / 1e9, 1),
                "passes": count,
                "predicted, s": round(count * unit, 3),
                "measured, s": round(measured, 3),
                "measured / predicted": round(median(whole / (count * part) for part, whole in times), 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="folder of recipes")
    parser.add_argument("--share", type=float, default=SHARE, help="of the card's rate that training reaches")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--check", nargs="+", metavar="NETWORK", help="measure steps of these networks instead")
    parser.add_argument("--batch", type=int, default=32, help="benign images a step, with --check")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, with --check")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    if arguments.check is not None:
        rows = [row for model in arguments.check for row in check(model, arguments.batch, arguments.rounds)]
    else:
        paths = sorted(arguments.recipes.glob("*.yaml"))
        costs = {path.stem: cost(path, arguments.share, arguments.cards) for path in paths}
        rows = [row for row in costs.values() if row is not None]
        others = [name for name, row in costs.items() if row is None]
        print(f"Left out, as networks of others: {', '.join(others) or 'none'}.")
        print(f"Predicted: GPU-hours at {arguments.share:.0%} of the cards' bf16 rate, without validation.\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
