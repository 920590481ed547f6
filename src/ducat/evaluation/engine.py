"""Evaluation: every suite runs blind and recovery-aware attacks side by side, and the worst case per sample counts."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mkldnn

from ducat import losses
from ducat.attacks.adaptive import SilentDummies, is_recovered, with_dummy_classes
from ducat.attacks.external import Apart
from ducat.attacks.guides import Replaced, Softened, classifiers_inside, narrowed
from ducat.attacks.pgd import attackable
from ducat.attacks.suites import Attack, RunAttack, Suite, attack_name, find_suite, through
from ducat.data import spooled
from ducat.dummy import RecoveredClassifier
from ducat.evaluation import rejection, second_opinion
from ducat.evaluation.audit import AUDITED, causes, find_warnings, measure_signs, suspicious
from ducat.evaluation.parts import Key, Part, agreed, described, digest, shared
from ducat.evaluation.rejection import check_shares
from ducat.evaluation.result import AttackResult, Evaluation, Opinion, Scrutiny
from ducat.evaluation.second_round import Scene, guides, second_round
from ducat.evaluation.subject import (
    Averaged,
    Measured,
    Nature,
    Network,
    classifier,
    differs,
    examine,
    given_back,
    images_and_labels,
    modes,
    spread,
    takes_hard_steps,
    views,
)
from ducat.models.folded import fold_batch_norm
from ducat.seeding import generator
from ducat.threat import ThreatModel

REPEATS = 20  # passes that judge an image of a random network
LAST_REPEATS = 100  # the same for the image that is kept
WATCHED = 8  # images and as many adversarial ones that a network is watched with
SECOND_ROUND, SECOND_OPINION, AUDIT = "second-round", "second-opinion", "audit"  # rows of the result
FOLLOWING = (SECOND_ROUND, SECOND_OPINION, AUDIT)  # these attack some of the samples that others left standing
RUNS = 3  # at most: what attacks bring to light of a network may ask for another run


def evaluate(
    model: Network,
    x: Any,
    y: Any,
    threat: ThreatModel,
    suite: str | Suite = "standard",
    *,
    num_classes: int,
    seed: int = 0,
    batch_size: int = 500,
    data: str = "",
    progress: Callable[[str], None] = lambda attack: None,
    parts: Path | str | None = None,
    attacks: Sequence[Attack | RunAttack] = (),
    surrogates: Sequence[Network] = (),
    draws: int = 1,
    replacements: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    second_round_seconds: float | None = None,
    reject: Sequence[float] = (),
    held_out: tuple[Any, Any] | None = None,
) -> Evaluation:
    """Attack a classifier with every attack of a suite, blind and recovery-aware.

    Predictions are always recovered ones. Every attack starts from all samples whose benign image is classified
    correctly, so that each attack's accuracy is its own. A sample is robust if it withstands every attack, and if its
    saved image does not fool the network when it is looked at once more, in float32. `docs/evaluation.md` tells what
    happens before, between and after the attacks. The network is left as it was.

    Args:
        model: maps images in [0, 1] to 2C logits (a network with dummy classes) or to C logits, on any device; a module
            or a function. A `RecoveredClassifier` is measured with its own recovery, anything else with 2C logits by
            max. It may return an object, a mapping or a tuple with the logits, and work in any precision.
        x: benign images in [0, 1], shape (samples, channels, H, W), tensor or array, on any device; a chunk at a time
            goes to the model's.
        y: whole-number labels in [0, C), shape (samples,), tensor, array or list.
        threat: ball, step size and steps; the attacks set their own steps.
        suite: a row of `attacks.suites.SUITES` ("quick", "light", "standard" or "full"), or a `Suite`.
        num_classes: C, the number of real classes.
        seed: of the attacks' random starts.
        batch_size: samples attacked at a time, a chunk. Each chunk has its own seed.
        data: name of the data, for the report.
        progress: told of each attack and chunk as it starts, as a text that also says how far it is (`parts.Stage`).
        parts: a folder that keeps each finished chunk. With it an evaluation that was interrupted continues where it
            was, and several processes started by `accelerate launch` share the chunks; each returns the whole.
        attacks: more attacks that join the worst case: rows of a suite, or functions
            `(classifier, x, y, threat, generator)` to images, where `classifier` maps images to C logits.
        surrogates: other networks of C or 2C logits, whose adversarial images are tried too.
        draws: passes that each gradient of a random network is averaged over, at least; more where its noise asks.
        replacements: by the name of a module in `model`, a differentiable function of the same input that gives the
            gradient in its stead (BPDA).
        second_round_seconds: the longest that the second round may take, which begins when something hides the
            gradients; None for no limit.
        reject: shares of the correctly classified benign images that may be refused, each in [0, 1): for each of them
            the classifier is measured as one that may refuse, see `evaluation.rejection.measure`; with its shorter
            attacks where the suite is for curves ("quick").
        held_out: images and labels that its thresholds are set on; by default x and y themselves.

    Raises:
        ValueError: if the suite is unknown, there are no samples, images or labels are out of range, the model fails on
            the images, its outputs are not finite or fit neither C nor 2C, or it remembers what it was asked in a place
            that cannot be put back.
    """
    chosen = find_suite(suite)
    with _plainly():
        x, y = images_and_labels(x, y, num_classes, Path(parts).parent if parts is not None else None)
        check_shares(reject)
        if second_round_seconds is not None and not second_round_seconds >= 0:
            raise ValueError(f"second_round_seconds={second_round_seconds:g} must be at least 0")
        if held_out is not None:
            held_out = images_and_labels(*held_out, num_classes)
        subject = _Subject.of(model, x, num_classes, batch_size, replacements)
        others = [classifier(other, x, batch_size) for other in surrogates]
        with given_back(subject.network, *others), attackable(subject.network), attackable(nn.ModuleList(others)):
            common: Callable[[Any], Any] = agreed if parts is not None else lambda value: value
            largest = min(len(x), batch_size)
            nature = common(examine(subject.network, x, None, threat, generator(seed, "evaluate", "nature"), largest))
            fold = True
            rows = [*chosen.attacks, *_own(attacks, subject), *_transfers(others, subject)]
            _check_distinct(row for row in rows if threat.norm in row.norms)
            asked = [str(draws), described(replacements)]
            for _ in range(RUNS):
                nature = replace(nature, draws=max(nature.draws, draws if nature.random else 1))
                job = _Job.of(subject, nature, threat, rows, seed, x, fold, bool(reject), others, asked)
                outcome = _Outcome.of(job, x, y, batch_size, progress, parts, chosen.name)
                noise = generator(seed, "nature")
                seen = common(examine(subject.network, x, outcome.adversarial, threat, noise, largest, nature))
                faithful = common(job.agrees(x, outcome.adversarial, batch_size))
                if faithful and (seen.names, seen.remembers) == (nature.names, nature.remembers):
                    break
                nature, fold = seen, fold and faithful
            evaluation = _conclude(
                job, outcome, chosen, x, y, num_classes, progress, data, batch_size, second_round_seconds
            )
            if reject:
                evaluation = _with_rejection(
                    evaluation, job, outcome, x, y, num_classes, chosen, reject, held_out, others, progress
                )
            return evaluation


LED_INSIDE = 3  # classifiers inside a network that attacks on its refusals follow


def _with_rejection(
    evaluation: Evaluation,
    job: "_Job",
    outcome: "_Outcome",
    x: Tensor,
    y: Tensor,
    num_classes: int,
    suite: Suite,
    shares: Sequence[float],
    held_out: tuple[Tensor, Tensor] | None,
    others: Sequence[Measured],
    progress: Callable[[str], None],
) -> Evaluation:
    if job.nature.names:
        kind = " and ".join(job.nature.names)
        refusal = f"reject: a network that is {kind} gives an image no one signal, so refusing was not measured"
        return replace(evaluation, warnings=[*evaluation.warnings, refusal])
    subject, audit = job.subject, evaluation.audit
    hidden = audit is not None and suspicious(audit, evaluation.attacks, job.nature, evaluation.scrutiny.opinion)
    hidden |= evaluation.at_most
    leading: list[nn.Module] = list(others)
    if suite.audit:
        few = x[: subject.network.batch_size or 2].to(subject.network.device)
        inside = classifiers_inside(subject.network, subject.network.model, few, num_classes)
        leading += [part for _, part in inside[:LED_INSIDE]]
    led: list[nn.Module] = [SilentDummies(narrowed(one, num_classes)) for one in leading]
    given = led[: len(others)]
    if suite.audit:
        led = [subject.aware(Softened(subject.network, smooth)) for smooth in (True, False)] + led
    found: list[Tensor] = [evaluation.adversarial, *outcome.accepted]
    deployed = RecoveredClassifier(subject.aware(subject.network))

    def measure(guides: Sequence[nn.Module]) -> rejection.Rejection:
        return rejection.measure(
            deployed,
            x,
            y,
            job.threat,
            shares,
            held_out=held_out,
            found=found,
            attacked=subject.aware(job.attacked[0]),
            guides=guides,
            budget="standard" if suite.audit else "quick",
            seed=job.seed,
            batch_size=evaluation.batch_size,
            progress=progress,
        )

    measured, told = measure(led if hidden else given), []
    if suite.audit and not hidden:
        more, hidden = rejection.second_look(
            deployed, x, y, job.threat, measured, led, seed=job.seed, progress=progress
        )
        if hidden:
            starts = spooled.empty(x.shape)
            starts.copy_(evaluation.adversarial)
            for rows, images in more:
                starts[rows] = images
            found.append(starts)
            measured = measure(led)
            told.append(
                "reject: a second look along other gradients than the network's own, or by none, found images that the "
                "attack had left; something hides what the signal depends on, and all of refusing is an upper bound"
            )
        measured = rejection.counted(deployed, x, y, measured, more)
    measured = replace(measured, at_most=hidden or evaluation.at_most)
    return replace(evaluation, rejection=measured, warnings=[*evaluation.warnings, *told, *measured.warnings])


@dataclass(frozen=True)
class _Subject:
    """The network, and how its outputs become a prediction."""

    network: Measured
    led: nn.Module  # the same, with the gradients that the caller replaces
    how: str | None  # recovery; None without dummy classes

    @classmethod
    def of(
        cls,
        model: Network,
        x: Tensor,
        num_classes: int,
        batch_size: int,
        replacements: Mapping[str, Callable[[Tensor], Tensor]] | None,
    ) -> "_Subject":
        how = None
        if isinstance(model, RecoveredClassifier) and is_recovered(model):
            how, model = model.how, model.model
        network = classifier(model, x, batch_size)
        with attackable(network), torch.no_grad():
            outputs = network(x[:1].to(network.device)).shape[1]
        if outputs == 2 * num_classes:
            how = how or "max"
        elif outputs != num_classes or how is not None:
            raise ValueError(
                f"the model has {outputs} outputs: with num_classes={num_classes} it must have {num_classes}, "
                f"or {2 * num_classes} with dummy classes"
            )
        led: nn.Module = network
        if replacements:
            Replaced(network.model, replacements)  # names its modules as the caller knows them
            led = Replaced(network, {f"model.{name}".rstrip("."): one for name, one in replacements.items()})
        return cls(network, led, how)

    def deployed(self, view: nn.Module) -> nn.Module:
        """Return a view of the network as the classifier that is deployed: C logits."""
        return view if self.how is None else RecoveredClassifier(view, self.how)

    def aware(self, view: nn.Module) -> nn.Module:
        """Return a view with 2C logits whose recovery by max is the decision of the classifier that is deployed."""
        return view if self.how == "max" else SilentDummies(self.deployed(view))


def _own(attacks: Sequence[Attack | RunAttack], subject: _Subject) -> list[Attack]:
    """Return the caller's own attacks as rows."""
    rows = []
    for number, attack in enumerate(attacks):
        if isinstance(attack, Attack):
            rows.append(attack)
            continue
        name = getattr(attack, "__name__", f"attack-{number + 1}").strip("<>")

        def run(
            model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: torch.Generator, own: RunAttack = attack
        ) -> Tensor:
            return own(RecoveredClassifier(Apart(model, x.device)), x, y, threat, noise)

        rows.append(Attack(f"own-{name}", subject.how is not None, run))
    return rows


