"""The training step beside research code's, in one process and in turn: images/s, their ratio, and peak memory.

    python -m benchmarks.training_step [--model resnet18] [--batch 128] [--rounds 2] [--json FILE]
    python -m benchmarks.training_step --memory            # peak memory instead of time, each in a process of its own
    python -m benchmarks.training_step --shares            # what each optimisation brings, one by one
    python -m benchmarks.training_step --strength RUN      # whether the fast attacks are as strong as the slow one

The research-style step is written here as released code writes it: float32, NCHW, and the attack by `loss.backward()`,
which computes the gradients of all parameters too. Its loss is ours, and forwards the same batches: both halves of the
two-hot loss together, those of a regulariser apart. ducat's is `ducat.training.Step`, which `ducat train` runs: the
attack on a folded copy, bf16, channels_last. Both are timed in turn, A B A B; the ratio is that of neighbours, so that
a machine that slows down does not favour one.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ducat.config import Config, DummyConfig, MethodConfig, ThreatConfig, TrainConfig
from ducat.dummy import add_dummy_classes
from ducat.methods import ATTACKS, PHASES, objective
from ducat.models import build
from ducat.models.folded import fold_batch_norm
from ducat.threat import ThreatModel
from ducat.training import Step

CLASSES = 10
KINDS = tuple(PHASES)
ADVERSARIAL = ("pgd-at", "trades", "mart", "consistency")
THREAT = ThreatModel("linf", "8/255", "2/255", 10)


@dataclass(frozen=True)
class Recipe:
    """How ducat's step is computed: each field is one of the optimisations, and can be left out.

    Attributes:
        channels_last: memory layout.
        bf16: the network's passes are autocast.
        folded: the attack sees batch norm folded into the convolutions.
        attack: a row of `methods.ATTACKS`.
        compiled: both passes go through torch.compile.
        mode: of torch.compile; "reduce-overhead" replays the passes as CUDA graphs, those of the attack above all.
    """

    channels_last: bool = True
    bf16: bool = True
    folded: bool = True
    attack: str = "pgd"
    compiled: bool = False
    mode: str | None = None


DUCAT = {"pgd": Recipe(), "pgd-cosine": Recipe(attack="pgd-cosine")}


class Timed:
    """A training step on random images, whose content does not matter to its time.

    Args:
        method: a row of `methods.METHODS`.
        dummy: "off", "published" or "recovery-aware"; with dummy classes it is a step of the dummy phase.
        model: a row of `models.MODELS`.
        batch_size: benign images a step.
        num_classes: C.
        threat: ball and steps of the attack.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        method: str,
        dummy: str,
        *,
        model: str = "resnet18",
        batch_size: int = 128,
        num_classes: int = CLASSES,
        threat: ThreatModel = THREAT,
        device: str = "cpu",
    ) -> None:
        self.threat, self.device = threat, torch.device(device)
        self.objective = objective(method, dummy)
        views = self.objective.method.views
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = build(model, num_classes, mean=(0.5,) * 3, std=(0.25,) * 3)
            if dummy != "off":
                add_dummy_classes(self.network)
            x = torch.rand(batch_size * views, 3, 32, 32)
            y = torch.randint(num_classes, (batch_size,)).repeat(views)
        self.network.to(self.device)
        self.x, self.y = x.to(self.device), y.to(self.device)

    def warm_up(self) -> None:
        """Do a step with few steps of the attack, for what only the first pass of each kind has to do."""
        raise NotImplementedError

    def adversarial(self) -> Tensor:
        """Return the adversarial images of a step."""
        raise NotImplementedError

    def loss(self, adversarial: Tensor) -> Tensor:
        """Return the loss of a step on these adversarial images."""
        return self.objective.loss(self.network, self.x, adversarial, self.y)

    def __call__(self) -> None:
        """Do one step, and wait for it."""
        self._step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _step(self) -> None:
        raise NotImplementedError


