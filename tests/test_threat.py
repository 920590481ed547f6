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
)


def lengths(delta: torch.Tensor, norm: str) -> np.ndarray:
    flat = delta.double().flatten(1).numpy()
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))


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
        assert (lengths(moved - x, threat.norm) <= threat.eps + TOLERANCE).all()
        assert threat.allows(moved, x).all()


@given(shapes, threats)
def test_a_projection_leaves_what_is_inside(shape: tuple[int, ...], threat: ducat.ThreatModel) -> None:
    x = torch.full(shape, 0.5)
    inside = threat.random_start(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(threat.project(inside, x), inside, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(norm: str) -> None:
    threat = ducat.ThreatModel(norm, 0.1)
    x = torch.full((20_000, 1, 1, 2), 0.5)
    share = lengths(threat.random_start(x, torch.Generator().manual_seed(0)) - x, norm) / 0.1
    # In two dimensions a uniform draw has a share t^2 of its mass within t of the radius, in either norm.
    for t in (0.25, 0.5, 0.75):
        assert (share <= t).mean() == pytest.approx(t * t, abs=0.015)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_direction_is_the_steepest_of_unit_length(norm: str) -> None:
    gradient = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    direction = ducat.ThreatModel(norm, 0.5).direction(gradient)
    np.testing.assert_allclose(lengths(direction, norm), 1, rtol=1e-5)
    gain = (direction * gradient).flatten(1).sum(1)
    dual = gradient.flatten(1).abs().sum(1) if norm == "linf" else gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(gain, dual)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0])
def test_a_tiny_gradient_still_has_a_direction_and_none_has_none(norm: str, scale: float) -> None:
    threat = ducat.ThreatModel(norm, 0.5)
    np.testing.assert_allclose(lengths(threat.direction(torch.full((1, 1, 2, 2), scale)), norm), 1, rtol=1e-5)
    assert not threat.direction(torch.zeros(1, 1, 2, 2)).any()


@pytest.mark.parametrize("bad", ["outside the ball", "above 1", "below 0", "nan"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
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
    assert ducat.ThreatModel("l2").eps == 128 / 255
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
        ({"norm": "l1"}, "norm='l1' is unknown"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_bad_settings_say_what_to_change(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ducat.ThreatModel(**settings)
