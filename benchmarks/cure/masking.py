"""Whether a mixture tuned after training hides its gradients: attacks through smoother mixtures of the same two.

    python -m benchmarks.cure.masking --work /tmp/cure --seed 1

Looks at the mixture that `joined-calibrated` chose on digits for seeds 1 and 2, which judges every iterate.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import ducat
from benchmarks.cure.networks import Gated, Joined
from benchmarks.cure.settings import SETTINGS
from ducat.attacks.pgd import pgd
from ducat.data import load_test
from ducat.runs import RunFolder

CHOSEN = (0.5, 4, 2)
STAND_INS = (
    CHOSEN,
    (0.9999, 1, 1),
    (0.5, 1, 1),
    (0.85, 1, 1),
    (0.85, 2, 1),
    (0.95, 1, 1),
    (0.5, 2, 1),
    (0.5, 4, 1),
    (0.5, 1, 2),
    (0.95, 4, 2),
    (0.5, 0.5, 2),
    (0.5, 0.2, 2),
    (0.5, 0.05, 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder in which the rows of digits were made")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = arguments.work / "digits" / "runs"
    natural, robust = (ducat.load(runs / f"{name}-s{arguments.seed}", "last") for name in ("natural", "pgd-at"))
    threat = replace(RunFolder(runs / f"pgd-at-s{arguments.seed}").config.threat.build(None), steps=50)
    x, y = load_test("digits", SETTINGS["digits"].test, arguments.work / "data")
    experts = Joined(natural, robust).eval()
    mixture = Gated(experts, *CHOSEN)
    with torch.no_grad():
        left = mixture(x).argmax(1) == y
    print(f"clean: {left.float().mean():.3f}")
    for stand_in in STAND_INS:
        for objective in ("cross-entropy", "margin"):
            for keep in ("best", "last"):
                generator = torch.Generator().manual_seed(1)
                adversarial = pgd(Gated(experts, *stand_in), x, y, threat, objective, generator=generator, keep=keep)
                with torch.no_grad():
                    left &= mixture(adversarial).argmax(1) == y
        print(f"left after gate, sharpening, power {stand_in}: {left.float().mean():.3f}", flush=True)


if __name__ == "__main__":
    main()
