"""Networks of others: built, described, built again without asking anybody, and not run without being asked."""

import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ducat
from ducat import models
from ducat.architecture import Architecture, describe_foreign
from ducat.dummy import dummy_heads
from ducat.models import doors
from ducat.models.outputs import LogitsOnly

NETS = """
from torch import nn

def net(num_outputs, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, num_outputs))

def encoder(num_outputs):
    return nn.Conv2d(3, 4, 3)

def fails(num_outputs):
    raise RuntimeError("no GPU")

def text(num_outputs):
    return "a network"
"""


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "_allowed", [])


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


def asked(name: str, size: int = 8, channels: int = 3, **settings: Any) -> Architecture:
    defaults = {"dummy_classes": False, "mean": (0.5,) * channels, "std": (0.25,) * channels}
    return Architecture(name, num_classes=5, channels=channels, image_size=size, **{**defaults, **settings})


def again(described: Architecture) -> Architecture:
    """What a checkpoint gives back of a description."""
    return Architecture(**json.loads(json.dumps(asdict(described))))


def check_rebuilt(described: Architecture) -> nn.Module:
    """Build a network twice, the second time from what a checkpoint says: with the same weights they are the same."""
    model = described.build().eval()
    with torch.random.fork_rng():
        copy = again(described).build().eval()
    copy.load_state_dict(model.state_dict())
    images = torch.rand(2, described.channels, described.image_size or 8, described.image_size or 8)
    assert torch.equal(copy(images), model(images))
    assert model(images).shape == (2, 10 if described.dummy_classes else 5)
    return model


def test_a_function_in_a_file(nets: Path) -> None:
    name = f"{nets}:net"
    models.allow_code(name)
    described = describe_foreign(asked(name, options={"width": 6}), normalize=True)
    assert described.record == {"file": str(nets), "sha256": hashlib.sha256(NETS.encode()).hexdigest()}
    model = check_rebuilt(described)
    assert model.network[0].out_channels == 6
    doubled = check_rebuilt(replace(described, dummy_classes=True))
    assert [head.num_classes for head in dummy_heads(doubled)] == [5]


def test_no_code_runs_unless_it_is_asked_for(nets: Path) -> None:
    name = f"{nets}:net"
    with pytest.raises(ValueError, match=re.escape(f"made by {name}, which is code, and nothing of it was run")):
        describe_foreign(asked(name), normalize=True)
    models.allow_code(name)
    described = describe_foreign(asked(name), normalize=True)
    doors._allowed.clear()
    nets.write_text(NETS + "raise SystemExit('it ran')")
    with pytest.raises(ValueError, match=f"add --allow-code {nets}:net"):
        again(described).build()
    # The other file of that function is not what the run recorded.
    models.allow_code(name)
    with pytest.raises(
        ValueError, match=f"is not the file that the network was made by: .* {described.record['sha256']}"
    ):
        again(described).build()


def test_a_run_from_another_machine_is_built_from_the_file_here(nets: Path, tmp_path: Path) -> None:
    models.allow_code(f"{nets}:net")
    described = describe_foreign(asked(f"{nets}:net"), normalize=True)
    (tmp_path / "here").mkdir()
    moved = nets.rename(tmp_path / "here" / "theirs.py")
    doors._allowed.clear()
    models.allow_code(f"{moved}:net")
    check_rebuilt(described)