class Ours(Timed):
    """`ducat.training.Step`, which `ducat train` runs; the arguments after `recipe` are those of `Timed`."""

    def __init__(self, recipe: Recipe, method: str, dummy: str, *, device: str = "cpu", **sizes: Any) -> None:
        super().__init__(method, dummy, device=device, **sizes)
        threat = self.threat
        config = Config(
            method=MethodConfig(method, attack=recipe.attack),
            dummy=DummyConfig(dummy, start_epoch=0),  # type: ignore[arg-type]
            threat=ThreatConfig(threat.norm, threat.eps, threat.step_size, threat.steps),  # type: ignore[arg-type]
            train=TrainConfig(
                epochs=1,
                learning_rate=0.01,
                schedule="constant",
                precision="bf16" if recipe.bf16 else "float32",
                compile=recipe.compiled,
                device=device,  # type: ignore[arg-type]
            ),
        )
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.step = Step(
            config,
            self.network,
            self.x[:2],
            notice=_refused if recipe.compiled else print,
            layout=layout,
            fold=recipe.folded,
            compile_mode=recipe.mode,
        )
        self.objective = self.step.objective(0)
        self.x = self.x.to(memory_format=layout)

    def warm_up(self) -> None:
        quick = replace(self.objective.inner, step_sizes=self.objective.inner.step_sizes and (1.0,))
        before = self.step.threat, self.step.objective
        self.step.threat = replace(self.threat, steps=1)
        self.step.objective = lambda epoch: replace(self.objective, inner=quick)
        self()
        self.step.threat, self.step.objective = before

    def adversarial(self) -> Tensor:
        return self.step.attack(self.x, self.y, 0, 0)

    def _step(self) -> None:
        self.step(self.x, self.y, 0, 0, 1)


def _refused(text: str) -> None:
    """Stop where a step would be another than its recipe says: not compiled."""
    raise RuntimeError(text)


