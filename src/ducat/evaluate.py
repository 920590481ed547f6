"""Evaluation: every suite runs blind and recovery-aware attacks side by side, and the worst case per sample counts."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ducat import checkpoint, losses, weights
from ducat.attacks.adaptive import SilentDummies, with_dummy_classes
from ducat.attacks.pgd import attackable
from ducat.attacks.suites import SUITES, Attack, attack_name
from ducat.audit import AUDITED, Audit, find_warnings, measure_signs
from ducat.config import Config
from ducat.data import load, load_test
from ducat.dummy import RecoveredClassifier, dummy_head, recover
from ducat.models.folded import fold_batch_norm
from ducat.runs import RunFolder, Which
from ducat.seeding import generator as seeded
from ducat.statistics import mcnemar, wilson
from ducat.threat import ThreatModel

Images = Float[Tensor, "samples channels height width"]
Labels = Int[Tensor, " samples"]
Flags = Bool[Tensor, " samples"]

SCHEMA = 1


@dataclass(frozen=True)
class AttackResult:
    """What one attack left standing.

    Attributes:
        strategy: what was run.
        knows_recovery: whether its attacker knew that predictions are recovered.
        correct: whether the recovered prediction still was right, shape (samples,).
        seconds: how long it took.
        black_box: whether it searched without gradients too.
        same_as: name of the attack whose result this is as well: on a network without dummy classes an attack that
            knows recovery is the blind one, and is not run again.
    """

    strategy: str
    knows_recovery: bool
    correct: Flags
    seconds: float
    black_box: bool = False
    same_as: str | None = None

    @property
    def name(self) -> str:
        return attack_name(self.strategy, self.knows_recovery)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, per sample. All tensors are on the CPU.

    Attributes:
        data: name of the data.
        threat: the ball.
        seed: seed of the attacks.
        suite: name of the suite.
        batch_size: samples that were attacked at a time; with the seed it decides the random starts.
        fingerprint: digest of the images and labels; two evaluations with the same one can be compared per sample.
        labels: the labels, shape (samples,).
        clean: whether the benign image is classified correctly.
        robust: whether the sample survives every attack: whether the saved image, looked at once more, is classified
            correctly or is outside the ball.
        attacks: a result per attack.
        adversarial: for each sample the image that first broke it, or the one that came closest, float32, shape
            (samples, channels, H, W).
        unrepeatable: samples that an attack broke and whose saved image did not when it was looked at once more.
        audit: further measurements for the warnings, where the suite asks for them.
        warnings: what a reader must know before quoting a number.
        checkpoint: which checkpoint of a run was measured, "best" or "last"; None for a network from elsewhere.
    """

    data: str
    threat: ThreatModel
    seed: int
    suite: str
    batch_size: int
    fingerprint: str
    labels: Labels = field(repr=False)
    clean: Flags = field(repr=False)
    robust: Flags = field(repr=False)
    attacks: Sequence[AttackResult] = field(repr=False)
    adversarial: Images = field(repr=False)
    unrepeatable: int = 0
    audit: Audit | None = None
    warnings: Sequence[str] = ()
    checkpoint: str | None = None

    @property
    def blind(self) -> Flags:
        """Whether a sample survives every attack that does not know recovery."""
        blind = [attack.correct for attack in self.attacks if not attack.knows_recovery]
        return torch.stack([self.clean, *blind]).all(0)

    @property
    def sink_gap(self) -> float:
        """Blind accuracy - robust accuracy."""
        return float(self.blind.float().mean() - self.robust.float().mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the content of evaluation.json."""
        threat = self.threat
        return {
            "schema": SCHEMA,
            "data": self.data,
            "checkpoint": self.checkpoint,
            "samples": len(self.clean),
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "suite": self.suite,
            "batch_size": self.batch_size,
            "threat": {"norm": threat.norm, "eps": threat.radius, "step_size": threat.stride, "steps": threat.steps},
            "clean": _share(self.clean),
            "attacks": [
                {
                    "name": attack.name,
                    "strategy": attack.strategy,
                    "knows_recovery": attack.knows_recovery,
                    "black_box": attack.black_box,
                    "same_as": attack.same_as,
                    **_share(attack.correct),
                    "seconds": round(attack.seconds, 2),
                }
                for attack in self.attacks
            ],
            "blind": _share(self.blind)["accuracy"],
            "blind_ci95": _share(self.blind)["ci95"],
            "robust": _share(self.robust)["accuracy"],
            "robust_ci95": _share(self.robust)["ci95"],
            "sink_gap": round(self.sink_gap, 6),
            "unrepeatable": self.unrepeatable,
            "audit": self.audit.to_dict() if self.audit else None,
            "warnings": list(self.warnings),
        }

    def save(self, path: Path) -> None:
        """Write the numbers to `path`, a .json file, and flags, labels and images to the .safetensors file beside it.

        Raises:
            ValueError: if the name of `path` does not end in .json.
        """
        if path.suffix != ".json":
            raise ValueError(
                f"{path} must be the name of a .json file: flags and images go to a .safetensors beside it"
            )
        tensors = {name: getattr(self, name) for name in TENSORS}
        content = self.to_dict()
        checkpoint.save(path.with_suffix(".safetensors"), {**tensors, **_named(self.attacks)}, {"evaluation": content})
        checkpoint.write_text(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Evaluation":
        """Read back what `save` wrote, from a run folder or from the .json file's path.

        Raises:
            FileNotFoundError: if there is no such evaluation.
            ValueError: if its file is damaged.
        """
        path = Path(path)
        file = (RunFolder(path).evaluation_path if path.is_dir() else path).with_suffix(".safetensors")
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: run `ducat evaluate {path}` first")
        tensors, state = checkpoint.read(file)
        content = state["evaluation"]
        measured = content["audit"]
        scalars = {name: content[name] for name in SCALARS}
        flags = {name: tensors[name] for name in TENSORS}
        rows = [
            AttackResult(correct=tensors[f"correct.{row['name']}"], **{name: row[name] for name in ROW})
            for row in content["attacks"]
        ]
        return cls(
            **{**scalars, **flags},
            threat=ThreatModel(**content["threat"]),
            attacks=rows,
            audit=Audit.from_dict(measured) if measured else None,
            checkpoint=content.get("checkpoint"),  # evaluations of earlier versions do not say
        )


SCALARS = ("data", "seed", "suite", "batch_size", "fingerprint", "unrepeatable", "warnings")
TENSORS = ("labels", "clean", "robust", "adversarial")
ROW = ("strategy", "knows_recovery", "black_box", "same_as", "seconds")


def _named(attacks: Sequence[AttackResult]) -> dict[str, Tensor]:
    return {f"correct.{attack.name}": attack.correct for attack in attacks}


def _share(flags: Tensor) -> dict[str, Any]:
    count = int(flags.sum())
    return {
        "accuracy": round(count / len(flags), 6),
        "ci95": [round(end, 6) for end in wilson(count, len(flags))],
    }


def evaluate(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    suite: str = "standard",
    *,
    num_classes: int,
    seed: int = 0,
    batch_size: int = 500,
    data: str = "",
    progress: Callable[[str], None] = lambda attack: None,
    parts: Path | None = None,
) -> Evaluation:
    """Attack a classifier with every attack of a suite, blind and recovery-aware.

    Predictions are always recovered ones. Every attack starts from all samples whose benign image is classified
    correctly, so that each attack's accuracy is its own. The image that is kept of each sample is looked at once more
    at the end, in float32, and decides whether the sample counts as robust.

    Args:
        model: maps images in [0, 1] to 2C logits (a network with dummy classes) or to C logits, on any device. A
            `RecoveredClassifier` is measured with its own recovery, anything else with 2C logits by max.
        x: benign images in [0, 1], shape (samples, channels, H, W), on any device; a chunk at a time goes to the
            model's.
        y: labels in [0, C), shape (samples,).
        threat: ball, step size and steps; the attacks set their own steps.
        suite: a row of `attacks.suites.SUITES`: "quick", "light", "standard" or "full".
        num_classes: C, the number of real classes.
        seed: of the attacks' random starts.
        batch_size: samples attacked at a time, a chunk. Each chunk has its own seed.
        data: name of the data, for the report.
        progress: told of each attack and chunk as it starts.
        parts: a folder that keeps each finished chunk. With it an evaluation that was interrupted continues where it
            was, and several processes started by `accelerate launch` share the chunks; each returns the whole.

    Raises:
        ValueError: if the suite is unknown, there are no samples, images or labels are out of range, or the model's
            outputs are not finite or fit neither C nor 2C.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown: choose from {', '.join(SUITES)}")
    _check(x, y, num_classes)
    network, blind = _views(model, x, num_classes)
    fingerprint = _digest(x, y)
    with attackable(network):
        attacked = _fastest(network, x)
        if blind is not None:
            blind = SilentDummies(attacked if blind is network else _fastest(blind, x))
        job = _Job(network, attacked, blind, threat, suite, seed)
        how = getattr(model, "how", "max")
        identity = _digest(*network.state_dict().values()), fingerprint, str(threat), suite, seed, batch_size, how
        chunks = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
        done = _shared(job, chunks, list(map(str, identity)), progress, parts)
        clean, adversarial = (torch.cat([getattr(part, name) for part in done]) for name in ("clean", "adversarial"))
        attacks = [
            replace(rows[0], correct=torch.cat([row.correct for row in rows]), seconds=sum(row.seconds for row in rows))
            for rows in zip(*(part.attacks for part in done), strict=True)
        ]
        images = adversarial.split(batch_size)
        robust = torch.cat([job.withstands(*chunk, found) for chunk, found in zip(chunks, images, strict=True)])
        standing = torch.stack([clean, *(attack.correct for attack in attacks)]).all(0)
        measured = None
        if SUITES[suite].audit and threat.radius > 0 and clean.any():
            progress("audit")
            by_gradients = torch.stack([clean, *(a.correct for a in attacks if not a.black_box)]).all(0)
            rows = clean.nonzero().squeeze(1)[:AUDITED]
            few = job.to_device(x[rows.to(x.device)], y[rows.to(y.device)], by_gradients[rows])
            measured = measure_signs(job.attacked, few[0], few[1], threat, few[2], seed)
    evaluation = Evaluation(
        data=data,
        threat=threat,
        seed=seed,
        suite=suite,
        batch_size=batch_size,
        fingerprint=fingerprint,
        labels=y.cpu(),
        clean=clean,
        robust=robust,
        attacks=attacks,
        adversarial=adversarial,
        unrepeatable=int((robust & ~standing).sum()),
        audit=measured,
    )
    return replace(evaluation, warnings=find_warnings(evaluation))


@dataclass(frozen=True)
class _Part:
    """What the attacks left of one chunk, on the CPU."""

    clean: Tensor
    adversarial: Tensor
    attacks: Sequence[AttackResult]


@dataclass(frozen=True)
class _Job:
    """What is done to every chunk."""

    network: nn.Module  # 2C outputs, whose recovery by max is the classifier that is deployed
    attacked: nn.Module  # the same, in the form that is fastest to attack
    blind: nn.Module | None  # what an attacker sees who does not know recovery; None without dummy classes
    threat: ThreatModel
    suite: str
    seed: int

    @property
    def device(self) -> torch.device:
        return _device(self.network)

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device) for tensor in tensors)

    def margin(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether the recovered prediction is right, and the recovered margin."""
        with torch.no_grad(), _float32():
            logits = recover(self.network(x)).float()
        return logits.argmax(1) == y, losses.margin(logits, y)

    def correct(self, x: Tensor, y: Tensor) -> Tensor:
        return self.margin(x, y)[0]

    def withstands(self, x: Tensor, y: Tensor, adversarial: Tensor) -> Tensor:
        """Tell which samples survive their adversarial image; one outside the ball breaks nothing."""
        x, y, adversarial = self.to_device(x, y, adversarial)
        survived = self.correct(adversarial, y) | ~self.threat.allows(adversarial, x)
        # A benign image that is classified wrongly is its own adversarial image, whatever was made of it.
        return (survived & self.correct(x, y)).cpu()

    def attack(self, number: int, x: Tensor, y: Tensor, progress: Callable[[Attack], None]) -> _Part:
        x, y = self.to_device(x, y)
        clean, margin = self.margin(x, y)
        rows = clean.nonzero().squeeze(1)
        adversarial, standing = x.clone(), clean.clone()
        results: dict[str, AttackResult] = {}
        for attack in SUITES[self.suite].attacks:
            if self.threat.norm not in attack.norms:
                continue
            twin = next((row for row in results.values() if row.strategy == attack.strategy), None)
            if self.blind is None and twin:
                results[attack.name] = replace(
                    twin, knows_recovery=attack.knows_recovery, seconds=0.0, same_as=twin.name
                )
                continue
            progress(attack)
            correct, began = clean.clone(), time.perf_counter()
            if len(rows):
                view = self.attacked if attack.knows_recovery or self.blind is None else self.blind
                noise = seeded(self.seed, "evaluate", attack.strategy, number)
                found = x.clone()
                found[rows] = attack.run(view, x[rows], y[rows], self.threat, noise)
                right, reached = self.margin(found, y)
                inside = self.threat.allows(found, x)
                correct &= right | ~inside
                better = standing & inside & (~right | (reached > margin))
                adversarial[better], margin[better] = found[better], reached[better]
                standing &= correct
            results[attack.name] = AttackResult(
                attack.strategy, attack.knows_recovery, correct.cpu(), time.perf_counter() - began, attack.black_box
            )
        return _Part(clean.cpu(), adversarial.cpu(), list(results.values()))


def _device(network: nn.Module) -> torch.device:
    tensors = (*network.parameters(), *network.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _shared(
    job: _Job,
    chunks: Sequence[tuple[Tensor, Tensor]],
    identity: list[str],
    progress: Callable[[str], None],
    parts: Path | None,
) -> list[_Part]:
    """Attack every chunk, or this process's share of them, and return what all processes made."""

    def attack(number: int) -> _Part:
        first = sum(len(y) for _, y in chunks[:number])
        x, y = chunks[number]
        place = f", samples {first + 1} to {first + len(y)}" if len(chunks) > 1 else ""
        return job.attack(number, x, y, lambda row: progress(row.name + place))

    if parts is None:
        return [attack(number) for number in range(len(chunks))]
    from accelerate import PartialState

    processes = PartialState()
    parts.mkdir(parents=True, exist_ok=True)
    files = [parts / f"{number:05d}.safetensors" for number in range(len(chunks))]
    for number in range(processes.process_index, len(chunks), processes.num_processes):
        if _read_part(files[number], identity) is None:
            _write_part(files[number], identity, attack(number))
    processes.wait_for_everyone()
    done = [_read_part(file, identity) for file in files]
    if None in done:
        raise RuntimeError(f"{files[done.index(None)]} is gone: do two evaluations use {parts}?")
    return [part for part in done if part is not None]


def _write_part(file: Path, identity: list[str], part: _Part) -> None:
    rows = [{name: getattr(attack, name) for name in ROW} for attack in part.attacks]
    tensors = {"clean": part.clean, "adversarial": part.adversarial, **_named(part.attacks)}
    checkpoint.save(file, tensors, {"identity": identity, "attacks": rows})


def _read_part(file: Path, identity: list[str]) -> _Part | None:
    """Return the finished chunk, or None if there is none of this evaluation."""
    if not file.is_file():
        return None
    tensors, state = checkpoint.read(file)
    if state["identity"] != identity:
        return None
    attacks = [
        AttackResult(correct=tensors[f"correct.{attack_name(row['strategy'], row['knows_recovery'])}"], **row)
        for row in state["attacks"]
    ]
    return _Part(tensors["clean"], tensors["adversarial"], attacks)


def _check(x: Tensor, y: Tensor, num_classes: int) -> None:
    if not len(x):
        raise ValueError("there are no samples to evaluate on")
    if len(x) != len(y):
        raise ValueError(f"{len(x)} images but {len(y)} labels")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"the images run from {low:g} to {high:g}: they must be in [0, 1]; normalise inside the model")
    if not (int(y.min()) >= 0 and int(y.max()) < num_classes):
        raise ValueError(f"labels run from {int(y.min())} to {int(y.max())}, outside num_classes={num_classes}")