def _check_distinct(rows: Iterable[Attack]) -> None:
    """Refuse two rows of one name: the results of one would be taken for those of the other."""
    later = [attack_name(strategy, knows) for strategy in FOLLOWING for knows in (False, True)]
    names = [row.name for row in rows] + later
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"attacks: two have the same name, {twice} (rows of the suite count too): give yours another")


def _transfers(others: Sequence[Measured], subject: _Subject) -> list[Attack]:
    return [
        Attack(f"transfer-{number + 1}", subject.how is not None, through(other)) for number, other in enumerate(others)
    ]


@dataclass(frozen=True)
class _Job:
    """What is done to every chunk."""

    subject: _Subject
    nature: Nature
    judges: Sequence[nn.Module]  # every way in which an image may meet the network
    attacked: Sequence[nn.Module]  # the same in the form that attacks lead by: folded, averaged
    folded: nn.Module | None
    threat: ThreatModel
    attacks: Sequence[Attack]
    seed: int
    watched: bool = False  # whether images are kept that a classifier that may refuse would accept
    others: Sequence[Measured] = ()  # networks whose gradients are tried too
    asked: Sequence[str] = ()  # what else the caller asked for that changes what attacks leave

    @classmethod
    def of(
        cls,
        subject: _Subject,
        nature: Nature,
        threat: ThreatModel,
        attacks: Sequence[Attack],
        seed: int,
        x: Tensor,
        fold: bool,
        watched: bool = False,
        others: Sequence[Measured] = (),
        asked: Sequence[str] = (),
    ) -> "_Job":
        network = subject.network
        folded = None
        if fold and subject.led is network and not (nature.names or nature.remembers):
            folded = _fold(network, x, threat, seed)
        met = views(network, nature, x)
        if folded is not None:
            attacked: Sequence[nn.Module] = [folded]
        elif subject.led is not network:
            attacked = [subject.led, *(view for view in met if view is not network)]
        else:
            attacked = met
        if nature.random:
            attacked = [Averaged(one, nature.draws) for one in attacked]
        watched = watched and not nature.names
        judges = [*met, *modes(network, nature, x)]
        return cls(subject, nature, judges, attacked, folded, threat, attacks, seed, watched, others, asked)

    @property
    def repeats(self) -> int:
        return REPEATS if self.nature.random else 1

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.subject.network.device) for tensor in tensors)

    @torch.no_grad()
    def judge(self, x: Tensor, y: Tensor, repeats: int | None = None) -> tuple[Tensor, Tensor]:
        """Return how often the recovered prediction is right (0 or 1 unless the network is random), and the margin.

        The worst way in which an image may meet the network counts. Outputs that are not finite are no prediction.
        """
        if not len(y):
            return y.new_zeros(0, dtype=torch.float32), y.new_zeros(0, dtype=torch.float32)
        repeats = repeats or self.repeats
        share, lead = y.new_ones(len(y), dtype=torch.float32), None
        for judge in self.judges:
            right = torch.zeros_like(share)
            margins = torch.zeros_like(share)
            for _ in range(repeats):
                logits = self.subject.deployed(judge)(x)
                finite = logits.isfinite().all(1)
                right += (logits.argmax(1) == y) & finite
                margins += torch.where(finite, losses.margin(logits.nan_to_num(), y), torch.inf)
            share = torch.minimum(share, right / repeats)
            lead = margins / repeats if lead is None else torch.maximum(lead, margins / repeats)
        assert lead is not None
        return share, lead

    def look_again(self, x: Tensor, y: Tensor, adversarial: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
        """Return how often each benign and each kept image is classified correctly; outside the ball breaks nothing."""
        x, y, adversarial = self.to_device(x, y, adversarial)
        benign = self.judge(x, y, repeats)[0]
        share = self.judge(adversarial, y, repeats)[0]
        share = torch.where(self.threat.allows(adversarial, x), share, benign)
        # A benign image that is classified wrongly is its own adversarial image, whatever was made of it.
        return benign.cpu(), torch.minimum(benign, share).cpu()

    @torch.no_grad()
    def not_finite(self, adversarial: Tensor, batch_size: int) -> int:
        network = self.subject.network
        parts = spooled.chunks(adversarial, batch_size)
        return sum(int((~network(part.to(network.device)).isfinite().all(1)).sum()) for part in parts)

    @torch.no_grad()
    def agrees(self, x: Tensor, adversarial: Tensor, batch_size: int) -> bool:
        """Tell whether the folded copy says what the network says, of every benign and every adversarial image."""
        if self.folded is None:
            return True
        for part in itertools.chain(spooled.chunks(x, batch_size), spooled.chunks(adversarial, batch_size)):
            (part,) = self.to_device(part)
            if bool(differs(self.subject.network(part), self.folded(part)).any()):
                return False
        return True

    def key(self, x: Tensor, y: Tensor, suite: str, batch_size: int) -> Key:
        """Return everything that decides what the attacks leave of a chunk, but its number."""
        networks = [self.subject.network, *self.others]
        nature = self.nature.names, self.nature.remembers
        settings = [
            digest(x, y),
            *map(str, (self.threat, suite, self.seed, batch_size, self.subject.how, nature, self.folded is not None)),
            *(f"{attack.name} {described(attack.run)}" for attack in self.attacks),
            str(self.watched),
            *self.asked,
        ]
        return Key.of(settings, networks, x, self.threat, self.nature.random)

    def attack(self, number: int, x: Tensor, y: Tensor, progress: Callable[[Attack, int], None]) -> Part:
        x, y = self.to_device(x, y)
        clean, margin = self.judge(x, y)
        rows = (clean > 0.5).nonzero().squeeze(1)
        adversarial, least = x.clone(), clean.clone()
        results: dict[str, AttackResult] = {}
        ran: list[Attack] = []
        seen = self.seen(x, y) if self.watched else None
        for attack in self.attacks:
            if self.threat.norm not in attack.norms:
                continue
            twin = next((other for other in ran if self.subject.how is None and _same(other, attack)), None)
            if twin is not None:
                results[attack.name] = replace(
                    results[twin.name], knows_recovery=attack.knows_recovery, seconds=0.0, same_as=twin.name
                )
                continue
            ran.append(attack)
            progress(attack, int((least > 0.5).sum()))
            share, outside, began = clean.clone(), 0, time.perf_counter()
            for place, view in enumerate(self.attacked if len(rows) else ()):
                aware = attack.knows_recovery or self.subject.how is None
                network = self.subject.aware(view) if aware else SilentDummies(view)
                noise = generator(self.seed, "evaluate", attack.strategy, number, *([place] if place else []))
                found = x.clone()
                found[rows] = attack.run(network, x[rows], y[rows], self.threat, noise).detach().to(x)
                found, strayed = _pulled_back(found, x, self.threat)
                outside += strayed
                right, reached = self.judge(found, y)
                if seen is not None:
                    seen.look(found)
                inside = self.threat.allows(found, x)
                right = torch.where(inside, right, clean)
                share = torch.minimum(share, right)
                better = inside & ((right < least) | ((right == least) & (least > 0) & (reached > margin)))
                better &= clean > 0
                adversarial[better], margin[better] = found[better], reached[better]
                least = torch.minimum(least, share)
            results[attack.name] = self.result(attack, share.cpu(), time.perf_counter() - began, outside)
        accepted = torch.stack([*seen.nearest.values()]) if seen is not None else x.new_empty((0, *x.shape))
        return Part(clean.cpu(), adversarial.cpu(), list(results.values()), accepted.cpu())

    def seen(self, x: Tensor, y: Tensor) -> rejection.Seen:
        view = RecoveredClassifier(self.subject.aware(self.subject.network))
        signals = {name: rejection.SIGNALS[name] for name in rejection.signals_of(view, x)}
        return rejection.Seen(with_dummy_classes(view, x), x, y, self.threat, signals)

    def result(self, attack: Attack, share: Tensor, seconds: float, outside: int = 0) -> AttackResult:
        shares = share if self.nature.random else None
        return AttackResult(
            attack.strategy,
            attack.knows_recovery,
            share > 0.5,
            seconds,
            attack.black_box,
            shares=shares,
            outside=outside,
        )


def _same(first: Attack, second: Attack) -> bool:
    """Tell whether two rows differ at most in what their attacker knows."""
    return first.strategy == second.strategy and first.run is second.run


STRAYED = 0.01  # of eps: an image further out than that is no matter of rounding


def _pulled_back(found: Tensor, x: Tensor, threat: ThreatModel) -> tuple[Tensor, int]:
    """Return images with those that rounding took out of the ball or of [0, 1] back in it, and how many are far out.

    In l1, float32 takes a change of many pixels out by more than `allows` lets pass.
    """
    rows = (~threat.allows(found, x)).nonzero().squeeze(1)
    if not len(rows):
        return found, 0
    strays, benign = found[rows], x[rows]
    room = STRAYED * threat.eps
    near = (threat.distance(strays, benign) <= threat.eps + room) & strays.isfinite().flatten(1).all(1)
    near &= ((strays >= -room) & (strays <= 1 + room)).flatten(1).all(1)
    found = found.clone()
    found[rows[near]] = threat.project(strays[near], benign[near])
    return found, int((~near).sum())


def _fold(network: Measured, x: Tensor, threat: ThreatModel, seed: int) -> nn.Module | None:
    """Return a folded copy that says what the network says of benign and disturbed images, or None."""
    probe = x[:16].to(network.device)
    folded = fold_batch_norm(network, probe[:2])
    if folded is None:
        return None
    disturbed = torch.cat([probe, threat.random_start(probe, generator(seed, "evaluate", "fold"))])
    with torch.no_grad():
        return None if bool(differs(network(disturbed), folded(disturbed)).any()) else folded


@dataclass(frozen=True)
class _Outcome:
    """What the attacks left of all samples."""

    clean: Tensor
    adversarial: Tensor
    attacks: Sequence[AttackResult]
    accepted: Tensor

    @classmethod
    def of(
        cls,
        job: _Job,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        progress: Callable[[str], None],
        parts: Path | str | None,
        suite: str,
    ) -> "_Outcome":
        chunks = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
        folder = Path(parts) if parts is not None else None
        key = None if folder is None else job.key(x, y, suite, batch_size)
        adversarial = spooled.empty(x.shape, folder=None if folder is None else folder.parent)
        clean, attacks, accepted = [], [], []
        # One at a time: all adversarial images together may be larger than memory.
        for place, part in zip(
            spooled.chunks(adversarial, batch_size), shared(job.attack, x, chunks, progress, folder, key), strict=True
        ):
            place.copy_(part.adversarial)
            clean.append(part.clean)
            attacks.append(part.attacks)
            accepted.append(part.accepted)
        rows = [_joined(rows) for rows in zip(*attacks, strict=True)]
        return cls(torch.cat(clean), adversarial, rows, torch.cat(accepted, dim=1))

    @property
    def standing(self) -> Tensor:
        return torch.stack([self.clean > 0.5, *(attack.correct for attack in self.attacks)]).all(0)


def _joined(rows: Sequence[AttackResult]) -> AttackResult:
    shares = [row.shares for row in rows if row.shares is not None]
    return replace(
        rows[0],
        correct=torch.cat([row.correct for row in rows]),
        seconds=sum(row.seconds for row in rows),
        outside=sum(row.outside for row in rows),
        shares=torch.cat(shares) if shares else None,
    )


def _conclude(
    job: _Job,
    outcome: _Outcome,
    suite: Suite,
    x: Tensor,
    y: Tensor,
    num_classes: int,
    progress: Callable[[str], None],
    data: str,
    batch_size: int,
    second_round_seconds: float | None,
) -> Evaluation:
    """Look for signs, attack again where there are any, ask for a second opinion, and sum up."""
    subject, nature = job.subject, job.nature
    adversarial, attacks = outcome.adversarial, list(outcome.attacks)
    clean, standing = outcome.clean > 0.5, outcome.standing
    least = torch.stack([outcome.clean, *(one.correct if one.shares is None else one.shares for one in attacks)])
    least = least.float().amin(0)
    audit = opinion = second = None
    hard = False
    searched = job.threat.eps > 0 and bool(clean.any())
    guess = subject.deployed(job.attacked[0])

    def join(strategy: str, rows: Tensor, found: Tensor, seconds: float) -> int:
        """Let images that were found for some samples count; return how many standing samples they break."""
        share = outcome.clean.clone()
        benign, labels, images = job.to_device(spooled.take(x, rows), y[rows], found)
        right = torch.where(job.threat.allows(images, benign), job.judge(images, labels)[0], 1.0)
        share[rows] = torch.minimum(share[rows], right.cpu())
        row = Attack(strategy, subject.how is not None, _never, black_box=strategy != SECOND_OPINION)
        attacks.append(job.result(row, share, seconds))
        closer = (share < least)[rows]
        adversarial[rows[closer]] = found[closer.to(found.device)].cpu()
        spooled.release(adversarial)
        broken = int((standing & (share <= 0.5)).sum())
        standing.logical_and_(share > 0.5)
        least.copy_(torch.minimum(least, share))
        return broken

    if suite.audit and searched and standing.any():
        progress("second opinion")
        rows = _some(standing, second_opinion.SAMPLES)
        given, labels = job.to_device(spooled.take(x, rows), y[rows])
        began = time.perf_counter()
        found = second_opinion.plain_pgd(
            subject.network, given, labels, job.threat.norm, job.threat.eps, subject.how, job.seed
        )
        opinion = Opinion(len(rows), join(SECOND_OPINION, rows, found, time.perf_counter() - began))
    if suite.audit and searched:
        progress("audit")
        by_gradients = torch.stack([clean, *(a.correct for a in attacks if not a.black_box)]).all(0)

        def scene(rows: Tensor) -> Scene:
            device = subject.network.device
            return Scene(
                subject.network,
                job.judges,
                subject.deployed,
                guess,
                lambda images, labels: job.judge(images, labels)[0] > 0.5,
                spooled.take(x, rows).to(device),
                y[rows].to(device),
                spooled.take(adversarial, rows).to(device),
                job.threat,
                num_classes,
                job.seed,
                nature.draws,
                second_round_seconds,
            )

        audited = _some(clean, AUDITED)
        few = job.to_device(spooled.take(x, audited), y[audited], by_gradients[audited], standing[audited])
        led = [guide for _, guide in guides(scene(audited))]
        began = time.perf_counter()
        audit, seen = measure_signs(
            subject.aware(job.attacked[0]), led, few[0], few[1], job.threat, few[2], few[3], job.seed
        )
        seconds = time.perf_counter() - began
        # Hard steps are no sign, since honest networks have some: they ask for a second round, which settles it.
        rows = audited[spread(len(audited), WATCHED)]
        watched = job.to_device(torch.cat([spooled.take(x, rows), spooled.take(adversarial, rows)]))[0]
        hard = any(takes_hard_steps(subject.network, part) for part in watched.split(batch_size))
        if hard or suspicious(audit, attacks, nature, opinion):
            progress("second round")
            rows = (least > 0 if nature.random else standing).nonzero().squeeze(1)
            if len(rows):
                second, found = second_round(scene(rows), not nature.names, progress)
                join(SECOND_ROUND, rows, found, second.seconds)
        broke = standing[audited] & (seen != few[0]).flatten(1).any(1).cpu()
        if broke.any() and join(AUDIT, audited[broke], seen[broke.to(seen.device)], seconds) and second is not None:
            second = replace(second, through=None)  # nothing is settled that the audit can break
    last = LAST_REPEATS if nature.random else 1
    looks = [
        job.look_again(*chunk, last)
        for chunk in zip(
            spooled.chunks(x, batch_size), y.split(batch_size), spooled.chunks(adversarial, batch_size), strict=True
        )
    ]
    clean_shares, robust_shares = (torch.cat(parts) for parts in zip(*looks, strict=True))
    survived = robust_shares > 0.5
    evaluation = Evaluation(
        data=data,
        threat=job.threat,
        seed=job.seed,
        suite=suite.name,
        batch_size=batch_size,
        fingerprint=digest(x, y),
        labels=y.cpu(),
        clean=clean,
        robust=survived & standing,
        attacks=attacks,
        adversarial=adversarial,
        unrepeatable=int((survived & clean & ~standing).sum()),
        dummy_classes=subject.how is not None,
        clean_shares=clean_shares if nature.random else None,
        robust_shares=robust_shares if nature.random else None,
        audit=audit,
        scrutiny=Scrutiny(
            nature=nature.names,
            draws=nature.draws,
            repeats=last,
            whole_batches=subject.network.batch_size,
            folded=job.folded is not None,
            hard_steps=hard,
            not_finite=job.not_finite(adversarial, batch_size),
            opinion=opinion,
            second_round=second,
        ),
    )
    evaluation = replace(evaluation, causes=causes(evaluation))
    return replace(evaluation, warnings=find_warnings(evaluation))


def _some(flags: Tensor, most: int) -> Tensor:
    rows = flags.nonzero().squeeze(1)
    return rows[spread(len(rows), most)]


def _never(*_: Any) -> Tensor:
    raise AssertionError("this row records what was found, and is not run")


@contextmanager
def _plainly() -> Iterator[None]:
    """Compute in whole float32, also where the user lets it be shortened, in autocast and in inference mode."""
    with (
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        _whole_float32(),
    ):
        yield


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Switch TF32 and bfloat16 off in matrix products and convolutions.

    PyTorch has two interfaces for it, and refuses to read the older one where the newer one (`fp32_precision`, from
    2.9) says something else. So both are set, each to the same, and put back.
    """
    newer = [(part, part.fp32_precision) for part in _shortened()]
    matmul, convolutions = _readable(torch.get_float32_matmul_precision), _readable(lambda: cudnn.allow_tf32)
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            cudnn.allow_tf32 = False
        for part, _ in newer:
            part.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for part, precision in newer:
            part.fp32_precision = "none"  # that of all parts together, which the user may have set instead
            if part.fp32_precision != precision:
                part.fp32_precision = precision


def _shortened() -> list[Any]:
    """Return the parts of PyTorch that have a precision of float32 of their own, as far as this version has them."""
    names = ((torch.backends.cuda, ("matmul",)), (cudnn, ("conv", "rnn")), (mkldnn, ("matmul", "conv", "rnn")))
    parts = [getattr(backend, name, None) for backend, some in names for name in some]
    return [part for part in parts if hasattr(part, "fp32_precision")]


def _readable(setting: Callable[[], Any]) -> Any:
    try:
        return setting()
    except RuntimeError:  # the newer interface was used
        return None
