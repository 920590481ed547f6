"""The rows of the search: what each does, and what was expected of it before it was measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.cure.networks import BySum, Gated, Half, Held, ManyDummies, SplitLate, calibrated
from benchmarks.cure.objectives import Change, detached, inner, scheduled
from ducat.dummy import add_dummy_classes


@dataclass(frozen=True)
class Row:
    """A use of dummy classes, or a baseline.

    Attributes:
        front: which line of the plot it is a point of.
        expected: the hypothesis, and what it predicts against the front of the baselines.
        settings: options that differ from the branch's.
        network: makes the network from the base; None doubles its head with copies where there are dummy classes.
        teach: the teachers, "both" (a natural network and the average) or "self" (the average alone); "" for none.
        change: what the branch's objective is made into.
        deployed: what is evaluated, made from the trained network and held-out images.
        of: another row whose network is evaluated, instead of training one.
        at_most: whether its robust accuracy is an upper bound: it hides its gradients, as results/cure.md tells.
    """

    front: str
    expected: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: Callable[[nn.Module], nn.Module] | None = None
    teach: str = ""
    change: Change | None = None
    deployed: Callable[[nn.Module, Held], nn.Module] = lambda network, held: network
    of: str | None = None
    at_most: bool = False


_EMA = {"train.averaging": "ema", "train.averaging_decay": 0.995, "train.averaging_start_epoch": 0}


def _aware(share: float, **others: Any) -> dict[str, Any]:
    return {"dummy.kind": "recovery-aware", "dummy.benign_share": share, **others}


def _dummy(**settings: Any) -> dict[str, Any]:
    return _aware(0.35, **{name.replace("__", "."): value for name, value in settings.items()})


def _by_sum(network: nn.Module, held: Held) -> nn.Module:
    return BySum(network)


def _gated(gate: float, sharpen: float) -> Callable[[nn.Module, Held], nn.Module]:
    return lambda network, held: Gated(network, gate, sharpen)


def _half(half: int) -> Callable[[nn.Module, Held], nn.Module]:
    return lambda network, held: Half(network, half)


ROWS: dict[str, Row] = {
    "pgd-at": Row("PGD-AT", "the base method trained on"),
    "mixed-0.2": Row(
        "mixed", "more benign weight: more clean, less robust", {"method.name": "mixed", "method.weight": 0.2}
    ),
    "mixed-0.35": Row("mixed", "", {"method.name": "mixed", "method.weight": 0.35}),
    "mixed-0.5": Row("mixed", "", {"method.name": "mixed", "method.weight": 0.5}),
    "trades-1": Row("TRADES", "smaller beta: more clean, less robust", {"method.name": "trades", "method.weight": 1}),
    "trades-3": Row("TRADES", "", {"method.name": "trades", "method.weight": 3}),
    "trades-6": Row("TRADES", "", {"method.name": "trades", "method.weight": 6}),
    "published": Row(
        "published",
        "robust far below the front: the attack in training is satisfied by the dummy class",
        {"dummy.kind": "published"},
    ),
    "aware-0.2": Row("recovery-aware", "on the front of `mixed`: the same loss on q, plus a detector", _aware(0.2)),
    "aware-0.35": Row("recovery-aware", "", _aware(0.35)),
    "aware-0.5": Row("recovery-aware", "", _aware(0.5)),
    "two-soft-0.35": Row(
        "two-soft targets",
        "two teachers in two halves do not collide: above one head with the same teachers",
        _aware(0.35),
        teach="both",
    ),
    "two-soft-ema": Row(
        "variants",
        "deployed as an average, two-soft targets gain what averaging gains",
        _aware(0.35, **_EMA),
        teach="both",
    ),
    "two-soft-0.5": Row("two-soft targets", "", _aware(0.5), teach="both"),
    "one-head-0.35": Row(
        "one head, two teachers",
        "soft targets move the front up without dummy classes too",
        {"method.name": "mixed", "method.weight": 0.35},
        teach="both",
    ),
    "one-head-0.5": Row("one head, two teachers", "", {"method.name": "mixed", "method.weight": 0.5}, teach="both"),
    "self-0.35": Row("variants", "self-distillation on q: smoother targets, more robust", _aware(0.35), teach="self"),
    "split-0.35": Row(
        "two experts, split late",
        "each half has its own last stage: less interference, above `aware`",
        _aware(0.35),
        network=SplitLate,
    ),
    "split-0.5": Row("two experts, split late", "", _aware(0.5), network=SplitLate),
    "pair-0": Row(
        "variants", "without the pair term: as `mixed`, the extra rows alone do little", _dummy(dummy__pair_weight=0)
    ),
    "pair-0.1": Row("variants", "a weak detector costs less capacity: more robust", _dummy(dummy__pair_weight=0.1)),
    "pair-3": Row("variants", "a strong detector costs robustness", _dummy(dummy__pair_weight=3)),
    "pair-detached": Row(
        "variants",
        "a detector that costs the trunk nothing: as `pair-0`",
        _aware(0.35),
        change=detached,
    ),
    "random-rows": Row(
        "variants",
        "random rows lose part of the short branch",
        _aware(0.35),
        network=lambda base: add_dummy_classes(base, "random", generator=torch.Generator().manual_seed(0)),
    ),
    "margin": Row(
        "variants",
        "recovered margin inside: stronger on the margin, more robust",
        _aware(0.35),
        change=inner(objective="margin"),
    ),
    "kl": Row(
        "variants",
        "recovered KL inside: more clean, less robust",
        _aware(0.35),
        change=inner(objective="kl", gaussian_start=True),
    ),
    "trades-3-aware": Row("variants", "on the front of TRADES", _dummy(method__name="trades", method__weight=3)),
    "benign-0": Row("variants", "w_b = 0: a crisper pair", _dummy(dummy__benign_weight=0)),
    "weights-0.5": Row(
        "variants",
        "w_b = w_a = 0.5: no signal in the pair, two equal rows: as `mixed`",
        _dummy(dummy__benign_weight=0.5, dummy__adversarial_weight=0.5),
    ),
    "adversarial-0.75": Row("variants", "w_a = 0.75: a softer pair", _dummy(dummy__adversarial_weight=0.75)),
    "benign-rising": Row(
        "variants",
        "w_b from 0 to 0.5: a crisp pair first, then softer",
        _aware(0.35),
        change=scheduled({"benign_weight": (0.0, 0.5)}),
    ),
    "adversarial-rising": Row(
        "variants",
        "w_a from 0.5 to 1: the pair is learnt late, and disturbs less",
        _aware(0.35),
        change=scheduled({"adversarial_weight": (0.5, 1.0)}),
    ),
    "share-falling": Row(
        "variants",
        "benign share from 0.7 to 0: accuracy first, robustness last",
        _aware(0.35),
        change=scheduled({"benign_share": (0.7, 0.0)}),
    ),
    "three-dummies": Row(
        "variants",
        "three dummy classes a class: room for kinds of failure",
        _aware(0.35),
        network=lambda base: ManyDummies(base, 3),
    ),
    "ema": Row(
        "variants",
        "an average is worth a point of both, on any method",
        _aware(0.35, **_EMA),
    ),
    "ema-mixed-0.35": Row(
        "averaged baselines",
        "",
        {"method.name": "mixed", "method.weight": 0.35, **_EMA},
    ),
    "awp": Row("variants", "AWP costs clean accuracy in a network that underfits", _dummy(train__awp=0.005)),
    "smooth": Row(
        "variants", "label smoothing 0.1: softer targets, a little more robust", _dummy(method__label_smoothing=0.1)
    ),
    "smooth-mixed-0.35": Row(
        "averaged baselines", "", {"method.name": "mixed", "method.weight": 0.35, "method.label_smoothing": 0.1}
    ),
    **{
        f"sum-{share}": Row(
            "recovery-aware, by sum",
            "recovery by logsumexp instead of max: the same within noise",
            of=f"aware-{share}",
            deployed=_by_sum,
        )
        for share in (0.2, 0.35, 0.5)
    },
    **{
        f"{title}-half-0.35": Row("halves", expected, of="aware-0.35", deployed=_half(half))
        for half, (title, expected) in enumerate(
            [
                ("real", "the half that benign images are put in: an accurate expert?"),
                ("dummy", "the half that adversarial images are put in: a robust expert?"),
            ]
        )
    },
    **{
        f"split-gate-{gate}-{sharpen}": Row(
            "two experts, calibrated",
            "a constant gate and a sharper robust half: more robust for little clean",
            of="split-0.35",
            deployed=_gated(gate, sharpen),
        )
        for gate, sharpen in ((0.7, 1), (0.7, 2), (0.85, 2))
    },
    **{
        f"joined-gate-{gate}-{sharpen}": Row(
            "two networks, joined",
            "natural and robust network mixed: clean for little robust, if sharpened",
            of="joined",
            deployed=_gated(gate, sharpen),
        )
        for gate, sharpen in ((0.7, 2), (0.85, 2), (0.95, 2), (0.85, 4))
    },
    "split-calibrated": Row(
        "two experts, calibrated",
        "gate and sharpening chosen on held-out images: at least as good as constants",
        of="split-0.35",
        deployed=calibrated,
    ),
    "joined-calibrated": Row(
        "two networks, joined",
        "gate and sharpening chosen on held-out images: at least as good as constants",
        of="joined",
        deployed=calibrated,
        at_most=True,
    ),
}
