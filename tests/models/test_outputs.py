from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ducat.models.outputs import LogitsOnly, as_classifier, logits_of

LOGITS = torch.rand(2, 5)
WITH_AUXILIARY = namedtuple("WITH_AUXILIARY", ["aux_logits", "logits"])


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, torch.zeros(2, 5)),
        [LOGITS],
        {"loss": None, "logits": LOGITS},
        SimpleNamespace(logits=LOGITS, hidden_states=None),
        WITH_AUXILIARY(torch.zeros(2, 5), LOGITS),
        (SimpleNamespace(logits=LOGITS), None),
    ],
    ids=["tensor", "tuple", "list", "mapping", "object", "named tuple", "object in a tuple"],
)
def test_the_logits_are_found_in_what_networks_return(output: Any) -> None:
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"scores": LOGITS}, "returns a dict, which has no logits"),
        ("logits", "returns a str"),
        ((), "returns a tuple"),
        (None, "returns a NoneType"),
        (torch.zeros(2, 5, 1, 1), r"returns shape \(2, 5, 1, 1\): logits have shape \(batch, outputs\)"),
    ],
)
def test_what_has_no_logits_is_refused(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logits_of(output)


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x.flatten(1))}


def test_a_view_shares_the_networks_layers_and_mode() -> None:
    model, x = Returns().eval(), torch.rand(3, 1, 2, 2)
    view = as_classifier(model)
    assert isinstance(view, LogitsOnly)
    assert not view.training
    assert torch.equal(view(x), model(x)["logits"])
    assert next(view.parameters()) is model.layer.weight
    assert as_classifier(view) is view
