from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from ducat.architecture import Architecture
from ducat.models import MODELS, Normalize, build

pytestmark = pytest.mark.slow

# Trainable parameters at 10 outputs on 3 channels. From the literature where it states them (resnet18 11.17 M, wide
# residual networks 36.48 M and 46.16 M), else summed by hand from the layers' shapes.
PARAMETERS = {
    "small": 16 * (27 + 2) + 16 * (144 + 2) + 32 * (144 + 2) + 32 * (288 + 2) + 330,
    "resnet8": 78_042,
    "resnet20": 272_474,
    "resnet18": 11_173_962,
    "resnet18-bottleneck": 13_958_986,
    "preact-resnet20": 272_282,
    "preact-resnet18": 11_172_170,
    "wrn-28-10": 36_479_194,
    "wrn-34-10": 46_160_474,
    # That of preact-resnet18 with three shortcuts of 3x3 instead of 1x1.
    "preact-resnet18-silu": 11_172_170 + 8 * (64 * 128 + 128 * 256 + 256 * 512),
    "wrn-28-10-silu": 36_479_194,
    "wrn-70-16-silu": 266_796_506,
}
CPU_MODELS = ["small", "resnet8", "resnet20", "preact-resnet20"]


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count(name):
    with torch.device("meta"):
        assert count_parameters(MODELS[name](10, channels=3)) == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_head_is_the_last_linear(name):
    model = build(name, 14, width=8)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    logits = []
    head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    output = model(torch.rand(2, 3, 32, 32))
    assert head.out_features == 14
    assert output is logits[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("channels", "size", "stem_stride"), [(1, 8, 1), (1, 28, 1), (3, 32, 1), (3, 64, 1), (3, 64, 2)]
)
def test_output_shape(name, channels, size, stem_stride):
    model = build(name, 20, channels=channels, width=4, stem_stride=stem_stride)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 20)


@pytest.mark.parametrize("name", MODELS)
def test_stem_stride_quarters_the_first_feature_map(name):
    sizes = []
    for stem_stride in (1, 2):
        model = build(name, 10, width=4, stem_stride=stem_stride)
        stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        stem.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
        model(torch.rand(2, 3, 64, 64))
    assert sizes == [(64, 64), (32, 32)]


@pytest.mark.parametrize("name", MODELS)
def test_width_is_the_channels_of_the_first_stage(name):
    narrow, wide = (count_parameters(build(name, 10, width=width)) for width in (8, 16))
    assert 3 < wide / narrow < 4


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_gives_the_same_logits(name):
    torch.manual_seed(0)  # the bound is near what 70 layers that sum in another order leave of float32
    model = build(name, 10, width=8).eval()
    images = torch.rand(2, 3, 16, 16)
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    actual = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_prediction_depends_on_the_rest_of_the_batch_only_in_training_mode(name):
    model = build(name, 10, width=8)
    images = torch.rand(4, 3, 16, 16)
    model.train()
    assert not torch.allclose(model(images)[:2], model(images[:2]), atol=1e-3)
    model.eval()
    torch.testing.assert_close(model(images)[:2], model(images[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_activations_keep_their_scale_at_initialisation(name):
    # He's initialisation is what makes the variance of the logits neither vanish nor explode with depth.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name, 100, width=16).train()
        logits = model(torch.rand(16, 3, 16, 16))
    assert 0.05 < logits.std() < 5


@pytest.mark.parametrize("name", CPU_MODELS)
def test_every_parameter_is_trained(name):
    model = build(name, 10)
    model(torch.rand(2, 3, 16, 16)).square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_weights_come_from_the_global_generator():
    first, second = [], []
    with torch.random.fork_rng():
        for weights in (first, second):
            torch.manual_seed(3)
            weights.extend(build("resnet8", 10).parameters())
        third = list(build("resnet8", 10).parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))


def test_normalisation_is_inside_the_model():
    mean, std = (0.5, 0.25, 0.125), (0.25, 0.5, 0.125)
    plain = build("resnet8", 10).eval()
    model = build("resnet8", 10, mean=mean, std=std).eval()
    model.network.load_state_dict(plain.network.state_dict())
    images = torch.rand(2, 3, 16, 16)
    normalised = torch.stack([(images[:, i] - mean[i]) / std[i] for i in range(3)], dim=1)
    torch.testing.assert_close(model(images), plain(normalised))
    assert isinstance(next(model.children()), Normalize)


def test_normalisation_travels_with_the_checkpoint():
    model = build("small", 10, channels=1, mean=[0.25], std=[0.5])
    restored = build("small", 10, channels=1)
    restored.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(restored.eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet-18"}, "'resnet-18' is unknown: did you mean resnet18?"),
        ({"name": "vit"}, "known names are small, resnet8"),
        ({"num_outputs": 0}, "num_outputs=0"),
        ({"width": 0}, "width=0"),
        ({"stem_stride": 0}, "stem_stride=0"),
        ({"mean": [0.5]}, "mean=[0.5] has 1 values: give one for each of 3 channels"),
        ({"std": [0.2, 0.2, 0.0]}, "std=[0.2, 0.2, 0.0] is not positive"),
    ],
)
def test_what_must_raise(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**{"name": "small", "num_outputs": 10} | arguments)


def test_grey_images_do_not_broadcast_into_a_colour_model():
    with pytest.raises(ValueError, match="the images have 1 channels, but the model was built for 3"):
        build("small", 10)(torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize(("init", "deviation"), [("he", 0.0416), ("torch", 0.0170)])
def test_convolutions_begin_as_asked(init: str, deviation: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weight = build("resnet18-bottleneck", 10, width=64, init=init).network.layer2[1].conv2.weight
    # 3 x 3 x 128 in and out: sqrt(2 / 1152), and sqrt(1 / (3 * 1152)).
    assert weight.std().item() == pytest.approx(deviation, rel=0.01)


@pytest.mark.parametrize("dummy_classes", [False, True])
def test_a_described_network_takes_float32_images_whatever_the_default_is(dummy_classes):
    torch.set_default_dtype(torch.float64)
    try:
        model = Architecture("small", 10, dummy_classes, 1, (0.5,), (0.5,), width=4).build()
        assert torch.get_default_dtype() == torch.float64
        assert model(torch.rand(2, 1, 8, 8, dtype=torch.float32)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
