"""Weights as research code writes them: read without running anything, or refused by a line that says why."""

import argparse
import collections
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn, optim
from torch.nn import functional as F

import ducat
from ducat import weights
from ducat.architecture import Architecture
from ducat.dummy import dummy_head

SPEC = ducat.data.SPECS["digits"]
MEAN, STD = torch.tensor(SPEC.mean), torch.tensor(SPEC.std)
Named = dict[str, Tensor]


def architecture(name: str = "resnet8", classes: int = 10, **options: Any) -> Architecture:
    settings = {"channels": 1, "mean": SPEC.mean, "std": SPEC.std, "width": 4, "dummy_classes": False, **options}
    return Architecture(name, classes, **settings)


def network(described: Architecture) -> nn.Module:
    """A network whose batch-norm statistics are not those of a new one."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = described.build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


MODEL = network(architecture())
STATE: Named = {name: tensor.clone() for name, tensor in MODEL.network.state_dict().items()}
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def under(prefix: str) -> Named:
    return {prefix + name: tensor for name, tensor in STATE.items()}


class Lightning(dict):
    """What Lightning keeps hyperparameters in."""


class Config:
    def __init__(self) -> None:
        self.lr = 0.1


FILES: dict[str, Callable[[], Any]] = {
    "best accuracy as a NumPy scalar": lambda: {"net": STATE, "acc": np.float64(95.2), "epoch": 199},
    "argparse.Namespace beside the weights": lambda: {"model": STATE, "args": argparse.Namespace(lr=0.1)},
    "a path beside the weights": lambda: {"model": STATE, "data": Path("/data")},
    "a class of theirs beside the weights": lambda: {"state_dict": STATE, "config": Config()},
    "an AveragedModel": lambda: optim.swa_utils.AveragedModel(MODEL.network).state_dict(),
    "only under model_ema": lambda: {"model_ema": STATE},
    "only under state_dict_ema": lambda: {"state_dict_ema": under("module.")},
    "an EMA beside them": lambda: {"state_dict": STATE, "state_dict_ema": {k: v + 1 for k, v in STATE.items()}},
    "an EMA beside them, in a row": lambda: {**{f"ema.{k}": v + 1 for k, v in STATE.items()}, **under("model.")},
    "no num_batches_tracked": lambda: {k: v for k, v in STATE.items() if "num_batches" not in k},
    "Sequential(normalise, network)": lambda: {"state_dict": {"0.mean": MEAN, "0.std": STD, **under("1.")}},
    "mu and sigma in the network": lambda: {**STATE, "mu": MEAN.view(1, 1, 1, 1), "sigma": STD.view(1, 1, 1, 1)},
    "MadryLab's AttackerModel": lambda: {
        "model": {
            **under("module.model."),
            **under("module.attacker.model."),
            "module.normalizer.new_mean": MEAN.view(1, 1, 1),
            "module.normalizer.new_std": STD.view(1, 1, 1),
        }
    },
    "Lightning": lambda: {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**under("model."), "criterion.weight": torch.ones(10)},
        "hyper_parameters": {"lr": 0.1, "betas": (0.9, 0.99)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "head called classifier": lambda: {k.replace("linear.", "classifier."): v for k, v in STATE.items()},
    "half precision": lambda: {k: v.half() if v.is_floating_point() else v for k, v in STATE.items()},
    "bf16": lambda: {k: v.bfloat16() if v.is_floating_point() else v for k, v in STATE.items()},
    "the whole network": lambda: {"epoch": 3, "net": MODEL.network},
    "an ordered dictionary": lambda: collections.OrderedDict(STATE),
}
ROUNDED = {"half precision": 2e-2, "bf16": 2e-1}


@pytest.mark.parametrize("name", FILES)
def test_checkpoints_as_research_code_writes_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save(FILES[name](), path)
    described = architecture()
    if any(word in name for word in ("normalise", "sigma", "Madry")):  # the file's normalisation is taken
        described = architecture(mean=(0.1,), std=(0.9,))
    found, model = weights.read(str(path)).network(described)
    assert (found.mean, found.std) == (pytest.approx(SPEC.mean), pytest.approx(SPEC.std))
    torch.testing.assert_close(model(IMAGES), MODEL(IMAGES), rtol=0, atol=ROUNDED.get(name, 1e-6))
    assert all(tensor.dtype == torch.float32 for tensor in model.parameters())


@pytest.mark.parametrize("other", ["tutor", "semantic"])  # the latter is no EMA
def test_of_several_networks_in_a_file_none_is_taken_by_chance(tmp_path: Path, other: str) -> None:
    others = {f"{other}.{name}": tensor + 1 for name, tensor in STATE.items()}
    torch.save({**under("student."), **others}, tmp_path / "w.pt")
    first, second = sorted(("student", other), key=len)
    said = rf"w\.pt holds more than one network that fits, under {first}\. and {second}\."
    with pytest.raises(ValueError, match=said):
        weights.read(tmp_path / "w.pt").network(architecture())


def test_the_old_format_of_torch_save_is_read(tmp_path: Path) -> None:
    torch.save({"net": STATE, "args": Config()}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    _, model = weights.read(tmp_path / "w.pt").network(architecture())
    assert torch.equal(model(IMAGES), MODEL(IMAGES))


def test_safetensors_under_another_name_are_read(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in STATE.items()}, tmp_path / "w.pt")
    _, model = weights.read(tmp_path / "w.pt").network(architecture())
    assert torch.equal(model(IMAGES), MODEL(IMAGES))


class Runs:
    """Whatever is named is not even imported, so a file with these does nothing either way."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __reduce__(self) -> Any:
        return (self.function, ("code from the file ran",))


