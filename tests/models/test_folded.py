import pytest
import torch
from torch import nn

from ducat.dummy import add_dummy_classes
from ducat.models import build
from ducat.models.folded import fold_batch_norm


def trained(name: str) -> nn.Module:
    """A network whose batch norms hold statistics and scales of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name, 4, width=4)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias)
        with torch.no_grad():
            for _ in range(3):
                model(torch.rand(8, 3, 16, 16))
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    # Of a pre-activation block the second batch norm alone follows a convolution whose output nothing else reads; the
    # stem's output is read by a shortcut too, but not in a wide network, whose first shortcut begins later.
    [("small", 0), ("resnet8", 0), ("resnet18-bottleneck", 0), ("preact-resnet18", 9), ("wrn-28-10", 12)],
)
def test_a_folded_copy_computes_the_same_with_fewer_norms(name: str, left: int, x: torch.Tensor) -> None:
    model = trained(name)
    folded = fold_batch_norm(model, x)
    assert folded is not None
    assert norms(folded) == left
    assert model.training
    x.requires_grad_()
    model.eval()
    expected, found = model(x), folded(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(logits.logsumexp(1).sum(), x)[0] for logits in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


def test_a_new_network_hides_no_wrong_pair(x: torch.Tensor) -> None:
    # Statistics of 0 and 1 make any folding look right: the stem of a pre-activation network feeds a shortcut too.
    folded = fold_batch_norm(build("preact-resnet20", 4, width=4), x)
    assert folded is not None
    assert not any(convolution == "network.conv1" for convolution, _ in folded._pairs)


def test_refresh_follows_the_network_and_nothing_else_does(x: torch.Tensor) -> None:
    model = add_dummy_classes(trained("resnet8"))
    folded = fold_batch_norm(model, x)
    assert folded is not None
    before = folded(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.train()(x + 0.1)
    assert torch.equal(folded(x), before)
    torch.testing.assert_close(folded.refresh()(x), model.eval()(x), atol=1e-4, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


class Reused(nn.Module):
    """A batch norm after a convolution whose output a shortcut reads, and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.again, self.shared = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.norm(x)
        x = self.shared(self.again(self.shared(self.again(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("silent", [False, True])
def test_what_cannot_be_folded_is_left(x: torch.Tensor, silent: bool) -> None:
    model = Reused()
    if silent:  # a new head of zeros gives the same logits whatever comes before it
        nn.init.zeros_(model.head.weight)
    assert fold_batch_norm(model, x) is None
    assert fold_batch_norm(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), x) is None
