"""Signs that an evaluation overstates robustness: how to measure them, what follows, and the warnings that name them.

The signs are those of Athalye et al. 2018 (arXiv 1802.00420) and Carlini et al. 2019 (arXiv 1902.06705), and, for dummy
classes, the sink gap.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ducat.attacks import external
from ducat.attacks.adaptive import adaptive
from ducat.attacks.guides import Softened
from ducat.attacks.objectives import find
from ducat.attacks.pgd import pgd
from ducat.dummy import RecoveredClassifier, recover
from ducat.evaluation.result import AttackResult, Audit, Evaluation, Opinion
from ducat.evaluation.subject import Nature
from ducat.seeding import generator
from ducat.threat import ThreatModel

AUDITED = 100  # correctly classified ones that the measurements are made on
STEPS = (1, 10, 50)
QUERIES = 500
EXAMINED = ("recovered-cross-entropy", "weighted-pair")
VANISHED = 1e-12  # largest entry of an input gradient, in logits per unit of brightness
FAR = 0.5  # at this distance in L-inf every image can be made one flat grey

FAILURE = "a failure of ours"  # how a warning of one begins
SINK_GAP = 0.01
SHORTFALL = 0.005  # of our ensemble against AutoAttack
CHANCE = 2  # samples by which two attacks of the same strength differ now and then
NOISE = 0.02  # accuracies on `AUDITED` samples that differ by no more are taken as equal
FEW = 0.01  # of `AUDITED`


def measure_signs(
    network: nn.Module,
    guides: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    withstood_gradients: Tensor,
    withstood: Tensor,
    seed: int,
    queries: int = QUERIES,
) -> tuple[Audit, Tensor]:
    """Measure the signs.

    Args:
        network: with 2C outputs, in evaluation mode and without parameter gradients.
        guides: networks of C outputs whose gradients are tried in place of its own.
        x: benign images that it classifies correctly, at least one.
        y: their labels.
        threat: the ball; its eps is above 0.
        withstood_gradients: which samples withstood every attack of the suite that uses gradients only.
        withstood: which samples withstood every attack of the suite.
        seed: of the random starts.
        queries: of the random search; 0 leaves it out.

    Returns:
        The signs, and the images: for each sample one that the search or a guide broke it with, or the benign one.
    """

    def standing(images: Tensor) -> Tensor:
        with torch.no_grad():
            return recover(network(images)).argmax(1) == y

    def noise(key: str) -> torch.Generator:
        return generator(seed, "audit", key)

    def iterate(steps: int) -> Tensor:
        ball = replace(threat, steps=steps, step_size=threat.eps if steps == 1 else threat.step_size)
        goal = "recovered-cross-entropy"
        return pgd(network, x, y, ball, goal, generator=noise("steps"), keep="last")

    def at(eps: float) -> int:
        ball = ThreatModel(threat.norm, eps, steps=20)
        found = pgd(network, x, y, ball, "recovered-cross-entropy", generator=noise("eps"), keep="first")
        return int(standing(found).sum())

    deployed = RecoveredClassifier(network)
    limit = 1.0 if threat.norm == "linf" else float("inf")
    pixels = x[0].numel()
    far = {"linf": FAR, "l2": FAR * pixels**0.5, "l1": FAR * pixels}[threat.norm]
    ball = ThreatModel(threat.norm, max(far, threat.eps))
    distant = adaptive(deployed, x, y, ball, generator=noise("far"))
    only_black_box, broken = 0, x.clone()
    if queries and withstood_gradients.any():
        queried = external.square(deployed, x, y, threat, noise("square"), queries=queries)
        fooled = ~standing(queried)
        broken[fooled] = queried[fooled].to(x)
        only_black_box = int((withstood_gradients & fooled).sum())
    left = withstood & standing(x)
    found = int(left.sum())
    for guide in guides:
        rows = left.nonzero().squeeze(1)
        if not len(rows):
            break
        led = pgd(
            guide,
            x[rows],
            y[rows],
            replace(threat, steps=20),
            generator=noise("guided"),
            keep="first",
            adaptive_steps=True,
            judge=deployed,
        )
        images = x.clone()
        images[rows] = led
        fooled = left & ~standing(images)
        broken[fooled] = images[fooled]
        left &= ~fooled
    start = threat.random_start(x, noise("gradients"))
    signs = Audit(
        samples=len(x),
        vanishing={name: _vanishing(network, start, y, name) for name in EXAMINED},
        standing_after_steps={steps: int(standing(iterate(steps)).sum()) for steps in STEPS},
        standing=at(threat.eps),
        standing_at_double_eps=at(min(2 * threat.eps, limit)),
        standing_far=int(standing(distant).sum()),
        only_black_box=only_black_box,
        only_guided=found - int(left.sum()),
    )
    return signs, broken


def _vanishing(network: nn.Module, x: Tensor, y: Tensor, objective: str) -> int:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = find(objective).value(network(x), y, None).sum()
        # A network may pass no gradient at all, which autograd reports as an error or as None.
        gradient = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        return len(x)
    return int((~(gradient.flatten(1).abs().amax(1) > VANISHED)).sum())


def softened(views: Sequence[nn.Module], deployed: Callable[[nn.Module], nn.Module]) -> list[nn.Module]:
    """Return the guides that need no look inside: each view with every step passing a gradient."""
    return [deployed(Softened(view, smooth=True)) for view in views]


def suspicious(audit: Audit, attacks: Sequence[AttackResult], nature: Nature, opinion: Opinion | None) -> bool:
    """Tell whether anything asks for a second round."""
    doubted = opinion is not None and bool(opinion.broken)
    return bool(doubted or nature.names or _signs(audit, None) or _shortfalls(attacks)) or not nature.gradient


def clean(audit: Audit) -> bool:
    """Tell whether an audit shows no sign."""
    return not _signs(audit, None)


def causes(evaluation: Evaluation) -> list[str]:
    """Return why the robust accuracy is an upper bound only, in a few words each; nothing where it is a measurement."""
    scrutiny, audit = evaluation.scrutiny, evaluation.audit
    if evaluation.accuracies()["robust"] == 0:
        return []
    found = [f"the network is {name}" for name in scrutiny.nature]
    if _opinion(evaluation):
        found.append("a plain attack broke what the suite had left")
    if evaluation.unrepeatable and not scrutiny.nature:
        found.append("adversarial images were classified otherwise when they were looked at again")
    second = scrutiny.second_round
    if second is not None and second.through is None and not scrutiny.nature:
        signs = [sign for sign, _ in _signs(audit, evaluation.threat)] if audit is not None else []
        signs += ["AutoAttack beats our ensemble"] * bool(_shortfalls(evaluation.attacks))
        unseen = "the network has hard steps" if scrutiny.hard_steps else "the network passes no gradient"
        found += signs or [unseen] * (not _opinion(evaluation))
    return list(dict.fromkeys(found))


def find_warnings(evaluation: Evaluation) -> list[str]:
    """Return what a reader must know before quoting the evaluation, each in a sentence with the numbers seen."""
    found = [_opinion(evaluation), _sink_gap(evaluation), *_nature(evaluation), _unrepeatable(evaluation)]
    found += _shortfalls(evaluation.attacks)
    second = evaluation.scrutiny.second_round
    settled = second is not None and second.through is not None and not any(second.broken.values())
    if not settled:
        if evaluation.audit is not None:
            found += [warning for _, warning in _signs(evaluation.audit, evaluation.threat)]
        found.append(_hard_steps(evaluation))
        found.append(_second_round(evaluation))
    if evaluation.scrutiny.not_finite:
        found.append(
            f"for {evaluation.scrutiny.not_finite} adversarial images the network's outputs are not finite; they count "
            "as wrong"
        )
    found += [
        f"{attack.name} returned {attack.outside} images outside of the ball or of [0, 1], which break nothing"
        for attack in evaluation.attacks
        if attack.outside and not attack.same_as
    ]
    return [warning for warning in found if warning]


def _opinion(evaluation: Evaluation) -> str | None:
    opinion = evaluation.scrutiny.opinion
    if opinion is None or not opinion.broken or "random" in evaluation.scrutiny.nature:  # luck breaks some of these
        return None
    return (
        f"{FAILURE}: a plain PGD on the network as it was given, also from smoothed images and on images of 8 bits, "
        f"breaks {opinion.broken} of {opinion.samples} samples that the whole suite had left standing; they count as "
        "broken, and robust accuracy may be lower still; please report this network"
    )


def _sink_gap(evaluation: Evaluation) -> str | None:
    if evaluation.sink_gap <= SINK_GAP:
        return None
    blind, robust = (100 * evaluation.accuracies()[name] for name in ("blind", "robust"))
    return (
        f"sink gap of {blind - robust:.1f} points: {blind:.1f} % withstand attacks that do not know recovery, "
        f"{robust:.1f} % withstand those that do; only the second number is robustness"
    )


def _nature(evaluation: Evaluation) -> Sequence[str]:
    scrutiny = evaluation.scrutiny
    met = (
        f"it takes {scrutiny.whole_batches} images at a time alone, so each was judged among others that were attacked "
        "too, and an attacker who sends it in other company may do better"
        if scrutiny.whole_batches
        else "each image was attacked and judged alone and as the last of a benign batch, and must withstand both"
    )
    told = {
        "random": f"the network is random: gradients were averaged over {scrutiny.draws} draws, and robust accuracy is "
        f"the expected one over {scrutiny.repeats} passes; a better average may lower it",
        "batch-dependent": "the network is batch-dependent: what it says of 1 image depends on the rest of its batch; "
        + met,
        "stateful": "the network is stateful: it answers otherwise after it was asked; each of its passes began with "
        "what it held at first, and an attacker who may ask it more than 1 time may do better",
        "mode-dependent": "the network is mode-dependent: what it says of 1 image depends on whether gradients are "
        "recorded, or on inference mode; each image must withstand every mode, but attacks follow gradients where they "
        "are recorded",
    }
    return [told[name] for name in scrutiny.nature]


def _shortfalls(attacks: Sequence[AttackResult]) -> Sequence[str]:
    """Compare the ensemble and AutoAttack as attackers of the classifier that is deployed.

    Blind ones are no measure of strength: they stop at a dummy class, where recovery brings the sample back.
    """
    rows = [attack for attack in attacks if attack.knows_recovery or attack.same_as]
    ours = [attack.correct for attack in rows if attack.strategy.startswith("ensemble")]
    theirs = [attack.correct for attack in rows if attack.strategy == "autoattack"]
    if not ours or not theirs:
        return []
    left, reached = (int(torch.stack(flags).all(0).sum()) for flags in (ours, theirs))
    samples = len(ours[0])
    if left - reached <= max(SHORTFALL * samples, CHANCE):
        return []
    return [
        f"AutoAttack beats our ensemble by {100 * (left - reached) / samples:.1f} points "
        f"({100 * reached / samples:.1f} % against {100 * left / samples:.1f} %): the ensemble needs work, and without "
        "AutoAttack robustness would be overstated"
    ]


def _unrepeatable(evaluation: Evaluation) -> str | None:
    if not evaluation.unrepeatable or evaluation.scrutiny.nature:
        return None
    return (
        f"{evaluation.unrepeatable} saved adversarial images were classified otherwise when they were looked at again; "
        "they count as broken"
    )


def _hard_steps(evaluation: Evaluation) -> str | None:
    second = evaluation.scrutiny.second_round
    if not evaluation.scrutiny.hard_steps or second is None or second.through is not None:
        return None
    return (
        "hard steps: the network compares, rounds or picks what depends on the image, and its gradient says nothing of "
        "what it answers beyond such a step"
    )


def _second_round(evaluation: Evaluation) -> str | None:
    second = evaluation.scrutiny.second_round
    if second is None:
        return None
    by = ", ".join(f"{name} {count}" for name, count in second.broken.items() if count) or "nothing did"
    if evaluation.accuracies()["robust"] == 0:
        verdict = "0 in any case"
    elif second.through and not causes(evaluation):
        verdict = f"measured after all, through an equal network without these signs ({second.through})"
    else:
        verdict = "an upper bound: an attack made for this network may lower it"
    stopped = "; it was stopped by its limit of time" if second.stopped else ""
    return (
        f"a second round of {second.seconds:.0f} s attacked the {second.samples} samples that were still standing and "
        f"broke {sum(second.broken.values())} of them (by {by}){stopped}; robust accuracy is {verdict}"
    )


def _signs(audit: Audit | None, threat: ThreatModel | None) -> list[tuple[str, str]]:
    """Return each sign's name and what was seen of it."""
    if audit is None:
        return []
    found, of = [], f"of {audit.samples} samples"
    for objective, count in audit.vanishing.items():
        if count > FEW * audit.samples:
            found.append(
                (
                    "gradients vanish",
                    f"gradients vanish: for {count} {of} the gradient of {objective} is zero or below {VANISHED:g}; "
                    "attacks that follow gradients stand still there",
                )
            )
    if audit.only_black_box > FEW * audit.samples:
        found.append(
            (
                "black-box beats white-box",
                f"black-box beats white-box: {audit.only_black_box} {of} withstand each attack that follows gradients, "
                f"but not Square with {QUERIES} queries; the gradients mislead",
            )
        )
    if audit.only_guided > FEW * audit.samples:
        found.append(
            (
                "other gradients beat the network's own",
                f"other gradients beat the network's own: {audit.only_guided} {of} withstand the whole suite, but not "
                "20 steps along the gradient of a smoother network or of a part of it; the gradients mislead",
            )
        )
    counts = list(audit.standing_after_steps.items())
    pairs = [(few, many) for index, few in enumerate(counts) for many in counts[index + 1 :]]
    worse = [(few, many) for few, many in pairs if many[1] - few[1] > NOISE * audit.samples]
    if worse:
        (few, before), (many, after) = max(worse, key=lambda pair: pair[1][1] - pair[0][1])
        found.append(
            (
                "more steps do not lower accuracy",
                f"more steps do not lower accuracy: {before} {of} withstand PGD with {few} step{'s'[: few > 1]}, "
                f"{after} withstand {many}; the loss surface misleads the attack",
            )
        )
    if audit.standing > NOISE * audit.samples and audit.standing_at_double_eps >= audit.standing:
        radius = f" at eps {threat.eps:.4g}" if threat else ""
        found.append(
            (
                "a larger eps does not lower accuracy",
                f"a larger eps does not lower accuracy: {audit.standing} {of} withstand PGD{radius}, "
                f"{audit.standing_at_double_eps} at twice that; the attack is stuck, not the model robust",
            )
        )
    if audit.standing_far:
        found.append(
            (
                "accuracy does not fall to 0",
                f"accuracy does not fall to 0: {audit.standing_far} {of} withstand an attack that may turn every image "
                "into flat grey; the attack fails, not the model resists",
            )
        )
    return found
