import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import ducat
from ducat import training
from ducat.cli import main
from ducat.config import DataConfig, DummyConfig, MethodConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.dummy import dummy_head, recover
from ducat.evaluation.runs import calibrate_run
from ducat.models import build
from ducat.runs import RunFolder
from ducat.training import adapt as training_adapt
from ducat.training.adapt import settings
from ducat.training.initial import Initial
from tests import support
from tests.support import Watcher, unvalidated

TINY = replace(
    support.TINY,
    name="adapted",
    model=ModelConfig("small"),
    dummy=DummyConfig("recovery-aware", start_epoch=0),
    threat=ThreatConfig(steps=1),
    train=replace(support.TINY.train, epochs=1, learning_rate=0.0),
)

pytestmark = pytest.mark.slow
SPEC = ducat.data.SPECS["digits"]


adapt = partial(training_adapt.adapt, validate=unvalidated)
train = partial(training.train, validate=unvalidated)


def original(name: str = "small", normalized: bool = True, **options: Any) -> nn.Module:
    """A network without dummy classes whose batch-norm statistics are not those of a new one."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        mean_and_std = {"mean": SPEC.mean, "std": SPEC.std} if normalized else {}
        model = build(name, 10, channels=1, **mean_and_std, **options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def bare(model: nn.Module) -> dict[str, torch.Tensor]:
    """What research code saves: the network's weights, without a normalisation layer."""
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def prefixed(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def trades_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the wide residual network in the code of TRADES, whose first block is there twice."""
    renamed = {}
    for name, tensor in weights.items():
        head, _, rest = name.partition(".")
        if head.startswith("layer"):
            index, _, inner = rest.partition(".")
            inner = inner.replace("shortcut.0", "convShortcut")
            renamed[f"block{head[-1]}.layer.{index}.{inner}"] = tensor
            if head == "layer1":
                renamed[f"sub_block1.layer.{index}.{inner}"] = torch.zeros_like(tensor)
        else:
            renamed[{"bn": "bn1", "linear": "fc"}.get(head, head) + f".{rest}"] = tensor
    return renamed


WRAPPED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "bare": ("weights.pt", lambda weights: weights),
    "nested": ("weights.pth", lambda weights: {"epoch": 3, "best": 0.5, "state_dict": weights}),
    "nested twice": ("weights.pt", lambda weights: {"model": {"net": weights}}),
    "data parallel": ("weights.pt", lambda weights: {"net": prefixed("module.", weights), "acc": 1.0}),
    "compiled": ("weights.pt", lambda weights: prefixed("_orig_mod.module.", weights)),
    "wrapped": ("weights.pt", lambda weights: prefixed("module.model.", weights)),
    "safetensors": ("weights.safetensors", lambda weights: prefixed("module.", weights)),
}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", WRAPPED)
def test_the_recovered_prediction_right_after_the_copy_is_the_originals(tmp_path: Path, name: str) -> None:
    model = original()
    file, wrap = WRAPPED[name]
    source = write(tmp_path / file, wrap(bare(model)))
    # With a learning rate of 0 the weights stay those of the copy; batch-norm statistics are put back below.
    folder = adapt(source, TINY, tmp_path)
    adapted = folder.load("last")
    head, last = dummy_head(adapted), model.network[-1]
    assert head is not None
    assert torch.equal(head.weight, torch.cat([last.weight, last.weight]))
    assert torch.equal(head.bias, torch.cat([last.bias, last.bias]))
    for ours, theirs in zip(adapted.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
    x, _ = ducat.data.load_test("digits")
    assert torch.equal(recover(adapted(x)).argmax(1), model(x).argmax(1))
    torch.testing.assert_close(recover(adapted(x)), model(x), rtol=0, atol=1e-5)
    assert folder.manifest["initial"] == {
        "file": str(source),
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize(
    ("name", "normalization", "rename"),
    [
        ("preact-resnet20", "none", trades_names),
        (
            "resnet8",
            "data",
            lambda weights: {
                name.replace("shortcut", "downsample").replace("linear.", "fc."): tensor
                for name, tensor in weights.items()
            },
        ),
    ],
    ids=["as in the code of TRADES", "as in torchvision"],
)
def test_names_of_other_code(tmp_path: Path, name: str, normalization: Any, rename: Callable[..., Any]) -> None:
    model = original(name, normalized=normalization == "data", width=4)
    source = write(tmp_path / "weights.pt", prefixed("module.", rename(bare(model))))
    chosen = replace(TINY, model=ModelConfig(name, width=4, normalization=normalization))
    adapted = adapt(source, chosen, tmp_path).load("last")
    for ours, theirs in zip(adapted.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
    x, _ = ducat.data.load_test("digits", 50)
    torch.testing.assert_close(recover(adapted(x)), model(x), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_of_ours_brings_its_settings_and_its_network_along(tmp_path: Path) -> None:
    trained = train(
        replace(
            TINY,
            name="base",
            model=ModelConfig("resnet8", width=4, normalization="none"),
            dummy=DummyConfig("off"),
            threat=ThreatConfig(eps=0.07, steps=1),
            train=replace(TINY.train, learning_rate=0.05, epochs=2),
        ),
        tmp_path,
    )
    expected = {name: tensor for name, tensor in trained.load("best").state_dict().items() if tensor.ndim == 4}
    for source in (trained.path, trained.checkpoint_path("best")):
        base = settings(source)
        assert (base.data.name, base.data.samples, base.threat.eps) == ("digits", 64, 0.07)
        assert (base.dummy.kind, base.start_epoch) == ("recovery-aware", 0)
        chosen = replace(base, train=replace(base.train, epochs=1, learning_rate=0.0))
        folder = adapt(source, replace(chosen, name=None if source == trained.path else "again"), tmp_path)
        adapted = folder.load("last").state_dict()
        assert all(torch.equal(adapted[name], tensor) for name, tensor in expected.items())
        assert [row["dummy_classes"] for row in folder.metrics] == ["recovery-aware"]
        assert folder.manifest["initial"]["file"] == str(trained.checkpoint_path("best"))
    assert (tmp_path / "base-adapted-recovery-aware").is_dir()


def test_every_checkpoint_of_a_run_brings_its_settings_and_what_it_has_learnt(tmp_path: Path) -> None:
    base = replace(TINY, name="base", data=DataConfig("digits"), dummy=DummyConfig("off"), method=MethodConfig("mart"))
    run = train(replace(base, train=replace(base.train, epochs=2, keep=2)), tmp_path)
    written = [run.checkpoint_path(which) for which in ("last", "epoch-1", "epoch-2")]
    for file in (*written, run.checkpoint_path("last").with_name("previous.safetensors")):
        assert settings(file).method.name == "mart", file
        initial = replace(Initial.of(nn.Identity()), source={"file": str(file)})
        assert initial.learnt(ducat.data.load("digits", held_out=300)) > 0
    copied = shutil.copy(written[0], tmp_path / "elsewhere.safetensors")
    assert settings(copied).method.name == "pgd-at"


@pytest.mark.slow
def test_the_command_begins_with_the_settings_of_the_run(tmp_path: Path) -> None:
    trained = replace(TINY, name="base", dummy=DummyConfig("off"), threat=ThreatConfig(eps=0.07, steps=1))
    folder = train(trained, tmp_path)
    command = ["adapt", str(folder.path), "--runs", str(tmp_path), "--train.epochs", "1", "--method.name", "trades"]
    assert main([*command, "--name", "adapted", "--threat.eps", "0.06"]) == 0
    made = RunFolder.open(tmp_path / "adapted").config
    assert (made.data.samples, made.threat.steps, made.dummy.kind) == (64, 1, "recovery-aware")
    # What the run derived from its method and its eps is derived again.
    assert (made.method.name, made.method.weight) == ("trades", 6.0)
    assert (made.threat.eps, made.threat.step_size) == (0.06, 0.015)


@pytest.mark.parametrize("name", ["natural", "mixed"])
def test_a_run_of_a_method_without_dummy_classes_is_adapted_with_one_that_has_them(name: str, tmp_path: Path) -> None:
    trained = replace(TINY, name="base", dummy=DummyConfig("off"), method=MethodConfig(name, label_smoothing=0.1))
    with RunFolder.making(tmp_path / "run") as folder:
        folder.write_config(trained.resolve(SPEC))
    assert settings(tmp_path / "run").method == MethodConfig("pgd-at")


def test_settings_of_a_run_with_epochs_that_the_tail_has_not(tmp_path: Path) -> None:
    trained = replace(
        TINY,
        threat=ThreatConfig(eps=0.1),
        dummy=DummyConfig("off"),
        train=TrainConfig(epochs=130, averaging="swa", averaging_start_epoch=120, awp=0.01, awp_start_epoch=105),
    )
    with RunFolder.making(tmp_path / "run") as folder:
        folder.write_config(trained)
    assert settings(tmp_path / "run").train.averaging_start_epoch == 0


@pytest.mark.slow
def test_adapting_trains_and_can_be_resumed(tmp_path: Path) -> None:
    source = write(tmp_path / "weights.pt", bare(original()))
    chosen = replace(TINY, dummy=DummyConfig("published"), train=replace(TINY.train, epochs=2, learning_rate=0.05))
    whole = adapt(source, chosen, tmp_path / "whole")
    assert [row["dummy_classes"] for row in whole.metrics] == ["published", "published"]

    with pytest.raises(KeyboardInterrupt):
        adapt(source, chosen, tmp_path, Watcher(leave_after=1))
    source.unlink()
    resumed = training.resume(tmp_path / "adapted").load("last").state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.load("last").state_dict().items())
    head = resumed["network.14.weight"]
    assert not torch.equal(head[:10], head[10:])


class Unsafe:
    def __reduce__(self) -> Any:
        return (print, ("code from the file ran",))


def _renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("conv1.", "convolution."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "weights.pt",
            lambda: {"weights": 3},
            "holds no state_dict, neither as such nor as state_dict, model_state_dict",
        ),
        ("weights.pt", lambda: [1, 2], "holds no state_dict"),
        (
            "weights.pt",
            lambda: _renamed(bare(original("resnet8", width=4))),
            r"does not fit resnet8 for 10 classes \(model.name, model.width, data.name\): "
            r"missing: network.conv1.weight, network.layer1.0.conv1.weight, network.layer2.0.conv1.weight and 1 more; "
            r"unexpected: network.convolution.weight, ",
        ),
        (
            "weights.pt",
            lambda: bare(original("resnet8", width=8)),
            r"of another shape: network.conv1.weight \(8, 1, 3, 3\) instead of \(4, 1, 3, 3\), .* more",
        ),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    tmp_path: Path, file: str, content: Callable[[], Any], message: str
) -> None:
    chosen = replace(TINY, model=ModelConfig("resnet8", width=4))
    with pytest.raises(ValueError, match=message) as error:
        adapt(write(tmp_path / file, content()), chosen, tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path / file) in str(error.value)
    assert not (tmp_path / "adapted").exists()


def test_no_code_in_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "weights.pt", {"state_dict": bare(original()), "args": Unsafe()})
    with pytest.raises(ValueError, match=r"weights\.pt asks for print to be run when it is read") as error:
        adapt(path, TINY, tmp_path)
    assert isinstance(error.value.__cause__, pickle.UnpicklingError)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all"], ids=["empty", "text"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / file)):
        adapt(tmp_path / file, TINY, tmp_path)


@pytest.mark.slow
def test_a_network_that_has_dummy_classes_keeps_them_and_is_trained_on(tmp_path: Path) -> None:
    published = train(replace(TINY, name="published", dummy=DummyConfig("published", start_epoch=0)), tmp_path)
    cured = adapt(published.path, replace(TINY, name="cured"), tmp_path)
    assert cured.config.objective(0).reading == "recovered"
    before, after = (dummy_head(folder.load("last")) for folder in (published, cured))
    # At rate 0 they stay those of the published run, and are not made copies of the real ones.
    assert torch.equal(before.weight, after.weight)
    assert not torch.equal(*after.weight.chunk(2))


def test_weights_of_another_network_name_the_one_that_they_fit(tmp_path: Path) -> None:
    from ducat.models import build

    source = write(tmp_path / "released.pt", bare(build("resnet18-bottleneck", 20, channels=1)))
    asked = replace(TINY, model=ModelConfig("resnet18"))
    with pytest.raises(
        ValueError, match=r"does not fit resnet18 for 10 classes .*it fits model\.name=resnet18-bottleneck:"
    ):
        adapt(source, asked, tmp_path)


@pytest.mark.slow
def test_what_must_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.pt does not exist: give a run folder, or a file of weights"):
        adapt(tmp_path / "no.pt", TINY, tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        adapt(tmp_path, TINY, tmp_path)
    source = write(tmp_path / "weights.pt", bare(original()))
    with pytest.raises(ValueError, match=r"dummy\.kind=off leaves nothing to adapt"):
        adapt(source, replace(TINY, dummy=DummyConfig("off")), tmp_path)
    other = train(replace(TINY, name="other", dummy=DummyConfig("off")), tmp_path)
    with pytest.raises(ValueError, match=r"model\.name=resnet8, but .* holds a small"):
        adapt(other.path, replace(TINY, name="again", model=ModelConfig("resnet8")), tmp_path)
    assert json.loads((other.path / "manifest.json").read_text()).get("initial") is None


def test_a_file_near_the_root_of_the_disk_is_only_a_file() -> None:
    # Such a path has fewer folders above it than a checkpoint in a run has.
    with pytest.raises(ValueError, match="/etc/passwd is damaged"):
        adapt(Path("/etc/passwd"))


def test_weights_with_dummy_classes_are_not_trained_as_plain_ones(tmp_path: Path) -> None:
    for method in ("pgd-at", "natural"):
        config = replace(
            TINY,
            method=MethodConfig(method),
            threat=ThreatConfig(),
            model=ModelConfig("small", weights="zoo:digits-published"),
            dummy=DummyConfig("off"),
        )
        with pytest.raises(ValueError, match=r"has dummy classes, which dummy\.kind=off would train as plain ones"):
            train(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "copied"), [("recovery-aware", True), ("published", False)])
def test_trained_weights_begin_with_their_own_prediction(kind: Any, copied: bool) -> None:
    model = ModelConfig("small", weights="zoo:digits-pgd-at")
    config = replace(TINY, model=model, dummy=DummyConfig(kind, start_epoch=0)).resolve(SPEC)
    dataset = ducat.data.load("digits")
    _, network = Initial.of_settings(config).build(config.architecture(dataset))
    head = dummy_head(network)
    assert head is not None
    assert torch.equal(head.weight[:10], head.weight[10:]) is copied


def test_validation_images_that_the_weights_have_learnt_are_told(tmp_path: Path) -> None:
    base = train(replace(TINY, name="base", dummy=DummyConfig("off"), data=replace(TINY.data, held_out=0)), tmp_path)
    told = Watcher()
    adapted = adapt(base.path, replace(TINY, data=replace(TINY.data, held_out=0.2)), tmp_path, told)
    validation = adapted.dataset().validation
    count = int(torch.isin(validation.ids, base.dataset().train.ids).sum())
    assert adapted.manifest["initial"]["validation_learnt"] == count > 0
    assert f"{count} of {len(validation)} validation images are among those that" in " ".join(told.warnings)
    with pytest.raises(ValueError, match="thresholds would be set on images that the network has learnt"):
        calibrate_run(adapted, 0.1, which="last")
    later = adapt(
        adapted.path / "checkpoints" / "last" / "checkpoint.safetensors", replace(TINY, name="later"), tmp_path
    )
    assert later.manifest["initial"]["validation_learnt"] > 0, "what the weights' own beginning had learnt"
    honest = train(replace(TINY, name="honest", dummy=DummyConfig("off")), tmp_path)
    found = adapt(honest.path, replace(TINY, name="fine"), tmp_path)
    assert "validation_learnt" not in found.manifest["initial"]


def test_the_beginnings_of_a_run_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = replace(TINY, name="first", dummy=DummyConfig("off"), data=DataConfig("digits", samples=64, held_out=10))
    held_out = replace(plain.data, held_out=600)
    train(plain, "runs")
    train(replace(plain, name="second", data=held_out, model=ModelConfig("small", weights="runs/first")), "runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = ModelConfig("small", weights=str(tmp_path / "runs" / "second"))
    last = train(replace(plain, name="third", data=held_out, model=model), "runs")
    assert last.manifest["initial"]["validation_learnt"] > 0


def test_a_publishers_own_validation_images_are_not_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are numbered from 0 by themselves, as the training images are."""
    x = (255 * torch.rand(3, 60, 1, 8, 8)).byte().numpy()
    for place, part in enumerate(("train", "val", "test")):
        for number in range(60):
            folder = tmp_path / "images" / part / str(number % 10)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[place, number, 0]).save(folder / f"{number}.png")
    monkeypatch.setenv("DUCAT_DATA", str(tmp_path / "cache"))
    ducat.data.prepare("mine", tmp_path / "images")
    config = replace(TINY, name="base", dummy=DummyConfig("off"), data=DataConfig("mine"))
    base = train(config, tmp_path)
    told = Watcher()
    adapted = adapt(base.path, replace(TINY, data=DataConfig("mine")), tmp_path, told)
    assert "validation_learnt" not in adapted.manifest["initial"]
    assert not [text for text in told.warnings if "validation images" in text]
