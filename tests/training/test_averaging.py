from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ducat.models import build
from ducat.training.averaging import WeightAverage, perturbed_weights, update_batch_norm


def make_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build("small", 10, channels=1, width=4)


def make_batch(seed: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def differing_keys(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [key for key in first if not torch.equal(first[key], second[key])]


def walk(model: nn.Module, steps: int):
    """Yield `model` after each of `steps` random changes of all its floating-point tensors, as training makes them."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.startswith("normalize."):
                    continue
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator))
                else:
                    tensor.fill_(step + 1)
        yield model


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_exponential_average_against_its_closed_form(decay):
    # Unrolled: the value of update i weighs (1 - d_i) d_{i+1} ... d_{n-1}, where update 0 replaces everything.
    steps = 40
    average, history = WeightAverage(make_model(), decay=decay), []
    for model in walk(make_model(1), steps):
        average.update(model)
        history.append(model.network[0].weight.detach().double().numpy().copy())
    decays = [0.0] + [min(decay, (1 + n) / (10 + n)) for n in range(1, steps)]
    weights = [(1 - decays[i]) * np.prod(decays[i + 1 :]) for i in range(steps)]
    assert sum(weights) == pytest.approx(1)
    expected = sum(weight * value for weight, value in zip(weights, history, strict=True))
    np.testing.assert_allclose(average.module.network[0].weight.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_without_decay_it_is_the_mean_of_what_it_was_given():
    average, history = WeightAverage(make_model()), []
    for model in walk(make_model(1), 7):
        average.update(model)
        history.append(snapshot(model))
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            expected = np.mean([state[key].double().numpy() for state in history], axis=0)
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_a_young_exponential_average_has_left_the_initialisation():
    # Undamped, 200 updates at 0.999 would leave 82 % of the starting point.
    average = WeightAverage(make_model(), decay=0.999)
    model = make_model()
    average.update(model)
    with torch.no_grad():
        model.network[0].weight.add_(1)
    for _ in range(200):
        average.update(model)
    left = (model.network[0].weight - average.module.network[0].weight).mean()
    assert 0 <= left < 0.01


@pytest.mark.parametrize("decay", [None, 0.9])
def test_batch_norm_statistics_are_averaged_and_counters_stay_whole(decay):
    average = WeightAverage(make_model(), decay=decay)
    means = []
    for model in walk(make_model(1), 3):
        average.update(model)
        means.append(model.network[1].running_mean.clone())
    batch_norm = average.module.network[1]
    assert batch_norm.num_batches_tracked.dtype == torch.int64
    assert batch_norm.num_batches_tracked == 3
    lowest, highest = torch.stack(means).amin(0), torch.stack(means).amax(0)
    assert ((batch_norm.running_mean > lowest) & (batch_norm.running_mean < highest)).all()


@pytest.mark.parametrize("decay", [None, 0.9])
def test_resumed_average_goes_on_bit_by_bit(decay):
    uninterrupted = WeightAverage(make_model(), decay=decay)
    resumed = None
    for step, model in enumerate(walk(make_model(1), 6)):
        uninterrupted.update(model)
        if step == 2:
            state = snapshot(uninterrupted)
            resumed = WeightAverage(make_model(2), decay=decay)
            resumed.load_state_dict(state)
        elif resumed is not None:
            resumed.update(model)
    assert all(isinstance(value, torch.Tensor) for value in uninterrupted.state_dict().values())
    assert differing_keys(uninterrupted.state_dict(), resumed.state_dict()) == []


def test_averaging_leaves_the_trained_model_alone():
    model = make_model(1).train()
    before = snapshot(model)
    average = WeightAverage(model, decay=0.5)
    average.update(model)
    average.update(make_model(2))
    assert differing_keys(before, model.state_dict()) == []
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in average.module.modules())
    images, _ = make_batch()
    assert torch.equal(average(images), average.module(images))


def test_average_of_one_model_is_that_model():
    model = make_model(1)
    average = WeightAverage(make_model(2), decay=0.999)
    for _ in range(5):
        average.update(model)
    assert differing_keys(average.module.state_dict(), model.state_dict()) == []


def test_average_refuses_a_model_of_another_shape():
    average = WeightAverage(build("small", 10, channels=1, width=4))
    with pytest.raises(ValueError, match="no longer has the shape of its weight average"):
        average.update(build("small", 20, channels=1, width=4))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_average_refuses_decays_out_of_range(decay):
    with pytest.raises(ValueError, match=r"decay=.* is outside \[0, 1\)"):
        WeightAverage(make_model(), decay=decay)


def test_update_batch_norm_measures_the_batches():
    model = make_model()
    first = model.network[0]
    batches = [make_batch(seed)[0] for seed in range(3)]
    update_batch_norm(model, iter(batches))
    activations = [first(images).detach().double().numpy() for images in batches]
    np.testing.assert_allclose(
        model.network[1].running_mean.numpy(),
        np.mean([batch.mean(axis=(0, 2, 3)) for batch in activations], axis=0),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        model.network[1].running_var.numpy(),
        np.mean([batch.var(axis=(0, 2, 3), ddof=0) * 512 / 511 for batch in activations], axis=0),
        rtol=1e-4,
        atol=1e-6,
    )


def test_update_batch_norm_restores_modes_and_momenta():
    model = make_model().train()
    model.network[1].eval()
    model.network[4].momentum = 0.3
    parameters = [parameter.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    update_batch_norm(model, [make_batch()[0]])
    assert [module.training for module in model.modules()] == modes
    assert [model.network[i].momentum for i in (1, 4)] == [0.1, 0.3]
    assert all(torch.equal(old, new) for old, new in zip(parameters, model.parameters(), strict=True))


def test_update_batch_norm_refuses_to_leave_no_statistics():
    with pytest.raises(ValueError, match="no batches"):
        update_batch_norm(make_model(), [])


def test_perturbation_is_the_normalised_gradient_times_gamma():
    model, (images, labels) = make_model(), make_batch()
    before = {name: weight.detach().double().numpy().copy() for name, weight in model.named_parameters()}
    F.cross_entropy(model(images), labels).backward()
    gradients = {name: weight.grad.double().numpy().copy() for name, weight in model.named_parameters()}
    with perturbed_weights(model, lambda: F.cross_entropy(model(images), labels), gamma=0.02):
        inside = {name: weight.detach().double().numpy().copy() for name, weight in model.named_parameters()}
    for name, weight in before.items():
        change = inside[name] - weight
        if weight.ndim > 1:
            direction = gradients[name] / np.linalg.norm(gradients[name])
            np.testing.assert_allclose(change, 0.02 * np.linalg.norm(weight) * direction, atol=1e-6)
            assert np.linalg.norm(change) / np.linalg.norm(weight) == pytest.approx(0.02, rel=1e-3)
        else:
            assert not change.any()


def test_perturbation_raises_the_loss():
    model, (images, labels) = make_model(), make_batch()

    def loss():
        return F.cross_entropy(model(images), labels)

    before = loss().item()
    with perturbed_weights(model, loss, gamma=0.01):
        inside = loss().item()
    assert inside > before + 1e-3


def test_perturbation_is_undone_bit_by_bit_and_leaves_the_gradients():
    model, (images, labels) = make_model(), make_batch()

    def loss():
        return F.cross_entropy(model(images), labels)

    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with perturbed_weights(model, loss, gamma=0.01):
        assert all(parameter.grad is None for parameter in model.parameters())
        loss().backward()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not any(torch.equal(old, new.grad) for old, new in zip(plain, model.parameters(), strict=True))


def test_perturbation_is_undone_when_the_body_raises():
    model, (images, labels) = make_model(), make_batch()
    before = snapshot(model)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        perturbed_weights(model, lambda: F.cross_entropy(model(images), labels)),
    ):
        raise RuntimeError("out of memory")
    assert differing_keys(before, model.state_dict()) == []


def test_batch_norm_still_learns_after_the_loss_raises():
    model, (images, _) = make_model(), make_batch()

    def loss():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), perturbed_weights(model, loss):
        pytest.fail("the body must not run")
    before = snapshot(model)
    model(images)
    assert "network.1.running_mean" in differing_keys(before, model.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_ascent_leaves_batch_norm_statistics_and_modes(training):
    model, (images, labels) = make_model().train(training), make_batch()
    model.network[4].eval()
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    with perturbed_weights(model, lambda: F.cross_entropy(model(images), labels)):
        assert all(torch.equal(old, new) for old, new in zip(buffers, model.buffers(), strict=True))
        model(images)
    assert model.network[1].num_batches_tracked == int(training)
    assert [module.training for module in model.modules()] == modes


def test_perturbation_reaches_a_forward_under_one_autocast():
    # Autocast caches low-precision weights: the loss inside would else be the one outside, and the one after stale.
    model, (images, labels) = make_model().eval(), make_batch()

    def loss():
        return F.cross_entropy(model(images).float(), labels)

    with torch.autocast("cpu", torch.bfloat16):
        before = loss().item()
        with perturbed_weights(model, loss, gamma=0.2):
            inside = loss().item()
        after = loss().item()
    assert inside > before + 0.01
    assert after == before


def test_weights_without_a_gradient_stay():
    model, (images, labels) = make_model(), make_batch()
    frozen = model.network[0].weight.requires_grad_(False)
    holder = nn.ModuleDict({"model": model, "unused": nn.Linear(3, 3)})
    before = frozen.clone(), holder["unused"].weight.detach().clone()
    with perturbed_weights(holder, lambda: F.cross_entropy(model(images), labels)):
        assert torch.equal(frozen, before[0])
        assert torch.equal(holder["unused"].weight, before[1])


@pytest.mark.parametrize("gamma", [0.0, -1e-3, float("nan")])
def test_perturbation_refuses_gamma_out_of_range(gamma):
    model = make_model()
    with (
        pytest.raises(ValueError, match=r"gamma=.* is not positive"),
        perturbed_weights(model, lambda: model(make_batch()[0]).sum(), gamma),
    ):
        pytest.fail("the body must not run")
