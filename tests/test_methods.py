from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ducat
from ducat import checkpoint
from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, ThreatConfig, TrainConfig
from ducat.data.batches import Batches
from ducat.data.images import Images
from ducat.methods import ATTACKS, METHODS, Objective
from ducat.runs import RunFolder
from ducat.threat import ThreatModel
from ducat.training import Interrupted, resume, train
from ducat.training.validation import catastrophic_overfitting
from tests import support
from tests.support import Watcher, unvalidated

TINY = replace(support.TINY, train=replace(support.TINY.train, batch_size=16))
EMA = {"averaging": "ema", "averaging_decay": 0.5, "averaging_start_epoch": 0}
SWA = {"averaging": "swa", "averaging_start_epoch": 0}


def config(method: dict[str, Any] | None = None, kind: str = "off", **settings: Any) -> Config:
    return replace(
        TINY,
        method=MethodConfig(**(method or {})),
        threat=TINY.threat if method is None or "attack" not in method else ThreatConfig(),
        dummy=DummyConfig(kind, start_epoch=1),  # type: ignore[arg-type]
        train=replace(TINY.train, **settings),
    )


def tensors(folder: RunFolder, which: str = "last") -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds, but for the states of the process's own random generators."""
    saved, _ = checkpoint.read(folder.checkpoint_path(which))  # type: ignore[arg-type]
    return {name: tensor for name, tensor in saved.items() if not name.startswith("random.")}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


# --- single-step attacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("attack", "noise", "step", "ball"),
    # In units of eps: radius of the random start, length of the step, radius that the result is cut to.
    [("fgsm-rs", 1, 1.25, 1), ("n-fgsm", 2, 1, None)],
)
def test_single_step_attacks(attack: str, noise: float, step: float, ball: float | None, norm: str) -> None:
    # On a linear network the gradient of the margin is the same everywhere.
    eps, weight = 0.05, np.array([[0.2, -0.4, 0.1, 0.3]])
    with torch.no_grad():
        linear = nn.Linear(4, 2, bias=False)
        linear.weight.copy_(torch.tensor(np.concatenate([0 * weight, weight])))
    model, x = nn.Sequential(nn.Flatten(), linear), torch.full((3, 1, 2, 2), 0.5)
    threat, y = ThreatModel(norm, eps, steps=7), torch.zeros(3, dtype=torch.long)  # type: ignore[arg-type]
    objective = Objective(METHODS["pgd-at"], inner=ATTACKS[attack])
    found = objective.attack(model, x, y, threat, torch.Generator().manual_seed(0)).numpy().reshape(3, 4)

    start = replace(threat, eps=noise * eps).random_start(x, torch.Generator().manual_seed(0)).numpy().reshape(3, 4)
    direction = np.sign(weight) if norm == "linf" else weight / np.linalg.norm(weight)
    delta = start + step * eps * direction - 0.5
    if ball is not None and norm == "linf":
        delta = np.clip(delta, -ball * eps, ball * eps)
    elif ball is not None:
        delta *= np.minimum(1, ball * eps / np.linalg.norm(delta, axis=1, keepdims=True))
    np.testing.assert_allclose(found, 0.5 + delta, atol=1e-6)


def test_the_noise_of_n_fgsm_leaves_the_ball_but_never_the_range_of_pixels() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    objective = Objective(METHODS["pgd-at"], inner=ATTACKS["n-fgsm"])
    x, y = torch.rand(64, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(64, dtype=torch.long)
    for eps in (0.1, 0.6):
        found = objective.attack(model, x, y, ThreatModel(eps=eps), torch.Generator().manual_seed(0))
        assert found.min() >= 0
        assert found.max() <= 1
        assert eps < (found - x).abs().max() <= 3 * eps


@pytest.mark.slow
def test_pgd_cosine_is_as_strong_as_ten_equal_steps_in_half_of_them(
    templates: tuple[nn.Sequential, torch.Tensor, torch.Tensor],
) -> None:
    # A network that is not linear in the ball: some kinks for the long first steps to run into.
    linear, x, y = templates
    model = nn.Sequential(linear, nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    with torch.no_grad():
        random = torch.Generator().manual_seed(0)
        for layer in (model[1], model[3]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random))
            layer.bias.zero_()
    calls: list[int] = []
    model.register_full_backward_hook(lambda *_: calls.append(1))
    threat, reached = ThreatModel(eps=0.05), {}
    for name in ("pgd", "pgd-cosine"):
        objective = Objective(METHODS["pgd-at"], inner=ATTACKS[name])
        calls.clear()
        found = objective.attack(model, x.double(), y, threat, torch.Generator().manual_seed(1))
        reached[name] = len(calls), nn.functional.cross_entropy(model(found), y).item()
        assert threat.allows(found, x.double()).all()
    assert [reached[name][0] for name in reached] == [10, 5]
    assert reached["pgd-cosine"][1] >= 0.995 * reached["pgd"][1]


@pytest.mark.parametrize("method", METHODS)
def test_a_single_step_attack_takes_one_gradient(method: str) -> None:
    calls = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model.register_full_backward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long)
    Objective(METHODS[method], inner=ATTACKS["fgsm-rs"]).attack(model, x, y, ThreatModel(eps=0.1))
    assert len(calls) == (METHODS[method].objective is not None)


