import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ducat
from ducat.threat import TOLERANCE

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
threats = st.one_of(
    st.builds(lambda eps, step: ducat.ThreatModel("linf", eps, step), st.floats(0, 1), st.floats(0, 1)),
    st.builds(lambda eps, step: ducat.ThreatModel("l2", eps, step), st.floats(0, 5), st.floats(0, 5)),
    st.builds(lambda eps, step: ducat.ThreatModel("l1", eps, step), st.floats(0, 40), st.floats(0, 40)),
)


def lengths(delta: torch.Tensor, norm: str) -> np.ndarray:
    flat = delta.double().flatten(1).numpy()
    return np.linalg.norm(flat, {"linf": math.inf, "l2": 2, "l1": 1}[norm], axis=1)


@given(shapes, threats, st.integers(0, 2**31))
def test_starts_and_projections_stay_in_the_ball_and_the_bounds(
    shape: tuple[int, ...], threat: ducat.ThreatModel, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Values outside (0, 1) are cut to the bounds: images with pixels exactly at them are the rule.
    x = (torch.rand(shape, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    far = x + 10 * torch.randn(shape, generator=generator)
    for moved in (threat.random_start(x, generator), threat.project(far, x)):
        assert moved.min() >= 0
        assert moved.max() <= 1
        assert (lengths(moved.double() - x.double(), threat.norm) <= threat.eps + TOLERANCE).all()
        assert threat.allows(moved, x).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_starts_in_other_precisions_are_numbers(norm: str, dtype: torch.dtype) -> None:
    x = torch.full((8, 3, 32, 32), 0.5, dtype=dtype)
    start = ducat.ThreatModel(norm).random_start(x, torch.Generator().manual_seed(0))
    assert start.isfinite().all()
    assert start.dtype == dtype


@given(shapes, threats)
def test_a_projection_leaves_what_is_inside(shape: tuple[int, ...], threat: ducat.ThreatModel) -> None:
    x = torch.full(shape, 0.5)
    inside = threat.random_start(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(threat.project(inside, x), inside, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_starts_fill_the_ball(norm: str) -> None:
    threat = ducat.ThreatModel(norm, 0.1)
    x = torch.full((20_000, 1, 1, 2), 0.5)
    share = lengths(threat.random_start(x, torch.Generator().manual_seed(0)) - x, norm) / 0.1
    # In two dimensions a uniform draw has a share t^2 of its mass within t of the radius, in either norm.
    for t in (0.25, 0.5, 0.75):
        assert (share <= t).mean() == pytest.approx(t * t, abs=0.015)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_direction_is_the_steepest_of_unit_length(norm: str) -> None:
    gradient = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    direction = ducat.ThreatModel(norm, 0.5).direction(gradient)
    np.testing.assert_allclose(lengths(direction, norm), 1, rtol=1e-5)
    gain = (direction * gradient).flatten(1).sum(1)
    order = {"linf": 1, "l2": 2, "l1": math.inf}[norm]
    torch.testing.assert_close(gain, torch.linalg.vector_norm(gradient.flatten(1), ord=order, dim=1))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-2, 3)), min_size=1, max_size=8),
    st.floats(0, 4),
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
)
def test_an_l1_projection_is_the_nearest_point_of_ball_and_box(
    pixels: list[tuple[float, float]], eps: float, elsewhere: list[float]
) -> None:
    x, far = torch.tensor(pixels, dtype=torch.float64).T[..., None, None].unbind(0)
    x, far = x.view(1, 1, 1, -1), far.view(1, 1, 1, -1)
    near = ducat.ThreatModel("l1", eps).project(far, x)
    assert near.min() >= 0
    assert near.max() <= 1
    assert (near - x).abs().sum() <= eps + 1e-9
    # Of a convex set, the nearest point is the one from which every other point lies away from `far`.
    other = torch.tensor(elsewhere[: len(pixels)], dtype=torch.float64).view_as(x)
    for share in (1e-3, 0.1, 1.0):
        candidate = x + (other - x) * min(share, eps / max(float((other - x).abs().sum()), 1e-12))
        assert ((far - near) * (candidate - near)).sum() <= 1e-5  # the radius is short of eps by a float32 rounding


def test_an_l1_step_moves_the_largest_gradients_that_have_room() -> None:
    threat = ducat.ThreatModel("l1", 0.8)
    x = torch.full((2, 1, 1, 80), 0.5)
    x[..., 0], x[..., 2] = 1.0, 0.9  # no room, and little of it
    gradient = torch.linspace(2, 1, 80).view(1, 1, 1, 80) * torch.tensor([1.0, -1.0]).repeat(40)
    moved = threat.ascend(x, gradient.expand_as(x), torch.tensor([0.8, 0.4]).view(2, 1, 1, 1)) - x
    # 5 % of 80 pixels share 0.8, so that each moves by up to 0.2; the third has room for half of that.
    expected = torch.zeros(2, 1, 1, 80)
    expected[0, 0, 0, 1:6] = torch.tensor([-0.2, 0.1, -0.2, 0.2, -0.1])
    expected[1, 0, 0, 1:4] = torch.tensor([-0.2, 0.1, -0.1])
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0])
def test_a_tiny_gradient_still_has_a_direction_and_none_has_none(norm: str, scale: float) -> None:
    threat = ducat.ThreatModel(norm, 0.5)
    np.testing.assert_allclose(lengths(threat.direction(torch.full((1, 1, 2, 2), scale)), norm), 1, rtol=1e-5)
    assert not threat.direction(torch.zeros(1, 1, 2, 2)).any()


@pytest.mark.parametrize("bad", ["outside the ball", "above 1", "below 0", "nan"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_breaks_the_rules_is_not_allowed(bad: str, norm: str) -> None:
    threat = ducat.ThreatModel(norm, 0.1)
    x = torch.tensor([0.5, 0.99, 0.01]).view(1, 1, 1, 3).repeat(2, 1, 1, 1)
    moved = x.clone()
    moved[1, 0, 0] += {
        "outside the ball": torch.tensor([0.1001, 0.0, 0.0]),
        "above 1": torch.tensor([0.0, 0.011, 0.0]),
        "below 0": torch.tensor([0.0, 0.0, -0.011]),
        "nan": torch.tensor([math.nan, 0.0, 0.0]),
    }[bad]
    assert threat.allows(moved, x).tolist() == [True, False]


def test_defaults_are_the_fields_and_follow_eps() -> None:
    standard = ducat.ThreatModel()
    assert (standard.eps, standard.step_size, standard.steps) == (8 / 255, 2 / 255, 10)
    assert (ducat.ThreatModel("l2").eps, ducat.ThreatModel("l1").eps) == (128 / 255, 12)
    assert ducat.ThreatModel("l2").step_size == pytest.approx(15 / 255)
    assert ducat.ThreatModel(eps=0.2).step_size == pytest.approx(0.05)
    assert ducat.ThreatModel(eps="4/255", step_size="1/255", steps=7) == ducat.ThreatModel("linf", 4 / 255, 1 / 255, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, r"eps=8 is outside \[0, 1\]: images are in \[0, 1\]; did you mean 8/255\?"),
        ({"step_size": 2}, "did you mean 2/255"),
        ({"eps": -0.1}, "eps=-0.1 is negative"),
        ({"eps": "8/0"}, "eps='8/0' is not a number"),
        ({"eps": "eight"}, "eps='eight' is not a number"),
        ({"eps": math.nan}, "not finite"),
        ({"norm": "l0"}, "norm='l0' is unknown"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_bad_settings_say_what_to_change(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ducat.ThreatModel(**settings)