class Research(Timed):
    """The step as released code writes it; the arguments are those of `Timed`."""

    def __init__(self, *arguments: Any, **sizes: Any) -> None:
        super().__init__(*arguments, **sizes)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def warm_up(self) -> None:
        threat, self.threat = self.threat, replace(self.threat, steps=1)
        self()
        self.threat = threat

    def adversarial(self) -> Tensor:
        """Attack in evaluation mode, with gradients of the parameters as a by-product."""
        goal, x = self.objective, self.x
        self.network.eval()
        if goal.method.objective == "kl":
            with torch.no_grad():
                clean = F.softmax(goal.read(self.network(x)), 1)
        adversarial = x + 0.001 * torch.randn_like(x)
        for _ in range(self.threat.steps):
            adversarial = adversarial.detach().requires_grad_()
            logits = goal.read(self.network(adversarial))
            if goal.method.objective == "kl":
                value = F.kl_div(F.log_softmax(logits, 1), clean, reduction="sum")
            else:
                value = F.cross_entropy(logits, self.y, reduction="sum")
            value.backward()
            assert adversarial.grad is not None
            stepped = adversarial.detach() + self.threat.step_size * adversarial.grad.sign()
            adversarial = stepped.clamp(x - self.threat.eps, x + self.threat.eps).clamp(0, 1)
        self.network.train()
        self.optimizer.zero_grad()
        return adversarial.detach()

    def _step(self) -> None:
        self.network.train()
        self.loss(self.adversarial()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


LADDER: tuple[tuple[str, Callable[..., Timed]], ...] = (
    ("research code's step", Research),
    ("input gradients only", partial(Ours, Recipe(False, False, False))),
    ("channels_last", partial(Ours, Recipe(True, False, False))),
    ("bf16", partial(Ours, Recipe(True, True, False))),
    ("batch norm folded for the attack", partial(Ours, Recipe())),
    ("pgd-cosine: 5 steps as strong as 10", partial(Ours, Recipe(attack="pgd-cosine"))),
)


def seconds(step: Callable[[], None]) -> float:
    """Return the time of one step by the clock on the wall."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def measure(
    method: str,
    dummy: str,
    *,
    model: str = "resnet18",
    batch_size: int = 128,
    rounds: int = 2,
    device: str = "cpu",
    recipes: dict[str, Recipe] | None = None,
) -> list[dict[str, Any]]:
    """Time the research-style step and ducat's in turn, after a warm-up of each.

    Returns:
        A row for each recipe: rates in benign images a second are medians over the rounds; `ratio` is the median of the
        rounds' ratios, `spread` the lowest and the highest of them.
    """
    recipes = DUCAT if recipes is None else recipes
    # What was compiled before counts against a limit, beyond which PyTorch compiles no more and does not say so.
    torch.compiler.reset()
    makers: dict[str, Callable[..., Timed]] = {name: partial(Ours, recipe) for name, recipe in recipes.items()}
    makers = {"research": Research, **makers}
    made = {
        name: make(method, dummy, model=model, batch_size=batch_size, device=device) for name, make in makers.items()
    }
    for step in made.values():
        step.warm_up()
    times = [{name: seconds(step) for name, step in made.items()} for _ in range(rounds)]
    images = {name: batch_size / statistics.median(row[name] for row in times) for name in made}
    rows = []
    for name in recipes:
        ratios = [row["research"] / row[name] for row in times]
        rows.append(
            {
                "method": method,
                "dummy": dummy,
                "attack": name,
                "model": model,
                "batch_size": batch_size,
                "research_images_per_s": round(images["research"], 2),
                "ducat_images_per_s": round(images[name], 2),
                "ratio": round(statistics.median(ratios), 3),
                "spread": [round(min(ratios), 3), round(max(ratios), 3)],
            }
        )
    return rows


def peak_memory(method: str, dummy: str, *, model: str, batch_size: int, device: str) -> list[dict[str, Any]]:
    """Return the peak memory in GiB of two steps of each kind: of the GPU, or of a process of its own on a CPU."""
    sizes = {"model": model, "batch_size": batch_size, "device": device}
    rows = []
    for name, recipe in {"research": None, **DUCAT}.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(_peak, (recipe, method, dummy, sizes))
        rows.append({"method": method, "dummy": dummy, "step": name, **sizes, "peak_gib": round(peak, 2)})
    return rows


def _peak(recipe: Recipe | None, method: str, dummy: str, sizes: dict[str, Any]) -> float:
    make: Callable[..., Timed] = Research if recipe is None else partial(Ours, recipe)
    step = make(method, dummy, **sizes)
    for _ in range(2):
        step()
    if sizes["device"] == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_mb() / 1024


def peak_mb(process: int | str = "self") -> float:
    """Return the MB that were resident at most, of the process of that id or of this one.

    `getrusage` tells no less than the peak of the process that began this one.
    """
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def shares(*, model: str, batch_size: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time the ladder of recipes for PGD-AT with recovery-aware dummy classes, each with the ones above it."""
    steps = [
        (name, make("pgd-at", "recovery-aware", model=model, batch_size=batch_size, device=device))
        for name, make in LADDER
    ]
    for _, step in steps:
        step.warm_up()
    times = [[seconds(step) for _, step in steps] for _ in range(rounds)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return [
        {
            "step": name,
            "seconds": round(median, 3),
            "gain": round(before / median, 3),
            "in_all": round(medians[0] / median, 3),
        }
        for (name, _), median, before in zip(steps, medians, medians[:1] + medians, strict=False)
    ]


def matrix_rate(dtype: torch.dtype, device: str, size: int = 2048) -> float:
    """Return the floating-point operations a second of a matrix product, the best of five."""
    matrix = torch.randn(size, size, device=device).to(dtype)

    def product() -> None:
        _ = matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()

    product()
    return 2 * size**3 / min(seconds(product) for _ in range(5))


def forward_flops(model: str, size: int = 32, channels: int = 3, width: int | None = None) -> int:
    """Return the floating-point operations of one image's forward pass: two for each multiply and add."""
    from torch.utils.flop_counter import FlopCounterMode

    network = build(model, CLASSES, channels=channels, width=width, stem_stride=2 if size >= 64 else 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval().to("meta")(torch.empty(1, channels, size, size, device="meta"))
    return int(counter.get_total_flops())


def strength(run: Path, samples: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Attack one network by each way of training to attack, and judge the images by the network itself in float32.

    The images are the run's test images; the network is the one that is deployed, and the objective the cross-entropy
    of its C logits.
    """
    from ducat.data import load_test
    from ducat.runs import RunFolder, load

    folder = RunFolder.open(run)
    config = folder.config
    threat = config.threat.build(None)
    network = load(run, "last")
    x, y = load_test(config.data.name, samples, config.data.root)
    folded = fold_batch_norm(network, x[:2])
    ways: dict[str, tuple[nn.Module, bool, str]] = {
        f"pgd, {threat.steps} steps, float32": (network, False, "pgd"),
        f"pgd, {threat.steps} steps, bf16, folded": (folded or network, True, "pgd"),
        "pgd-cosine, 5 steps, bf16, folded": (folded or network, True, "pgd-cosine"),
    }
    rows = []
    for name, (attacked, bf16, attack) in ways.items():
        lost = []
        for seed in seeds:
            start = threat.random_start(x, torch.Generator().manual_seed(seed))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                inner = ATTACKS[attack]
                found = torch.cat(
                    [
                        inner.run(attacked, *batch[:2], threat, "cross-entropy", batch[2])
                        for batch in zip(x.split(125), y.split(125), start.split(125), strict=True)
                    ]
                )
            with torch.no_grad():
                logits = torch.cat([network(batch) for batch in found.split(250)])
            lost.append((100 * float((logits.argmax(1) == y).float().mean()), float(F.cross_entropy(logits, y))))
        rows.append(
            {
                "attack": name,
                "seeds": list(seeds),
                "accuracy": [round(accuracy, 2) for accuracy, _ in lost],
                "mean_accuracy": round(statistics.fmean(accuracy for accuracy, _ in lost), 3),
                "mean_cross_entropy": round(statistics.fmean(value for _, value in lost), 5),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of equal keys as Markdown."""

    def cell(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def environment(device: str) -> dict[str, Any]:
    """Return what the numbers depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "platform": platform.machine(),
    }


def _processor() -> str:
    """Return its name, and which of the instructions for bf16 it has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    fields = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    found = [kind for kind in ("avx512_bf16", "amx_bf16") if kind in fields.get("flags", "").split()]
    return " ".join([fields.get("model name", platform.processor()), *found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a network of ducat.models")
    parser.add_argument("--batch", type=int, default=128, help="benign images a step")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each step, in turn")
    parser.add_argument("--methods", nargs="+", choices=ADVERSARIAL, default=ADVERSARIAL)
    parser.add_argument("--dummy", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--shares", action="store_true", help="measure each optimisation instead of each method")
    parser.add_argument("--strength", type=Path, metavar="RUN", help="measure how strong the attacks of training are")
    parser.add_argument("--samples", type=int, default=1000, help="test images, with --strength")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    sizes = {"model": arguments.model, "batch_size": arguments.batch, "device": arguments.device}
    if arguments.strength is not None:
        rows = strength(arguments.strength, arguments.samples, (0, 1, 2))
    elif arguments.shares:
        rows = shares(rounds=arguments.rounds, **sizes)
    else:
        for method, dummy in product(arguments.methods, arguments.dummy):
            if arguments.memory:
                rows += peak_memory(method, dummy, **sizes)
            else:
                rows += measure(method, dummy, rounds=arguments.rounds, **sizes)
            gc.collect()
            print(f"{method}, {dummy}: done", file=sys.stderr, flush=True)
    if arguments.json is not None:
        content = {"environment": environment(arguments.device), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print(" ".join(f"{name} {value};" for name, value in environment(arguments.device).items()))
    if arguments.strength is None:
        rates = {str(dtype): matrix_rate(dtype, arguments.device) for dtype in (torch.float32, torch.bfloat16)}
        print("matrix product, GFLOP/s: " + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items()))
        print(f"{arguments.model}: {forward_flops(arguments.model) / 1e9:.3f} GFLOP forward per image")
    print()
    print(table(rows))


if __name__ == "__main__":
    main()