def _views(model: nn.Module, x: Tensor, num_classes: int) -> tuple[nn.Module, nn.Module | None]:
    """Return the deployed classifier with 2C outputs, and the network that a blind attacker sees.

    The first, recovered by max, is what is deployed; the second is None where there are no dummy classes. Both are made
    after a look at the outputs.
    """
    network = model.model if isinstance(model, RecoveredClassifier) else model
    with attackable(network), torch.no_grad():
        logits = network(x[:1].to(_device(network)))
    if not torch.isfinite(logits).all():
        raise ValueError("the model's outputs are not finite: no attack can be measured on it")
    if logits.shape[1] == num_classes:
        return SilentDummies(network), None
    if logits.shape[1] == 2 * num_classes:
        return (with_dummy_classes(model) if isinstance(model, RecoveredClassifier) else network), network
    raise ValueError(
        f"the model has {logits.shape[1]} outputs: with num_classes={num_classes} it must have {num_classes}, "
        f"or {2 * num_classes} with dummy classes"
    )


def _fastest(network: nn.Module, x: Tensor) -> nn.Module:
    return fold_batch_norm(network, x[:2].to(_device(network))) or network


def _num_classes(model: nn.Module) -> int:
    """Return C of a network of ours."""
    head = dummy_head(model)
    if head is not None:
        return head.num_classes
    return [module.out_features for module in model.modules() if isinstance(module, nn.Linear)][-1]


