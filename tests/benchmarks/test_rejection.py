"""What the benchmark of the reject option adds: its objectives, its networks, and its second attack."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ducat
from benchmarks.rejection.__main__ import register
from benchmarks.rejection.networks import SMALL_BALL, SharedAbstain, SmallBall
from benchmarks.rejection.objectives import Abstaining, Accepted, Lowered, refusing
from benchmarks.rejection.rows import ROWS
from benchmarks.rejection.second import second
from benchmarks.rejection.tables import OUTCOMES, write
from ducat import methods
from ducat.dummy import RecoveredClassifier, add_dummy_classes, recover
from ducat.evaluation import rejection
from ducat.evaluation.rejection import SIGNALS, SelectiveClassifier, log_odds, wrong_and_accepted

CLASSES = 3


def network(dummies: bool = True, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, CLASSES))
        if dummies:
            add_dummy_classes(model, "random")
        return model


def batch(number: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(number, 1, 4, 4, generator=generator), torch.randint(0, CLASSES, (number,), generator=generator)


PLAIN = methods.objective("mixed", "off", attack="pgd-cosine")
AWARE = methods.objective("pgd-at", "recovery-aware", attack="pgd-cosine")


@pytest.mark.parametrize(
    ("plain", "kind", "values"),
    [
        (PLAIN, Accepted, {}),
        (AWARE, Accepted, {"signal": "real"}),
        (AWARE, Accepted, {"signal": "pair"}),
        (PLAIN, Lowered, {}),
        (AWARE, Lowered, {}),
        (PLAIN, Lowered, {"uniform": 0.33}),
        (AWARE, Lowered, {"uniform": 0.33}),
        (AWARE, Abstaining, {"even": 0.1}),
    ],
)
def test_each_objective_attacks_in_the_ball_and_teaches(
    plain: methods.Objective, kind: type[methods.Objective], values: dict
) -> None:
    model, (x, y), threat = network(plain is AWARE), batch(), ducat.ThreatModel(eps=0.1)
    objective = refusing(kind, **values)(plain, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    found = []
    for step in range(12):
        adversarial = objective.attack(model, x, y, threat, torch.Generator().manual_seed(step))
        assert threat.allows(adversarial, x).all()
        loss = objective.loss(model, x, adversarial, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0]


def test_lowering_nothing_is_the_method_itself() -> None:
    model, (x, y) = network(), batch()
    adversarial = (x + 0.05).clamp(0, 1)
    torch.testing.assert_close(
        refusing(Lowered, uniform=0.0)(AWARE, 0.0).loss(model, x, adversarial, y), AWARE.loss(model, x, adversarial, y)
    )


def test_a_shared_abstain_class_is_read_as_one_more_class() -> None:
    model, (x, _) = SharedAbstain(network(dummies=False)), batch()
    raw, logits = model.base(x), model(x)
    assert raw.shape[1] == CLASSES + 1
    assert torch.equal(recover(logits).argmax(1), raw[:, :-1].argmax(1))
    p = raw.softmax(1)
    torch.testing.assert_close(logits.softmax(1)[:, CLASSES:].sum(1), p[:, -1])
    torch.testing.assert_close(SIGNALS["real"].acceptance(logits), log_odds(raw)[:, :-1])


def test_a_small_ball_shows_the_worst_nearby() -> None:
    inner, (x, _) = network(), batch()
    signal = SMALL_BALL["small ball"]
    still, moved = SmallBall(inner, 0.0)(x), SmallBall(inner, 0.05)(x)
    assert torch.equal(signal.decision(moved), recover(inner(x)))
    torch.testing.assert_close(signal.acceptance(still), SIGNALS["confidence"].acceptance(inner(x)))
    index = signal.decision(moved).argmax(1, keepdim=True)
    before, after = (signal.acceptance(logits).gather(1, index) for logits in (still, moved))
    assert (after < before).float().mean() > 0.9


def test_a_small_ball_takes_four_passes_forward_as_the_pages_say() -> None:
    inner, (x, _) = network(), batch()
    passes: list[int] = []
    inner.register_forward_hook(lambda *given: passes.append(1))
    SmallBall(inner, 0.05)(x)
    assert len(passes) == 4


def test_the_budget_of_the_rows_is_as_long_as_its_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WRONG_BUDGETS", "DENIAL_STEPS"):
        monkeypatch.setattr(rejection, name, dict(getattr(rejection, name)))
    register()
    passes = {
        name: sum(each.steps * each.restarts * each.share * max(1, each.targets) for each in rounds)
        for name, rounds in rejection.WRONG_BUDGETS.items()
    }
    assert passes == pytest.approx({"rows": 98, "quick": 110, "standard": 780})
    assert (rejection.DENIAL_STEPS["rows"], rejection.DENIAL_STEPS["quick"]) == ((6, 1), (20, 1))


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_second_attack_finds_what_the_products_finds(signal: str) -> None:
    model, (x, _) = RecoveredClassifier(network()), batch()
    with torch.no_grad():
        y = model(x).argmax(1)
        values = SIGNALS[signal].acceptance(model.model(x)).gather(1, y[:, None])
    threshold, threat = float(values.quantile(0.3)), ducat.ThreatModel(eps=0.08)
    generator = torch.Generator().manual_seed(0)
    found = wrong_and_accepted(model, x, y, threat, signal, threshold, generator=generator)
    logits, accepted = SelectiveClassifier(model, signal, threshold)(found)
    product = accepted & (logits.argmax(1) != y)
    fallen = second(model, SIGNALS[signal], threshold, x, y, threat.eps)
    assert 2 < int(product.sum()) < 38
    assert int((product & ~fallen).sum()) <= 1
    assert not (fallen & ~product).any()


def test_each_row_states_what_was_expected() -> None:
    assert all(row.expected for row in ROWS.values())
    assert all(row.of is None or row.of in ROWS for row in ROWS.values())
    assert ROWS["pgd-at"].signals == ("confidence",)


def written(work: Path, name: str, seed: int, signals: dict[str, float]) -> None:
    """Leave a row's file: robust accuracy at 5 % refused by signal, two points less at 2 %."""
    ci = {"ci95": [0.0, 1.0]}
    rows = [
        {
            "signal": signal,
            "rows": [
                {
                    "reject": share,
                    "robust": {"share": robust - loss, **ci},
                    "served": {"share": robust - loss - 0.01, **ci},
                    **{f"clean_{each}": {"share": 0.1, **ci} for each in OUTCOMES},
                    "denial": [{"eps": eps, "share": eps, **ci} for eps in (0.1, 0.2, 0.4)],
                }
                for share, loss in ((0.02, 0.02), (0.05, 0.0))
            ],
            "curve": [{"right_refused": 0.0, "robust": 0.5}, {"right_refused": 0.2, "robust": 0.9}],
        }
        for signal, robust in signals.items()
    ]
    content = {
        "name": name,
        "seed": seed,
        "samples": 500,
        "rejection": {"robust_at_half_eps": {"share": 0.9}, "signals": rows},
    }
    folder = work / "digits" / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-s{seed}.json").write_text(json.dumps(content))


