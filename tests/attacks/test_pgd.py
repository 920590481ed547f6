import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ducat
from ducat.attacks import external
from ducat.attacks.objectives import OBJECTIVES
from ducat.attacks.pgd import attackable, check_kinds
from ducat.attacks.queries import decisions

THREATS = [
    ducat.ThreatModel("linf", 0.1, steps=4),
    ducat.ThreatModel("l2", 0.7, steps=4),
    ducat.ThreatModel("l1", 3.0, steps=4),
]
VARIANTS: list[dict] = [
    {},
    {"keep": "last"},
    {"keep": "first"},
    {"restarts": 3},
    {"adaptive_steps": True},
    {"adaptive_steps": True, "keep": "first", "restarts": 2},
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("threat", THREATS, ids=["linf", "l2", "l1"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_images_stay_in_the_ball_and_are_reproducible(
    network: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    objective: str,
    threat: ducat.ThreatModel,
    variant: dict,
) -> None:
    def attack() -> torch.Tensor:
        return ducat.attacks.pgd(
            network, images, labels, threat, objective, generator=torch.Generator().manual_seed(3), **variant
        )

    adversarial = attack()
    assert adversarial.shape == images.shape
    assert threat.allows(adversarial, images).all()
    assert not adversarial.requires_grad
    assert torch.equal(adversarial, attack())


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)),
    st.floats(0, 1),
    st.sampled_from(["linf", "l2", "l1"]),
    st.booleans(),
)
def test_any_shape_and_eps(shape: tuple[int, ...], eps: float, norm: str, adaptive: bool) -> None:
    torch_generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=torch_generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4))
    threat = ducat.ThreatModel(norm, eps, steps=3)
    y = torch.zeros(len(x), dtype=torch.long)
    adversarial = ducat.attacks.pgd(model, x, y, threat, generator=torch_generator, adaptive_steps=adaptive)
    assert threat.allows(adversarial, x).all()


def linear_model(classes: int = 4, pixels: int = 27) -> tuple[nn.Sequential, torch.Tensor]:
    """Return a linear classifier whose margin is the same everywhere in the ball's interior, and its weights."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    weight = torch.randn(classes, pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.zero_()
    return model, weight


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("variant", [{}, {"keep": "last"}, {"adaptive_steps": True}], ids=str)
def test_the_worst_case_of_a_linear_model_is_found(norm: str, variant: dict) -> None:
    model, weight = linear_model(classes=2)
    x = torch.full((5, 3, 3, 3), 0.5)
    y = torch.tensor([0, 1, 0, 1, 0])
    threat = ducat.ThreatModel(norm, 0.05, 0.05 / 4, steps=40)
    adversarial = ducat.attacks.pgd(
        model, x, y, threat, "margin", generator=torch.Generator().manual_seed(0), **variant
    )
    difference = weight[1 - y] - weight[y]
    dual = difference.abs().sum(1) if norm == "linf" else difference.norm(dim=1)
    worst = (difference * x.flatten(1)).sum(1) + 0.05 * dual
    logits = model(adversarial)
    reached = logits.gather(1, 1 - y[:, None]).squeeze(1) - logits.gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(reached, worst, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", [{}, {"keep": "last"}, {"adaptive_steps": True}], ids=str)
@pytest.mark.parametrize("eps", [0.3, 1.6, 6.0])
def test_the_worst_case_of_a_linear_model_in_l1_fills_its_largest_weights_up(eps: float, variant: dict) -> None:
    model, weight = linear_model(classes=2, pixels=48)
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 0, 1, 0])
    threat = ducat.ThreatModel("l1", eps, steps=200)
    adversarial = ducat.attacks.pgd(
        model, x, y, threat, "margin", generator=torch.Generator().manual_seed(0), **variant
    )
    difference, logits = weight[1 - y] - weight[y], model(x)
    gain = []
    for slope, image in zip(difference.numpy(), x.flatten(1).numpy(), strict=True):
        # What a unit of l1 buys is the weight's size, until the pixel arrives at 0 or 1.
        left, won = eps, 0.0
        for pixel in np.argsort(-np.abs(slope)):
            moved = min(left, 1 - image[pixel] if slope[pixel] > 0 else image[pixel])
            left, won = left - moved, won + moved * abs(slope[pixel])
        gain.append(won)
    worst = (logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])).squeeze(1) + torch.tensor(gain)
    logits = model(adversarial)
    reached = (logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    assert (reached <= worst + 1e-3).all()
    shortfall = (worst - reached) / torch.tensor(gain)
    assert shortfall.max() < (0.01 if "adaptive_steps" in variant else 0.1)


class Recorder(nn.Module):
    """Counts passes and the samples in them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        return self.model(x)


