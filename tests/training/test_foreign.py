"""Networks of others from training to export: trained, stopped and resumed, evaluated, exported and loaded back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ducat
from ducat import data, weights
from ducat.cli import main
from ducat.config import Config, DummyConfig, ModelConfig
from ducat.evaluation.runs import evaluate_run
from ducat.export import export
from ducat.models import doors
from ducat.training import resume, train
from ducat.training.adapt import adapt
from tests.support import TINY, Watcher, unvalidated

NETS = """
from torch import nn

def net(num_outputs, width=8):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, num_outputs))
"""


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "_allowed", [])


def function(request: pytest.FixtureRequest, folder: Path) -> ModelConfig:
    (folder / "nets.py").write_text(NETS)
    return ModelConfig(f"{folder / 'nets.py'}:net", options={"width": 4})


def timm_resnet(request: pytest.FixtureRequest, folder: Path) -> ModelConfig:
    request.getfixturevalue("timm")
    return ModelConfig("timm/resnet10t")


def transformers_vit(request: pytest.FixtureRequest, folder: Path) -> ModelConfig:
    transformers = request.getfixturevalue("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
    config.save_pretrained(folder / "vit")
    return ModelConfig(f"hf:{folder / 'vit'}")


NETWORKS: dict[str, Callable[..., ModelConfig]] = {
    "function": function,
    "timm": timm_resnet,
    "transformers": transformers_vit,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_from_training_to_export(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NETWORKS[name](request, tmp_path)
    config = replace(
        TINY,
        model=model,
        dummy=DummyConfig("recovery-aware", start_epoch=1),
        train=replace(TINY.train, epochs=2, optimizer="adamw", learning_rate=0.002),
    )
    whole = train(config, tmp_path / "whole", validate=unvalidated)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, Watcher(leave_after=1), validate=unvalidated)
    run = resume(tmp_path / "run", validate=unvalidated)
    states = [weights.read(folder.checkpoint_path("last")).weights for folder in (whole, run)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    if name == "transformers":  # nothing but the checkpoint is needed from here on
        (tmp_path / "vit").rename(tmp_path / "gone")
    measured = evaluate_run(run, "quick", samples=20)
    assert 0 <= measured["robust"] <= measured["clean"]["accuracy"] <= 1
    onnxruntime = pytest.importorskip("onnxruntime")
    made = export(run.path, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(made.path)
    x, _ = ducat.data.load_test("digits", samples=7)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})[:1]
    expected = ducat.load(run.path)(x).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_code_of_a_run_is_run_only_where_it_is_asked_for(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = function(request, tmp_path)
    command = ["train", "--name", "theirs", "--runs", str(tmp_path), "--data.name", "digits", "--data.samples", "64"]
    command += ["--model.name", str(model.name), "--model.options", '{"width": 4}', "--train.epochs", "1"]
    command += ["--train.batch_size", "32", "--threat.steps", "1", "--train.device", "cpu"]
    assert main(command) == 0
    saved = json.loads((tmp_path / "theirs" / "manifest.json").read_text())
    assert saved["status"] == "finished"
    doors._allowed.clear()
    with pytest.raises(ValueError, match="which is code, and nothing of it was run"):
        ducat.load(tmp_path / "theirs")
    with pytest.raises(ValueError, match="which is code, and nothing of it was run"):
        adapt(tmp_path / "theirs", root=tmp_path)
    evaluate = ["evaluate", str(tmp_path / "theirs"), "--suite", "quick", "--samples", "10"]
    assert main(evaluate) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"add --allow-code {model.name}" in error
    assert main([*evaluate, "--allow-code", str(model.name)]) == 0
    assert main([*evaluate, "--allow-code", "nets"]) == 2


@pytest.mark.slow
def test_weights_from_a_file_begin_a_training(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    trained = train(TINY, tmp_path / "first", validate=unvalidated)
    begun = replace(
        TINY,
        model=ModelConfig("small", weights=str(trained.path)),
        train=replace(TINY.train, epochs=1, learning_rate=0.0, weight_decay=0.0),
    )
    folder = train(begun, tmp_path, validate=unvalidated)
    ours, theirs = (dict(run.load("last").named_parameters()) for run in (folder, trained))
    best = dict(trained.load("best").named_parameters())
    assert all(torch.equal(ours[name], best[name]) for name in theirs)
    assert folder.manifest["initial"]["file"] == str(trained.checkpoint_path("best"))
    with pytest.raises(ValueError, match=r"model\.weights: .* holds a small: choose that model\.name"):
        train(replace(begun, name="b", model=replace(begun.model, name="resnet8")), tmp_path, validate=unvalidated)
    # A file for other classes: everything but the head.
    torch.save(ducat.models.build("small", 7, channels=1).state_dict(), tmp_path / "seven.pt")
    other = replace(begun, name="c", model=ModelConfig("small", weights=str(tmp_path / "seven.pt")))
    other = replace(other, dummy=DummyConfig("recovery-aware", start_epoch=0))
    made = train(other, tmp_path, validate=unvalidated).load("last")
    saved: dict[str, Any] = torch.load(tmp_path / "seven.pt")
    assert torch.equal(made.state_dict()["network.0.weight"], saved["network.0.weight"])
    assert made(torch.rand(2, 1, 8, 8)).shape == (2, 20)


@pytest.mark.slow
def test_a_publishers_weights_begin_a_training(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    transformers = request.getfixturevalue("transformers")
    model = transformers_vit(request, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "vit")
    theirs = transformers.AutoModelForImageClassification.from_config(config)
    theirs.save_pretrained(tmp_path / "vit")
    frozen = replace(TINY.train, epochs=1, learning_rate=0.0, weight_decay=0.0)
    folder = train(
        replace(TINY, model=replace(model, weights="pretrained"), train=frozen), tmp_path, validate=unvalidated
    )
    ours = folder.load("last").state_dict()
    for name, tensor in theirs.state_dict().items():
        if "classifier" not in name:
            assert torch.equal(ours[f"network.model.{name}"], tensor)
    assert folder.manifest["initial"] == {"weights": f"{model.name}, pretrained"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits-vit", "cifar10-finetune"])
def test_the_recipes_for_networks_of_others_train(request: pytest.FixtureRequest, tmp_path: Path, recipe: str) -> None:
    timm = request.getfixturevalue("timm")
    config = Config.from_yaml(Path(__file__).parents[2] / "recipes" / f"{recipe}.yaml")
    if recipe == "cifar10-finetune":  # with another publisher's weights, on other images
        for part, count in (("train", 20), ("test", 4)):
            for name in ("ant", "bee"):
                (tmp_path / "insects" / part / name).mkdir(parents=True)
                for number in range(count):
                    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
                    Image.fromarray(pixels).save(tmp_path / "insects" / part / name / f"{number}.png")
        data.prepare("insects", tmp_path / "insects", root=tmp_path)
        theirs = timm.create_model("resnet18", num_classes=5)
        torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
        config = replace(
            config,
            data=replace(config.data, name="insects", root=tmp_path),
            model=replace(config.model, weights=str(tmp_path / "theirs.pt")),
        )
    config = replace(
        config,
        data=replace(config.data, samples=32),
        threat=replace(config.threat, steps=1),
        train=replace(config.train, epochs=4, batch_size=16, tracker="none", device="cpu"),
    )
    folder = train(config, tmp_path, validate=unvalidated)
    assert [row["dummy_classes"] for row in folder.metrics] == ["off", "off", "off", "recovery-aware"]
    assert all(np.isfinite(row["loss"]) for row in folder.metrics)