def test_a_file_that_asks_to_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    for function, name in ((print, "print"), (os.system, "posix.system|nt.system")):
        torch.save({"state_dict": STATE, "args": Runs(function)}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=f"asks for ({name}) to be run .* nothing was run"):
            weights.read(tmp_path / "w.pt")
    assert capsys.readouterr().out == ""


def test_nothing_that_a_file_names_is_called(tmp_path: Path) -> None:
    import shutil

    class Removes:
        def __reduce__(self) -> Any:
            return (shutil.rmtree, (str(tmp_path),))

    torch.save({"state_dict": STATE, "args": Removes()}, tmp_path / "w.pt")
    assert weights.read(tmp_path / "w.pt").weights.keys() == STATE.keys()
    assert (tmp_path / "w.pt").is_file()


def _npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, a=np.ones(2))
    return content.getvalue()


def _traced(path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(path)


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is empty: fetch it again"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html>quota exceeded"), "is a web page"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    "cut short": (
        lambda path: (torch.save(STATE, path), path.write_bytes(path.read_bytes()[:2000])),
        "is cut short: fetch it again",
    ),
    "zip": (lambda path: path.write_bytes(_npz()), "is a zip archive without weights of PyTorch"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file"),
    "noise": (lambda path: path.write_bytes(bytes(range(7, 250))), "is damaged, or not what torch.save writes"),
    "no weights": (lambda path: torch.save({"acc": 1.0, "best": [1]}, path), 'its keys are "acc", "best"'),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_file_of_weights_is_said(tmp_path: Path, name: str) -> None:
    write, message = OTHERS[name]
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        weights.read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_said(tmp_path: Path) -> None:
    _traced(tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is TorchScript, a program"):
        weights.read(tmp_path / "w.pt")


def test_normalisation_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    torch.save({**STATE, "mean": 255 * MEAN, "std": 255 * STD}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"which is not for images in \[0, 1\]: divide both by 255"):
        weights.read(tmp_path / "w.pt").network(architecture())
    torch.save({**STATE, "mean": MEAN, "std": STD, "mu": MEAN / 2, "sigma": STD}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="normalises its images in 2 ways"):
        weights.read(tmp_path / "w.pt").network(architecture())


def test_a_head_with_dummy_classes_is_known_by_its_size(tmp_path: Path) -> None:
    doubled = network(architecture(dummy_classes=True))
    torch.save(doubled.network.state_dict(), tmp_path / "w.pt")
    for asked in (True, False):
        found, model = weights.read(tmp_path / "w.pt").network(architecture(dummy_classes=asked))
        assert found.dummy_classes
        assert dummy_head(model) is not None
        assert torch.equal(model(IMAGES), doubled(IMAGES))
    torch.save(STATE, tmp_path / "w.pt")
    found, model = weights.read(tmp_path / "w.pt").network(architecture(dummy_classes=True))
    assert not found.dummy_classes


@pytest.mark.parametrize("classes", [3, 5, 20])
def test_another_number_of_classes_makes_a_new_head_where_that_is_asked_for(tmp_path: Path, classes: int) -> None:
    torch.save(STATE, tmp_path / "w.pt")
    read = weights.read(tmp_path / "w.pt")
    if classes != 5:
        with pytest.raises(
            ValueError, match=r"of another shape: network.linear.weight \(10, 16\) instead of \("
        ) as said:
            read.network(architecture(classes=classes))
        assert "all but the head fits, which has 10 outputs: choose data of its classes (data.name)" in str(said.value)
    found, model = read.network(architecture(classes=classes), new_head=True)
    assert model(IMAGES).shape == (4, classes)
    assert torch.equal(model.network.conv1.weight, STATE["conv1.weight"])
    assert found.num_classes == classes


# RobustBench's networks for CIFAR-10 that were trained with generated data, written down from the paper's description
# (Gowal et al. 2020, appendix A of arXiv 2010.03593) with the names that the published state_dicts have.


def silu_block(state: Named, x: Tensor, first: str, second: str, stride: int, *, wide: bool) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{last}"].view(1, -1, 1, 1) for last in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        return x * x.sigmoid()

    start = first.rpartition(".")[0]
    # A convolution of stride 2 that pads by one at the end alone is one of stride 1 at the odd places.
    activated = norm(x, f"{start}.batchnorm_0")
    out = F.conv2d(activated, state[f"{first}.weight"], padding=1)
    out = out[:, :, stride - 1 :: stride, stride - 1 :: stride]
    out = F.conv2d(norm(out, f"{start}.batchnorm_1"), state[f"{second}.weight"], padding=1)
    kernel = state.get(f"{start}.shortcut.weight")
    if kernel is None:
        return x + out
    if wide:
        return F.conv2d(activated, kernel)[:, :, ::stride, ::stride] + out
    return F.conv2d(x, kernel, padding=1)[:, :, stride - 1 :: stride, stride - 1 :: stride] + out


def published(wide: bool, classes: int) -> tuple[Named, Callable[[Tensor], Tensor]]:
    """A small network as published ones are, and what it computes, without normalisation."""
    random = torch.Generator().manual_seed(0)
    widths, depth = ((4, 8, 16), 1) if wide else ((4, 8, 16, 32), 2)
    channels = 16 if wide else 4
    stem = "init_conv" if wide else "conv_2d"
    convolutions = ("conv_0", "conv_1") if wide else ("conv_2d_1", "conv_2d_2")
    state: Named = {f"{stem}.weight": torch.randn(channels, 3, 3, 3, generator=random)}
    blocks = []

    def add_norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = torch.rand(size, generator=random) + 0.5
        state[f"{name}.bias"] = torch.randn(size, generator=random)
        state[f"{name}.running_mean"] = torch.randn(size, generator=random)
        state[f"{name}.running_var"] = torch.rand(size, generator=random) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    for stage, width in enumerate(widths):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            start = f"layer.{stage}.block.{index}" if wide else f"layer_{stage}.{index}"
            add_norm(f"{start}.batchnorm_0", channels)
            state[f"{start}.{convolutions[0]}.weight"] = torch.randn(width, channels, 3, 3, generator=random) / 6
            add_norm(f"{start}.batchnorm_1", width)
            state[f"{start}.{convolutions[1]}.weight"] = torch.randn(width, width, 3, 3, generator=random) / 6
            if channels != width:
                size = 1 if wide else 3
                state[f"{start}.shortcut.weight"] = torch.randn(width, channels, size, size, generator=random) / 3
            blocks.append((f"{start}.{convolutions[0]}", f"{start}.{convolutions[1]}", stride))
            channels = width
    add_norm("batchnorm", channels)
    state["logits.weight"] = torch.randn(classes, channels, generator=random)
    state["logits.bias"] = torch.randn(classes, generator=random)

    def compute(x: Tensor) -> Tensor:
        x = F.conv2d(x, state[f"{stem}.weight"], padding=1)
        for first, second, stride in blocks:
            x = silu_block(state, x, first, second, stride, wide=wide)
        mean, var = state["batchnorm.running_mean"], state["batchnorm.running_var"]
        x = (x.movedim(1, -1) - mean) / (var + 1e-5).sqrt() * state["batchnorm.weight"] + state["batchnorm.bias"]
        return F.linear((x * x.sigmoid()).mean((1, 2)), state["logits.weight"], state["logits.bias"])

    return state, compute


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "pre-activation"])
@pytest.mark.parametrize("classes", [10, 100])
def test_robustbenchs_networks_with_silu(
    tmp_path: Path, wide: bool, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, compute = published(wide, classes)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    buffers = {"mean": mean.view(3, 1, 1), "std": std.view(3, 1, 1)} if wide else {}
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in {**state, **buffers}.items()}}, tmp_path / "w.pt")
    name = "wrn-28-10-silu" if wide else "preact-resnet18-silu"
    row = ducat.models.MODELS[name]
    depths = {"depths": (1, 1, 1)} if wide else {}
    monkeypatch.setitem(ducat.models.MODELS, name, partial(row, **depths))
    described = architecture(
        name, classes, channels=3, mean=(0.0,) * 3 if wide else tuple(mean.tolist()), std=tuple(std.tolist())
    )
    _, model = weights.read(tmp_path / "w.pt").network(described)
    x = torch.rand(2, 3, 16, 16)
    expected = compute((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(model(x), expected, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["wrn-28-10-silu", "wrn-70-16-silu", "preact-resnet18-silu"])
def test_sizes_of_the_published_networks_with_silu(name: str) -> None:
    """Shapes at the ends of each stage, as in RobustBench's files."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in ducat.models.MODELS[name](10, channels=3).state_dict().items()}
    if name.startswith("wrn"):
        width, last = (640, 3) if "28" in name else (1024, 10)
        assert shapes["init_conv.weight"] == (16, 3, 3, 3)
        assert shapes[f"layer_2.{last}.conv_1.weight"] == (width, width, 3, 3)
        assert f"layer_2.{last + 1}.conv_1.weight" not in shapes
        assert shapes["layer_2.0.shortcut.weight"] == (width, width // 2, 1, 1)
    else:
        assert shapes["init_conv.weight"] == (64, 3, 3, 3)
        assert shapes["layer_3.1.conv_1.weight"] == (512, 512, 3, 3)
        assert shapes["layer_3.0.shortcut.weight"] == (512, 256, 3, 3)
