"""A run that may refuse, from `ducat calibrate` and `ducat evaluate --reject` to every door out."""

import csv
import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ducat
from ducat import checkpoint
from ducat.attacks.adaptive import BUDGETS, Round, SilentDummies
from ducat.attacks.queries import decisions
from ducat.attacks.suites import SUITES, Suite
from ducat.cli import main
from ducat.evaluation import Evaluation, kept, rejection
from ducat.evaluation.rejection import accepted, log_odds
from ducat.export import Deployed, export, load
from ducat.reporting.compare import Run, compare, tables
from ducat.reporting.page import page
from ducat.reporting.plots import refusing
from ducat.serve.server import Playground


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run that is calibrated, and evaluated with refusals."""
    path = tmp_path_factory.mktemp("refusing") / "tiny"
    # Evaluations of more images would speak for the run.
    shutil.copytree(tiny_run, path, ignore=shutil.ignore_patterns("evaluation*"))
    assert main(["calibrate", str(path), "--reject", "0.1", "--signal", "real"]) == 0
    assert main(["evaluate", str(path), "--suite", "quick", "--samples", "12", "--reject", "0.1"]) == 0
    return path


def test_the_threshold_is_set_on_validation_images(run: Path) -> None:
    calibrated = json.loads((run / "rejection.json").read_text())
    validation = ducat.data.load("digits").validation
    model = ducat.load(run)
    logits, accepted = ducat.SelectiveClassifier(model, "real", calibrated["threshold"])(validation.floats())
    right = logits.argmax(1) == validation.labels
    assert int((~accepted & right).sum()) == int(0.1 * int(right.sum()))
    assert calibrated["images"] == len(validation)
    measured = json.loads((run / "evaluation.json").read_text())["rejection"]
    assert measured["held_out"]
    (row,) = measured["signals"][1]["rows"]
    assert measured["signals"][1]["signal"] == "real"
    assert row["threshold"] == pytest.approx(calibrated["threshold"], abs=1e-4)


def test_thresholds_are_never_set_on_images_that_the_run_was_trained_on(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def held_out(images: int) -> Path:
        """A copy of the tiny run that says to have held out as many."""
        path = tmp_path / str(images)
        shutil.copytree(tiny_run, path, ignore=shutil.ignore_patterns("evaluation*"))
        config, manifest = path / "config.yaml", json.loads((path / "manifest.json").read_text())
        config.write_text(re.sub(r"held_out: .*", f"held_out: {images}", config.read_text()))
        manifest["data"]["fingerprint"] = ducat.data.load("digits", samples=400, held_out=images).fingerprint
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    few = held_out(30)
    assert main(["calibrate", str(few), "--reject", "0.1"]) == 0
    assert json.loads((few / "rejection.json").read_text())["images"] == 30
    assert main(["evaluate", str(few), "--suite", "quick", "--samples", "4", "--reject", "0.1"]) == 0
    assert json.loads((few / "evaluation.json").read_text())["rejection"]["calibrated"] == 30
    capsys.readouterr()
    none = str(held_out(0))
    for command in (["calibrate", none], ["evaluate", none, "--suite", "quick", "--samples", "4"]):
        assert main([*command, "--reject", "0.1"]) == 2
        assert "no images were held out of training" in capsys.readouterr().err


def test_what_was_measured_is_kept_and_shown(run: Path, tmp_path: Path) -> None:
    content = json.loads((run / "evaluation.json").read_text())
    kept = Evaluation.load(run)
    assert kept.rejection is not None
    assert kept.rejection.to_dict() == content["rejection"]
    assert all(warning in content["warnings"] for warning in kept.rejection.warnings)
    report = (run / "report.html").read_text()
    assert "A classifier that may refuse" in report
    assert "--reject 0.1" in report
    assert 'aria-label="Robust with rejection by share of benign images refused.' in report
    assert main(["compare", str(run), "--csv", str(tmp_path / "c.csv"), "--markdown", str(tmp_path / "c.md")]) == 0
    (line,) = csv.DictReader((tmp_path / "c.csv").read_text().splitlines())
    (row,) = content["rejection"]["signals"][0]["rows"]
    assert float(line["confidence_0.1_robust"]) == row["robust"]["share"]
    assert float(line["confidence_0.1_clean_refused"]) == row["clean_refused"]["share"]
    assert "| tiny | confidence | 10 |" in (tmp_path / "c.md").read_text()


def test_an_upper_bound_is_one_with_refusals_too(run: Path, tmp_path: Path) -> None:
    def shown(at_most: bool) -> dict[str, str]:
        """What each door says of a copy of the run, hidden gradients or not."""
        path = tmp_path / str(at_most)
        shutil.copytree(run, path)
        for file in (path / "evaluation.json", *(path / "evaluations").glob("*.json")):
            file.write_text(json.dumps({**json.loads(file.read_text()), "at_most": at_most}))
        assert main(["compare", str(path), "--markdown", str(path / "c.md")]) == 0
        export(path, "robustbench", path / "robustbench")
        measured = Run.read(path)
        comparison = compare([measured])
        page(path / "page.html", "At most", comparison)
        refusals = tables(comparison.sections[0])[1]
        figure = refusing(measured.evaluation["rejection"]["signals"], at_most=at_most)
        return {
            "text": " | ".join(refusals.cells[0]),
            "Markdown": (path / "c.md").read_text(),
            "page": (path / "page.html").read_text(),
            "claim": (path / "robustbench" / "claim.md").read_text(),
            "figure": figure.axes[0].get_ylabel(),
        }

    sure, bound = shown(False), shown(True)
    row = json.loads((run / "evaluation.json").read_text())["rejection"]["signals"][0]["rows"][0]
    robust = f"{100 * row['robust']['share']:.1f} ["
    for door in ("text", "Markdown"):
        assert f"| at most {robust}" in bound[door]
        assert f"| {robust}" in sure[door]
        assert "| at least " in bound[door]
        assert "| at least " not in sure[door]
    assert "of benign images refused. At most: confidence" in bound["page"]
    assert "of benign images refused. At most: " not in sure["page"]
    assert "% of the benign images refused), an upper bound |" in bound["claim"]
    assert "% of the benign images refused), an upper bound |" not in sure["claim"]
    assert bound["figure"] == "robust with rejection, at most (%)"
    assert sure["figure"] == "robust with rejection (%)"


def test_the_doors_out_refuse_what_the_run_refuses(run: Path, tmp_path: Path) -> None:
    threshold = json.loads((run / "rejection.json").read_text())["threshold"]
    x = torch.cat([ducat.data.load_test("digits", 40)[0], torch.rand(20, 1, 8, 8)])
    logits, accepted = ducat.SelectiveClassifier(ducat.load(run), "real", threshold)(x)
    assert 0 < int(accepted.sum()) < 60
    for name in ("safetensors", "hub"):
        export(run, name, tmp_path / name)
    for got in (load(tmp_path / "safetensors")(x), Deployed.read(run, detector=True).classifier(x)):
        torch.testing.assert_close(got[0], logits)
        assert torch.equal(got[-1], accepted)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "logits, accepted = model(images)" in card
    assert f"is at least {threshold:.4g}" in card
    assert "A classifier that may refuse" in card
    export(run, "robustbench", tmp_path / "robustbench")
    claim = (tmp_path / "robustbench" / "claim.md").read_text()
    assert "not in the claim, which never refuses: robust with 10% refused by confidence" in claim
    playground = Playground(Deployed.read(run))
    assert playground.about()["threshold"] == threshold
    for number in (0, 59):
        shown = playground.attack(x[number : number + 1], "0", "pgd-20", True)["benign"]
        assert shown["accepted"] == bool(accepted[number])


@pytest.mark.skipif(not find_spec("onnxruntime"), reason="the extra onnx is not installed")
def test_onnx_has_a_second_output(run: Path, tmp_path: Path) -> None:
    import onnxruntime

    export(run, "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [output.name for output in session.get_outputs()] == ["logits", "accepted"]
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["signal"]) == "real"
    x = ducat.data.load_test("digits", 40)[0]
    accepted = session.run(["accepted"], {"images": x.numpy()})[0]
    expected = ducat.SelectiveClassifier(ducat.load(run), "real", json.loads(described["threshold"]))(x)[1]
    assert np.array_equal(accepted, expected.numpy())


def test_a_run_without_a_threshold_is_what_it_was(tiny_run: Path) -> None:
    classifier = Deployed.read(tiny_run).classifier
    x = torch.rand(3, 1, 8, 8)
    assert isinstance(classifier(x), torch.Tensor)
    assert Playground(Deployed.read(tiny_run)).attack(x[:1], "0", "pgd-20", True)["benign"]["accepted"] is None
    assert Deployed.read(tiny_run, "last").classifier.threshold is None


def test_a_threshold_of_another_checkpoint_does_not_count(run: Path) -> None:
    assert Deployed.read(run, "best").classifier.threshold is not None
    assert Deployed.read(run, "last").classifier.threshold is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reject", "5"], "reject=5.0 is outside [0, 1)"),
        (["--reject", "0.1", "--signal", "doubt"], "doubt"),
        ([], "reject"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], message: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(tiny_run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tiny_run / "rejection.json").exists()


class Brightness(nn.Module):
    """Two classes, dark and bright, with gradients that say nothing: only who knows the image finds it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (x.flatten(1).mean(1) - 0.5).sign() * 3 + 0 * x.flatten(1).sum(1)
        return torch.stack([-bright, bright], dim=1)


