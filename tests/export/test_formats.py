import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ducat
from ducat.cli import main
from ducat.config import DataConfig
from ducat.export import FORMATS, Classifier, Deployed, export, load
from ducat.runs import RunFolder

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
# What a user of each format writes, given `path` and the NumPy array `images`; `got` is a list of arrays. ONNX gets
# batches of 1, 3 and all others.
READERS = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
assert session.get_modelmeta().custom_metadata_map["classes"] == str(list("0123456789")).replace("'", '"')
parts = [session.run(["logits", "adversarial"], {"images": part}) for part in numpy.split(images, [1, 4])]
got = [numpy.concatenate(arrays) for arrays in zip(*parts)]
""",
    "torch-export": """
import torch
with open(path, "rb") as file:
    got = torch.export.load(file).module()(torch.from_numpy(images))
""",
    "safetensors": """
import torch, ducat.export
got = ducat.export.load(path)(torch.from_numpy(images))
""",
    "hub": """
import torch
from ducat.export import Classifier
got = Classifier.from_pretrained(path)(torch.from_numpy(images))
""",
    "robustbench": """
import sys, torch
sys.path.insert(0, path)
import model
got = model.load_model()(torch.from_numpy(images))
""",
}


def row(name: str) -> object:
    return pytest.param(name, marks=[pytest.mark.skipif(not _has(name), reason=f"the extra {name} is not installed")])


def _has(name: str) -> bool:
    from importlib.util import find_spec

    return all(find_spec(module) for module in NEEDS.get(name, ()))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return ducat.data.load_test("digits", 100)[0].numpy()


@pytest.fixture(scope="module")
def expected(tiny_run: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and probability of being adversarial, from the network's 2C outputs by the formulas."""
    with torch.no_grad():
        outputs = RunFolder.open(tiny_run).load("best")(torch.from_numpy(images)).double().numpy()
    real, dummy = outputs[:, :10], outputs[:, 10:]
    recovered = np.maximum(real, dummy)
    rows, predicted = np.arange(len(images)), outputs.argmax(1) % 10
    p = np.exp(outputs - outputs.max(1, keepdims=True))
    return recovered, p[rows, predicted + 10] / (p[rows, predicted] + p[rows, predicted + 10])