def test_a_function_in_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "package_of_theirs").mkdir()
    (tmp_path / "package_of_theirs" / "__init__.py").touch()
    (tmp_path / "package_of_theirs" / "nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    name = "package_of_theirs.nets:net"
    models.allow_code(name)
    check_rebuilt(describe_foreign(asked(name), normalize=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:missing", "nets.py has no function missing"),
        ("{file}:fails", r"nets.py:fails cannot be made \(RuntimeError: no GPU\): look at model.options"),
        ("{file}:text", "nets.py:text returns a str: it must return an nn.Module"),
        ("nowhere.py:net", "nowhere.py does not exist"),
        ("no_such_package.nets:net", "there is no Python module no_such_package.nets here"),
        ("nets.py:", "is no name of a function: give file.py:function or package.module:function"),
    ],
)
def test_what_is_no_function_of_theirs_is_said(nets: Path, name: str, message: str) -> None:
    name = name.format(file=nets)

    def make() -> None:
        models.allow_code(name)
        describe_foreign(asked(name), normalize=True)

    with pytest.raises(ValueError, match=message):
        make()


def test_images_of_a_size_that_it_does_not_take(nets: Path) -> None:
    models.allow_code(f"{nets}:net")
    with pytest.raises(ValueError, match=r"does not take images of 12 x 12 \(RuntimeError: .*choose model.input_size"):
        describe_foreign(asked(f"{nets}:net", size=12), normalize=True)
    described = describe_foreign(asked(f"{nets}:net", size=12), normalize=True, fit_size=8)
    assert described.fit_size == 8
    check_rebuilt(described)


def test_an_encoder_is_no_classifier_whatever_the_size(nets: Path) -> None:
    models.allow_code(f"{nets}:encoder")
    with pytest.raises(
        ValueError, match=r"encoder is no classifier: the network returns shape \(2, 4, 6, 6\)"
    ) as found:
        describe_foreign(asked(f"{nets}:encoder"), normalize=True)
    assert "input_size" not in str(found.value)


def test_options_are_for_networks_of_others() -> None:
    with pytest.raises(ValueError, match=r"model\.options: small takes none"):
        Architecture("small", 5, False, 1, (0.5,), (0.5,), options={"depth": 3}).build()
    with pytest.raises(ValueError, match="nobody has published weights of small"):
        Architecture("small", 5, False, 1, (0.5,), (0.5,)).build(pretrained=True)


def test_timm(timm: Any) -> None:
    described = describe_foreign(asked("timm/test_resnet", size=32), normalize=True)
    assert described.record == {"timm": timm.__version__}
    assert described.mean == pytest.approx((0.5, 0.5, 0.5))
    assert described.fit_size is None
    check_rebuilt(replace(described, dummy_classes=True))


def test_timm_on_grey_images_keeps_the_datas_normalisation(timm: Any) -> None:
    described = describe_foreign(asked("timm/test_resnet", size=32, channels=1, mean=(0.3,)), normalize=True)
    assert described.mean == (0.3,)
    check_rebuilt(described)


def test_a_transformer_of_timm_takes_its_own_size_or_one_that_is_asked_for(timm: Any) -> None:
    described = describe_foreign(asked("timm/vit_tiny_patch16_224", size=32), normalize=True)
    assert described.fit_size == 224
    check_rebuilt(described)
    described = describe_foreign(asked("timm/vit_tiny_patch16_224", size=32, options={"img_size": 32}), normalize=True)
    assert described.fit_size is None
    check_rebuilt(replace(described, dummy_classes=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/test_resnett", {}, "is no network of timm .*: did you mean timm/test_resnet?"),
        ("timm/hf-hub:someone/model", {}, "is no network of timm"),
        ("timm/test_resnet", {"checkpoint_path": "w.pth"}, r"model\.options: checkpoint_path cannot be given"),
        ("timm/test_resnet", {"no_such": 1}, r"cannot be made \(TypeError: .*no_such.*look at model\.options"),
    ],
)
def test_what_timm_does_not_make(timm: Any, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_foreign(asked(name, size=32, options=options), normalize=True)


def tiny_vit(transformers: Any, folder: Path, channels: int = 3) -> Path:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=channels,
        num_labels=7,
    )
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    described = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    return folder


def test_transformers(transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"hf:{tiny_vit(transformers, tmp_path / 'vit')}"
    described = describe_foreign(asked(name), normalize=True)
    assert (described.mean, described.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert described.record["transformers"] == transformers.__version__
    assert describe_foreign(asked(name), normalize=False).mean == (0.5, 0.5, 0.5)
    (tmp_path / "vit").rename(tmp_path / "gone")  # a checkpoint is built again without the folder
    model = check_rebuilt(replace(described, dummy_classes=True))
    assert isinstance(model.network, LogitsOnly)
    assert dummy_heads(model) == [model.network.model.classifier]


def test_pretrained_weights_get_a_new_head(transformers: Any, tmp_path: Path) -> None:
    folder = tiny_vit(transformers, tmp_path / "vit")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    described = describe_foreign(asked(f"hf:{folder}"), normalize=True, pretrained=True)
    model = described.build(pretrained=True).eval()
    assert model.network.model.classifier.out_features == 5
    x = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (described.mean, described.std))
    expected = theirs.vit((x - mean) / std).last_hidden_state
    torch.testing.assert_close(model.network.model.vit(model.normalize(x)).last_hidden_state, expected)


def test_pretrained_weights_for_colour_see_grey_images_three_times(transformers: Any, tmp_path: Path) -> None:
    folder = tiny_vit(transformers, tmp_path / "vit")
    described = describe_foreign(asked(f"hf:{folder}", channels=1), normalize=True, pretrained=True)
    assert described.fit_channels == 3
    check_rebuilt(described)
    described = describe_foreign(asked(f"hf:{folder}", channels=1), normalize=True)
    assert described.fit_channels is None


def test_transformers_takes_no_code_from_a_folder(transformers: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}})
    )
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="has no configuration that can be read"):
        describe_foreign(asked(f"hf:{tmp_path}"), normalize=True)