def test_the_table_compares_at_equal_refusals_and_seeds(tmp_path: Path) -> None:
    for seed, (plain, aware) in enumerate([(0.80, 0.82), (0.84, 0.88)]):
        written(tmp_path, "pgd-at", seed, {"confidence": plain})
        written(tmp_path, "aware", seed, {"confidence": aware, "pair": 0.5})
    written(tmp_path, "pgd-at", 2, {"confidence": 0.5})  # a seed that `aware` has not got does not count against it
    (tmp_path / "digits" / "rows" / "second-aware-s0.json").write_text(
        json.dumps([{"signal": "pair", "product": 0.5, "standard": 0.495, "second": 0.49, "seconds": 1}])
    )
    write(tmp_path, tmp_path)
    text = (tmp_path / "rejection-tables.md").read_text()
    assert "| aware | confidence |" in text
    assert "| 0, 1 | 10.0 / 10.0 / 10.0 | 83.0 | 85.0 | +3.0 ± 1.0 | +3.0 ± 1.0 | 84.0 | 10 / 20 / 40 | 90.0 |" in text
    assert "| aware-s0 | pair | 50.0 | 49.5 | 49.0 |" in text
    assert "of 2 lines with several seeds: aware by confidence." in text
    assert (tmp_path / "rejection-digits.svg").is_file()
    written(tmp_path, "cpr-pgd-at", 0, {"small ball": 0.95})
    write(tmp_path, tmp_path)
    # A baseline without enough common seeds hides no winner: nothing is above it.
    assert "of 2 lines with several seeds: none." in (tmp_path / "rejection-tables.md").read_text()
    assert set(json.loads((tmp_path / "rejection.json").read_text())["digits"]) == {"rows", "second"}
