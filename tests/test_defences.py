"""The zoo of defences: every row is what it says, and a truth is the lowest number there is."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ducat
from benchmarks.defences.__main__ import Zoo, main, table, verdict
from benchmarks.defences.attacks import JUDGEMENTS, Judge, Truth, find_truth, logits_of, selective
from benchmarks.defences.networks import BASES, PHOTOGRAPHS, Base, Bases
from benchmarks.defences.parts import After, Placed, Switch, hashed, one_hot_by_index
from benchmarks.defences.zoo import ROWS, Row

pytestmark = pytest.mark.slow


class Untrained(Bases):
    """Networks as they are before training."""

    def __call__(self, name: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BASES[name].build().eval().requires_grad_(False)

    def joined(self) -> nn.Module:
        return ducat.models.build("small", 20, channels=1).eval()


def test_the_table_has_enough_of_each_kind() -> None:
    assert sum(not row.honest for row in ROWS.values()) >= 44
    assert sum(row.honest for row in ROWS.values()) >= 12
    assert sum(row.data == PHOTOGRAPHS for row in ROWS.values()) >= 3
    for row in ROWS.values():
        assert row.about
        assert row.judged in JUDGEMENTS
        assert set(row.inside) <= set(BASES)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_answers_each_image_and_its_stand_ins_have_gradients(name: str, tmp_path: Path) -> None:
    row, bases = ROWS[name], Untrained(tmp_path)
    x = torch.rand(3, *((3, 32, 32) if row.data == PHOTOGRAPHS else (1, 8, 8)))
    logits = logits_of(row.build(bases).eval()(x.clone()))
    assert logits.shape in {(3, row.classes), (3, 2 * row.classes)}
    stand_ins = row.proxies(bases)
    assert stand_ins or row.inside
    for stand_in in stand_ins:
        images = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(logits_of(stand_in.eval()(images)).float().sum(), images)
        assert gradient.isfinite().all()


def linear_truth(network: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Return what withstands of a linear network, exactly: each pixel goes to the end that favours a wrong class."""
    layer = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    low, high = (x.flatten(1) - eps).clamp(0, 1), (x.flatten(1) + eps).clamp(0, 1)
    standing = torch.ones(len(x), dtype=torch.bool)
    for wrong in range(layer.out_features):
        slope = layer.weight[wrong] - layer.weight[y]
        lead = torch.where(slope > 0, high, low).mul(slope).sum(1) + layer.bias[wrong] - layer.bias[y]
        standing &= (y == wrong) | (lead <= 0)
    return standing


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("zoo"))


DEFENCES: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "none": (lambda network: network, "plain"),
    "one-hot by index": (lambda network: After(network, one_hot_by_index), "plain"),
    "only the first of a batch": (lambda network: Placed(network, _constant(), size=False), "company"),
    "only alone": (lambda network: Placed(network, _constant(), size=True), "company"),
}


