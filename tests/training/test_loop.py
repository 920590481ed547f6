import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ducat
from ducat import checkpoint, methods
from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.dummy import DummyLinear, RecoveredClassifier, dummy_head
from ducat.runs import RunFolder
from ducat.training import train
from tests.support import TINY, Watcher, unvalidated

pytestmark = pytest.mark.slow


def with_dummies(kind: str, start_epoch: int = 1) -> Config:
    return replace(TINY, dummy=DummyConfig(kind, start_epoch=start_epoch))  # type: ignore[arg-type]


def weights(folder: Path, which: str) -> dict[str, torch.Tensor]:
    model = ducat.load(folder, which)  # type: ignore[arg-type]
    return (model.model if isinstance(model, RecoveredClassifier) else model).state_dict()


def test_a_run_leaves_its_folder_and_its_deployed_model(tmp_path: Path) -> None:
    folder = train(with_dummies("published"), tmp_path)
    assert folder.path == tmp_path / "run"
    assert folder.config == with_dummies("published").resolve(ducat.data.SPECS["digits"])
    ids = json.loads((folder.path / "train_ids.json").read_text())
    assert ids == ducat.data.load("digits", samples=64).train.ids.tolist()
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["seed"] == 0
    assert manifest["data"]["fingerprint"].startswith("sha256:")
    assert [row["epoch"] for row in folder.metrics] == [0, 1, 2]
    assert [row["dummy_classes"] for row in folder.metrics] == ["off", "published", "published"]
    assert all(0 <= row["robust"] <= row["blind"] <= row["clean"] <= 1 for row in folder.metrics)
    model = ducat.load(folder.path)
    assert isinstance(model, RecoveredClassifier)
    assert not model.training
    x, _ = ducat.data.load_test("digits", 10)
    assert model(x).shape == (10, 10)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    runs = [replace(TINY, name=f"run{n}", train=replace(TINY.train, seed=seed)) for n, seed in enumerate((0, 0, 1))]
    before = torch.random.get_rng_state()
    first, same, other = (weights(train(config, tmp_path).path, "last") for config in runs)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state was changed"
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_name_is_never_overwritten(tmp_path: Path) -> None:
    train(TINY, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(FileExistsError, match="never overwritten: give another --name"):
        train(TINY, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[methods.Objective]:
    """Record what each step minimised."""
    objectives: list[methods.Objective] = []
    loss = methods.Objective.loss

    def spy(self: methods.Objective, *arguments: object) -> torch.Tensor:
        objectives.append(self)
        return loss(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(methods.Objective, "loss", spy)
    return objectives


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["published", "recovery-aware"])
def test_dummy_classes_come_in_at_the_start_epoch(tmp_path: Path, kind: str, seen: list[methods.Objective]) -> None:
    train(with_dummies(kind, start_epoch=2), tmp_path)
    steps = len(seen) // 3
    assert [objective.targets is not None for objective in seen] == [False] * (2 * steps) + [True] * steps


@pytest.mark.slow
def test_recovery_aware_dummy_rows_are_copies_until_the_switch(tmp_path: Path) -> None:
    config = with_dummies("recovery-aware", start_epoch=2)
    after = dummy_head(train(replace(config, name="after"), tmp_path).load("last"))
    assert isinstance(after, DummyLinear)
    assert not torch.equal(after.weight[:10], after.weight[10:])
    # Stopped before the switch, the recovered classifier is the base method's.
    before = dummy_head(_stop_after(config, tmp_path, epochs=1).load("last"))
    assert isinstance(before, DummyLinear)
    assert torch.equal(before.weight[:10], before.weight[10:])
    assert torch.equal(before.bias[:10], before.bias[10:])


def _stop_after(config: Config, root: Path, epochs: int) -> RunFolder:
    with pytest.raises(KeyboardInterrupt):
        train(config, root, Watcher(leave_after=epochs))
    return RunFolder.open(root / config.name)


@pytest.mark.slow
def test_best_is_chosen_by_robust_validation_accuracy_with_dummy_classes_in_use(tmp_path: Path) -> None:
    robust = iter([0.9, 0.3, 0.5, 0.4])
    best = []

    class Listener(Watcher):
        def epoch(self, row: dict[str, Any]) -> None:
            path = RunFolder.open(tmp_path / "run").checkpoint_path("best")
            best.append(checkpoint.read(path)[1]["position"]["epoch"] - 1 if path.is_file() else None)

    def validate(model: torch.nn.Module, split: ducat.data.Images) -> dict[str, float]:
        return {"clean": 1.0, "blind": 1.0, "robust": next(robust)}

    config = with_dummies("published")
    train(replace(config, train=replace(config.train, epochs=4)), tmp_path, Listener(), validate=validate)
    assert best == [None, 1, 2, 2], "epoch 0 is before dummy classes, epoch 3 is worse than epoch 2"


@pytest.mark.slow
def test_test_images_are_never_looked_at(tmp_path: Path) -> None:
    dataset = ducat.data.load("digits", samples=64)
    ruined = replace(dataset, test=replace(dataset.test, images=torch.zeros_like(dataset.test.images)))
    first = train(TINY, tmp_path / "first")
    second = train(replace(TINY, data=DataConfig("digits")), tmp_path / "second", data=ruined)
    assert [(row["loss"], row["robust"]) for row in first.metrics] == [
        (row["loss"], row["robust"]) for row in second.metrics
    ]


@pytest.mark.parametrize("chosen", [{"samples": 64}, {"held_out": 0}])
def test_what_is_chosen_from_given_data_is_refused(chosen: dict[str, int], tmp_path: Path) -> None:
    config = replace(TINY, data=DataConfig("digits", **chosen))
    with pytest.raises(ValueError, match=rf"data\.{next(iter(chosen))} has no effect on data that are given"):
        train(config, tmp_path, data=ducat.data.load("digits", samples=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": MethodConfig(weight=3)}, r"method\.weight=3 has no effect with method\.name=pgd-at: leave it out"),
        (
            {"method": MethodConfig("consistency", clip_start=False)},
            r"clip_start=False has no effect with .*consistency",
        ),
        ({"method": MethodConfig("mart", clip_start=False, attack="n-fgsm")}, "clip_start=False has .*attack=n-fgsm"),
        ({"train": replace(TINY.train, batch_norm="separate")}, r"train\.batch_norm=separate has no effect with"),
        ({"method": MethodConfig(attack="pgd-cosine")}, r"threat\.steps=2 has no .*=pgd-cosine: leave it out, or at"),
        (
            {"method": MethodConfig(attack="n-fgsm"), "threat": ThreatConfig(eps=0.1, step_size=0.02)},
            r"threat\.step_size=0\.02 has no effect with .*n-fgsm: leave it out$",
        ),
        ({"method": MethodConfig("natural")}, r"threat\.steps=2 has no effect with method\.name=natural"),
    ],
)
def test_what_nothing_reads_is_refused_before_a_run_begins(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(TINY, **change), tmp_path)
    assert not list(tmp_path.iterdir())


def test_padding_of_crops_that_are_resized_is_refused() -> None:
    config = Config(data=DataConfig("imagenet", crop_padding=4))
    with pytest.raises(ValueError, match=r"data\.crop_padding=4 has no effect with data\.name=imagenet"):
        config.check_read(ducat.data.SPECS["imagenet"])
    replace(config, data=DataConfig("imagenet", crop_padding=0)).check_read(ducat.data.SPECS["imagenet"])


@pytest.mark.parametrize("asked", [{"width": 4}, {"normalization": "none"}])
def test_settings_of_a_network_that_our_checkpoint_contradicts_are_refused(asked: dict, tmp_path: Path) -> None:
    model = ModelConfig("small", weights="zoo:digits-pgd-at")
    with pytest.raises(
        ValueError, match=rf"model\.{next(iter(asked))}=.*is not that of the network in model.weights: leave it out"
    ):
        train(replace(TINY, model=replace(model, **asked)), tmp_path)
    train(replace(TINY, model=replace(model, normalization="data")), tmp_path, validate=unvalidated)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = methods.Objective.loss, []

    def broken(self: methods.Objective, *arguments: object) -> torch.Tensor:
        calls.append(1)
        value = loss(self, *arguments)  # type: ignore[arg-type]
        return value * math.nan if len(calls) == 4 else value

    monkeypatch.setattr(methods.Objective, "loss", broken)
    with pytest.raises(FloatingPointError, match=r"nan at epoch 1, step 1; the last good checkpoint is .*last"):
        train(TINY, tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run", "last").values())
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_the_model_learns_and_adversarial_training_makes_it_robust(tmp_path: Path) -> None:
    settings = TrainConfig(epochs=12, batch_size=64, learning_rate=0.3, schedule="one-cycle", validate_every=12)
    accuracy: dict[str, dict] = {}
    for method in ("natural", "pgd-at"):
        config = Config(
            name=method,
            data=DataConfig("digits"),
            method=ducat.config.MethodConfig(method),
            threat=ThreatConfig(eps=0.1),
            train=settings,
        )
        accuracy[method] = train(config, tmp_path).metrics[-1]
    assert accuracy["natural"]["clean"] > 0.9
    assert accuracy["pgd-at"]["clean"] > 0.8
    assert accuracy["pgd-at"]["robust"] > accuracy["natural"]["robust"] + 0.2


def test_settings_that_do_not_fit_the_data_are_named(tmp_path: Path) -> None:
    too_large = replace(TINY, train=replace(TINY.train, batch_size=500))
    with pytest.raises(ValueError, match="batch_size=500"):
        train(too_large, tmp_path)
    with pytest.raises(FileNotFoundError, match="data set digit is not prepared"):
        train(replace(TINY, data=DataConfig("digit")), tmp_path)
    assert not list(tmp_path.iterdir()), "a run folder was made for a run that could not start"


@pytest.mark.slow
def test_a_compiled_network_is_trained_like_any_other(tmp_path: Path) -> None:
    # In a process of its own, since the tests' type checker cannot be traced. What may fail on a network of ours is the
    # tracing; what a C compiler makes of it is PyTorch's.
    config = replace(with_dummies("recovery-aware"), train=replace(TINY.train, epochs=2, compile=True))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    code = f"""
import sys, functools, torch
torch.set_num_threads(1)
torch.compile = functools.partial(torch.compile, backend="aot_eager")
from ducat.cli import main
sys.exit(main(["train", "--config", {str(tmp_path / "config.yaml")!r}, "--runs", {str(tmp_path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work" not in done.stdout + done.stderr
    found = weights(tmp_path / "run", "last")
    plain = weights(
        train(replace(config, name="plain", train=replace(config.train, compile=False)), tmp_path).path, "last"
    )
    assert all(torch.allclose(found[name].float(), plain[name].float(), atol=1e-3) for name in plain)


@pytest.mark.slow
def test_training_goes_on_without_a_compiler_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(network: torch.nn.Module, **options: object) -> torch.nn.Module:
        class Broken(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                raise RuntimeError("no C compiler")

        return Broken()

    monkeypatch.setattr(torch, "compile", broken)
    listener = Watcher()
    config = replace(TINY, train=replace(TINY.train, epochs=1, compile=True))
    folder = train(config, tmp_path, listener)
    assert folder.manifest["status"] == "finished"
    assert listener.warnings == ["torch.compile does not work here (RuntimeError): training without it"]


def test_training_attacks_a_folded_copy_of_the_network_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ducat.models.folded import Folded

    differences = []
    attack = methods.Objective.attack

    def spy(self: methods.Objective, model: torch.nn.Module, x: torch.Tensor, *others: object) -> torch.Tensor:
        assert isinstance(model, Folded)
        network = model._source[0]
        training = network.training
        with torch.no_grad():
            differences.append(float((network.eval()(x) - model(x)).abs().max()))
        network.train(training)
        return attack(self, model, x, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(methods.Objective, "attack", spy)
    train(TINY, tmp_path)
    assert len(differences) == 6
    assert max(differences) < 1e-4