def test_modes_and_gradients_of_every_module_come_back_even_after_an_error(
    network: nn.Sequential, images: torch.Tensor, labels: torch.Tensor
) -> None:
    network.train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    modes = [module.training for module in network.modules()]
    statistics = network[1].running_mean.clone()
    ducat.attacks.pgd(network, images, labels, THREATS[0])

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not network[1].training
            raise KeyboardInterrupt

    network.append(Broken())
    with pytest.raises(KeyboardInterrupt):
        ducat.attacks.pgd(network, images, labels, THREATS[0])
    del network[-1]
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == [False] + [True] * 5
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(network[1].running_mean, statistics)


@pytest.mark.parametrize("leads", [False, True], ids=["another", "itself"])
def test_a_judge_is_asked_in_evaluation_mode_and_left_as_it_was(
    network: nn.Sequential, images: torch.Tensor, labels: torch.Tensor, leads: bool
) -> None:
    judge = copy.deepcopy(network).train()
    state = copy.deepcopy(judge.state_dict())
    ducat.attacks.pgd(judge if leads else network, images, labels, THREATS[0], judge=judge)
    assert all(torch.equal(tensor, state[name]) for name, tensor in judge.state_dict().items())
    assert all(module.training for module in judge.modules())
    assert all(parameter.requires_grad for parameter in judge.parameters())


