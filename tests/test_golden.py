"""Losses and whole outer losses against the formulas of docs/methods.md, written anew in float64 NumPy."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ducat import losses
from ducat.config import Config, DummyConfig, MethodConfig, ThreatConfig, TrainConfig
from ducat.dummy import add_dummy_classes, two_hot
from ducat.threat import ThreatModel

Array = np.ndarray
C = 3  # real classes
B = 4  # images a view
WEIGHTS = {"trades": 6.0, "mart": 5.0, "consistency": 1.0}
METHODS = ("pgd-at", *WEIGHTS)
PHASES = [("off", 0), ("published", 0), ("published", 1), ("recovery-aware", 0), ("recovery-aware", 1)]
W_BENIGN, W_ADVERSARIAL = 0.25, 1.0


def softmax(z: Array) -> Array:
    powers = np.exp(z - z.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def np_cross_entropy(p: Array, t: Array) -> Array:
    return -(t * np.log(p)).sum(1)


def np_kl(p: Array, q: Array) -> Array:
    return (p * (np.log(p) - np.log(q))).sum(1)


def np_js(p: Array, q: Array, temperature: float) -> Array:
    p, q = (r ** (1 / temperature) / (r ** (1 / temperature)).sum(1, keepdims=True) for r in (p, q))
    return (np_kl(p, (p + q) / 2) + np_kl(q, (p + q) / 2)) / 2


def strongest_wrong(values: Array, y: Array) -> Array:
    return np.array([np.delete(row, label).max() for row, label in zip(values, y, strict=True)])


def np_mart_margin(p: Array, y: Array) -> Array:
    return -np.log(1 - strongest_wrong(p, y))


def np_mart_divergence(p: Array, q: Array, y: Array) -> Array:
    return np_kl(p, q) * (1 - p[np.arange(len(y)), y])


def np_margin(z: Array, y: Array) -> Array:
    return strongest_wrong(z, y) - z[np.arange(len(y)), y]


def one_hot(y: Array, outputs: int) -> Array:
    return np.eye(outputs)[y]


def np_two_hot(u: Array, w: float) -> Array:
    """Split a distribution over classes between real and dummy halves."""
    return np.concatenate([(1 - w) * u, w * u], axis=1)


def numeric_gradient(f: Callable[[Array], float], at: Array, h: float = 1e-6) -> Array:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = h
        gradient[index] = (f(at + step) - f(at - step)) / (2 * h)
    return gradient


def draw(*shape: int, seed: int, scale: float = 2.0) -> Array:
    return np.random.default_rng(seed).normal(size=shape) * scale


Y = np.array([2, 0, 1, 2])
TARGETS = softmax(draw(B, 2 * C, seed=9))
LOSSES = {
    "soft_cross_entropy": (
        lambda z: losses.soft_cross_entropy(z, torch.tensor(TARGETS)),
        lambda z: np_cross_entropy(softmax(z), TARGETS),
        1,
    ),
    "cross_entropy": (
        lambda z: losses.cross_entropy(z, torch.tensor(Y)),
        lambda z: np_cross_entropy(softmax(z), one_hot(Y, 2 * C)),
        1,
    ),
    "cross_entropy, smoothed": (
        lambda z: losses.cross_entropy(z, torch.tensor(Y), 0.1),
        lambda z: np_cross_entropy(softmax(z), 0.9 * one_hot(Y, 2 * C) + 0.1 / (2 * C)),
        1,
    ),
    "kl": (losses.kl, lambda z, z2: np_kl(softmax(z), softmax(z2)), 2),
    "js": (lambda z, z2: losses.js(z, z2, 0.5), lambda z, z2: np_js(softmax(z), softmax(z2), 0.5), 2),
    "mart_margin": (
        lambda z: losses.mart_margin(z, torch.tensor(Y)),
        lambda z: np_mart_margin(softmax(z), Y),
        1,
    ),
    "mart_divergence": (
        lambda z, z2: losses.mart_divergence(z, z2, torch.tensor(Y)),
        lambda z, z2: np_mart_divergence(softmax(z), softmax(z2), Y),
        2,
    ),
    "margin": (lambda z: losses.margin(z, torch.tensor(Y)), lambda z: np_margin(z, Y), 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient(name: str) -> None:
    ours, reference, count = LOSSES[name]
    logits = [draw(B, 2 * C, seed=seed) for seed in range(count)]
    tensors = [torch.tensor(z, requires_grad=True) for z in logits]
    value = ours(*tensors)
    np.testing.assert_allclose(value.detach().numpy(), reference(*logits), rtol=1e-10)
    gradients = torch.autograd.grad((value * torch.arange(1, B + 1)).sum(), tensors)
    for place in range(count):

        def varied(z: Array, place: int = place) -> float:
            arguments = [z if n == place else other for n, other in enumerate(logits)]
            return float((reference(*arguments) * np.arange(1, B + 1)).sum())

        np.testing.assert_allclose(gradients[place].numpy(), numeric_gradient(varied, logits[place]), atol=1e-6)


def test_divergences_of_predictions_that_underflow() -> None:
    sure = torch.tensor([[400.0, 0.0, -400.0]], requires_grad=True)
    opposite = torch.tensor([[-400.0, 0.0, 400.0]], requires_grad=True)
    # p(x) is all on the first class, for which -log p(x') = 800; the middle of the two has ln 2 more than each.
    values = {
        "kl": (losses.kl(sure, opposite), 800),
        "js": (losses.js(sure, opposite, 0.5), np.log(2)),
        "mart_divergence": (losses.mart_divergence(sure, opposite, torch.tensor([2])), 800),
        "mart_margin": (losses.mart_margin(opposite, torch.tensor([0])), 400),
    }
    for name, (value, expected) in values.items():
        assert value.item() == pytest.approx(expected, rel=1e-6), name
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value.sum(), opposite, retain_graph=True)), name


@pytest.mark.parametrize("w", [0.0, 0.25, 0.7, 1.0])
def test_two_hot_cross_entropy_is_recovered_cross_entropy_and_a_within_pair_one(w: float) -> None:
    z = draw(B, 2 * C, seed=3)
    p = softmax(z)
    q = p[:, :C] + p[:, C:]
    s = p[np.arange(B), Y + C] / q[np.arange(B), Y]
    expected = -np.log(q[np.arange(B), Y]) - (1 - w) * np.log(1 - s) - w * np.log(s)
    value = losses.soft_cross_entropy(torch.tensor(z), two_hot(torch.tensor(Y), C, w))
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6)


def objective(method: str, kind: str, epoch: int, smoothing: float = 0.0):
    return Config(
        method=MethodConfig(method, weight=WEIGHTS.get(method), label_smoothing=smoothing),
        dummy=DummyConfig(kind, start_epoch=1, benign_weight=W_BENIGN, adversarial_weight=W_ADVERSARIAL),
        train=TrainConfig(epochs=2),
    ).objective(epoch)


def reference_loss(
    method: str,
    kind: str,
    epoch: int,
    smoothing: float,
    z: Array,
    z2: Array,
    y: Array,
    *,
    joint: Array | None = None,
    warm_up: bool = False,
) -> float:
    """The tables of docs/methods.md; z and z2 are the logits of benign and adversarial images.

    `joint` is the logits of both in one batch, where the two-hot loss has a pass of its own.
    """
    active = kind != "off" and epoch == 1

    def read(logits: Array) -> Array:
        """What the regulariser sees, as probabilities."""
        if kind == "recovery-aware" and not active:
            return softmax(logits[:, :C])
        p = softmax(logits)
        return p[:, :C] + p[:, C:] if kind == "recovery-aware" else p

    if active:
        u = (1 - smoothing) * one_hot(y, C) + smoothing / C
        half, half2 = (z, z2) if joint is None else np.split(joint, 2)
        benign = np_cross_entropy(softmax(half), np_two_hot(u, W_BENIGN))
        attacked = np_cross_entropy(softmax(half2), np_two_hot(u, W_ADVERSARIAL))
        cross_entropy = np.concatenate([benign, attacked]).mean()
    else:
        p = read(z if method == "trades" and not warm_up else z2)
        u = (1 - smoothing) * one_hot(y, p.shape[1]) + smoothing / p.shape[1]
        cross_entropy = np_cross_entropy(p, u).mean()
    p, p2 = read(z), read(z2)
    regulariser = {
        "pgd-at": lambda: 0.0,
        "trades": lambda: WEIGHTS["trades"] * np_kl(p, p2).mean(),
        "mart": lambda: (np_mart_margin(p2, y) + WEIGHTS["mart"] * np_mart_divergence(p, p2, y)).mean(),
        "consistency": lambda: WEIGHTS["consistency"] * np_js(p2[:B], p2[B:], 0.5).mean(),
    }[method]
    return float(cross_entropy + regulariser())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "epoch"), PHASES)
@pytest.mark.parametrize("method", METHODS)
def test_the_outer_loss_and_its_gradient(method: str, kind: str, epoch: int, smoothing: float) -> None:
    # A linear network on 2 x 2 images; its weights are the variable.
    outputs, rows = C if kind == "off" else 2 * C, 2 * B if method == "consistency" else B
    x, x2 = draw(rows, 4, seed=1, scale=0.5), draw(rows, 4, seed=2, scale=0.5)
    y, weight = np.tile(Y, rows // B), draw(outputs, 4, seed=3)

    def reference(w: Array) -> float:
        return reference_loss(method, kind, epoch, smoothing, x @ w.T, x2 @ w.T, y)

    linear = nn.Linear(4, outputs, bias=False, dtype=torch.float64)
    linear.weight = nn.Parameter(torch.tensor(weight))
    images = [torch.tensor(array).view(rows, 1, 2, 2) for array in (x, x2)]
    loss = objective(method, kind, epoch, smoothing).loss(nn.Sequential(nn.Flatten(), linear), *images, torch.tensor(y))
    loss.backward()
    # Smoothed targets are made in float32.
    assert loss.item() == pytest.approx(reference(weight), rel=1e-6 if smoothing else 1e-10)
    np.testing.assert_allclose(linear.weight.grad.numpy(), numeric_gradient(reference, weight), atol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_training_weighs_the_two_cross_entropies(share: float, smoothing: float) -> None:
    z, z2 = draw(B, C, seed=5), draw(B, C, seed=6)
    images = [torch.tensor(logits).view(B, C, 1, 1) for logits in (z, z2)]
    made = Config(method=MethodConfig("mixed", weight=share, label_smoothing=smoothing)).objective(0)
    loss = made.loss(nn.Flatten(), *images, torch.tensor(Y))
    u = (1 - smoothing) * one_hot(Y, C) + smoothing / C
    benign, attacked = (np_cross_entropy(softmax(logits), u).mean() for logits in (z, z2))
    assert loss.item() == pytest.approx(share * benign + (1 - share) * attacked, rel=1e-10)


@pytest.mark.parametrize("pair", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_weight_of_the_pair_scales_the_within_pair_term_alone(pair: float, smoothing: float) -> None:
    z, z2 = draw(B, 2 * C, seed=5), draw(B, 2 * C, seed=6)
    made = Config(
        method=MethodConfig(label_smoothing=smoothing),
        dummy=DummyConfig(
            "recovery-aware", 0, benign_weight=W_BENIGN, adversarial_weight=W_ADVERSARIAL, pair_weight=pair
        ),
    ).objective(0)
    u = (1 - smoothing) * one_hot(Y, C) + smoothing / C
    # With label smoothing the recovered classes are smoothed, and every class's pair counts by its share.
    expected = []
    for logits, w in ((z, W_BENIGN), (z2, W_ADVERSARIAL)):
        p = softmax(logits)
        q = p[:, :C] + p[:, C:]
        s = p[:, C:] / q
        expected.append((u * (-np.log(q) + pair * (-(1 - w) * np.log(1 - s) - w * np.log(s)))).sum(1).mean())
    images = [torch.tensor(logits).view(B, 2 * C, 1, 1) for logits in (z, z2)]
    loss = made.loss(nn.Flatten(), *images, torch.tensor(Y)).item()
    assert loss == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize("w", [W_BENIGN, 0.6])
def test_smoothed_two_hot_cross_entropy_decomposes_over_all_classes(w: float) -> None:
    x, y, smoothing = draw(B, 2 * C, seed=5), torch.tensor(Y), 0.2
    both = Config(
        method=MethodConfig(label_smoothing=smoothing),
        dummy=DummyConfig("recovery-aware", start_epoch=0, benign_weight=w, adversarial_weight=w),
    ).objective(0)
    images = torch.tensor(x).view(B, 2 * C, 1, 1)
    p = softmax(x)
    q = p[:, :C] + p[:, C:]
    s = p[:, C:] / q
    u = (1 - smoothing) * one_hot(Y, C) + smoothing / C
    expected = (u * (-np.log(q) - (1 - w) * np.log(1 - s) - w * np.log(s))).sum(1).mean()
    assert both.loss(nn.Flatten(), images, images, y).item() == pytest.approx(expected, rel=1e-6)


def test_the_strongest_wrong_class_of_mart_is_the_dummy_of_y_only_where_the_attacker_is_blind() -> None:
    # p = 0.4 for class 0, 0.3 for its dummy, 0.2 for class 1, and 0.1 for the rest.
    p = np.array([[0.4, 0.2, 0.05, 0.3, 0.03, 0.02]])
    images, y = torch.tensor(np.log(p)).view(1, 6, 1, 1), torch.tensor([0])
    # On equal images the divergence is 0, so that beside the two-hot terms only the margin is left.
    two_hots = np.mean(
        [np_cross_entropy(p, np_two_hot(one_hot(np.array([0]), C), w)).item() for w in (W_BENIGN, W_ADVERSARIAL)]
    )
    for kind, strongest in {"published": 0.3, "recovery-aware": 0.2 + 0.03}.items():
        loss = objective("mart", kind, 1).loss(nn.Flatten(), images, images, y).item()
        assert loss - two_hots == pytest.approx(-np.log(1 - strongest), rel=1e-6), kind


@pytest.mark.parametrize(("kind", "epoch"), PHASES)
@pytest.mark.parametrize("method", METHODS)
def test_the_inner_attack_climbs_the_objective_of_the_method(method: str, kind: str, epoch: int) -> None:
    outputs, eps, step = C if kind == "off" else 2 * C, 0.3, 0.05
    x, y, weight = np.full((B, 4), 0.5) + draw(B, 4, seed=1, scale=0.02), Y, draw(outputs, 4, seed=3)
    active = kind != "off" and epoch == 1

    def seen(logits: Array) -> Array:
        if kind == "recovery-aware" and not active:
            return softmax(logits[:, :C])
        p = softmax(logits)
        return p[:, :C] + p[:, C:] if kind == "recovery-aware" else p

    def climbed(images: Array) -> float:
        p, clean = seen(images @ weight.T), seen(x @ weight.T)
        values = np_kl(clean, p) if method == "trades" else np_cross_entropy(p, one_hot(y, p.shape[1]))
        return float(values.sum())

    # The start: Gaussian for TRADES and MART, uniform in the ball for the others.
    generator = torch.Generator().manual_seed(7)
    if method in ("trades", "mart"):
        start = x + 0.001 * torch.randn(B, 1, 2, 2, generator=generator).numpy().reshape(B, 4)
    else:
        start = x + eps * (2 * torch.rand(B, 1, 2, 2, generator=generator).numpy().reshape(B, 4) - 1)
    expected = start + step * np.sign(numeric_gradient(climbed, start, h=1e-5))
    expected = np.clip(np.clip(expected, x - eps, x + eps), 0, 1)

    linear = nn.Linear(4, outputs, bias=False, dtype=torch.float64)
    linear.weight = nn.Parameter(torch.tensor(weight))
    found = objective(method, kind, epoch).attack(
        nn.Sequential(nn.Flatten(), linear),
        torch.tensor(x).view(B, 1, 2, 2),
        torch.tensor(y),
        ThreatModel(eps=eps, step_size=step, steps=1),
        torch.Generator().manual_seed(7),
    )
    np.testing.assert_allclose(found.numpy().reshape(B, 4), expected, atol=1e-6)


class Reference:
    """Training on 2 x 2 images, in NumPy and float64: batch norm, 4 to 3 linear, tanh, batch norm, 3 to K linear.

    Everything is worked out from the formulas: batch statistics, passes, attack, loss, SGD. Gradients are differences.
    """

    def __init__(self, method: str, kind: str, how: str) -> None:
        self.method, self.kind, self.how = method, kind, how
        outputs = C if kind == "off" else 2 * C
        shapes = {"0.g": (4,), "0.b": (4,), "0.w": (3, 4), "0.o": (3,)}
        shapes |= {"1.g": (3,), "1.b": (3,), "1.w": (outputs, 3), "1.o": (outputs,)}
        self.weights = {name: draw(*shape, seed=n, scale=0.7) for n, (name, shape) in enumerate(shapes.items())}
        self.velocity = {name: np.zeros(shape) for name, shape in shapes.items()}
        self.running = [[np.zeros(4), np.ones(4)], [np.zeros(3), np.ones(3)]]

    def forward(self, x: Array, weights: dict[str, Array], seen: list | None = None, *, train: bool = True) -> Array:
        for layer, (mean, variance) in enumerate(self.running):
            if train:
                mean, variance = x.mean(0), x.var(0)
                if seen is not None:
                    seen.append((layer, mean, x.var(0, ddof=1)))
            x = (x - mean) / np.sqrt(variance + 1e-5) * weights[f"{layer}.g"] + weights[f"{layer}.b"]
            x = x @ weights[f"{layer}.w"].T + weights[f"{layer}.o"]
            x = np.tanh(x) if layer == 0 else x
        return x

    def loss(self, x: Array, x2: Array, y: Array, epoch: int, weights: dict[str, Array], seen: list | None) -> float:
        active = self.kind != "off" and epoch == 1
        joint = None
        if self.how == "joint" or self.method not in ("trades", "mart"):
            if self.method in ("trades", "mart") or active:
                z, z2 = np.split(self.forward(np.concatenate([x, x2]), weights, seen), 2)
            else:
                z2 = self.forward(x2, weights, seen)
                z = z2  # which no loss looks at
        else:
            joint = self.forward(np.concatenate([x, x2]), weights, seen) if active else None
            z2, z = self.forward(x2, weights, seen), self.forward(x, weights, seen)
        return reference_loss(self.method, self.kind, epoch, 0.0, z, z2, y, joint=joint, warm_up=self.how == "released")

    def attack(self, x: Array, y: Array, epoch: int, start: Array, eps: float, step: float, steps: int) -> Array:
        def seen(images: Array) -> Array:
            z = self.forward(images, self.weights, train=False)
            if self.kind != "recovery-aware":
                return softmax(z)
            p = softmax(z)
            return p[:, :C] + p[:, C:] if epoch == 1 else softmax(z[:, :C])

        def climbed(images: Array) -> float:
            p = seen(images)
            target = one_hot(y, p.shape[1])
            return float((np_kl(seen(x), p) if self.method == "trades" else np_cross_entropy(p, target)).sum())

        for _ in range(steps):
            start = start + step * np.sign(numeric_gradient(climbed, start, h=1e-5))
            start = np.clip(np.clip(start, x - eps, x + eps), 0, 1)
        return start

    def step(self, x: Array, x2: Array, y: Array, epoch: int, rate: float) -> float:
        seen: list = []
        value = self.loss(x, x2, y, epoch, self.weights, seen)
        gradients = {
            name: numeric_gradient(lambda w, name=name: self.loss(x, x2, y, epoch, {**self.weights, name: w}, None), at)
            for name, at in self.weights.items()
        }
        for layer, mean, variance in seen:
            self.running[layer] = [
                0.9 * old + 0.1 * new for old, new in zip(self.running[layer], (mean, variance), strict=True)
            ]
        for name, gradient in gradients.items():
            self.velocity[name] = 0.9 * self.velocity[name] + gradient + 5e-4 * self.weights[name]
            self.weights[name] = self.weights[name] - rate * self.velocity[name]
            if self.kind == "recovery-aware" and epoch == 0 and name in ("1.w", "1.o"):
                self.weights[name][C:] = self.weights[name][:C]
        return value


HOW = [
    (method, how) for method in METHODS for how in ("joint", *(("separate",) if method in ("trades", "mart") else ()))
]


@pytest.mark.parametrize("kind", ["off", "published", "recovery-aware"])
@pytest.mark.parametrize(("method", "how"), [*HOW, ("trades", "released")])
def test_three_steps_in_training_mode_across_the_switch(method: str, how: str, kind: str) -> None:
    from ducat.seeding import generator
    from ducat.training.step import Step

    reference = Reference(method, kind, how)
    config = Config(
        method=MethodConfig(
            method,
            weight=WEIGHTS.get(method),
            cross_entropy="adversarial" if how == "released" else "auto",
            clip_start=how != "released",
        ),
        dummy=DummyConfig(kind, start_epoch=1, benign_weight=W_BENIGN, adversarial_weight=W_ADVERSARIAL),
        threat=ThreatConfig(eps=0.2, step_size=0.1, steps=2),
        train=TrainConfig(
            epochs=2,
            milestones=(1,),
            batch_norm="joint" if how == "joint" else "auto",
            precision="float32",
            device="cpu",
            seed=5,
        ),
    )
    model = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, C)
    ).double()
    if kind != "off":
        add_dummy_classes(model)
    ours = [model[1].weight, model[1].bias, *model[2].parameters(), model[4].weight, model[4].bias]
    ours += [*model[5].parameters()]
    with torch.no_grad():
        for parameter, values in zip(ours, reference.weights.values(), strict=True):
            parameter.copy_(torch.tensor(values))
    rows = 2 * B if method == "consistency" else B
    step = Step(config, model, torch.zeros(2, 1, 2, 2, dtype=torch.float64))
    for epoch, place in ((0, 1), (1, 0), (1, 1)):
        x = np.random.default_rng(10 * epoch + place).random((rows, 4))
        x[:, 0] = 0.0  # black pixels, so that cutting a start to [0, 1] makes a difference
        y = np.roll(np.tile(Y, rows // B), place)
        noise = generator(5, "attack", epoch, place, 0)
        if method in ("trades", "mart"):
            start = x + 0.001 * torch.randn(rows, 1, 2, 2, generator=noise).double().numpy().reshape(rows, 4)
            start = start if how == "released" else start.clip(0, 1)
        else:
            start = x + 0.2 * (2 * torch.rand(rows, 1, 2, 2, generator=noise).double().numpy().reshape(rows, 4) - 1)
            start = start.clip(0, 1)
        x2 = reference.attack(x, y, epoch, start, 0.2, 0.1, 2)
        expected = reference.step(x, x2, y, epoch, 0.1 if epoch == 0 else 0.01)
        loss = step(torch.tensor(x).view(rows, 1, 2, 2), torch.tensor(y), epoch, place, 2)
        assert loss.item() == pytest.approx(expected, rel=1e-7)
        for parameter, (name, values) in zip(ours, reference.weights.items(), strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), values, atol=2e-7, err_msg=name)
        for layer, (mean, variance) in zip((model[1], model[4]), reference.running, strict=True):
            np.testing.assert_allclose(layer.running_mean.numpy(), mean, atol=1e-7)
            np.testing.assert_allclose(layer.running_var.numpy(), variance, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "kind", "epoch"), [("natural", "off", 0), *((method, *phase) for method in METHODS for phase in PHASES)]
)
def test_a_training_step_updates_batch_norm_statistics_once_for_every_pass(method: str, kind: str, epoch: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, C if kind == "off" else 2 * C))
    x, y = torch.rand(2 * B, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(np.tile(Y, 2))
    chosen = objective(method, kind, epoch)
    adversarial = chosen.attack(model, x, y, ThreatModel(eps=0.1, steps=2))
    assert model[1].num_batches_tracked == 0
    chosen.loss(model, x, adversarial, y).backward()
    active = kind != "off" and epoch == 1
    passes = 1 if method not in ("trades", "mart") else 3 if active else 2
    assert model[1].num_batches_tracked == passes
    assert len(chosen.passes(x, adversarial)) == passes
    joint = replace(chosen, method=replace(chosen.method, forwards_apart=False))
    joint.loss(model, x, adversarial, y).backward()
    assert model[1].num_batches_tracked == passes + 1
