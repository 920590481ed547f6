"""Optimisers, clipping, accumulation, a ball that grows and half precision, against the plain things they stand for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

import ducat
from ducat import weights
from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, ModelConfig
from ducat.training import Step, resume, train
from tests.support import TINY, Watcher, unvalidated

RESOLVED = replace(TINY, threat=replace(TINY.threat, eps=0.1)).resolve(ducat.data.SPECS["digits"])


def settings(config: Config = RESOLVED, **train: Any) -> Config:
    return replace(config, train=replace(config.train, **train))


def plain_network() -> nn.Sequential:
    """No batch norm, so that a batch can be split."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 10))


def batch(views: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 10, (32,), generator=generator).repeat(views)
    return torch.rand(32 * views, 1, 8, 8, generator=generator), y


def stepped(config: Config, model: nn.Module, steps: int = 2, views: int = 1) -> tuple[Step, list[float]]:
    step = Step(config, model, batch()[0][:2])
    return step, [float(step(*batch(views), 0, number, steps)) for number in range(steps)]


@pytest.mark.parametrize("method", ["pgd-at", "trades", "mart", "consistency"])
@pytest.mark.parametrize("kind", ["off", "recovery-aware"])
def test_parts_of_a_batch_add_up_to_the_whole(method: str, kind: str) -> None:
    config = replace(RESOLVED, method=MethodConfig(method), dummy=DummyConfig(kind, start_epoch=0))  # type: ignore[arg-type]
    views = 2 if method == "consistency" else 1
    made = []
    for parts in (1, 4):
        model = plain_network()
        if kind != "off":
            ducat.add_dummy_classes(model)
        made.append((model, stepped(settings(config, accumulate=parts), model, views=views)[1]))
    (whole, losses), (split, others) = made
    assert others == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_adamw_decays_matrices_alone() -> None:
    config = settings(optimizer="adamw", learning_rate=0.01, weight_decay=0.5)
    model = plain_network()
    step = Step(config, model, batch()[0][:2])
    before = {name: value.clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.01 * 0.5) if parameter.ndim > 1 else before[name]
        torch.testing.assert_close(parameter, expected)


def test_weights_are_perturbed_alike_with_dummy_classes_that_are_not_in_use_and_without() -> None:
    made = []
    for kind in ("off", "recovery-aware"):
        model = plain_network() if kind == "off" else ducat.add_dummy_classes(plain_network())
        config = replace(settings(awp=0.5), dummy=DummyConfig(kind, start_epoch=2))  # type: ignore[arg-type]
        stepped(config, model)
        made.append(model[4].weight[:10])
    torch.testing.assert_close(*made)


def test_a_long_gradient_is_shortened() -> None:
    moved = []
    for clip in (0.0, 0.01):
        model = plain_network()
        before = [parameter.clone() for parameter in model.parameters()]
        stepped(settings(clip_norm=clip, momentum=0.0, weight_decay=0.0, learning_rate=1.0), model, steps=1)
        changes = zip(model.parameters(), before, strict=True)
        moved.append(torch.cat([(now - then).flatten() for now, then in changes]).norm())
    assert moved[0] > 0.1
    torch.testing.assert_close(moved[1], torch.tensor(0.01), rtol=1e-3, atol=0)


def test_eps_grows_over_the_first_epochs_and_validation_keeps_the_whole() -> None:
    step = Step(settings(eps_ramp_epochs=2, epochs=4), plain_network(), batch()[0][:2])
    reached, step_sizes = [], []
    for epoch in range(3):
        for number in range(2):
            step(*batch(), epoch, number, 2)
            reached.append(step.trained_on.eps)
            step_sizes.append(step.trained_on.step_size / step.trained_on.eps)
            adversarial = step.attack(*batch(), epoch, number)
            assert (adversarial - batch()[0]).abs().max() <= reached[-1] + 1e-6
    assert reached == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert step_sizes == pytest.approx([0.25] * 6)
    assert step.threat.eps == 0.1


def test_fp16_scales_the_loss_and_trains_as_float32_does() -> None:
    made = []
    for precision in ("float32", "fp16"):
        model = plain_network()
        step, losses = stepped(settings(precision=precision), model, steps=3)
        made.append((losses, step))
    assert made[1][0] == pytest.approx(made[0][0], rel=0.02)
    assert made[1][1].scaler.is_enabled()
    assert not made[0][1].scaler.is_enabled()
    assert all(parameter.dtype == torch.float32 for parameter in made[1][1].model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "learning_rate": 0.003, "clip_norm": 1.0},
        {"accumulate": 2, "eps_ramp_epochs": 2},
        {"precision": "fp16"},
    ],
    ids=["adamw", "accumulation and a ramp", "fp16"],
)
def test_a_run_goes_on_bit_by_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    config = settings(TINY, **options)
    config = replace(config, dummy=DummyConfig("recovery-aware", start_epoch=1))
    whole = train(config, tmp_path / "whole", validate=unvalidated)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, Watcher(leave_after=1), validate=unvalidated)
    continued = resume(tmp_path / "run", validate=unvalidated)
    states = [weights.read(folder.checkpoint_path("last")).weights for folder in (whole, continued)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [row["loss"] for row in whole.metrics] == [row["loss"] for row in continued.metrics]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, r"train\.accumulate=0 must be at least 1"),
        ({"accumulate": 5}, r"train\.accumulate=5 does not divide train\.batch_size=32"),
        ({"accumulate": 2, "awp": 0.01}, r"train\.awp=0\.01 needs whole batches: choose train\.accumulate=1"),
        ({"clip_norm": -1}, r"train\.clip_norm=-1 must be at least 0"),
        ({"eps_ramp_epochs": -1}, r"train\.eps_ramp_epochs=-1 must be at least 0"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**options)


def test_a_last_batch_of_one_image_that_batch_norm_cannot_take_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config = replace(TINY, data=DataConfig("digits", samples=65), train=replace(TINY.train, epochs=1, drop_last=False))
    deep = replace(config, model=ModelConfig("resnet18", width=4))  # its last maps are of one pixel
    with pytest.raises(ValueError, match=r"needs two values of a channel: choose train\.drop_last=true or another"):
        train(deep, tmp_path, validate=unvalidated)
    assert not list(tmp_path.iterdir())
    two = replace(deep, name="two views", method=MethodConfig("consistency"))
    for fine in (two, replace(config, name="wide maps")):
        assert train(fine, tmp_path, validate=unvalidated).manifest["status"] == "finished"


@pytest.mark.parametrize(
    ("name", "value"), [("MIXED_PRECISION", "bf16"), ("GRADIENT_ACCUMULATION_STEPS", "4"), ("DYNAMO_BACKEND", "EAGER")]
)
def test_the_environment_of_a_launcher_changes_no_setting(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = train(replace(TINY, name="plain"), tmp_path, validate=unvalidated)
    AcceleratorState._reset_state(reset_partial_state=True)  # the environment is read once in a process
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    launched = train(replace(TINY, name="launched"), tmp_path, validate=unvalidated)
    assert [row["loss"] for row in launched.metrics] == [row["loss"] for row in plain.metrics]


def test_the_device_of_an_earlier_run_in_the_process_is_not_the_next_ones() -> None:
    for device, only_cpu in (("cpu", True), ("auto", False), ("cpu", True)):
        Step(settings(device=device), plain_network(), batch()[0][:2])
        assert PartialState._shared_state["_cpu"] is only_cpu
