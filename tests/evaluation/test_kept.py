import importlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ducat
from ducat import checkpoint
from ducat.cli import main
from ducat.evaluation import Evaluation, kept, runs
from ducat.evaluation.runs import calibrate_run, evaluate_run
from ducat.runs import RunFolder

BALL = ("linf", 0.2)


def content(suite: str, samples: int, upper: float, eps: float = 0.2, norm: str = "linf", **others: Any) -> dict:
    measured = {"suite": suite, "samples": samples, "threat": {"norm": norm, "eps": eps}, "seed": 0}
    return {**measured, "robust": upper - 0.05, "robust_ci95": [upper - 0.1, upper], "checkpoint": "best", **others}


RULE = [
    # A few images never speak for the run where many were measured, however low their number is.
    ([content("light", 500, 0.6), content("quick", 20, 0.3)], 0),
    ([content("quick", 500, 0.7), content("quick", 20, 0.3)], 0),
    # As many images by a weaker suite do not either, whatever the order.
    ([content("quick", 500, 0.6), content("standard", 500, 0.7)], 1),
    # Where neither outdoes the other, the one that claims least.
    ([content("light", 1000, 0.55), content("standard", 500, 0.5)], 1),
    ([content("light", 1000, 0.45), content("standard", 500, 0.5)], 0),
    ([content("light", 500, 0.6), content("light", 500, 0.55, seed=1)], 1),
    ([content("ours", 500, 0.9), content("light", 100, 0.6)], 1),
    # A harder suite does not hide what an easier one, helped by surrogates say, has broken of as many images.
    ([content("light", 500, 0.5), content("standard", 500, 0.7)], 0),
    ([content("light", 500, 0.5), content("standard", 500, 0.7, at_most=True)], 0),
    ([content("light", 400, 0.5), content("standard", 500, 0.7)], 1),
    # The weights of another checkpoint, or other code of the network, refute nothing.
    ([content("light", 500, 0.5, checkpoint="last"), content("standard", 500, 0.7)], 1),
    ([content("light", 500, 0.5, origin={"code": "old"}), content("standard", 500, 0.7, origin={"code": "new"})], 1),
    # What is known to be an upper bound is not hidden by a measurement that could not see why.
    ([content("light", 1000, 0.45), content("standard", 200, 0.5, at_most=True)], 1),
    # No easier ball, and no other norm, however many images.
    ([content("full", 9000, 0.9, eps=0.01), content("quick", 20, 0.7)], 1),
    ([content("full", 9000, 0.2, norm="l2", eps=3.0), content("quick", 20, 0.7)], 1),
    ([content("light", 500, 0.9, eps=0.01), content("quick", 20, 0.7, eps=0.1)], 1),
]


@pytest.mark.parametrize(("contents", "chosen"), RULE)
def test_the_strongest_speaks_for_the_run_and_never_the_flattering(contents: list[dict], chosen: int) -> None:
    assert kept.strongest(contents, BALL) == chosen
    assert kept.strongest(contents[::-1], BALL) == len(contents) - 1 - chosen


def test_what_was_measured_otherwise_has_another_name() -> None:
    one = content("light", 500, 0.6)
    others = [
        {"suite": "quick"}, {"samples": 20}, {"seed": 1}, {"checkpoint": "last"},
        {"threat": {"norm": "linf", "eps": 0.1}}, {"threat": {"norm": "l2", "eps": 0.2}},
        {"threat": {"norm": "linf", "eps": 0.2, "step_size": 0.01}},
        {"origin": {"weights": "12345678ab"}}, {"origin": {"reject": [0.05]}}, {"origin": {"surrogates": ["a-1"]}},
        {"origin": {"second_round_seconds": 3.0}},
    ]  # fmt: skip
    names = {kept.name_of(each) for each in (one, *({**one, **other} for other in others))}
    assert len(names) == len(others) + 1
    usual = {"threat": {"norm": "linf", "eps": 0.2, "step_size": 0.05}}  # earlier evaluations do not say their step
    assert kept.name_of({**one, **usual}) == kept.name_of(one)
    assert all("/" not in name and " " not in name for name in (*names, kept.name_of({**one, "suite": "a b/c"})))