def _digest(*tensors: Tensor) -> str:
    """Return a short digest of the values of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(str((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _float32() -> Iterator[None]:
    """Compute in whole float32, also on a GPU that would shorten it, also inside of autocast."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    with (
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same samples.

    Attributes:
        samples: how many.
        first_only: samples that only the first gets right.
        second_only: samples that only the second gets right.
    """

    samples: int
    first_only: int
    second_only: int

    @property
    def difference(self) -> float:
        """Accuracy of the second - accuracy of the first."""
        return (self.second_only - self.first_only) / self.samples

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test, two-sided."""
        return mcnemar(self.first_only, self.second_only)


def compare(first: Evaluation, second: Evaluation) -> dict[str, Comparison]:
    """Compare two evaluations sample by sample: under "clean", "blind" and "robust".

    Raises:
        ValueError: if they are not of the same samples and the same ball.
    """
    if first.fingerprint != second.fingerprint:
        raise ValueError(
            f"the evaluations are not of the same samples ({first.data or 'data'}, {len(first.clean)}, and "
            f"{second.data or 'data'}, {len(second.clean)}): evaluate both with the same data and --samples"
        )
    balls = [(one.threat.norm, one.threat.radius) for one in (first, second)]
    if balls[0] != balls[1]:
        raise ValueError(f"the evaluations are of different threat models, {balls[0]} and {balls[1]}")
    return {
        name: Comparison(len(a), int((a & ~b).sum()), int((b & ~a).sum()))
        for name, a, b in ((name, getattr(first, name), getattr(second, name)) for name in ("clean", "blind", "robust"))
    }


