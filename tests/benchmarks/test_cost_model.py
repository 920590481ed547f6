"""The cost model's count of forward passes is what the steps compute."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import cost, cost_model
from benchmarks.training_step import Ours, Recipe

ROOT = Path(__file__).parents[2]


class Operations(TorchDispatchMode):
    """Counts the floating-point operations that are done; FlopCounterMode cannot follow `torch.autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


PLAIN = Recipe(bf16=False, channels_last=False, folded=False)


@pytest.mark.parametrize(
    ("method", "dummy", "attack", "passes"),
    [
        ("pgd-at", "off", "pgd", 2 * 10 + 3),
        ("pgd-at", "published", "pgd", 2 * 10 + 6),
        ("pgd-at", "recovery-aware", "pgd-cosine", 2 * 5 + 6),
        ("trades", "off", "pgd", 1 + 2 * 10 + 6),
        ("mart", "off", "pgd", 2 * 10 + 6),
        ("mart", "recovery-aware", "pgd", 2 * 10 + 12),
        ("consistency", "off", "fgsm-rs", 2 * (2 * 1 + 3)),
    ],
)
def test_a_step_computes_the_passes_that_are_counted(method: str, dummy: str, attack: str, passes: int) -> None:
    step = Ours(Recipe(**{**vars(PLAIN), "attack": attack}), method, dummy, model="resnet8", batch_size=2)
    assert cost_model.per_image(step.objective, step.threat) == passes
    with Operations() as counted:
        step()
    assert counted.total / (2 * cost_model.forward_flops("resnet8", 32)) == pytest.approx(passes, rel=0.02)


def test_a_recipe_costs_its_passes_times_its_images() -> None:
    row = cost_model.cost(ROOT / "recipes" / "cifar10-paper.yaml", share=0.5, cards=["A100"])
    assert row is not None
    # 105 epochs of 23 passes and 25 of 26; 49,000 images, since 1,000 are held out; 0.5554 G multiply-adds.
    assert row["PFLOP"] == pytest.approx((105 * 23 + 25 * 26) * 49_000 * 2 * 0.5554e-6, rel=1e-3)
    assert float(row["A100, hours"]) == pytest.approx(row["PFLOP"] * 1e15 / 156e12 / 3600, rel=0.05)
    assert row["dummy phase, whole run"] == "+2.5 %"


def test_every_recipe_is_counted_on_the_images_that_it_trains_on_but_those_of_other_peoples_networks() -> None:
    rows = {path.stem: cost_model.cost(path, 0.5, ["A100"]) for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    assert {name for name, row in rows.items() if row is None} == {"cifar10-finetune", "digits-vit"}
    released = rows["cifar10-released"]
    assert released is not None
    # 104 epochs of 23 passes and 26 of 26; nothing is held out of 50,000.
    passes = (104 * 23 + 26 * 26) * 50_000
    assert released["PFLOP"] == pytest.approx(passes * released["GFLOP forward"] / 1e6, rel=1e-3)


def test_the_costs_are_measured_side_by_side() -> None:
    rows = cost.measure("resnet8", 2, rounds=1, device="cpu")
    assert rows[0]["to the base"] == 1
    assert {row["varied"] for row in rows} == {"base", "images", "classes", "attack steps"}


def test_processes_share_the_batch_that_is_timed() -> None:
    rows = cost.measure_processes("resnet8", 4, rounds=1, counts=(2,))
    assert [(row["value"], row["seconds"] > 0) for row in rows] == [("2", True)]