class _Right(nn.Module):
    """Knows each benign image's label, however it is changed within the ball."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.y = x, y

    def forward(self, images: Tensor) -> Tensor:
        nearest = torch.cdist(images.flatten(1), self.x.flatten(1)).argmin(1)
        return nn.functional.one_hot(self.y[nearest], 10).float()


def _constant() -> nn.Module:
    x, y = ducat.data.load_test("digits", samples=20)
    return _Right(x, y)


@pytest.mark.parametrize("name", DEFENCES)
def test_a_truth_on_a_linear_network_is_the_exact_one(name: str, bases: Bases) -> None:
    eps = 0.1
    x, y = ducat.data.load_test("digits", samples=20)
    network = bases("linear")
    defend, judged = DEFENCES[name]
    judge = Judge(lambda: defend(network), judged, x, y, 10)
    truth = find_truth(judge, ducat.ThreatModel("linf", eps), [network])
    exact = linear_truth(network, x, y, eps)
    assert 0.1 < exact.float().mean() < 0.95
    assert (truth.rates.bool() == exact).all()
    assert (truth.images - x).abs().max() <= eps + 1e-6
    assert truth.images.amin() >= 0
    assert truth.images.amax() <= 1


def test_a_network_that_is_drawn_by_chance_is_right_as_often_as_it_is(bases: Bases) -> None:
    x, y = ducat.data.load_test("digits", samples=20)
    weak, sure = bases("linear"), _Right(x, y)
    judge = Judge(lambda: Switch(lambda images: torch.rand(len(images)) < 0.25, weak, sure), "random", x, y, 10)
    threat = ducat.ThreatModel("linf", 0.1)
    truth = find_truth(judge, threat, [weak])
    expected = 0.75 + 0.25 * linear_truth(weak, x, y, 0.1).float()
    assert truth.rates == pytest.approx(expected.double(), abs=0.1)
    assert float(truth.rates.mean()) == pytest.approx(float(expected.mean()), abs=0.03)


def test_a_fresh_network_judges_where_one_would_remember(bases: Bases) -> None:
    x, y = ducat.data.load_test("digits", samples=20)
    threat = ducat.ThreatModel("linf", 0.2)
    row = ROWS["remembers-images"]
    judge = Judge(lambda: row.build(Untrained(bases.folder)), "fresh", x, y, 10)
    everything = torch.arange(len(x))
    first = judge.rates(x, everything)
    model = row.build(Untrained(bases.folder))
    model(torch.rand_like(x))
    assert torch.equal(judge.rates(x, everything), first)
    assert threat.eps == 0.2


def test_an_answer_that_is_not_a_number_is_not_right() -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    silent = After(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), lambda logits: logits * torch.nan)
    assert Judge(lambda: silent, "plain", x, y, 10).rates(x, torch.arange(4)).sum() == 0


def test_a_hash_answers_the_same_image_alike_and_a_near_one_otherwise() -> None:
    x = torch.rand(64, 1, 8, 8)
    values = hashed(x)
    assert torch.equal(values, hashed(x))
    assert torch.equal(values[5:6], hashed(x[5:6]))
    assert 0.3 < values.mean() < 0.7
    assert (hashed(x + 1e-4) - values).abs().mean() > 0.2


def measured(**changes: Any) -> dict[str, Any]:
    row = {
        "suite": "light",
        "clean": 0.9,
        "reported": 0.5,
        "at_most": False,
        "warnings": [],
        "seconds": 1.0,
        "cpu_seconds": 1.0,
    }
    return {**row, **changes}


DEFENCE, HONEST = ROWS["one-hot"], ROWS["robust"]


@pytest.mark.parametrize(
    ("row", "content", "true", "reference", "expected"),
    [
        (DEFENCE, measured(), 0.49, {}, "ok"),
        (DEFENCE, measured(), 0.4, {}, "overstated"),
        (DEFENCE, measured(reported=0.72), 0.7, {}, "ok"),  # "within 2 points"
        (DEFENCE, measured(), 0.6, {}, "understated"),
        (DEFENCE, measured(at_most=True, warnings=["cause"]), 0.1, {}, "ok"),
        (DEFENCE, measured(at_most=True), 0.1, {}, "at most, without a cause"),
        (DEFENCE, {"refused": "ValueError: it keeps state"}, 0.1, {}, "ok: refused"),
        (DEFENCE, {"crashed": "RuntimeError"}, 0.1, {}, "crashed"),
        (HONEST, measured(), 0.5, measured(), "ok"),
        (HONEST, measured(warnings=["cause"]), 0.5, {}, "false warning"),
        (HONEST, measured(), 0.5, measured(reported=0.52), "changed"),
        (HONEST, measured(), 0.5, measured(cpu_seconds=0.8), "slower"),
    ],
)
def test_a_verdict_names_what_is_wrong(
    row: Row, content: dict[str, Any], true: float, reference: dict[str, Any], expected: str
) -> None:
    assert verdict(row, content, true, reference) == expected


def test_the_table_tells_honest_networks_from_defences() -> None:
    rows = {"robust": measured(reported=0.7), "one-hot": measured(at_most=True, warnings=["gradients vanish: 9 of 9"])}
    lines = table(rows, {"robust": {"true": 0.7}, "one-hot": {"true": 0.4}}, {"robust": measured(reported=0.7)})
    honest, defences = lines.split("## Defences")
    assert "| `robust` | the same by PGD-AT | 90.0 | 70.0 | 70.0 | +0.0 | 70.0 | 1.00 | light |  | 1 | ok |" in honest
    assert "| 90.0 | at most 50.0 | 40.0 | +10.0 | light | gradients vanish | 1 | ok |" in defences


def test_the_table_says_where_a_row_is_of_other_images_or_of_another_ball() -> None:
    rows = {
        "mixture-cure": measured(samples=500),
        "robust": measured(seed=1),
        "photograph-robust": measured(samples=50),
        "half-overflow": {"refused": "ValueError: the outputs are not finite (subject.py:186)"},
    }
    lines = table(rows, {}, {})
    assert "power 2 (500 images at L-inf 0.3) |" in lines
    assert "the same by PGD-AT (seed 1) |" in lines
    assert "the same by PGD-AT (50 images of cifar10-jpeg at L-inf 0.0314) |" in lines
    assert "| ValueError: the outputs are not finite (subject.py:186) | 0 | ok: refused |" in lines


def test_a_truth_of_other_networks_does_not_stand_beside_a_row() -> None:
    rows = {"one-hot": measured(subject="these"), "ranks": measured(subject="these")}
    truths = {"one-hot": {"true": 0.4, "subject": "those"}, "ranks": {"true": 0.4, "subject": "these"}}
    first, second = (line for line in table(rows, truths, {}).splitlines() if line.startswith(("| `one-", "| `ranks")))
    assert "| 90.0 | 50.0 |  |  | light |" in first
    assert "| 90.0 | 50.0 | 40.0 | +10.0 | light |" in second


def test_a_network_is_made_again_where_the_one_that_it_is_made_from_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def doubled() -> nn.Module:
        return ducat.add_dummy_classes(plain())

    def weights() -> Tensor:
        return torch.cat([parameter.flatten() for parameter in Bases(tmp_path)("published").parameters()])

    bases = {
        "robust": Base(plain, epochs=1),
        "published": Base(doubled, loss="dummy-published", start="robust", epochs=1),
    }
    monkeypatch.setattr("benchmarks.defences.networks.BASES", bases)
    first = weights()
    assert torch.equal(weights(), first)
    bases["robust"] = Base(plain, epochs=1, seed=1)
    assert not torch.equal(weights(), first)


def test_images_that_fool_a_network_inside_are_the_same_every_time(tmp_path: Path, bases: Bases) -> None:
    found = []
    for seed in range(2):
        zoo = Zoo(tmp_path / str(seed), None, 6)
        zoo.cache.mkdir()
        zoo.bases = bases
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found.append(zoo.inside("linear", ROWS["linear"]))
    assert torch.equal(*found)


def test_a_truth_is_found_anew_where_the_one_that_is_there_is_of_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def truth(self: Zoo, name: str) -> Truth:
        row = ROWS[name]
        return Truth.begin(self.judge(row), row.threat)

    monkeypatch.setattr(Zoo, "truth", truth)
    monkeypatch.setattr(
        Zoo, "evaluate", lambda self, name, suite, seed: (measured(samples=self.samples, seed=seed), None)
    )
    monkeypatch.setattr("benchmarks.defences.__main__.Bases", Untrained)
    out, truths = tmp_path / "out.json", tmp_path / "truths.json"

    def make(*options: str) -> int:
        """Make the row of the linear network; return how many images its truth is of."""
        files = ["--out", str(out), "--truths", str(truths), "--cache", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", ["defences", "--only", "linear", *files, *options])
        main()
        return len(json.loads(truths.read_text())["linear"]["rates"])

    assert make("--samples", "6") == 6
    assert make("--samples", "6") == 6
    with pytest.raises(SystemExit):
        make("--samples", "9")
    assert "linear in" in (said := capsys.readouterr().err)
    assert "was measured on 6 images with seed 0: give another --out" in said
    assert make("--samples", "9", "--again") == 9
    assert json.loads(out.read_text())["linear"]["subject"] == json.loads(truths.read_text())["linear"]["subject"]


def test_the_evaluator_and_the_zoo_agree_on_a_linear_network(tmp_path: Path, bases: Bases) -> None:
    zoo = Zoo(bases.folder, None, 20)
    row = ROWS["linear"]
    content, images = zoo.evaluate("linear", "quick", 0)
    assert images is not None
    truth = zoo.truth("linear")
    assert content["reported"] == pytest.approx(float(truth.rates.mean()), abs=0.051)
    assert float(zoo.lower("linear", images).rates.mean()) <= float(truth.rates.mean())
    exact = linear_truth(bases("linear"), *zoo.test(row), row.threat.eps)
    assert float(truth.rates.mean()) == pytest.approx(float(exact.float().mean()))


def test_a_selective_attack_fools_a_network_that_a_detector_guards(bases: Bases) -> None:
    x, y = ducat.data.load_test("digits", samples=20)
    network = bases("linear")

    def score(images: Tensor) -> Tensor:
        return (images - x).flatten(1).mean(1) - 0.01  # a brighter image is an attacked one

    found = selective(network, score, x, y, 0.2)
    assert (found - x).abs().max() <= 0.2 + 1e-6
    undetected = (network(found).argmax(1) != y) & (score(found) < 0)
    assert undetected.float().mean() >= 0.9