@pytest.mark.parametrize("name", [row(name) for name in FORMATS])
def test_every_format_gives_the_networks_outputs_in_a_clean_process(
    name: str, tiny_run: Path, images: np.ndarray, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    detector = name != "robustbench"
    made = export(tiny_run, name, tmp_path / "made", detector=detector)
    assert made.path == tmp_path / "made"
    assert made.difference < 1e-4
    assert "Digits test images" in made.images
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "something was left behind"
    np.save(tmp_path / "images.npy", images)
    # Away from the run: nothing of it may be needed.
    script = f"""
import sys, numpy
images, path = numpy.load("images.npy"), "made"
{READERS[name]}
got = got if isinstance(got, (tuple, list)) else [got]
numpy.savez("got.npz", *[numpy.asarray(getattr(array, "detach", lambda: array)()) for array in got])
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "got.npz") as file:
        got = [file[key] for key in file.files]
    assert len(got) == 1 + detector
    for ours, theirs in zip(got, expected, strict=False):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_array_equal(got[0].argmax(1), expected[0].argmax(1))


def test_exported_weights_are_checked(tiny_run: Path, tmp_path: Path) -> None:
    path = export(tiny_run, "safetensors", tmp_path / "model.safetensors").path
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.safetensors is damaged"):
        load(tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=r"ducat\.load takes the run folder"):
        load(RunFolder(tiny_run).checkpoint_path("best"))


def test_the_model_card_shows_blind_and_robust_side_by_side(tiny_run: Path, tmp_path: Path) -> None:
    export(tiny_run, "hub", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    evaluation = json.loads((tiny_run / "evaluation.json").read_text())
    line = next(line for line in card.splitlines() if line.startswith("| tiny |"))
    for quantity in (evaluation["clean"]["accuracy"], evaluation["blind"], evaluation["robust"]):
        assert f" {100 * quantity:.1f} [" in line
    for attack in evaluation["attacks"]:
        knows = "yes" if attack["knows_recovery"] else "no"
        assert f"| {attack['name']} | {knows} | {100 * attack['accuracy']:.1f} [" in card
    for warning in evaluation["warnings"]:
        assert warning in card
    assert card.startswith("---\nlibrary_name:")


@pytest.fixture
def unevaluated(tiny_run: Path, tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "bare"
    shutil.copytree(tiny_run, run)
    for path in run.glob("evaluation.*"):
        path.unlink()
    return run


@pytest.mark.parametrize("which", ["best", "last"])
def test_numbers_of_nothing_or_of_another_checkpoint_are_not_shown(
    which: str, tiny_run: Path, unevaluated: Path, tmp_path: Path
) -> None:
    run = unevaluated if which == "best" else tiny_run
    for name in ("hub", "robustbench"):
        export(run, name, tmp_path / name, which=which)
    card, claim = (tmp_path / "hub" / "README.md").read_text(), (tmp_path / "robustbench" / "claim.md").read_text()
    assert "Not evaluated" in card
    assert "- **Robust accuracy**: not measured" in claim
    info = json.loads((tmp_path / "robustbench" / "model_info.json").read_text())
    assert {info[key] for key in ("clean_acc", "reported", "autoattack_acc")} == {None}


def test_the_claim_holds_what_was_measured(tiny_run: Path, tmp_path: Path) -> None:
    export(tiny_run, "robustbench", tmp_path / "claim")
    claim = (tmp_path / "claim" / "claim.md").read_text()
    evaluation = json.loads((tiny_run / "evaluation.json").read_text())
    assert "- **Threat Model**: Linf" in claim
    assert "- **eps**: 51/255" in claim  # 0.2
    assert f"- **Clean accuracy**: {100 * evaluation['clean']['accuracy']:.2f}" in claim
    assert f"- **Robust accuracy**: {100 * evaluation['robust']:.2f}" in claim
    assert "on 50 of 500 test images" in claim
    assert "| AutoAttack, blind, on the raw outputs | not measured |" in claim
    assert json.loads((tmp_path / "claim" / "model_info.json").read_text())["autoattack_acc"] is None


def test_a_run_from_another_machine_is_exported_without_its_data(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.write_config(replace(folder.config, data=DataConfig("cifar10", root=tmp_path)))
    made = export(folder.path, "safetensors", tmp_path / "model")
    assert made.images == "64 random images of 8 x 8", "the size that the network was trained on, not CIFAR-10's"
    assert load(made.path).classes == tuple(str(digit) for digit in range(10))


def test_a_missing_weight_is_an_error_not_a_random_one(tiny_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    export(tiny_run, "hub", tmp_path / "hub")
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    del weights["model.network.14.weight"]
    save_file(weights, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"network\.14\.weight"):
        Classifier.from_pretrained(tmp_path / "hub")


def _wrong(run: Path, out: Path) -> list[tuple[list[str], str]]:
    return [
        ([str(run), "--format", "hub", "--out", str(run)], "exists, and nothing is overwritten"),
        ([str(run), "--format", "caffe", "--out", str(out)], "format"),
        ([str(run), "--format", "hub"], "out"),
        (["nowhere", "--format", "hub", "--out", str(out)], "nowhere is not a run folder"),
        ([str(run), "--format", "robustbench", "--out", str(out), "--detector"], "RobustBench takes classifiers"),
        ([str(run), "--format", "hub", "--out", str(out), "--which", "first"], "which='first' is unknown"),
    ]


def test_bad_input_gets_one_line(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tiny_run.rglob("*"))
    for arguments, message in _wrong(tiny_run, tmp_path / "out"):
        assert main(["export", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert sorted(tiny_run.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_well_it_agrees(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "model.safetensors"
    assert main(["export", str(tiny_run), "--format", "safetensors", "--out", str(out)]) == 0
    assert "differs from the network by at most 0 on 64 Digits test images" in capsys.readouterr().out


@pytest.mark.parametrize(("broken", "match"), [(lambda logits: -logits, "other classes"), (lambda z: z + 1, "differs")])
def test_what_does_not_agree_is_not_left_there(
    broken: Callable[[torch.Tensor], torch.Tensor],
    match: str,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = FORMATS["safetensors"]
    wrong = right._replace(read=lambda path: lambda images: broken(right.read(path)(images)))
    monkeypatch.setitem(FORMATS, "safetensors", wrong)
    with pytest.raises(RuntimeError, match=match):
        export(tiny_run, "safetensors", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_network_without_dummy_classes_has_no_detector(tiny_run: Path) -> None:
    architecture = replace(Deployed.read(tiny_run).classifier.architecture, dummy_classes=False)
    with pytest.raises(ValueError, match="detector"):
        Classifier(architecture, "0123456789", detector=True)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    classifier = Classifier(architecture, "0123456789").eval()
    torch.testing.assert_close(classifier(images), classifier.model(images))


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # pyautoattack's import of SciPy
def test_autoattack_and_foolbox_run_on_a_loaded_model_as_it_is(tiny_run: Path) -> None:
    import foolbox
    from pyautoattack import AutoAttack

    model, (x, y) = ducat.load(tiny_run), ducat.data.load_test("digits", 24)
    attack = AutoAttack(
        model,
        norm="Linf",
        eps=0.1,
        version="custom",
        attacks=["apgd-ce", "apgd-dlr"],
        seed=0,
    )
    attack.apgd.n_iter, attack.apgd.n_restarts = 5, 1
    with torch.random.fork_rng():
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=24)
    assert (adversarial - x).abs().max() <= 0.1 + 1e-6
    clean = model(x).argmax(1) == y
    assert (model(adversarial).argmax(1) == y).sum() < clean.sum()

    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, (clipped,), (success,) = foolbox.attacks.LinfPGD(steps=20)(fmodel, x, y, epsilons=[0.1])
    torch.testing.assert_close(success, model(clipped).argmax(1) != y)
    assert success.sum() > (~clean).sum()


def test_numbers_of_the_checkpoint_that_is_exported_are_found(tiny_run: Path, tmp_path: Path) -> None:
    """Whichever of the two speaks for the run."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    assert main(["evaluate", str(run), "--which", "last", "--suite", "quick", "--samples", "12"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["checkpoint"] == "best"
    found = {which: Deployed.read(run, which).evaluation for which in ("best", "last")}
    assert {which: None if one is None else one["checkpoint"] for which, one in found.items()} == {
        "best": "best",
        "last": "last",
    }


def test_generated_images_are_additional_data(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["data"]["extra"] = {"file": "/data/made.npz", "images": 5000, "fingerprint": "sha256:1"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    for name in ("hub", "robustbench"):
        export(run, name, tmp_path / name)
    assert (
        "- **Additional data**: true: 5,000 images of made.npz" in (tmp_path / "robustbench" / "claim.md").read_text()
    )
    assert json.loads((tmp_path / "robustbench" / "model_info.json").read_text())["additional_data"] is True
    assert "and 5,000 more of made.npz." in (tmp_path / "hub" / "README.md").read_text()
    manifest["data"].pop("extra")
    (run / "manifest.json").write_text(json.dumps({**manifest, "initial": {"weights": "small, pretrained"}}))
    export(run, "robustbench", tmp_path / "pretrained")
    assert "not known: training began with small, pretrained" in (tmp_path / "pretrained" / "claim.md").read_text()