# --- catastrophic overfitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], False),
        ([(0.4, 0.3)], False),
        ([(0.4, 0.3), (0.5, 0.4), (0.9, 0.02)], True),
        ([(0.4, 0.3), (0.9, 0.02), (0.95, 0.0)], True),
        ([(0.4, 0.3), (0.9, 0.02), (0.5, 0.35)], False),  # recovered
        ([(0.4, 0.3), (0.5, 0.16)], False),  # not by half
        ([(0.4, 0.3), (0.3, 0.05)], False),  # FGSM accuracy falls as well: the network just got worse
        ([(0.05, 0.02), (0.3, 0.0)], False),  # too little to lose
        ([(0.4, 0.3), None, (0.9, 0.02)], True),  # an epoch without validation
        ([None], False),
    ],
)
def test_catastrophic_overfitting(history: list[tuple[float, float] | None], expected: bool) -> None:
    rows = [{"fgsm": row[0], "pgd": row[1]} if row else {"loss": 1.0} for row in history]
    assert catastrophic_overfitting(rows) is expected


@pytest.mark.slow
def test_catastrophic_overfitting_is_recorded_and_told_once(tmp_path: Path) -> None:
    measured = iter([(0.4, 0.3), (0.9, 0.02), (0.95, 0.01), (0.9, 0.25)])

    def validate(model: nn.Module, split: ducat.data.Images) -> dict[str, float]:
        fgsm, pgd = next(measured)
        return {"clean": 1.0, "blind": 1.0, "robust": pgd, "fgsm": fgsm, "pgd": pgd}

    listener = Watcher()
    folder = train(config({"attack": "fgsm-rs"}, epochs=4), tmp_path, listener, validate=validate)
    assert [row.get("catastrophic_overfitting", False) for row in folder.metrics] == [False, True, True, False]
    (warning,) = listener.warnings
    assert "epoch 1: PGD accuracy has fallen to 0.020 while FGSM accuracy is up at 0.900" in warning
    assert "method.attack=fgsm-rs" in warning


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "watched"), [("pgd", False), ("n-fgsm", True)])
def test_validation_measures_fgsm_and_pgd_where_training_takes_one_step(
    tmp_path: Path, attack: str, watched: bool
) -> None:
    (row,) = train(config({"attack": attack}, epochs=1), tmp_path).metrics
    assert ("fgsm" in row) is ("pgd" in row) is watched
    if watched:
        assert row["robust"] <= row["pgd"] <= row["clean"]


# --- averaged and perturbed weights --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        config({"name": "trades", "weight": 2, "label_smoothing": 0.1}, "published", **EMA),
        config({"name": "consistency"}, "recovery-aware", **SWA),
        config({"name": "mart", "attack": "n-fgsm"}, "recovery-aware", awp=0.01, awp_start_epoch=1),
    ],
    ids=["ema", "swa", "awp"],
)
def test_a_run_stopped_in_the_middle_goes_on_bit_by_bit(tmp_path: Path, settings: Config) -> None:
    whole = train(settings, tmp_path / "whole", validate=unvalidated)
    with pytest.raises(Interrupted):
        train(settings, tmp_path, Watcher(signal_after=6), validate=unvalidated)  # of 12: in the middle of epoch 1
    folder = resume(tmp_path / "run", validate=unvalidated)
    assert differing(tensors(whole), tensors(folder)) == []
    assert [row["loss"] for row in whole.metrics] == [row["loss"] for row in folder.metrics]
    assert all(torch.isfinite(tensor).all() for tensor in tensors(folder).values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["off", "published", "recovery-aware"])