KINDS = {
    "vit": lambda t: t.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    ),
    "deit, two heads": lambda t: t.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    ),
    "resnet": lambda t: t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"),
    "convnext": lambda t: t.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, patch_size=2),
    "swin": lambda t: t.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    ),
    "mobilenet v2": lambda t: t.MobileNetV2Config(depth_multiplier=0.1, min_depth=8, depth_divisible_by=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_transformers(transformers: Any, kind: str) -> None:
    config = KINDS[kind](transformers)
    config.num_labels = 5
    make = (
        transformers.DeiTForImageClassificationWithTeacher
        if "two heads" in kind
        else transformers.AutoModelForImageClassification.from_config
    )
    model = make(config).eval()
    size = getattr(config, "image_size", 32)
    x = torch.rand(8, 3, size if isinstance(size, int) and size < 64 else 32, size if size < 64 else 32)
    before = model(x).logits
    ducat.add_dummy_classes(model, images=x[:2])
    after = model(x).logits
    torch.testing.assert_close(after, before.repeat(1, 2))
    assert torch.equal(ducat.RecoveredClassifier(model)(x).argmax(1), before.argmax(1))
    assert len(dummy_heads(model)) == (2 if "two heads" in kind else 1)


# One network of each kind that heads and norms come in.
TIMM_KINDS: dict[str, tuple[str, int, int]] = {
    "batch norm": ("test_resnet", 32, 1),
    "batch norm with activation": ("test_efficientnet", 32, 1),
    "group norm": ("resnetv2_18", 32, 1),
    "convolutional head": ("test_byobnet", 32, 1),
    "evonorm": ("test_efficientnet_evos", 32, 1),
    "layer norm and mean": ("test_convnext", 32, 1),
    "global response norm": ("test_convnext2", 32, 1),
    "vit": ("test_vit", 160, 1),
    "mixer": ("test_mambaout", 32, 1),
    "in-place ReLU, no residuals": ("vgg11_bn", 32, 1),
    "two heads": ("levit_128s", 224, 2),
    "normaliser-free": ("test_nfnet", 32, 1),
    "dense": ("densenet121", 32, 1),
}


@pytest.mark.parametrize("kind", TIMM_KINDS)
def test_kinds_of_timm(timm: Any, kind: str) -> None:
    name, size, heads = TIMM_KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5).eval()
        for module in model.modules():  # a head of zeros would hide a mistake
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.any():
                nn.init.normal_(module.weight)
    x = torch.rand(4, 3, size, size)
    with torch.no_grad():
        before = model(x)
        ducat.add_dummy_classes(model, images=x[:2])
        assert torch.equal(ducat.RecoveredClassifier(model)(x).argmax(1), before.argmax(1))
        torch.testing.assert_close(model(x), before.repeat(1, 2))
    assert len(dummy_heads(model)) == heads
