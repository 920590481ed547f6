import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ducat.dummy import add_dummy_classes
from ducat.evaluation import behaviour

CLASSES = ("cat", "dog")


class Scripted(nn.Module):
    """A network whose probabilities are written in its images' first four pixels."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.outputs].log()


def images(*probabilities: tuple[float, ...]) -> Tensor:
    pixels = torch.full((len(probabilities), 1, 2, 3), 0.5)
    for image, row in zip(pixels, probabilities, strict=True):
        image.flatten()[: len(row)] = torch.tensor(row)
    return pixels


#                  cat  dog  cat'  dog'
BENIGN = images((0.7, 0.1, 0.2, 0.0), (0.1, 0.5, 0.1, 0.3), (0.0, 0.9, 0.0, 0.1))
ATTACKED = images((0.1, 0.2, 0.1, 0.6), (0.0, 0.2, 0.2, 0.6), (0.0, 0.9, 0.0, 0.1))
Y = torch.tensor([0, 1, 0])  # the third is classified wrongly as it is, so it was not attacked


@pytest.fixture(scope="module")
def measured() -> dict:
    return behaviour.measure(Scripted(4), BENIGN, ATTACKED, Y, CLASSES)


def test_mass_is_the_mean_probability_of_each_part_over_attacked_images(measured: dict) -> None:
    assert measured["attacked"] == 2
    assert measured["mass"] == {
        "benign": {"real": 0.6, "dummy": 0.25, "other real": 0.1, "other dummy": 0.05},
        "adversarial": {"real": 0.15, "dummy": 0.35, "other real": 0.1, "other dummy": 0.4},
    }


def test_the_signal_is_the_dummy_share_of_the_recovered_pair(measured: dict) -> None:
    # Pairs recovered: cat .2 / .9 and dog .3 / .8 of the benign images, dog .6 / .8 twice of the attacked ones.
    signal = measured["signal"]
    assert [row["count"] for row in signal["bins"]] == [1, 1, 2]
    assert [row["signal"] for row in signal["bins"]] == pytest.approx([2 / 9, 3 / 8, 3 / 4], abs=1e-6)
    assert [row["adversarial"] for row in signal["bins"]] == [0, 0, 1]
    assert signal["error"] == pytest.approx((2 / 9 + 3 / 8 + 2 * (1 - 3 / 4)) / 4, abs=1e-6)
    assert signal["auroc"] == 1


@pytest.mark.parametrize(
    ("benign", "attacked", "auroc"),
    [
        ([0.1, 0.2], [0.3, 0.4], 1.0),
        ([0.3, 0.4], [0.1, 0.2], 0.0),
        ([0.5, 0.5], [0.5, 0.5], 0.5),
        ([0.1, 0.3], [0.2], 0.5),
    ],
)
def test_the_area_under_the_curve_counts_pairs_in_order(benign: list, attacked: list, auroc: float) -> None:
    found = behaviour._reliability(torch.tensor(benign).double(), torch.tensor(attacked).double())
    assert found["auroc"] == auroc


def test_examples_show_what_is_predicted(measured: dict) -> None:
    first, second = measured["examples"]
    assert (first["label"], first["withstood"]) == ("cat", False)
    assert first["benign"] == {"real": ["cat", 0.7], "dummy": ["cat", 0.2], "recovered": ["cat", 0.9]}
    assert first["adversarial"] == {"real": ["dog", 0.2], "dummy": ["dog", 0.6], "recovered": ["dog", 0.8]}
    assert (second["label"], second["withstood"]) == ("dog", True)


def pixels(uri: str) -> np.ndarray:
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_examples_hold_the_images_and_the_magnified_change(measured: dict) -> None:
    example = measured["examples"][0]
    assert np.array_equal(pixels(example["images"]["benign"]), (BENIGN[0, 0] * 255).round().byte().numpy())
    assert example["magnified"] == round(0.5 / 0.6, 1)
    # The largest change, -0.6 of the first pixel, is black; no change is grey.
    shown = pixels(example["images"]["perturbation"])
    assert shown[0, 0] == 0
    assert shown[1, 2] == 128


def test_a_network_without_dummy_classes_has_no_signal() -> None:
    measured = behaviour.measure(Scripted(2), images((0.75, 0.25)), images((0.25, 0.75)), torch.tensor([0]), CLASSES)
    assert measured["mass"]["adversarial"] == {"real": 0.25, "other real": 0.75}
    assert measured["signal"] is None
    assert measured["examples"][0]["adversarial"] == {"real": ["dog", 0.75]}


def test_without_attacked_images_there_is_nothing_to_show() -> None:
    measured = behaviour.measure(Scripted(4), BENIGN, BENIGN, Y, CLASSES)
    assert measured == {"attacked": 0, "mass": None, "signal": None, "features": None, "examples": []}


@pytest.mark.parametrize(("broken", "whole"), [(20, 20), (1, 20), (20, 1), (0, 3), (2, 0)])
def test_examples_are_of_both_kinds_where_there_are(broken: int, whole: int) -> None:
    withstood = torch.tensor([False] * broken + [True] * whole)
    chosen = behaviour._some_of_each(withstood)
    assert len(set(chosen.tolist())) == len(chosen) == min(behaviour.EXAMPLES, broken + whole)
    assert (~withstood[chosen]).sum() >= min(broken, behaviour.EXAMPLES // 2)
    assert withstood[chosen].sum() >= min(whole, math.floor(behaviour.EXAMPLES / 2))


def test_features_are_the_main_axes_of_what_the_last_layer_is_given() -> None:
    # The features are the four pixels; the attack moves the first by 0.6, the images differ a little in the second.
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model = add_dummy_classes(model, images=torch.zeros(2, 1, 2, 2)).eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[3, 0], model[1].bias[3] = 10.0, -5.0  # a bright first pixel is dummy class 1, else real class 0
        model[1].bias[0] = 0.0
        model[1].bias[1:3] = -1.0
    x = torch.full((20, 1, 2, 2), 0.2)
    x[:, 0, 0, 1] += 0.1 * torch.rand(20, generator=generator)
    attacked = x.clone()
    attacked[:, 0, 0, 0] += 0.6
    found = behaviour.measure(model, x, attacked, torch.zeros(20).long(), ["a", "b"])["features"]
    counts = {kind: {part: len(places) for part, places in parts.items()} for kind, parts in found["points"].items()}
    assert counts == {"benign": {"real": 20, "dummy": 0}, "adversarial": {"real": 0, "dummy": 20}}
    assert {place[0] for place in found["points"]["benign"]["real"]} == {-0.3}
    assert {place[0] for place in found["points"]["adversarial"]["dummy"]} == {0.3}
    spread = x[:, 0, 0, 1].double()
    expected = (spread - spread.mean()).tolist()
    assert [place[1] for place in found["points"]["benign"]["real"]] == pytest.approx(expected, abs=1e-3)
    assert found["explained"][0] == pytest.approx(0.09 / (0.09 + float(spread.var(correction=0))), abs=1e-3)
    assert sum(found["explained"]) == pytest.approx(1, abs=1e-3)
