"""What a defence truly withstands: attacks through stand-ins of its inside, judged by the defence as it is deployed.

The attacks share no code with `ducat.evaluate`: a true number must not repeat its mistakes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ducat

JUDGEMENTS = ("plain", "random", "company", "fresh", "inference")
FEW, MANY = 24, 400  # draws of a random defence while it is attacked, and of the image that is chosen in the end
STEPS, EVERY = 40, 10
TARGETS = 6, 2  # of networks that are not random, and of random ones
QUERIES = 200


def logits_of(output: Any) -> Tensor:
    """Return the logits of whatever a network answers: a tensor, a tuple, a dictionary, or an object."""
    if isinstance(output, dict):
        output = output["logits"]
    elif isinstance(output, tuple | list):
        output = output[0]
    elif hasattr(output, "logits"):
        output = output.logits
    logits: Tensor = output
    return logits


class Judge:
    """How often the deployed network is right about an image, in the worst company that the attacker can choose.

    Args:
        build: makes the network, afresh.
        how: "plain"; "random", over draws; "company", the worst of alone, among benign images and with the other
            adversarial ones; "fresh", a new network for every look; "inference", in inference mode.
        x: benign images.
        y: their labels.
        classes: C; a network with 2C outputs is recovered by max.
    """

    def __init__(self, build: Callable[[], nn.Module], how: str, x: Tensor, y: Tensor, classes: int) -> None:
        assert how in JUDGEMENTS
        self.build, self.how, self.x, self.y, self.classes = build, how, x, y, classes
        self.model = build().eval()

    def logits(self, images: Tensor) -> Tensor:
        """Return (B, C) logits in float64 of one look; a row that has NaN in it is NaN."""
        model = self.build().eval() if self.how == "fresh" else self.model
        with torch.inference_mode() if self.how == "inference" else torch.no_grad():
            logits = logits_of(model(images.clone())).double().clone()
        return ducat.recover(logits) if logits.shape[1] == 2 * self.classes else logits

    def _right(self, images: Tensor, y: Tensor) -> Tensor:
        logits = self.logits(images)
        # An answer that is not a number is no right answer, and argmax would take it for one.
        return ((logits.argmax(1) == y) & ~logits.isnan().any(1)).double()

    def rates(self, images: Tensor, rows: Tensor, draws: int = FEW) -> Tensor:
        """Return how often each image is classified correctly, (len(rows),), in [0, 1]."""
        y = self.y[rows]
        if self.how == "random":
            return torch.stack([self._right(images, y) for _ in range(draws)]).mean(0)
        right = self._right(images, y)
        if self.how == "company":
            for place, (row, image) in enumerate(zip(rows.tolist(), images, strict=True)):
                if right[place]:
                    alone = self._right(image[None], self.y[row : row + 1])
                    among = self.x.clone()
                    among[row] = image
                    right[place] = torch.minimum(alone[0], self._right(among, self.y)[row])
        return right


@dataclass
class Truth:
    """What is known of each sample: the image that is classified correctly the least often, and how often that is."""

    judge: Judge
    threat: ducat.ThreatModel
    images: Tensor
    rates: Tensor
    near: Tensor  # where the last attack ended, from which a search without gradients goes on

    @classmethod
    def begin(cls, judge: Judge, threat: ducat.ThreatModel) -> "Truth":
        rates = judge.rates(judge.x, torch.arange(len(judge.x)))
        return cls(judge, threat, judge.x.clone(), rates, judge.x.clone())

    @property
    def standing(self) -> Tensor:
        return (self.rates > 0).nonzero().squeeze(1)

    def offer(self, images: Tensor, rows: Tensor | None = None) -> None:
        """Take images, one for each of `rows` (all by default), where they are worse for the defence."""
        rows = torch.arange(len(self.rates)) if rows is None else rows
        if not len(rows):
            return
        x = self.judge.x[rows]
        images = (x + (images - x).clamp(-self.threat.eps, self.threat.eps)).clamp(0, 1)
        rates = self.judge.rates(images, rows)
        worse = rates < self.rates[rows]
        self.images[rows[worse]], self.rates[rows[worse]] = images[worse], rates[worse]

    def settle(self) -> None:
        """Judge what was chosen once more, with new and with more draws: the ones that chose it flatter the attack."""
        if self.judge.how == "random":
            everything = torch.arange(len(self.rates))
            chosen, benign = (self.judge.rates(images, everything, MANY) for images in (self.images, self.judge.x))
            self.rates = torch.minimum(chosen, benign)


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    own = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - own


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return -logits.log_softmax(1).gather(1, y[:, None]).squeeze(1)


def _towards(target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, y: (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def ascend(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ducat.ThreatModel,
    goal: Callable[[Tensor, Tensor], Tensor],
    noise: torch.Generator,
    classes: int,
    start: Tensor | None = None,
) -> Iterator[Tensor]:
    """Climb `goal` of (logits, y) by signs of gradients with momentum and ever shorter steps; yield on the way."""
    eps = threat.eps
    now = x + eps * (2 * torch.rand(x.shape, generator=noise) - 1) if start is None else start
    now, drift = now.clamp(0, 1), torch.zeros_like(x)
    for step in range(STEPS):
        with torch.enable_grad():
            now = now.detach().requires_grad_()
            logits = logits_of(network(now)).float()
            logits = ducat.recover(logits) if logits.shape[1] == 2 * classes else logits
            (gradient,) = torch.autograd.grad(goal(logits, y).sum(), now)
        gradient = gradient.nan_to_num()
        size = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-38)
        drift = 0.75 * drift + gradient / size
        length = eps * (0.5 if step < STEPS // 3 else 0.15 if step < 2 * STEPS // 3 else 0.04)
        now = (x + (now.detach() + length * drift.sign() - x).clamp(-eps, eps)).clamp(0, 1)
        if step % EVERY == EVERY - 1:
            yield now


def selective(
    network: Callable[[Tensor], Tensor], score: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float
) -> Tensor:
    """Fool a network where a detector's score stays below 0: a step serves the aim that is missed, without harm to the
    other (Bryniarski et al. 2022, orthogonal projected gradient descent).

    Returns:
        For each sample the last image that did both, else the last one.
    """
    size = x[0].numel() ** 0.5
    now, chosen, won = x, x.clone(), torch.zeros(len(x), dtype=torch.bool)
    for step in range(200):
        with torch.enable_grad():
            now = now.detach().requires_grad_()
            margin, detected = _margin(network(now), y), score(now)
            slopes = [torch.autograd.grad(each.sum(), now)[0] for each in (margin, detected)]
        success = (margin > 0) & (detected < 0)
        chosen[success], won = now.detach()[success], won | success
        up, down = (F.normalize(slope.flatten(1), dim=1) for slope in slopes)
        along = (up * down).sum(1, keepdim=True)
        missed, near = (margin <= 0)[:, None], (detected > -0.1)[:, None].float()
        move = torch.where(missed, up - near * along * down, -near * (down - along * up))
        length = size * eps * (0.1 if step < 150 else 0.02)
        now = now.detach() + length * F.normalize(move, dim=1).view_as(x)
        now = (x + (now - x).clamp(-eps, eps)).clamp(0, 1)
    chosen[~won] = now[~won]
    return chosen


def through(truth: Truth, proxy: nn.Module, noise: torch.Generator) -> None:
    """Attack a stand-in with cross-entropy, margin, and towards each of the nearest wrong classes."""
    judge = truth.judge

    def climb(rows: Tensor, goal: Callable[[Tensor, Tensor], Tensor], at_benign: bool = False) -> None:
        if not len(rows):
            return
        images = truth.judge.x[rows]
        start = images if at_benign else None
        found = ascend(proxy, images, judge.y[rows], truth.threat, goal, noise, judge.classes, start)
        iterates = list(found)
        for iterate in iterates if judge.how == "plain" else iterates[-1:]:
            truth.offer(iterate, rows)
        truth.near[rows] = iterates[-1]

    climb(truth.standing, _cross_entropy, at_benign=True)
    climb(truth.standing, _margin)
    rows = truth.standing
    if not len(rows):
        return
    with torch.no_grad():
        logits = logits_of(proxy(truth.near[rows])).float()
    logits = ducat.recover(logits) if logits.shape[1] == 2 * judge.classes else logits
    order = logits.scatter(1, judge.y[rows][:, None], -torch.inf).argsort(dim=1, descending=True)
    for rank in range(min(TARGETS[judge.how == "random"], judge.classes - 1)):
        left = truth.rates[rows] > 0
        climb(rows[left], _towards(order[left, rank]))


def by_chance(truth: Truth, noise: torch.Generator, tries: int = 60) -> None:
    """Shake the images that the last attack ended with: what answers by a hash of its input errs sooner or later."""
    if truth.judge.how != "plain":
        return
    for attempt in range(tries):
        rows = truth.standing
        share = 0.02 if attempt % 2 else 0.2
        shake = share * truth.threat.eps * (2 * torch.rand(truth.near[rows].shape, generator=noise) - 1)
        truth.offer(truth.near[rows] + shake, rows)


def by_search(truth: Truth, noise: torch.Generator, queries: int = QUERIES) -> None:
    """Search without gradients: change blocks to one end of the ball where the margin grows (Square's moves)."""
    judge, eps = truth.judge, truth.threat.eps
    rows = truth.standing
    if not len(rows) or judge.how != "plain":
        return
    x, y = judge.x[rows], judge.y[rows]
    best = truth.near[rows].clone()
    value = _margin(judge.logits(best), y).nan_to_num(torch.inf)
    height, width = x.shape[2:]
    for query in range(queries):
        side = max(1, round(height * (0.5 if query < queries // 8 else 0.25 if query < queries // 2 else 0.12)))
        top, left = (int(torch.randint(size - side + 1, (), generator=noise)) for size in (height, width))
        ends = eps * (2 * torch.randint(0, 2, (len(rows), x.shape[1], 1, 1), generator=noise) - 1)
        tried = best.clone()
        block = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
        tried[block] = (x[block] + ends).clamp(0, 1)
        reached = _margin(judge.logits(tried), y).nan_to_num(torch.inf)
        better = reached > value
        best[better], value[better] = tried[better], reached[better]
    truth.offer(best, rows)


def find_truth(
    judge: Judge,
    threat: ducat.ThreatModel,
    proxies: Sequence[nn.Module],
    seed: int = 0,
    known: Sequence[Tensor] = (),
) -> Truth:
    """Return the lowest accuracy that was found and the images that show it.

    Args:
        judge: the deployed network.
        threat: the ball, L-inf.
        proxies: differentiable networks whose adversarial images may fool it.
        seed: of random starts, and of random defences.
        known: adversarial images for all samples that other attacks have found.
    """
    noise = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        truth = Truth.begin(judge, threat)
        for images in known:
            truth.offer(images)
            truth.near = images.clone()
        for proxy in proxies:
            through(truth, proxy.eval().requires_grad_(False), noise)
        by_chance(truth, noise)
        by_search(truth, noise)
        truth.settle()
    return truth
