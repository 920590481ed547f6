import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import check_estimator

import ducat
from ducat import RobustClassifier
from ducat.cli import main
from ducat.runs import RunFolder

TINY = {"epochs": 2, "steps": 1, "batch_size": 32, "random_state": 0}
IN_PLACE = "scikit-learn's Pipeline fits its steps in place, whatever they are"


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.images[:500].astype(np.float32) / 16, np.array([f"digit {label}" for label in data.target[:500]])


@pytest.fixture(scope="module")
def fitted(digits: tuple[np.ndarray, np.ndarray]) -> RobustClassifier:
    x, y = digits
    return RobustClassifier(epochs=12, steps=2, eps=0.1, batch_size=32, random_state=0).fit(x[:400], y[:400])


@pytest.mark.slow
def test_it_learns_and_predicts_the_labels_it_was_given(
    fitted: RobustClassifier, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    x, y = digits
    predicted = fitted.predict(x[400:])
    assert set(predicted) <= set(y)
    assert fitted.score(x[400:], y[400:]) == pytest.approx((predicted == y[400:]).mean())
    assert fitted.score(x[400:], y[400:]) > 0.6  # a tenth by guessing
    probabilities = fitted.predict_proba(x[400:])
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_array_equal(fitted.classes_[probabilities.argmax(1)], predicted)


@pytest.mark.slow
def test_evaluation_shows_blind_and_robust(fitted: RobustClassifier, digits: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = digits
    measured = fitted.evaluate(x[400:450], y[400:450], suite="quick")
    assert float(measured.clean.float().mean()) == pytest.approx(fitted.score(x[400:450], y[400:450]))
    assert measured.robust.sum() <= measured.blind.sum() <= measured.clean.sum()
    assert measured.threat.eps == pytest.approx(0.1)
    with pytest.raises(ValueError, match="'ten', which is not among the classes"):
        fitted.evaluate(x[:1], ["ten"])


@pytest.mark.slow
def test_a_run_folder_is_left_that_the_commands_take(
    digits: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = digits
    run = tmp_path / "runs" / "mine"
    flat = x[:200].reshape(200, 64)
    classifier = RobustClassifier(**TINY, image_shape=(8, 8), run_folder=run).fit(flat, y[:200])
    assert main(["evaluate", str(run), "--suite", "quick"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["samples"] == 20
    assert ducat.data.load("arrays", root=run.with_name("mine-data")).classes == tuple(classifier.classes_)
    with pytest.raises(FileExistsError, match="never overwritten"):
        classifier.fit(flat, y[:200])
    deployed = ducat.load(run, "last")(torch.from_numpy(x[:20, None])).argmax(1)
    np.testing.assert_array_equal(classifier.predict(flat[:20]), classifier.classes_[deployed])


def test_the_images_of_another_run_are_not_overwritten(digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    x, y = digits
    classifier = RobustClassifier(**TINY, run_folder=tmp_path / "run").fit(x[:60], y[:60])
    (tmp_path / "run").rename(tmp_path / "first")
    with pytest.raises(FileExistsError, match=r"run-data/arrays\.safetensors holds the images of another run"):
        classifier.fit(1 - x[:60], y[:60])
    RunFolder.open(tmp_path / "first").dataset()  # which refuses other images
    classifier.fit(x[:60], y[:60])  # the same may be shared


@pytest.mark.parametrize(
    ("settings", "shape", "scale", "message"),
    [
        ({}, (20, 8, 8), 255, "X goes up to 255, outside \\[0, 1\\]: scale it"),
        ({}, (20, 8, 8), -1, "Negative values"),
        ({"image_shape": (7, 7)}, (20, 64), 1, "image_shape=\\(7, 7\\) does not fit the 64 features"),
        ({}, (20, 1, 8, 8, 1), 1, "dim 5"),
        ({"eps": 8}, (20, 8, 8), 1, "did you mean 8/255"),
        ({"method": "pgdat"}, (20, 8, 8), 1, "did you mean pgd-at"),
    ],
)
def test_bad_input_says_what_to_do(settings: dict, shape: tuple[int, ...], scale: float, message: str) -> None:
    y = np.arange(20) % 2
    with pytest.raises(ValueError, match=message):
        RobustClassifier(**{**TINY, **settings}).fit(np.full(shape, scale, np.float32), y)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learns_checks_pass_on_data_in_the_range_of_images() -> None:
    """Most checks draw data from all the numbers there are, so the estimator stands behind a scaler to [0, 1]."""
    estimator = make_pipeline(MinMaxScaler(clip=True), RobustClassifier(**TINY))
    check_estimator(
        estimator,
        expected_failed_checks={
            "check_estimators_overwrite_params": IN_PLACE,
            "check_dont_overwrite_parameters": IN_PLACE,
        },
        on_skip=None,
    )


@pytest.mark.slow
def test_scikit_learns_checks_fail_on_the_bare_estimator_only_for_the_range_of_their_data() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(RobustClassifier(**TINY), on_skip=None, on_fail=None)
    failed = {result["check_name"]: str(result["exception"]) for result in results if result["status"] == "failed"}
    other = {name: why for name, why in failed.items() if "outside [0, 1]" not in why}
    assert not other
    assert sum(result["status"] == "passed" for result in results) > 25


@pytest.mark.slow
def test_scikit_learn_is_imported_when_it_is_asked_for() -> None:
    script = "import sys, ducat; before = 'sklearn' in sys.modules; ducat.RobustClassifier; assert not before"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    with pytest.raises(AttributeError, match="RobustClasifier"):
        ducat.RobustClasifier  # noqa: B018