def test_the_mean_of_the_weights_is_what_is_saved_and_loaded(tmp_path: Path, kind: str) -> None:
    epochs: list[dict[str, torch.Tensor]] = []

    class Collector(Watcher):
        def epoch(self, row: dict[str, Any]) -> None:
            saved = tensors(RunFolder.open(tmp_path / "run"))
            epochs.append(checkpoint.part("raw", saved) or checkpoint.part("model", saved))

    folder = train(
        config(kind=kind, averaging="swa", averaging_start_epoch=1), tmp_path, Collector(), validate=unvalidated
    )
    plain = train(replace(config(kind=kind), name="plain"), tmp_path, validate=unvalidated)
    assert differing(epochs[-1], checkpoint.part("model", tensors(plain))) == [], "averaging changed the training"
    loaded = folder.load("last").state_dict()
    for name, parameter in folder.load("last").named_parameters():
        mean = np.mean([epoch[name].double().numpy() for epoch in epochs[1:]], axis=0)
        np.testing.assert_allclose(parameter.detach().numpy(), mean, atol=1e-6)
        assert not torch.equal(loaded[name], epochs[-1][name])
    assert not torch.equal(loaded["network.1.running_var"], epochs[-1]["network.1.running_var"])


@pytest.mark.slow
@pytest.mark.parametrize("averaging", [EMA, SWA], ids=["ema", "swa"])
def test_until_the_switch_the_average_deploys_the_base_method(tmp_path: Path, averaging: dict[str, Any]) -> None:
    # Also in the middle of an epoch: 6 of 8 steps before the switch at epoch 2.
    settings = replace(config(kind="recovery-aware", **averaging), dummy=DummyConfig("recovery-aware", start_epoch=2))
    with pytest.raises(Interrupted):
        train(settings, tmp_path, Watcher(signal_after=6), validate=unvalidated)
    saved = tensors(RunFolder.open(tmp_path / "run"))
    for prefix in ("model", "raw"):
        weights = checkpoint.part(prefix, saved)
        (head,) = (tensor for tensor in weights.values() if tensor.ndim == 2)
        assert torch.equal(head[:10], head[10:])
    assert not torch.equal(saved["model.network.0.weight"], saved["raw.network.0.weight"])


def test_the_average_is_what_is_validated(tmp_path: Path) -> None:
    seen = []

    def validate(model: nn.Module, split: ducat.data.Images) -> dict[str, float]:
        seen.append(model)
        return unvalidated(model, split)

    folder = train(config(averaging="ema", averaging_start_epoch=2), tmp_path, validate=validate)
    assert len({id(model) for model in seen[:2]}) == 1
    assert seen[2] is not seen[0]
    assert differing(seen[2].state_dict(), checkpoint.part("model", tensors(folder))) == []


@pytest.mark.slow
def test_perturbed_weights_change_the_training_and_update_statistics_once_a_step(tmp_path: Path) -> None:
    plain = train(replace(config(), name="plain"), tmp_path, validate=unvalidated).load("last").state_dict()
    perturbed = train(config(awp=0.05, awp_start_epoch=1), tmp_path, validate=unvalidated).load("last").state_dict()
    assert not torch.equal(plain["network.0.weight"], perturbed["network.0.weight"])
    assert perturbed["network.1.num_batches_tracked"] == plain["network.1.num_batches_tracked"] == 12


# --- recipes and settings ------------------------------------------------------------------------------------------

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read(path: Path) -> None:
    made = Config.from_yaml(path)
    assert path.stem.startswith(made.data.name)
    if path.stem.endswith("-paper"):
        # arXiv 2410.12671: 130 epochs, the rate falls at 100 and 105, dummy classes from 105.
        assert made.dummy.kind == "published"
        assert (made.train.epochs, made.start_epoch) == (130, 105)
        rates = [
            ducat.schedules.learning_rate("multi-step", epoch, 130, milestones=made.train.milestones)
            for epoch in (99, 100, 104, 105)
        ]
        assert rates == pytest.approx([1, 0.1, 0.1, 0.01])


RELEASED = {"cifar10": (50_000, 391), "cifar100": (50_000, 391), "tiny-imagenet": (100_000, 782)}