def test_images_of_the_suite_count_where_our_attack_finds_nothing() -> None:
    x, y = torch.full((4, 1, 2, 2), 0.45), torch.zeros(4, dtype=torch.long)
    threat = ducat.ThreatModel(eps=0.1)

    def brighter(model: nn.Module, x: torch.Tensor, *_: object) -> torch.Tensor:
        found = x.clone()
        found[:2] += 0.09
        return found

    given = {"num_classes": 2, "reject": [0.0], "attacks": [brighter]}
    measured = ducat.evaluate(Brightness(), x, y, threat, "quick", **given).rejection
    assert measured is not None
    assert not measured.held_out
    (result,) = measured.signals
    assert result.wrong[:2].tolist() == pytest.approx([6.0, 6.0])
    assert not result.robust(result.thresholds[0.0])[:2].any()


def test_refusing_is_an_upper_bound_where_gradients_were_hidden_though_no_class_was_robust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUDGETS, "standard", BUDGETS["quick"])
    for budget in ("quick", "standard"):  # there is no gradient to follow
        monkeypatch.setitem(rejection.WRONG_BUDGETS, budget, (Round("smooth", 2),))
        monkeypatch.setitem(rejection.DENIAL_STEPS, budget, (2, 1))
    x, y = torch.full((4, 1, 2, 2), 0.45), torch.zeros(4, dtype=torch.long)

    class Doubtful(Brightness):
        """Less sure of what is bright, so that it is refused."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.where(x.mean((1, 2, 3)) > 0.5, 0.5, 1.0)[:, None]

    def brighter(model: nn.Module, x: torch.Tensor, *_: object) -> torch.Tensor:
        return x + 0.09

    suite = Suite(SUITES["quick"].attacks[:1], audit=True, name="audited")
    threat, given = ducat.ThreatModel(eps=0.1), {"num_classes": 2, "reject": [0.0], "attacks": [brighter]}
    evaluation = ducat.evaluate(Doubtful(), x, y, threat, suite, **given)
    assert evaluation.accuracies()["robust"] == 0
    assert not evaluation.at_most  # 0 cannot be lowered
    evaluation.save(tmp_path / "hidden.json")
    (row,) = tables(compare([Run.read(tmp_path / "hidden.json")]).sections[0])[1].cells
    assert row[2] == "0 of these"  # thresholds were set on the evaluated images
    assert row[4].startswith("at most 100.0")
    kept = Evaluation.load(tmp_path / "hidden.json").rejection
    assert kept is not None
    assert kept.at_most


def test_thresholds_set_on_evaluated_images_are_not_held_out() -> None:
    x, y = torch.full((4, 1, 2, 2), 0.45), torch.zeros(4, dtype=torch.long)
    x[1:] += torch.arange(3)[:, None, None, None] / 100
    given = {"num_classes": 2, "reject": [0.0]}
    for others, apart in ((x[2:], False), (x - 0.2, True)):
        found = ducat.evaluate(
            Brightness(), x, y, ducat.ThreatModel(eps=0.1), "quick", held_out=(others, y[: len(others)]), **given
        )
        assert found.rejection is not None
        assert found.rejection.held_out == apart


def test_a_network_that_is_right_on_no_image_is_measured_kept_and_drawn(run: Path, tmp_path: Path) -> None:
    model, y = Brightness(), torch.zeros(4, dtype=torch.long)
    dark, bright = torch.full((4, 1, 2, 2), 0.2), torch.full((4, 1, 2, 2), 0.8)
    given = {"num_classes": 2, "reject": [0.1], "held_out": (dark, y)}
    found = ducat.evaluate(model, bright, y, ducat.ThreatModel(eps=0.1), "quick", **given)
    found.save(tmp_path / "none.json")
    content = kept.read(tmp_path / "none.json")
    assert content["rejection"]["signals"][0]["rows"][0]["right_refused"] is None
    page(tmp_path / "none.html", "None", compare([Run.read(tmp_path / "none.json")]))
    assert "Reproduce" not in (tmp_path / "none.html").read_text(), "the file does not say what was trained"


def test_the_page_tells_evaluations_of_weights_that_are_gone(run: Path, tmp_path: Path) -> None:
    changed = trained_on(run, tmp_path / "changed")
    gone = "of weights that have been trained on since"
    page(tmp_path / "run.html", "Run", compare([Run.read(run)]))
    assert gone not in (tmp_path / "run.html").read_text()
    assert main(["evaluate", str(changed), "--suite", "quick", "--samples", "12"]) == 0
    assert (changed / "report.html").read_text().count(gone) == 1


def test_a_random_network_is_not_measured_and_says_so() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value = x.flatten(1).mean(1) - 0.5 + 0.1 * torch.randn(len(x))
            return torch.stack([-value, value], dim=1)

    x, y = torch.full((4, 1, 2, 2), 0.1), torch.zeros(4, dtype=torch.long)
    measured = ducat.evaluate(Noisy(), x, y, ducat.ThreatModel(eps=0.1), "quick", num_classes=2, reject=[0.05])
    assert measured.rejection is None
    assert any("refusing was not measured" in warning for warning in measured.warnings)


@pytest.mark.slow
def test_the_estimator_refuses_its_share() -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 300)
    images = np.clip(0.25 + 0.5 * y[:, None] + 0.2 * generator.standard_normal((300, 4)), 0, 1).astype(np.float32)
    model = ducat.RobustClassifier(epochs=2, eps=0.05, steps=2, image_shape=(2, 2), reject=0.2, random_state=0)
    model.fit(images, y)
    accepted = model.accept(images)
    assert accepted.dtype == bool
    assert 0.6 < accepted[model.predict(images) == y].mean() < 0.97
    logits = model._logits(images)
    values = log_odds(torch.logaddexp(*model.network_(torch.from_numpy(images).view(-1, 1, 2, 2)).chunk(2, dim=1)))
    expected = values.gather(1, logits.argmax(1)[:, None]).squeeze(1) >= model.threshold_
    assert np.array_equal(accepted, expected.numpy())
    evaluation = model.evaluate(images[:6], y[:6], suite="quick")
    assert evaluation.rejection is not None
    assert evaluation.rejection.held_out
    with pytest.raises(ValueError, match="reject=2 is outside"):
        ducat.RobustClassifier(reject=2).fit(images, y)


def trained_on(run: Path, path: Path) -> Path:
    """Copy a run, and let its checkpoint be another one."""
    shutil.copytree(run, path)
    file = path / "checkpoints" / "best" / "checkpoint.safetensors"
    tensors, state = checkpoint.read(file)
    changed = {name: 1.01 * value if value.is_floating_point() else value for name, value in tensors.items()}
    checkpoint.save(file, changed, state)
    return path


def test_thresholds_and_numbers_of_weights_that_are_gone_go_nowhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = trained_on(run, tmp_path / "changed")
    assert main(["export", str(changed), "--format", "safetensors", "--out", str(tmp_path / "out.safetensors")]) == 2
    assert "rejection.json is of weights that have been trained on since: run `ducat calib" in capsys.readouterr().err
    (changed / "rejection.json").unlink()
    assert Deployed.read(changed).evaluated is None
    export(changed, "robustbench", tmp_path / "claim")
    assert "- **Robust accuracy**: not measured" in (tmp_path / "claim" / "claim.md").read_text()


def test_a_card_says_whether_its_own_threshold_was_attacked(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    assert main(["calibrate", str(other), "--reject", "0.02", "--signal", "real"]) == 0
    for path, attacked in ((run, True), (other, False)):
        export(path, "hub", tmp_path / f"hub-{attacked}")
        card = (tmp_path / f"hub-{attacked}" / "README.md").read_text()
        assert ("**Not attacked.**" in card) != attacked
    assert "`ducat evaluate --reject 0.02`" in card


def test_outputs_that_are_not_finite_are_not_accepted() -> None:
    logits = torch.tensor([[5.0, 0.0, -9.0, -9.0], [torch.inf, 0.0, -9.0, -9.0], [torch.nan, 0.0, -9.0, -9.0]])
    assert accepted(logits, "confidence", -1e9).tolist() == [True, False, False]


class Agreeing(nn.Module):
    """The upper rows say the class, with an honest gradient; how sure it is, without one, the lower rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        upper, lower = (half.flatten(1).mean(1) - 0.5 for half in x.split([2, 6], dim=2))
        agree = torch.where(upper > 0, lower, -lower) > 0.02
        value = upper * torch.where(agree, 40.0, 1.0)
        return torch.stack([-value, value], dim=1)