def evaluate_run(
    folder: RunFolder,
    suite: str = "standard",
    *,
    samples: int | None = None,
    seed: int = 0,
    which: Which = "best",
    threat: ThreatModel | None = None,
    batch_size: int = 500,
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a run on its test images, write evaluation.json and evaluation.safetensors, and return the former.

    Finished chunks are kept in the run folder until the end, so an evaluation that was interrupted continues when it is
    asked for again with the same settings, and `accelerate launch` shares it among processes.

    Args:
        folder: the run.
        suite: which attacks, a row of `attacks.suites.SUITES`.
        samples: how many test images, a fixed stratified subset; all by default.
        seed: of the attacks.
        which: "best" or "last" checkpoint.
        threat: the ball; by default the one that the run was trained in.
        batch_size: samples attacked at a time.
        device: "auto", "cpu" or "cuda".
        progress: told of each attack and chunk as it starts.
    """
    config = folder.config
    model = folder.load(which)
    return _evaluate_and_save(
        model,
        load_test(config.data.name, samples, config.data.root),
        threat or config.threat.build(None),
        folder.evaluation_path,
        device,
        which,
        suite=suite,
        num_classes=_num_classes(model),
        seed=seed,
        batch_size=batch_size,
        data=folder.manifest["data"]["title"],
        progress=progress or (lambda attack: None),
    )


def evaluate_checkpoint(
    source: Path,
    config: Config,
    suite: str = "standard",
    *,
    num_classes: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    path: Path | None = None,
    batch_size: int = 500,
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate any network on a data set's test images, and return the content of an evaluation.json.

    Args:
        source: file of weights, as `weights.read` takes it.
        config: its `data`, `model` and `threat` say what to evaluate and how; the rest of it is not used. A head with
            twice as many outputs as the data have classes has dummy classes.
        suite: which attacks, a row of `attacks.suites.SUITES`.
        num_classes: C, checked against the data; None does not check.
        samples: how many test images, a fixed stratified subset; all by default.
        seed: of the attacks.
        path: the .json file to write, with a .safetensors beside it; nothing is written by default.
        batch_size: samples attacked at a time.
        device: "auto", "cpu" or "cuda".
        progress: told of each attack and chunk as it starts.

    Raises:
        FileNotFoundError: if there are no such weights or data.
        ValueError: if the weights do not fit the network, or the data have another number of classes.
    """
    dataset = load(config.data.name, root=config.data.root)
    classes = len(dataset.classes)
    if num_classes not in (None, classes):
        raise ValueError(f"num_classes={num_classes}, but {config.data.name} has {classes} classes")
    config = config.resolve(dataset.spec)
    _, model = weights.read(source).network(config.architecture(dataset))
    return _evaluate_and_save(
        model,
        load_test(config.data.name, samples, config.data.root),
        config.threat.build(None),
        path,
        device,
        None,
        suite=suite,
        num_classes=classes,
        seed=seed,
        batch_size=batch_size,
        data=dataset.spec.title,
        progress=progress or (lambda attack: None),
    )


def _evaluate_and_save(
    model: nn.Module,
    test: tuple[Tensor, Tensor],
    threat: ThreatModel,
    path: Path | None,
    device: str,
    which: Which | None,
    **settings: Any,
) -> dict[str, Any]:
    from accelerate import PartialState

    processes = PartialState(cpu=device == "cpu")
    if device == "cuda" and processes.device.type != "cuda":
        raise ValueError("device=cuda: PyTorch finds no GPU here; choose cpu or auto")
    parts = path.with_suffix(".parts") if path is not None else None
    evaluation = evaluate(model.to(processes.device), *test, threat, parts=parts, **settings)
    evaluation = replace(evaluation, checkpoint=which)
    processes.wait_for_everyone()
    if path is not None and parts is not None and processes.is_main_process:
        evaluation.save(path)
        shutil.rmtree(parts)
    return evaluation.to_dict()
