import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ducat
from ducat import checkpoint
from ducat.config import Config, DataConfig, DummyConfig, TrainConfig
from ducat.evaluation import Evaluation, studies
from ducat.evaluation.runs import evaluate_run
from ducat.reporting import plots
from ducat.runs import RunFolder
from ducat.training import train

pytestmark = pytest.mark.slow  # all of them need three trained networks

SAMPLES = 80


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three evaluated runs, of different seeds and kinds."""
    root, made = tmp_path_factory.mktemp("runs"), []
    for seed, kind in enumerate(("off", "off", "published")):
        config = Config(
            data=DataConfig("digits", samples=400),
            train=TrainConfig(epochs=6, learning_rate=0.3, schedule="one-cycle", validate_every=6, seed=seed),
            dummy=DummyConfig(kind, start_epoch=3),
        )
        folder = train(config, root)
        evaluate_run(folder, "quick", samples=SAMPLES, threat=ducat.ThreatModel(eps=0.03))
        made.append(folder.path)
    return made


def predictions(run: Path, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return ducat.load(run)(x).argmax(1).numpy()


def test_always_failed_counts_samples_that_fail_on_every_model_under_their_own_attack(runs: list[Path]) -> None:
    found = studies.always_failed(runs)
    y = ducat.data.load_test("digits", SAMPLES)[1].numpy()
    failed = np.stack([predictions(run, Evaluation.load(run).adversarial) != y for run in runs])
    numbers = found.to_dict()
    assert list(numbers["failed"].values()) == failed.sum(1).tolist()
    assert numbers["failed_on_every"] == failed.all(0).sum()
    assert 0 < numbers["failed_on_every"] < numbers["failed_on_some"] < SAMPLES, "the test wants a mixture"
    assert numbers["share_of_samples"] == failed.all(0).sum() / SAMPLES
    assert numbers["share_of_failures"] == failed.all(0).sum() / failed.any(0).sum()
    assert list(numbers["classes"]) == list("0123456789")
    for label, counts in enumerate(numbers["classes"].values()):
        assert counts["samples"] == (y == label).sum()
        assert counts["failed_on_every"] == failed.all(0)[y == label].sum()
        assert counts["failed_on_some"] == failed.any(0)[y == label].sum()


def test_transfer_shows_every_models_images_to_every_other(runs: list[Path]) -> None:
    found = studies.transfer(runs)
    x, labels = ducat.data.load_test("digits", SAMPLES)
    y = labels.numpy()
    for row, source in enumerate(runs):
        images = Evaluation.load(source).adversarial
        own_clean, own_broken = predictions(source, x) == y, predictions(source, images) != y
        for column, target in enumerate(runs):
            counted = predictions(target, x) == y
            fooled = predictions(target, images) != y
            for name, group in {
                "success": counted & own_clean,
                "effective": counted & own_clean & own_broken,
                "ineffective": counted & ~own_broken,
            }.items():
                expected = fooled[group].mean() if group.any() else np.nan
                np.testing.assert_allclose(getattr(found, name)[row, column], expected, rtol=1e-6, err_msg=name)
    assert (found.effective.diagonal() == 1).all()
    assert (found.ineffective.diagonal() == 0).all()


def test_a_checkpoint_that_was_not_evaluated_is_refused(runs: list[Path]) -> None:
    evaluation = Evaluation.load(runs[0])
    numbers = runs[0] / "evaluation.json"
    kept = {path: path.read_bytes() for path in (numbers, numbers.with_suffix(".safetensors"))}
    try:
        replace(evaluation, robust=~evaluation.robust).save(numbers, replace=True)
        with pytest.raises(ValueError, match="its best checkpoint is not the one that was evaluated"):
            studies.transfer(runs)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def test_always_failed_is_not_of_weights_that_are_gone(runs: list[Path], tmp_path: Path) -> None:
    changed = Path(shutil.copytree(runs[0], tmp_path / "changed"))
    file = changed / "checkpoints" / "best" / "checkpoint.safetensors"
    tensors, state = checkpoint.read(file)
    checkpoint.save(file, {name: value + value.new_ones(()) for name, value in tensors.items()}, state)
    with pytest.raises(ValueError, match="changed has been trained on since it was evaluated: run `ducat evaluate"):
        studies.always_failed([runs[1], changed])


def test_studies_are_of_runs_evaluated_alike(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two evaluated runs"):
        studies.always_failed(runs[:1])
    folder = RunFolder.create(tmp_path / "other")
    folder.write_config(RunFolder.open(runs[0]).config)
    with pytest.raises(FileNotFoundError, match="run `ducat evaluate"):
        studies.always_failed([runs[0], folder.path])
    evaluation = Evaluation.load(runs[0])
    for change in ({"fingerprint": "of others"}, {"threat": ducat.ThreatModel(eps=0.1)}):
        replace(evaluation, **change).save(folder.evaluation_path, replace=True)
        with pytest.raises(ValueError, match="not evaluated on the same samples in the same ball"):
            studies.transfer([runs[0], folder.path])


def test_a_run_is_not_compared_with_itself(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs[0].parent)
    for study in (studies.always_failed, studies.transfer):
        for same in (runs[0], Path(runs[0].name)):
            with pytest.raises(ValueError, match="is given twice"):
                study([runs[0], runs[1], same])


def test_outputs_that_are_not_finite_are_right_about_nothing(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowing(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1)) * torch.nan

    x, y = ducat.data.load_test("digits", SAMPLES)
    assert (y == 0).any()  # the largest of numbers that are none is said to be the first
    monkeypatch.setattr(studies, "_deployed", lambda run, which: Overflowing(64, 10))
    monkeypatch.setattr(studies, "load_corruptions", lambda *arguments: [("fog", 1, x, y)])
    assert studies.corruption(runs[0], "digits-c").accuracy["fog"] == (0.0,)
    monkeypatch.setattr(RunFolder, "load", lambda folder, which: Overflowing(64, 10))
    found = studies.targeted(runs[0], samples=SAMPLES, steps=1)
    assert (found.withstood["blind"], found.correct["blind"]) == (1.0, 0.0)


def test_corruption_error_is_the_mean_over_corruptions_and_severities(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = ducat.data.load_test("digits", SAMPLES)
    corrupted = {
        (kind, severity): (x + sign * severity * 0.12).clamp(0, 1)
        for kind, sign in (("brighter", 1), ("darker", -1))
        for severity in range(1, 6)
    }

    def load(name: str, samples: int | None, root: Path | None) -> list[tuple[str, int, torch.Tensor, torch.Tensor]]:
        assert (name, samples) == ("digits-c", SAMPLES)
        return [(*key, images, y) for key, images in corrupted.items()]

    monkeypatch.setattr(studies, "load_corruptions", load)
    found = studies.corruption(runs[2], "digits-c", samples=SAMPLES)
    right = {key: (predictions(runs[2], images) == y.numpy()).mean() for key, images in corrupted.items()}
    for kind in ("brighter", "darker"):
        np.testing.assert_allclose(found.accuracy[kind], [right[kind, severity] for severity in range(1, 6)], rtol=1e-6)
    assert found.mean_error == pytest.approx(1 - np.mean(list(right.values())))
    assert len(set(right.values())) > 3, "the corruptions must tell the severities apart"
    with pytest.raises(ValueError, match="no corrupted images of digits"):
        studies.corruption(runs[2])


def test_a_targeted_attack_counts_where_the_wanted_class_wins(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ducat.cli import main

    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    plain = studies.pgd

    def watched(network, x, wanted, *arguments, **options):
        found = plain(network, x, wanted, *arguments, **options)
        seen.append((x, wanted, found))
        return found

    monkeypatch.setattr(studies, "pgd", watched)
    y = ducat.data.load_test("digits", SAMPLES)[1].numpy()
    for run, attackers in ((runs[0], ["blind"]), (runs[2], ["blind", "aware"])):
        seen.clear()
        found = studies.targeted(run, samples=SAMPLES, steps=5).to_dict()
        assert list(found["withstood"]) == attackers
        for attacker, (x, wanted, images) in zip(attackers, seen, strict=True):
            assert RunFolder(run).config.threat.build(None).allows(images, x).all()
            assert (wanted.numpy() != y).all()
            predicted = predictions(run, images)
            assert found["withstood"][attacker] == pytest.approx((predicted != wanted.numpy()).mean())
            assert found["correct"][attacker] == pytest.approx((predicted == y).mean())
            assert found["correct"][attacker] <= found["withstood"][attacker]
    # An attacker who knows recovery gets the wanted class more often.
    assert found["withstood"]["aware"] < found["withstood"]["blind"]
    figure = tmp_path / "targeted.svg"
    assert main(["analyze", "targeted", str(runs[2]), "--samples", "20", "--figure", str(figure)]) == 0
    assert figure.stat().st_size > 1000
    assert main(["analyze", "targeted", *map(str, runs)]) == 2


def test_a_targeted_attack_takes_not_the_steps_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunFolder.open("zoo:digits-published").config

    def correct(step_size: float | None) -> Mapping[str, float]:
        trained = replace(config, threat=replace(config.threat, step_size=step_size))
        monkeypatch.setattr(RunFolder, "config", trained)
        return studies.targeted(Path("zoo:digits-published"), samples=20, steps=5).correct

    assert correct(1e-4) == correct(None)


def test_studies_are_of_runs_evaluated_by_one_suite(runs: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs[1], tmp_path / "other"))
    evaluate_run(RunFolder.open(other), "light", samples=SAMPLES, threat=ducat.ThreatModel(eps=0.03))
    for study in (studies.always_failed, studies.transfer):
        with pytest.raises(ValueError, match="by the same suite"):
            study([runs[0], other])


def test_always_failed_tells_an_upper_bound_and_takes_no_options(runs: list[Path], tmp_path: Path) -> None:
    found = studies.always_failed(runs)
    assert "upper bound" not in found.sheet().title
    bound = replace(found, bounds=("one",))
    assert "at least as many" in bound.sheet().title
    titles = [plots.always_failed(one.to_dict()).get_suptitle() for one in (found, bound)]
    assert [title.startswith("at least ") for title in titles] == [False, True]
    for study, which, samples in (("always-failed", "last", None), ("always-failed", None, 5), ("transfer", None, 5)):
        with pytest.raises(ValueError, match="does not fit: the study is of the images"):
            studies.STUDIES[study](runs, which, samples, lambda text: None)