def test_a_signal_that_hides_what_it_depends_on_is_seen_though_the_classes_are_honest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for budgets in (rejection.WRONG_BUDGETS, rejection.DENIAL_STEPS):
        monkeypatch.setitem(budgets, "standard", budgets["quick"])
    x = torch.full((8, 1, 8, 8), 0.45) + torch.arange(8)[:, None, None, None] / 1000
    y, threat = torch.zeros(8, dtype=torch.long), ducat.ThreatModel(eps=0.1)
    suite = Suite(SUITES["quick"].attacks, name="audited")
    found = ducat.evaluate(Agreeing(), x, y, threat, suite, num_classes=2, reject=[0.0])
    # With all of eps both halves cross over by more than benign images are away.
    assert not found.at_most
    assert found.rejection is not None
    assert found.rejection.at_most
    (signal,) = found.rejection.signals
    assert not signal.robust(signal.thresholds[0.0]).any()
    assert any("something hides what the signal depends on" in warning for warning in found.warnings)


def test_a_second_look_keeps_the_images_of_what_fell_alone() -> None:
    x = torch.full((80, 1, 8, 8), 0.45) + torch.arange(80)[:, None, None, None] / 10000
    y, threat = torch.zeros(80, dtype=torch.long), ducat.ThreatModel(eps=0.1)
    nothing = ducat.ThreatModel(eps=0.0)
    left = replace(rejection.measure(Agreeing(), x, y, nothing, [0.0], budget="quick"), threat=threat)
    found, doubted = rejection.second_look(Agreeing(), x, y, threat, left, [])
    assert doubted
    ((rows, images),) = found
    assert 1 < len(rows) <= rejection.LOOKED_AT
    assert len(images) == len(rows)
    assert threat.allows(images, x[rows]).all()
    assert (Agreeing()(images).argmax(1) != y[rows]).all()
    (signal,) = rejection.counted(Agreeing(), x, y, left, found).signals
    assert (~signal.robust(signal.thresholds[0.0])).nonzero().squeeze(1).tolist() == rows.tolist()


