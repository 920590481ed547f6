"""The reject option: its signals, its threshold, and attacks that are checked against linear programs."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from scipy.optimize import linprog
from torch import nn

import ducat
from ducat.attacks.adaptive import with_dummy_classes
from ducat.attacks.suites import SUITES, Suite
from ducat.dummy import RecoveredClassifier, add_dummy_classes, recover
from ducat.evaluation import rejection
from ducat.evaluation.rejection import (
    SIGNALS,
    Rejection,
    SelectiveClassifier,
    SignalResult,
    calibrate,
    denied,
    lead,
    log_odds,
    measure,
    nearness,
    wrong_and_accepted,
)

pytestmark = pytest.mark.slow

PIXELS, CLASSES = 6, 3


def linear(seed: int = 0, dummies: bool = True) -> nn.Module:
    """Return a linear classifier of six pixels, C or 2C outputs."""
    model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, CLASSES))
    generator = torch.Generator().manual_seed(seed)
    if dummies:
        add_dummy_classes(model)
    weight, bias = model[1].parameters()
    weight.data = torch.randn(weight.shape, generator=generator)
    bias.data = -weight.data.sum(1) / 2  # all classes are alike on a grey image
    return model


def images(number: int, seed: int = 1) -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(number, 1, 2, 3, generator=torch.Generator().manual_seed(seed))


def predicted(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return recover(with_dummy_classes(model, x)(x)).argmax(1)


def highest_pair(model: nn.Module, x: torch.Tensor, y: int, eps: float, threshold: float) -> float:
    """Return the largest min(lead, z_k - z_{k+C} - threshold) over the ball and the wrong classes, by linear programs.

    The lead of a class with two outputs is the larger of two linear-programming objectives, one for each of them.
    """
    layer = model[1]
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    pixels = x.flatten().double().numpy()
    best = -math.inf
    for k, member in product(range(CLASSES), (0, CLASSES)):
        if k == y:
            continue
        rows, limits = [], []
        for other in range(2 * CLASSES):
            if other % CLASSES != k:
                rows.append([*(weight[other] - weight[k + member]), 1.0])
                limits.append(bias[k + member] - bias[other])
        rows.append([*(weight[k + CLASSES] - weight[k]), 1.0])
        limits.append(bias[k] - bias[k + CLASSES] - threshold)
        bounds = [(max(0, pixel - eps), min(1, pixel + eps)) for pixel in pixels]
        solved = linprog([*[0.0] * PIXELS, -1.0], rows, limits, bounds=[*bounds, (None, None)])
        best = max(best, -solved.fun)
    return best


@pytest.mark.parametrize(("threshold", "eps"), [(-1.0, 0.05), (0.5, 0.12)])
def test_the_attack_finds_all_that_linear_programs_find(threshold: float, eps: float) -> None:
    model, x = linear(), images(24)
    y = predicted(model, x)
    threat = ducat.ThreatModel(eps=eps)
    rows = zip(x, y.tolist(), strict=True)
    exact = torch.tensor([highest_pair(model, image, label, eps, threshold) for image, label in rows])
    assert 4 < int((exact > 0).sum()) < 20
    found = wrong_and_accepted(model, x, y, threat, "pair", threshold, generator=torch.Generator().manual_seed(0))
    assert threat.allows(found, x).all()
    logits, accepted = SelectiveClassifier(model, "pair", threshold)(found)
    fallen = accepted & (logits.argmax(1) != y)
    near = exact.abs() < 1e-3
    assert torch.equal(fallen[~near], (exact > 0)[~near])


def test_two_classes_have_a_closed_form() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2))
    generator = torch.Generator().manual_seed(3)
    model[1].weight.data = torch.randn(2, PIXELS, generator=generator)
    x, eps, share = images(60), 0.05, 0.1
    y = predicted(model, x)
    y[:5] = 1 - y[:5]  # some are wrong as they are
    difference = (model[1].weight[1] - model[1].weight[0]).detach()
    sign = 1 - 2 * y.float()  # towards the wrong class
    margin = sign * (x.flatten(1) @ difference + (model[1].bias[1] - model[1].bias[0]).item())
    reach = eps * difference.abs().sum()
    measured = measure(model, x, y, ducat.ThreatModel(eps=eps), [0.0, share], seed=1, budget="quick")
    (result,) = measured.signals
    for threshold in result.thresholds.values():
        # With two classes log-odds and lead are the same number: minus the margin of the other class.
        robust = margin + reach < max(threshold, 0)
        sure = (margin + reach - max(threshold, 0)).abs() > 1e-4
        assert torch.equal(result.robust(threshold)[sure], robust[sure])
        for radius, right in zip(rejection.RADII, result.right, strict=True):
            refused = -margin - radius * reach < max(threshold, 0)
            sure = (-margin - radius * reach - max(threshold, 0)).abs() > 1e-4
            assert torch.equal((right < threshold)[sure], refused[sure])
    assert torch.equal(measured.half, margin + reach / 2 < 0)
    low, high = result.thresholds.values()
    assert low < high
    assert not result.robust(low).all()
    assert result.robust(high).sum() >= result.robust(low).sum()


def test_log_odds_are_those_of_the_softmax_and_never_saturate() -> None:
    logits = torch.randn(50, 7, dtype=torch.double) * 3
    p = logits.softmax(1)
    torch.testing.assert_close(log_odds(logits), torch.log(p / (1 - p)))
    extreme = torch.tensor([[200.0, 0.0, -50.0]], requires_grad=True)
    values = log_odds(extreme)
    torch.testing.assert_close(values.detach()[0, :2], torch.tensor([200.0, -200.0]))
    values.sum().backward()
    assert extreme.grad.isfinite().all()


def test_each_signal_is_what_the_table_says() -> None:
    logits = torch.randn(40, 2 * CLASSES, dtype=torch.double)
    p = logits.softmax(1)
    q = p[:, :CLASSES] + p[:, CLASSES:]
    real = p[:, :CLASSES]
    torch.testing.assert_close(SIGNALS["confidence"].acceptance(logits), torch.log(q / (1 - q)))
    torch.testing.assert_close(SIGNALS["real"].acceptance(logits), torch.log(real / (1 - real)))
    torch.testing.assert_close(SIGNALS["pair"].acceptance(logits), logits[:, :CLASSES] - logits[:, CLASSES:])


@pytest.mark.parametrize("signal", SIGNALS)
def test_nearness_is_above_zero_for_the_accepted_prediction_alone(signal: str) -> None:
    logits = 3 * torch.randn(200, 2 * CLASSES)
    near = nearness(logits, SIGNALS[signal], 0.3)
    decision = recover(logits)
    prediction = decision.argmax(1)
    accepted = SIGNALS[signal].acceptance(logits).gather(1, prediction[:, None]).squeeze(1) > 0.3
    assert torch.equal(near.gather(1, prediction[:, None]).squeeze(1) > 0, accepted)
    assert (near.scatter(1, prediction[:, None], -1.0) <= 0).all()
    ordered = decision.sort(1, descending=True).values
    torch.testing.assert_close(lead(decision).amax(1), ordered[:, 0] - ordered[:, 1])
    smooth = nearness(logits, SIGNALS[signal], 0.3, smooth=True)
    assert smooth.isfinite().all()


def test_the_threshold_refuses_the_share_it_was_set_for() -> None:
    model, x = linear(dummies=False), images(200)
    y = predicted(model, x)
    y[:40] = (y[:40] + 1) % CLASSES
    for share in (0.0, 0.05, 0.5):
        threshold = calibrate(model, x, y, share)
        _, accepted = SelectiveClassifier(model, "confidence", threshold)(x)
        assert int((~accepted[40:]).sum()) == share * 160


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_threshold_refuses_that_share_in_any_precision(dtype: torch.dtype) -> None:
    model, x = linear(dummies=False).to(dtype), images(400).to(dtype)
    y = predicted(model, x)
    for share in (0.0, 0.05, 0.5):
        threshold = calibrate(model, x, y, share)
        assert int((~SelectiveClassifier(model, "confidence", threshold)(x)[1]).sum()) == share * 400


def test_a_selective_classifier_gives_logits_and_whether_it_accepts() -> None:
    model, x = linear(), images(30)
    logits, accepted = SelectiveClassifier(model, "pair", 0.2)(x)
    raw = model(x)
    assert torch.equal(logits, recover(raw))
    index = logits.argmax(1)
    rows = torch.arange(30)
    assert torch.equal(accepted, raw[rows, index] - raw[rows, index + CLASSES] >= 0.2)
    assert SelectiveClassifier(RecoveredClassifier(model), "real")(x)[1].all()
    same = SelectiveClassifier(RecoveredClassifier(model), "pair", 0.2)(x)[1]
    assert torch.equal(same, accepted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectiveClassifier(linear(), "doubt"), "signal 'doubt' is unknown: choose from confidence, real"),
        (lambda: SelectiveClassifier(linear(dummies=False), "pair"), "'pair' needs dummy classes"),
        (lambda: SelectiveClassifier(linear(), "pair", math.nan), "threshold=nan is not a number"),
        (lambda: calibrate(linear(), images(3), torch.zeros(3, dtype=torch.long), 5), r"reject=5 is outside \[0, 1\)"),
        (
            lambda: calibrate(linear(), images(3), (predicted(linear(), images(3)) + 1) % CLASSES, 0.1),
            "no image is classified correctly",
        ),
    ],
)
def test_bad_input_is_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_denial_is_refusal_or_error() -> None:
    model, x = linear(), images(60)
    y = predicted(model, x)
    threshold = calibrate(model, x, y, 0.2, "real")
    threat = ducat.ThreatModel(eps=0.1)
    found = denied(model, x, y, threat, "real", threshold, "quick", torch.Generator().manual_seed(0))
    assert threat.allows(found, x).all()
    logits, accepted = SelectiveClassifier(model, "real", threshold)(found)
    before, taken = SelectiveClassifier(model, "real", threshold)(x)
    assert (~((logits.argmax(1) == y) & accepted)).sum() > (~((before.argmax(1) == y) & taken)).sum()


def test_images_that_others_found_count_and_those_outside_the_ball_do_not() -> None:
    model, x = linear(dummies=False), images(20)
    y = predicted(model, x)
    still = ducat.ThreatModel(eps=0.0)
    elsewhere = images(20, seed=9)
    assert measure(model, x, y, still, [0.0], found=[elsewhere], budget="quick").signals[0].robust(-99.0).all()
    wide = ducat.ThreatModel(eps=1.0)
    part = measure(model, x, y, wide, [0.0], found=[elsewhere], budget="quick").signals[0]
    with torch.no_grad():
        values = log_odds(model(elsewhere))
    wrong = values.argmax(1) != y
    assert wrong.any()
    assert (part.wrong[wrong] >= values.amax(1)[wrong] - 1e-5).all()


def test_images_that_are_found_afterwards_count_and_those_outside_the_ball_do_not() -> None:
    model, x = linear(dummies=False), images(20)
    y, elsewhere = predicted(model, x), images(20, seed=9)
    before = measure(model, x, y, ducat.ThreatModel(eps=0.0), [0.0], budget="quick")
    every = torch.arange(20)
    assert rejection.counted(model, x, y, before, [(every, elsewhere)]).to_dict() == before.to_dict()
    wide = replace(before, threat=ducat.ThreatModel(eps=1.0))
    some = [(rows, elsewhere[rows]) for rows in (every[::2], every[1::2])]
    after = rejection.counted(model, x, y, wide, [*some, (every, x)]).signals[0]
    with torch.no_grad():
        values = log_odds(model(elsewhere))
    wrong = values.argmax(1) != y
    assert (after.wrong[wrong] == values.amax(1)[wrong]).all()
    assert (
        after.right[-1] == torch.where(wrong, -torch.inf, torch.minimum(before.signals[0].right[-1], values.amax(1)))
    ).all()
    assert (after.right[0] >= after.right[-1]).all()
    assert (after.right[0] > after.right[-1]).any(), "not all are in the smallest ball"


def result(wrong: list[float], acceptance: list[float]) -> SignalResult:
    count = len(wrong)
    return SignalResult(
        "confidence",
        {0.1: 0.0},
        torch.zeros(count, dtype=torch.long),
        torch.tensor(acceptance),
        torch.tensor(wrong),
        torch.zeros(3, count),
    )


@pytest.mark.parametrize("through", ["measure", "evaluate"])
def test_dummy_classes_count_wherever_the_two_outputs_of_a_class_come_from(through: str) -> None:
    """The attack must not take the 2C outputs of a network that `add_dummy_classes` has not made for 2C classes."""
    ours = linear(3)
    theirs = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2 * CLASSES))
    theirs.load_state_dict(ours.state_dict())
    x, threat = images(60), ducat.ThreatModel(eps=0.08)
    y = predicted(ours, x)
    found = []
    for model in (RecoveredClassifier(ours), RecoveredClassifier(theirs)):
        if through == "measure":
            result = measure(model, x, y, threat, [0.2], budget="quick")
        else:
            evaluation = ducat.evaluate(model, x, y, threat, "quick", num_classes=CLASSES, reject=[0.2])
            assert evaluation.rejection is not None
            result = evaluation.rejection
        found.append([each.wrong >= each.thresholds[0.2] for each in result.signals])
    assert any(fallen.any() for fallen in found[0])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


class Rounded(nn.Module):
    """Rounds images, which passes no gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 64).round() / 64