@pytest.mark.parametrize(("name", "size"), RELEASED.items())
def test_a_released_recipe_counts_as_the_released_code_does(name: str, size: tuple[int, int]) -> None:
    made = Config.from_yaml(RECIPES[0].with_name(f"{name}-released.yaml"))
    spec = ducat.data.SPECS[name]
    assert spec.sizes is not None
    assert made.data.held_out == 0
    assert made.resolve(spec).data.crop_padding == 4
    images = Images(
        torch.zeros(size[0], 1, 1, 1, dtype=torch.uint8), torch.zeros(size[0]).long(), torch.arange(size[0])
    )
    assert spec.sizes[0] == size[0]
    batches = Batches(images, made.train.batch_size, seed=0, augment=None, drop_last=made.train.drop_last)
    assert len(batches) == size[1]
    # Counted from 1 the code has dummy classes from epoch 105 to 130, the first of them at a tenth of the rate.
    active = [epoch for epoch in range(made.train.epochs) if made.objective(epoch).targets is not None]
    assert len(active) == 26
    rates = [
        made.train.learning_rate
        * ducat.schedules.learning_rate("multi-step", epoch + 0.5, 130, milestones=made.train.milestones)
        for epoch in range(made.train.epochs)
    ]
    assert [rates.count(rate) for rate in dict.fromkeys(rates)] == [100, 5, 25]
    assert [rates[epoch] for epoch in active] == pytest.approx([0.01] + [0.001] * 25)
    # The sum of steps times rate with dummy classes: 30 % more than with 25 epochs at 0.001 on 49,000 images.
    if name == "cifar10":
        ours = 25 * 382 * 0.001
        assert len(batches) * sum(rates[epoch] for epoch in active) / ours == pytest.approx(1.433, abs=1e-3)


@pytest.mark.slow
def test_a_run_that_holds_nothing_out_trains_on_all_images_and_says_that_it_has_no_best(tmp_path: Path) -> None:
    settings = replace(config(), data=DataConfig("digits", held_out=0))
    folder = train(settings, tmp_path)
    assert folder.manifest["data"]["train"] == 1297
    assert folder.manifest["data"]["validation"] == 0
    assert folder.checkpoints == ["last"]
    assert "robust" not in folder.metrics[-1]
    with pytest.raises(FileNotFoundError, match=r"no images were held out to choose it by.*choose from last"):
        folder.load()
    assert ducat.load(folder.path, "last")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_there_are_recipes() -> None:
    stems = {path.stem for path in RECIPES}
    assert stems >= {
        *(
            f"{data}-{kind}"
            for data in ("cifar10", "cifar100", "tiny-imagenet")
            for kind in ("paper", "released", "recovery-aware")
        ),
        "digits",
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MethodConfig("pgd-at", cross_entropy="benign"),
            r"method\.cross_entropy=benign does not fit method\.name=pgd-at: leave it at auto, or choose",
        ),
        (lambda: DataConfig(crop_padding=-1), r"data\.crop_padding=-1 must be at least 0"),
        (
            lambda: MethodConfig(attack="fgsm"),
            r"method\.attack=fgsm is unknown: did you mean n-fgsm\? choose from pgd, pgd-cosine, fgsm-rs, n-fgsm",
        ),
        (lambda: MethodConfig(label_smoothing=1.0), r"method\.label_smoothing=1\.0 is outside \[0, 1\)"),
        (
            lambda: TrainConfig(schedule="cyclic"),
            r"train\.schedule=cyclic is unknown: choose from constant, multi-step",
        ),
        (lambda: TrainConfig(epochs=9, milestones=(10,)), r"train\.milestones=10 is not an epoch of this run of 9"),
        (lambda: TrainConfig(averaging_decay=1.0), r"train\.averaging_decay=1\.0 is outside \[0, 1\)"),
        (lambda: TrainConfig(momentum=1.0), r"train\.momentum=1\.0 is outside \[0, 1\)"),
        (lambda: TrainConfig(awp=-1.0), r"train\.awp=-1\.0 must be at least 0"),
        (lambda: TrainConfig(epochs=9, awp_start_epoch=9), r"train\.awp_start_epoch=9 is not an epoch"),
        (lambda: Config(name="../../etc/x"), r"name='\.\./\.\./etc/x' is not the name of a folder"),
        (lambda: Config(name=".."), r"name='\.\.' is not the name of a folder"),
        (lambda: MethodConfig("mixed", weight=6), r"method\.weight=6 is outside \[0, 1\]: it is the share"),
        (lambda: DummyConfig(pair_weight=-1), r"dummy\.pair_weight=-1 must be at least 0"),
        (
            lambda: Config(method=MethodConfig("mixed"), dummy=DummyConfig("published")),
            r"dummy\.kind=published .* mixes .* choose pgd-at, and the share of the benign ones by dummy\.benign_share",
        ),
        (lambda: config(kind="published", epochs=1, milestones=()), r"dummy\.start_epoch=1 is not an epoch"),
    ],
)
def test_settings_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