def test_parameters_get_no_gradient_work(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    with attackable(network):
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert network(images).grad_fn is None, "a forward pass still records a graph for the parameters"


def every_attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what each attack that gradients lead finds."""
    linf, l2 = THREATS[:2]

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    return {
        **{
            str(variant): ducat.attacks.pgd(model, x, y, linf, "kl", generator=noise(), **variant)
            for variant in VARIANTS
        },
        "given start": ducat.attacks.pgd(model, x, y, linf, start=x, keep="last"),
        "adaptive": ducat.attacks.adaptive(ducat.RecoveredClassifier(model), x, y, linf, "standard", noise()),
        "training": ducat.objective("trades", "recovery-aware", True).attack(model, x, y, linf, noise()),
        "autoattack": external.autoattack(model, x, y, linf, noise()),
        "square": external.square(model, x, y, linf, noise(), queries=5),
        "ddn": external.ddn(model, x, y, l2, noise(), steps=5),
        "decisions": decisions(model, x, y, linf, noise(), queries=20),
    }


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_changes_no_attack(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, made_inside: bool
) -> None:
    with torch.no_grad():
        expected = every_attack(network, images, labels)
    with torch.inference_mode():
        x, y = (images.clone(), labels.clone()) if made_inside else (images, labels)
        found = every_attack(network, x, y)
    for name, adversarial in expected.items():
        assert torch.equal(found[name], adversarial), name
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_attackable_leaves_it_to_the_caller_whether_gradients_are_recorded(network: nn.Module) -> None:
    with torch.no_grad(), attackable(network):
        assert not torch.is_grad_enabled()
    with attackable(network):
        assert torch.is_grad_enabled()


def test_a_network_made_in_inference_mode_is_refused(images: torch.Tensor, labels: torch.Tensor) -> None:
    with torch.inference_mode():
        made = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 4))
    with pytest.raises(ValueError, match=r"made or moved inside of torch.inference_mode\(\).*make it outside"):
        ducat.attacks.pgd(made, images, labels, THREATS[0])
    with pytest.raises(ValueError, match=r"made or moved inside of torch.inference_mode\(\).*make it outside"):
        ducat.evaluate(made, images, labels, THREATS[0], "quick", num_classes=4)


@pytest.mark.parametrize("images_in", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", [{}, {"keep": "last"}, {"adaptive_steps": True}], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_network_that_is_sure_is_attacked_in_float16_as_well(
    templates: tuple[nn.Sequential, torch.Tensor, torch.Tensor], images_in: torch.dtype, variant: dict, norm: str
) -> None:
    """The linear model's probability of a wrong class is 1e-9 at most, below what float16 can hold."""
    model, x, y = templates
    x = x.to(images_in).float()
    y = model(x).argmax(1)
    lead = model(x).topk(2).values
    sure = (lead[:, 0] - lead[:, 1]).amin()
    with torch.no_grad():
        model[1].weight.mul_(22 / sure)
        model[1].bias.mul_(22 / sure)
    assert (1 - model(x).double().softmax(1).amax(1)).max() < 1e-9
    threat = ducat.ThreatModel(norm, {"linf": 0.02, "l2": 0.2}[norm], steps=20)

    def reached(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        found = ducat.attacks.pgd(network, images, y, threat, generator=torch.Generator().manual_seed(0), **variant)
        return ducat.losses.margin(model(found.float()), y)

    class Half(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return half(images.half())

    half = copy.deepcopy(model).half()
    torch.testing.assert_close(reached(Half(), x.to(images_in)), reached(model, x), rtol=0.05, atol=0.5)


class Masked(nn.Module):
    """A network in which class 3 of four, and its dummy class, never fire."""

    def __init__(self, network: nn.Module, low: float) -> None:
        super().__init__()
        self.network, self.low = network, low

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(8)
        mask[[3, 7]] = self.low
        return self.network(x) + mask


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name[:-1] != "targeted-pair-"])
@pytest.mark.parametrize("variant", [{}, {"keep": "first", "restarts": 2}, {"adaptive_steps": True}], ids=str)
def test_classes_masked_by_minus_infinity_are_as_those_masked_by_a_low_number(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, objective: str, variant: dict
) -> None:
    infinite, low = (
        ducat.attacks.pgd(
            Masked(network, value),
            images,
            labels % 3,
            THREATS[0],
            objective,
            generator=torch.Generator().manual_seed(0),
            **variant,
        )
        for value in (-torch.inf, -1e4)
    )
    assert torch.equal(infinite, low)


@pytest.mark.parametrize(("keep", "passes"), [("best", 5), ("last", 4)])
def test_the_number_of_passes(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, keep: str, passes: int
) -> None:
    model = Recorder(network)
    ducat.attacks.pgd(model, images, labels, THREATS[0], keep=keep)
    assert model.sizes == [len(images)] * passes


class Bump(nn.Module):
    """Class 1 wins only in a narrow band of brightness, which an attack enters and leaves again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        brightness = x.flatten(1).mean(1)
        return torch.stack([torch.zeros_like(brightness), 0.1 - (brightness - 0.6).abs() - 0.04], dim=1)


def test_a_success_on_the_way_is_kept() -> None:
    x = torch.full((1, 1, 2, 2), 0.5)
    y = torch.tensor([0])
    threat = ducat.ThreatModel(eps=0.4, step_size=0.08, steps=4)
    # The objective climbs straight through the band: brightness 0.58 in it, 0.66 and on beyond it.
    brighter = replace(OBJECTIVES["margin"], value=lambda logits, y, reference: -logits[:, 1].detach() + bright[0])
    bright: list[torch.Tensor] = []

    class Watched(Bump):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright[:] = [x.flatten(1).mean(1) * 10]
            return super().forward(x)

    model = Watched()
    for keep, wins in {"best": True, "first": True, "last": False}.items():
        adversarial = ducat.attacks.pgd(model, x, y, threat, brighter, start=x, keep=keep)
        assert (model(adversarial).argmax(1) == 1).item() is wins, keep


def test_the_last_iterate_counts() -> None:
    model, _ = linear_model(classes=2)
    x, y = torch.full((1, 3, 3, 3), 0.5), torch.tensor([0])
    start_margin = (model(x)[:, 1] - model(x)[:, 0]).item()
    slope = (model[1].weight[1] - model[1].weight[0]).abs().sum().item()
    # The margin grows by slope * step: the fourth and last step is the first that crosses zero.
    step = -start_margin / slope / 3.5 if start_margin < 0 else None
    if step is None:
        y, step = 1 - y, start_margin / slope / 3.5
    threat = ducat.ThreatModel(eps=1.0, step_size=step, steps=4)
    adversarial = ducat.attacks.pgd(model, x, y, threat, start=x)
    assert (model(adversarial).argmax(1) != y).all()
    three = ducat.attacks.pgd(model, x, y, replace(threat, steps=3), start=x)
    assert (model(three).argmax(1) == y).all()


def test_restarts_attack_survivors_only() -> None:
    model, _ = linear_model(classes=2)
    recorder = Recorder(model)
    x = torch.full((2, 3, 3, 3), 0.5)
    y = model(x).argmax(1)
    y[1] = 1 - y[1]  # already misclassified: fooled by the first start
    ducat.attacks.pgd(recorder, x, y, ducat.ThreatModel(eps=0.0, steps=2), restarts=3)
    assert recorder.sizes == [2, 2, 2, 1, 1, 1, 1, 1, 1]


def test_keep_first_stops_a_sample_at_its_first_success() -> None:
    model, _ = linear_model(classes=2)
    recorder = Recorder(model)
    x = torch.full((2, 3, 3, 3), 0.5)
    y = model(x).argmax(1)
    y[1] = 1 - y[1]
    ducat.attacks.pgd(recorder, x, y, ducat.ThreatModel(eps=0.0, steps=3), keep="first")
    assert recorder.sizes == [2, 1, 1, 1]


def test_more_restarts_never_lower_the_objective_reached(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> None:
    network.eval()
    reached = []
    for restarts in (1, 4):
        adversarial = ducat.attacks.pgd(
            network, images, labels, THREATS[0], "margin", restarts, torch.Generator().manual_seed(5)
        )
        reached.append(ducat.losses.margin(network(adversarial), labels))
    assert (reached[1] >= reached[0] - 1e-6).all()


def test_the_global_generator_is_left_alone(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    before = torch.random.get_rng_state()
    ducat.attacks.pgd(network, images, labels, THREATS[0], generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"restarts": 0}, "restarts=0"),
        ({"keep": "final"}, "keep='final' is unknown"),
        ({"keep": "last", "restarts": 2}, "keep='last'"),
        ({"keep": "last", "adaptive_steps": True}, "keep='last'"),
        ({"step_sizes": [0.1]}, "step_sizes are for keep='last', not for keep='best'"),
        ({"objective": "ce"}, "objective 'ce' is unknown: choose from cross-entropy"),
    ],
)
def test_bad_arguments_say_what_to_change(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ducat.attacks.pgd(network, images, labels, THREATS[0], **arguments)


def test_labels_must_match_the_images(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    # The type checker of the tests speaks first, with a TypeError.
    with pytest.raises((ValueError, TypeError), match=r"12 images but 3 labels|batch=12"):
        ducat.attacks.pgd(network, images, labels[:3], THREATS[0])


@pytest.mark.parametrize("attack", [ducat.attacks.pgd, ducat.attacks.adaptive])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (255 * x, y), r"the images run from .* they must be in \[0, 1\]"),
        (lambda x, y: (x - 0.5, y), r"the images run from .* they must be in \[0, 1\]"),
        (lambda x, y: (x * torch.nan, y), "the images run from nan"),
        (lambda x, y: (x, y.int()), r"the labels are torch.int32: .* as y.long\(\) does"),
        (lambda x, y: (x, y - 1), "the labels begin at -1"),
    ],
)
def test_images_and_labels_of_another_kind_are_named(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, attack: Any, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attack(network, *change(images, labels), THREATS[0])


def test_images_of_whole_numbers_are_named(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"the images are torch.uint8: .* as x.float\(\) / 255 does"):
        check_kinds((images * 255).byte(), labels)


def test_labels_beyond_the_classes_are_named(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="the labels run up to 6, but the network has 4 classes"):
        ducat.attacks.adaptive(ducat.RecoveredClassifier(network), images, labels + 3, THREATS[0], "quick")


def test_the_attack_of_training_looks_at_no_number(network: nn.Module) -> None:
    """On a GPU it would wait for it in every step."""
    x, y = torch.rand(2, 3, 6, 6), torch.zeros(2, dtype=torch.long)
    forbidden: list[str] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            forbidden.extend(name for name in ("_local_scalar_dense", "nonzero") if name in str(function))
            return function(*args, **(kwargs or {}))

    with Watched():
        ducat.attacks.pgd(network, x, y, THREATS[0], "kl", keep="last")
    assert forbidden == []
