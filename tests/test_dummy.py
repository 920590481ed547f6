import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ducat
from ducat.dummy import dummy_head

logit_arrays = st.integers(1, 6).flatmap(
    lambda classes: st.lists(
        st.lists(st.floats(-30, 30, width=32), min_size=2 * classes, max_size=2 * classes), min_size=1, max_size=5
    )
)


@given(st.integers(1, 20), st.floats(0, 1), st.data())
def test_two_hot_rows_share_one_between_a_class_and_its_dummy(classes: int, weight: float, data: st.DataObject) -> None:
    y = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=8)))
    expected = np.zeros((len(y), 2 * classes))
    for row, label in enumerate(y.tolist()):
        expected[row, label] += 1 - weight
        expected[row, label + classes] += weight
    targets = ducat.two_hot(y, classes, weight)
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-7)
    np.testing.assert_allclose(targets.sum(1).numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_two_hot_rejects_a_weight_outside_0_1(weight: float) -> None:
    with pytest.raises(ValueError, match="dummy_weight"):
        ducat.two_hot(torch.tensor([0]), 3, weight)


@pytest.mark.parametrize("label", [-1, 3])
def test_two_hot_rejects_a_label_that_is_no_class(label: int) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 3\)"):
        ducat.two_hot(torch.tensor([label]), 3, 0.25)


@given(logit_arrays)
def test_recovered_prediction_is_argmax_mod_c(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    classes = logits.shape[1] // 2
    recovered = ducat.recover(logits)
    assert recovered.shape == (len(rows), classes)
    # With a tie the two may name different classes, both of them right: compare what the chosen class is worth.
    chosen = recovered.argmax(1)
    assert torch.equal(recovered.gather(1, chosen[:, None]).squeeze(1), logits.amax(1))
    untied = (logits == logits.amax(1, keepdim=True)).sum(1) == 1
    assert torch.equal(chosen[untied], (logits.argmax(1) % classes)[untied])


@given(logit_arrays)
def test_logsumexp_recovery_gives_the_summed_probabilities(rows: list[list[float]]) -> None:
    logits = np.array(rows, dtype=np.float64)
    classes = logits.shape[1] // 2
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    q = ducat.recover(torch.tensor(logits), "logsumexp").softmax(1)
    np.testing.assert_allclose(q.numpy(), p[:, :classes] + p[:, classes:], atol=1e-9)


def test_recover_rejects_what_cannot_be_pairs() -> None:
    with pytest.raises(ValueError, match="must be even"):
        ducat.recover(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="'mean' is unknown: choose from max, logsumexp"):
        ducat.recover(torch.zeros(1, 4), "mean")


def plain_network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5))


@pytest.mark.parametrize("how", ["max", "logsumexp"])
def test_copied_dummy_classes_leave_the_recovered_prediction_as_it_was(how: str) -> None:
    model, x = plain_network(), torch.rand(64, 3, 2, 2)
    before = model(x)
    assert ducat.add_dummy_classes(model) is model
    recovered = ducat.RecoveredClassifier(model, how)(x)
    assert torch.equal(recovered.argmax(1), before.argmax(1))
    torch.testing.assert_close(recovered.softmax(1), before.softmax(1))


def test_random_dummy_rows_come_from_the_generator_and_leave_the_real_rows_alone() -> None:
    models = [plain_network() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    real = models[0][3].weight.clone()
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        ducat.add_dummy_classes(model, "random", generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    first, same, other = (model[3].weight for model in models)
    assert torch.equal(first[:5], real)
    assert torch.equal(first, same)
    assert not torch.equal(first[5:], other[5:])
    assert first[5:].abs().max() <= 7**-0.5


def test_the_last_linear_layer_is_doubled_where_it_is_nested() -> None:
    model = nn.Sequential(plain_network(), nn.Identity())
    ducat.add_dummy_classes(model)
    head = dummy_head(model)
    assert head is model[0][3]
    assert (head.out_features, head.num_classes) == (10, 5)
    assert model[0][1].out_features == 7


def test_add_dummy_classes_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        ducat.add_dummy_classes(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="already has dummy classes"):
        ducat.add_dummy_classes(ducat.add_dummy_classes(plain_network()))
    with pytest.raises(ValueError, match="'zero' is unknown"):
        ducat.add_dummy_classes(plain_network(), "zero")
    with pytest.raises(ValueError, match=r"wrap it in nn\.Sequential"):
        ducat.add_dummy_classes(nn.Linear(2, 2))