class Bright(nn.Module):
    """Says class 1 of images that are brighter than grey, as surely as they are; lower pixels count for more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = 40 * ((x.flatten(1) - 0.5) * torch.linspace(0.5, 1.5, 64)).mean(1)
        return torch.stack([-value, value], dim=1)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.8), ("l1", 6.4)])
def test_a_search_by_decisions_alone_finds_what_is_accepted_with_a_wrong_class(norm: str, eps: float) -> None:
    x, y = torch.full((4, 1, 8, 8), 0.47), torch.zeros(4, dtype=torch.long)
    network, threat, signal = SilentDummies(Bright()), ducat.ThreatModel(norm, eps), rejection.find("confidence")
    judge = rejection.Accepting(network, y, signal, 0.5)
    # Of these 4 images the first is right, the second wrong and refused, the third wrong and accepted.
    shown = torch.tensor([0.499, 0.502, 0.54, 0.499])[:, None, None, None].expand_as(x)
    assert log_odds(network(shown)).amax(1).ge(0.5).tolist() == [False, False, True, False]
    assert judge(shown).argmax(1).tolist() == [0, 0, 1, 0]
    found = decisions(judge, x, y, threat, torch.Generator().manual_seed(0))
    assert threat.allows(found, x).all()
    assert (network(found).argmax(1) == 1).all()
    assert (log_odds(network(found)).amax(1) >= 0.5).all()