def test_evaluations_that_differ_in_eps_alone_are_a_curve() -> None:
    radii = [0.2, 0.05, 0.1]
    found = kept.curves([*(content("light", 500, 0.6, eps=eps) for eps in radii), content("quick", 500, 0.6)])
    assert [[each["threat"]["eps"] for each in alike] for alike in found] == [[0.05, 0.1, 0.2]]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(tiny_run, tmp_path / "run")))


def test_a_run_is_attacked_with_the_usual_step_whatever_it_was_trained_with(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run.config
    trained = replace(config, threat=replace(config.threat, step_size=1e-4))
    monkeypatch.setattr(RunFolder, "config", trained)
    found = evaluate_run(run, "quick", samples=10, seed=7)
    assert found["threat"]["step_size"] == pytest.approx(found["threat"]["eps"] / 4)


def test_what_other_attacks_measured_is_measured_anew(run: RunFolder) -> None:
    first = evaluate_run(run, "quick", samples=20)
    (file,) = (path for path in run.evaluations_path.glob("quick-*-20-*.json"))
    told: list[str] = []
    assert evaluate_run(run, "quick", samples=20, notice=told.append) == first
    assert not told
    changed = {**first, "robust": 1.0, "origin": {**first["origin"], "ducat": "0.0.1"}}
    file.write_text(json.dumps(changed))
    assert evaluate_run(run, "quick", samples=20, notice=told.append)["robust"] == first["robust"]
    assert "was measured by ducat 0.0.1, whose attacks may be others: it is measured anew" in told[0]


def test_numbers_of_other_code_are_measured_anew(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a network may import others, of which no record of the run tells."""
    file, kinds = tmp_path / "layers_of_a_test.py", []
    monkeypatch.syspath_prepend(tmp_path)
    for body in ("x", "(8 * x).round() / 8"):
        file.write_text(f"from torch import nn\n\n\nclass Front(nn.Module):\n    def forward(self, x): return {body}\n")
        front = importlib.import_module("layers_of_a_test").Front()
        kinds.append(runs._code(torch.nn.Sequential(front, torch.nn.ReLU())))
    assert kinds[0] is not None
    assert kinds[0] != kinds[1]
    assert runs._code(run.load()) is None
    first, told = evaluate_run(run, "quick", samples=20), list[str]()
    monkeypatch.setattr(runs, "_code", lambda model: kinds[1])
    assert evaluate_run(run, "quick", samples=20, notice=told.append)["robust"] == first["robust"]
    assert "was measured with other code of the network's modules: it is measured anew" in told[0]
    # Nor does what a harder suite has left of the earlier code speak for the run.
    path = next(run.evaluations_path.glob("quick*.json"))
    now = json.loads(path.read_text())
    harder = {**now, "suite": "standard", "origin": {**now["origin"], "code": "earlier"}}
    (run.evaluations_path / "standard.json").write_text(json.dumps(harder))
    assert kept.promote(run, kinds[1]) == path
    assert kept.promote(run, "earlier").name == "standard.json"


def test_the_code_of_a_network_is_also_that_of_the_classes_that_it_derives_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base_of_a_test.py"
    base.write_text("from torch import nn\n\n\nclass Base(nn.Module):\n    scale = 1\n")
    (tmp_path / "derived_in_a_test.py").write_text("from base_of_a_test import Base\n\n\nclass Derived(Base): ...\n")
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as file:
        file.writestr("zipped_in_a_test.py", "from torch import nn\n\n\nclass Zipped(nn.Module): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "zipped.zip")
    model = importlib.import_module("derived_in_a_test").Derived()
    before = runs._code(model)
    base.write_text(base.read_text().replace("1", "2"))
    assert runs._code(model) != before
    assert runs._code(importlib.import_module("zipped_in_a_test").Zipped()) is None


def test_numbers_without_flags_and_images_are_measured_anew(run: RunFolder) -> None:
    """As those of a network of the zoo are."""
    first = evaluate_run(run, "quick", samples=20)
    (file,) = run.evaluations_path.glob("quick-*-20-*.safetensors")
    file.unlink()
    assert evaluate_run(run, "quick", samples=20)["robust"] == first["robust"]
    assert file.is_file()


def test_numbers_without_flags_and_images_have_not_those_of_another_evaluation(run: RunFolder) -> None:
    (first,) = kept.evaluations(run).values()
    card = {**first, "suite": "full", "robust": 0.01}
    (run.evaluations_path / "card.json").write_text(json.dumps(card))
    assert kept.promote(run).name == "card.json"
    assert kept.read(run.evaluation_path)["robust"] == 0.01
    with pytest.raises(FileNotFoundError):
        Evaluation.load(run.path)


def test_an_evaluation_is_of_the_checkpoint_that_was_read(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a run is trained, its last checkpoint is another one before the first attack."""
    path = run.checkpoint_path("last")
    shutil.copyfile(run.checkpoint_path("best"), path)
    tensors, state = checkpoint.read(path)
    load = runs.load_test

    def trained_on(*arguments: Any) -> Any:
        checkpoint.save(path, {name: -value for name, value in tensors.items()}, state)
        return load(*arguments)

    monkeypatch.setattr(runs, "load_test", trained_on)
    measured = evaluate_run(run, "quick", samples=20, which="last")
    assert measured["origin"]["weights"] == checkpoint.digest(tensors)
    assert not kept.is_current(run, measured)


def test_an_evaluation_of_an_earlier_version_is_kept_and_said(run: RunFolder) -> None:
    old = {path: path.read_bytes() for path in run.path.glob("evaluation.*")}
    shutil.rmtree(run.evaluations_path)
    told: list[str] = []
    evaluate_run(run, "quick", samples=20, notice=told.append)
    assert len(told) == 1
    assert "earlier version" in told[0]
    assert {path: path.read_bytes() for path in run.path.glob("evaluation.*")} == old, "50 images outdo 20"
    assert sorted(each["samples"] for each in kept.evaluations(run).values()) == [20, 50]
    for path in kept.evaluations(run):
        assert len(Evaluation.load(path).labels) == json.loads(path.read_text())["samples"]


def test_no_command_measures_a_run_on_other_data(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    data = run.manifest["data"]
    run.update_manifest({"data": {**data, "fingerprint": "sha256:of others"}})
    for command in (
        ["evaluate", str(run.path), "--suite", "quick"],
        ["calibrate", str(run.path), "--reject", "0.1"],
        ["analyze", "targeted", str(run.path)],
        ["export", str(run.path), "--format", "safetensors", "--out", str(run.path.parent / "out.safetensors")],
    ):
        assert main(command) == 2, command
        assert "the data digits are not those that" in capsys.readouterr().err, command
    with pytest.raises(ValueError, match="not those"):
        calibrate_run(run, 0.1)


def test_a_checkpoint_that_was_trained_on_speaks_no_longer_for_the_run(run: RunFolder) -> None:
    (first,) = kept.evaluations(run)
    tensors, state = run.read("best")
    run.save("best", {**tensors, "more": torch.zeros(1)}, state)
    assert not kept.is_current(run, kept.read(first))
    evaluate_run(run, "quick", samples=20)
    assert kept.read(run.evaluation_path)["samples"] == 20
    assert first.is_file()


def test_an_evaluation_replaces_no_file_unless_asked(tiny_run: Path, tmp_path: Path) -> None:
    evaluation = Evaluation.load(tiny_run)
    (tmp_path / "net.safetensors").write_text("weights")
    with pytest.raises(FileExistsError, match=r"net.safetensors exists"):
        evaluation.save(tmp_path / "net.json")
    assert not (tmp_path / "net.json").exists()
    evaluation.save(tmp_path / "other.json")
    replace(evaluation, seed=7).save(tmp_path / "other.json", replace=True)
    assert ducat.Evaluation.load(tmp_path / "other.json").seed == 7