@pytest.mark.parametrize("hint", ["signs", "surrogate"])
def test_a_network_that_hides_its_gradients_is_attacked_through_guides(
    hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More steps on the network itself find nothing: they have no gradient to follow.
    for budgets in (rejection.WRONG_BUDGETS, rejection.DENIAL_STEPS):
        monkeypatch.setitem(budgets, "standard", budgets["quick"])
    inner, (x, y) = ducat.load("zoo:digits-pgd-at"), ducat.data.load_test("digits", 8)
    model, threat = nn.Sequential(Rounded(), inner), ducat.ThreatModel(eps=0.2)
    suite = Suite(SUITES["quick"].attacks, audit=hint == "signs", name="audited")
    evaluation = ducat.evaluate(
        model,
        x,
        y,
        threat,
        suite,
        num_classes=10,
        reject=[0.05],
        surrogates=[inner] if hint == "surrogate" else [],
        second_round_seconds=1.0,
    )
    plain = measure(inner, x, y, threat, [0.05], budget="quick")
    assert evaluation.rejection is not None
    for found, known in zip(evaluation.rejection.signals, plain.signals, strict=True):
        standing = found.robust(found.thresholds[0.05]).float().mean()
        assert standing <= known.robust(known.thresholds[0.05]).float().mean() + 0.13


def wrappers() -> dict[str, nn.Module]:
    class Own(RecoveredClassifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    inner = linear(3)
    return {
        "in a sequence": nn.Sequential(nn.Identity(), RecoveredClassifier(inner)),
        "by logsumexp, in a sequence": nn.Sequential(nn.Identity(), RecoveredClassifier(inner, "logsumexp")),
        "a class of one's own": Own(inner),
    }


@pytest.mark.parametrize("name", wrappers())
def test_a_recovered_network_inside_of_another_has_no_dummy_classes(name: str) -> None:
    model, x = wrappers()[name], images(20)
    logits, _ = SelectiveClassifier(model)(x)
    assert torch.equal(logits, model(x))
    assert rejection.signals_of(model, x) == ["confidence"]
    assert calibrate(model, x, model(x).argmax(1), 0.2) == calibrate(
        with_dummy_classes(model, x), x, model(x).argmax(1), 0.2
    )


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = linear(0, dummies=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x.mean((1, 2, 3)).view(-1, 1) > 0.7, torch.nan, self.model(x))

    model, x = Broken(), images(20)
    y = model(x).argmax(1)
    result = measure(model, x, y, ducat.ThreatModel(eps=0.3), [0.0], found=[(x + 0.3).clamp(0, 1)], budget="quick")
    assert torch.isnan(model((x + 0.3).clamp(0, 1))).any(1).all()
    denied_share = result.to_dict()["signals"][0]["rows"][0]["denial"][-1]["share"]
    assert denied_share == 1


def test_denial_in_l1_comes_through_larger_balls() -> None:
    model, (x, y) = ducat.load("zoo:digits-pgd-at"), ducat.data.load_test("digits", 60)
    threat = ducat.ThreatModel("l1", 2.0)
    threshold = calibrate(model, x, y, 0.05)
    found = denied(model, x, y, threat, "confidence", threshold, "quick", torch.Generator().manual_seed(0))
    assert threat.allows(found, x).all()
    logits, accepted = SelectiveClassifier(model, "confidence", threshold)(found)
    right = accepted & (logits.argmax(1) == y)
    assert int(right.sum()) <= 6


def test_a_curve_ends_at_the_strictest_threshold_that_was_attacked() -> None:
    model, x = linear(0), images(60)
    y = predicted(model, x)
    unsure = 0.5 + 0.2 * (x - 0.5)
    result = measure(
        model, x, y, ducat.ThreatModel(eps=0.05), [0.05], held_out=(unsure, predicted(model, unsure)), budget="quick"
    )
    for each, content in zip(result.signals, result.to_dict()["signals"], strict=True):
        strictest = max(each.thresholds.values())
        below = float((each.acceptance[each.prediction == y] < strictest).float().mean())
        assert all(point["right_refused"] <= below + 1e-6 for point in content["curve"])
        assert content["curve"]


def test_networks_that_return_objects_are_read() -> None:
    class Answer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.inner(x)}

    x = images(20)
    for inner in (linear(0), linear(0, dummies=False)):
        view = RecoveredClassifier(Answer(inner)) if inner[1].out_features == 2 * CLASSES else Answer(inner)
        y = predicted(inner, x)
        given, plain = (measure(one, x, y, ducat.ThreatModel(eps=0.05), [0.1], budget="quick") for one in (view, inner))
        assert given.to_dict() == plain.to_dict()


def test_the_short_budget_reaches_networks_of_small_logits() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ducat.load("zoo:digits-pgd-at")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1e-3 * self.model(x)

    model, (x, y), threat = Scaled(), ducat.data.load_test("digits", 40), ducat.ThreatModel(eps=0.2)
    threshold, standing = calibrate(model, x, y, 0.05), {}
    for budget in ("quick", "standard"):
        noise = torch.Generator().manual_seed(0)
        found = wrong_and_accepted(model, x, y, threat, "confidence", threshold, budget, noise)
        logits, accepted = SelectiveClassifier(model, "confidence", threshold)(found)
        standing[budget] = int(((logits.argmax(1) == y) | ~accepted).sum())
    assert standing["quick"] <= standing["standard"] + 1


def test_a_detector_too_good_for_its_classifier_is_suspected() -> None:
    labels, threat = torch.zeros(40, dtype=torch.long), ducat.ThreatModel()
    held = result([-1.0] * 40, [1.0] * 40)
    weak = torch.tensor([True] * 20 + [False] * 20)
    (warning,) = Rejection(threat, labels, 40, True, weak, [held]).warnings
    assert "100.0 % are served and robust at eps 0.03137, more than the 50.0 %" in warning
    assert not Rejection(threat, labels, 40, True, ~weak | weak, [held]).warnings
    refused = result([-1.0] * 40, [-1.0] * 40)  # who refuses everything serves nobody
    (other,) = Rejection(threat, labels, 40, True, weak, [refused]).warnings
    assert "surer of the held-out images" in other


def test_held_out_images_that_the_network_knows_are_suspected() -> None:
    labels, threat = torch.zeros(100, dtype=torch.long), ducat.ThreatModel()

    def warned(refused: int, held_out: bool = True, share: float = 0.2) -> list[str]:
        """What is said where a share may be refused, and some of 80 right and of 20 wrong images are."""
        signal = [-1.0] * refused + [1.0] * (80 - refused) + [-1.0] * 20
        found = replace(result([0.5] * 100, signal), thresholds={share: 0.0})
        found.prediction[80:] = 1
        return Rejection(threat, labels, 100, held_out, ~labels.bool(), [found]).warnings

    (warning,) = warned(40)
    assert "20% of the held-out images may be refused by confidence, and 50.0 % of the evaluated ones are" in warning
    assert "12.5% of the held-out images may be refused" in warned(40, share=0.125)[0]
    assert not warned(20)  # more than was asked, by chance
    assert not warned(0)
    assert not warned(40, held_out=False)


def test_the_numbers_stand_beside_each_other() -> None:
    model, x = linear(), images(40)
    y = predicted(model, x)
    y[:4] = (y[:4] + 1) % CLASSES
    content = measure(model, x, y, ducat.ThreatModel(eps=0.05), [0.05, 0.1], budget="quick").to_dict()
    assert [each["signal"] for each in content["signals"]] == ["confidence", "real", "pair"]
    for each in content["signals"]:
        assert [row["reject"] for row in each["rows"]] == [0.05, 0.1]
        for row in each["rows"]:
            outcomes = [row[name]["share"] for name in ("clean_right", "clean_wrong", "clean_refused")]
            assert sum(outcomes) == pytest.approx(1, abs=1e-5)
            assert row["robust"]["share"] <= 1 - row["clean_wrong"]["share"] + 1e-6
            assert row["served"]["share"] <= min(row["robust"]["share"], row["clean_right"]["share"])
            shares = [denial["share"] for denial in row["denial"]]
            assert shares == sorted(shares)
            assert [denial["eps"] for denial in row["denial"]] == [0.0125, 0.025, 0.05]
        robust = [point["robust"] for point in each["curve"]]
        assert robust == sorted(robust)
